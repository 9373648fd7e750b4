"""Power cuts: strace records the service's writes, and they are replayed up to a random place.

At the cut, everything synced is on the disk. Any part of the later writes may be there, in any order,
down to single sectors. A new or removed file is certain only after a sync of its folder. From this disk
the service must start, and must have everything that it had told anyone before.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import sqlite3
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conftest import Service

from .base import Link, Verdict, append, call, message_path, piece, thread_path

SECTOR = 512
SYSCALLS = "openat,pwrite64,write,writev,sendmsg,sendto,ftruncate,fsync,fdatasync,unlink,rename"
LINE = re.compile(r"(\d+) +(?:<\.\.\. \w+ resumed>)?(.*)")
CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)", re.DOTALL)
PATH = re.compile(r'[<"]((?:\\x[0-9a-f]{2})+)[>"]')
OPENED = re.compile(r'"((?:\\x[0-9a-f]{2})+)"')
TOLD = re.compile(rb'"messageId":"(\w+)"(?:,"status":"\w+","reason":null)?,"seq":(\d+)')
CLEARED = b"HTTP/1.1 204"


def why_not() -> str:
    """Return why this cannot be tried here, or "" if it can."""
    return "" if shutil.which("strace") else "strace is not installed"


@dataclass
class Step:
    """A change of a file, or something that the service told a client."""

    kind: str
    path: str = ""
    offset: int = 0
    data: bytes = b""


def unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def whole_calls(trace: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the name, arguments, and result of each system call, in the order in which they returned."""
    unfinished: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            if not (match := LINE.match(line)):
                continue
            thread, text = match[1], match[2]
            if text.endswith("<unfinished ...>"):
                unfinished[thread] = text.removesuffix("<unfinished ...>")
                continue
            if " resumed>" in line[:60]:
                text = unfinished.pop(thread, "") + text
            if found := CALL.match(text):
                yield found[1], found[2], int(found[3])


def steps_of(trace: Path, db: Path) -> list[Step]:
    """Return what the service did to its database, and what it told its clients, in order."""
    steps = []
    known: set[str] = set()
    for name, arguments, result in whole_calls(trace):
        if result < 0:
            continue
        if not (match := PATH.search(arguments) if name != "openat" else OPENED.search(arguments)):
            continue
        path = unescape(match[1]).decode().removesuffix(" (deleted)")
        is_ours = path.startswith(str(db)) and not path.endswith("-shm")
        if name == "openat" and is_ours and "O_CREAT" in arguments and path not in known:
            known.add(path)
            steps.append(Step("create", path))
        elif name == "unlink" and is_ours:
            known.discard(path)
            steps.append(Step("unlink", path))
        elif name == "pwrite64" and is_ours:
            data = unescape(arguments.split('"')[1])[:result]
            steps.append(Step("write", path, int(arguments.rpartition(",")[2]), data))
        elif name == "ftruncate" and is_ours:
            steps.append(Step("truncate", path, int(arguments.rpartition(",")[2])))
        elif name in ("fsync", "fdatasync"):
            steps.append(Step("sync", path) if is_ours else Step("sync folder", path))
        elif path.startswith("socket:"):
            steps.append(Step("told", data=b"".join(unescape(text) for text in re.findall(r'"([^"]*)"', arguments))))
    return steps


@dataclass
class Disk:
    """What is certainly on the disk, as numbered files and their names, and what is not yet synced."""

    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    unsynced: list[tuple[int, Step]] = field(default_factory=list)
    latest: dict[str, int] = field(default_factory=dict)  # the names as the service sees them

    def take(self, step: Step) -> None:
        if step.kind == "create":
            self.latest[step.path] = len(self.files)
            self.files[len(self.files)] = bytearray()
        number = self.latest.get(step.path, -1)
        if step.kind == "sync":
            self._settle(lambda file, earlier: file == number and earlier.kind in ("write", "truncate"))
        elif step.kind == "sync folder":
            self._settle(lambda file, earlier: earlier.kind in ("create", "unlink"))
        elif step.kind != "told":
            self.unsynced.append((number, step))

    def _settle(self, is_certain: Callable[[int, Step], bool]) -> None:
        for number, step in self.unsynced:
            if is_certain(number, step):
                self._apply(number, step)
        self.unsynced = [(number, step) for number, step in self.unsynced if not is_certain(number, step)]

    def _apply(self, number: int, step: Step) -> None:
        data = self.files[number]
        if step.kind == "create":
            self.names[step.path] = number
        elif step.kind == "unlink":
            self.names.pop(step.path, None)
        elif step.kind == "truncate":
            del data[step.offset :]
            data.extend(bytes(step.offset - len(data)))
        else:
            data.extend(bytes(max(step.offset + len(step.data) - len(data), 0)))
            data[step.offset : step.offset + len(step.data)] = step.data

    def cut(self, rng: random.Random) -> Disk:
        """Return the disk after a power cut at this moment."""
        disk = Disk({number: bytearray(data) for number, data in self.files.items()}, dict(self.names))
        way = rng.choice(("nothing", "everything", "some first ones", "some", "sectors"))
        first = rng.randint(0, len(self.unsynced))
        for place, (number, step) in enumerate(self.unsynced):
            survives = {"nothing": False, "everything": True, "some first ones": place < first}
            if way == "sectors" and step.kind == "write":
                for start in range(0, len(step.data), SECTOR):
                    if rng.random() < 0.5:
                        data = step.data[start : start + SECTOR]
                        disk._apply(number, Step("write", step.path, step.offset + start, data))
            elif survives.get(way, rng.random() < 0.5):
                disk._apply(number, step)
        return disk

    def write(self, folder: Path) -> None:
        for path, number in self.names.items():
            (folder / Path(path).name).write_bytes(self.files[number])


def text_of(message: str, number: int) -> str:
    return piece(number, (number * 37 + len(message)) % 90 + (3000 if number % 11 == 0 else 0))


async def write_much(port: int, appends: int) -> None:
    """Make single appends and an upload, with readers, and clear threads."""

    async def single(message: str) -> None:
        for number in range(appends):
            await append(port, message, message, text_of(message, number), query=f"?index={number}")

    async def upload(message: str) -> None:
        async with Link.to(port) as link:
            kind = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}
            link.send_head("POST", message_path(message, message, "chunks?index=0&complete=true"), kind)
            for number in range(appends * 3):
                await link.send_piece(json.dumps({"content": text_of(message, number)}).encode() + b"\n")
                await asyncio.sleep(0.002)
            await link.send_piece(b"")
            await link.answer()

    async def follow(message: str) -> None:
        async with Link.to(port) as link:
            link.send_head("GET", thread_path(message, "/stream?follow=true&idle_timeout=1"))
            await link.read_head()
            async for _ in link.events():
                pass

    async def clear() -> None:
        for number in range(max(appends // 15, 2)):
            await append(port, f"gone{number}", f"gone{number}", *(text_of("gone", n) for n in range(20)))
            await call(port, "DELETE", thread_path(f"gone{number}"))

    writers = [f"w{number}" for number in range(5)]
    await asyncio.gather(*map(single, writers), upload("u0"), *map(follow, ("w0", "w1", "u0")), clear())


def record(folder: Path, appends: int, *flags: str) -> list[Step]:
    """Run the service under strace, kill it, and return what it did."""
    db, trace = folder / "power.db", folder / "trace"
    strace = ("strace", "-D", "-f", "-q", "-y", "-xx", "-s", "100000000", "--seccomp-bpf", "-o", str(trace))
    with Service(db, *flags, wrap=(*strace, "-e", f"trace={SYSCALLS}", "-e", "signal=none")) as service:
        asyncio.run(write_much(service.port, appends))
    size = -1
    while size != (size := trace.stat().st_size):
        time.sleep(0.1)  # strace may still write
    return steps_of(trace, db)


def told_before(steps: list[Step]) -> tuple[dict[str, int], set[str]]:
    """Return the last seq that a client was told for each message, and the threads reported as cleared."""
    places: dict[str, int] = {}
    cleared: set[str] = set()
    for step in steps:
        for message, seq in TOLD.findall(step.data) if step.kind == "told" else ():
            places[message.decode()] = max(places.get(message.decode(), 0), int(seq))
        if step.kind == "told" and step.data.startswith(CLEARED):
            cleared.add(f"gone{len(cleared)}")
    return places, cleared


async def check(verdict: Verdict, db: Path, where: str, places: dict[str, int], cleared: set[str]) -> None:
    from resume_stream.app import ChunkBuffer, NotFound, Settings

    async with ChunkBuffer(Settings(db=str(db))) as buffer:
        for message, seq in places.items():
            try:
                page = await buffer.get_chunks(message, limit=10_000)
            except NotFound:
                verdict.lost += 0 if message.startswith("gone") else seq
                verdict.expect(message.startswith("gone"), f"{where}: {message} is not there")
                continue
            verdict.expect(message not in cleared, f"{where}: {message} is there again")
            name = "gone" if message.startswith("gone") else message
            pieces = [text_of(name, number) for number in range(len(page.chunks))]
            stored = [entry.seq for entry in sorted([*page.chunks, *page.ends], key=lambda entry: entry.seq)]
            verdict.expect(stored == list(range(1, len(stored) + 1)), f"{where}: {message} has {stored[:5]} …")
            count = min(seq, len(page.chunks)) if page.ends else seq
            verdict.compare(f"{where}: {message}", "".join(chunk.content for chunk in page.chunks), pieces, count)
    connection = sqlite3.connect(db)
    (answer,) = connection.execute("pragma integrity_check").fetchone()
    connection.close()
    verdict.expect(answer == "ok", f"{where}: integrity_check: {answer}")


def survive_power_cuts(folder: Path, *flags: str, cuts: int, appends: int, seed: int = 1) -> Verdict:
    """Cut the power at random places. With ``--synchronous NORMAL`` this must fail, which shows that it can."""
    verdict = Verdict("power cut (FULL)")
    rng = random.Random(seed)
    steps = record(folder, appends, *flags)
    places, cleared = told_before(steps)
    verdict.expect(len(places) > 6 and cleared, f"too little was recorded: {places}")
    # Most cuts are right after a client is told something, where a missing sync shows.
    told = [number for number, step in enumerate(steps) if step.kind == "told" and TOLD.search(step.data)]
    places_to_cut = (lambda: rng.choice(told) + 1, lambda: rng.randrange(len(steps)), lambda: rng.randrange(told[0]))
    ends = sorted(rng.choices(places_to_cut, (7, 2, 1))[0]() for _ in range(cuts))
    disk, done = Disk(), 0
    for number, end in enumerate(ends):
        for step in steps[done:end]:
            disk.take(step)
        done = end
        place = folder / f"cut{number}"
        place.mkdir()
        disk.cut(rng).write(place)
        with verdict.trial(f"cut {number}, after step {end}"):
            asyncio.run(check(verdict, place / "power.db", f"cut {number}", *told_before(steps[:end])))
        shutil.rmtree(place)
    verdict.notes.append(f"{len(steps)} steps, of which {bisect_left(told, len(steps))} told somebody of a place")
    return verdict
