"""Reads: states, pages of entries, the place of a known text, and lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from ...app import (
    PAGE_BYTES,
    PAGE_ROWS,
    NotFound,
    Page,
    Place,
    State,
    Status,
    Stopping,
    StoredChunk,
    ThreadPage,
    ThreadStatus,
    ThreadSummary,
    Unavailable,
    bytes_known,
    check_exists,
)
from .connections import Connections, redis_problems
from .records import decode_message, decode_thread, entry_of, state_of
from .scripts import LIST, READ, SCANNED, THREADS, thread_keys

T = TypeVar("T")

LIGHT_READS, HEAVY_READS = 16, 4  # at a time
TEXT_BYTES = 1024**2  # of a message's text, read at a time
THREADS_AT_ONCE = 500

PageKey = tuple[str, str | None, int, int]


class ThreadReads:
    """The reads of a store (see Store)."""

    def __init__(self, redis: Connections) -> None:
        self.redis = redis
        self._pages: dict[PageKey, asyncio.Future[tuple[State, Page] | None]] = {}
        self._turns = asyncio.Semaphore(LIGHT_READS), asyncio.Semaphore(HEAVY_READS)
        self._is_stopping = False

    def stop(self) -> None:
        self._is_stopping = True

    async def read(self, work: Callable[[], Coroutine[Any, Any, T]], heavy: bool = False) -> T:
        """Do the work when its turn comes. Heavy work does not hold up light work. Raise Problem."""
        turn = self._turns[heavy]
        await turn.acquire()
        if self.redis.is_closed or (heavy and self._is_stopping):
            turn.release()
            raise Stopping
        with redis_problems():
            return await self.redis.apart(work(), lambda task: turn.release())

    async def find(self, thread_id: str, message_id: str | None = None) -> State:
        return await self.read(lambda: self._find(thread_id, message_id))

    async def _find(self, thread_id: str, message_id: str | None) -> State:
        thread, message = await self.redis.ask("HMGET", thread_keys(thread_id)[0], "", message_id or "")
        return state_of(thread, message if message_id else None)

    # Pages

    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]:
        """Return the state and a page.

        Readers that ask for the same page before Redis is asked share it, and so it is encoded once.
        """
        key = (thread_id, message_id, after, limit)
        while (asked := self._pages.get(key)) is not None:
            if (shared := await asyncio.shield(asked)) is not None:
                return shared
        asked = self._pages[key] = asyncio.get_running_loop().create_future()
        asked.add_done_callback(asyncio.Future.exception)  # nobody may be there to see it
        answer: tuple[State, Page] | None = None  # None if this reader is cancelled: another one asks then
        try:
            answer = await self.read(lambda: self._shared_page(key))
        except Exception as error:
            asked.set_exception(error)
            raise
        finally:
            if not asked.done():
                asked.set_result(answer)
            if self._pages.get(key) is asked:
                del self._pages[key]
        return answer

    async def _shared_page(self, key: PageKey) -> tuple[State, Page]:
        del self._pages[key]  # a reader that asks from now on may know of a later entry than this page will have
        return await self._page(*key)

    async def _page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]:
        while True:  # a message's entries may be so far apart that one run of the script finds none
            found, at, raw = await self._read(thread_id, message_id, after, limit)
            entries = [entry_of(entry) for entry in raw]
            last_seq = found.last_seq if message_id is None else found.last or 0
            if entries or at >= last_seq:
                size = sum(len(entry.content) for entry in entries if isinstance(entry, StoredChunk))
                return found, Page(found.generation, at if at < last_seq else found.last_seq, entries, size)
            if at == after:
                raise Unavailable(
                    "Entries of this thread are missing in Redis; it has evicted them, or was tampered with."
                )
            after = at

    async def _read(
        self, thread_id: str, message_id: str | None, after: int, limit: int = SCANNED, text_only: bool = False
    ) -> tuple[State, int, Any]:
        """Return the state, the place that was reached, and the entries or their text."""
        size = TEXT_BYTES if text_only else PAGE_BYTES
        wanted = {"messageId": message_id, "after": after, "limit": limit, "bytes": size, "textOnly": text_only}
        thread, message, at, found = await self.redis.run(READ, thread_id, wanted)
        return state_of(thread, message), at, found

    # The place of a known text

    async def match(self, thread_id: str, message_id: str, known_content: str) -> Place:
        return await self.read(lambda: self._match(thread_id, message_id, known_content.encode()), heavy=True)

    async def _match(self, thread_id: str, message_id: str, known: bytes) -> Place:
        found = await self._find(thread_id, message_id)
        check_exists(found, thread_id, message_id)
        pieces = [piece async for piece in self._texts(thread_id, message_id, found)]
        offset = bytes_known(known, b"".join(text for _, text in pieces))
        begin = Place(thread_id, message_id, found.generation, found.before, reset=offset is None)
        if not offset:
            return begin
        for after, text in pieces:
            if offset <= len(text):
                return await self._after_bytes(begin, after, offset)
            offset -= len(text)
        return begin

    async def _texts(self, thread_id: str, message_id: str, found: State) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield the message's text in pieces, each with the place after which it begins. Raise NotFound."""
        after = found.before
        while after < (found.last or 0):
            if self._is_stopping:
                raise Stopping
            latest, at, text = await self._read(thread_id, message_id, after, text_only=True)
            if latest.generation != found.generation or at == after:
                raise NotFound.thread(thread_id)  # cleared in the meantime
            yield after, text
            after = at

    async def _after_bytes(self, begin: Place, after: int, offset: int) -> Place:
        """Return the place ``offset`` bytes of text behind ``after``. Raise NotFound."""
        while True:
            _, page = await self._page(begin.thread_id, begin.message_id, after, PAGE_ROWS)
            if page.generation != begin.generation or not page.entries:
                raise NotFound.thread(begin.thread_id)  # cleared in the meantime
            for entry in page.entries:
                size = len(entry.content.encode()) if isinstance(entry, StoredChunk) else 0
                if offset == size:
                    return msgspec.structs.replace(begin, after=entry.seq)
                if offset < size:
                    return msgspec.structs.replace(begin, after=entry.seq - 1, skip=offset)
                offset -= size
            after = page.last_seq

    # Lists

    async def status(self, thread_id: str, limit: int, after: int) -> ThreadStatus:
        asked = {"first": after, "last": after + limit - 1}
        record, names, messages = await self.read(lambda: self.redis.run(LIST, thread_id, asked))
        if not record:
            raise NotFound.thread(thread_id)
        summary = decode_thread(record).summary(thread_id)
        return ThreadStatus(
            **msgspec.structs.asdict(summary),
            cursor=state_of(record, None).cursor,
            messages=[
                decode_message(message).summary(name.decode()) for name, message in zip(names, messages, strict=True)
            ],
            messages_cursor=str(after + limit) if summary.message_count > after + limit else None,
        )

    async def threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage:
        return await self.read(lambda: self._threads(status, limit, before, covered), heavy=True)

    async def _threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage:
        found: list[tuple[int, ThreadSummary]] = []
        highest = "+inf" if before is None else f"({before}"
        while len(found) <= limit:
            listed: list[tuple[bytes, float]] = await self.redis.client.zrevrangebyscore(
                THREADS, highest, "-inf", 0, THREADS_AT_ONCE, withscores=True
            )
            ids = [name.decode() for name, _ in listed]
            async with self.redis.client.pipeline(transaction=False) as pipeline:
                for thread_id in ids:
                    pipeline.execute_command("HGET", thread_keys(thread_id)[0], "")
                records = await pipeline.execute()
            for thread_id, (_, generation), record in zip(ids, listed, records, strict=True):
                if record and is_covered(thread_id, covered):  # without a record it has just expired
                    summary = decode_thread(record).summary(thread_id)
                    if status in (None, summary.status):
                        found.append((int(generation), summary))
            if len(listed) < THREADS_AT_ONCE:
                break
            highest = f"({int(listed[-1][1])}"
        cursor = str(found[limit - 1][0]) if len(found) > limit else None
        return ThreadPage([summary for _, summary in found[:limit]], cursor)


def is_covered(thread_id: str, covered: Sequence[str] | None) -> bool:
    return covered is None or any(
        thread_id.startswith(pattern[:-1]) if pattern.endswith("*") else thread_id == pattern for pattern in covered
    )
