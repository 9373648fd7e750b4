"""The express ways: what they answer themselves, to the byte, and what they leave to the ordinary ones."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import tomllib
from collections.abc import Iterator

import pytest
import uvicorn
from conftest import ROOT, TIMEOUT, Service, api_client, append, wait_until
from resume_stream import app
from resume_stream.app import ChunkBuffer, Settings
from resume_stream.extras import express, limits
from wire import contents, shared_service

BOTH_WAYS = True

service = shared_service()


@contextlib.contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as connection:
        yield connection


def post(thread: str, body: bytes, *lines: str, query: str = "") -> bytes:
    head = [
        f"POST /api/threads/{thread}/messages/run/chunks{query} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *lines,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def answers(connection: socket.socket, count: int) -> list[tuple[bytes, bytes]]:
    """Heads, less what the clock says, and bodies."""
    received, found = b"", []
    while len(found) < count:
        head, end, rest = received.partition(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head)[1]) if end else 0
        if end and len(rest) >= size:
            found.append((re.sub(rb"date: [^\r]+", b"date:", head), rest[:size]))
            received = rest[size:]
        elif piece := connection.recv(65536):
            received += piece
        else:
            raise EOFError(f"the connection ended after {found} and {received!r}")
    assert received == b""
    return found


def created(thread: str, seq: int, close: bytes = b"") -> tuple[bytes, bytes]:
    body = b'{"threadId":"%s","messageId":"run","seq":%d,"chunkCount":%d,"status":"active"}' % (
        thread.encode(),
        seq,
        seq,
    )
    head = (
        b"HTTP/1.1 201 Created\r\ndate:\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"cache-control: no-store\r\nx-content-type-options: nosniff%s"
    )
    return head % (len(body), close), body


def test_an_answer_has_the_same_bytes_on_both_ways(service: Service, thread: str) -> None:
    with connected(service) as connection:
        connection.sendall(post(thread, b'{"content":"a"}'))
        assert answers(connection, 1) == [created(thread, 1)]
        connection.sendall(post(thread, b'[{"content":"b"}]', "Connection: close"))
        assert answers(connection, 1) == [created(thread, 2, b"\r\nconnection: close")]
        assert connection.recv(1) == b""


def test_requests_sent_at_once_are_answered_in_their_order(service: Service, thread: str) -> None:
    """Also those that only the ordinary way answers, and the refused, which close nothing."""
    with connected(service) as connection:
        connection.sendall(
            post(thread, b'{"content":"a"}')
            + post(thread, b'{"content":"b"}', "X-Request-Id: mine")
            + post(thread, b'{"content":"c"}', query="?index=5")
            + post(thread, b"nonsense")
            + post(thread, b'{"content":"d"}', query="?index=2&complete=true")
        )
        found = answers(connection, 5)
    assert [int(head[9:12]) for head, _ in found] == [201, 201, 409, 422, 201]
    assert found[:2] == [created(thread, 1), created(thread, 2)]
    assert b'"expectedIndex":2' in found[2][1]
    with api_client(service) as client:
        assert contents(client, thread) == ["a", "b", "d"]


def test_a_body_that_comes_byte_by_byte_is_taken(service: Service, thread: str) -> None:
    with connected(service) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(thread, b'{"content":"a"}'):
            connection.sendall(bytes([byte]))
        assert answers(connection, 1) == [created(thread, 1)]


def test_a_body_slower_than_the_express_way_waits_is_taken(service: Service, thread: str) -> None:
    """By the ordinary way then, which another client's appends, that take their time too, show to have begun."""
    request = post(thread, b'{"content":"a"}')
    with connected(service) as slow, api_client(service) as client:
        slow.sendall(request[:-5])
        began = time.monotonic()
        while time.monotonic() < began + 1.2 * express.BODY_TIMEOUT:
            append(client, f"{thread}-2", "run", "other")
        slow.sendall(request[-5:])
        assert answers(slow, 1) == [created(thread, 1)]


def test_a_producer_that_is_gone_before_its_answer_has_appended(service: Service, thread: str) -> None:
    with connected(service) as connection:
        connection.sendall(post(thread, b'{"content":"a"}'))
    with api_client(service) as client:
        wait_until(lambda: client.get(f"/threads/{thread}").status_code == 200)
        assert contents(client, thread) == ["a"]
    assert service.tracebacks() == 0


def test_a_connection_is_of_use_again_after_its_stream(service: Service, thread: str) -> None:
    """What is sent while the stream is on waits for its end."""
    stream = f"GET /api/threads/{thread}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with api_client(service) as client, connected(service) as connection:
        append(client, thread, "run", "a")
        connection.sendall(stream + post(f"{thread}-2", b'{"content":"b"}'))
        received = b""
        while b'"content":"a"' not in received:
            received += connection.recv(65536)
        append(client, thread, "run", complete=True)
        while b"\r\n0\r\n\r\n" not in received:
            received += connection.recv(65536)
        rest = received.partition(b"\r\n0\r\n\r\n")[2]
        while b'"status":"active"}' not in rest:
            rest += connection.recv(65536)
        assert rest.startswith(b"HTTP/1.1 201 Created\r\n")
        connection.sendall(post(f"{thread}-2", b'{"content":"c"}'))
        assert answers(connection, 1) == [created(f"{thread}-2", 2)]


def test_readers_that_wait_are_counted_and_gone_when_they_leave(service: Service, thread: str) -> None:
    stream = f"GET /api/threads/{thread}/stream?follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with api_client(service) as client, contextlib.ExitStack() as exits:
        append(client, thread, "run", "a")
        readers = [exits.enter_context(connected(service)) for _ in range(40)]
        for reader in readers:
            reader.sendall(stream)
        wait_until(lambda: client.get(f"/threads/{thread}").json()["readers"] == 40)
        for reader in readers[:30]:
            reader.close()
        wait_until(lambda: client.get(f"/threads/{thread}").json()["readers"] == 10)
        append(client, thread, "run", "b")
        for reader in readers[30:]:
            received = b""
            while b'"content":"b"' not in received:
                received += reader.recv(65536)
    assert service.tracebacks() == 0


def test_a_slow_reader_gets_all_of_it_once_it_reads(service: Service, thread: str) -> None:
    stream = f"GET /api/threads/{thread}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    texts = [f"{number:03d}" + "x" * 100_000 for number in range(100)]
    with api_client(service) as client, connected(service) as slow:
        append(client, thread, "run", "first")
        slow.sendall(stream)
        slow.recv(10)
        for text in texts:
            append(client, thread, "run", text)
        append(client, thread, "run", complete=True)
        received = bytearray()
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += slow.recv(1 << 20)
    assert [bytes(found) for found in re.findall(rb'"content":"(\d{3})x', received)] == [
        text[:3].encode() for text in texts
    ]


def test_with_another_uvicorn_the_ordinary_ways_answer_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = ChunkBuffer(Settings(db=":unused:"))
    assert issubclass(app.Parts(buffer).connection[0], limits.Limited)
    assert issubclass(app.Parts(buffer).connection[1], express.Express)
    monkeypatch.setattr(uvicorn, "__version__", "99.1.0")
    assert app.Parts(buffer).connection == []
    assert [record.message for record in caplog.records] == [
        "uvicorn 99.1.0 was not tested, so connections are its own: without limits"
    ]


def test_what_is_tested_is_what_is_installed() -> None:
    (wanted,) = [
        name
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if name.startswith("uvicorn")
    ]
    first, end = (".".join(map(str, bound)) for bound in express.TESTED_UVICORN)
    assert wanted == f"uvicorn>={first},<{end}"
    assert uvicorn.__version__.startswith(f"{first}.")
