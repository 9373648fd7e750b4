"""Relayed messages, and where they are in the store."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple, cast
from urllib.parse import quote

from ...app import (
    PAGE_ROWS,
    RELAYED,
    BadRequest,
    Chunk,
    Cursor,
    MessageEnd,
    ServerSentEvents,
    State,
    Store,
    StoredChunk,
)
from .calls import Headers
from .dialects import ANY, DIALECTS, Dialect, json_of


class Relayed(NamedTuple):
    """A message that the relay records, or has recorded."""

    upstream: str
    dialect: Dialect
    thread_id: str
    message_id: str

    @property
    def ids(self) -> tuple[str, str]:
        return self.thread_id, self.message_id

    @property
    def mark(self) -> Chunk:
        """The first chunk, which tells a relayed message from others and is not sent to clients."""
        return Chunk("", f"{RELAYED}{self.upstream}:{self.dialect.name}")

    @property
    def headers(self) -> Headers:
        """The headers of every answer with this message."""
        headers = {
            **ServerSentEvents.HEADERS,
            **self.dialect.headers,
            "Resume-Thread": quote(self.thread_id, safe="!#$&'()*+,/:;=?@[]"),
            "Resume-Message": quote(self.message_id, safe="!#$&'()*+,/:;=?@[]"),
            "access-control-expose-headers": "Resume-Thread, Resume-Message, Location, Content-Location",
        }
        return [(name.encode(), value.encode()) for name, value in headers.items()]


async def look_up(store: Store, thread_id: str, message_id: str) -> tuple[State, Relayed | None]:
    """Return the state of a message, and the message if it is relayed."""
    state, page = await store.page(thread_id, message_id, 0, 1)
    for entry in page.entries:
        if isinstance(entry, StoredChunk) and entry.event and entry.event.startswith(RELAYED):
            upstream, _, name = entry.event.removeprefix(RELAYED).partition(":")
            dialect = next((dialect for dialect in DIALECTS if dialect.name == name), ANY)
            return state, Relayed(upstream, dialect, thread_id, message_id)
    return state, None


async def find(store: Store, cursor: Cursor) -> tuple[Relayed, StoredChunk | MessageEnd] | None:
    """Return the relayed message that a cursor is in, and the entry at its place."""
    generation = cast(int, cursor.generation)
    for thread in (await store.threads(None, 1, generation + 1, None)).threads:
        state, page = await store.page(thread.thread_id, None, cursor.seq - 1, 1)
        for entry in page.entries:
            _, message = await look_up(store, thread.thread_id, entry.message_id)
            if message is not None and (state.generation, entry.seq) == (generation, cursor.seq):
                return message, entry
    return None


async def has_rest(store: Store, message: Relayed, had: StoredChunk) -> bool:
    """True if a client that has this event may be sent more of the message."""
    _, page = await store.page(*message.ids, had.seq, 1)
    return all(isinstance(end, StoredChunk) or message.dialect.last_words(end, had) for end in page.entries)


async def events_of(store: Store, message: Relayed) -> AsyncGenerator[StoredChunk, None]:
    """Yield the events that are stored."""
    after, has_more = 0, True
    while has_more:
        state, page = await store.page(*message.ids, after, PAGE_ROWS)
        for entry in page.entries:
            if isinstance(entry, StoredChunk) and not (entry.event or "").startswith(RELAYED):
                yield entry
        after, has_more = page.last_seq, bool(page.entries) and page.last_seq < state.last_seq


async def event_at(store: Store, message: Relayed, position: str) -> StoredChunk | None:
    """Return the last event up to a position, as the dialect numbers its events. Raise BadRequest."""
    parameter, name = message.dialect.position or ("", "")
    if not re.fullmatch(r"\d{1,18}", position, re.ASCII):
        raise BadRequest(f"{parameter}={position!r:.80} is no position; send the {name} of the last event you have.")
    found, number = None, -1
    async with aclosing(events_of(store, message)) as events:
        async for event in events:
            value = json_of(event).get(name)
            number = value if isinstance(value, int) else number + 1
            if number > int(position):
                break
            found = event
    return found
