"""Erasure to the last byte: delete in small transactions, and overwrite the copies that SQLite leaves in pages.

With secure_delete SQLite overwrites deleted cells. But if it moves cells to another page, copies of them stay in the
unused part of the old page until that part is used again. ``scrub`` overwrites these parts in the file itself.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from functools import partial
from typing import Any, cast

import msgspec

from ..app import BUSY_TIMEOUT, SQLiteStore, checkpoint

ERASE_ROWS = 500  # that one transaction deletes
ERASE_BYTES = 1024**2  # of text, likewise
SCRUB_PAGES = 256  # that are scrubbed between two commits


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


ERASED = (  # table, its key beside the thread, the size of a row
    ("chunks", "seq", "coalesce(length(cast(content as blob)), 0)"),
    ("packs", "last_seq", "length(data)"),
    ("messages", "message_id", "0"),
)


def erase_some(db: sqlite3.Connection) -> bool:
    """Delete some rows of cleared threads (which have no name). Return False if there are none."""
    threads = db.execute("select thread from threads where thread_id is null limit ?", (ERASE_ROWS,)).fetchall()
    for table, key, size in ERASED:
        rows = db.execute(
            f"select thread, {key}, {size} from json_each(?) cross join {table} on thread = value ->> 0 limit ?",
            (msgspec.json.encode(threads).decode(), ERASE_ROWS),
        )
        chosen, total = list[tuple[int, Any]](), 0
        for thread, value, row_size in rows:
            chosen.append((thread, value))
            total += row_size
            if total >= ERASE_BYTES:
                break
        rows.close()
        if chosen:
            db.executemany(f"delete from {table} where thread = ? and {key} = ?", chosen)
            return True
    db.executemany("delete from threads where thread = ?", threads)
    return bool(threads)


async def scrub(store: SQLiteStore) -> bool:
    """Scrub the whole file. Return False if another process prevents it."""
    first = pages = 1
    while first <= pages:
        pages = await store.maintain(partial(scrub_some, store, first))
        if not pages:
            return False
        first += SCRUB_PAGES
        await store.room()
    return True


def scrub_some(store: SQLiteStore, first: int, db: sqlite3.Connection) -> int:
    """Scrub some pages from ``first`` (1) on. Return the number of pages of the file, or 0 if that is not possible now.

    Nobody else writes to the file while the WAL is empty and the lock is held (https://www.sqlite.org/wal.html, 2).
    Afterwards SQLite drops the pages that it has in memory.
    """
    if not checkpoint(db):
        return 0
    db.execute("begin immediate")
    try:
        if store.wal_size():
            return 0
        ((pages,),) = db.execute("pragma page_count")
        ((page_size,),) = db.execute("pragma page_size")
        count = min(SCRUB_PAGES, pages + 1 - first)
        if count > 0:  # the file may have shrunk
            overwrite_gaps(store.descriptor, page_size, first, count)
    finally:
        db.execute("rollback")
    db.execute("pragma shrink_memory")
    return cast(int, pages)


def overwrite_gaps(descriptor: int, page_size: int, first: int, count: int) -> None:
    """Overwrite the bytes between the cell pointers and the cells of b-tree pages, which SQLite never reads.

    Numbers, offsets, and kinds of pages follow https://www.sqlite.org/fileformat2.html, 1.6 and 1.8.
    """
    data = os.pread(descriptor, page_size * count, page_size * (first - 1))
    reserved = os.pread(descriptor, 1, 20)[0]
    map_every = (page_size - reserved) // 5 + 1  # from page 2 on, a pointer map comes every so many pages
    for offset in range(0, len(data) - page_size + 1, page_size):
        number = first + offset // page_size
        header = offset + (100 if number == 1 else 0)
        kind = data[header]
        map_number = (number - 2) // map_every * map_every + 2
        map_number += map_number == 2**30 // page_size + 1  # not the page of the locks
        if kind not in (2, 5, 10, 13) or (number > 1 and number == map_number):
            continue
        cells, content = (int.from_bytes(data[header + at : header + at + 2]) for at in (3, 5))
        start = header + (12 if kind in (2, 5) else 8) + 2 * cells
        end = offset + (content or 65536)
        if start < end <= offset + page_size and data.count(0, start, end) < end - start:
            os.pwrite(descriptor, bytes(end - start), page_size * (first - 1) + start)
