"""Heavy reads and writes: they hold up no one else, and stop when no one waits for them."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from typing import Any

import pytest
from buffers import impatient, store_of
from conftest import TIMEOUT, until
from resume_stream import app
from resume_stream.app import Chunk, ChunkBuffer

pytestmark = pytest.mark.anyio


FOR_EVER = (
    "with recursive forever (n) as (select patience() union all select n + 1 from forever) select max(n) from forever"
)


class SlowRead:
    """A heavy read that goes on until the test lets it go, or something interrupts it."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.runs = 0

    def __call__(self, db: sqlite3.Connection) -> int:
        self.runs += 1
        db.create_function("patience", 0, self._wait)
        db.execute("select 1" if self.go.is_set() else FOR_EVER).fetchone()
        return self.runs

    def _wait(self) -> int:
        self.began.set()
        return 0


async def test_a_long_read_holds_up_neither_appends_nor_readers(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", ["text"])
    slow = SlowRead()
    reading = asyncio.create_task(store_of(buffer).read(slow, heavy=True))
    await until(slow.began.is_set, "it is under way")
    async with asyncio.timeout(TIMEOUT / 2):
        await buffer.add_chunks("t", "m", ["more"], complete=True)
        assert [item async for item in buffer.resume_stream("t", "m", after=1)][-1].seq == 3
    assert not reading.done()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_a_read_that_no_one_waits_for_is_interrupted_or_skipped(buffer: ChunkBuffer) -> None:
    first, passed_over, last = SlowRead(), SlowRead(), SlowRead()
    last.go.set()
    readings = [asyncio.create_task(store_of(buffer).read(slow, heavy=True)) for slow in (first, passed_over, last)]
    await until(first.began.is_set, "the first is under way")
    for reading in readings[:2]:
        reading.cancel()
    async with asyncio.timeout(TIMEOUT / 2):
        assert await readings[2] == 1
    assert (first.runs, passed_over.runs) == (1, 0)


async def test_a_buffer_closes_at_once_in_spite_of_long_reads(make_buffer: Any) -> None:
    buffer = make_buffer()
    async with buffer:
        slow = SlowRead()
        readings = [asyncio.create_task(store_of(buffer).read(slow, heavy=True)) for _ in range(20)]
        await until(slow.began.is_set, "the first is under way")
        async with asyncio.timeout(TIMEOUT / 2):
            buffer.stop()
            outcomes = await asyncio.gather(*readings, return_exceptions=True)
    assert slow.runs == 1
    assert all(isinstance(outcome, app.Unavailable) for outcome in outcomes)


async def test_an_append_may_have_a_limited_number_of_chunks(buffer: ChunkBuffer) -> None:
    most = app._MAX_CHUNKS
    with pytest.raises(app.TooLarge, match="send them in parts"):
        await buffer.add_chunks("t", "m", [Chunk("")] * (most + 1))
    assert (await buffer.add_chunks("t", "m", [Chunk("")] * most)).chunk_count == most


async def test_chunks_without_text_fill_a_message_too(make_buffer: Any) -> None:
    async with make_buffer(max_message=1600) as buffer:
        await buffer.add_chunks("t", "m", [""] * 100)
        with pytest.raises(app.TooLarge, match="16 besides its text"):
            await buffer.add_chunks("t", "m", [""])


async def test_a_status_lists_messages_page_by_page(buffer: ChunkBuffer) -> None:
    for number in range(5):
        await buffer.open_message("t", f"m{number}")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        status = await buffer.get_thread_status("t", limit=2, cursor=cursor)
        assert status.message_count == 5
        seen += [message.message_id for message in status.messages]
        if (cursor := status.messages_cursor) is None:
            break
    assert seen == [f"m{number}" for number in range(5)]


async def test_a_new_message_never_gets_the_text_of_one_deleted_by_hand(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "deleted", ["old text"])
    with sqlite3.connect(buffer.settings.db) as shell:
        app.open_packs(shell)
        shell.execute("delete from messages where message_id = 'deleted'")
    shell.close()
    await buffer.add_chunks("t", "new", ["new text"], complete=True)
    assert (await buffer.get_accumulated_content("t")).content == "new text"
    assert [item.seq async for item in buffer.resume_stream("t", "new")] == [2, 3]


async def test_a_recording_waits_while_the_store_refuses_it(make_buffer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, 0.01)
    async with make_buffer() as buffer:
        other = sqlite3.connect(buffer.settings.db, isolation_level=None)
        stored_one, locked = asyncio.Event(), asyncio.Event()

        async def source() -> Any:
            yield "one "
            await stored_one.wait()
            other.execute("begin immediate")
            locked.set()
            yield "two "
            yield "three"

        await buffer.open_message("t", "m")
        recording = buffer.record("t", "m", source())
        reading = buffer.resume_stream("t", "m")
        assert (await anext(reading)).content == "one "
        await reading.aclose()
        stored_one.set()
        await locked.wait()
        await asyncio.wait([recording], timeout=0.2)
        assert not recording.done()
        other.execute("rollback")
        other.close()
        async with asyncio.timeout(TIMEOUT / 2):
            await recording
        status = (await buffer.get_thread_status("t")).status
        assert ((await buffer.get_accumulated_content("t")).content, status) == ("one two three", "completed")


async def test_erasing_in_a_large_file_holds_up_no_one(buffer: ChunkBuffer) -> None:
    """Each step of the erasure is bounded, and others have a turn between two steps."""
    await buffer.add_chunks("small", "m", ["text"])
    for number in range(8):
        await buffer.add_chunks("large", f"m{number}", ["x" * 2**20] * 8)
    erasing = asyncio.create_task(buffer.clear_thread_buffer("small"))
    turns = 0
    while not erasing.done():
        began = time.perf_counter()
        await buffer.add_chunks("t", "m", ["text"])
        turns += 1
        assert time.perf_counter() - began < TIMEOUT / 10
    assert turns >= 5
