"""HTTP for these tests: a service for a whole file, uploads sent piece by piece, streams read piece by piece."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from conftest import TIMEOUT, Service, api_client

JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
TEXT = {"Content-Type": "text/plain"}


def serving(folder: Path, *flags: str, store: str = "") -> Service:
    """Return a service for ``with``, with its database in this folder, or in another store."""
    return Service(folder / "chunks.db", *flags, store=store)


def shared_service(*flags: str, fill: Callable[[httpx.Client], Any] = lambda client: None) -> Any:
    """Return a fixture ``service`` that all tests of a file share. ``fill`` writes what it holds from the start."""

    @pytest.fixture(scope="module")
    def service(tmp_path_factory: pytest.TempPathFactory, store: Callable[[], str]) -> Iterator[Service]:
        with serving(tmp_path_factory.mktemp("shared"), *flags, store=store()) as service:
            with api_client(service) as client:
                fill(client)
            yield service

    return service


def message_path(thread: str, message: str, call: str = "chunks") -> str:
    return f"/threads/{thread}/messages/{message}/{call}"


def contents(client: httpx.Client, thread: str) -> list[str]:
    """Return the content of every chunk of a thread, and none if the thread does not exist."""
    found: list[str] = []
    query = {}
    while chunks := (page := client.get(f"/threads/{thread}/chunks", params=query).json()).get("chunks"):
        found += [chunk["content"] for chunk in chunks]
        query = {"after": page["cursor"]}
    return found


def generation(client: httpx.Client, thread: str) -> str:
    return client.get(f"/threads/{thread}/content").json()["cursor"].partition("-")[0]


def problem(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """Check that the answer is a problem document, and return its status and its members."""
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"]
    assert document["detail"]
    return response.status_code, document


class Connection:
    """A request on a TCP connection of its own. Nothing waits longer than TIMEOUT."""

    def __init__(self, service: Service, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> None:
        self.request = f"{method} /api{path}"
        self.http = HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT)
        self.http.connect()
        self.socket = self.http.sock  # http.client forgets it if the connection ends with the answer
        self.http.putrequest(method, f"/api{path}")
        for name, value in headers.items():
            self.http.putheader(name, value)
        self.http.endheaders(body or None)
        self.response: HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.response:
            self.response.close()
        self.http.close()

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Cut the connection if this takes longer than TIMEOUT, even if other bytes keep coming."""
        is_late = threading.Event()
        impatience = threading.Timer(TIMEOUT, cut, [self.socket, is_late])
        impatience.start()
        late = TimeoutError(f"{self.request}: {what} did not come within {TIMEOUT:g} s")
        try:
            yield
        except (OSError, HTTPException) as error:
            if is_late.is_set() or isinstance(error, TimeoutError):
                raise late from error
            raise
        finally:
            impatience.cancel()
        if is_late.is_set():
            raise late

    def begin_answer(self) -> HTTPResponse:
        with self.waiting_for("an answer"):
            self.response = self.http.getresponse()
        return self.response

    def rest(self) -> bytes:
        """Read up to the end of the answer."""
        with self.waiting_for("the end of the answer"):
            return self.response.read()


def cut(end: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    with contextlib.suppress(OSError):  # the service may have closed it
        end.shutdown(socket.SHUT_RDWR)


class Upload(Connection):
    """A POST whose body the test sends piece by piece, in chunked transfer encoding."""

    def __init__(self, service: Service, path: str, headers: dict[str, str]) -> None:
        super().__init__(service, "POST", path, {**headers, "Transfer-Encoding": "chunked"})

    def send(self, data: bytes) -> None:
        with self.waiting_for("room for more of the body"):
            self.http.send(b"%x\r\n%s\r\n" % (len(data), data))

    def finish(self) -> tuple[int, dict[str, Any]]:
        self.http.send(b"0\r\n\r\n")
        return self.answer()

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Return the answer, which may come before the end of the body."""
        return self.begin_answer().status, json.loads(self.rest())

    def hang_up(self) -> None:
        """Close this side, and wait until the service has closed its own."""
        self.socket.shutdown(socket.SHUT_WR)
        with self.waiting_for("the end of the connection"):
            while self.socket.recv(65536):
                pass


class Stream(Connection):
    """A stream that the test reads line by line or frame by frame."""

    def __init__(self, service: Service, path: str, headers: dict[str, str] | None = None, body: Any = None) -> None:
        if body is None:
            super().__init__(service, "GET", path, headers or {})
        else:
            data = json.dumps(body).encode()
            own = {**JSON, "Content-Length": str(len(data))}
            super().__init__(service, "POST", path, {**own, **(headers or {})}, data)
        self.status = self.begin_answer().status

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.response.getheaders()}

    def line(self) -> bytes:
        with self.waiting_for("a line"):
            return self.response.readline()

    def frame(self) -> bytes:
        """Read up to and with the next blank line, or the rest of the stream."""
        lines = []
        with self.waiting_for("a frame"):
            while line := self.response.readline():
                lines.append(line)
                if line == b"\n":
                    break
        return b"".join(lines)


def data_of(frame: bytes) -> dict[str, Any]:
    (line,) = [line for line in frame.split(b"\n") if line.startswith(b"data: ")]
    return json.loads(line.removeprefix(b"data: "))


def websocket_address(service: Service, query: str = "") -> str:
    return f"{service.api}/ws{query}".replace("http", "ws", 1)


def masked(*frames: dict[str, Any] | bytes) -> bytes:
    """Return text frames as a client sends them (RFC 6455, 5.2), with a mask of zeros."""
    data = b""
    for frame in frames:
        text = frame if isinstance(frame, bytes) else json.dumps(frame).encode()
        size = len(text)
        if size < 126:
            head = bytes([0x81, 0x80 | size])
        elif size < 2**16:
            head = b"\x81\xfe" + size.to_bytes(2, "big")
        else:
            head = b"\x81\xff" + size.to_bytes(8, "big")
        data += head + bytes(4) + text
    return data
