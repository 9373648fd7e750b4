"""Guards the SQLite file: checks it before it is served, notices a file that was replaced, and survives a full disk.

It also interrupts reads that nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from litestar import Request

from ..app import BadRequest, ChunkBuffer, Database, SQLiteStore, StartupError, Stopping, Unavailable, checkpoint

T = TypeVar("T")
STEPS = 100_000  # of SQLite's virtual machine between two looks whether anybody still waits


def attend(buffer: ChunkBuffer) -> None:
    buffer.while_connected = while_connected


async def while_connected(request: Request[Any, Any, Any], reading: Coroutine[Any, Any, T]) -> T:
    """Await a long read, unless the client, whose body has been read, hangs up."""
    gone, read = asyncio.ensure_future(request.receive()), asyncio.ensure_future(reading)
    try:
        await asyncio.wait((gone, read), return_when=asyncio.FIRST_COMPLETED)
        if not read.done():
            raise BadRequest("The connection was closed before there was an answer.")
        return read.result()
    finally:
        for task in (gone, read):
            task.cancel()


class InterruptedDatabase(Database):
    """A connection that gives a function up once its caller is cancelled or the service stops."""

    stopped = False

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        is_abandoned = False

        def interruptible(db: sqlite3.Connection) -> T:
            db.set_progress_handler(lambda: is_abandoned or self.stopped, STEPS)
            try:
                if is_abandoned or self.stopped:
                    raise Stopping
                return work(db)
            finally:
                db.set_progress_handler(None, 0)

        try:
            return await super().run(interruptible)
        except asyncio.CancelledError:
            is_abandoned = True
            raise

    async def close(self) -> None:
        self.stopped = True
        await super().close()


class GuardedStore(SQLiteStore):
    database = InterruptedDatabase

    async def check(self) -> None:
        """Check the whole file on a connection that cannot write, so that a refused file stays as it was."""
        if 0 < self.settings.max_db < 64 * 1024:
            raise StartupError(f"max_db is {self.settings.max_db} bytes, too few for a database; give it 1MiB or more")
        if (names := os.stat(self.path).st_nlink) != 1:
            raise StartupError(f"{self.path} has {names} names, and each would get a WAL of its own; keep one of them")
        async with contextlib.AsyncExitStack() as exits:
            # A hot journal is rolled back first, which takes a connection that writes.
            database = await self.opened("rw" if self.journal.exists() else "ro", exits)
            await database.run(self.check_contents)

    def check_contents(self, db: sqlite3.Connection) -> bool:
        try:
            ((verdict,),) = db.execute("pragma integrity_check(1)")
        except sqlite3.DatabaseError as error:
            verdict = str(error)
        if verdict != "ok":
            raise StartupError(
                f"{self.path} is damaged, or is not a database ({' '.join(verdict.split())}); restore it from a backup,"
                " or name another file with --db"
            )
        return super().check_contents(db)

    def prepare(self, db: sqlite3.Connection) -> None:
        super().prepare(db)
        self._names = str(self.path), str(self.wal)  # as strings, which os.stat() takes faster
        self._inodes = [os.stat(name).st_ino for name in self._names]

    def stop(self) -> None:
        for database in self.readers[1:]:
            database.stopped = True  # type: ignore[attr-defined]

    def wal_size(self) -> int:
        """Raise Unavailable if somebody deleted or replaced a file: SQLite would go on writing to the old one."""
        with contextlib.suppress(FileNotFoundError):
            file, wal = map(os.stat, self._names)
            if [file.st_ino, wal.st_ino] == self._inodes:
                return wal.st_size
        raise Unavailable(f"{self.path.name} or its WAL was deleted or replaced; restart the service.")

    async def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self.wal_size()
        return await super().change(work)

    async def maintain(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await super().maintain(partial(with_room, work))


def with_room(work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Run the function. If the disk is full, empty the WAL and try once more."""
    try:
        return work(db)
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_FULL or not checkpoint(db):
            raise
        return work(db)


KEEPER = GuardedStore
