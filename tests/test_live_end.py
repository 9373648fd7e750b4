"""The live end of a thread: an upload reaches all readers from memory, however many they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from buffers import CommitsAtOnce, PageReads, Reading, detach, follow
from conftest import until
from resume_stream.app import ChunkBuffer, create_app, open_packs
from resume_stream.extras import live
from wire import NDJSON, message_path

pytestmark = pytest.mark.anyio

READERS = 400  # so many that more is committed, while they are woken, than is kept for them
LINE = 64 * 1024
SIZES = {  # of an upload: lines in a piece of it, and pieces
    "with much to send": (2, 3),
    "with more than is kept": (4, 8),
    "with pieces that each are more than is kept": (20, 2),
}


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def pieces(request: pytest.FixtureRequest) -> list[list[str]]:
    lines, count = request.param
    return [[f"{piece}-{line}".ljust(LINE, ".") for line in range(lines)] for piece in range(count)]


async def upload(buffer: ChunkBuffer, pieces: list[list[str]]) -> None:
    """Upload the pieces. The last one completes the message."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield b"".join(json.dumps({"content": text}).encode() + b"\n" for text in piece)

    transport = httpx.ASGITransport(create_app(buffer=buffer))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api") as client:
        answer = await client.post(f"{message_path('t', 'm')}?complete=true", headers=NDJSON, content=body())
    assert answer.status_code == 201, answer.text


def expected(pieces: list[list[str]]) -> list[Any]:
    texts = ["first", *(text for piece in pieces for text in piece)]
    return [*enumerate(texts, 1), (len(texts) + 1, "completed")]


async def test_an_upload_reaches_many_detached_readers_from_memory(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch, pieces: list[list[str]]
) -> None:
    await buffer.add_chunks("t", "m", ["first"])
    place = await buffer.locate("t")
    wires = [detach(buffer, place) for _ in range(READERS)]
    await until(lambda: all(wire.pieces for wire in wires), "all have what there is")
    reads = PageReads(buffer, monkeypatch)
    CommitsAtOnce(buffer, monkeypatch)
    await upload(buffer, pieces)
    await asyncio.gather(*(wire.ended.wait() for wire in wires))
    assert reads.count == 0
    bodies = {b"".join(wire.pieces): wire for wire in wires}
    assert [await wire.lines() for wire in bodies.values()] == [expected(pieces)] * len(bodies)


async def test_an_upload_reaches_many_readers_in_tasks_from_memory(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch, pieces: list[list[str]]
) -> None:
    await buffer.add_chunks("t", "m", ["first"])
    readings = [Reading(follow(buffer, "t")) for _ in range(READERS)]
    await until(lambda: all(reading.got for reading in readings), "all have what there is")
    reads = PageReads(buffer, monkeypatch)
    CommitsAtOnce(buffer, monkeypatch)
    await upload(buffer, pieces)
    assert await asyncio.gather(*readings) == [expected(pieces)] * READERS
    assert reads.count == 0


async def test_readers_of_many_messages_share_the_pages_of_each(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which they came. Each message has two pages here, which are joined."""
    messages = [f"m{number}" for number in range(64)]
    for message in messages:
        await buffer.add_chunks("t", message, ["a"])
    places = [await buffer.locate("t", message) for message in messages]
    wires = [detach(buffer, place) for place in places * 3]
    await until(lambda: all(wire.pieces for wire in wires), "all have what there is")
    joined, join = list[Any](), live.LivePage.joined
    monkeypatch.setattr(live.LivePage, "joined", lambda parts: joined.append(parts) or join(parts))
    appends = [(message, complete) for complete in (False, True) for message in messages]
    await asyncio.gather(*(buffer.add_chunks("t", message, ["b"], complete=end) for message, end in appends))
    got = [await wire.lines() for wire in wires]
    assert got[: len(messages)] * 3 == got
    assert [text for _, text in got[0]] == ["a", "b", "b", "completed"]
    assert len(joined) == len(messages)


async def test_a_change_by_another_process_is_read_once_for_all_readers(
    make_buffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_buffer(poll_interval=0.02) as buffer:
        await buffer.add_chunks("t", "m", ["first"])
        readings = [Reading(follow(buffer, "t")) for _ in range(READERS)]
        await until(lambda: all(reading.got for reading in readings), "all have the first chunk")
        reads = PageReads(buffer, monkeypatch)
        with contextlib.closing(sqlite3.connect(buffer.settings.db, isolation_level=None)) as other:
            open_packs(other)
            other.execute("update messages set status = 'aborted', reason = 'by hand'")
        assert await asyncio.gather(*readings) == [[(1, "first"), (2, "by hand")]] * READERS
        assert 1 <= reads.count <= READERS // 20
