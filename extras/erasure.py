"""Erasing to the last byte, in parts so small that nobody waits for long.

With secure_delete SQLite overwrites what it deletes, but the unused part of a page from which cells were
moved to another keeps copies of them, until it is used again. This overwrites them in the file itself.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from functools import partial
from typing import Any

import msgspec

from ..app import BUSY_TIMEOUT, SQLiteStore, checkpoint

ERASE_ROWS = 500  # rows deleted in one transaction
ERASE_BYTES = 1024**2  # of text, likewise
SCRUB_PAGES = 256  # of the file, looked through between two commits


class ErasingStore(SQLiteStore):
    async def erase(self) -> bool:
        """Erase in small parts. Return False, to be tried again later, if another process keeps the WAL."""
        give_up = asyncio.get_running_loop().time() + BUSY_TIMEOUT
        nameless = "exists (select 1 from threads where thread_id is null)"
        async with self.erasure:
            if await self.read(lambda db: db.execute(f"select owed or {nameless} from clock").fetchone()) == (0,):
                return True  # the call before this one has erased it
            while await self.change(self.erase_some):
                await self.room()
            await self.shrink()
            while not await self.maintain(checkpoint):
                if asyncio.get_running_loop().time() >= give_up:
                    return False
                await asyncio.sleep(0.25)
            if not await scrub(self):
                return False
            await self.change(lambda db: db.execute(f"update clock set owed = {nameless}"))
            return True

    def erase_some(self, db: sqlite3.Connection) -> bool:
        return erase_some(db)


KEEPER = ErasingStore


# What is erased of threads that have lost their name: of which table, by thread and what, and how large a row is.
ERASED = (
    ("chunks", "seq", "coalesce(length(cast(content as blob)), 0)"),
    ("packs", "last_seq", "length(data)"),
    ("messages", "message_id", "0"),
)


def erase_some(db: sqlite3.Connection) -> bool:
    """Delete a bounded part of what threads have that have lost their name; False once there are none of them."""
    threads = db.execute("select thread from threads where thread_id is null limit ?", (ERASE_ROWS,)).fetchall()
    for table, key, size in ERASED:
        rows = db.execute(
            f"select thread, {key}, {size} from json_each(?) cross join {table} on thread = value ->> 0 limit ?",
            (msgspec.json.encode(threads).decode(), ERASE_ROWS),
        )
        chosen, total = list[tuple[Any, ...]](), 0
        while total < ERASE_BYTES and (row := next(rows, None)):
            chosen, total = [*chosen, row[:2]], total + row[2]
        rows.close()
        if chosen:
            db.executemany(f"delete from {table} where thread = ? and {key} = ?", chosen)
            return True
    db.executemany("delete from threads where thread = ?", threads)
    return bool(threads)


async def scrub(store: SQLiteStore) -> bool:
    """Look through the whole file; False where another process is in the way."""
    page: int | None = 1
    while page is not None:
        begun_at, page = page, await store.maintain(partial(scrub_some, store, page))
        if page == begun_at:
            return False
        await store.room()
    return True


def scrub_some(store: SQLiteStore, first: int, db: sqlite3.Connection) -> int | None:
    """Some pages, from ``first`` (1) on; the page to go on with, which is the same one where somebody is in the way.

    While the WAL is empty and the lock is held nobody else writes to the file
    (https://www.sqlite.org/wal.html, 2), and what SQLite has of it in memory is dropped.
    """
    if not checkpoint(db):
        return first
    db.execute("begin immediate")
    try:
        if store.wal_size():
            return first
        ((pages,),) = db.execute("pragma page_count")
        ((page_size,),) = db.execute("pragma page_size")
        overwrite_gaps(store.descriptor, page_size, first, min(SCRUB_PAGES, pages + 1 - first))
    finally:
        db.execute("rollback")
    db.execute("pragma shrink_memory")
    return first + SCRUB_PAGES if first + SCRUB_PAGES <= pages else None


def overwrite_gaps(descriptor: int, page_size: int, first: int, count: int) -> None:
    """Overwrite what lies between the cell pointers and the cells of b-tree pages, which SQLite never reads.

    Numbers, offsets and kinds of pages are those of https://www.sqlite.org/fileformat2.html, 1.6 and 1.8.
    """
    data = os.pread(descriptor, page_size * count, page_size * (first - 1))
    reserved = os.pread(descriptor, 1, 20)[0]
    map_every = (page_size - reserved) // 5 + 1  # a pointer map comes first in each such stretch, from page 2 on
    for offset in range(0, len(data) - page_size + 1, page_size):
        number = first + offset // page_size
        header = offset + (100 if number == 1 else 0)
        kind = data[header]
        map_number = (number - 2) // map_every * map_every + 2
        map_number += map_number == 2**30 // page_size + 1  # which is the page with the locks
        if kind not in (2, 5, 10, 13) or (number > 1 and number == map_number):
            continue
        cells, content = (int.from_bytes(data[header + at : header + at + 2]) for at in (3, 5))
        start = header + (12 if kind in (2, 5) else 8) + 2 * cells
        end = offset + (content or 65536)
        if start < end <= offset + page_size and data.count(0, start, end) < end - start:
            os.pwrite(descriptor, bytes(end - start), page_size * (first - 1) + start)
