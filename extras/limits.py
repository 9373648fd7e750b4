"""Limits for each connection: the size of its headers, the time it may take, and the number of connections.

The connection itself refuses, and the app never sees the request.
"""

from __future__ import annotations

import asyncio
import resource
import weakref
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from http import HTTPStatus
from typing import Any, ClassVar

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..app import Parts

MOST_HEAD = 64 * 1024  # bytes of a request line and its headers (RFC 6585, 5)
HEAD_TIMEOUT = 10.0  # seconds for these to arrive
STALLED_AFTER = 30.0  # seconds without progress, after which a client that does not read loses its connection
KEPT_DESCRIPTORS = 64  # for files and other uses
STOPS_WITHIN = 0.2  # seconds in which a client has to read what it is told at the end
KEPT_FOR_HEALTH = 8  # connections that only /health may take


def mount(parts: Parts) -> None:
    connections: weakref.WeakSet[Limited] = weakref.WeakSet()
    parts.connection.append(type("LimitedConnection", (Limited,), {"all": connections}))
    parts.on_stop.append(lambda: cut_stuck(connections))


def cut_stuck(connections: AbstractSet[Limited]) -> None:
    """Cut, soon after the service was told to stop, the connections whose clients do not read."""

    def cut() -> None:
        for connection in list(connections):
            connection.transport.abort()

    asyncio.get_running_loop().call_later(STOPS_WITHIN, cut)


def most_connections() -> int:
    """Return the number of file descriptors, less those that are kept."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - KEPT_DESCRIPTORS - KEPT_FOR_HEALTH, KEPT_FOR_HEALTH)


class Limited(HttpToolsProtocol):
    """Refuses requests whose head is too long or too slow, connections over the limit, and clients that never read."""

    all: ClassVar[weakref.WeakSet[Limited]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0  # bytes of the request's head so far
        self._has_head = False
        self._timer: asyncio.TimerHandle | None = None  # for a head to arrive, or a write to make progress
        self._unwritten = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.all.add(self)
        most = most_connections()
        self._only_health = len(self.connections) > most
        if len(self.connections) > most + KEPT_FOR_HEALTH:
            transport.abort()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._has_head:
            self._head += len(data)
        super().data_received(data)
        if not self._has_head and self._head and not self.transport.is_closing():
            if self._head > MOST_HEAD:
                detail = f"The headers have over {MOST_HEAD} bytes; send fewer, or shorter ones."
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)
            elif self._timer is None:
                self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # after the body come trailers (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        self._stop_timer()
        if self._only_health and not self.url.startswith(b"/health/"):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "All connections are taken; try again later.")
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._has_head, self._head = False, 0
        if self.cycle is not None:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:
            super().on_body(body)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unwritten = self.transport.get_write_buffer_size()
        self._set_timer(STALLED_AFTER, self._check_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def _check_progress(self) -> None:
        before, self._unwritten = self._unwritten, self.transport.get_write_buffer_size()
        if self._unwritten < before:
            self._set_timer(STALLED_AFTER, self._check_progress)
        else:
            self.transport.abort()

    def _expect_head(self) -> None:
        self._set_timer(HEAD_TIMEOUT, self.transport.abort)

    def _set_timer(self, seconds: float, call: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, call)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answer with a problem document (RFC 9457), and close the connection."""
        body = msgspec.json.encode({"status": status, "title": status.phrase, "detail": detail})
        retry = b"retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else b""
        self.transport.write(
            b"%scontent-type: application/problem+json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n%s"
            % (STATUS_LINE[status], len(body), retry, body)
        )
        self.transport.close()
