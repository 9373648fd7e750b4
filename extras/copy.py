"""``resume-stream copy FROM TO``: every thread from a SQLite file to Redis or back, while the service runs on FROM.

A thread keeps its generation and its places, so that readers carry on from the cursors that they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from ..app import (
    PAGE_ROWS,
    Cursor,
    Entry,
    NotFound,
    Page,
    Problem,
    Settings,
    SQLiteStore,
    StartupError,
    State,
    Status,
    StoredChunk,
    ThreadPage,
    ThreadStatus,
    Told,
    database_problem,
    open_packs,
    sole_owner,
    store_for,
)

Version = tuple[int, int, int, int]  # generation, last place, number of messages, time of the last change (ms)
PASSES = 5  # after which a source that goes on changing is left as it is


def add_commands(commands: Any) -> None:
    summary = "copy every thread from one store to another, while the service runs on the first"
    command = commands.add("copy", summary, lambda settings, flags: asyncio.run(copy(settings, flags)), "ttl")
    command.add_argument("source", help="a SQLite file, or redis://…")
    command.add_argument("target", help="likewise; a file is to be new, or of an earlier copy")


class Source(Protocol):
    async def threads(self, status: Status | None, limit: int, before: int | None, covered: None) -> ThreadPage: ...

    async def status(self, thread_id: str, limit: int, after: int) -> ThreadStatus: ...

    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]: ...


class Target(Protocol):
    async def copied(self) -> dict[str, Version]:
        """What was copied to it before, and is still there."""

    async def put(self, thread: ThreadStatus, pages: AsyncIterator[list[Entry]]) -> bool:
        """Have the thread as it is; False where there is a later one of that name, or it has gone on there."""

    async def drop(self, thread_id: str, generation: int) -> None: ...


async def copy(settings: Settings, flags: dict[str, Any]) -> None:
    """Raises StartupError."""
    origin, destination = flags["source"], flags["target"]
    try:
        async with read_from(settings, origin) as source, written_to(settings, destination) as target:
            for number in range(PASSES):
                if not await copy_what_differs(source, target):
                    print(f"\n{destination} has all that {origin} has", file=sys.stderr)
                    return
                print(f"\npass {number + 1} is done", file=sys.stderr)
    except Problem as problem:
        raise StartupError(f"it was not copied to its end: {problem.detail}") from problem
    print(f"{origin} goes on changing; copy it again once its service is stopped", file=sys.stderr)


async def copy_what_differs(source: Source, target: Target) -> int:
    """How many threads were copied or dropped."""
    copied, found, changed = await target.copied(), await listed(source), 0
    for number, thread_id in enumerate(found, 1):
        print(f"\r{number} of {len(found)} threads", end="", file=sys.stderr, flush=True)
        with contextlib.suppress(Gone):
            thread = await whole(source, thread_id)
            if copied.get(thread_id) != version_of(thread):
                changed += await target.put(thread, pages(source, thread))
    gone = copied.keys() - set(found)
    for thread_id in gone:
        await target.drop(thread_id, copied[thread_id][0])
    return changed + len(gone)


class Gone(Exception):
    """The thread was cleared while it was read."""


def version_of(thread: ThreadStatus) -> Version:
    cursor = Cursor.parse(thread.cursor)
    return cast(int, cursor.generation), cursor.seq, thread.message_count, thread.updated_at


async def listed(source: Source) -> list[str]:
    """The ids of all threads, the oldest first."""
    found: list[str] = []
    before: int | None = None
    while True:
        page = await source.threads(None, 1000, before, None)
        found += [thread.thread_id for thread in page.threads]
        if page.cursor is None:
            return found[::-1]
        before = int(page.cursor)


async def whole(source: Source, thread_id: str) -> ThreadStatus:
    """With all of its messages. Raises Gone."""
    try:
        thread = await source.status(thread_id, 1_000, 0)
        messages, cursor = [*thread.messages], thread.messages_cursor
        while cursor is not None:
            more = await source.status(thread_id, 1_000, int(cursor))
            messages += more.messages
            cursor = more.messages_cursor
    except NotFound as problem:
        raise Gone from problem
    return msgspec.structs.replace(thread, messages=messages)


async def pages(source: Source, thread: ThreadStatus) -> AsyncGenerator[list[Entry], None]:
    """All entries, up to where the thread was when it was found. Raises Gone."""
    cursor, seq = Cursor.parse(thread.cursor), 0
    while seq < cursor.seq:
        found, page = await source.page(thread.thread_id, None, seq, PAGE_ROWS)
        if found.generation != cursor.generation:
            raise Gone
        yield [entry for entry in page.entries if entry.seq <= cursor.seq]
        seq = page.last_seq


def is_file(where: str) -> bool:
    return "://" not in where


@contextlib.asynccontextmanager
async def in_redis(settings: Settings, where: str) -> AsyncIterator[Any]:
    store = store_for(msgspec.structs.replace(settings, store=where))
    await store.open(lambda changes, took: None)
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def read_from(settings: Settings, where: str) -> AsyncIterator[Source]:
    if not is_file(where):
        async with in_redis(settings, where) as store:
            yield store
        return
    file = FileSource(msgspec.structs.replace(settings, db=where))
    await file.open(lambda changes, took: None)
    try:
        yield file
    finally:
        await file.close()


@contextlib.asynccontextmanager
async def written_to(settings: Settings, where: str) -> AsyncIterator[Target]:
    if not is_file(where):
        async with in_redis(settings, where) as store:
            yield store
        return
    file = SQLiteStore(msgspec.structs.replace(settings, db=where))
    await file.open(lambda changes, took: None)  # which makes it where it is not there
    await file.close()
    with opened_alone(Path(where)) as connection, database_problems():
        if connection.execute("select 1 from threads where thread <> generation").fetchone():
            raise StartupError(f"{where} has threads of its own; name a file that is new, or of an earlier copy")
        yield FileTarget(connection)


@contextlib.contextmanager
def opened_alone(path: Path) -> Iterator[sqlite3.Connection]:
    with sole_owner(path.resolve()), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        open_packs(connection)
        yield connection


class FileSource(SQLiteStore):
    """A SQLite file that a service may be writing to, which is only read."""

    async def open(self, told: Told) -> None:
        if not self.path.exists():
            raise StartupError(f"there is no {self.path}")
        self.readers = [await self.opened("ro", self.exits) for _ in range(2)]
        if not await self.readers[0].run(self.check_contents):
            raise StartupError(f"{self.path} is not a database of resume-stream")


@contextlib.contextmanager
def database_problems() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise database_problem(error) from error


class FileTarget:
    """A SQLite file that no service has. Its threads have their generation as their number, as both are to grow."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._connection.execute("rollback")
            raise
        self._connection.execute("commit")

    async def copied(self) -> dict[str, Version]:
        rows = self._connection.execute(
            "select thread_id, generation, last_seq, (select count(*) from messages where messages.thread = t.thread),"
            " updated_at from threads as t where thread_id is not null"
        )
        return {thread_id: (generation, *rest) for thread_id, generation, *rest in rows}

    async def put(self, thread: ThreadStatus, pages: AsyncIterator[list[Entry]]) -> bool:
        (generation, last_seq, *_), run = version_of(thread), self._connection.execute
        with self._transaction():
            run("delete from threads where thread_id = ? or thread = ?", (thread.thread_id, generation))
            run(
                "insert into threads (thread, thread_id, generation, last_seq, created_at, updated_at, touched_at)"
                " values (?1, ?2, ?3, ?4, ?5, ?6, ?6)",
                (generation, thread.thread_id, generation, last_seq, thread.created_at, thread.updated_at),
            )
            numbers = {
                message.message_id: run(
                    "insert into messages (thread, message_id, status, reason, chunk_count, first_seq, last_seq,"
                    " created_at, updated_at, touched_at) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9)",
                    (
                        generation,
                        message.message_id,
                        message.status,
                        message.reason,
                        message.chunk_count,
                        message.first_seq,
                        message.last_seq,
                        message.created_at,
                        message.updated_at,
                    ),
                ).lastrowid
                for message in thread.messages
            }
            async for entries in pages:
                self._insert(generation, numbers, entries)
            run(
                "update messages set size = (select coalesce(sum(length(cast(content as blob))), 0) from chunks"
                " where chunks.thread = messages.thread and chunks.message = messages.message) where thread = ?",
                (generation,),
            )
            run("update clock set latest_generation = max(latest_generation, ?)", (generation,))
        return True

    def _insert(self, generation: int, numbers: dict[str, int | None], entries: list[Entry]) -> None:
        ended = dict(
            self._connection.execute("select message, updated_at from messages where thread = ?", (generation,))
        )
        rows = [
            (generation, entry.seq, numbers[entry.message_id], entry.event, entry.content, entry.timestamp)
            if isinstance(entry, StoredChunk)
            else (generation, entry.seq, numbers[entry.message_id], None, None, ended[numbers[entry.message_id]])
            for entry in entries
        ]
        self._connection.executemany(
            "insert into chunks (thread, seq, message, event, content, timestamp) values (?, ?, ?, ?, ?, ?)", rows
        )

    async def drop(self, thread_id: str, generation: int) -> None:
        with self._transaction():
            self._connection.execute("delete from threads where thread = ?", (generation,))
