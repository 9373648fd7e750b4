"""What a connection may take before, between and after requests: bytes, time, and a place.

On uvicorn's own protocol. The app never sees what is refused here.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..app import Parts

MOST_HEAD = 64 * 1024  # bytes of a request line and its headers (RFC 6585, 5)
HEAD_TIMEOUT = 10.0  # seconds in which they have to be there
STALLED_AFTER = 30.0  # seconds without progress after which whoever does not read is let go
KEPT_DESCRIPTORS = 64  # for files, and for whatever is opened now and then
KEPT_FOR_HEALTH = 8  # connections


def mount(parts: Parts) -> None:
    parts.connection.append(Limited)


def most_connections() -> int:
    """As many as there are descriptors for, less those that are kept."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - KEPT_DESCRIPTORS - KEPT_FOR_HEALTH, KEPT_FOR_HEALTH)


class Limited(HttpToolsProtocol):
    """Refuses heads that are too long or too slow, whoever comes when all places are taken, and who never reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0  # bytes of the request's head so far
        self._has_head = False
        self._timer: asyncio.TimerHandle | None = None  # for a head to come, or a write to go on
        self._unwritten = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = most_connections()
        self._only_health = len(self.connections) > most
        if len(self.connections) > most + KEPT_FOR_HEALTH:
            transport.abort()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._has_head:
            self._head += len(data)
        super().data_received(data)
        if not self._has_head and self._head and not self.transport.is_closing():
            if self._head > MOST_HEAD:
                self._refuse(431, f"The headers have over {MOST_HEAD} bytes; send fewer, or shorter ones.")
            elif self._timer is None:
                self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # what follows a body are trailers, and no headers (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        self._expect_nothing()
        if self._only_health and not self.url.startswith(b"/health/"):
            self._refuse(503, "All connections are taken; try again later.")
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
        self._expect_nothing()
        self._timer = self.loop.call_later(STALLED_AFTER, self._look_at_writing)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._expect_nothing()

    def _look_at_writing(self) -> None:
        before, self._unwritten = self._unwritten, self.transport.get_write_buffer_size()
        if self._unwritten < before:
            self._timer = self.loop.call_later(STALLED_AFTER, self._look_at_writing)
        else:
            self.transport.abort()

    def _expect_head(self) -> None:
        self._expect_nothing()
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, detail: str) -> None:
        """With a problem document (RFC 9457), and the end of the connection."""
        title = STATUS_LINE[status].split(b" ", 2)[2].strip().decode()
        body = b'{"status":%d,"title":"%s","detail":"%s"}' % (status, title.encode(), detail.encode())
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        self.transport.write(
            b"%scontent-type: application/problem+json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n%s"
            % (STATUS_LINE[status], len(body), retry, body)
        )
        self.transport.close()
