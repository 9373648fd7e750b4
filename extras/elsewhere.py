"""Notices what other processes do to the threads that somebody follows or uploads to."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from typing import Any, Protocol, cast

from ..app import ChunkBuffer, SQLiteStore, Store, logged_problems


class WatchfulStore(Store, Protocol):
    """A store that notices changes by other processes."""

    def watch(self, thread_ids: AbstractSet[str]) -> None:
        """Watch these threads. It is called again when the set, which stays the same object, has changed."""

    def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]:
        """Yield watched threads that another process may have changed in any way."""


def attend(buffer: ChunkBuffer) -> None:
    if hasattr(buffer.store, "watch"):  # else it is somebody's own store, which no other process changes
        store = cast(WatchfulStore, buffer.store)
        buffer.watch = store.watch
        buffer.begin(watch_forever(buffer, store))


async def watch_forever(buffer: ChunkBuffer, store: WatchfulStore) -> None:
    while True:
        with logged_problems("watch other processes"):
            async with aclosing(store.changed_elsewhere()) as elsewhere:
                async for thread_ids in elsewhere:
                    # Ask first: readers look again only once the store answers, else their streams would fail.
                    await buffer.store.find(next(iter(thread_ids)))
                    for thread_id in thread_ids:
                        if tail := buffer.tails.get(thread_id):
                            await doubt(buffer, thread_id, tail)


async def doubt(buffer: ChunkBuffer, thread_id: str, tail: Any) -> None:
    """Make readers look again, and cut uploads whose message has ended or whose thread is gone."""
    tail.doubt()
    uploads: dict[Any, str] = getattr(tail, "uploads", {})  # where extras/producing.py takes any
    for message_id in {*filter(None, uploads.values())}:
        generation, found = tail.generation, await buffer.store.find(thread_id, message_id)
        if tail.generation == generation not in (0, found.generation):
            tail.clear(generation)
        elif found.ended:
            tail.cut(message_id)


class WatchfulFile(SQLiteStore):
    """Polls PRAGMA data_version, once for all readers and only while there are any."""

    _watched: AbstractSet[str] = frozenset()

    def prepare(self, db: sqlite3.Connection) -> None:
        super().prepare(db)
        self._version = data_version(db)

    def watch(self, thread_ids: AbstractSet[str]) -> None:
        self._watched = thread_ids

    async def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]:
        """Yield all watched threads, because SQLite does not say what another process wrote."""
        while True:
            await asyncio.sleep(max(self.settings.poll_interval, 0.01))
            latest = await self.data_version() if self._watched else self._version
            if latest != self._version:
                yield set(self._watched)
                self._version = latest  # only after the buffer has handled it

    async def data_version(self) -> int:
        return await self.maintain(data_version)


def data_version(db: sqlite3.Connection) -> int:
    """Return a number that changes each time another process writes."""
    ((number,),) = db.execute("pragma data_version")
    return cast(int, number)


KEEPER = WatchfulFile
