"""Hot rows and commits in the loop: appends cost less SQL and fewer changes of threads.

Between two commits the store keeps the rows of the messages that producers append to, so that an append reads
nothing. A small commit runs in the loop's own thread while the disk is quick.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from ..app import Append, Change, Problem, Row, Settings, SQLiteStore, Transaction, Write, database_problem

T = TypeVar("T")

FEW_WRITES, FEW_BYTES = 8, 16 * 1024  # the largest commit in the loop's own thread
QUICK = 0.001  # seconds; after a slower commit
PAUSE = 20  # times as long the loop commits nothing: it waits for the disk a twentieth of its time at most
IN_A_ROW = 128  # small commits, of which the other thread makes the last one, with a checkpoint if need be
HOT_THREADS = 1_024
CHECKPOINT_PAGES = 1_000  # pages of the WAL after which SQLite makes a checkpoint, which is its default


class HotThread:
    """A thread that producers append to, with its messages, each as it was after its own last append."""

    __slots__ = ("last_seq", "messages", "minutes")

    def __init__(self) -> None:
        self.last_seq = 0
        self.messages: dict[str, Row] = {}
        self.minutes: dict[int | None, int] = {}  # the minute in which each message was touched last


class HotTransaction(Transaction):
    """A transaction that gathers appends to hot messages, and saves them with one statement for each table."""

    def __init__(self, db: sqlite3.Connection, max_message: int, hot: dict[str, HotThread]) -> None:
        super().__init__(db, max_message)
        self._hot = hot
        self._messages: dict[int | None, Row] = {}
        self._touched: list[Row] = []
        self._chunks: list[tuple[Any, ...]] = []

    def outcome(self, write: Write) -> Change | Problem:
        if isinstance(write, Append) and (found := self._hot_row(write)) is not None:
            try:
                return self._gather(write, found)
            except Problem as problem:
                return problem
        self.flush()  # the write must see what was gathered
        outcome = super().outcome(write)
        if not isinstance(write, Append):
            self._hot.pop(write.thread_id, None)
        elif isinstance(outcome, Change) and outcome.changed and isinstance(outcome.state, Row):
            self._remember(write, outcome.state)
        return outcome

    def _hot_row(self, append: Append) -> Row | None:
        """Return the message's row if it is hot, and if this append simply goes on behind it."""
        thread = self._hot.get(append.thread_id)
        if thread is None or append.complete or (row := thread.messages.get(append.message_id)) is None:
            return None
        if append.index not in (None, row.chunk_count) or append.generation not in (None, row.generation):
            return None
        return row if row.last_seq == thread.last_seq else msgspec.structs.replace(row, last_seq=thread.last_seq)

    def _gather(self, append: Append, found: Row) -> Change:
        size = sum(append.sizes)
        self.check_size(found, append.chunks, size)
        grown, chunks = self.grown(found, append.chunks, size)
        minutes = self._hot[append.thread_id].minutes
        if minutes.get(found.message) != self.minute:
            minutes[found.message] = self.minute
            self._touched.append(grown)
        self._chunks += chunks
        self._messages.pop(grown.message, None)  # the newest last, as it has the thread's last place
        self._messages[grown.message] = grown
        self._remember(append, grown)
        return Change(append.thread_id, append.message_id, grown, self.now, append.chunks, size)

    def _remember(self, append: Append, row: Row) -> None:
        thread = self._hot.setdefault(append.thread_id, HotThread())
        thread.last_seq = row.last_seq
        if row.ended:
            thread.messages.pop(append.message_id, None)
        else:
            thread.messages[append.message_id] = row

    def flush(self) -> None:
        if self._messages:
            self.save(list(self._messages.values()), self._chunks)
            self.touch(self._touched)
            self._messages, self._chunks, self._touched = {}, [], []


class HotStore(SQLiteStore):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._hot: dict[str, HotThread] = {}  # as of the last commit
        self._hot_version: int | None = None  # the data version (PRAGMA data_version) of that commit
        self._hurries, self._patience = False, 0  # ms that the other thread waits for a lock
        self._in_use = threading.Lock()  # held by the thread that uses the writing connection
        self._small_commits = 0
        self._not_before = 0.0  # the time (time.perf_counter) of the next commit in the loop

    async def transact(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        work = partial(self._outcomes, writes)
        if len(writes) <= FEW_WRITES and size <= FEW_BYTES and (done := self._commit_here(work)) is not None:
            outcomes, self._hot = done
        else:
            outcomes, self._hot = await self.change(work)
        return outcomes

    def _outcomes(
        self, writes: Sequence[Write], db: sqlite3.Connection
    ) -> tuple[list[Change | Problem], dict[str, HotThread]]:
        hot, self._hot = self._hot, {}  # a transaction that fails leaves nothing hot
        ((version,),) = db.execute("pragma data_version")
        if version != self._hot_version or len(hot) > HOT_THREADS:
            hot, self._hot_version = {}, version  # another process may have changed the rows
        transaction = HotTransaction(db, self.settings.max_message, hot)
        outcomes = [transaction.outcome(write) for write in writes]
        transaction.flush()
        return outcomes, hot

    def _commit_here(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Commit in the loop's own thread. Return None if the other thread must do it, because it may have to wait."""
        self._small_commits += 1
        began = time.perf_counter()
        is_slow = began < self._not_before or self._small_commits % IN_A_ROW == 0
        if is_slow or self.wal_size() > self.wal_limit or not self._in_use.acquire(blocking=False):
            return None
        try:
            self._hurry(self.writer._conn, True)
            return self.in_transaction(work, self.writer._conn)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
                return None
            raise database_problem(error) from error
        finally:
            self._in_use.release()
            if (took := time.perf_counter() - began) > QUICK:
                self._not_before = began + PAUSE * took

    async def maintain(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def alone(db: sqlite3.Connection) -> T:
            with self._in_use:
                self._hurry(db, False)
                return work(db)

        return await super().maintain(alone)

    def _hurry(self, db: sqlite3.Connection, hurries: bool) -> None:
        """Let the loop wait for no lock and make no checkpoint, and the other thread do both."""
        if hurries != self._hurries:
            if hurries:
                ((self._patience,),) = db.execute("pragma busy_timeout")
            db.execute(f"pragma busy_timeout = {0 if hurries else self._patience}")
            db.execute(f"pragma wal_autocheckpoint = {0 if hurries else CHECKPOINT_PAGES}")
            self._hurries = hurries


KEEPER = HotStore
