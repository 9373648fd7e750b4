"""A buffer in the test's own process: what its readers get, and the few places where a test looks inside.

Only this file knows how a buffer is made inside.
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
    """``(seq, text)`` of a chunk, ``(seq, reason or status)`` of an end; a Signal is itself."""
    if isinstance(item, StoredChunk):
        return item.seq, item.content
    return (item.seq, item.reason or item.status) if isinstance(item, MessageEnd) else item


async def take(
    items: Any, count: int | None = None, shape: Callable[[Any], Any] = seen, into: list[Any] | None = None
) -> list[Any]:
    """The entries and signals of a reader, a page's one by one: so many, or all up to the end."""
    taken = [] if into is None else into
    async with contextlib.aclosing(items):
        async for item in items:
            taken += map(shape, item.entries if isinstance(item, Page) else [item])
            if count is not None and len(taken) >= count:
                break
    return taken


class Reading:
    """A reader in a task of its own, and what it has got so far; awaited, it is all that it got."""

    def __init__(self, items: Any, count: int | None = None, shape: Callable[[Any], Any] = seen) -> None:
        self.got: list[Any] = []
        self.task = asyncio.create_task(take(items, count, shape, self.got))

    def __await__(self) -> Any:
        return self.task.__await__()

    async def has(self, *expected: Any) -> Reading:
        """Wait until it has got this; it asks for more then, in the same step of the loop."""
        await until(lambda: self.task.done() or len(self.got) >= len(expected), f"{expected}")
        assert self.got == [*expected]
        return self

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def attached(buffer: ChunkBuffer, items: Any, count: int | None = None, shape: Any = seen) -> Reading:
    """A reading that the buffer knows of, whatever it has got by then."""
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
    """Pages and signals from the place of a cursor on, as the routes read; nothing where nothing will come."""
    position = await buffer.locate(thread_id, message_id, after=after, follow=follow)
    if position.finished:
        return
    async with contextlib.aclosing(buffer.follow(position, **times)) as items:
        async for item in items:
            yield item


class Lines:
    """A format: what ``seen`` makes of each entry and signal, as JSON, on a line of its own."""

    tells_all = True

    def frames(self, page: Page) -> bytes:
        return b"".join(json.dumps(seen(entry)).encode() + b"\n" for entry in page.entries)

    def signal(self, signal: Signal, problem: Any = None) -> bytes:
        return json.dumps(signal.value).encode() + b"\n"


LINES = Lines()


class Wire:
    """A connection, and its transport and flow, whose client takes all that comes; set once it has the end."""

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
        """All that came up to the end, out of the chunks of the body (RFC 9112, 7.1)."""
        await self.ended.wait()
        body, rest = b"", b"".join(self.pieces)
        while rest != b"0\r\n\r\n":
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        items = map(json.loads, body.splitlines())
        return [Signal(item) if isinstance(item, str) else tuple(item) for item in items]


def detach(buffer: ChunkBuffer, place: Place) -> Wire:
    """A connection that serves a reader with no task from this place on."""
    wire, reader = Wire(buffer), Reader(buffer, idle_timeout=TIMEOUT)
    reader.begin(place)
    wire.detached = Detached(wire, True, reader, LINES)
    wire.detached()
    return wire


async def detached(buffer: ChunkBuffer, thread_id: str, message_id: str | None = None, **place: Any) -> list[Any]:
    """All that a reader gets whom a connection serves with no task, from the place of a cursor on."""
    found = await buffer.locate(thread_id, message_id, **place)
    return [] if found.finished else await detach(buffer, found).lines()


def is_of_detached_reader(task: asyncio.Task[Any]) -> bool:
    """Return True if the task reads from the store for a reader."""
    return task.get_coro().__qualname__ in (Detached._load.__qualname__, LiveTail._load.__qualname__)


async def locate_text(buffer: ChunkBuffer, thread_id: str, message_id: str, known: str) -> Any:
    """Where a reader with this text begins: ``after`` it, with a ``reset`` or not."""
    return await buffer.locate(thread_id, message_id, known_content=known)


# What is inside


def store_of(buffer: ChunkBuffer) -> Any:
    """The seam between a buffer and its file, where a test may stop, count and fail what goes through."""
    return buffer.store


async def on_writer(buffer: ChunkBuffer, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """What a function says of the connection that commits."""
    return await store_of(buffer).maintain(work)


def kept_for_readers(buffer: ChunkBuffer) -> list[Any]:
    """All that a buffer holds for the sake of those who read now, or watch for an end."""
    return [*buffer.tails, *getattr(watcher_of(buffer), "_listener", watcher_of(buffer))._watched]


def watcher_of(buffer: ChunkBuffer) -> Any:
    """Return what notices that another process has changed the store (extras/elsewhere.py)."""
    return buffer.watch.__self__


class Polls:
    """How often a buffer has looked whether another process has changed the file."""

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
    """How often a buffer has read a page from its store."""

    def __init__(self, buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._read = store_of(buffer).page
        monkeypatch.setattr(store_of(buffer), "page", self)

    async def __call__(self, *place: Any) -> Any:
        self.count += 1
        return await self._read(*place)


class CommitsAtOnce:
    """Lets commits take no turn of the loop: what happens between two of them is then the same on any machine."""

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
    """Lets the buffer fail, once, to read what another process has changed."""

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
    """That no other connection has a transaction open: one that reads keeps the WAL, one that writes keeps the lock."""
    with contextlib.closing(sqlite3.connect(db, timeout=0, isolation_level=None)) as other:
        ((is_busy, _, _),) = other.execute("pragma wal_checkpoint(truncate)")
    return not is_busy


def transactions_in(db: Path | str) -> list[int]:
    """Where each transaction in the WAL ends: its last frame says how large the database is (fileformat2, 4)."""
    wal = Path(f"{db}-wal").read_bytes()
    frame = 24 + int.from_bytes(wal[8:12])
    return [
        at + frame
        for at in range(32, len(wal) - frame + 1, frame)
        if wal[at + 4 : at + 8] != bytes(4) and wal[at + 8 : at + 16] == wal[16:24]
    ]


def history(db: Path | str, sql: str, folder: Path) -> list[Any]:
    """What a query says after each transaction in the WAL, on copies of the files in this folder."""
    copy, answers = folder / "history.db", []
    for end in transactions_in(db):
        copy.write_bytes(Path(db).read_bytes())
        Path(f"{copy}-wal").write_bytes(Path(f"{db}-wal").read_bytes()[:end])
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            answers.append(connection.execute(sql).fetchone()[0])
    return answers


async def pack(buffer: ChunkBuffer) -> None:
    """What the periodic task does with what has ended."""
    await buffer.store.upkeep()
