"""Raw streams: ``format=raw`` sends chunks as their producer made them; ``GET …/live`` follows the active message."""

from __future__ import annotations

import contextlib
import re

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.response.base import ASGIResponse

from ..app import (
    RELAYED,
    THREAD,
    ChunkBuffer,
    Cursor,
    Format,
    NotFound,
    Page,
    Parts,
    Problem,
    Reading,
    ServerSentEvents,
    Signal,
    StoredChunk,
    ThreadId,
    checked_id,
    stream,
)

LINE_END = re.compile("\r\n|\n|\r")


def mount(parts: Parts) -> None:
    parts.formats["raw"] = RawEvents()
    parts.api.append(stream_active_message)
    parts.active_message = active_message


class RawEvents:
    """Server-sent events whose data is the content of a chunk, for clients that know only its producer.

    Only the id is ours. A line end inside the content makes several ``data`` lines, which readers join with LF
    (HTML, 9.2.6).
    """

    tells_all = False

    def frames(self, page: Page) -> bytes:
        frames = []
        for entry in page.entries:
            if isinstance(entry, StoredChunk) and not (entry.event or "").startswith(RELAYED):
                event = "" if entry.event is None else f"event: {entry.event}\n"
                data = "\ndata: ".join(LINE_END.split(entry.content))
                frames.append(f"id: {page.generation}-{entry.seq}\n{event}data: {data}\n\n".encode())
        return b"".join(frames)

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        return ServerSentEvents.HEARTBEAT if signal is Signal.HEARTBEAT else b""


async def active_message(buffer: ChunkBuffer, thread_id: str) -> str | None:
    """Return the active message that began last, or None. Raise BadRequest."""
    with contextlib.suppress(NotFound):
        first = (await buffer.get_thread_status(thread_id, 1)).message_count
        while first > 0:
            first = max(first - 1_000, 0)
            status = await buffer.store.status(thread_id, 1_000, first)
            if active := [message.message_id for message in status.messages if message.status == "active"]:
                return active[-1]
    return None


async def unfinished_at(buffer: ChunkBuffer, thread_id: str, cursor: Cursor, form: Format) -> str | None:
    """Return the message that the cursor is in, or None if its reader has all of that message."""
    state, page = await buffer.store.page(thread_id, None, cursor.seq - 1, 1)
    last = page.entries[0] if page.entries else None
    if last is None or last.seq != cursor.seq or cursor.generation not in (None, state.generation):
        return None
    state, page = await buffer.store.page(thread_id, last.message_id, cursor.seq, 1)
    has_more = any(form.tells_all or isinstance(entry, StoredChunk) for entry in page.entries)
    return last.message_id if has_more or state.status == "active" else None


@get(THREAD + "/live", summary="Follow the active message of a thread (SSE)", scope="read", token_in_query=True)
async def stream_active_message(reading: NamedDependency[Reading], thread_id: ThreadId) -> ASGIResponse:
    """From its start; 204 if no message is active. Of several active messages it is the one that began last.

    With a cursor it is the message that the cursor is in, even if that has ended, as long as the reader lacks a part.
    """
    checked_id("thread_id", thread_id)
    buffer, message_id = reading.buffer, None
    if reading.cursor is not None:
        message_id = await unfinished_at(buffer, thread_id, Cursor.parse(reading.cursor), reading.form)
    message_id = message_id or await active_message(buffer, thread_id)
    if message_id is None:
        return ASGIResponse(status_code=204)
    return await stream(msgspec.structs.replace(reading, follow=False), thread_id, message_id)
