"""The clock is set back by an hour, and forward by a day, while producers write and readers read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import TIMEOUT, Verdict, piece

HOUR, DAY = 3_600_000, 86_400_000  # ms


@contextlib.contextmanager
def clock() -> Iterator[list[int]]:
    """Yield a list whose first member, in ms, is added to the service's time."""
    from resume_stream import app
    from resume_stream.extras import clock as clock_extra

    added = [0]
    real = app.now_ms
    app.now_ms = clock_extra.now_ms = lambda: time.time_ns() // 1_000_000 + added[0]
    try:
        yield added
    finally:
        app.now_ms = clock_extra.now_ms = real


async def follow(buffer: Any, thread: str) -> tuple[str, list[Any]]:
    """Return the text that one reader gets of a message, and all other items."""
    text, told = "", []
    async for item in buffer.resume_stream(thread, "m", idle_timeout=5):
        if hasattr(item, "content"):
            text += item.content
        else:
            told.append(item)
    return text, told


async def survive_clock(folder: Path, *, step: int) -> Verdict:
    """Set the clock, then restart: nothing is lost, no message ends, and no cursor lies."""
    from resume_stream.app import ChunkBuffer, MessageEnd, Problem, Settings

    verdict = Verdict(f"clock set {'back an hour' if step < 0 else 'forward a day'}")
    settings = Settings(
        db=str(folder / f"clock{step}.db"), cleanup_interval=0.1, producer_timeout=60, poll_interval=0.02
    )
    with clock() as added, verdict.trial("while it runs"):
        pieces = [piece(number, 30) for number in range(60)]
        async with asyncio.timeout(TIMEOUT), ChunkBuffer(settings) as buffer:
            before = (await buffer.add_chunks("made", "m", pieces[:1])).seq
            generation = int((await buffer.get_accumulated_content("made")).cursor.partition("-")[0])
            await buffer.add_chunks("t", "m", pieces[:20], index=0)
            reader = asyncio.create_task(follow(buffer, "t"))
            await asyncio.sleep(0.05)
            added[0] = step
            stored = 20
            for number in range(20, 60):
                try:
                    stored = (await buffer.add_chunks("t", "m", [pieces[number]], index=number)).chunk_count
                except Problem as problem:
                    verdict.fail(f"an append after the jump: {problem.status_code} {problem.detail}")
                    break
                await asyncio.sleep(0.01)
            with contextlib.suppress(Problem):
                await buffer.complete_message("t", "m")
            text, told = await reader
            verdict.compare("the reader", text, pieces, stored)
            is_end = [isinstance(item, MessageEnd) and item.status == "completed" for item in told]
            verdict.expect(is_end == [True], f"the reader was told {told}")
            await compare(verdict, buffer, "made", pieces, before)
            await remake(verdict, buffer, generation)
    with clock() as added, verdict.trial("after a restart"):
        added[0] = min(step, 0)  # with the clock set right, or still wrong
        async with asyncio.timeout(TIMEOUT), ChunkBuffer(settings) as buffer:
            await asyncio.sleep(0.3)
            await compare(verdict, buffer, "t", pieces, stored)
    return verdict


async def compare(verdict: Verdict, buffer: Any, thread: str, pieces: list[str], acknowledged: int) -> None:
    from resume_stream.app import NotFound

    try:
        text = (await buffer.get_accumulated_content(thread)).content
    except NotFound as error:
        verdict.lost += acknowledged
        verdict.fail(f"{thread} was erased: {error.detail}")
    else:
        verdict.compare(thread, text, pieces, acknowledged)


async def remake(verdict: Verdict, buffer: Any, generation: int) -> None:
    """Clear a thread and make it again: its generation is higher, and the old cursor is refused."""
    from resume_stream.app import NotFound, Signal

    with contextlib.suppress(NotFound):
        await buffer.clear_thread_buffer("made")
    await buffer.add_chunks("made", "m", ["again"], complete=True)
    cursor = (await buffer.get_accumulated_content("made")).cursor
    verdict.expect(int(cursor.partition("-")[0]) > generation, f"generation {cursor} does not come after {generation}")
    items = [item async for item in buffer.resume_stream("made", "m", after=f"{generation}-1")]
    verdict.expect(items[0] is Signal.RESET and items[1].content == "again", f"an old cursor was answered {items[:2]}")
