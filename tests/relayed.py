"""Reading through the relay: what a plain client of an upstream sees, byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import httpx
import pytest
from conftest import TIMEOUT, Service, wait_until
from upstream import PAUSE, Recording, relay_url

RETRY = b"retry: 1000\n"


class Reading:
    """An answer that is read event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status = response.status_code
        self.headers = response.headers
        self._pieces = response.iter_raw()
        self._rest = b""
        self.seen = b""

    @property
    def ids(self) -> tuple[str, str]:
        """Those of the thread and the message."""
        return self.headers["resume-thread"], self.headers["resume-message"]

    def events(self, count: int) -> list[bytes]:
        """The next so many, whole. Raises StopIteration at the end."""
        found: list[bytes] = []
        while len(found) < count:
            event, end, rest = self._rest.partition(b"\n\n")
            if end:
                found.append(event + end)
                self._rest = rest
            else:
                self.more()
        return found

    def more(self) -> None:
        """The next bytes. Raises StopIteration at the end."""
        piece = next(self._pieces)
        self.seen += piece
        self._rest += piece

    def rest(self) -> bytes:
        """To its end. Raises httpx.RemoteProtocolError where it is broken off."""
        for piece in self._pieces:
            self.seen += piece
            self._rest += piece
        return self._rest

    def broken_rest(self) -> bytes:
        """To where it is broken off."""
        with contextlib.suppress(httpx.RemoteProtocolError):
            self.rest()
            raise AssertionError(f"the body ended well: {self._rest!r}")
        return self._rest


class Relay:
    """A client of one relayed upstream."""

    def __init__(self, service: Service, name: str = "up") -> None:
        self.service = service
        self.http = httpx.Client(timeout=TIMEOUT)
        self.name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def ask(self, recording: Recording, **headers: str) -> httpx.Response:
        """The whole answer to what the recording answers."""
        return self.http.send(self._request(recording, headers))

    @contextlib.contextmanager
    def reading(self, recording: Recording, **headers: str) -> Iterator[Reading]:
        """The answer, as it comes; at the end of the block its reader is gone."""
        with httpx.Client(timeout=TIMEOUT) as http:
            response = http.send(self._request(recording, headers), stream=True)
            try:
                yield Reading(response)
            finally:
                response.close()

    def _request(self, recording: Recording, headers: dict[str, str]) -> httpx.Request:
        said = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
        url = f"{relay_url(self.service, self.name)}{recording.path}"
        return self.http.build_request(recording.method, url, content=recording.body, headers=said)

    def message(self, thread: str, message: str) -> dict[str, Any]:
        status = self.http.get(f"{self.service.api}/threads/{thread}").json()
        return next((found for found in status.get("messages", []) if found["messageId"] == message), {})

    def ended(self, thread: str, message: str) -> tuple[str, str | None]:
        """How it ended, once it has."""
        found = wait_until(lambda: (now := self.message(thread, message)).get("status") != "active" and now)
        return found["status"], found["reason"]


def generation_of(headers: httpx.Headers, service: Service) -> str:
    content = httpx.get(f"{service.api}/threads/{headers['resume-thread']}/content").json()
    return str(content["cursor"].partition("-")[0])


@pytest.fixture
def relay(service: Service) -> Iterator[Relay]:
    with Relay(service) as relay:
        yield relay


def bare_events(recording: Recording) -> list[bytes]:
    """Its events as this service passes them on, without their ids: no comments, no ids and paces of the upstream."""
    text = b"".join(piece for piece in recording.pieces if piece is not PAUSE)
    events = []
    for block in text.split(b"\n\n")[:-1]:
        kept = [line for line in block.split(b"\n") if line.startswith((b"event:", b"data:"))]
        if kept:
            events.append(b"\n".join([*kept, b"", b""]))
    return events


def framed(events: list[bytes], generation: str, first: int = 2) -> bytes:
    """Events with our ids: the first place is that of the mark, which nobody sees."""
    return b"".join(b"id: %s-%d\n%s" % (generation.encode(), seq, event) for seq, event in enumerate(events, first))
