"""Packs: the clean-up compresses the entries of ended messages, some hundred of them in one row.

``app.py`` reads packs and erases them; only this extra makes them. No append waits for that: a pack is made from a
snapshot, and replaces its rows in a transaction of its own if they have not changed since.
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
LEAST_PACKED = 64  # entries; a run of fewer,
LEAST_PACKED_BYTES = 4 * 1024  # and of less text, waits for the entries that follow it

EntryRow = tuple[int, int, str | None, str | None, int]  # seq, message, event, content, timestamp

ENDED = (
    "select seq, message, event, content, timestamp from chunks join messages using (message)"
    " where chunks.thread = ? and seq between ? and ? and status <> 'active'"
    " and instr(coalesce(event, '') || coalesce(content, ''), char(0)) = 0"  # SQLite's JSON ends at a NUL
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
    """Consecutive entries of ended messages of a thread, and the pack that will replace them."""

    thread: int
    rows: Sequence[EntryRow]
    size: int
    data: bytes


class Packing:
    def __init__(self, store: SQLiteStore) -> None:
        self._store = store
        self._until = 0  # ms since 1970: threads that nobody touched since are packed

    async def pack(self) -> None:
        """Pack the threads that were touched since the last time, with one transaction for each pack."""
        store, thread = self._store, 0
        # Not the time itself: a transaction that has begun by now may be committed after its thread was packed.
        latest = min(now_ms(), await store.read(latest_touched, heavy=True))
        while thread := await store.read(partial(next_thread, self._until, thread), heavy=True):
            try:
                await self._pack_thread(thread)
            except BadRows as problem:
                log.error("a thread cannot be packed, and stays unpacked: %s", problem)
        await store.shrink()
        self._until = latest

    async def _pack_thread(self, thread: int) -> None:
        store, after = self._store, 0
        while run := await store.read(partial(next_run, thread, after), heavy=True):
            await store.change(partial(replace_by_pack, run))
            await store.maintain(checkpoint_some)
            after = run.rows[-1][0]
            await store.room()


def checkpoint_some(db: sqlite3.Connection) -> None:
    """Checkpoint after each pack, so that no append waits for a long checkpoint."""
    db.execute("pragma wal_checkpoint(passive)").fetchone()


def latest_touched(db: sqlite3.Connection) -> int:
    (latest,) = db.execute("select coalesce(max(updated_at), 0) from threads").fetchone()
    return cast(int, latest)


def next_thread(touched_since: int, after: int, db: sqlite3.Connection) -> int:
    """Return the first touched thread after this one, or 0."""
    (thread,) = db.execute(
        "select coalesce(min(thread), 0) from threads where thread > ? and updated_at >= ? and thread_id is not null",
        (after, touched_since),
    ).fetchone()
    return cast(int, thread)


def next_run(thread: int, after: int, db: sqlite3.Connection) -> Run | None:
    """Return the first run after this sequence number that is long enough, cut to the size of a pack."""
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
    """Return the size of the pack's JSON text, and the compressed text."""
    text = msgspec.json.encode([row[1:] for row in rows])
    return len(text), zlib.compress(text)


def is_worth_it(entries: int, size: int) -> bool:
    return entries >= LEAST_PACKED or size >= LEAST_PACKED_BYTES


def replace_by_pack(run: Run, db: sqlite3.Connection) -> None:
    """Do nothing if the rows of the run have changed."""
    place = (run.thread, run.rows[0][0], run.rows[-1][0])
    if db.execute(ENDED, place).fetchall() != run.rows:
        return
    db.execute("delete from chunks where thread = ? and seq between ? and ?", place)
    db.execute("insert into packs (thread, first_seq, last_seq, size, data) values (?, ?, ?, ?, ?)", (*place, *run[2:]))
