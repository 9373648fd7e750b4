"""Rows of the host: memory, disk, and the time to start."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .library import ACTIVE, filled, thread_name
from .load import CHUNK, MARK, TIMEOUT, TOKEN, Client, Stream, append_request, call, create, stream_request, upload
from .plan import Plan
from .results import (
    OLD,
    BenchError,
    Figure,
    Line,
    Missing,
    Row,
    Samples,
    Unavailable,
    at_most_times,
    interleave,
    no_more_than_before,
    sampled,
    under,
)
from .servers import ROOT, Server, free_port, old_binary, old_service, old_tree, running, service

MB = 1_000_000
KIB = 1024
READERS = 1000
HELD_ROUNDS = 2  # opening ten thousand streams takes long


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


OURS = "resume-stream"
BINARY = "the single binary"
SCRIPT = "app.py under Python"
IMPORTS = '`python -c "import litestar, uvicorn"`'
Service = Callable[[Path], contextlib.AbstractContextManager[Server]]


def services() -> tuple[dict[str, Service], dict[str, Missing]]:
    """Return this version and the old one, and the reason if the old one is missing."""
    try:
        old_tree()
    except Unavailable as unavailable:
        return {OURS: service}, {OLD: Missing(str(unavailable))}
    return {OURS: service, OLD: old_service}, {}


def memory_of_readers(plan: Plan, name: str, start: Service, number: int) -> tuple[float, float]:
    """Return the bytes of a fresh service and of each waiting reader."""
    with start(plan.place(f"readers-{name}-{number}")) as server, contextlib.ExitStack() as stack:
        call(server.port, "GET", "/health/ready")
        create(server, "idle")
        time.sleep(0.5)
        idle = resident(server.pid)
        for _ in range(READERS):
            stack.enter_context(Stream(server.port, stream_request(server, "idle")))
        time.sleep(0.5)
        if (readers := call(server.port, "GET", "/api/threads/idle")["readers"]) != READERS:
            raise BenchError(f"{READERS} readers were opened, and the service counts {readers}")
        return idle, (resident(server.pid) - idle) / READERS


def size_of_chunks(plan: Plan, count: int, name: str, start: Service, number: int) -> tuple[float, float]:
    """Return the bytes of memory after so many chunks, and the bytes of the checkpointed file for each."""
    folder = plan.place(f"chunks-{name}-{number}")
    with start(folder) as server:
        upload(server, "long", count)
        memory = resident(server.pid)
    database = folder / "chunks.db"
    if Path(f"{database}-wal").exists():
        raise BenchError("the service left a WAL when it was stopped")
    size = database.stat().st_size
    database.unlink()
    return memory, size / count


def footprint(plan: Plan) -> Row:
    """Measure memory and disk."""
    count = plan.scaled(1_000_000, 100_000)
    found, missing = services()
    measures = {("readers", name): partial(memory_of_readers, plan, name, start) for name, start in found.items()}
    measures |= {("chunks", name): partial(size_of_chunks, plan, count, name, start) for name, start in found.items()}
    taken = interleave(plan.rounds, measures)

    def samples(name: str, what: str, place: int, unit: int) -> Figure:
        return missing.get(name) or Samples(tuple(value[place] / unit for value in taken[what, name]))

    def line(title: str, unit: str, bound: float, *how: Any, **more: Figure) -> Line:
        ours, old = samples(OURS, *how), samples(OLD, *how)
        return Line(title, unit, ours, {OLD: old, **more}, [under(bound, unit, ours), no_more_than_before(ours, old)])

    text = len(TOKEN)
    lines = [
        line("memory, idle", "MB", 60, "readers", 0, MB),
        line("memory for each idle reader", "KiB", 12, "readers", 1, KIB),
        line(f"memory after {count:,} chunks", "MB", 120, "chunks", 0, MB),
        line(
            f"disk for each chunk of {text} bytes",
            "bytes",
            2 * text + 24,
            *("chunks", 1, 1),
            **{"its text": Samples((float(text),))},
        ),
    ]
    idle, reader, _, chunk = (line.ours for line in lines)
    return Row(
        "Memory and disk",
        f"Resident memory from /proc, of a fresh process each round: after its first answers; with {READERS:,} waiting"
        f" SSE readers of one thread, minus that; and right after an NDJSON upload of {count:,} chunks. Disk is the"
        f" database file of these chunks ({text} bytes of text each) after the service has checkpointed it and"
        " stopped.",
        lines,
        f"**Footprint:** {idle} MB of memory idle, {reader} KiB for each waiting reader, {chunk} bytes on disk for"
        f" each chunk of {text} bytes of text.",
    )


def first_arrival(server: Server, streams: Sequence[Stream]) -> float:
    """Return the milliseconds from an append to one of many threads until its one reader has it."""
    at = len(streams) // 2 // ACTIVE * ACTIVE  # a thread with an active message
    with Client(server.port) as client:
        began = time.monotonic()
        client.send(append_request(server, thread_name(at), CHUNK))
        while MARK not in streams[at].receive():
            pass
        return (time.monotonic() - began) * 1000


def longest_append(server: Server, database: Path, changes: bool, seconds: float) -> float:
    """Return the milliseconds of the slowest of many appends, with or without another process's changes."""
    longest, until, change_at = 0.0, time.monotonic() + seconds, time.monotonic()
    with Client(server.port) as client, contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        while (began := time.monotonic()) < until:
            if changes and began >= change_at:
                other.execute("update threads set updated_at = updated_at where thread = 1")
                change_at, began = began + 0.25, time.monotonic()
            client.exchange(append_request(server, "busy", CHUNK))
            longest = max(longest, time.monotonic() - began)
    return longest * 1000


def many_readers(plan: Plan, template: Path, readers: int, number: int) -> tuple[float, float, float, float]:
    """Return KiB per reader, ms until one has a chunk, and the longest append without and with changes."""
    folder = plan.place(f"many-{number}")
    database = folder / "chunks.db"
    shutil.copy(template, database)
    with service(folder) as server, contextlib.ExitStack() as stack:
        create(server, "busy")
        idle = resident(server.pid)
        streams = []
        for thread in range(readers):
            request = stream_request(server, thread_name(thread))
            streams.append(stack.enter_context(Stream(server.port, request)))
        for stream in streams:
            while MARK not in stream.received:
                stream.receive()
        time.sleep(0.5)
        each = (resident(server.pid) - idle) / readers / KIB
        seconds = plan.seconds(number)
        calm, stirred = (longest_append(server, database, changes, seconds) for changes in (False, True))
        return each, first_arrival(server, streams), calm, stirred


def held(plan: Plan) -> Row:
    """Measure many idle readers, a thread each."""
    readers = plan.scaled(10_000, 1_000)
    if (most := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < readers + 100:
        raise Unavailable(f"{readers:,} readers need as many open files, and {most:,} are allowed (ulimit -Hn)")
    template = plan.place("held") / "template.db"
    filled(template, readers)
    taken = interleave(min(plan.rounds, HELD_ROUNDS), {OURS: partial(many_readers, plan, template, readers)})[OURS]
    each, arrival, calm, stirred = (Samples(values) for values in zip(*taken, strict=True))
    return Row(
        f"{readers:,} idle readers, a thread each",
        f"A fresh process each round (at most {HELD_ROUNDS} rounds), on a database that has these threads. First,"
        " resident memory once each thread has a waiting SSE reader, minus the memory before. Then the longest of"
        " consecutive appends over one connection to one more thread, synchronous=FULL; and the same while another"
        " process changes the file four times a second, so that the service looks at every followed thread again."
        " Last, the time from an append to one of the threads until its reader has it.",
        [
            Line("memory for each", "KiB", each, {}, [under(12, "KiB", each)]),
            Line("from an append to its reader", "ms", arrival),
            Line("longest append while another process changes the file", "ms", stirred, {"without": calm}),
        ],
    )


def first_answer(plan: Plan, command: Sequence[str | Path], number: int) -> float:
    """Return the milliseconds from starting a service to its first answer."""
    with tempfile.TemporaryDirectory(dir=plan.folder) as place:
        folder, port = Path(place), free_port()
        began = time.monotonic()
        with running([*command, "serve", "--port", str(port), "--db", folder / "chunks.db"], folder, port):
            call(port, "GET", "/health/live")
            return (time.monotonic() - began) * 1000


def imports(number: int) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import litestar, uvicorn"], check=True, timeout=TIMEOUT)
    return (time.monotonic() - began) * 1000


def binaries() -> tuple[dict[str, Path], dict[str, Missing]]:
    """Return the binaries of this version and the old one, and the reasons for missing ones."""
    ours = Path(os.environ.get("BINARY", ROOT / "dist" / "resume-stream")).resolve()
    if not ours.is_file():
        missing = Missing("there is no dist/resume-stream; deploy/build_binary.py makes it")
        return {}, {OURS: missing, OLD: missing}
    try:
        return {OURS: ours, OLD: old_binary()}, {}
    except Unavailable as unavailable:
        return {OURS: ours}, {OLD: Missing(str(unavailable))}


def cold_start(plan: Plan) -> Row:
    """Measure the time from the start of the process to its first answer."""
    found, missing = binaries()
    commands: dict[tuple[str, str], list[str | Path]] = {(BINARY, name): [path] for name, path in found.items()}
    commands[SCRIPT, OURS] = [sys.executable, ROOT / "app.py"]
    try:
        commands[SCRIPT, OLD] = [sys.executable, old_tree() / "app.py"]
    except Unavailable as unavailable:
        missing[OLD] = Missing(str(unavailable))
    measures: dict[Any, Callable[[int], float]] = {
        name: partial(first_answer, plan, command) for name, command in commands.items()
    }
    figures = sampled(plan.rounds, {**measures, IMPORTS: imports})

    def line(what: str) -> Line:
        ours, old = (figures.get((what, name)) or missing[name] for name in (OURS, OLD))
        beside = {OLD: old, IMPORTS: figures[IMPORTS]}
        return Line(what, "ms", ours, beside, [at_most_times(0.75, ours, old, OLD)] if what == BINARY else [])

    def size(name: str) -> Figure:
        return Samples((found[name].stat().st_size / MB,)) if name in found else missing[name]

    return Row(
        "Cold start to the first answer",
        "From starting the process, on a database that does not exist yet, to the answer of /health/live, tried every"
        " 2 ms until the process accepts a connection. The page cache is warm. The import is the least that any service"
        f" on this stack takes. The binary of {OLD} is built by its own deploy/build_binary.py, with the versions that"
        " it asks for.",
        [line(BINARY), line(SCRIPT), Line("size of the single binary", "MB", size(OURS), {OLD: size(OLD)})],
    )
