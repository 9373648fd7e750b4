"""Faults of files and disks: full, read-only, locked, damaged, deleted, replaced, failing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from conftest import Service
from resume_stream import app

from .base import TIMEOUT, Answer, Verdict, append, call, eventually, piece, thread_path

SIZE = 5000  # characters of a piece that fills a disk


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path | None]:
    """Mount a file system of a few MiB and yield its path, or None if this process may not mount."""
    place = folder / "disk"
    place.mkdir()
    options = f"size={mebibytes}m"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", place], capture_output=True, check=False)
    if done.returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def disk_files(place: Path) -> list[Path]:
    return list(place.iterdir())


def integrity(db: Path) -> str:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        (answer,) = connection.execute("pragma integrity_check").fetchone()
    return str(answer)


class Writer:
    """A producer that retries what was not acknowledged."""

    def __init__(self, verdict: Verdict, service: Service, thread: str = "t") -> None:
        self.verdict, self.service, self.thread = verdict, service, thread
        self.pieces: list[str] = []
        self.acknowledged = 0

    async def append(self, size: int = 40) -> Answer:
        if len(self.pieces) == self.acknowledged:
            self.pieces.append(piece(len(self.pieces), size))
        began = time.monotonic()
        query = f"?index={self.acknowledged}"
        answer = await append(self.service.port, self.thread, "m", self.pieces[-1], query=query)
        if answer.status in (200, 201):
            self.acknowledged += 1
        else:
            self.expect_refusal(answer, {503, 507}, f"an append (after {time.monotonic() - began:.1f} s)")
        return answer

    def expect_refusal(self, answer: Answer, statuses: set[int], what: str) -> None:
        is_clear = answer.status in statuses and answer.is_problem
        self.verdict.expect(is_clear, f"{what} was answered {answer.status} {answer.body[:150]!r}")

    async def check(self, where: str) -> None:
        """Check that everything acknowledged can be read."""
        answer = await call(self.service.port, "GET", thread_path(self.thread, "/content"))
        if answer.status == 200:
            self.verdict.compare(where, answer.json["content"], self.pieces, self.acknowledged)
        else:
            self.verdict.lost += self.acknowledged
            self.verdict.fail(f"{where}: the text was answered {answer.status} {answer.body[:150]!r}")

    async def resume(self, where: str) -> None:
        """Wait until appends are taken again, which needs no help once the cause is gone, and check."""

        async def taken() -> bool:
            return (await self.append()).status in (200, 201)

        await eventually(taken, f"{where}: appends are taken again")
        await self.check(where)


async def survive_full_disk(folder: Path, *, times: int) -> Verdict:
    """Fill the disk to the last byte, go on appending, kill the service, and make room."""
    verdict = Verdict("disk full, and freed")
    with small_disk(folder, 12) as place:
        if place is None:
            return verdict
        ballast = place / "ballast"
        with Service(place / "full.db") as service:
            writer = Writer(verdict, service)
            for number in range(times):
                with verdict.trial(f"filling {number}"):
                    ballast.write_bytes(bytes(7 * 1024**2))  # once freed, it is room enough for a checkpoint
                    while (await writer.append(4 * SIZE)).status in (200, 201):
                        pass
                    for _ in range(5):
                        await writer.append(4 * SIZE)
                    await writer.check("while the disk is full")
                    if not number % 2:
                        service.kill()
                        await asyncio.to_thread(service.start)
                        await writer.check("restarted on a full disk")
                    ballast.unlink()
                    await writer.resume("once there is room")
                    cleared = await call(service.port, "DELETE", thread_path(writer.thread))
                    verdict.expect(cleared.status == 204, f"clearing: {cleared.status} {cleared.body[:150]!r}")
                    sizes = {file.name: file.stat().st_size // 1024 for file in disk_files(place)}
                    verdict.expect(sum(sizes.values()) < 1024, f"once it is cleared there are (KiB) {sizes}")
                    writer = Writer(verdict, service)
            verdict.expect(not service.tracebacks(), "there is a traceback in the log")
        with verdict.trial("integrity"):
            verdict.expect(integrity(service.db) == "ok", integrity(service.db))
    return verdict


async def survive_size_limit(folder: Path, *, times: int) -> Verdict:
    verdict = Verdict("max_db reached, and room made")
    with Service(folder / "limit.db", "--max-db", "1MiB") as service:
        for number in range(times):
            with verdict.trial(f"filling {number}"):
                writer = Writer(verdict, service, f"t{number}")
                ballast = Writer(verdict, service, "ballast")
                for _ in range(30):
                    await ballast.append(SIZE)
                while (await writer.append(SIZE)).status in (200, 201):
                    pass
                await writer.check("while the database is full")
                cleared = await call(service.port, "DELETE", thread_path("ballast"))
                verdict.expect(cleared.status == 204, f"clearing in a full database: {cleared.status} {cleared.body!r}")
                await writer.resume("once there is room")
                await call(service.port, "DELETE", thread_path(writer.thread))
        verdict.expect(not service.tracebacks(), "there is a traceback in the log")
    return verdict


async def survive_lock(folder: Path, *, seconds: float) -> Verdict:
    """Another process holds the write lock for longer than the service waits for it."""
    verdict = Verdict("locked by another process")
    with Service(folder / "locked.db") as service, verdict.trial(f"{seconds} s"):
        writer = Writer(verdict, service)
        await writer.append()
        other = sqlite3.connect(service.db, isolation_level=None)
        other.execute("begin exclusive")
        appending = asyncio.create_task(writer.append())
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            await writer.check("while it is locked")
            await asyncio.sleep(0.1)
            if appending.done() and (await appending).status == 503:
                verdict.expect("retry-after" in (await appending).headers, "there is no Retry-After")
                verdict.expect(time.monotonic() - began < 12, "it took over 12 s to be told")
                verdict.notes.append(f"refused after {time.monotonic() - began:.1f} s")
                appending = asyncio.create_task(writer.append())
        other.execute("rollback")
        other.close()
        await appending
        await writer.resume("once it is free")
        verdict.expect(not service.tracebacks(), "there is a traceback in the log")
    return verdict


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


async def survive_read_only(folder: Path) -> Verdict:
    """A file system mounted read-only refuses the service at its start, in one line."""
    from resume_stream.app import ChunkBuffer, Settings

    verdict = Verdict("read-only file system at the start")
    with small_disk(folder, 6) as place:
        if place is None:
            return verdict
        service = Service(place / "ro.db")
        service.log = folder / "ro.log"
        async with ChunkBuffer(Settings(db=str(service.db))) as buffer:
            await buffer.add_chunks("t", "m", ["text"])
        remount(place, "ro")
        with verdict.trial("start"):
            try:
                service.start()
                verdict.fail("it started")
                service.kill()
            except RuntimeError:
                lines = service.log.read_text().splitlines()
                verdict.expect(len(lines) == 1 and lines[0].startswith("resume-stream: "), f"it said {lines[-3:]}")
                verdict.notes.append(lines[-1].replace(str(folder), "…"))
        remount(place, "rw")
        with verdict.trial("start, once it can be written"):
            async with ChunkBuffer(Settings(db=str(service.db))) as buffer:
                verdict.expect((await buffer.add_chunks("t", "m", ["more"])).seq == 2, "the first chunk is not there")
    return verdict


async def survive_failing_disk(folder: Path, *, errors: tuple[str, ...], calls: tuple[str, ...]) -> Verdict:
    """strace makes system calls of the running service fail for a while."""
    verdict = Verdict("disk fails while running (EIO, EROFS, ENOSPC)")
    with Service(folder / "failing.db") as service:
        writer = Writer(verdict, service)
        await writer.append()
        for error in errors:
            for name in calls:
                with verdict.trial(f"{name} {error}"), failing(service.pid, name, error):
                    refused = 0
                    for _ in range(4):
                        refused += (await writer.append(SIZE)).status not in (200, 201)
                        await writer.check(f"while {name} fails with {error}")
                    verdict.expect(refused or name == "ftruncate", f"{name} {error} was not noticed")
                with verdict.trial(f"after {name} {error}"):
                    await writer.resume(f"after {name} failed with {error}")
        with verdict.trial("killed after all of it"):
            service.kill()
            verdict.expect(integrity(service.db) == "ok", integrity(service.db))
            with contextlib.closing(sqlite3.connect(service.db)) as connection:
                app.open_packs(connection)
                rows = connection.execute("select content from entries order by seq").fetchall()
            found = "".join(content for (content,) in rows)
            verdict.compare("killed after all of it", found, writer.pieces, writer.acknowledged)
        verdict.expect(not service.tracebacks(), "there is a traceback in the log")
    return verdict


@contextlib.contextmanager
def failing(pid: int, name: str, error: str) -> Iterator[None]:
    inject = f"inject={name}:error={error}"
    log = ("-o", "/dev/null")
    strace = subprocess.Popen(
        ["strace", "-f", *log, "-e", f"trace={name}", "-e", inject, "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr
    try:
        strace.stderr.readline()  # it says that it is attached
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(TIMEOUT)
        strace.stderr.close()


# A damaged file


def damage(file: Path, rng: random.Random) -> str:
    """Damage the file in one way, and return which."""
    size = file.stat().st_size
    place, length = rng.randrange(size), rng.choice((1, 1, 4, 16, 512))
    with file.open("r+b") as opened:
        match rng.choice(("bytes", "bytes", "zeros", "cut", "moved")):
            case "bytes":
                opened.seek(place)
                opened.write(rng.randbytes(length))
                return f"{length} bytes at {place}"
            case "zeros":
                opened.seek(place // 4096 * 4096)
                opened.write(bytes(4096))
                return f"zeros at {place // 4096 * 4096}"
            case "cut":
                opened.truncate(place)
                return f"cut to {place}"
            case _:
                opened.seek(place // 4096 * 4096)
                page = opened.read(4096)
                opened.seek(rng.randrange(size) // 4096 * 4096)
                opened.write(page)
                return f"the page at {place} twice"


async def make_good(db: Path) -> dict[str, str]:
    """Make a database of a hundred pages, and return the text of each thread."""
    from resume_stream.app import ChunkBuffer, Settings

    texts: dict[str, str] = {}
    async with ChunkBuffer(Settings(db=str(db))) as buffer:
        for number in range(12):
            pieces = [piece(n, 100 + (n * number) % 700) for n in range(80)]
            await buffer.add_chunks(f"t{number}", f"m{number}", pieces, complete=number > 0)
            texts[f"t{number}"] = "".join(pieces)
    return texts


async def survive_damage(folder: Path, *, places: int, seed: int = 1) -> Verdict:
    """A damaged file is refused in one line, or served without text that SQLite can know to be wrong."""
    from resume_stream.app import ChunkBuffer, Parts, Settings, StartupError

    verdict = Verdict("damaged while stopped")
    rng = random.Random(seed)
    good = folder / "good.db"
    texts = await make_good(good)
    refused = unseen = served = 0
    for number in range(places):
        db = folder / f"damaged{number}.db"
        shutil.copy(good, db)
        what = damage(db, rng)
        with verdict.trial(what):
            try:
                async with asyncio.timeout(TIMEOUT), ChunkBuffer(Settings(db=str(db), idle_timeout=0.05)) as buffer:
                    sound = integrity_or_error(db)
                    transport = httpx.ASGITransport(app=Parts(buffer).app())  # raises what a client must never see
                    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api") as client:
                        wrong = await wrong_texts(verdict, client, texts, what)
                    served += not wrong
                    unseen += bool(wrong) and sound == "ok"
                    verdict.expect(
                        not wrong or sound == "ok", f"{what}: {wrong} served wrong; SQLite knows: {sound:.80}"
                    )
            except StartupError as error:
                refused += 1
                verdict.expect("\n" not in str(error), f"{what}: refused in several lines: {error}")
        remove(db)
    verdict.notes.append(f"{refused} refused, {served} served right, {unseen} changed text in a way SQLite cannot know")
    return verdict


def remove(db: Path) -> None:
    for file in db.parent.glob(f"{db.name}*"):
        file.unlink()


def integrity_or_error(db: Path) -> str:
    try:
        return integrity(db)
    except sqlite3.Error as error:
        return str(error)


async def wrong_texts(verdict: Verdict, client: httpx.AsyncClient, texts: dict[str, str], what: str) -> list[str]:
    """Return the threads that are answered with wrong text and without an error."""
    wrong = []
    for thread, text in texts.items():
        message = f"m{thread[1:]}"
        answers: list[tuple[httpx.Response, Callable[[httpx.Response], str]]] = [
            (await client.get(f"/threads/{thread}/content"), lambda answer: answer.json()["content"]),
            (await client.get(f"/threads/{thread}/stream"), text_of_stream),
            (await client.get(f"/threads/{thread}/messages/{message}/stream"), text_of_stream),
        ]
        for answer, text_of in answers:
            if answer.status_code == 200 and "event: error" not in answer.text:
                wrong += [thread] * (text_of(answer) != text)
            elif answer.status_code in (204, 404):
                wrong.append(thread)  # the thread seems to be missing
            else:
                clear = answer.status_code in (200, 503) and '"detail"' in answer.text
                verdict.expect(clear, f"{what}: {answer.status_code} {answer.text:.150}")
    taken = await client.post("/threads/new/messages/m/chunks", json={"content": "text"})
    verdict.expect(taken.status_code in (201, 503), f"{what}: an append was answered {taken.status_code} {taken.text}")
    return sorted(set(wrong))


def text_of_stream(answer: httpx.Response) -> str:
    frames = re.findall(r"^data: (\{.*\})$", answer.text, re.MULTILINE)
    return "".join(json.loads(frame).get("content", "") for frame in frames)


# A file that is deleted or replaced


def delete_all(db: Path) -> None:
    for file in (db, Path(f"{db}-wal"), Path(f"{db}-shm")):
        file.unlink()


def delete_database(db: Path) -> None:
    db.unlink()


def delete_wal(db: Path) -> None:
    Path(f"{db}-wal").unlink()


def replace(db: Path) -> None:
    """Replace the file by a copy, as a backup restored without stopping the service does."""
    copy = db.with_name("copy.db")
    with contextlib.closing(sqlite3.connect(db)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    os.replace(copy, db)


TAKEN_AWAY: tuple[Callable[[Path], Any], ...] = (delete_all, delete_database, delete_wal, replace)


async def survive_taken_away(folder: Path, ways: Sequence[Callable[[Path], Any]] = TAKEN_AWAY) -> Verdict:
    """From then on, whatever is acknowledged must be there after a restart."""
    verdict = Verdict("deleted or replaced under the service")
    for number, take_away in enumerate(ways):
        with verdict.trial(take_away.__name__), Service(folder / f"away{number}.db") as service:
            before, after = Writer(verdict, service, "before"), Writer(verdict, service, "after")
            for _ in range(5):
                await before.append()
            take_away(service.db)
            statuses = [(await after.append()).status for _ in range(3)]
            reading = await call(service.port, "GET", thread_path("before", "/content"))
            ready = await call(service.port, "GET", "/health/ready")
            verdict.notes.append(f"{take_away.__name__}: {statuses}, read {reading.status}, ready {ready.status}")
            tracebacks = service.tracebacks()
            verdict.expect(not tracebacks, f"{take_away.__name__}: {tracebacks} tracebacks in the log")
            service.end(signal.SIGTERM)
            await asyncio.to_thread(service.start)
            for writer in (before, after):
                if writer.acknowledged and (writer is after or take_away is replace):
                    await writer.check(f"{take_away.__name__}: {writer.thread}")
    return verdict
