"""The load generator: wrk, keep-alive clients, uploads, and SSE readers over plain sockets.

It checks the status of every answer: anything but 2xx raises BenchError with the body.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from .results import BenchError
from .servers import DURABLE_STREAMS_API, PACKAGE, Server, program

TIMEOUT = 60.0  # seconds without a byte until a row fails
RECEIVE = 256 * 1024
MARK = b"~"  # occurs once in each chunk's content and nowhere else, to count chunks by
TOKEN = " tok~"  # the size of a token
CHUNK = f'{{"content":"{TOKEN}"}}'.encode()


def request_bytes(method: str, path: str, body: bytes = b"", extra: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{extra}"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def check_status(answer: bytes, what: str) -> None:
    if not 200 <= (status := int(answer[9:12])) <= 299:
        raise BenchError(f"{what} was answered {status}: {answer[:1000].decode(errors='replace')}")


class Connection:
    """A TCP connection for use with a selector."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def fileno(self) -> int:
        return self.socket.fileno()


class Client(Connection):
    """A keep-alive connection that makes one request at a time."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._buffer = b""

    def send(self, request: bytes) -> None:
        self._buffer = b""
        self.socket.sendall(request)

    def receive(self) -> bytes | None:
        """Read once, and return the answer's body if it is whole, else None."""
        if not (piece := self.socket.recv(RECEIVE)):
            raise BenchError(f"the server closed the connection after {self._buffer[:100]!r}")
        self._buffer += piece
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return None
        lowered = head.lower()
        if b"transfer-encoding: chunked" in lowered:
            whole = _dechunked(body)
        else:
            _, found, length = lowered.partition(b"content-length: ")
            size = int(length.partition(b"\r\n")[0]) if found else 0
            whole = body if len(body) >= size else None
        if whole is not None:
            check_status(self._buffer, "a request")
        return whole

    def exchange(self, request: bytes) -> bytes:
        self.send(request)
        while (body := self.receive()) is None:
            pass
        return body


def _dechunked(body: bytes) -> bytes | None:
    """Return the content of a chunked body, or None if its end has not arrived."""
    content, place = b"", 0
    while (end := body.find(b"\r\n", place)) >= 0:
        size = int(body[place:end], 16)
        if size == 0:
            return content
        content += body[end + 2 : end + 2 + size]
        place = end + 2 + size + 2
    return None


def call(port: int, method: str, path: str, body: Any = None, extra: str = "") -> Any:
    """Make a request with JSON outside of the measurement, and return the answer's JSON, or None."""
    encoded = b"" if body is None else json.dumps(body).encode()
    with Client(port) as client:
        answer = client.exchange(request_bytes(method, path, encoded, extra=extra))
    return json.loads(answer) if answer else None


def create(server: Server, name: str) -> None:
    """Make a thread, stream, or channel, if the server wants that before the first append."""
    if server.api.create:
        kind = f"Content-Type: {server.api.create_type}\r\n" if server.api.create_type else ""
        call(server.port, "PUT", server.api.create.replace("@", name), extra=kind)


def append_request(server: Server, name: str, body: bytes) -> bytes:
    return request_bytes("POST", server.api.append.replace("@", name), body)


def stream_request(server: Server, name: str, after: str = "") -> bytes:
    path = server.api.stream.replace("@", name) + (f"&after={after}" if after else "")
    return request_bytes("GET", path, extra="Accept: text/event-stream\r\n")


def stored_chunks(server: Server, name: str) -> int:
    """Return how many chunks the server says it has: this service, Durable Streams, or Redis."""
    if server.store is not None:
        import redis

        with redis.Redis(port=server.store) as client:
            return int(client.xlen(name))
    if server.api is DURABLE_STREAMS_API:
        return len(call(server.port, "GET", f"/{name}?offset=-1"))
    return int(call(server.port, "GET", f"/api/threads/{name}")["chunkCount"])


# wrk


@dataclass(frozen=True)
class Load:
    """The work of wrk: successful requests, the seconds they took, and refused requests."""

    requests: int
    seconds: float
    refused: int


def wrk(server: Server, names: str, connections: int, seconds: float) -> Load:
    """Append one chunk at a time over each connection to a thread of its own: ``names`` with 1, 2, 3 …

    Raise Unavailable or BenchError.
    """
    arguments = [server.api.append.replace("@", f"{names}@"), str(connections), CHUNK.decode()]
    result = _run_wrk(server.port, arguments, connections, f"{seconds:.0f}s")
    found = json.loads(result.partition("RESULT ")[2])
    # Durable Streams sometimes refuses appends, and stores some of those.
    if found["bad_status"] and server.api is not DURABLE_STREAMS_API:
        shown = _run_wrk(server.port, [*arguments, "hunt"], connections, "1s").partition("BAD ")[2].partition("\n")[0]
        raise BenchError(f"{found['bad_status']} answers to {names}… were not 2xx, one of them: {shown[:500]}")
    if found["socket_errors"] or not found["requests"]:
        raise BenchError(f"wrk had socket errors at {names}…: {found}")
    return Load(found["requests"] - found["bad_status"], found["seconds"], found["bad_status"])


def _run_wrk(port: int, arguments: Sequence[str], connections: int, duration: str) -> str:
    flags = ["-t1", f"-c{connections}", f"-d{duration}", "--timeout", "10s", "-s", str(PACKAGE / "append.lua")]
    command = [program("wrk"), *flags, f"http://127.0.0.1:{port}", "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "RESULT " not in done.stdout:
        raise BenchError(f"wrk failed: {done.stderr or done.stdout}")
    return done.stdout


# Uploads


def ndjson_lines(count: int) -> bytes:
    """Return so many chunks, one a line, each line as its own piece in chunked encoding."""
    return (b"%x\r\n%s\n\r\n" % (len(CHUNK) + 1, CHUNK)) * count


def upload(server: Server, thread: str, count: int) -> None:
    """Stream so many token-sized chunks to a new thread as NDJSON, as fast as the server takes them."""
    block = 1000
    lines = ndjson_lines(block)
    kind = "Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
    with Client(server.port) as client:
        client.send(request_bytes("POST", server.api.append.replace("@", thread), extra=kind))
        for _ in range(count // block):
            client.socket.sendall(lines)
        client.socket.sendall(ndjson_lines(count % block) + b"0\r\n\r\n")
        while (answer := client.receive()) is None:
            pass
    if (appended := json.loads(answer))["chunkCount"] != count:
        raise BenchError(f"an upload of {count} chunks was answered {appended}")


def uploads(server: Server, threads: Sequence[str], count: int) -> float:
    """Upload ``count`` chunks to each thread, all at once, and return the chunks a second."""
    with ThreadPoolExecutor(len(threads)) as pool:
        began = time.monotonic()
        list(pool.map(lambda thread: upload(server, thread, count), threads))
        return count * len(threads) / (time.monotonic() - began)


def post_many(port: int, request: bytes, count: int, connections: int) -> None:
    """Send a request so many times. Each connection awaits an answer before it sends again."""
    clients = [Client(port) for _ in range(min(connections, count))]
    selector = selectors.DefaultSelector()
    try:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
            client.send(request)
        sent, answered = len(clients), 0
        while answered < count:
            ready = selector.select(TIMEOUT)
            if not ready:
                raise BenchError(f"no answer for {TIMEOUT:.0f} s, after {answered} of {count}")
            for key, _ in ready:
                waiting: Any = key.fileobj
                if waiting.receive() is None:
                    continue
                answered += 1
                if sent < count:
                    waiting.send(request)
                    sent += 1
    finally:
        selector.close()
        for client in clients:
            client.socket.close()


# SSE


class Stream(Connection):
    """An SSE stream whose headers have arrived. ``began`` is when its request was sent."""

    def __init__(self, port: int, request: bytes) -> None:
        super().__init__(port)
        self.began = time.monotonic()
        self.socket.sendall(request)
        self.received = b""
        while b"\r\n\r\n" not in self.received:
            self.receive()
        check_status(self.received, "a stream")

    def receive(self) -> bytes:
        piece = self.socket.recv(RECEIVE)
        if not piece:
            raise BenchError(f"a stream ended after {self.received[-100:]!r}")
        self.received += piece
        return piece


def seconds_to_last(port: int, request: bytes, chunks: int) -> float:
    """Return the seconds from sending a request to the arrival of exactly so many chunks."""
    with Stream(port, request) as stream:
        count = stream.received.count(MARK)
        while count < chunks:
            count += stream.receive().count(MARK)
        took = time.monotonic() - stream.began
    if count != chunks:
        raise BenchError(f"a stream gave {count} chunks where {chunks} were to come")
    return took
