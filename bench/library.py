"""The library in its own process: measure work over many threads in one file."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .children import child, told
from .load import TOKEN
from .servers import ROOT

PATIENCE = 600.0  # seconds for work over a hundred thousand threads
AT_ONCE = 500  # threads in one commit
ACTIVE = 100  # one of so many threads has an active message
GOES = 50  # tries of each measurement
LISTED = 10  # threads in a list
PACE = 0.001  # seconds from one append to the next
LONG_AGO = 0  # ms since 1970


def thread_name(number: int) -> str:
    return f"thread-{number}"


def load_library() -> Any:
    """Import the checkout as the package ``resume_stream``, and return its ``app``."""
    spec = importlib.util.spec_from_file_location(
        "resume_stream", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / 'app.py'} cannot be imported")
    module = sys.modules["resume_stream"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


def filled(path: Path, threads: int) -> None:
    """Make a database of so many threads with one chunk each."""
    with child(_fill, path, threads) as pipe:
        told(pipe, "filling a database", PATIENCE)


def _fill(pipe: Connection, path: Path, threads: int) -> None:
    library = load_library()

    async def fill() -> None:
        async with library.ChunkBuffer(library.Settings(db=str(path), synchronous="NORMAL")) as buffer:
            for start in range(0, threads, AT_ONCE):
                await asyncio.gather(
                    *(
                        buffer.add_chunks(thread_name(number), "run", [TOKEN], complete=number % ACTIVE != 0)
                        for number in range(start, min(start + AT_ONCE, threads))
                    )
                )

    asyncio.run(fill())
    pipe.send("filled")


def upkeep(template: Path, path: Path, number: int) -> dict[str, float]:
    """Run ``measured`` on a copy of a database and return its figures."""
    shutil.copy(template, path)
    with child(_measure, path) as pipe:
        found: dict[str, float] = told(pipe, "looking after many threads", PATIENCE)
    path.unlink()
    return found


def _measure(pipe: Connection, path: Path) -> None:
    pipe.send(asyncio.run(measured(load_library(), path)))


async def measured(library: Any, path: Path) -> dict[str, float]:
    """Return milliseconds: the medians of lists and scans, the expiry of a thread, and the longest appends."""
    settings = library.Settings(db=str(path), synchronous="NORMAL", producer_timeout=0.0)
    store = library.store_for(settings)
    async with library.ChunkBuffer(settings, store) as buffer:
        all_threads = await threads_of(buffer)
        found = {
            "active": await median_of(lambda: buffer.get_threads("active", limit=LISTED)),
            "no status": await median_of(lambda: buffer.get_threads("aborted", limit=LISTED)),
            "not covered": await median_of(lambda: buffer.get_threads(covered=["other-*", "another"], limit=LISTED)),
            "idle messages": await median_of(lambda: store.idle_messages(LONG_AGO)),
            "idle threads": await median_of(lambda: store.expire(LONG_AGO)),
        }
        found["longest append"] = await longest_append_during(buffer, asyncio.sleep(2))
        began = time.monotonic()
        found["longest append in expiry"] = await longest_append_during(buffer, expire_all(store))
        found["expiry"] = (time.monotonic() - began) * 1000 / len(all_threads)
        return found


async def threads_of(buffer: Any) -> list[str]:
    page = await buffer.get_threads(limit=1000)
    found = [thread.thread_id for thread in page.threads]
    while page.cursor:
        page = await buffer.get_threads(limit=1000, cursor=page.cursor)
        found += [thread.thread_id for thread in page.threads]
    return found


async def median_of(call: Callable[[], Awaitable[Any]]) -> float:
    taken = []
    for _ in range(GOES):
        began = time.monotonic()
        await call()
        taken.append(time.monotonic() - began)
    return statistics.median(taken) * 1000


async def expire_all(store: Any) -> None:
    """Expire every thread that is untouched from now on, and erase all traces."""
    now = time.time_ns() // 1_000_000
    while await store.expire(now):
        pass
    while not await store.erase():
        pass


async def longest_append_during(buffer: Any, work: Awaitable[Any]) -> float:
    """Append to one more thread during the work, and return the milliseconds of the slowest append."""
    await buffer.add_chunks("busy", "run", [TOKEN])
    working, longest = asyncio.ensure_future(work), 0.0
    while not working.done():
        await asyncio.sleep(PACE)
        began = time.monotonic()
        await buffer.add_chunks("busy", "run", [TOKEN])
        longest = max(longest, time.monotonic() - began)
    await working
    return longest * 1000
