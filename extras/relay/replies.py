"""What clients are sent of a relayed message: its events, or the object that they are about."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec

from ...app import BrokenOff, NotFound, Page, Parts, Place, Reader, ServerSentEvents, Signal, StoredChunk
from .calls import Call, Headers, Pieces
from .dialects import Dialect, explained, json_of
from .messages import Relayed, events_of


class Answer(NamedTuple):
    status: int
    headers: Headers
    pieces: Pieces | Sequence[bytes] = ()
    close: Callable[[], Awaitable[None]] | None = None  # called in the end, even if no piece was taken


NO_CONTENT = Answer(204, [])


def answer_json(status: int, value: Any) -> Answer:
    return Answer(status, [(b"Content-Type", b"application/json")], [msgspec.json.encode(value)])


class Replies:
    def __init__(self, parts: Parts) -> None:
        self._buffer, self._form = parts.buffer, parts.formats["raw"]

    def reader(self, call: Call) -> Reader:
        return Reader(self._buffer, idle_timeout=0, expires=call.grant.expires)

    async def stream(self, message: Relayed, reader: Reader, had: StoredChunk | None = None) -> Answer:
        """Return the events after those that the client has."""
        place = await self._buffer.locate(*message.ids, after=None if had is None else had.seq)
        return Answer(200, message.headers, self._frames(message.dialect, place, reader, had))

    async def _frames(self, dialect: Dialect, place: Place, reader: Reader, had: StoredChunk | None) -> Pieces:
        """Yield the upstream's events with our ids. Raise BrokenOff if the client cannot be told the end."""
        yield ServerSentEvents.RETRY
        async with aclosing(self._buffer.follow(place, reader)) as items:
            async for item in items:
                if item is Signal.HEARTBEAT:
                    yield ServerSentEvents.HEARTBEAT
                elif isinstance(item, Page):
                    frames = item.encoded(self._form)
                    self._buffer.tell("sent", item, len(frames))
                    if frames:
                        yield frames
                    had = next((entry for entry in reversed(item.entries) if isinstance(entry, StoredChunk)), had)
                    if item.end is not None:
                        words = dialect.last_words(item.end, had)
                        if words is None:
                            raise BrokenOff
                        if words:
                            yield b"id: %d-%d\n%s" % (item.generation, item.end.seq, words)
                        return
        raise BrokenOff  # the service is stopping, the token has expired, or the thread was cleared

    async def object_of(self, message: Relayed) -> Answer:
        """Return the object that the stream is about, as the last event with the object has it."""
        dialect, found, last = message.dialect, None, None
        async for event in events_of(self._buffer.store, message):
            last = event
            if f'"{dialect.object_in}"' in event.content:
                found = json_of(event).get(dialect.object_in or "") or found
        state = await self._buffer.store.find(*message.ids)
        if not isinstance(found, dict):
            raise NotFound(f"The answer {message.message_id!r} is empty so far; try again later.", exists=True)
        if dialect.aborted_object and state.status == "aborted" and (last is None or dialect.end_of(last) is None):
            found = dialect.aborted_object(found, *explained(state.reason))
        return answer_json(200, found)
