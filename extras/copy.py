"""The command ``copy FROM TO``: copy every thread from a SQLite file to Redis or back, while a service runs on FROM.

A copied thread keeps its generation and its sequence numbers, so the cursors of its readers stay valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol, cast

import msgspec

from ..app import (
    PAGE_ROWS,
    Cursor,
    Entry,
    NotFound,
    Problem,
    Settings,
    SQLiteStore,
    StartupError,
    Store,
    StoredChunk,
    ThreadStatus,
    Told,
    database_problem,
    open_packs,
    sole_owner,
    store_for,
)

Version = tuple[int, int, int, int]  # generation, last seq, number of messages, time of the last change (ms)
PASSES = 5  # over a source that keeps changing


def add_commands(commands: Any) -> None:
    summary = "copy every thread from one store to another, while the service runs on the first"
    command = commands.add("copy", summary, lambda settings, flags: asyncio.run(copy(settings, flags)), "ttl")
    command.add_argument("source", help="a SQLite file, or redis://…")
    command.add_argument("target", help="likewise; a file must be new, or the result of an earlier copy")


class Target(Protocol):
    async def copied(self) -> dict[str, Version]:
        """Return the threads that an earlier copy left here and that are unchanged, by their id."""

    async def put(self, thread: ThreadStatus, pages: AsyncIterator[list[Entry]]) -> bool:
        """Store the thread. Return False if the target has a later one of that name, or has added to it."""

    async def drop(self, thread_id: str, generation: int) -> None:
        """Delete a copied thread."""


async def copy(settings: Settings, flags: dict[str, Any]) -> None:
    """Copy what differs until nothing does. Raise StartupError if that fails."""
    origin, destination = flags["source"], flags["target"]
    try:
        async with opened(source_at(settings, origin)) as source, target_at(settings, destination) as target:
            for number in range(PASSES):
                if not await copy_what_differs(source, target):
                    print(f"\n{destination} has all that {origin} has", file=sys.stderr)
                    return
                print(f"\npass {number + 1} is done", file=sys.stderr)
    except (Problem, sqlite3.Error) as error:
        problem = error if isinstance(error, Problem) else database_problem(error)
        raise StartupError(f"the copy is not complete: {problem.detail}") from error
    print(f"{origin} keeps changing; copy it again once its service is stopped", file=sys.stderr)


async def copy_what_differs(source: Store, target: Target) -> int:
    """Copy new and changed threads, drop those that are gone, and return how many these were."""
    copied, found, changed = await target.copied(), await all_threads(source), 0
    for number, thread_id in enumerate(found, 1):
        print(f"\r{number} of {len(found)} threads", end="", file=sys.stderr, flush=True)
        with contextlib.suppress(Gone):
            thread = await with_all_messages(source, thread_id)
            if copied.get(thread_id) != version_of(thread):
                changed += await target.put(thread, all_entries(source, thread))
    gone = copied.keys() - set(found)
    for thread_id in gone:
        await target.drop(thread_id, copied[thread_id][0])
    return changed + len(gone)


class Gone(Exception):
    """The source cleared the thread during the copy."""


def version_of(thread: ThreadStatus) -> Version:
    cursor = Cursor.parse(thread.cursor)
    return cast(int, cursor.generation), cursor.seq, thread.message_count, thread.updated_at


async def all_threads(source: Store) -> list[str]:
    """Return the ids of all threads, the oldest first."""
    found: list[str] = []
    before: int | None = None
    while True:
        page = await source.threads(None, 1000, before, None)
        found += [thread.thread_id for thread in page.threads]
        if page.cursor is None:
            return found[::-1]
        before = int(page.cursor)


async def with_all_messages(source: Store, thread_id: str) -> ThreadStatus:
    """Raise Gone if there is no such thread."""
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


async def all_entries(source: Store, thread: ThreadStatus) -> AsyncGenerator[list[Entry], None]:
    """Yield the entries up to the cursor of this status. Raise Gone if the thread was cleared since."""
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
async def opened(store: Store) -> AsyncIterator[Any]:
    await store.open(lambda changes, took: None)
    try:
        yield store
    finally:
        await store.close()


def source_at(settings: Settings, where: str) -> Store:
    if is_file(where):
        return FileSource(msgspec.structs.replace(settings, db=where))
    return store_for(msgspec.structs.replace(settings, store=where))


@contextlib.asynccontextmanager
async def target_at(settings: Settings, where: str) -> AsyncIterator[Target]:
    if not is_file(where):
        async with opened(store_for(msgspec.structs.replace(settings, store=where))) as store:
            yield store
        return
    file = SQLiteStore(msgspec.structs.replace(settings, db=where))
    async with opened(file):
        pass  # this makes the file
    with sole_owner(file.path), contextlib.closing(sqlite3.connect(file.path, isolation_level=None)) as connection:
        open_packs(connection)
        if connection.execute("select 1 from threads where thread <> generation").fetchone():
            raise StartupError(f"{where} has threads of its own; name a new file, or the result of an earlier copy")
        yield FileTarget(connection)


class FileSource(SQLiteStore):
    """A SQLite file, opened for reading only: a service may be writing to it."""

    async def open(self, told: Told) -> None:
        if not self.path.exists():
            raise StartupError(f"there is no {self.path}")
        async with contextlib.AsyncExitStack() as exits:
            self.readers = [await self.opened("ro", exits) for _ in range(2)]
            if not await self.readers[0].run(self.check_contents):
                raise StartupError(f"{self.path} is not a database of resume-stream")
            self.exits = exits.pop_all()


class FileTarget:
    """A SQLite file that no service uses. The number of a copied thread is its generation: both only grow."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    async def copied(self) -> dict[str, Version]:
        rows = self._connection.execute(
            "select thread_id, generation, last_seq, (select count(*) from messages where messages.thread = t.thread),"
            " updated_at from threads as t where thread_id is not null"
        )
        return {thread_id: (generation, *rest) for thread_id, generation, *rest in rows}

    async def put(self, thread: ThreadStatus, pages: AsyncIterator[list[Entry]]) -> bool:
        (generation, last_seq, *_), run = version_of(thread), self._connection.execute
        with self._connection:
            run("begin immediate")
            run("delete from threads where thread_id = ? or thread = ?", (thread.thread_id, generation))
            run(
                "insert into threads (thread, thread_id, generation, last_seq, created_at, updated_at, touched_at)"
                " values (?1, ?2, ?1, ?3, ?4, ?5, ?5)",
                (generation, thread.thread_id, last_seq, thread.created_at, thread.updated_at),
            )
            messages = {}
            for message in thread.messages:
                number = run(
                    "insert into messages (thread, message_id, status, reason, chunk_count, first_seq, last_seq,"
                    " created_at, updated_at, touched_at) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9)",
                    (generation, *msgspec.structs.astuple(message)),
                ).lastrowid
                messages[message.message_id] = number, message.updated_at
            async for entries in pages:
                self._insert(generation, messages, entries)
            run(
                "update messages set size = (select coalesce(sum(length(cast(content as blob))), 0) from chunks"
                " where chunks.thread = messages.thread and chunks.message = messages.message) where thread = ?",
                (generation,),
            )
            run("update clock set latest_generation = max(latest_generation, ?)", (generation,))
        return True

    def _insert(self, generation: int, messages: dict[str, tuple[int | None, int]], entries: list[Entry]) -> None:
        rows: list[tuple[Any, ...]] = []
        for entry in entries:
            number, ended_at = messages[entry.message_id]
            if isinstance(entry, StoredChunk):
                rows.append((generation, entry.seq, number, entry.event, entry.content, entry.timestamp))
            else:
                rows.append((generation, entry.seq, number, None, None, ended_at))
        self._connection.executemany(
            "insert into chunks (thread, seq, message, event, content, timestamp) values (?, ?, ?, ?, ?, ?)", rows
        )

    async def drop(self, thread_id: str, generation: int) -> None:
        self._connection.execute("delete from threads where thread = ?", (generation,))
