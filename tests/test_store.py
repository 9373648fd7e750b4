"""The SQLite file: refusals at the start, commits, generations, and erasing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import os
import re
import resource
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from buffers import attached, history, impatient, on_writer, store_of, transactions_in
from conftest import ROOT, TIMEOUT, Service, append, until
from resume_stream import app
from resume_stream.app import ChunkBuffer, Problem, Settings, StartupError
from resume_stream.extras import clock, erasure, guard
from resume_stream.extras.guard import with_room

pytestmark = pytest.mark.anyio

THREAD_COUNT = 200


def files_of(db: Path) -> dict[str, bytes]:
    files = db.parent.glob(f"{db.name}*")
    return {path.name: path.read_bytes() for path in files if path.suffix != ".log"}


def query(db: Path, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Query the file as another process does, which sees only what is committed."""
    with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, parameters).fetchall()


def execute(db: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.executescript(sql)


def refusal(db: Path) -> str:
    """Start with this file, and return why it is refused."""

    async def start() -> None:
        async with ChunkBuffer(Settings(db=str(db))):
            pass

    with pytest.raises(StartupError) as refused:
        asyncio.run(start())
    return str(refused.value)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database of a few hundred pages, made by the service."""
    db = tmp_path_factory.mktemp("good") / "good.db"

    async def fill() -> None:
        async with ChunkBuffer(Settings(db=str(db))) as buffer:
            for number in range(20):
                await buffer.add_chunks(f"thread-{number}", "run", [f"{number} " * 900] * 20)

    asyncio.run(fill())
    return db.read_bytes()


def overwritten(data: bytes, start: float, end: float) -> bytes:
    first, last = int(len(data) * start) // 4096 * 4096, int(len(data) * end)
    return data[:first] + b"\xa5\x5a" * ((last - first) // 2) + data[last:]


# What is refused


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(lambda data: overwritten(data, 0.3, 0.6), "is damaged", id="pages-overwritten"),
        pytest.param(lambda data: data[:4096] + b"\0" * (len(data) - 4096), "is damaged", id="pages-zeroed"),
        pytest.param(
            lambda data: data[:100] + b"\xff" * 3996 + data[4096:], "is damaged", id="schema-page-overwritten"
        ),
        pytest.param(lambda data: data[: len(data) // 2], "is damaged", id="truncated"),
        pytest.param(lambda data: data[:50], "is damaged", id="truncated-in-the-header"),
        pytest.param(lambda data: b"Dear diary,\n" * 500, "is not a database", id="a-text"),
        pytest.param(lambda data: b"x", "is not a database", id="a-byte"),
    ],
)
def test_a_file_that_is_damaged_or_no_database_is_refused_and_left_as_it_was(
    tmp_path: Path, good_file: bytes, damage: Callable[[bytes], bytes], says: str
) -> None:
    db = tmp_path / "chunks.db"
    db.write_bytes(bad := damage(good_file))
    assert says in refusal(db)
    assert db.read_bytes() == bad


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("create table recipes (name); insert into recipes values ('soup')", "is the database of another application"),
        ("pragma application_id = 0x72737472; pragma user_version = 2; create table t (c)", "has version 2"),
    ],
)
def test_a_database_of_another_application_or_version_is_refused_and_left_as_it_was(
    tmp_path: Path, sql: str, says: str
) -> None:
    db = tmp_path / "chunks.db"
    execute(db, sql)
    before = db.read_bytes()
    assert says in refusal(db)
    assert files_of(db) == {"chunks.db": before}


@pytest.mark.parametrize("place", ["missing/chunks.db", "a-file/chunks.db", "a-folder", "/proc/chunks.db"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").write_text("not a folder")
    (tmp_path / "a-folder").mkdir()
    assert place in refusal(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "a-folder"]


def test_a_file_that_is_already_served_is_refused_under_every_name(service: Service, client: httpx.Client) -> None:
    """Nothing that is stored changes. The bytes of ``-shm`` may: they are SQLite's locks and index."""

    def kept() -> dict[str, bytes]:
        return {name: data for name, data in files_of(service.db).items() if not name.endswith("-shm")}

    append(client, "t", "m", "one")
    before = kept()
    alias = service.db.with_name("alias.db")
    alias.symlink_to(service.db)
    for name in (service.db, alias):
        assert "is already served" in refusal(name)
    assert kept() == before
    assert append(client, "t", "m", "two").json()["seq"] == 2


def test_a_file_with_a_second_name_is_refused_under_both(service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one")
    other = service.db.with_name("other.db")
    other.hardlink_to(service.db)
    assert "is already served" in refusal(other)
    assert append(client, "t", "m", "two").json()["seq"] == 2
    service.end()
    for name in (other, service.db):
        assert "has 2 names" in refusal(name)
    other.unlink()
    service.start()
    assert append(client, "t", "m", "three").json()["seq"] == 3


def sqlite_holds(db: Path) -> bool:
    """Return True if a process has the lock that SQLite keeps on an open file (proc_locks(5))."""
    return re.search(rf"POSIX .*:{db.stat().st_ino} ", Path("/proc/locks").read_text()) is not None


async def test_a_process_does_not_serve_a_file_twice_and_does_not_lose_its_locks_by_trying(
    buffer: ChunkBuffer, tmp_path: Path
) -> None:
    db = tmp_path / "chunks.db"
    with pytest.raises(StartupError, match="is already served"):
        await ChunkBuffer(Settings(db=str(db))).__aenter__()
    assert sqlite_holds(db)


def test_only_the_owner_can_read_the_files(service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one")
    files = [path for path in service.db.parent.glob(f"{service.db.name}*") if path.suffix != ".log"]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_start_that_fails_leaves_no_file(tmp_path: Path) -> None:
    async def start() -> None:
        async with ChunkBuffer(Settings(db=str(tmp_path / "chunks.db"), max_db=app.Size(1))):
            pass

    with pytest.raises(StartupError, match="max_db"):
        asyncio.run(start())
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_owner_died_is_served_again(service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one")
    service.restart()
    assert append(client, "t", "m", "two").json()["seq"] == 2


@pytest.mark.parametrize("name", ["a b?mode=ro#%41.db", "ünï.db", "link.db"])
async def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    db = tmp_path / name
    if name == "link.db":
        db.symlink_to(folder / "real.db")
    for seq in (1, 2):
        async with ChunkBuffer(Settings(db=str(db))) as buffer:
            assert (await buffer.add_chunks("t", "m", ["text"])).seq == seq
    assert db.exists()


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_full_disk_gets_the_room_of_the_wal_once(tmp_path: Path, is_enough: bool) -> None:
    db = tmp_path / "chunks.db"
    wal_sizes: list[int] = []

    def work(connection: sqlite3.Connection) -> None:
        wal_sizes.append(Path(f"{db}-wal").stat().st_size)
        if len(wal_sizes) == 1 or not is_enough:
            connection.execute("pragma max_page_count = 1")  # no larger than it is now
            connection.execute("insert into texts values (zeroblob(100000))")

    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("create table texts (content)")
        with contextlib.nullcontext() if is_enough else pytest.raises(sqlite3.OperationalError, match="full"):
            with_room(work, connection)
    assert wal_sizes[0] > 0
    assert wal_sizes[1:] == [0]


# What the file is


async def test_the_schema_is_strict_and_says_what_made_it(buffer: ChunkBuffer, tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    tables = {
        name: (without_rowid, strict)
        for _, name, kind, _, without_rowid, strict in query(db, "pragma table_list")
        if kind == "table" and not name.startswith("sqlite_")
    }
    assert tables == {"clock": (0, 1), "threads": (0, 1), "messages": (0, 1), "chunks": (1, 1), "packs": (0, 1)}
    pragmas = {"user_version": 3, "application_id": 0x72737472, "auto_vacuum": 2, "journal_mode": "wal"}
    assert {name: query(db, f"pragma {name}")[0][0] for name in pragmas} == pragmas
    assert {name for (name,) in query(db, "select name from sqlite_schema where type = 'view'")} >= {
        "overview",
        "transcript",
        "sequence",
    }


@pytest.mark.parametrize(("name", "number"), [("FULL", 2), ("NORMAL", 1)])
async def test_synchronous_is_what_the_setting_says(make_buffer: Any, name: str, number: int) -> None:
    async with make_buffer(synchronous=name) as buffer:
        found = await on_writer(buffer, lambda writer: writer.execute("pragma synchronous").fetchone())
        assert found == (number,)


# What a commit is


async def test_an_append_is_answered_after_its_commit_and_not_before(buffer: ChunkBuffer, tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("begin immediate")  # nobody else can commit
        appending = asyncio.create_task(buffer.add_chunks("t", "m", ["text"]))
        done, _ = await asyncio.wait([appending], timeout=0.1)
        assert not done
        assert query(db, "select * from chunks") == []
        other.execute("rollback")
        await appending
        assert query(db, "select content from chunks") == [("text",)]


async def test_appends_that_come_during_a_commit_are_committed_together(buffer: ChunkBuffer, tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    await buffer.open_message("t0", "m")
    before = len(transactions_in(db))
    answers = await asyncio.gather(*(buffer.add_chunks(f"t{n % 7}", "m", [f"{n}"]) for n in range(700)))
    assert 1 <= len(transactions_in(db)) - before <= 20
    for number in range(7):
        assert sorted(answer.seq for answer in answers if answer.thread_id == f"t{number}") == list(range(1, 101))
    assert query(db, "select count(*) from chunks") == [(700,)]


async def test_a_thread_with_inconsistent_rows_spoils_no_other(buffer: ChunkBuffer, tmp_path: Path) -> None:
    await buffer.add_chunks("t", "m", ["a"])
    await buffer.add_chunks("edited", "m", ["a"])
    execute(
        tmp_path / "chunks.db",
        "insert into chunks select thread, 2, message, null, 'by hand', 0 from messages join threads using (thread)"
        " where thread_id = 'edited'",
    )
    outcomes = await asyncio.gather(
        *(buffer.add_chunks(thread_id, "m", ["b"]) for thread_id in ("t", "edited", "new")), return_exceptions=True
    )
    assert [getattr(outcome, "status_code", 200) for outcome in outcomes] == [200, 503, 200]
    assert "by hand; clear it" in outcomes[1].detail
    await buffer.clear_thread_buffer("edited")
    assert (await buffer.add_chunks("edited", "m", ["c"])).seq == 1


async def test_one_refused_append_does_not_spoil_the_others_of_its_transaction(buffer: ChunkBuffer) -> None:
    outcomes = await asyncio.gather(
        buffer.add_chunks("t", "m", ["a"]),
        buffer.add_chunks("t", "m", ["gap"], index=7),
        buffer.complete_message("nowhere", "m"),
        buffer.add_chunks("t", "m", ["b"]),
        return_exceptions=True,
    )
    assert [getattr(outcome, "status_code", 200) for outcome in outcomes] == [200, 409, 404, 200]
    assert (await buffer.get_accumulated_content("t")).content == "ab"


async def test_a_transaction_that_fails_in_its_middle_leaves_nothing_and_does_not_stay_open(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = app.Transaction._append

    def fails_after_it(*arguments: Any) -> Any:
        append(*arguments)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as context:
        context.setattr(app.Transaction, "_append", fails_after_it)
        with pytest.raises(app.Unavailable):
            await buffer.add_chunks("t", "m", ["lost"])
    assert (await buffer.add_chunks("t", "m", ["kept"])).seq == 1
    assert (await buffer.get_accumulated_content("t")).content == "kept"


@pytest.mark.parametrize("lock", ["immediate", "exclusive"])
async def test_a_locked_database_is_a_clear_error_and_no_change_until_it_is_free(
    make_buffer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    impatient(monkeypatch, 0.1)
    async with make_buffer() as buffer:
        await buffer.add_chunks("t", "m", ["before "])
        with contextlib.closing(sqlite3.connect(tmp_path / "chunks.db", isolation_level=None)) as other:
            other.execute(f"begin {lock}")
            calls = [buffer.add_chunks("t", "m", ["x"]), buffer.clear_thread_buffer("t"), buffer.open_message("u", "m")]
            for problem in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(problem, Problem)
                assert (problem.status_code, problem.headers) == (503, {"Retry-After": "1"})
                assert "Another process" in problem.detail
            assert (await buffer.get_accumulated_content("t")).content == "before "
        assert (await buffer.add_chunks("t", "m", ["after"])).seq == 2
        assert (await buffer.get_accumulated_content("t")).content == "before after"


async def test_a_full_database_is_a_clear_error_and_takes_appends_again_once_there_is_room(make_buffer: Any) -> None:
    async with make_buffer(max_db=400 * 1024) as buffer:
        stored: dict[str, int] = {"a": 0, "b": 0}

        async def fill() -> None:
            for thread_id in ["a", "b"] * 500:
                await buffer.add_chunks(thread_id, "m", ["x" * 5000])
                stored[thread_id] += 1

        with pytest.raises(app.DatabaseFull, match="max_db") as raised:
            await fill()
        assert raised.value.status_code == 507
        for thread_id, count in stored.items():
            assert (await buffer.get_thread_status(thread_id)).chunk_count == count > 10
        await buffer.clear_thread_buffer("a")
        assert (await buffer.add_chunks("b", "m", ["x" * 5000])).chunk_count == stored["b"] + 1


def test_a_full_disk_is_a_clear_error_until_there_is_room(service: Service, client: httpx.Client) -> None:
    """A limit on the size of files stands in for a full disk."""
    append(client, "t", "m", "kept")
    limit = Path(f"{service.db}-wal").stat().st_size + 5000
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for _ in range(3):
        answer = append(client, "t", "m", "lost" * 5000)
        assert answer.status_code in (503, 507)
        assert answer.headers["content-type"] == "application/problem+json"
        assert client.get("/threads/t/content").json()["content"] == "kept"
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert append(client, "t", "m", " and more").json()["seq"] == 2
    assert client.get("/threads/t/content").json()["content"] == "kept and more"
    assert query(service.db, "pragma integrity_check") == [("ok",)]


async def test_a_failed_checkpoint_takes_back_no_commit(make_buffer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for the WAL, but none for the database. The append is stored."""
    monkeypatch.setattr(app, "_WAL_BYTES", 0)  # so that each commit is followed by a checkpoint
    failures = 0

    def fails(connection: sqlite3.Connection) -> bool:
        nonlocal failures
        failures += 1
        raise sqlite3.OperationalError("database or disk is full")

    async with make_buffer() as buffer:
        await buffer.open_message("t", "m")
        reading = await attached(buffer, buffer.resume_stream("t", "m", idle_timeout=5), 1)
        with monkeypatch.context() as context:
            context.setattr(app, "checkpoint", fails)
            assert (await buffer.add_chunks("t", "m", ["text"])).seq == 1
            assert await reading == [(1, "text")]
        assert failures


@contextlib.contextmanager
def overlapping_readers(db: Path) -> Iterator[None]:
    """Keep two connections, of which one is in a read transaction at any time."""
    stop = threading.Event()

    def read() -> None:
        pair = [sqlite3.connect(db, isolation_level=None) for _ in range(2)]
        while not stop.wait(0.005):
            pair[0].execute("begin")
            pair[0].execute("select count(*) from threads").fetchall()
            if pair[1].in_transaction:
                pair[1].execute("commit")
            pair.reverse()
        for connection in pair:
            connection.close()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def test_the_wal_does_not_grow_without_bound_under_readers_that_never_pause(
    make_buffer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_WAL_BYTES", 512 * 1024)
    wal = tmp_path / "chunks.db-wal"
    async with make_buffer() as buffer:
        await buffer.open_message("t", "m")
        largest = 0
        with overlapping_readers(tmp_path / "chunks.db"):
            for _ in range(120):
                await buffer.add_chunks("t", "m", ["x" * 50_000])
                largest = max(largest, wal.stat().st_size)
    assert largest < 3 * 512 * 1024


# Generations


@pytest.mark.parametrize("later_by", [0, 1, -1, -86_400_000])
async def test_a_thread_made_again_has_a_higher_generation_whatever_the_clock_does(
    make_buffer: Any, monkeypatch: pytest.MonkeyPatch, later_by: int
) -> None:
    clock = [1_763_829_000_000]
    monkeypatch.setattr(app, "now_ms", lambda: clock[0])
    generations = []
    async with make_buffer() as buffer:
        for _ in range(4):
            await buffer.add_chunks("t", "m", ["text"], complete=True)
            generations.append(int((await buffer.get_accumulated_content("t")).cursor.split("-")[0]))
            with contextlib.closing(sqlite3.connect(buffer.settings.db)) as shell, shell:
                app.open_packs(shell)
                shell.execute("delete from threads")
            clock[0] += later_by
    async with make_buffer() as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        generations.append(int((await buffer.get_accumulated_content("t")).cursor.split("-")[0]))
    assert generations == sorted(set(generations))
    assert generations[0] == 1_763_829_000_000


async def test_a_thread_can_be_cleared_after_the_clock_went_back(
    buffer: ChunkBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await buffer.add_chunks("t", "m", ["text"])
    monkeypatch.setattr(app, "now_ms", lambda: time.time_ns() // 1_000_000 - 3_600_000)
    await buffer.clear_thread_buffer("t")
    with pytest.raises(app.NotFound):
        await buffer.get_thread_status("t")


# Erased means erased


def marked(number: int) -> str:
    return f"<mark {number}>"


def marks_in(db: Path) -> set[int]:
    """Return the threads of which the database or the WAL has any text."""
    return {int(found) for data in files_of(db).values() for found in re.findall(rb"<mark (\d+)>", data)}


async def fill_with_marks(buffer: ChunkBuffer) -> dict[int, str]:
    """Write threads whose chunks, from a few bytes to a few pages, lie mixed in the file. Return their texts."""
    texts = {(number, run): "" for number in range(THREAD_COUNT) for run in (0, 1)}
    for turn in range(6):
        appends = []
        for number in range(THREAD_COUNT):
            text = marked(number) * (1 + (number * 37 + turn * 101) % (700 if turn == 3 else 40))
            texts[number, turn % 2] += text
            appends.append(buffer.add_chunks(f"thread-{number}", f"run-{turn % 2}", [text]))
        await asyncio.gather(*appends)
    return {number: texts[number, 0] + texts[number, 1] for number in range(THREAD_COUNT)}


async def live_texts(buffer: ChunkBuffer, numbers: Any) -> dict[int, str]:
    return {number: (await buffer.get_accumulated_content(f"thread-{number}")).content for number in numbers}


async def test_text_that_was_cleared_is_nowhere_in_the_files(buffer: ChunkBuffer, tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    texts = await fill_with_marks(buffer)
    assert marks_in(db) == set(texts)
    live = {number for number in texts if number % 2}
    await asyncio.gather(*(buffer.clear_thread_buffer(f"thread-{number}") for number in texts.keys() - live))
    assert marks_in(db) == live
    assert await live_texts(buffer, live) == {number: texts[number] for number in live}
    assert query(db, "pragma integrity_check") == [("ok",)]


async def test_text_that_was_cleared_while_other_text_was_being_erased_is_nowhere_in_the_files(
    buffer: ChunkBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, thread_id in enumerate(("second", "first")):
        await buffer.add_chunks(thread_id, "m", [marked(number)])
    overwrite_gaps, gate, is_overwriting = erasure.overwrite_gaps, threading.Event(), threading.Event()

    def overwrite(*pages: Any) -> None:
        is_overwriting.set()
        assert gate.wait(TIMEOUT)
        overwrite_gaps(*pages)

    monkeypatch.setattr(erasure, "overwrite_gaps", overwrite)
    clearing = [asyncio.create_task(buffer.clear_thread_buffer("first"))]
    await until(is_overwriting.is_set, "the first is being erased")
    clearing.append(asyncio.create_task(buffer.clear_thread_buffer("second")))
    gate.set()
    await asyncio.gather(*clearing)
    assert marks_in(tmp_path / "chunks.db") == set()


async def test_text_that_expired_is_nowhere_in_the_files(
    make_buffer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "STEP_MS", math.inf)  # its times are made up
    now, db = time.time_ns() // 1_000_000, tmp_path / "chunks.db"
    monkeypatch.setattr(erasure, "ERASE_ROWS", 50)
    monkeypatch.setattr(app, "now_ms", lambda: now - 7_200_000)
    async with make_buffer(ttl=3600, cleanup_interval=0.05) as buffer:
        texts = await fill_with_marks(buffer)
        live = {number for number in texts if number % 3}
        monkeypatch.setattr(app, "now_ms", lambda: now - 1_800_000)
        await asyncio.gather(*(buffer.add_chunks(f"thread-{number}", "run-1", []) for number in live))
        assert marks_in(db) == set(texts)
        monkeypatch.setattr(app, "now_ms", lambda: now)
        await until(lambda: query(db, "select count(*) from threads") == [(len(live),)], "they are deleted")
        await until(lambda: marks_in(db) == live, "the expired are erased")
        assert await live_texts(buffer, live) == {number: texts[number] for number in live}


async def test_the_age_of_a_thread_is_kept_to_the_minute(
    buffer: ChunkBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {100_000: 60_000, 119_999: 60_000, 120_000: 120_000, 179_999: 120_000, 180_001: 180_000, 90_000: 60_000}
    for now, age in times.items():
        monkeypatch.setattr(app, "now_ms", lambda now=now: now)
        await buffer.add_chunks("t", "m", ["text"])
        for table in ("threads", "messages"):
            assert query(tmp_path / "chunks.db", f"select touched_at, updated_at from {table}") == [(age, now)]


async def test_looking_for_a_few_threads_costs_the_same_among_many(
    make_buffer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in steps of SQLite's virtual machine."""
    steps, run = 0, guard.InterruptedDatabase.run

    def count() -> None:
        nonlocal steps
        steps += 1

    async def counted(database: Any, work: Any) -> Any:
        def counting(db: sqlite3.Connection) -> Any:
            db.set_progress_handler(count, 1)
            return work(db)

        return await run(database, counting)

    taken = []
    for threads in (100, 3000):
        async with make_buffer(db=str(tmp_path / f"{threads}.db"), producer_timeout=0, poll_interval=60) as buffer:
            for start in range(0, threads, 500):
                numbers = range(start, min(start + 500, threads))
                await asyncio.gather(*(buffer.add_chunks(f"{n}", "m", ["x"], complete=n % 20 > 0) for n in numbers))
            looks = (
                lambda buffer=buffer: buffer.get_active_threads(limit=4),
                lambda buffer=buffer: buffer.get_threads("aborted", limit=4),
                lambda buffer=buffer: buffer.store.idle_messages(0),
                lambda buffer=buffer: buffer.store.expire(0),
            )
            taken.append([])
            monkeypatch.setattr(guard.InterruptedDatabase, "run", counted)
            for look in looks:
                steps = 0
                await look()
                taken[-1].append(steps)
            monkeypatch.undo()
    assert all(0 < many < 1.5 * few for few, many in zip(*taken, strict=True)), taken


async def test_an_expired_thread_is_gone_for_its_reader_and_a_touched_one_stays(
    make_buffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "STEP_MS", math.inf)  # its times are made up
    async with make_buffer(ttl=1000, cleanup_interval=0.02) as buffer:
        await asyncio.gather(*(buffer.open_message(thread_id, "m") for thread_id in ("t", "touched")))
        reading = await attached(buffer, buffer.resume_stream("t", "m", idle_timeout=10))
        later = time.time_ns() // 1_000_000 + 999_000
        monkeypatch.setattr(app, "now_ms", lambda: later)
        await buffer.open_message("touched", "m")
        later += 2_000
        assert await reading == [app.Signal.GONE]
        assert (await buffer.get_thread_status("touched")).status == "active"


async def test_a_long_thread_is_erased_a_bounded_number_of_chunks_at_a_time(
    buffer: ChunkBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "ERASE_ROWS", 10)
    impatient(monkeypatch, 0.1)
    db = tmp_path / "chunks.db"
    await buffer.add_chunks("t", "m", ["text"] * 95)
    await buffer.add_chunks("other", "m", ["text"])
    with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True, isolation_level=None)) as person:
        person.execute("begin")
        person.execute("select * from threads").fetchall()  # which keeps all transactions in the WAL
        await buffer.clear_thread_buffer("t")
        lefts = history(db, "select (select count(*) from chunks)", tmp_path)
    assert lefts[-1] == 1
    assert max(before - after for before, after in itertools.pairwise(lefts)) == 10
    assert query(db, "select thread_id from threads where thread_id is not null") == [("other",)]


async def test_a_thread_that_is_being_erased_is_not_there_and_can_be_made_again(
    buffer: ChunkBuffer, tmp_path: Path
) -> None:
    db = tmp_path / "chunks.db"
    await buffer.add_chunks("t", "m", ["old"] * 5, complete=True)
    old = (await buffer.get_accumulated_content("t")).cursor
    execute(db, "create trigger hold before delete on chunks begin select raise(abort, 'Not now.'); end")
    with pytest.raises(app.Unavailable, match=r"Not now\."):
        await buffer.clear_thread_buffer("t")
    for call in (buffer.get_thread_status("t"), buffer.get_accumulated_content("t"), buffer.get_chunks("t")):
        with pytest.raises(app.NotFound):
            await call
    assert (await buffer.get_threads()).threads == []
    await buffer.add_chunks("t", "m", ["new"])
    execute(db, "drop trigger hold")
    await buffer.clear_thread_buffer("t")
    await buffer.add_chunks("t", "m", ["newer"])
    assert (await buffer.get_accumulated_content("t")).content == "newer"
    with pytest.raises(app.CursorGone):
        await buffer.get_chunks("t", after=old)
    assert query(db, "select content from chunks") == [("newer",)]


async def test_a_reader_of_the_file_only_delays_the_erasure(
    make_buffer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, 0.1)
    db = tmp_path / "chunks.db"
    async with make_buffer(cleanup_interval=0.05) as buffer:
        await buffer.add_chunks("doomed", "m", [marked(1) * 500])
        await buffer.add_chunks("live", "m", [marked(2) * 500])
        with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True, isolation_level=None)) as person:
            app.open_packs(person)
            person.execute("begin")
            text = person.execute("select text from transcript where thread = 'doomed'").fetchone()
            await buffer.clear_thread_buffer("doomed")
            with pytest.raises(app.NotFound):
                await buffer.get_thread_status("doomed")
            await buffer.add_chunks("live", "m", [marked(3)])
            assert person.execute("select text from transcript where thread = 'doomed'").fetchone() == text
        await until(lambda: marks_in(db) == {2, 3}, "the text is erased once the reader is gone")
        assert (await buffer.get_accumulated_content("live")).content == marked(2) * 500 + marked(3)


async def test_a_clear_waits_until_a_reader_of_the_file_lets_go(make_buffer: Any, tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    async with make_buffer() as buffer:
        await buffer.add_chunks("doomed", "m", [marked(1) * 500])
        with contextlib.closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True, isolation_level=None)) as person:
            person.execute("begin")
            person.execute("select count(*) from chunks").fetchone()
            clearing = asyncio.create_task(buffer.clear_thread_buffer("doomed"))
            done, _ = await asyncio.wait([clearing], timeout=0.5)
            assert not done
        await clearing
        assert marks_in(db) == set()


async def test_text_is_erased_while_other_messages_are_streaming(buffer: ChunkBuffer, tmp_path: Path) -> None:
    texts = await fill_with_marks(buffer)  # their messages stay active
    live = {number for number in texts if number % 2}
    stop = asyncio.Event()

    async def stream() -> int:
        count = 0
        while not stop.is_set():
            await buffer.add_chunks("streaming", "m", [f"{count} "])
            count += 1
        return count

    streaming = asyncio.create_task(stream())
    async with asyncio.timeout(TIMEOUT / 2):  # at the same time
        await asyncio.gather(*(buffer.clear_thread_buffer(f"thread-{number}") for number in texts.keys() - live))
    assert marks_in(tmp_path / "chunks.db") == live
    assert await live_texts(buffer, live) == {number: texts[number] for number in live}
    stop.set()
    count = await streaming
    assert (await buffer.get_accumulated_content("streaming")).content == "".join(f"{n} " for n in range(count))


async def test_an_erasure_that_was_interrupted_is_finished_after_a_restart(make_buffer: Any, tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    async with make_buffer() as buffer:
        await buffer.add_chunks("doomed", "m", [marked(1) * 500] * 20)
        await buffer.add_chunks("live", "m", [marked(2) * 500])
    execute(db, "update threads set thread_id = null where thread_id = 'doomed'")
    assert marks_in(db) == {1, 2}
    async with make_buffer() as buffer:
        await until(lambda: marks_in(db) == {2}, "the cleared thread is erased")
        assert [thread.thread_id for thread in (await buffer.get_threads()).threads] == ["live"]
        assert query(db, "select count(*) from chunks") == [(1,)]


async def test_after_an_unreadable_text_reads_see_what_is_committed(buffer: ChunkBuffer, tmp_path: Path) -> None:
    await buffer.add_chunks("bad", "m", ["a", "b"])
    await buffer.add_chunks("good", "m", ["1"])
    execute(tmp_path / "chunks.db", "update chunks set content = cast(x'ff41' as text) where seq = 1 and thread = 1")
    gc.disable()  # as it would end the read by chance
    try:
        with pytest.raises(app.BadRows):
            await buffer.get_chunks("bad")
        await buffer.add_chunks("good", "m", ["2"])
        assert [chunk.content for chunk in (await buffer.get_chunks("good")).chunks] == ["1", "2"]
    finally:
        gc.enable()


async def test_a_clear_ends_if_the_file_cannot_shrink(tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    execute(db, (ROOT / "schema.sql").read_text())  # without incremental vacuum
    async with ChunkBuffer(Settings(db=str(db))) as buffer, asyncio.timeout(TIMEOUT):
        await buffer.add_chunks("t", "m", ["x" * 1_000_000])
        await buffer.clear_thread_buffer("t")
        assert query(db, "pragma freelist_count")[0][0] > 0


@pytest.mark.parametrize("wal", ["none", "empty"])
async def test_after_a_power_cut_with_synchronous_normal_a_cursor_is_told_to_begin_anew(
    tmp_path: Path, wal: str
) -> None:
    settings = Settings(db=str(tmp_path / "chunks.db"), synchronous="NORMAL")
    after_the_cut = tmp_path / "cut.db"
    async with ChunkBuffer(settings) as buffer:
        await buffer.add_chunks("t", "m", ["kept"])
        await on_writer(buffer, app.checkpoint)
        await buffer.add_chunks("t", "m", ["lost"])
        cursor = (await buffer.get_chunks("t")).cursor
        shutil.copy(tmp_path / "chunks.db", after_the_cut)  # what is in the WAL is not on the disk
        if wal == "empty":
            shutil.copyfile(os.devnull, f"{after_the_cut}-wal")
    async with ChunkBuffer(Settings(db=str(after_the_cut), synchronous="NORMAL")) as buffer:
        await buffer.add_chunks("t", "m", ["another"])
        assert (await buffer.locate("t", after=cursor)).reset


async def test_a_cancelled_close_still_closes_and_answers(tmp_path: Path) -> None:
    db, threads = tmp_path / "chunks.db", set(threading.enumerate())
    buffer = ChunkBuffer(Settings(db=str(db)))
    await buffer.__aenter__()
    await buffer.add_chunks("t", "m", ["a"])
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("begin immediate")
        appending = asyncio.create_task(buffer.add_chunks("t", "m", ["b"]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(buffer.__aexit__(None, None, None))
        await asyncio.wait([closing], timeout=0.1)
        closing.cancel()
        other.execute("rollback")
        await asyncio.wait([closing])
    async with asyncio.timeout(TIMEOUT):
        await asyncio.wait([appending])
    await until(lambda: threads.issuperset(threading.enumerate()), "all threads have ended")
    async with ChunkBuffer(Settings(db=str(db))) as again:
        assert (await again.get_accumulated_content("t")).content in ("a", "ab")


async def test_a_read_that_waits_while_its_connection_closes_is_told_so(buffer: ChunkBuffer) -> None:
    connection, is_running, may_go = store_of(buffer).readers[0], threading.Event(), threading.Event()
    before = asyncio.create_task(connection.run(lambda db: (is_running.set(), may_go.wait(TIMEOUT))))
    await until(is_running.is_set, "a read runs")
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(connection.run(lambda db: db.execute("select 1").fetchone()))
    await asyncio.sleep(0)
    may_go.set()
    with pytest.raises(app.Stopping):
        await waiting
    await asyncio.gather(before, closing)


async def test_an_end_is_never_before_what_it_ends(buffer: ChunkBuffer, tmp_path: Path) -> None:
    for number in range(50):
        await buffer.add_chunks(f"t{number}", "m", ["a"], complete=True)
    late = "select count(*) from threads where updated_at < created_at"
    assert query(tmp_path / "chunks.db", late) == [(0,)]


async def test_erasing_goes_on_though_expiry_fails(tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    async with ChunkBuffer(Settings(db=str(db), ttl=1e6, cleanup_interval=0.05)) as buffer:
        await buffer.add_chunks("bad", "m", ["a"])
        await buffer.add_chunks("cleared", "m", ["b"])
        execute(db, "update threads set thread_id = null where thread_id = 'cleared'")
        execute(
            db, "update threads set thread_id = cast(x'ff' as text), touched_at = 0, updated_at = 0 where thread = 1"
        )
        await until(lambda: query(db, "select content from chunks") == [("a",)], "the cleared thread is erased")
