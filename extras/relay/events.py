"""Server-sent events, read from the body of a response."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterable, Iterator
from contextlib import suppress

import httpx

from ...app import PRODUCER_TIMEOUT, Chunk, utf8_size
from .dialects import LOST

AHEAD = 256 * 1024  # bytes that are read before the consumer takes them


class Failed(Exception):
    """The rest of a stream cannot be recorded. The text is one of the FAILURES."""


class Source:
    """The events of a body, which is read a little ahead of its consumer."""

    def __init__(self, body: AsyncIterable[bytes], max_chunk: int) -> None:
        self._events = Events(max_chunk)
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._filled, self._emptied = asyncio.Event(), asyncio.Event()
        self._failure: Failed | None = None
        self._reading = asyncio.create_task(self._read(body))
        self._reading.add_done_callback(lambda _: self._filled.set())

    async def _read(self, body: AsyncIterable[bytes]) -> None:
        try:
            async for piece in body:
                self._pieces.append(piece)
                self._size += len(piece)
                self._filled.set()
                if self._size > AHEAD:
                    self._emptied.clear()
                    await self._emptied.wait()
        except httpx.TimeoutException as error:
            raise Failed(PRODUCER_TIMEOUT) from error
        except httpx.TransportError as error:
            raise Failed(LOST) from error

    async def take(self, until: float = math.inf) -> list[Chunk] | None:
        """Return the next events, or None at the end of the body. Raise Failed.

        The list is empty if a piece completes no event, or if none comes ``until`` a time of the loop's clock.
        """
        if self._failure is not None:
            raise self._failure
        if not self._pieces and not self._reading.done():
            self._filled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(None if until == math.inf else until):
                    await self._filled.wait()
        if not self._pieces and self._reading.done():
            self._reading.result()
            if self._events.is_in_event:
                raise Failed(LOST)
            return None
        found: list[Chunk] = []
        try:
            while self._pieces and len(found) < 1_000:
                piece = self._pieces.popleft()
                self._size -= len(piece)
                found.extend(self._events.feed(piece))
        except Failed as failed:
            self._failure = failed  # the consumer first gets the events before it
            if not found:
                raise
        self._emptied.set()
        return found

    async def drain(self) -> None:
        """Wait a moment for the end of the body, so that the connection can be used again."""
        with suppress(Failed, TimeoutError):
            async with asyncio.timeout(1.0):
                while await self.take() is not None:
                    pass

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        if not self._reading.cancelled():
            self._reading.exception()  # asyncio logs an exception that nobody has looked at


class Events:
    """A parser of server-sent events (HTML, 9.2.6) that arrive in pieces. It drops their ids and comments."""

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._rest = bytearray()
        self._is_first, self._after_cr = True, False

    @property
    def is_in_event(self) -> bool:
        """True if an event has begun whose end has not come."""
        return any(line and not line.startswith(b":") for line in self._rest.split(b"\n"))

    def feed(self, piece: bytes) -> Iterator[Chunk]:
        """Yield the events that are complete now. Raise Failed after those before the failure."""
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        searched = max(len(self._rest) - 1, 0)
        self._rest += piece
        if self._rest.find(b"\n\n", searched) >= 0:
            *blocks, self._rest = self._rest.split(b"\n\n")
            for block in blocks:
                if event := self._event_of(block):
                    yield event
        if len(self._rest) > 7 * self._max_chunk + 1024:  # "data: \n" is 7 bytes for one of content
            raise Failed("event_too_large")

    def _event_of(self, block: bytearray) -> Chunk | None:
        """Return the event, or None if it has neither a name nor data."""
        if self._is_first:
            self._is_first, block = False, block.removeprefix(b"\xef\xbb\xbf")
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            raise Failed("not_utf8") from error
        name, data = None, []
        for line in text.split("\n"):
            field, _, value = line.partition(":")
            if field == "data":
                data.append(value.removeprefix(" "))
            elif field == "event":
                name = value.removeprefix(" ") or None
        if name is None and not data:
            return None
        content = "\n".join(data)
        if utf8_size(content) + len(name or "") > self._max_chunk:
            raise Failed("event_too_large")
        return Chunk(content, name)
