"""A real nginx with ``deploy/nginx.conf`` in front of a real service."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import wire
from conftest import ROOT, TIMEOUT, Service, api_client, append, wait_until
from websockets.sync.client import connect

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

MAIN = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {}
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include site.conf;
}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def site(service: Service, port: int, folder: Path) -> str:
    """Return ``deploy/nginx.conf`` without TLS, with the test's own ports and files."""
    changes = {
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{service.port};",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{port};",
        "listen [::]:443 ssl http2;": "",
        "ssl_certificate /etc/ssl/stream.example/fullchain.pem;": "",
        "ssl_certificate_key /etc/ssl/stream.example/privkey.pem;": "",
        "/var/log/nginx/": f"{folder}/",
    }
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    for there, here in changes.items():
        assert there in text
        text = text.replace(there, here)
    return text


class Proxy:
    """nginx as a process. The helpers of ``wire`` take it for a service."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.api = f"{self.url}/api"
        (folder / "nginx.conf").write_text(MAIN)
        (folder / "site.conf").write_text(site(service, self.port, folder))
        command = [NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(self.is_up, "nginx")

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.process.stderr.read()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with wire.serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with api_client(service) as client:
        yield client


@pytest.fixture(scope="module")
def proxy(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy(service, tmp_path_factory.mktemp("nginx"))
    yield proxy
    proxy.stop()


def test_a_stream_arrives_chunk_by_chunk(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    client.put(f"/threads/{thread}/messages/m")
    with wire.Stream(proxy, f"/threads/{thread}/messages/m/stream") as reader:
        assert reader.headers["content-type"] == "text/event-stream"
        assert reader.line() == b"retry: 1000\n"  # before the first chunk
        for text in ("one", "two", "three"):
            append(client, thread, "m", text)
            assert wire.data_of(reader.frame())["content"] == text  # before the next chunk
        client.post(f"/threads/{thread}/messages/m/complete")
        assert b"event: complete\n" in reader.frame()
        assert reader.rest() == b""


def test_a_streamed_append_is_readable_before_it_ends(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    with wire.Upload(proxy, wire.message_path(thread, "m"), wire.NDJSON) as upload:
        texts = []
        for text in ("one", "two", "three"):
            upload.send(json.dumps({"content": text}).encode() + b"\n")
            texts.append(text)
            wait_until(lambda: wire.contents(client, thread) == texts, f"{texts}")
        assert upload.finish()[0] == 201


def test_a_large_streamed_append_is_not_refused(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    line = json.dumps({"content": "x" * 1_000_000}).encode() + b"\n"
    with wire.Upload(proxy, wire.message_path(thread, "m"), wire.NDJSON) as upload:
        for _ in range(3):
            upload.send(line)
        assert upload.finish()[1]["chunkCount"] == 3


def test_a_stopped_message_ends_a_streamed_append(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    with wire.Upload(proxy, wire.message_path(thread, "m"), wire.NDJSON) as upload:
        upload.send(b'{"content": "one"}\n')
        wait_until(lambda: wire.contents(client, thread) == ["one"], "the first chunk")
        client.post(f"/threads/{thread}/messages/m/abort", json={"reason": "stopped"})
        status, answer = upload.answer()  # while the producer is still sending
    assert (status, answer["reason"]) == (409, "stopped")


def test_websocket(proxy: Proxy, thread: str) -> None:
    with connect(f"ws://127.0.0.1:{proxy.port}/api/ws", proxy=None, origin=proxy.url) as socket:
        socket.send(json.dumps({"type": "subscribe", "id": 1, "thread_id": thread, "follow": True}))
        for text in ("one", "two", "three"):
            place = {"thread_id": thread, "message_id": "m"}
            socket.send(json.dumps({"type": "append", "id": 2, **place, "chunks": [{"content": text}]}))
            answers = {answer["type"]: answer for answer in (json.loads(socket.recv(TIMEOUT)) for _ in range(2))}
            assert answers["chunk"]["content"] == text


def test_a_reader_resumes_with_last_event_id_after_the_service_was_killed(
    service: Service, client: httpx.Client, proxy: Proxy, thread: str
) -> None:
    append(client, thread, "m", "one", "two")
    with wire.Stream(proxy, f"/threads/{thread}/stream") as reader:
        reader.line()
        cursor = reader.frame().splitlines()[0].removeprefix(b"id: ").decode()
        service.restart()
    append(client, thread, "m", "three", complete="true")
    with wire.Stream(proxy, f"/threads/{thread}/stream", {"Last-Event-ID": cursor}) as reader:
        frames = reader.rest().split(b"\n\n")[:-1]
    assert [wire.data_of(frame).get("content") for frame in frames] == ["two", "three", None]


def test_appends_share_connections_to_the_service(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    with api_client(proxy) as through:
        for index in range(200):
            assert append(through, thread, "m", str(index), index=index).status_code == 201
    assert wire.contents(client, thread) == [str(index) for index in range(200)]


def test_only_pages_of_the_same_origin_may_connect(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    append(client, thread, "m", "one")
    assert httpx.get(f"{proxy.api}/threads/{thread}", headers={"Origin": proxy.url}).status_code == 200
    assert httpx.get(f"{proxy.api}/threads/{thread}", headers={"Origin": "http://evil.example"}).status_code == 403


def test_no_token_is_logged(client: httpx.Client, proxy: Proxy, thread: str) -> None:
    append(client, thread, "m", "one", complete="true")
    with wire.Stream(proxy, f"/threads/{thread}/stream?access_token=a-token") as reader:
        reader.rest()
    log = proxy.folder / "resume-stream.log"
    wait_until(lambda: f"GET /api/threads/{thread}/stream" in log.read_text(), "the line in the log")
    assert "a-token" not in log.read_text()
