"""HTTP as these tests need it: a service for a whole file, uploads sent bit by bit, streams read bit by bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, Self

import httpx
from conftest import TIMEOUT, Service

JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
TEXT = {"Content-Type": "text/plain"}


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Service]:
    service = Service(folder / "chunks.db", *flags).start()
    try:
        yield service
    finally:
        if service.process is not None:
            service.kill()


def api_client(service: Service) -> httpx.Client:
    return httpx.Client(base_url=service.api, timeout=TIMEOUT, verify=False)  # it is HTTP: spare the certificates


def message_path(thread: str, message: str, call: str = "chunks") -> str:
    return f"/threads/{thread}/messages/{message}/{call}"


def contents(client: httpx.Client, thread: str) -> list[str]:
    """The content of every chunk of a thread that can be read now; none, if there is no thread."""
    found: list[str] = []
    query = {}
    while chunks := (page := client.get(f"/threads/{thread}/chunks", params=query).json()).get("chunks"):
        found += [chunk["content"] for chunk in chunks]
        query = {"after": page["cursor"]}
    return found


def generation(client: httpx.Client, thread: str) -> str:
    return client.get(f"/threads/{thread}/content").json()["cursor"].partition("-")[0]


def problem(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """The status and members of an error answer, which has the form that all of them have."""
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"]
    assert document["detail"]
    return response.status_code, document


class Connection:
    """One request on a TCP connection of its own."""

    def __init__(self, service: Service) -> None:
        self.http = HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT)
        self.response: HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.response:
            self.response.close()
        self.http.close()


class Upload(Connection):
    """A POST whose body is sent as the test goes on, in chunked transfer encoding."""

    def __init__(self, service: Service, path: str, headers: dict[str, str]) -> None:
        super().__init__(service)
        self.http.putrequest("POST", f"/api{path}")
        for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.http.putheader(name, value)
        self.http.endheaders()

    def send(self, data: bytes) -> None:
        self.http.send(b"%x\r\n%s\r\n" % (len(data), data))

    def finish(self) -> tuple[int, dict[str, Any]]:
        self.http.send(b"0\r\n\r\n")
        return self.answer()

    def answer(self) -> tuple[int, dict[str, Any]]:
        """What the service says, whether or not it has seen the end of the body."""
        self.response = self.http.getresponse()
        return self.response.status, json.loads(self.response.read())

    def hang_up(self) -> None:
        """Send no more, and wait until the service has closed its side too."""
        self.http.sock.shutdown(1)
        while self.http.sock.recv(65536):
            pass


class Stream(Connection):
    """A stream that is read as the test goes on, byte for byte."""

    def __init__(self, service: Service, path: str, headers: dict[str, str] | None = None, body: Any = None) -> None:
        super().__init__(service)
        if body is None:
            self.http.request("GET", f"/api{path}", headers=headers or {})
        else:
            self.http.request("POST", f"/api{path}", json.dumps(body), {**JSON, **(headers or {})})
        self.response = self.http.getresponse()
        self.status = self.response.status

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.response.getheaders()}

    def line(self) -> bytes:
        return self.response.readline()

    def frame(self) -> bytes:
        """Up to and with the next blank line; what there is, at the end of the stream."""
        lines = []
        while line := self.line():
            lines.append(line)
            if line == b"\n":
                break
        return b"".join(lines)

    def rest(self) -> bytes:
        """Up to the end, which the service decides."""
        return self.response.read()


def data_of(frame: bytes) -> dict[str, Any]:
    (line,) = [line for line in frame.split(b"\n") if line.startswith(b"data: ")]
    return json.loads(line.removeprefix(b"data: "))
