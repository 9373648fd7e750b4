"""A plain client of an upstream behind the relay. It sees every byte."""

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
    """An answer that the test reads event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status = response.status_code
        self.headers = response.headers
        self._pieces = response.iter_raw()
        self._rest = b""
        self.seen = b""

    @property
    def ids(self) -> tuple[str, str]:
        """The ids of the thread and of the message."""
        return self.headers["resume-thread"], self.headers["resume-message"]

    def events(self, count: int) -> list[bytes]:
        """Read so many whole events. Raise StopIteration at the end."""
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
        """Read the next bytes. Raise StopIteration at the end."""
        piece = next(self._pieces)
        self.seen += piece
        self._rest += piece

    def rest(self) -> bytes:
        """Read to the end. Raise httpx.RemoteProtocolError if the body is broken off."""
        for piece in self._pieces:
            self.seen += piece
            self._rest += piece
        return self._rest

    def broken_rest(self) -> bytes:
        """Read to the place where the body is broken off."""
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
        """Send the request of a recording, and return the whole answer."""
        return self.http.send(self._request(recording, headers))

    @contextlib.contextmanager
    def reading(self, recording: Recording, **headers: str) -> Iterator[Reading]:
        """Send the request of a recording, and read the answer as it comes. The connection ends with the block."""
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
        """Wait for the end of the message, and return its status and reason."""
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
    """Return its events as the relay sends them, but without ids."""
    text = b"".join(piece for piece in recording.pieces if piece is not PAUSE)
    events = []
    for block in text.split(b"\n\n")[:-1]:
        kept = [line for line in block.split(b"\n") if line.startswith((b"event:", b"data:"))]
        if kept:
            events.append(b"\n".join([*kept, b"", b""]))
    return events


def framed(events: list[bytes], generation: str, first: int = 2) -> bytes:
    """Return the events with our ids. The mark, which no client sees, has the first place."""
    return b"".join(b"id: %s-%d\n%s" % (generation.encode(), seq, event) for seq, event in enumerate(events, first))
