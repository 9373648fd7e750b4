"""Packing: what has ended is kept compressed, some hundred chunks in one row, once the clean-up has come by.

The core reads packs, and erases them; only here they are made. Nobody waits for that: a pack is made of a
snapshot, and put in the place of its rows in a transaction of its own, if they are still what they were.
"""

from __future__ import annotations

import logging
import sqlite3
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import msgspec

from ..app import BadRows, SQLiteStore, now_ms

log = logging.getLogger("resume_stream")

PACK_ROWS = 1_024  # entries in a pack, at the most
PACK_BYTES = 64 * 1024  # of text, after which a pack is full
LEAST_PACKED = 64  # entries; what is shorter than this,
LEAST_PACKED_BYTES = 4 * 1024  # and than this, waits for what follows it

EntryRow = tuple[int, int, str | None, str | None, int]  # seq, message, event, content, timestamp

ENDED = (
    "select seq, message, event, content, timestamp from chunks join messages using (message)"
    " where chunks.thread = ? and seq between ? and ? and status <> 'active'"
    " and instr(coalesce(event, '') || coalesce(content, ''), char(0)) = 0"  # after which SQLite's JSON stops
    " order by seq"
)


class PackingStore(SQLiteStore):
    _packing: Packing | None = None

    async def upkeep(self) -> None:
        if self.settings.packing:
            self._packing = self._packing or Packing(self)
            await self._packing.pack()
        await super().upkeep()


KEEPER = PackingStore


class Run(NamedTuple):
    """Entries that follow one another in a thread, all of them of ended messages, and the pack they are to be."""

    thread: int
    rows: Sequence[EntryRow]
    size: int
    data: bytes


class Packing:
    def __init__(self, store: SQLiteStore) -> None:
        self._store = store
        self._until = 0  # ms since 1970: what nobody touched since is packed

    async def pack(self) -> None:
        """A pack a transaction; of the threads touched since the last time."""
        store, thread = self._store, 0
        # Not the time, as a transaction that began before may be committed after the look at its thread.
        latest = min(now_ms(), await store.read(latest_touched, heavy=True))
        while found := await store.read(partial(next_thread, self._until, thread), heavy=True):
            thread = found
            try:
                await self._pack_thread(thread)
            except BadRows as problem:
                log.error("a thread cannot be packed, and stays as it is: %s", problem)
        await store.shrink()
        self._until = latest

    async def _pack_thread(self, thread: int) -> None:
        store, after = self._store, 0
        while run := await store.read(partial(next_run, thread, after), heavy=True):
            await store.change(partial(put_away, run))
            await store.maintain(checkpoint_some)
            after = run.rows[-1][0]
            await store.room()


def checkpoint_some(db: sqlite3.Connection) -> None:
    """Copy what has been committed to the file now, so that no append waits while much is copied at once."""
    db.execute("pragma wal_checkpoint(passive)").fetchone()


def latest_touched(db: sqlite3.Connection) -> int:
    (latest,) = db.execute("select coalesce(max(updated_at), 0) from threads").fetchone()
    return cast(int, latest)


def next_thread(touched_since: int, after: int, db: sqlite3.Connection) -> int | None:
    """The first after this one of those that may have something to pack."""
    (thread,) = db.execute(
        "select min(thread) from threads where thread > ? and updated_at >= ? and thread_id is not null",
        (after, touched_since),
    ).fetchone()
    return cast(int | None, thread)


def next_run(thread: int, after: int, db: sqlite3.Connection) -> Run | None:
    """The first after this place that is long enough, and no longer than a pack."""
    rows: list[EntryRow] = []
    size = 0
    for row in db.execute(ENDED, (thread, after + 1, sys.maxsize)):
        if rows and row[0] != rows[-1][0] + 1:
            if is_worth_it(len(rows), size):
                break
            rows, size = [], 0
        rows.append(row)
        size += len(row[3] or "")
        if len(rows) == PACK_ROWS or size >= PACK_BYTES:
            break
    return Run(thread, rows, *packed(rows)) if is_worth_it(len(rows), size) else None


def packed(rows: Sequence[EntryRow]) -> tuple[int, bytes]:
    """The size of a pack's JSON text, and that text compressed."""
    text = msgspec.json.encode([row[1:] for row in rows])
    return len(text), zlib.compress(text)


def is_worth_it(entries: int, size: int) -> bool:
    return entries >= LEAST_PACKED or size >= LEAST_PACKED_BYTES


def put_away(run: Run, db: sqlite3.Connection) -> None:
    """Replace a run by its pack, if its rows are still what they were."""
    place = (run.thread, run.rows[0][0], run.rows[-1][0])
    if db.execute(ENDED, place).fetchall() != run.rows:
        return
    db.execute("delete from chunks where thread = ? and seq between ? and ?", place)
    db.execute("insert into packs (thread, first_seq, last_seq, size, data) values (?, ?, ?, ?, ?)", (*place, *run[2:]))
