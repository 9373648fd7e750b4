"""Ended messages are kept in packs, and no call shows it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buffers import follow, locate_text, pack, store_of, take
from conftest import TIMEOUT, Service, api_client, append, wait_until
from resume_stream import app
from resume_stream.app import Chunk, ChunkBuffer, Conflict, Unavailable
from resume_stream.extras import packs
from websockets.sync.client import connect
from wire import websocket_address

pytestmark = pytest.mark.anyio

NASTY = [
    '"',
    "\\",
    "\r\n",
    "\u2028",
    "\x01\x1f\x7f",
    "é",
    "🌊",
    "\ufeff",
    "",
    '{"a":[null,1e400]}',
    "[1]",
    "null",
    "\\u0000",
]


def words(count: int) -> list[str]:
    source = random.Random(count)
    return [source.choice(["the ", "tide ", "comes ", "in ", "🌊 ", *NASTY]) + str(number) for number in range(count)]


@contextlib.contextmanager
def opened(db: str | Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as connection:
        app.open_packs(connection)
        yield connection


def shell(db: str | Path, sql: str, *flags: str) -> str:
    run = subprocess.run(["/usr/bin/sqlite3", *flags, str(db), sql], capture_output=True, text=True, timeout=20)
    assert run.stderr == ""
    return run.stdout


def counts(db: str | Path) -> tuple[int, int]:
    """Return the numbers of unpacked entries and of packs."""
    with opened(db) as connection:
        return connection.execute("select (select count(*) from chunks), (select count(*) from packs)").fetchone()


def all_bytes(db: Path) -> bytes:
    """Let another process read the file and its WAL, as closing a file here would drop the locks of SQLite."""
    return subprocess.run(["cat", db, f"{db}-wal"], capture_output=True, check=True).stdout


async def told(buffer: ChunkBuffer, thread_id: str, message_ids: tuple[str | None, ...] = (None, "m", "n")) -> Any:
    """Return all that readers can get of a thread, from many places."""
    everything: list[Any] = []
    last = int((await buffer.get_thread_status(thread_id)).cursor.split("-")[1])
    for message_id in message_ids:
        everything.append(await buffer.get_accumulated_content(thread_id, message_id))
        for after in (after for after in (0, 1, 100, 390, 1023, 1024, 1025, 1500) if after <= last):
            everything.append(await take(follow(buffer, thread_id, message_id, after=str(after)), shape=lambda e: e))
            everything.append(await buffer.get_chunks(thread_id, message_id=message_id, after=str(after), limit=7))
    return everything, await buffer.get_thread_status(thread_id)


async def interleave(buffer: ChunkBuffer, count: int, complete: bool = True) -> None:
    chunks = [Chunk(text, "tool" if number % 7 == 0 else None) for number, text in enumerate(words(count))]
    for at in range(0, count, 10):
        await buffer.add_chunks("t", "m", chunks[at : at + 10])
        await buffer.add_chunks("t", "n", chunks[at : at + 3])
    await buffer.complete_message("t", "m")
    if complete:
        await buffer.abort_message("t", "n", "stop")


async def test_readers_are_told_the_same_of_packed_threads_from_every_place(buffer: ChunkBuffer) -> None:
    await interleave(buffer, 1500)
    before = await told(buffer, "t")
    await pack(buffer)
    unpacked, packs = counts(buffer.settings.db)
    assert unpacked == 0
    assert packs == 2
    assert await told(buffer, "t") == before


async def test_places_in_the_text_are_found_across_packs(buffer: ChunkBuffer) -> None:
    await interleave(buffer, 1500)
    text = (await buffer.get_accumulated_content("t", "m")).content
    lengths = [1, 9, len(text) // 2, len(text) - 1, len(text)]
    before = [await locate_text(buffer, "t", "m", text[:length]) for length in lengths]
    await pack(buffer)
    assert [await locate_text(buffer, "t", "m", text[:length]) for length in lengths] == before
    assert (await locate_text(buffer, "t", "m", text + "x")).reset


async def test_an_active_message_is_packed_only_after_its_end(buffer: ChunkBuffer) -> None:
    await interleave(buffer, 300, complete=False)
    await buffer.add_chunks("t", "o", words(200), complete=True)
    before = await buffer.get_chunks("t", limit=10_000)
    await pack(buffer)
    with opened(buffer.settings.db) as db:
        assert db.execute(
            "select message_id, count(*) from packs, json_each(sqlar_uncompress(data, packs.size)) as e"
            " join messages on message = e.value ->> 0 group by 1"
        ).fetchall() == [("m", 1), ("o", 201)]
    assert await buffer.get_chunks("t", limit=10_000) == before
    assert (await buffer.add_chunks("t", "n", ["more"])).chunk_count == 91
    await buffer.complete_message("t", "n")
    await pack(buffer)
    assert counts(buffer.settings.db)[0] <= 2


async def test_a_short_run_waits_for_the_next_chunks(buffer: ChunkBuffer) -> None:
    for number in range(7):
        await buffer.add_chunks("t", f"m{number}", words(9), complete=True)
        await pack(buffer)
        assert counts(buffer.settings.db) == ((10 * (number + 1), 0) if number < 6 else (0, 1))


async def test_a_retried_append_is_compared_with_what_is_packed(buffer: ChunkBuffer) -> None:
    chunks = words(2500)
    first = await buffer.add_chunks("t", "m", chunks, index=0, complete=True)
    await pack(buffer)
    assert await buffer.add_chunks("t", "m", chunks, index=0, complete=True) == first
    assert await buffer.add_chunks("t", "m", chunks[1020:], index=1020, complete=True) == first
    middle = await buffer.add_chunks("t", "m", chunks[1020:1030], index=1020)
    assert (middle.seq, middle.chunk_count) == (1030, 1030)
    with pytest.raises(Conflict, match="index 1022"):
        await buffer.add_chunks("t", "m", [*chunks[1020:1022], "other"], index=1020)
    with pytest.raises(Conflict, match="an end is final"):
        await buffer.add_chunks("t", "m", ["more"], index=2500)


async def test_a_text_with_a_nul_stays_as_it_is(buffer: ChunkBuffer) -> None:
    texts = [*words(100), "nul \0 and more", *words(100)]
    await buffer.add_chunks("t", "m", texts, complete=True)
    await pack(buffer)
    assert counts(buffer.settings.db) == (1, 2)
    assert (await buffer.get_accumulated_content("t", "m")).content == "".join(texts)
    assert await take(follow(buffer, "t", "m")) == [*enumerate(texts, 1), (202, "completed")]


async def test_packing_can_be_turned_off(make_buffer: Any) -> None:
    async with make_buffer(packing=False) as buffer:
        await buffer.add_chunks("t", "m", words(200), complete=True)
        await pack(buffer)
        assert counts(buffer.settings.db) == (201, 0)


async def test_the_shell_shows_and_edits_packed_threads(buffer: ChunkBuffer) -> None:
    await interleave(buffer, 300)
    db = buffer.settings.db
    views = ["select * from overview", "select * from transcript", "select * from sequence"]
    before = [shell(db, sql, "-readonly") for sql in views]
    assert all(before)
    await pack(buffer)
    assert counts(db) == (0, 1)
    assert [shell(db, sql, "-readonly") for sql in views] == before
    entries = await take(follow(buffer, "t", "n"))
    shell(db, "delete from messages where message_id = 'm'")
    assert counts(db) == (len(entries), 0)
    assert await take(follow(buffer, "t", None)) == entries
    shell(db, "delete from threads")
    assert (
        shell(db, "select count(*) from entries; select count(*) from packs; select count(*) from messages")
        == "0\n0\n0\n"
    )


async def test_the_shell_edits_a_text_packed_or_not(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", words(1500), complete=True)
    await pack(buffer)
    await buffer.add_chunks("t", "n", words(9), complete=True)
    entries = await take(follow(buffer, "t"))
    for seq in (7, 900, 1504):
        shell(buffer.settings.db, f"update entries set content = 'edited' where thread = 1 and seq = {seq}")
        entries[seq - 1] = (seq, "edited")
    assert await take(follow(buffer, "t")) == entries
    assert counts(buffer.settings.db) == (1024 + 10, 1)
    await pack(buffer)
    assert counts(buffer.settings.db) == (10, 2)
    assert await take(follow(buffer, "t")) == entries
    assert app.main(["check", "--db", buffer.settings.db]) == 0


async def test_the_shell_ends_an_active_message_beside_a_pack(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", words(100), complete=True)
    await buffer.add_chunks("t", "n", words(100))
    await pack(buffer)
    shell(buffer.settings.db, "update messages set status = 'aborted', reason = 'enough' where status = 'active'")
    assert (await take(follow(buffer, "t", "n")))[-1] == (202, "enough")
    await pack(buffer)
    assert counts(buffer.settings.db) == (0, 2)


@pytest.mark.parametrize("cleared", ["by the service", "by its expiry", "by the shell"])
async def test_no_word_of_a_cleared_thread_is_left_packed_or_not(buffer: ChunkBuffer, cleared: str) -> None:
    db = Path(buffer.settings.db)
    texts = [f"secret{number * 7919 % 10**6:06} " for number in range(10_000)]
    await buffer.add_chunks("kept", "m", words(2000), complete=True)
    await buffer.add_chunks("t", "m", texts, complete=True)
    await pack(buffer)
    with opened(db) as connection:
        # Some bytes of each pack, from each place where a page of the file may begin.
        packed = [
            data[at : at + 16]
            for (data,) in connection.execute(
                "select data from packs join threads using (thread) where thread_id = 't'"
            )
            for at in range(0, len(data) - 16, 200)
        ]
    assert len(packed) > 100
    assert any(needle in all_bytes(db) for needle in packed)
    if cleared == "by the service":
        await buffer.clear_thread_buffer("t")
    elif cleared == "by its expiry":
        with opened(db) as connection:
            connection.execute("update threads set updated_at = 1, touched_at = 1 where thread_id = 't'")
        assert await store_of(buffer).expire(1) == 1
        assert await store_of(buffer).erase()
    else:
        shell(
            db, "pragma secure_delete = on; delete from threads where thread_id = 't'; pragma wal_checkpoint(truncate)"
        )
    left = all_bytes(db)
    assert [needle for needle in packed if needle in left] == []
    assert b"secret0" not in left or cleared == "by the shell"
    assert (await buffer.get_accumulated_content("kept", "m")).content == "".join(words(2000))


@pytest.mark.parametrize("damage", ["substr(data, 1, 40)", "x'00' || data", "cast(zeroblob(length(data)) as blob)"])
async def test_a_damaged_pack_is_a_clear_error_for_its_readers_only(
    buffer: ChunkBuffer, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for thread_id in ("t", "u"):
        await buffer.add_chunks(thread_id, "m", words(200), index=0, complete=True)
    await pack(buffer)
    main = app.main
    assert main(["check", "--db", buffer.settings.db]) == 0
    with opened(buffer.settings.db) as connection:
        connection.execute(f"update packs set data = cast({damage} as blob) where thread = 1")
    capsys.readouterr()
    assert main(["check", "--db", buffer.settings.db]) != 0
    assert "'t' has a damaged pack (seq 1 to 201)" in capsys.readouterr().err
    calls = [
        buffer.get_accumulated_content("t"),
        buffer.get_chunks("t"),
        buffer.add_chunks("t", "m", words(200), index=0, complete=True),
        buffer.add_chunks("t", "new", ["goes on"]),
        buffer.add_chunks("u", "m", words(200), index=0, complete=True),
        buffer.get_accumulated_content("u"),
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes[:3]:
        assert isinstance(outcome, Unavailable)
        assert "A pack of this thread is damaged; clear the thread" in outcome.detail
    assert [getattr(outcome, "seq", None) for outcome in outcomes[3:5]] == [202, 201]
    assert outcomes[5].content == "".join(words(200))
    await buffer.clear_thread_buffer("t")
    assert counts(buffer.settings.db) == (0, 1)


async def test_a_run_that_changes_while_it_is_packed_is_left_as_it_is(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_run = packs.next_run

    def edited(*arguments: Any) -> Any:
        run = next_run(*arguments)
        with opened(buffer.settings.db) as other:
            other.execute("update chunks set content = content || 'edited' where seq = 7")
        return run

    monkeypatch.setattr(packs, "next_run", edited)
    await buffer.add_chunks("t", "m", words(200), complete=True)
    await pack(buffer)
    assert counts(buffer.settings.db) == (201, 0)
    assert "edited" in (await buffer.get_accumulated_content("t", "m")).content


# Over the wire


def answers_from(service: Service) -> list[Any]:
    """Return all answers about the thread ``t``, from its start and from its middle."""
    with api_client(service) as client:
        cursor = client.get("/threads/t").json()["cursor"].replace("-2001", "-1500")
        known = {"thread_id": "t", "message_id": "m", "known_content": "".join(words(1700))}
        responses = [
            client.get("/threads/t/stream"),
            client.get("/threads/t/stream", headers={"Last-Event-ID": cursor}),
            client.post("/resume-stream", json=known),
            client.get("/threads/t/chunks", params={"after": cursor, "limit": 99}),
            client.get("/threads/t/content"),
        ]
    answers: list[Any] = [answer.raise_for_status().content for answer in responses]
    with connect(websocket_address(service), max_size=None) as socket:
        socket.send(json.dumps({"type": "subscribe", "id": 1, "thread_id": "t", "after": cursor}))
        while '"unsubscribed"' not in (frame := str(socket.recv(TIMEOUT))):
            answers.append(frame)
    assert len(answers) == len(responses) + 501
    return answers


def test_every_reader_of_a_service_gets_the_same_bytes_of_what_is_packed(start_service: Any) -> None:
    service = start_service("--packing=false")
    with api_client(service) as client:
        append(client, "t", "m", *words(2000), complete=True)
    before = answers_from(service)
    assert counts(service.db) == (2001, 0)
    assert service.end() == 0
    service.flags = ()
    service.start()  # the start begins with a clean-up
    wait_until(lambda: counts(service.db) == (0, 2), "it is packed")
    assert answers_from(service) == before
