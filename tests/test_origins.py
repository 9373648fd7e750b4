"""Which pages may connect: loopback hosts, foreign origins, allowed origins, and where the service listens."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import TIMEOUT, Service
from resume_stream.app import Settings, StartupError, _serve
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from wire import serving, websocket_address

ALLOWED, FOREIGN = "https://chat.example", "https://evil.example"
SECRET = "correct horse battery staple, 32+"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Without a secret, and with one allowed origin."""
    with serving(tmp_path_factory.mktemp("origins"), "--cors-origins", f"{ALLOWED},http://localhost:3000/") as service:
        yield service


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Without a secret, and with no other origin."""
    with serving(tmp_path_factory.mktemp("closed")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=TIMEOUT) as client:
        client.post("/api/threads/t/messages/run/chunks", json={"content": "Hello"}).raise_for_status()
        yield client


def raw_status(
    service: Service, *lines: str, path: str = "/api/threads", method: str = "GET", version: str = "1.1"
) -> int:
    """Send a request with exactly these header lines, and return the status."""
    request = "\r\n".join([f"{method} {path} HTTP/{version}", *lines, "Connection: close", "", ""])
    with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as connection:
        connection.sendall(request.encode("latin-1"))
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return int(answer.split(b" ", 2)[1])


def handshake(service: Service, **headers: str) -> int:
    """Open a WebSocket, and return 101 or the status of the refusal."""
    try:
        with connect(websocket_address(service), additional_headers=headers, open_timeout=TIMEOUT):
            return 101
    except InvalidStatus as refusal:
        return refusal.response.status_code


# Host

LOOPBACK = ["localhost", "LocalHost", "localhost:{port}", "localhost:1", "127.0.0.1", "127.0.0.1:{port}", "127.8.9.10"]
LOOPBACK += ["[::1]", "[::1]:{port}", "[0:0:0:0:0:0:0:1]:{port}"]
ELSEWHERE = [
    "evil.example",
    "evil.example:{port}",
    "localhost.evil.example",
    "localhost.evil.example:{port}",
    "127.0.0.1.evil.example",
    "127.0.0.1.evil.example:{port}",
    "127.evil.example",
    "evil-localhost",
    "localhost-evil",
    "evil.example@localhost:{port}",
    "localhost@evil.example",
    "localhost:{port}@evil.example",
    "localhost#evil.example",
    "evil.example#localhost",
    "evil.example/localhost",
    "localhost/evil.example",
    "localhost,evil.example",
    "localhost evil.example",
    "localhost%2eevil.example",
    "localhost%00evil.example",
    "[::1].evil.example",
    "[::1",
    "[",
    "]",
    "::1",
    "[::ffff:8.8.8.8]",
    "[fe80::1]",
    "0.0.0.0",
    "0.0.0.0:{port}",
    "[::]",
    "10.0.0.1",
    "192.168.1.1:{port}",
    "169.254.169.254",
    "128.0.0.1",
    "",
    ":{port}",
    "\N{SMALL ROMAN NUMERAL FIFTY}ocalhost".encode().decode("latin-1"),
]


def test_a_loopback_name_may_be_the_host(closed: Service) -> None:
    """Also with another port, as a proxy may say it."""
    names = [name.format(port=closed.port) for name in LOOPBACK]
    assert {name: raw_status(closed, f"Host: {name}") for name in names} == dict.fromkeys(names, 200)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_no_other_name_may_be_the_host(closed: Service, host: str) -> None:
    """A page could reach the service by a name of its own that resolves to loopback (DNS rebinding).

    The HTTP parser answers 400, and the service 403.
    """
    host = host.format(port=closed.port)
    for path in ("/api/threads", "/api/threads/t/stream", "/", "/schema/openapi.json", "/health/ready", "/metrics"):
        assert raw_status(closed, f"Host: {host}", path=path) in (400, 403), path
    assert raw_status(closed, f"Host: {host}", path="/api/threads/t/messages/m", method="PUT") in (400, 403)
    # An Origin of the same name does not help.
    assert raw_status(closed, f"Host: {host}", f"Origin: http://{host}") in (400, 403)


def test_a_request_without_a_host_is_refused(closed: Service) -> None:
    assert raw_status(closed) in (400, 403)
    assert raw_status(closed, version="1.0") in (400, 403)
    assert raw_status(closed, "Origin: null", version="1.0") in (400, 403)


def test_two_hosts_are_refused_if_one_is_foreign(closed: Service) -> None:
    for hosts in (["localhost", "evil.example"], ["evil.example", "localhost"]):
        assert raw_status(closed, *(f"Host: {host}" for host in hosts)) in (400, 403), hosts


def test_headers_of_proxies_do_not_replace_the_host(closed: Service) -> None:
    for header in ("X-Forwarded-Host: localhost", "Forwarded: host=localhost", "X-Forwarded-For: 127.0.0.1"):
        assert raw_status(closed, "Host: evil.example", header) == 403


def test_the_host_of_a_websocket_counts_too(closed: Service) -> None:
    upgrade = [
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]

    def status(host: str) -> bytes:
        request = "\r\n".join(["GET /api/ws HTTP/1.1", f"Host: {host}", *upgrade, "", ""])
        with socket.create_connection(("127.0.0.1", closed.port), TIMEOUT) as connection:
            connection.sendall(request.encode())
            return connection.recv(65536).split(b" ", 2)[1]

    seen = {host: status(host) for host in ("localhost", "[::1]:1", "evil.example", "localhost.evil.example", "[")}
    assert seen.pop("localhost") == seen.pop("[::1]:1") == b"101"
    assert set(seen.values()) <= {b"403", b"400"}, seen


# Origin

FOREIGN_ORIGINS = [
    FOREIGN,
    "http://evil.example:{port}",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:{port}",  # the Host of these requests is 127.0.0.1
    "http://[::1]:{port}",
    "http://user@127.0.0.1:{port}",
    "http://127.0.0.1:{port}@evil.example",
    "http://127.0.0.1:{port}.evil.example",
    "http://evil.example#127.0.0.1:{port}",
    "http://evil.example#@127.0.0.1:{port}",
    "http://evil.example/127.0.0.1:{port}",
    "http://evil.example?127.0.0.1:{port}",
    "http://127.0.0.1:{port}, http://evil.example",
    "http://127.0.0.1:0{port}",
    "http://127.0.0.1.:{port}",
    "http://[",
    "http://[::1",
    "null",
    "",
    "*",
    "file://",
    "chrome-extension://abcdefgh",
    "127.0.0.1:{port}",
    # Like those that are allowed.
    "http://chat.example",
    "https://chat.example:444",
    "https://chat.example.",
    "https://chat.example.evil.example",
    "https://evil.chat.example",
    "https://evilchat.example",
    "https://chat.example@evil.example",
    "https://chat.example/evil",
    "http://localhost",
    "http://localhost:30000",
    "https://localhost:3000",
]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_page_of_another_origin_gets_nothing(service: Service, client: httpx.Client, origin: str) -> None:
    """By fetch, EventSource, form, or script. A browser sends a simple request without a preflight."""
    from_there = {"Origin": origin.format(port=service.port)}
    before = client.get("/api/threads/t").json()
    chunks = "/api/threads/t/messages/run/chunks"
    form = {"Content-Type": "text/plain", **from_there}
    answers = {
        "GET": client.get("/api/threads", headers=from_there),
        "EventSource": client.get(
            "/api/threads/t/stream",
            params={"idle_timeout": 0.01},
            headers={"Accept": "text/event-stream", **from_there},
        ),
        "form POST": client.post(chunks, content=b'{"content": "x"}', headers=form),
        "urlencoded POST": client.post(chunks, data={"content": "x"}, headers=from_there),
        "abort": client.post("/api/threads/t/messages/run/abort", headers=from_there),
        "JSON POST": client.post(chunks, json={"content": "x"}, headers=from_there),
        "DELETE": client.delete("/api/threads/t", headers=from_there),
        "metrics": client.get("/metrics", headers=from_there),
        "page": client.get("/", headers=from_there),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 403)
    for answer in answers.values():
        assert "access-control-allow-origin" not in answer.headers
        assert "Hello" not in answer.text
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type", **from_there}
    preflight = client.options(chunks, headers=asked)
    assert preflight.status_code in (400, 403)
    assert "access-control-allow-origin" not in preflight.headers
    assert handshake(service, **from_there) == 403
    assert client.get("/api/threads/t").json() == before


def test_a_service_without_other_origins_refuses_preflights(closed: Service) -> None:
    for origin in (FOREIGN, "null"):
        lines = [f"Host: localhost:{closed.port}", f"Origin: {origin}", "Access-Control-Request-Method: POST"]
        for path in ("/api/threads", "/api/threads/t/messages/m/chunks"):
            assert raw_status(closed, *lines, path=path, method="OPTIONS") == 403


def test_its_own_pages_may_connect(service: Service, client: httpx.Client) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        own = {"Host": f"{host}:{service.port}", "Origin": f"http://{host}:{service.port}"}
        assert client.get("/api/threads", headers=own).status_code == 200
        assert client.put("/api/threads/own/messages/run", headers=own).is_success
    assert handshake(service, Origin=service.url) == 101
    assert handshake(service) == 101  # a client that is not a browser


@pytest.mark.parametrize("origin", [ALLOWED, "http://localhost:3000"])
def test_an_allowed_origin_may_connect(service: Service, client: httpx.Client, origin: str) -> None:
    for method, path, headers in (
        ("POST", "/api/threads/t/messages/run/chunks", "authorization, content-type"),
        ("GET", "/api/threads/t/stream", "last-event-id"),
        ("POST", "/api/resume-stream", "Authorization,Content-Type"),
        ("DELETE", "/api/threads/t", "authorization"),
        ("PUT", "/api/threads/t/messages/m", "authorization"),
    ):
        asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers, "Origin": origin}
        preflight = client.options(path, headers=asked)
        assert preflight.is_success, (method, path)
        assert preflight.headers["access-control-allow-origin"] == origin
        assert method in preflight.headers["access-control-allow-methods"]
        granted = {name.strip().lower() for name in preflight.headers["access-control-allow-headers"].split(",")}
        assert {name.strip().lower() for name in headers.split(",")} <= granted
    for path in ("/api/threads", "/api/threads/t", "/api/threads/t/stream?idle_timeout=0.01"):
        answer = client.get(path, headers={"Origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "origin" in answer.headers["vary"].lower()
        assert "access-control-allow-credentials" not in answer.headers
    refused = client.get("/api/threads/missing", headers={"Origin": origin})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, origin)
    assert handshake(service, Origin=origin) == 101


def test_an_allowed_origin_does_not_allow_another_host(service: Service, client: httpx.Client) -> None:
    assert client.get("/api/threads", headers={"Host": "evil.example", "Origin": ALLOWED}).status_code == 403
    assert client.get("/api/threads", headers={"Host": "chat.example", "Origin": ALLOWED}).status_code == 403


def test_with_a_secret_any_host_but_no_foreign_origin(tmp_path: Path) -> None:
    """Behind a proxy the host is a public name. A page of another origin still has to be allowed."""
    with serving(tmp_path, "--secret", SECRET, "--cors-origins", ALLOWED) as service:
        host = "streams.example"
        for origin, status in (
            (None, 401),  # past the gate, and without a token
            (f"https://{host}", 401),
            (ALLOWED, 401),
            (FOREIGN, 403),
            ("null", 403),
            ("http://[", 403),
        ):
            lines = [] if origin is None else [f"Origin: {origin}"]
            assert raw_status(service, f"Host: {host}", *lines) == status, origin
        refused = httpx.get(f"{service.api}/threads", headers={"Origin": ALLOWED})
        # An allowed page must be able to see why its call is refused.
        assert refused.headers["access-control-allow-origin"] == ALLOWED


# Where it listens


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost.evil.example"])
def test_other_machines_are_refused_without_a_secret_or_a_flag(tmp_path: Path, host: str) -> None:
    with pytest.raises(StartupError, match=r"secret.*--allow-anonymous"):
        asyncio.run(_serve(Settings(host=host, db=str(tmp_path / "chunks.db"))))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--secret", SECRET], ["--allow-anonymous"]])
def test_other_machines_are_served_with_a_secret_or_a_flag(
    start_service: Callable[..., Service], flags: list[str]
) -> None:
    service = start_service("--host", "0.0.0.0", *flags)
    status = 401 if "--secret" in flags else 200
    assert raw_status(service, "Host: streams.example") == status
    # Still, foreign pages are refused.
    assert raw_status(service, "Host: streams.example", f"Origin: {FOREIGN}") == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_loopback_needs_no_secret(start_service: Callable[..., Any], host: str) -> None:
    service = start_service("--host", host)
    with socket.create_connection((host, service.port), TIMEOUT):
        pass
    if ":" in host:
        assert service.url == f"http://[{host}]:{service.port}"  # as RFC 3986, 3.2.2 has it
