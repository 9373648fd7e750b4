"""Every ordering of the steps of a reader and of a producer, forced with gates.

A reader *locates* its place, *registers* for wake-ups, *reads*, and *gets* what it read. A producer's change is
*committed* and then *published*. In every ordering, the reader gets everything once and in order, with the end last.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from buffers import detached, follow, is_of_detached_reader, store_of, take
from resume_stream import app
from resume_stream.app import ChunkBuffer, Signal

pytestmark = pytest.mark.anyio
STORES = ("sqlite", "sqlite-in-thread", "redis")

READER = ("locates", "registers", "reads", "gets")
PRODUCER = ("commits 1", "publishes 1", "commits 2", "publishes 2")


def interleavings(one: tuple[str, ...], other: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every order of all steps that keeps the order of each of the two."""
    total = len(one) + len(other)
    for places in itertools.combinations(range(total), len(one)):
        ones, others = iter(one), iter(other)
        yield tuple(next(ones if place in places else others) for place in range(total))


ORDERS = list(interleavings(READER, PRODUCER))


class Gates:
    """Stops a reader before and after each of its first two reads, and a producer around each of its two commits."""

    def __init__(self, buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reader: asyncio.Task[Any] | None = None
        self._open = {step: asyncio.Event() for step in (*READER, *PRODUCER)}
        self.reached = {step: asyncio.Event() for step in (*READER, *PRODUCER)}
        self._idle = asyncio.Event()  # set while nothing is read or committed
        self._idle.set()
        self._reads = iter([READER[:2], READER[2:]])
        self._commits = iter([PRODUCER[:2], PRODUCER[2:]])
        store = store_of(buffer)
        read, commit = store.read, store.commit

        async def gated_read(*work: Any, **options: Any) -> Any:
            task = asyncio.current_task()
            mine = task is self.reader or is_of_detached_reader(task)
            return await self._through(next(self._reads, None) if mine else None, lambda: read(*work, **options))

        async def gated_commit(operations: Any, size: int) -> Any:
            return await self._through(next(self._commits, None), lambda: commit(operations, size))

        monkeypatch.setattr(store, "read", gated_read)
        monkeypatch.setattr(store, "commit", gated_commit)

    async def _through(self, steps: tuple[str, ...] | None, call: Callable[[], Awaitable[Any]]) -> Any:
        if steps is None:
            return await call()
        before, after = steps
        self.reached[before].set()
        await self._open[before].wait()
        self._idle.clear()
        try:
            return await call()
        finally:
            self._idle.set()
            self.reached[after].set()
            await self._open[after].wait()

    def open_all(self) -> None:
        for gate in self._open.values():
            gate.set()

    async def step(self, name: str) -> None:
        """Let one step happen, and all that follows from it up to the next gate.

        A reader may skip its second read, as recent chunks are in memory. All other steps come.
        """
        if name not in READER[2:]:
            await self.reached[name].wait()
        self._open[name].set()
        for _ in range(10):
            await asyncio.sleep(0)
            await self._idle.wait()


async def read_message(buffer: ChunkBuffer, thread_id: str, after: str | None) -> list[Any]:
    return await take(buffer.resume_stream(thread_id, "m", after=after, idle_timeout=5))


async def read_by_content(buffer: ChunkBuffer, thread_id: str, after: str | None) -> list[Any]:
    return await take(buffer.resume_stream(thread_id, "m", "x" if after else "", idle_timeout=5))


async def read_thread(buffer: ChunkBuffer, thread_id: str, after: str | None) -> list[Any]:
    return await take(follow(buffer, thread_id, after=after, idle_timeout=5))


async def read_message_detached(buffer: ChunkBuffer, thread_id: str, after: str | None) -> list[Any]:
    return await detached(buffer, thread_id, "m", after=after)


async def read_thread_detached(buffer: ChunkBuffer, thread_id: str, after: str | None) -> list[Any]:
    return await detached(buffer, thread_id, after=after)


# All readers go through the SQLite store, and on the others one in a task, and one on a connection.
BY_CURSOR = [
    *(pytest.param(read, marks=pytest.mark.sqlite) for read in (read_message, read_thread_detached)),
    *(read_thread, read_message_detached),
]
READERS = [pytest.param(read_by_content, marks=pytest.mark.sqlite), *BY_CURSOR]


async def happen(
    buffer: ChunkBuffer, order: tuple[str, ...], reading: Awaitable[Any], changes: Callable[[Gates], Awaitable[Any]]
) -> Any:
    """Go through the steps in this order, and return what the reader got, or the error that it raised."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        gates = Gates(buffer, monkeypatch)
        gates.reader = reader = asyncio.ensure_future(reading)
        producer = asyncio.ensure_future(changes(gates))
        try:
            async with asyncio.timeout(10):
                for name in order:
                    await gates.step(name)
                await producer
                (got,) = await asyncio.gather(reader, return_exceptions=True)
        finally:
            gates.open_all()
    return got


def test_every_ordering_is_there() -> None:
    assert len(ORDERS) == len(set(ORDERS)) == 70
    assert {order[0] for order in ORDERS} == {"locates", "commits 1"}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("together", [False, True], ids=["append-then-end", "end-with-an-append"])
async def test_each_chunk_once_and_the_end_last(make_buffer: Any, read: Any, together: bool) -> None:
    async with make_buffer(synchronous="NORMAL") as buffer:
        for number, order in enumerate(ORDERS):
            thread_id = f"t{number}"
            await buffer.add_chunks(thread_id, "m", ["x"])
            cursor = (await buffer.get_accumulated_content(thread_id)).cursor

            async def changes(gates: Gates, thread_id: str = thread_id) -> None:
                await buffer.add_chunks(thread_id, "m", ["a", "b"])
                if together:
                    await buffer.add_chunks(thread_id, "m", ["c"], complete=True)
                else:
                    await buffer.complete_message(thread_id, "m")

            after = cursor if number % 2 else None
            got = await happen(buffer, order, read(buffer, thread_id, after), changes)
            rest = [(2, "a"), (3, "b"), *([(4, "c"), (5, "completed")] if together else [(4, "completed")])]
            assert got == (rest if after else [(1, "x"), *rest]), order
        assert buffer.readers == 0


@pytest.mark.parametrize("read", BY_CURSOR)
async def test_an_abort_by_somebody_else_comes_last_too(make_buffer: Any, read: Any) -> None:
    async with make_buffer(synchronous="NORMAL") as buffer:
        for number, order in enumerate(ORDERS):
            thread_id = f"t{number}"
            await buffer.open_message(thread_id, "m")

            async def changes(gates: Gates, thread_id: str = thread_id) -> None:
                await buffer.abort_message(thread_id, "m", "stop")
                with pytest.raises(app.Conflict):
                    await buffer.add_chunks(thread_id, "m", ["too late"])

            assert await happen(buffer, order, read(buffer, thread_id, None), changes) == [(1, "stop")], order


@pytest.mark.parametrize("read", BY_CURSOR)
@pytest.mark.parametrize("together", [False, True], ids=["in-two-commits", "in-one-commit"])
async def test_a_thread_cleared_and_made_again_never_looks_like_the_old_one(
    make_buffer: Any, read: Any, together: bool
) -> None:
    async with make_buffer(synchronous="NORMAL") as buffer:
        for number, order in enumerate(interleavings(READER, PRODUCER[:2]) if together else ORDERS):
            thread_id = f"t{number}"
            await buffer.add_chunks(thread_id, "m", ["x", "y"])
            cursor = (await buffer.get_accumulated_content(thread_id)).cursor

            async def changes(gates: Gates, thread_id: str = thread_id) -> None:
                clearing = asyncio.ensure_future(buffer.clear_thread_buffer(thread_id))
                if not together:
                    await gates.reached["commits 1"].wait()
                making = buffer.add_chunks(thread_id, "m", ["a", "b", "c"], complete=True)
                await asyncio.gather(clearing, making)

            everything = [Signal.RESET, (1, "a"), (2, "b"), (3, "c"), (4, "completed")]
            after_clear, after_remake = (
                order.index("locates") > order.index(step) for step in ("commits 1", f"commits {2 - together}")
            )
            got = await happen(buffer, order, read(buffer, thread_id, cursor), changes)
            if after_remake:
                assert got == everything, order
            elif after_clear:
                assert isinstance(got, app.NotFound), order
            else:
                assert got == [Signal.GONE], order
            assert await read(buffer, thread_id, cursor) == everything


async def test_a_follower_of_a_thread_that_does_not_exist_yet_misses_nothing(make_buffer: Any) -> None:
    async with make_buffer(synchronous="NORMAL") as buffer:
        for number, order in enumerate(ORDERS):
            thread_id = f"t{number}"

            async def changes(gates: Gates, thread_id: str = thread_id) -> None:
                await buffer.add_chunks(thread_id, "m", ["a"], complete=True)
                await buffer.add_chunks(thread_id, "n", ["b"], complete=True)

            got = await happen(buffer, order, take(follow(buffer, thread_id, follow=True, idle_timeout=5), 4), changes)
            assert got == [(1, "a"), (2, "completed"), (3, "b"), (4, "completed")], order


async def test_a_reader_goes_on_if_another_message_is_opened_before_it_ends(make_buffer: Any) -> None:
    order = ("locates", "commits 1", "publishes 1", "registers", "reads", "commits 2", "publishes 2", "gets")
    async with make_buffer(synchronous="NORMAL") as buffer:
        await buffer.add_chunks("t", "m", ["x"])

        async def changes(gates: Gates) -> None:
            await buffer.complete_message("t", "m")
            await buffer.open_message("t", "n")
            await gates.reached["gets"].wait()
            await buffer.add_chunks("t", "n", ["y"], complete=True)

        got = await happen(buffer, order, read_thread(buffer, "t", None), changes)
        assert got == [(1, "x"), (2, "completed"), (3, "y"), (4, "completed")]
