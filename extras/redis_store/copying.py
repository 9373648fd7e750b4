"""Copies of threads from another store (``resume-stream copy``): staged beside a thread's keys, then adopted."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import msgspec

from ...app import Cursor, Entry, StoredChunk, ThreadStatus, now_ms
from .connections import Connections
from .records import MessageRecord, ThreadRecord, decode_thread
from .scripts import ADOPT, COPIED, MARK_EVERY, thread_keys

STAGED_FOR = 3600  # seconds that a half copied thread is kept


async def copied(redis: Connections) -> dict[str, tuple[int, int, int, int]]:
    """Return the copied threads that still exist: generation, last place, number of messages, last change (ms)."""
    listed: dict[bytes, bytes] = await redis.client.hgetall(COPIED)
    found = {}
    for name, generation in listed.items():
        thread_id = name.decode()
        record = await redis.ask("HGET", thread_keys(thread_id)[0], "")
        if record and (thread := decode_thread(record)).generation == int(generation):
            found[thread_id] = (thread.generation, thread.last_seq, thread.message_count, thread.updated_at)
    return found


async def put(redis: Connections, thread: ThreadStatus, pages: AsyncIterator[list[Entry]], ttl: int) -> bool:
    """Store the thread as it is in another store. Return False if it has expired, or has gone on here."""
    expires = thread.updated_at + ttl
    if expires <= now_ms():
        return False
    cursor = Cursor.parse(thread.cursor)
    staged = thread_keys(thread.thread_id, "copy:")
    adoption = {
        "threadId": thread.thread_id,
        "generation": cursor.generation,
        "lastSeq": cursor.seq,
        "expires": expires,
        "ttl": ttl,
        "active": {m.message_id: m.updated_at for m in thread.messages if m.status == "active"},
    }
    sizes = await _stage_entries(redis, staged, thread, pages)
    await _stage_records(redis, staged, thread, sizes)
    return bool(await redis.run(ADOPT, thread.thread_id, adoption, *staged, COPIED))


async def _stage_entries(
    redis: Connections, staged: Sequence[str], thread: ThreadStatus, pages: AsyncIterator[list[Entry]]
) -> Counter[str]:
    """Write the entries and the marks, and return the size of each message's text in bytes."""
    _, stream, _, marks = staged
    generation = Cursor.parse(thread.cursor).generation
    messages = {message.message_id: (number, message) for number, message in enumerate(thread.messages, 1)}
    sizes, counts = Counter[str](), Counter[str]()
    await redis.ask("UNLINK", *staged)
    async for entries in pages:
        async with redis.client.pipeline(transaction=False) as pipeline:
            for entry in entries:
                number, message = messages[entry.message_id]
                fields: list[Any] = ["m", entry.message_id, "t"]
                if isinstance(entry, StoredChunk):
                    fields += [entry.timestamp, "c", entry.content, *(("e", entry.event) if entry.event else ())]
                    block, rest = divmod(counts[entry.message_id], MARK_EVERY)
                    if not rest:
                        pipeline.hset(marks, f"{number}:{block}", str(entry.seq))
                    counts[entry.message_id] += 1
                    sizes[entry.message_id] += len(entry.content.encode())
                else:
                    fields += [message.updated_at, "s", entry.status]
                    fields += () if entry.reason is None else ("r", entry.reason)
                pipeline.execute_command("XADD", stream, f"{generation}-{entry.seq}", *fields)
            for key in (stream, marks):
                pipeline.expire(key, STAGED_FOR)
            await pipeline.execute()
    return sizes


async def _stage_records(redis: Connections, staged: Sequence[str], thread: ThreadStatus, sizes: Counter[str]) -> None:
    state, _, names, _ = staged
    async with redis.client.pipeline(transaction=False) as pipeline:
        pipeline.hset(state, "", msgspec.json.encode(_record_of(thread, sizes.total())))
        for number, message in enumerate(thread.messages, 1):
            fields = msgspec.structs.asdict(message)
            message_id = fields.pop("message_id")
            record = MessageRecord(number=number, size=sizes[message_id], **fields)
            pipeline.hset(state, message_id, msgspec.json.encode(record))
            pipeline.rpush(names, message_id)
        for key in staged:
            pipeline.expire(key, STAGED_FOR)
        await pipeline.execute()


def _record_of(thread: ThreadStatus, size: int) -> ThreadRecord:
    cursor = Cursor.parse(thread.cursor)
    ended = [message for message in thread.messages if message.status != "active"]
    return ThreadRecord(
        cast(int, cursor.generation),
        cursor.seq,
        version=1,
        active=len(thread.messages) - len(ended),
        message_count=len(thread.messages),
        chunk_count=sum(message.chunk_count for message in thread.messages),
        size=size,
        created_at=thread.created_at,
        updated_at=thread.updated_at,
        ended=max(ended, key=lambda message: message.last_seq or 0).status if ended else "completed",
    )
