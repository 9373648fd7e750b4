"""A buffer in the process of the test: what its readers get, and the few places where a test looks inside.

Only this file knows the inside of a buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from conftest import TIMEOUT, until
from resume_stream import app
from resume_stream.app import ChunkBuffer, MessageEnd, Page, Place, Reader, Signal, StoredChunk, Unavailable
from resume_stream.extras import erasure
from resume_stream.extras.express import Detached
from resume_stream.extras.live import LiveTail

# What a reader gets


def seen(item: Any) -> Any:
    """Return ``(seq, text)`` of a chunk, ``(seq, reason or status)`` of an end, or the Signal itself."""
    if isinstance(item, StoredChunk):
        return item.seq, item.content
    return (item.seq, item.reason or item.status) if isinstance(item, MessageEnd) else item


async def take(
    items: Any, count: int | None = None, shape: Callable[[Any], Any] = seen, into: list[Any] | None = None
) -> list[Any]:
    """Read entries and signals one by one, so many or all, and return them."""
    taken = [] if into is None else into
    async with contextlib.aclosing(items):
        async for item in items:
            taken += map(shape, item.entries if isinstance(item, Page) else [item])
            if count is not None and len(taken) >= count:
                break
    return taken


class Reading:
    """A reader in a task of its own. ``got`` is what it has so far. Awaited, it returns everything."""

    def __init__(self, items: Any, count: int | None = None, shape: Callable[[Any], Any] = seen) -> None:
        self.got: list[Any] = []
        self.task = asyncio.create_task(take(items, count, shape, self.got))

    def __await__(self) -> Any:
        return self.task.__await__()

    async def has(self, *expected: Any) -> Reading:
        """Wait until it has got this. In the same step of the loop it asks for more."""
        await until(lambda: self.task.done() or len(self.got) >= len(expected), f"{expected}")
        assert self.got == [*expected]
        return self

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def attached(buffer: ChunkBuffer, items: Any, count: int | None = None, shape: Any = seen) -> Reading:
    """Return a reading once the buffer counts it as a reader."""
    readers = buffer.readers
    reading = Reading(items, count, shape)
    await until(lambda: buffer.readers > readers or reading.task.done(), "the reader is there")
    return reading


async def follow(
    buffer: ChunkBuffer,
    thread_id: str,
    message_id: str | None = None,
    *,
    after: str | None = None,
    follow: bool = False,
    **times: float,
) -> AsyncIterator[Any]:
    """Yield pages and signals after a cursor, as the routes do. Yield nothing if nothing more will come."""
    position = await buffer.locate(thread_id, message_id, after=after, follow=follow)
    if position.finished:
        return
    async with contextlib.aclosing(buffer.follow(position, **times)) as items:
        async for item in items:
            yield item


class Lines:
    """A format: a line of JSON for each entry and signal, as ``seen`` returns it."""

    tells_all = True

    def frames(self, page: Page) -> bytes:
        return b"".join(json.dumps(seen(entry)).encode() + b"\n" for entry in page.entries)

    def signal(self, signal: Signal, problem: Any = None) -> bytes:
        return json.dumps(signal.value).encode() + b"\n"


LINES = Lines()


class Wire:
    """A connection that is its own transport and flow. Its client takes everything. ``ended`` is set at the end."""

    write_paused = False

    def __init__(self, buffer: ChunkBuffer) -> None:
        self.buffer, self.transport, self.flow = buffer, self, self
        self.detached: Any = None
        self.pieces: list[bytes] = []
        self.ended = asyncio.Event()

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_response_complete(self) -> None:
        self.ended.set()

    async def lines(self) -> list[Any]:
        """Return the decoded chunks of the whole body (RFC 9112, 7.1)."""
        await self.ended.wait()
        body, rest = b"", b"".join(self.pieces)
        while rest != b"0\r\n\r\n":
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        items = map(json.loads, body.splitlines())
        return [Signal(item) if isinstance(item, str) else tuple(item) for item in items]


def detach(buffer: ChunkBuffer, place: Place) -> Wire:
    """Return a connection that serves a reader from this place, without a task."""
    wire, reader = Wire(buffer), Reader(buffer, idle_timeout=TIMEOUT)
    reader.begin(place)
    wire.detached = Detached(wire, True, reader, LINES)
    wire.detached()
    return wire


async def detached(buffer: ChunkBuffer, thread_id: str, message_id: str | None = None, **place: Any) -> list[Any]:
    """Return all that a connection sends to a reader after a cursor, without a task."""
    found = await buffer.locate(thread_id, message_id, **place)
    return [] if found.finished else await detach(buffer, found).lines()


def is_of_detached_reader(task: asyncio.Task[Any]) -> bool:
    """Return True if the task reads from the store for a reader."""
    return task.get_coro().__qualname__ in (Detached._load.__qualname__, LiveTail._load.__qualname__)


async def locate_text(buffer: ChunkBuffer, thread_id: str, message_id: str, known: str) -> Any:
    """Return the place from which a reader with this text reads on: ``after`` it, with a ``reset`` or not."""
    return await buffer.locate(thread_id, message_id, known_content=known)


# The inside


def store_of(buffer: ChunkBuffer) -> Any:
    """Return the store, where a test may hold, count, or fail reads and commits."""
    return buffer.store


async def on_writer(buffer: ChunkBuffer, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Return what a function returns for the connection that commits."""
    return await store_of(buffer).maintain(work)


def kept_for_readers(buffer: ChunkBuffer) -> list[Any]:
    """Return all that a buffer holds for readers, and for those who watch for an end."""
    return [*buffer.tails, *getattr(watcher_of(buffer), "_listener", watcher_of(buffer))._watched]


def watcher_of(buffer: ChunkBuffer) -> Any:
    """Return what notices that another process has changed the store (extras/elsewhere.py)."""
    return buffer.watch.__self__


class Polls:
    """Counts how often a buffer looks whether another process has changed the file."""

    def __init__(self, buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._look = watcher_of(buffer).data_version
        monkeypatch.setattr(watcher_of(buffer), "data_version", self)

    async def __call__(self) -> int:
        self.count += 1
        return await self._look()

    async def go_on(self, more: int) -> None:
        wanted = self.count + more
        await until(lambda: self.count >= wanted, f"{more} more polls")


class PageReads:
    """Counts how often a buffer reads a page from its store."""

    def __init__(self, buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._read = store_of(buffer).page
        monkeypatch.setattr(store_of(buffer), "page", self)

    async def __call__(self, *place: Any) -> Any:
        self.count += 1
        return await self._read(*place)


class CommitsAtOnce:
    """Lets a commit take no turn of the loop, so that the same happens between two commits on any machine."""

    def __init__(self, buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = store_of(buffer).writer
        self._run = writer.run
        self._asked: list[asyncio.Task[None]] = []
        monkeypatch.setattr(writer, "run", self)

    async def __call__(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        answer: Future[Any] = Future()

        def done(connection: sqlite3.Connection) -> None:
            try:
                answer.set_result(work(connection))
            except BaseException as error:
                answer.set_exception(error)

        self._asked.append(asyncio.create_task(self._run(done)))
        await asyncio.sleep(0)
        return answer.result(TIMEOUT)


class FailsOnce:
    """Fails the first read of another process's change."""

    def __init__(self, buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_failed = False
        self._read = watcher_of(buffer).data_version
        monkeypatch.setattr(watcher_of(buffer), "data_version", self)

    async def __call__(self) -> Any:
        if not self.has_failed:
            self.has_failed = True
            raise Unavailable("Not now.")
        return await self._read()


def impatient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let writes and erasures wait only so long for another process."""
    monkeypatch.setattr(app, "BUSY_TIMEOUT", seconds)
    monkeypatch.setattr(erasure, "BUSY_TIMEOUT", seconds)


# The file, as another process sees it


def is_at_rest(db: Path | str) -> bool:
    """Return True if no other connection has a transaction open. A reader keeps the WAL, and a writer the lock."""
    with contextlib.closing(sqlite3.connect(db, timeout=0, isolation_level=None)) as other:
        ((is_busy, _, _),) = other.execute("pragma wal_checkpoint(truncate)")
    return not is_busy


def transactions_in(db: Path | str) -> list[int]:
    """Return where each transaction in the WAL ends: its last frame has the size of the database (fileformat2, 4)."""
    wal = Path(f"{db}-wal").read_bytes()
    frame = 24 + int.from_bytes(wal[8:12])
    return [
        at + frame
        for at in range(32, len(wal) - frame + 1, frame)
        if wal[at + 4 : at + 8] != bytes(4) and wal[at + 8 : at + 16] == wal[16:24]
    ]


def history(db: Path | str, sql: str, folder: Path) -> list[Any]:
    """Return the result of a query after each transaction in the WAL, on copies of the files in this folder."""
    copy, answers = folder / "history.db", []
    for end in transactions_in(db):
        copy.write_bytes(Path(db).read_bytes())
        Path(f"{copy}-wal").write_bytes(Path(f"{db}-wal").read_bytes()[:end])
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            answers.append(connection.execute(sql).fetchone()[0])
    return answers


async def pack(buffer: ChunkBuffer) -> None:
    """Pack ended messages, as the periodic task does."""
    await buffer.store.upkeep()
