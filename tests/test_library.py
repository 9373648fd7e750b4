"""``ChunkBuffer`` and ``router`` in somebody else's program."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

import buffers
import httpx
import msgspec
import pytest
from buffers import Reading, attached, follow, is_at_rest, kept_for_readers
from conftest import until
from litestar import Litestar, get
from litestar.testing import AsyncTestClient
from resume_stream import app
from resume_stream.app import (
    Appended,
    Chunk,
    ChunkBuffer,
    MessageEnd,
    Problem,
    Settings,
    Signal,
    StoredChunk,
    create_app,
    router,
)
from resume_stream.extras import live

pytestmark = pytest.mark.anyio
STORES = ("sqlite", "redis")


def said(item: Any) -> Any:
    """Return an item without its place: text, ``(event, text)``, ``END status reason``, or a Signal."""
    if isinstance(item, StoredChunk):
        return (item.event, item.content) if item.event else item.content
    return f"END {item.status} {item.reason}" if isinstance(item, MessageEnd) else item


take = partial(buffers.take, shape=said)


async def text_of(buffer: ChunkBuffer, message_id: str = "m") -> str:
    return (await buffer.get_accumulated_content("t", message_id)).content


# Producers


async def test_opening_tells_whether_the_message_is_new(buffer: ChunkBuffer) -> None:
    assert await buffer.open_message("t", "m") == (Appended("t", "m", 0, 0, "active"), True)
    assert await buffer.open_message("t", "m") == (Appended("t", "m", 0, 0, "active"), False)
    await buffer.add_chunks("t", "m", ["a", "b"])
    assert await buffer.open_message("t", "m") == (Appended("t", "m", 2, 2, "active"), False)


async def test_text_and_chunks_are_appended_in_order_and_numbered(buffer: ChunkBuffer) -> None:
    assert await buffer.add_chunks("t", "m", ["a", Chunk("b", "tool")]) == Appended("t", "m", 2, 2, "active")
    assert await buffer.add_chunks("t", "n", ["x"]) == Appended("t", "n", 3, 1, "active")
    assert await buffer.add_chunks("t", "m", []) == Appended("t", "m", 2, 2, "active")
    assert await buffer.add_chunks("t", "m", [""], complete=True) == Appended("t", "m", 5, 3, "completed")
    assert await buffer.complete_message("t", "n") == Appended("t", "n", 6, 1, "completed")
    page = await buffer.get_chunks("t")
    assert [(chunk.seq, chunk.message_id, chunk.event, chunk.content) for chunk in page.chunks] == [
        (1, "m", None, "a"),
        (2, "m", "tool", "b"),
        (3, "n", None, "x"),
        (4, "m", None, ""),
    ]
    assert page.ends == [MessageEnd("m", "completed", None, 5), MessageEnd("n", "completed", None, 6)]


@pytest.mark.parametrize(
    ("chunks", "index", "complete", "outcome"),
    [
        (["a", "b"], 0, False, Appended("t", "m", 2, 2, "active")),
        (["b"], 1, False, Appended("t", "m", 2, 2, "active")),
        (["b", "c"], 1, False, Appended("t", "m", 3, 3, "active")),
        (["c"], 2, True, Appended("t", "m", 4, 3, "completed")),
        (["B"], 1, False, {"expectedIndex": 2}),
        ([Chunk("b", "tool")], 1, False, {"expectedIndex": 2}),
        (["a", "b", "c"], 1, False, {"expectedIndex": 2}),
        (["d"], 3, False, {"expectedIndex": 2}),
        (["a"], 3, False, {"expectedIndex": 2}),
        ([], 3, True, {"expectedIndex": 2}),
    ],
)
async def test_a_retried_append_is_stored_once_and_one_that_lost_the_race_is_told(
    buffer: ChunkBuffer, chunks: list[Any], index: int, complete: bool, outcome: Any
) -> None:
    await buffer.add_chunks("t", "m", ["a", "b"])
    if isinstance(outcome, Appended):
        for _ in range(2):
            assert await buffer.add_chunks("t", "m", chunks, index=index, complete=complete) == outcome
        assert await text_of(buffer) == "abc"[: outcome.chunk_count]
    else:
        with pytest.raises(app.Conflict) as raised:
            await buffer.add_chunks("t", "m", chunks, index=index, complete=complete)
        assert raised.value.extra == outcome
        assert await text_of(buffer) == "ab"


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda buffer: buffer.open_message("", "m"), 400),
        (lambda buffer: buffer.open_message("t", "x" * 201), 400),
        (lambda buffer: buffer.add_chunks("t/u", "m", ["x"]), 400),
        (lambda buffer: buffer.add_chunks("t", "m\n", ["x"]), 400),
        (lambda buffer: buffer.add_chunks("t", "m", ["x"], index=-1), 400),
        (lambda buffer: buffer.add_chunks("t", "m", ["x", "\ud800"]), 422),
        (lambda buffer: buffer.add_chunks("t", "m", [Chunk("x", "complete")]), 422),
        (lambda buffer: buffer.add_chunks("t", "m", [Chunk("x", "a\nb")]), 422),
        (lambda buffer: buffer.add_chunks("t", "m", ["x", "y" * 101]), 413),
        (lambda buffer: buffer.add_chunks("t", "m", ["x" * 60, "y" * 60, "z" * 60, "a" * 60, "b" * 70]), 413),
        (lambda buffer: buffer.add_chunks("done", "m", ["x"]), 409),
        (lambda buffer: buffer.abort_message("done", "m"), 409),
        (lambda buffer: buffer.abort_message("live", "m", "\udfff"), 422),
        (lambda buffer: buffer.complete_message("nowhere", "m"), 404),
        (lambda buffer: buffer.complete_message("live", "nowhere"), 404),
        (lambda buffer: buffer.clear_thread_buffer("nowhere"), 404),
        (lambda buffer: buffer.get_thread_status("nowhere"), 404),
        (lambda buffer: buffer.get_accumulated_content("nowhere"), 404),
        (lambda buffer: buffer.get_accumulated_content("live", "nowhere"), 404),
        (lambda buffer: buffer.get_chunks("nowhere"), 404),
        (lambda buffer: buffer.get_chunks("live", after="soon"), 400),
        (lambda buffer: buffer.get_chunks("live", after="12345-1"), 410),
        (lambda buffer: buffer.get_threads(limit=0), 400),
        (lambda buffer: take(buffer.resume_stream("nowhere", "m")), 404),
        (lambda buffer: take(buffer.resume_stream("live", "m", after="-")), 400),
        (lambda buffer: take(buffer.resume_stream("live", "m", "\ud800")), 422),
    ],
)
async def test_bad_input_is_a_clear_error_and_changes_nothing(make_buffer: Any, call: Any, status: int) -> None:
    async with make_buffer(max_chunk=100, max_message=300) as buffer:
        await buffer.add_chunks("done", "m", ["text"], complete=True)
        await buffer.open_message("live", "m")
        before = await buffer.get_threads()
        with pytest.raises(Problem) as raised:
            await call(buffer)
        assert raised.value.status_code == status
        assert raised.value.detail
        assert await buffer.get_threads() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda buffer: buffer.complete_message("\ud800", "m"),
        lambda buffer: buffer.abort_message("t", "\ud800"),
        lambda buffer: buffer.clear_thread_buffer("\ud800"),
    ],
)
async def test_an_id_that_cannot_be_stored_harms_no_other_call(buffer: ChunkBuffer, call: Any) -> None:
    outcome, appended = await asyncio.gather(
        call(buffer), buffer.add_chunks("t", "m", ["text"]), return_exceptions=True
    )
    assert appended == Appended("t", "m", 1, 1, "active")
    assert isinstance(outcome, Problem)


async def test_an_end_is_final_and_says_so(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", ["text"])
    first = await buffer.abort_message("t", "m", "enough")
    assert first == await buffer.abort_message("t", "m", "another reason") == Appended("t", "m", 2, 1, "aborted")
    for call in (
        buffer.add_chunks("t", "m", ["more"]),
        buffer.add_chunks("t", "m", []),
        buffer.complete_message("t", "m"),
    ):
        with pytest.raises(app.Conflict) as raised:
            await call
        assert raised.value.extra == {"messageStatus": "aborted", "reason": "enough", "chunkCount": 1}


# Readers


@pytest.mark.parametrize(
    ("arguments", "gets"),
    [
        ({}, ["Hello", " wörld", ("tool", "!"), "END completed None"]),
        ({"known_content": ""}, ["Hello", " wörld", ("tool", "!"), "END completed None"]),
        ({"known_content": "Hel"}, ["lo", " wörld", ("tool", "!"), "END completed None"]),
        ({"known_content": "Hello wö"}, ["rld", ("tool", "!"), "END completed None"]),
        ({"known_content": "ö"}, ["rld", ("tool", "!"), "END completed None"]),
        ({"known_content": "Hello wörld!"}, ["END completed None"]),
        ({"known_content": "l"}, [Signal.RESET, "Hello", " wörld", ("tool", "!"), "END completed None"]),
        ({"known_content": "Hello wörld!?"}, [Signal.RESET, "Hello", " wörld", ("tool", "!"), "END completed None"]),
        ({"after": 1}, [" wörld", ("tool", "!"), "END completed None"]),
        ({"after": "3"}, ["END completed None"]),
        ({"after": 4}, []),
        ({"after": 5}, [Signal.RESET, "Hello", " wörld", ("tool", "!"), "END completed None"]),
        ({"after": "1-2"}, [Signal.RESET, "Hello", " wörld", ("tool", "!"), "END completed None"]),
    ],
)
async def test_a_reader_gets_what_it_does_not_have_yet(buffer: ChunkBuffer, arguments: Any, gets: list[Any]) -> None:
    await buffer.add_chunks("t", "m", ["Hello", " wörld", Chunk("!", "tool")], complete=True)
    assert await take(buffer.resume_stream("t", "m", **arguments)) == gets


async def test_a_reader_waits_for_new_chunks(buffer: ChunkBuffer) -> None:
    await buffer.open_message("t", "m")
    reading = await attached(buffer, buffer.resume_stream("t", "m"), shape=said)
    await buffer.add_chunks("t", "other", ["not for this one"], complete=True)
    for text in "abc":
        await buffer.add_chunks("t", "m", [text])
    await buffer.complete_message("t", "m")
    assert await reading == ["a", "b", "c", "END completed None"]
    assert buffer.readers == 0


async def test_readers_that_come_at_any_time_get_everything_once(buffer: ChunkBuffer) -> None:
    """Some of it is in memory for earlier readers, and some is not."""
    readings = []
    for number in range(8):
        await buffer.add_chunks("t", f"m{number % 2}", [f"{number}", "-"])
        position = await buffer.locate("t", after=f"{number}" if number % 3 else None)
        readings.append(
            (position.after, asyncio.create_task(take(buffer.resume_stream("t", "m0", after=position.after))))
        )
        if number % 2:
            await until(lambda: buffer.readers == len(readings))
    await buffer.complete_message("t", "m0")
    places = [(place, text) for place, text in enumerate("0-1-2-3-4-5-6-7-", 1) if (place - 1) // 2 % 2 == 0]
    for after, reading in readings:
        assert await reading == [*(text for place, text in places if place > after), "END completed None"]


async def test_a_reader_of_a_thread_goes_on_after_the_end_of_a_message(buffer: ChunkBuffer) -> None:
    await buffer.open_message("t", "last")
    reading = await attached(buffer, follow(buffer, "t", idle_timeout=10))
    for message_id in ("m", "n", "last"):
        await buffer.add_chunks("t", message_id, [message_id], complete=True)
    ends = [(2, "completed"), (4, "completed"), (6, "completed")]
    assert await reading == [(1, "m"), ends[0], (3, "n"), ends[1], (5, "last"), ends[2]]


async def test_a_quiet_stream_times_out_and_can_be_resumed(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", ["text"])
    assert await take(buffer.resume_stream("t", "m", idle_timeout=0.05)) == ["text", Signal.TIMEOUT]
    assert await take(buffer.resume_stream("t", "m", "text", idle_timeout=0.05)) == [Signal.TIMEOUT]


async def test_a_reader_is_told_when_its_thread_is_cleared(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", ["text"])
    reading = await Reading(buffer.resume_stream("t", "m", idle_timeout=5), shape=said).has("text")
    await buffer.clear_thread_buffer("t")
    assert await reading == ["text", Signal.GONE]


async def test_a_cursor_outlives_the_process_but_not_the_thread(make_buffer: Any) -> None:
    async with make_buffer() as buffer:
        await buffer.add_chunks("t", "m", ["a", "b"])
        cursor = (await buffer.get_chunks("t", limit=1)).cursor
    async with make_buffer() as buffer:
        await buffer.complete_message("t", "m")
        assert await take(buffer.resume_stream("t", "m", after=cursor)) == ["b", "END completed None"]
        await buffer.clear_thread_buffer("t")
        await buffer.add_chunks("t", "m", ["x", "y"], complete=True)
        everything = [Signal.RESET, "x", "y", "END completed None"]
        assert await take(buffer.resume_stream("t", "m", after=cursor)) == everything


async def test_a_reader_over_the_limit_is_refused_until_another_leaves(make_buffer: Any) -> None:
    async with make_buffer(max_readers=1) as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        first = buffer.resume_stream("t", "m")
        await anext(first)
        with pytest.raises(app.Unavailable) as raised:
            await anext(buffer.resume_stream("t", "m"))
        assert raised.value.headers == {"Retry-After": "1"}
        await first.aclose()
        assert await take(buffer.resume_stream("t", "m"), 1) == ["text"]


async def test_closing_the_buffer_ends_readers_without_an_end(make_buffer: Any) -> None:
    async with make_buffer() as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        reading = await Reading(buffer.resume_stream("t", "m"), shape=said).has("text")
    async with asyncio.timeout(5):
        assert await reading == ["text"]
    for call in (buffer.add_chunks("t", "m", ["more"]), take(buffer.resume_stream("t", "m"))):
        with pytest.raises(app.Unavailable):
            await call


@pytest.mark.parametrize(
    "call",
    [
        lambda buffer: buffer.get_thread_status("t"),
        lambda buffer: buffer.get_accumulated_content("t"),
        lambda buffer: buffer.get_chunks("t"),
        lambda buffer: buffer.get_threads(),
        lambda buffer: buffer.clear_thread_buffer("t"),
        lambda buffer: take(buffer.resume_stream("t", "m", "text")),
    ],
)
async def test_a_call_to_a_closed_buffer_is_refused_with_the_reason(make_buffer: Any, call: Any) -> None:
    async with make_buffer() as buffer:
        await buffer.add_chunks("t", "m", ["text"])
    with pytest.raises(app.Unavailable, match="stopping"):
        await call(buffer)


@pytest.mark.parametrize(
    "call",
    [
        lambda buffer: buffer.add_chunks("t", "m", ["text"]),
        lambda buffer: buffer.open_message("t", "m"),
        lambda buffer: buffer.complete_message("t", "m"),
        lambda buffer: buffer.get_thread_status("t"),
        lambda buffer: buffer.get_active_threads(),
        lambda buffer: buffer.clear_thread_buffer("t"),
        lambda buffer: take(buffer.resume_stream("t", "m")),
        lambda buffer: anext(buffer.agent_stream("t", "m", Source("x")())),
        lambda buffer: buffer.record("t", "m", Source("x")()),
        lambda buffer: buffer.store.probe(),
    ],
)
async def test_a_call_to_a_buffer_that_is_not_open_says_how_to_open_it(make_buffer: Any, call: Any) -> None:
    buffer = make_buffer()
    with pytest.raises(Problem, match="async with ChunkBuffer"):
        async with asyncio.timeout(5):
            await call(buffer)
    async with buffer:
        await buffer.add_chunks("t", "m", ["text"])
        assert await text_of(buffer) == "text"


async def test_threads_and_their_messages_are_listed(buffer: ChunkBuffer) -> None:
    for number in range(5):
        await buffer.add_chunks(f"t{number}", "m", ["é"] * number, complete=number % 2 == 0)
    await buffer.abort_message("t1", "m", "enough")
    await buffer.add_chunks("t0", "n", ["x"])
    pages = [await buffer.get_threads(limit=2)]
    while pages[-1].cursor:
        pages.append(await buffer.get_threads(limit=2, cursor=pages[-1].cursor))
    assert [[thread.thread_id for thread in page.threads] for page in pages] == [["t4", "t3"], ["t2", "t1"], ["t0"]]
    statuses = {
        thread.thread_id: (thread.status, thread.chunk_count, thread.size) for p in pages for thread in p.threads
    }
    assert statuses == {
        "t0": ("active", 1, 1),
        "t1": ("aborted", 1, 2),
        "t2": ("completed", 2, 4),
        "t3": ("active", 3, 6),
        "t4": ("completed", 4, 8),
    }
    assert [thread.thread_id for thread in (await buffer.get_active_threads()).threads] == ["t3", "t0"]
    status = await buffer.get_thread_status("t0")
    assert status.exists
    assert [(m.message_id, m.status, m.chunk_count, m.first_seq, m.last_seq) for m in status.messages] == [
        ("m", "completed", 0, 1, 1),
        ("n", "active", 1, 2, 2),
    ]


# An agent's stream


class Source:
    """An agent that says what the test gives it, and knows whether it was closed."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = asyncio.Event()
        for piece in pieces:
            self.say(piece)

    def say(self, piece: Any) -> None:
        self.pieces.put_nowait(piece)

    async def __call__(self) -> AsyncIterator[Any]:
        try:
            while (piece := await self.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed.set()


async def test_agent_stream_yields_stores_and_completes(buffer: ChunkBuffer) -> None:
    pieces = ["Hel", "lo", Chunk("{}", "tool"), ""]
    source = Source(*pieces, None)
    assert [piece async for piece in buffer.agent_stream("t", "m", source())] == pieces
    assert await take(buffer.resume_stream("t", "m")) == ["Hel", "lo", ("tool", "{}"), "", "END completed None"]
    assert source.closed.is_set()


async def test_agent_stream_yields_committed_pieces_while_the_source_goes_on(buffer: ChunkBuffer) -> None:
    source = Source("one")
    async with aclosing(buffer.agent_stream("t", "m", source())) as pieces:
        assert await anext(pieces) == "one"
        assert await text_of(buffer) == "one"
        source.say("two")
        assert await anext(pieces) == "two"
        assert (await buffer.get_thread_status("t")).status == "active"


class Unasked:
    """A source that nothing may ask for a piece."""

    closed = False

    def __aiter__(self) -> Any:
        raise AssertionError("it was asked")

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("stored", "ended", "says"),
    [(["text"], True, "was completed, and an end is final"), (["text"], False, "has 1 chunks already")],
    ids=["ended", "begun"],
)
async def test_agent_stream_refuses_a_message_that_has_ended_or_has_chunks(
    buffer: ChunkBuffer, stored: list[str], ended: bool, says: str
) -> None:
    await buffer.add_chunks("t", "m", stored, complete=ended)
    source = Unasked()
    with pytest.raises(app.Conflict, match=says):
        await anext(buffer.agent_stream("t", "m", source))
    assert source.closed
    assert await text_of(buffer) == "text"


async def test_agent_stream_writes_into_a_message_that_is_open(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "other", ["x"])
    await buffer.open_message("t", "m")
    assert [piece async for piece in buffer.agent_stream("t", "m", Source("text", None)())] == ["text"]
    assert await text_of(buffer) == "text"


async def test_a_source_that_fails_aborts_the_message_and_its_error_is_raised(buffer: ChunkBuffer) -> None:
    pieces = buffer.agent_stream("t", "m", Source("so far", LookupError("no such tool"))())
    assert await anext(pieces) == "so far"
    with pytest.raises(LookupError, match="no such tool"):
        await anext(pieces)
    assert await take(buffer.resume_stream("t", "m")) == ["so far", "END aborted LookupError"]


async def test_a_timeout_in_the_source_is_its_own_failure(buffer: ChunkBuffer) -> None:
    with pytest.raises(TimeoutError):
        await anext(buffer.agent_stream("t", "m", Source(TimeoutError())()))
    assert await take(buffer.resume_stream("t", "m")) == ["END aborted TimeoutError"]


async def test_storing_goes_on_when_the_consumer_goes_away(buffer: ChunkBuffer) -> None:
    source = Source("one ")
    async with aclosing(buffer.agent_stream("t", "m", source())) as pieces:
        await anext(pieces)
    for piece in ("two ", "three", None):
        source.say(piece)
    assert await take(buffer.resume_stream("t", "m")) == ["one ", "two ", "three", "END completed None"]


async def test_storing_goes_on_when_the_consumer_is_cancelled(buffer: ChunkBuffer) -> None:
    source = Source("one ")
    consumer = asyncio.create_task(take(buffer.agent_stream("t", "m", source())))
    await until(lambda: kept_for_readers(buffer))
    await take(buffer.resume_stream("t", "m"), 1)
    consumer.cancel()
    await asyncio.wait([consumer])
    source.say("two")
    source.say(None)
    assert await take(buffer.resume_stream("t", "m")) == ["one ", "two", "END completed None"]


@pytest.mark.parametrize(
    ("end", "gets"),
    [
        (lambda buffer: buffer.abort_message("t", "m", "stop"), ["one", "END aborted stop"]),
        (lambda buffer: buffer.complete_message("t", "m"), ["one", "END completed None"]),
        (lambda buffer: buffer.clear_thread_buffer("t"), None),
    ],
)
async def test_an_end_from_outside_closes_the_source_at_once_even_while_it_is_blocked(
    buffer: ChunkBuffer, end: Any, gets: list[Any] | None
) -> None:
    source = Source("one")
    pieces = buffer.agent_stream("t", "m", source())
    assert await anext(pieces) == "one"
    await end(buffer)
    async with asyncio.timeout(0.5):
        await source.closed.wait()
    async with asyncio.timeout(2):
        assert [piece async for piece in pieces] == []
    if gets is not None:
        assert await take(buffer.resume_stream("t", "m")) == gets
    else:
        with pytest.raises(app.NotFound):
            await buffer.get_thread_status("t")


async def test_closing_the_buffer_closes_the_source_and_leaves_the_message_active(make_buffer: Any) -> None:
    source = Source("one")
    async with make_buffer() as buffer:
        pieces = buffer.agent_stream("t", "m", source())
        assert await anext(pieces) == "one"
    assert source.closed.is_set()
    with pytest.raises(app.Unavailable):
        await anext(pieces)
    async with make_buffer() as buffer:
        assert (await buffer.get_thread_status("t")).status == "active"


# Callers that are cancelled, and callers that are too fast


async def test_a_cancelled_append_leaves_nothing_open_wherever_it_was(buffer: ChunkBuffer) -> None:
    stored = 0
    for steps in range(12):
        appending = asyncio.create_task(buffer.add_chunks("t", "m", [f"{steps}"]))
        for _ in range(steps):
            await asyncio.sleep(0)
        appending.cancel()
        await asyncio.wait([appending])
        appended = await buffer.add_chunks("t", "m", ["next"])
        await until(lambda: buffer.settings.store or is_at_rest(buffer.settings.db), "the end of every transaction")
        stored = appended.seq
        assert appended.chunk_count == stored
    assert 12 <= stored <= 24
    page = await buffer.get_chunks("t")
    assert [chunk.seq for chunk in page.chunks] == list(range(1, stored + 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda buffer, seq: buffer.get_accumulated_content("t"),
        lambda buffer, seq: buffer.get_chunks("t", wait=5, after=f"{seq}"),
        lambda buffer, seq: take(buffer.resume_stream("t", f"m{seq}", idle_timeout=5)),
        lambda buffer, seq: buffer.abort_message("t", f"m{seq}"),
        lambda buffer, seq: buffer.clear_thread_buffer("t"),
    ],
)
async def test_cancelled_calls_leave_the_buffer_in_order(buffer: ChunkBuffer, call: Any) -> None:
    for steps in range(8):
        seq = (await buffer.add_chunks("t", "m", ["text"])).seq + 1
        await buffer.add_chunks("t", f"m{seq}", ["text"])
        calling = asyncio.create_task(call(buffer, seq))
        for _ in range(steps):
            await asyncio.sleep(0)
        if steps == 7:
            await until(lambda: buffer.readers or calling.done(), "the call to be waiting, or over")  # noqa: B023
        calling.cancel()
        await asyncio.wait([calling])
    await buffer.add_chunks("t", "last", ["text"])
    await until(
        lambda: buffer.settings.store or is_at_rest(buffer.settings.db), "the end of every transaction"
    )  # a read may be under way
    assert buffer.readers == 0
    assert kept_for_readers(buffer) == []


@contextlib.contextmanager
def nothing_is_committed(db: str) -> Iterator[None]:
    """Lock the database as another process would."""
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("begin immediate")
        yield


@pytest.mark.sqlite
async def test_appends_that_wait_for_their_commit_are_bounded(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that is told to stop commits the appends that it let in, and refuses those that wait for room."""
    monkeypatch.setattr(app, "_PENDING_BYTES", 5_000)
    size = 936  # and 64 for the chunk itself
    await asyncio.gather(*(buffer.add_chunks("t", "m", ["x" * size]) for _ in range(100)))
    assert (await buffer.get_thread_status("t")).chunk_count == 100  # slowed, not refused
    with nothing_is_committed(buffer.settings.db):
        appends = [asyncio.create_task(buffer.add_chunks("t", "n", ["x" * size])) for _ in range(100)]
        for _ in range(1000):  # turns of the loop, in which all of them would be let in if there were no bound
            await asyncio.sleep(0)
        buffer.stop()
    outcomes = await asyncio.gather(*appends, return_exceptions=True)
    let_in = [outcome for outcome in outcomes if isinstance(outcome, Appended)]
    assert all(isinstance(outcome, app.Unavailable) for outcome in outcomes if outcome not in let_in)
    assert (await buffer.get_thread_status("t")).messages[1].chunk_count == len(let_in)
    assert 2 < len(let_in) <= 2 * (5 + 1)  # up to the limit and one more, both in the queue and in the commit


async def test_producers_that_wait_for_room_are_refused_when_the_buffer_stops(
    make_buffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_PENDING_BYTES", 2_000)
    async with make_buffer() as buffer:
        appends = [asyncio.create_task(buffer.add_chunks("t", "m", ["x" * 936])) for _ in range(50)]
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*appends, return_exceptions=True)
    stored = [outcome for outcome in outcomes if isinstance(outcome, Appended)]
    assert all(isinstance(outcome, app.Unavailable) for outcome in outcomes if outcome not in stored)
    async with make_buffer() as buffer:
        assert (await buffer.get_thread_status("t")).chunk_count == len(stored) < 50


# In another app


@get("/", sync_to_thread=False)
def home() -> str:
    return "my own page"


@get("/broken", sync_to_thread=False)
def broken() -> str:
    raise LookupError("my own error")


async def test_the_routes_can_be_mounted_beside_those_of_another_app(make_buffer: Any) -> None:
    buffer = make_buffer()
    app = Litestar([home, broken, router(buffer, "/streams/v1")], lifespan=[buffer], logging_config=None)
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        assert (await client.get("/")).text == "my own page"
        path = "/streams/v1/threads/t/messages/m"
        answer = await client.post(f"{path}/chunks?complete=true", json=[{"content": "Hello"}])
        assert (answer.status_code, answer.json()["seq"]) == (201, 2)
        assert (await client.get("/streams/v1/threads/t/content")).json()["content"] == "Hello"
        frames = (await client.get(f"{path}/stream")).text
        assert frames.startswith("retry: 1000\nid: ")
        assert frames.endswith('data: {"messageId":"m","status":"completed","reason":null,"seq":2}\n\n')
        problems = {
            await client.get("/streams/v1/threads/nowhere"): 404,
            await client.post(f"{path}/chunks", json=[{"content": "more"}]): 409,
            await client.post(f"{path}/chunks", content=b"<xml/>", headers={"content-type": "text/xml"}): 415,
            await client.post(f"{path}/chunks?index=many", json=[]): 400,
            await client.get("/streams/v1/threads?limit=0"): 400,
        }
        for answer, status in problems.items():
            assert answer.status_code == answer.json()["status"] == status
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["detail"]
        mine = await client.get("/broken")
        assert mine.status_code == 500
        assert mine.headers["content-type"] != "application/problem+json"
        assert (await client.get("/api/threads")).status_code == 404


@pytest.mark.filterwarnings("ignore:The base_url 'http.//localhost' might cause issues")
async def test_the_whole_service_is_an_app_too(tmp_path: Any) -> None:
    settings = Settings(db=str(tmp_path / "chunks.db"))
    async with AsyncTestClient(create_app(settings), base_url="http://localhost") as client:
        assert (await client.put("/api/threads/t/messages/m")).status_code == 201
        assert (await client.get("/health/live")).status_code == 200
        answer: httpx.Response = await client.get("/api/threads/t")
        assert answer.json()["exists"] is True


def test_records_are_camel_case_on_the_wire() -> None:
    assert msgspec.json.encode(Appended("t", "m", 2, 1, "active")) == (
        b'{"threadId":"t","messageId":"m","seq":2,"chunkCount":1,"status":"active"}'
    )


async def test_a_text_in_place_of_a_list_of_chunks_is_refused(buffer: ChunkBuffer) -> None:
    with pytest.raises(Problem) as refused:
        await buffer.add_chunks("t", "run", "abc")
    assert "put it in a list" in refused.value.detail
    assert (await buffer.get_active_threads()).threads == []


@contextlib.asynccontextmanager
async def held_page(buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """Hold back the answer of the next read of a page until the body ends. The event is set once it is there."""
    is_read, may_go, read = asyncio.Event(), asyncio.Event(), buffer.store.page

    async def hold(*arguments: Any) -> Any:
        answer = await read(*arguments)
        if not is_read.is_set():
            is_read.set()
            await may_go.wait()
        return answer

    monkeypatch.setattr(buffer.store, "page", hold)
    yield is_read
    may_go.set()


async def test_a_read_that_began_before_a_clear_does_not_bring_the_thread_back(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await buffer.add_chunks("t", "m", ["old"])
    async with held_page(buffer, monkeypatch) as is_read:
        late = Reading(follow(buffer, "t"))
        await is_read.wait()
        await buffer.clear_thread_buffer("t")
        waiting = await attached(buffer, follow(buffer, "t", follow=True))
    assert await late == [Signal.GONE]
    await buffer.add_chunks("t", "m", ["new"])
    await waiting.has((1, "new"))
    await waiting.cancel()


async def test_a_reader_does_not_share_the_read_of_one_that_waits_for_the_thread(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * live.LIVE_BYTES  # so much that no page stays in memory for long
    async with held_page(buffer, monkeypatch) as is_read:
        early = Reading(follow(buffer, "t", "m", follow=True))
        await is_read.wait()
        for _ in range(3):
            await buffer.add_chunks("t", "m", [text])
        late = await attached(buffer, follow(buffer, "t", "m"))
        await buffer.complete_message("t", "m")
    assert await early == await late == [(1, text), (2, text), (3, text), (4, "completed")]


@pytest.mark.filterwarnings("ignore:The base_url 'http.//localhost' might cause issues")
async def test_an_app_can_be_started_again(tmp_path: Any) -> None:
    again = create_app(Settings(db=str(tmp_path / "chunks.db")))
    for number in range(2):
        async with AsyncTestClient(again, base_url="http://localhost") as client:
            answer = await client.post("/api/threads/t/messages/m/chunks", json={"content": "x"})
            assert (answer.status_code, answer.json()["seq"]) == (201, number + 1)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (rb'{"content":"\ud83d"}', "lone surrogate"),
        (rb'{"content":"\ud83d\u0041"}', "lone surrogate"),
        (rb'{"content":"\ude00\ud83d"}', "lone surrogate"),
        (rb'[{"content":"\ud83d\ude00"}', "truncated"),
        (rb'{"content":"\ud83d\ude00",}', "is not a chunk"),
        (rb'{"content":"\\ud83d",}', "is not a chunk"),
    ],
)
def test_only_a_lone_surrogate_is_called_one(body: bytes, says: str) -> None:
    with pytest.raises(app.InvalidContent, match=says):
        app.chunks_from_json(body)
