"""For those who run the service: readiness, metrics, logs, the schema, and the commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
from conftest import ROOT, TIMEOUT, Service, api_client, append, wait_until
from prometheus_client.parser import text_string_to_metric_families
from resume_stream import app
from resume_stream.app import main
from websockets.sync.client import connect
from wire import NDJSON, Stream, contents, generation, message_path, problem, serving, websocket_address

SECRET = "correct horse battery staple, 32+"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("operations")) as service:
        yield service


# Health


def test_a_locked_database_is_not_ready(start_service: Callable[..., Service]) -> None:
    service = start_service()
    with httpx.Client(base_url=service.url, timeout=TIMEOUT) as client:
        assert (client.get("/health/ready").status_code, client.get("/health/live").status_code) == (200, 200)
        with contextlib.closing(sqlite3.connect(service.db, isolation_level=None)) as other:
            other.execute("begin immediate")
            answers = [client.get("/health/live"), client.get("/health/ready")]
            assert [answer.status_code for answer in answers] == [200, 503]
            assert "locked" in problem(answers[1])[1]["detail"]
            assert int(answers[1].headers["retry-after"]) >= 1
            other.execute("rollback")
        wait_until(lambda: client.get("/health/ready").status_code == 200)


def test_a_full_disk_is_not_ready(service: Service, client: httpx.Client) -> None:
    assert append(client, "t", "m", "before").status_code == 201
    taken = Path(f"{service.db}-wal").stat().st_size
    free = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (taken, resource.RLIM_INFINITY))
    answers = [append(client, "t", "m", "too much"), client.get(f"{service.url}/health/ready")]
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, free)
    assert [problem(answer)[0] for answer in answers] == [503, 503]
    assert client.get(f"{service.url}/health/ready").status_code == 200
    assert append(client, "t", "m", "after").json()["seq"] == 2


class NotReady(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(503, "not ready")

    def log_message(self, *message: Any) -> None:
        pass


def test_healthcheck_tells_by_its_exit_code(shared: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["healthcheck", "--port", str(shared.port)]) == 0
    assert capsys.readouterr() == ("ready\n", "")
    with HTTPServer(("127.0.0.1", 0), NotReady) as server:
        threading.Thread(target=server.handle_request).start()
        assert main(["healthcheck", "--port", str(server.server_port)]) == 1
        assert "not ready" in capsys.readouterr().err
    assert main(["healthcheck", "--port", str(server.server_port)]) == 1
    assert re.fullmatch(r"resume-stream: .*does not answer.*\n", capsys.readouterr().err)


# Metrics


def scraped(service: Service) -> dict[str, float]:
    """Return every sample by name and labels, as Prometheus reads them."""
    answer = httpx.get(f"{service.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name.removeprefix('resume_stream_')}{{{labels}}}".replace("{}", "")] = sample.value
    return samples


def change(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the samples that changed, without those that depend on time and size."""
    moved = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    return {
        name: value
        for name, value in moved.items()
        if not re.search(r"_bucket|_created|_seconds|_bytes$|^commit_chunks", name)
    }


def test_appends_are_counted(start_service: Callable[..., Service]) -> None:
    service = start_service()
    before = scraped(service)
    assert before["database_bytes"] > 0
    with api_client(service) as client:
        append(client, "t", "a", "Hé", "llo", index=0)
        append(client, "t", "a", "Hé", "llo", index=0)  # a retry is not more
        client.post(message_path("t", "b"), content=b'{"content": "x"}\n{"content": "y"}\n', headers=NDJSON)
        append(client, "t", "c", "z", complete=True)
        after = scraped(service)
        assert change(before, after) == {"chunks_in_total": 5, "bytes_in_total": 9, "active_messages": 2}
        commits = after["commit_seconds_count"]
        assert 3 <= commits <= 6
        assert after["commit_chunks_count"] == commits
        assert after["commit_chunks_sum"] == 5
        assert 0 < after["commit_seconds_sum"] < 60
        assert after["commit_seconds_bucket{le=+Inf}"] == commits
        assert after["wal_bytes"] > 0
        client.post(message_path("t", "a", "abort"), json={"reason": "reasons are free text"})
        client.post(message_path("t", "a", "abort"), json={"reason": "again"})
        assert change(after, scraped(service)) == {"active_messages": -1, "aborts_total{reason=requested}": 1}


def test_sent_chunks_are_counted(shared: Service) -> None:
    with api_client(shared) as client:
        append(client, "out", "run", "one", "two", complete=True)
        before = scraped(shared)
        with Stream(shared, "/threads/out/stream") as stream:
            sent = len(stream.rest()) - len(b"retry: 1000\n")
        after = scraped(shared)
        assert change(before, after) == {
            "chunks_out_total": 3,
            "bytes_out_total": sent,
            "resumes_total{kind=start,outcome=resumed}": 1,
        }
        # The same through a WebSocket.
        with connect(websocket_address(shared)) as socket:
            socket.send(json.dumps({"type": "subscribe", "id": 1, "thread_id": "out"}))
            assert [json.loads(socket.recv(TIMEOUT))["type"] for _ in range(4)][-1] == "unsubscribed"
        assert scraped(shared)["chunks_out_total"] - after["chunks_out_total"] == 3


def test_readers_and_latency_are_measured(shared: Service) -> None:
    with api_client(shared) as client:
        before = scraped(shared)
        client.put("/threads/live/messages/run")
        with Stream(shared, "/threads/live/stream") as first, Stream(shared, "/threads/live/stream") as second:
            assert first.line() == second.line() == b"retry: 1000\n"
            wait_until(lambda: scraped(shared)["readers"] == 2)
            append(client, "live", "run", "x")
            first.frame()
            second.frame()
            after = scraped(shared)
            measured = "append_to_reader_seconds"
            assert after[f"{measured}_count"] - before[f"{measured}_count"] == 1  # to its first reader
            assert 0 < after[f"{measured}_sum"] - before[f"{measured}_sum"] < 10
        wait_until(lambda: scraped(shared)["readers"] == 0)


def test_resumes_are_counted_by_kind_and_outcome(shared: Service) -> None:
    with api_client(shared) as client:
        append(client, "res", "run", "Hello")
        append(client, "res", "run", complete=True)
        now = generation(client, "res")
        stream, resume = "/threads/res/stream", {"thread_id": "res", "message_id": "run"}
        for kind, outcome, call in (
            ("start", "resumed", lambda: client.get(stream)),
            ("cursor", "resumed", lambda: client.get(stream, params={"after": f"{now}-1"})),
            ("cursor", "resumed", lambda: client.get(stream, headers={"Last-Event-ID": f"{now}-1"})),
            ("cursor", "finished", lambda: client.get(stream, params={"after": f"{now}-2"})),
            ("cursor", "reset", lambda: client.get(stream, params={"after": "1-1"})),
            ("content", "resumed", lambda: client.post("/resume-stream", json={**resume, "known_content": "He"})),
            ("content", "reset", lambda: client.post("/resume-stream", json={**resume, "known_content": "Hu"})),
        ):
            name = f"resumes_total{{kind={kind},outcome={outcome}}}"
            before = scraped(shared)
            assert call().is_success
            moved = {key: value for key, value in change(before, scraped(shared)).items() if "resumes" in key}
            assert moved == {name: 1}


def test_producer_timeouts_and_expired_threads_are_counted(start_service: Callable[..., Service]) -> None:
    timing = ("--producer-timeout", "200ms", "--ttl", "600ms", "--cleanup-interval", "50ms")
    service = start_service(*timing)
    with api_client(service) as client:
        append(client, "t", "run", "x")
        wait_until(lambda: scraped(service).get("expired_threads_total"))
        after = scraped(service)
    assert after["aborts_total{reason=producer_timeout}"] == 1
    assert after["expired_threads_total"] == 1
    assert after["active_messages"] == 0


# Logs


def test_logs_are_json_with_request_ids_and_without_content_or_tokens(tmp_path: Path) -> None:
    """Every text and token has a marker, and no line of the log has it, whatever goes wrong."""
    marker = "xyzzy-4711"
    secret = f"{SECRET}{marker}"
    claims = {"exp": 2**33, "scope": "read write abort admin", "threads": ["*"]}
    token = jwt.encode({**claims, "jti": marker}, secret, "HS256")
    bad_tokens = [f"{marker}.{marker}.{marker}", jwt.encode({**claims, "exp": 1}, secret, "HS256")]
    marks = [marker, token, *bad_tokens, token.split(".")[1], token.split(".")[2]]
    environment = {**os.environ, "RESUME_STREAM_SECRET": secret}
    command = [sys.executable, str(ROOT / "app.py"), "serve", "--db", str(tmp_path / "chunks.db"), "--port", "0"]
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen([*command, "--max-chunk", "1KiB"], env=environment, stdout=file, stderr=file)
    try:
        url = wait_until(lambda: re.search(r"http://\S+:\d+", output.read_text()))[0]
        with httpx.Client(base_url=f"{url}/api", headers={"Authorization": f"Bearer {token}"}) as client:
            chunks = message_path("t", "run")
            for body in (
                {"content": marker},
                {"content": marker, "event": marker},
                {"content": marker, "event": "complete"},
                {"content": marker * 1000},
                {marker: marker},
                [{"content": [marker]}],
                marker,
            ):
                client.post(chunks, json=body)
            for kind in ("application/json", "application/x-ndjson", "text/plain", "text/html", marker):
                for bytes_ in (marker.encode(), f'"{marker}'.encode(), b"\xff" + marker.encode()):
                    client.post(chunks, content=bytes_, headers={"Content-Type": kind})
            client.post(chunks, json={"content": "x"}, params={"index": 99, "complete": marker})
            client.post(message_path("t", "stop", "chunks"), json={"content": marker})
            client.post(message_path("t", "stop", "abort"), json={"reason": marker})
            client.post(message_path("t", "run", "abort"), content=marker)
            client.post(message_path("t", "stop", "chunks"), json={"content": marker})
            resume = {"thread_id": "t", "message_id": "run", "known_content": marker, "idle_timeout": 0.01}
            client.post("/resume-stream", json=resume)
            client.post("/resume-stream", json={**resume, "known_content": marker * 2})
            client.post("/resume-stream", json={**resume, "x": marker})
            client.post("/threads/t/tokens", json={"scope": marker})
            client.get("/threads/t/content")
            client.get("/threads", params={"status": marker})
            client.get("/threads/t/stream", params={"idle_timeout": "0.01", "after": marker})
            client.get("/threads", headers={"X-Request-ID": "taken-over-1"})
            client.get("/threads", headers={"X-Request-ID": 'forged","level":"critical'})
            client.get("/threads", headers={"Origin": "https://evil.example"})
        with httpx.Client(base_url=f"{url}/api") as nobody:
            for text in (token, *bad_tokens):
                nobody.get("/threads/t/stream", params={"access_token": text, "idle_timeout": "0.01"})
                nobody.delete("/threads/t", params={"access_token": text})
                nobody.get("/threads", headers={"Authorization": f"Bearer {text}"})
                with (
                    contextlib.suppress(Exception),
                    connect(f"{url}/api/ws?access_token={text}".replace("http", "ws", 1)) as ws,
                ):
                    for frame in (
                        {
                            "type": "append",
                            "id": 1,
                            "thread_id": "t",
                            "message_id": "ws",
                            "chunks": [{"content": marker}],
                        },
                        {"type": "append", "id": 2, "thread_id": "t", "message_id": "ws", "chunks": marker},
                        {"type": "abort", "id": 3, "thread_id": "t", "message_id": "ws", "reason": marker},
                        {"type": "subscribe", "id": 4, "thread_id": "t", "message_id": "ws", "known_content": marker},
                    ):
                        ws.send(json.dumps(frame))
                        ws.recv(TIMEOUT)
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
    text = output.read_text()
    assert [mark for mark in marks if mark in text] == []
    assert "Traceback" not in text
    start, *lines = text.splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) > 10
    for record in records:
        assert {"time", "level", "message", "request"} <= record.keys()
        assert record["level"] in ("info", "warning", "error")
    requests = [record["request"] for record in records]
    assert requests.count("taken-over-1") == 1
    generated = [request for request in requests if re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", request)]
    assert len(set(generated)) > 10
    assert any("evil.example" in record["message"] for record in records)
    assert "open to whoever has a token" in start


@pytest.mark.parametrize(
    ("flags", "who"),
    [([], "this machine only"), (["--host", "0.0.0.0", "--allow-anonymous"], "anyone who can connect")],
)
def test_the_start_up_line(tmp_path: Path, flags: list[str], who: str) -> None:
    service = Service(tmp_path / "chunks.db", *flags)
    line = service.spawn().stdout.readline()
    assert service.end() == 0
    for part in ("resume-stream 0.", f"SQLite {sqlite3.sqlite_version}", str(service.db), "synchronous=FULL", who):
        assert part in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", ["{}/notify.sock", "@{}/notify"], ids=["file", "abstract"])
def test_systemd_is_told_of_start_life_and_stop(
    tmp_path: Path, start_service: Callable[..., Service], name: str
) -> None:
    address = name.format(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(TIMEOUT)
        service = start_service(environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"})
        assert [systemd.recv(100) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
        assert service.end() == 0
        systemd.settimeout(0)
        rest = [systemd.recv(100)]
        while rest[-1] == b"WATCHDOG=1":
            rest.append(systemd.recv(100))
        assert rest[-1] == b"STOPPING=1"


def test_a_systemd_that_does_not_listen_does_not_stop_the_service(
    tmp_path: Path, start_service: Callable[..., Service]
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nobody.sock"), "WATCHDOG_USEC": "200000"}
    service = start_service(environment=environment)
    assert httpx.get(f"{service.url}/health/live").status_code == 200
    assert service.end() == 0


@pytest.mark.parametrize("path", ["/", "/static/resume-stream.js", "/static/page.css"])
def test_a_page_is_never_cached_and_runs_no_foreign_code(service: Service, path: str) -> None:
    headers = httpx.get(f"{service.url}{path}").raise_for_status().headers
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"] == "default-src 'self'; frame-ancestors 'none'"


def test_the_types_of_the_client_are_shown_as_text(shared: Service) -> None:
    answer = httpx.get(f"{shared.url}/static/resume-stream.d.ts")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert "export" in answer.text
    script = httpx.get(f"{shared.url}/static/resume-stream.js")
    assert script.headers["content-type"].partition(";")[0] == "text/javascript"


# The schema


@pytest.mark.parametrize("path", ["/", "/schema", "/schema/swagger", "/schema/openapi.json"])
def test_a_page_loads_nothing_from_another_host(shared: Service, path: str) -> None:
    answer = httpx.get(f"{shared.url}{path}")
    assert answer.status_code == 200
    loaded = re.findall(r"""(?:src|href|action|data|url|srcset)\s*[=:]\s*["']?([^"'\s>]+)""", answer.text)
    loaded += re.findall(r"""(?:import|fetch|url)\s*\(?\s*["']([^"']+)""", answer.text)
    assert [link for link in loaded if re.match(r"(https?:)?//", link)] == []
    if path != "/schema/openapi.json":
        assert loaded
        for link in loaded:
            if link.startswith("/") and len(link) > 1:
                assert httpx.get(f"{shared.url}{link}").status_code == 200, link


def test_the_files_of_swagger_have_types_that_browsers_take(shared: Service) -> None:
    """Browsers do not apply a style sheet of another type, and do not run a script with nosniff."""
    links = re.findall(r'(?:src|href)="(/schema/assets/[^"]+)"', httpx.get(f"{shared.url}/schema").text)
    types = {link: httpx.get(f"{shared.url}{link}").headers["content-type"].partition(";")[0] for link in links}
    expected = {link: "text/css" if link.endswith(".css") else "text/javascript" for link in links}
    assert len(links) == 3
    assert {link: kind.replace("application/j", "text/j") for link, kind in types.items()} == expected


TAKES_BODY = {
    "/api/threads/{thread_id}/messages/{message_id}/chunks": {"application/json", "application/x-ndjson", "text/plain"},
    "/api/threads/{thread_id}/messages/{message_id}/abort": {"application/json"},
    "/api/resume-stream": {"application/json"},
    "/api/threads/{thread_id}/tokens": {"application/json"},
}


def test_the_schema_has_every_route(shared: Service) -> None:
    schema = httpx.get(f"{shared.url}/schema/openapi.json").json()
    message = "/api/threads/{thread_id}/messages/{message_id}"
    thread = "/api/threads/{thread_id}"
    routes = {(method, path) for path, methods in schema["paths"].items() for method in methods}
    assert routes == {
        ("put", message),
        *(("post", f"{message}/{call}") for call in ("chunks", "complete", "abort")),
        ("get", f"{message}/stream"),
        *(("get", f"{thread}/{call}") for call in ("stream", "live", "chunks", "content")),
        ("get", thread),
        ("delete", thread),
        ("post", f"{thread}/tokens"),
        ("get", "/api/threads"),
        ("post", "/api/resume-stream"),
        ("get", "/metrics"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
    }
    assert schema["components"]["securitySchemes"]["bearerAuth"]["scheme"] == "bearer"
    assert {"bearerAuth": []} in schema["security"]


@pytest.mark.parametrize("path", TAKES_BODY)
def test_the_schema_has_the_bodies(shared: Service, path: str) -> None:
    operation = httpx.get(f"{shared.url}/schema/openapi.json").json()["paths"][path]["post"]
    assert operation.get("requestBody", {}).get("content", {}).keys() >= TAKES_BODY[path]


# check, backup


def filled(service: Service) -> None:
    stem = uuid4()
    with api_client(service) as client:
        for number in range(40):
            append(client, f"{stem}-{number % 4}", "run", f"{number} " * 200, complete=number >= 38).raise_for_status()


def test_check_says_what_the_database_holds(
    shared: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    filled(shared)
    assert main(["backup", "--db", str(shared.db), str(copy)]) == 0
    assert re.search(r"\d+ of \d+ pages", capsys.readouterr().err)
    assert main(["check", "--db", str(copy)]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert re.search(r"active: \d+ threads, \d+ messages, \d+ chunks, \d+ bytes of text", out)
    assert out.endswith("is sound\n")
    assert main(["check", "--db", str(shared.db)]) == 0  # also while it is served


DAMAGES: dict[str, Callable[[sqlite3.Connection], Any]] = {
    "a chunk is missing": lambda db: db.execute("delete from chunks where seq = 2"),
    "a count is wrong": lambda db: db.execute("update messages set chunk_count = chunk_count + 1"),
    "a sequence is too short": lambda db: db.execute("update threads set last_seq = last_seq - 1"),
}


def check_fails(db: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["check", "--db", str(db)]) == 1
    out, error = capsys.readouterr()
    assert "is sound" not in out
    assert error.startswith("resume-stream: ")
    assert error.count("\n") == 1
    return error


def test_check_finds_damage(shared: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    filled(shared)
    for name, damage in DAMAGES.items():
        copy = tmp_path / f"{name}.db"
        assert main(["backup", "--db", str(shared.db), str(copy)]) == 0
        with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as db:
            damage(db)
        assert "not sound" in check_fails(copy, capsys), name
    copy = tmp_path / "pages.db"
    assert main(["backup", "--db", str(shared.db), str(copy)]) == 0
    pages = bytearray(copy.read_bytes())
    for start in range(2 * 4096, len(pages) - 4096, 3 * 4096):
        pages[start : start + 64] = b"\xa5" * 64
    copy.write_bytes(pages)
    check_fails(copy, capsys)
    copy.write_bytes(bytes(pages[: len(pages) // 2 + 100]))
    check_fails(copy, capsys)
    copy.write_bytes(b"This is no database." * 1000)
    check_fails(copy, capsys)
    assert "no " in check_fails(tmp_path / "missing.db", capsys)
    assert not (tmp_path / "missing.db").exists()


def test_a_backup_is_taken_while_appends_go_on(
    start_service: Callable[..., Service], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    service = start_service("--synchronous", "NORMAL")
    stop = threading.Event()
    acknowledged = [0]

    def produce() -> None:
        with api_client(service) as client:
            while not stop.is_set():
                append(client, "t", "run", f"{acknowledged[0]} ", index=acknowledged[0]).raise_for_status()
                acknowledged[0] += 1

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for number in range(3):
            wait_until(lambda at_least=acknowledged[0] + 30: acknowledged[0] >= at_least)
            known, copy = acknowledged[0], tmp_path / f"copy-{number}.db"
            assert main(["backup", "--db", str(service.db), str(copy)]) == 0
            assert main(["check", "--db", str(copy)]) == 0
            with contextlib.closing(sqlite3.connect(copy)) as db:
                app.open_packs(db)
                (text,) = db.execute("select text from transcript").fetchone()
            texts = text.split()
            assert texts == [str(place) for place in range(len(texts))]
            assert len(texts) >= known  # all that was acknowledged before the backup is in it
            assert {path.name for path in tmp_path.glob(f"{copy.name}*")} == {copy.name}
    finally:
        stop.set()
        producer.join(TIMEOUT)
    # The copy can be served.
    again = start_service(db=tmp_path / "copy-0.db")
    with api_client(again) as client:
        assert contents(client, "t")[0] == "0 "
        assert append(client, "t", "run", "on").status_code == 201


def test_a_backup_overwrites_nothing(shared: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("there.db", "there.db.partial"):
        there = tmp_path / name
        there.write_text("precious")
        assert main(["backup", "--db", str(shared.db), str(tmp_path / "there.db")]) == 1
        assert "there.db" in capsys.readouterr().err
        assert there.read_text() == "precious"
        there.unlink()
    assert main(["backup", "--db", str(shared.db), str(shared.db)]) == 1
    assert main(["backup", "--db", str(tmp_path / "missing.db"), str(tmp_path / "new.db")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_backup_that_cannot_be_written_does_not_blame_the_database(
    shared: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "no such folder" / "copy.db"
    assert main(["backup", "--db", str(shared.db), str(target)]) == 1
    error = capsys.readouterr().err
    assert str(target.parent) in error
    assert "damaged" not in error
