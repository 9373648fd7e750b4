"""Connections that take too much: the service refuses, drops, or bounds each of them, and serves all others."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import TIMEOUT, Service, append, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from wire import message_path, problem, websocket_address


class Impatient(Service):
    """A service with short time-outs."""

    first = """
from resume_stream.extras import limits, producing, websocket
limits.HEAD_TIMEOUT, limits.STALLED_AFTER, limits.KEPT_FOR_HEALTH = 0.3, 0.3, 2
websocket.MOST_SUBSCRIPTIONS = 3
producing.BODY_TIMEOUT = 0.3
"""


class Crowded(Impatient):
    """A service with room for four connections, too."""

    first = f"{Impatient.first}limits.most_connections = lambda: 4"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Impatient(tmp_path_factory.mktemp("rude") / "chunks.db").start()
    yield service
    service.kill()


@contextlib.contextmanager
def raw(service: Service) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), timeout=TIMEOUT) as connection:
        yield connection


def all_of(connection: socket.socket) -> bytes:
    """Read up to the end, or to a reset."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


HEAD = b"POST /api/threads/t/messages/m/chunks HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("junk", [b"X-Junk: " + b"x" * 70_000, b"X-Junk: x\r\n" * 7_000], ids=["one", "many"])
def test_headers_without_end_are_431(service: Service, junk: bytes) -> None:
    with raw(service) as connection:
        connection.sendall(HEAD + junk)
        answer = all_of(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"connection: close" in head
    assert json.loads(body)["status"] == 431


def test_large_headers_below_the_limit_are_taken(service: Service) -> None:
    assert httpx.get(f"{service.api}/threads", headers={"X-Large": "x" * 60_000}).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: loc"], ids=["nothing", "half a head"])
def test_a_client_that_sends_no_whole_request_is_dropped(service: Service, said: bytes) -> None:
    with raw(service) as connection:
        connection.sendall(said)
        assert all_of(connection) == b""


def test_a_json_body_that_does_not_come_is_408(service: Service) -> None:
    with raw(service) as connection:
        connection.sendall(HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert httpx.get(f"{service.api}/threads/t").status_code == 404


def test_a_reader_that_never_reads_loses_its_seat(service: Service) -> None:
    with httpx.Client(base_url=service.api, timeout=TIMEOUT) as client, raw(service) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /api/threads/deaf/stream?follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n")
        readers = lambda: b"resume_stream_readers 1.0" in client.get(f"{service.url}/metrics").content  # noqa: E731
        wait_until(readers, "it has a seat")
        for _ in range(12):
            append(client, "deaf", "m", "x" * 1_000_000).raise_for_status()
        wait_until(lambda: not readers(), "the seat is free again")


def test_trailers_do_not_count_as_headers(tmp_path: Path) -> None:
    """Otherwise a token could come in a trailer, past a proxy that checks headers."""
    secret = "correct horse battery staple, 32+"
    service = Service(tmp_path / "chunks.db", environment={"RESUME_STREAM_SECRET": secret}).start()
    try:
        with raw(service) as connection:
            connection.sendall(
                HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                b"f\r\n" + b'{"content":"x"}' + b"\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
            )
            answer = all_of(connection)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"This takes a token" in answer
    finally:
        service.kill()


def test_health_is_answered_when_all_connections_are_taken(tmp_path: Path) -> None:
    service = Crowded(tmp_path / "chunks.db").start()
    try:
        with contextlib.ExitStack() as exits:
            httpx.put(f"{service.api}/threads/t/messages/m").raise_for_status()
            for _ in range(4):
                taken = exits.enter_context(raw(service))
                taken.sendall(b"GET /api/threads/t/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert taken.recv(15) == b"HTTP/1.1 200 OK"
            refused = httpx.get(f"{service.api}/threads")
            assert problem(refused)[0] == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{service.url}/health/ready").status_code == 200
        wait_until(lambda: httpx.get(f"{service.api}/threads").status_code == 200, "there is room again")
    finally:
        service.kill()


# WebSockets


def test_a_websocket_has_a_limited_number_of_subscriptions(service: Service) -> None:
    with connect(websocket_address(service)) as socket_:
        for number in range(4):
            socket_.send(json.dumps({"type": "subscribe", "id": number, "thread_id": "w", "follow": True}))
        refused = json.loads(socket_.recv(TIMEOUT))
        assert (refused["type"], refused["id"], refused["status"]) == ("error", 3, 503)


def test_a_websocket_is_not_deflated(service: Service) -> None:
    with connect(websocket_address(service), compression="deflate") as socket_:
        assert "Sec-WebSocket-Extensions" not in socket_.response.headers


@pytest.mark.parametrize(
    ("frame", "identity"),
    [
        ('{"type":"what","id":"a b","x":1}', "a b"),
        ('{"id": 17, "type":', 17),
        ('{"type":"subscribe","id":"\\ud83d"}', None),
        ("[" * 500_000, None),
        ('{"x":"' + "y" * 900_000 + '","id":1}', None),
    ],
)
def test_a_bad_frame_is_answered_with_its_id_if_that_is_seen_at_once(
    service: Service, frame: str, identity: Any
) -> None:
    with connect(websocket_address(service), max_size=None) as socket_:
        socket_.send(frame)
        answer = json.loads(socket_.recv(TIMEOUT))
        assert (answer["type"], answer["id"]) == ("error", identity)


# Answers


def test_an_unexpected_error_is_a_problem_and_in_the_log(tmp_path: Path) -> None:
    service = Service(tmp_path / "chunks.db").start()
    try:
        answer = httpx.get(f"{service.url}/static/a%00b", headers={"X-Request-Id": "the-one"})
        assert problem(answer)[0] == 500
        assert "null" not in answer.text
        log = [json.loads(line) for line in service.log.read_text().splitlines()]
        (line,) = [line for line in log if line["message"].startswith("unexpected")]
        assert line["request"] == "the-one"
        assert "Traceback" in line["exception"]
    finally:
        service.kill()


def test_options_is_answered_with_a_secret_too(tmp_path: Path) -> None:
    secret = {"RESUME_STREAM_SECRET": "correct horse battery staple, 32+"}
    service = Service(tmp_path / "chunks.db", environment=secret).start()
    try:
        assert httpx.options(f"{service.api}/threads").status_code == 204
    finally:
        service.kill()


def test_no_cache_keeps_an_answer_of_the_api(service: Service) -> None:
    for answer in (httpx.get(f"{service.api}/threads"), httpx.get(f"{service.api}/threads/nowhere")):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_swagger_loads_nothing_from_another_host(service: Service) -> None:
    policy = httpx.get(f"{service.url}/schema/swagger").headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "http" not in policy


def test_all_incoming_bodies_together_are_bounded(tmp_path: Path) -> None:
    service = Service(tmp_path / "chunks.db").start()
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: 10000000\r\n\r\n"
    done = threading.Event()

    def send() -> None:
        with raw(service) as connection, contextlib.suppress(OSError):  # a refused one is cut off
            connection.sendall(head + b" " * 9_000_000)
            done.wait(TIMEOUT)

    try:
        before = service.memory()
        senders = [threading.Thread(target=send) for _ in range(20)]
        for sender in senders:
            sender.start()
        most = 0

        def refused() -> bool:
            nonlocal most
            most = max(most, service.memory())
            return service.log.read_text().count(" 503 ") >= 10

        wait_until(refused, "ten of them are refused")
        assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT).status_code == 200
        assert most - before < 140_000_000
        done.set()
        for sender in senders:
            sender.join(TIMEOUT)
    finally:
        service.kill()


def test_a_websocket_frame_that_is_too_large_ends_its_connection(service: Service) -> None:
    with connect(websocket_address(service), max_size=None) as socket_:
        with contextlib.suppress(ConnectionClosed):
            socket_.send("x" * 11 * 1024 * 1024)
        with pytest.raises(ConnectionClosed):
            socket_.recv(TIMEOUT)


def test_a_small_body_has_a_small_limit(service: Service) -> None:
    httpx.put(f"{service.api}/threads/small/messages/m").raise_for_status()
    body = b'{"reason":"stop"}'.ljust(17_000)
    assert problem(httpx.post(f"{service.api}{message_path('small', 'm', 'abort')}", content=body))[0] == 413
