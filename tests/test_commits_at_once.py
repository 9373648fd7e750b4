"""Who commits: the loop itself as long as that is quick, and else the other thread, which may wait."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from buffers import on_writer, store_of
from conftest import TIMEOUT, until
from resume_stream import app
from resume_stream.app import Chunk, ChunkBuffer
from resume_stream.extras import hot

pytestmark = pytest.mark.anyio


class Transactions:
    """By whom each was made: the loop, or the other thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_loop: list[bool] = []
        loop, noted = threading.get_ident(), self.by_loop

        class Noted(hot.HotTransaction):
            def __init__(self, *args: Any) -> None:
                noted.append(threading.get_ident() == loop)
                super().__init__(*args)

        monkeypatch.setattr(hot, "HotTransaction", Noted)


@pytest.fixture
async def buffer(make_buffer: Any) -> AsyncIterator[ChunkBuffer]:
    """One whose other thread has nothing to do: it does not clean up there what there is not."""
    async with make_buffer(packing=False) as buffer:
        yield buffer


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> Transactions:
    monkeypatch.setattr(hot, "QUICK", math.inf)
    return Transactions(monkeypatch)


def wal_pages(buffer: ChunkBuffer) -> int:
    return store_of(buffer).wal_size() // 4096


async def append_some(buffer: ChunkBuffer, count: int) -> None:
    for _ in range(count):
        await buffer.add_chunks("t", "m", ["text"])


async def test_the_loop_commits_what_is_little(buffer: ChunkBuffer, transactions: Transactions) -> None:
    await append_some(buffer, 5)
    await asyncio.gather(*(buffer.add_chunks("t", "m", ["text"]) for _ in range(8)))
    assert transactions.by_loop == [True] * 6


async def test_the_other_thread_commits_what_is_many_or_large(buffer: ChunkBuffer, transactions: Transactions) -> None:
    await asyncio.gather(*(buffer.add_chunks("t", "m", ["text"]) for _ in range(9)))
    await buffer.add_chunks("t", "m", ["x" * 16 * 1024])
    assert transactions.by_loop == [False, False]


async def test_now_and_then_the_other_thread_commits_so_that_the_wal_begins_anew(
    buffer: ChunkBuffer, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot, "IN_A_ROW", 3)
    monkeypatch.setattr(hot, "CHECKPOINT_PAGES", 10)
    await append_some(buffer, 60)
    assert transactions.by_loop == [True, True, False] * 20
    assert wal_pages(buffer) < 20


async def test_a_wal_over_its_limit_is_left_to_the_other_thread(
    buffer: ChunkBuffer, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append_some(buffer, 2)
    monkeypatch.setattr(store_of(buffer), "wal_limit", 0)
    await append_some(buffer, 2)
    assert transactions.by_loop == [True, True, False, True]
    assert wal_pages(buffer) < 8


async def test_after_a_slow_commit_the_other_thread_commits_for_twenty_times_as_long(
    buffer: ChunkBuffer, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, takes = 1000.0, 0.0

    class Slow(hot.HotTransaction):
        def flush(self) -> None:
            nonlocal clock
            clock += takes
            super().flush()

    monkeypatch.setattr(app.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(hot, "QUICK", 0.001)
    monkeypatch.setattr(hot, "HotTransaction", Slow)

    async def append_at(now: float, seconds: float) -> bool:
        nonlocal clock, takes
        clock, takes = now, seconds
        transactions.by_loop.clear()
        await append_some(buffer, 1)
        return transactions.by_loop == [True]

    assert await append_at(1000, 0)
    assert await append_at(1001, 0.002)
    assert not await append_at(1001.039, 0)
    assert not await append_at(1001.0395, 0.1)  # which it does not mind there
    assert await append_at(1001.141, 0.0001)
    assert await append_at(1002, 0)


async def test_a_lock_of_another_process_is_waited_for_in_the_other_thread(
    buffer: ChunkBuffer, transactions: Transactions
) -> None:
    await append_some(buffer, 1)
    with contextlib.closing(sqlite3.connect(buffer.settings.db, isolation_level=None)) as other:
        other.execute("begin immediate")
        began = time.monotonic()
        appending = asyncio.create_task(buffer.add_chunks("t", "m", ["text"]))
        for _ in range(20):  # the loop goes on, and so does whoever reads
            assert (await buffer.get_accumulated_content("t")).content == "text"
        assert not appending.done()
        assert time.monotonic() - began < app.BUSY_TIMEOUT  # which the loop would have waited
        other.execute("rollback")
    assert (await appending).seq == 2
    assert transactions.by_loop == [True, False]
    await append_some(buffer, 1)
    assert transactions.by_loop == [True, False, True]


async def test_the_loop_leaves_the_connection_to_the_other_thread_until_that_has_finished(
    buffer: ChunkBuffer, transactions: Transactions
) -> None:
    begun, gate = threading.Event(), threading.Event()

    def work(_: sqlite3.Connection) -> None:
        begun.set()
        assert gate.wait(TIMEOUT)

    working = asyncio.create_task(on_writer(buffer, work))
    await until(begun.is_set, "the thread works")
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
    appending = [asyncio.create_task(buffer.add_chunks("t", "m", ["text"])) for _ in range(2)]
    await buffer.get_threads()
    assert transactions.by_loop == []
    gate.set()
    await asyncio.gather(*appending)
    assert transactions.by_loop == [False]


async def test_what_fails_in_the_loop_has_changed_nothing_and_fails_as_in_the_thread(
    buffer: ChunkBuffer, transactions: Transactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append_some(buffer, 1)
    flush, broken = hot.HotTransaction.flush, sqlite3.OperationalError("disk I/O error")
    broken.sqlite_errorcode = sqlite3.SQLITE_IOERR

    def fails(self: Any) -> None:
        flush(self)
        raise broken

    with monkeypatch.context() as context:
        context.setattr(hot.HotTransaction, "flush", fails)
        for few in (8, 0):
            context.setattr(hot, "FEW_WRITES", few)
            with pytest.raises(app.Unavailable, match="disk I/O error"):
                await buffer.add_chunks("t", "m", ["lost"])
    assert (await buffer.add_chunks("t", "m", [Chunk("more")])).seq == 2
    assert (await buffer.get_accumulated_content("t")).content == "textmore"
    assert transactions.by_loop == [True, True, False, True]
