"""Rows of the host: memory, disk, and the time to start."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .load import TIMEOUT, TOKEN, Stream, call, create, stream_request, upload
from .plan import Plan
from .results import Aim, BenchError, Figure, Line, Missing, Row, Samples, interleave, sampled, under
from .servers import ROOT, free_port, running, service

MB = 1_000_000
KIB = 1024
READERS = 1000


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_of_readers(plan: Plan, number: int) -> tuple[float, float]:
    """Bytes of a service that has just started, and of each reader that waits."""
    with service(plan.place(f"readers-{number}")) as server, contextlib.ExitStack() as stack:
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


def size_of_chunks(plan: Plan, count: int, number: int) -> tuple[float, float]:
    """Bytes of memory once so many chunks are appended, and of the file for each, all checkpointed."""
    folder = plan.place(f"chunks-{number}")
    with service(folder) as server:
        upload(server, "long", count)
        memory = resident(server.pid)
    database = folder / "chunks.db"
    if Path(f"{database}-wal").exists():
        raise BenchError("the service left a WAL when it was stopped")
    size = database.stat().st_size
    database.unlink()
    return memory, size / count


def footprint(plan: Plan) -> Row:
    """Memory and disk."""
    count = plan.scaled(1_000_000, 100_000)
    taken = interleave(
        plan.rounds, {"readers": partial(memory_of_readers, plan), "chunks": partial(size_of_chunks, plan, count)}
    )

    def samples(name: str, place: int, unit: int) -> Samples:
        return Samples(tuple(value[place] / unit for value in taken[name]))

    idle, reader = samples("readers", 0, MB), samples("readers", 1, KIB)
    loaded, chunk = samples("chunks", 0, MB), samples("chunks", 1, 1)
    text = len(TOKEN)
    return Row(
        "Memory and disk",
        f"Resident memory from /proc, of a fresh process each round: after its first answers; with {READERS:,} SSE"
        f" readers of one thread that wait, less that; and right after an NDJSON upload of {count:,} chunks. Disk is"
        f" the database file of these chunks ({text} bytes of text each) once the service has stopped, and with it"
        " checkpointed.",
        [
            Line("memory, idle", "MB", idle, {}, under(60, "MB", idle)),
            Line("memory for each idle reader", "KiB", reader, {}, under(25, "KiB", reader)),
            Line(f"memory after {count:,} chunks", "MB", loaded, {}, under(120, "MB", loaded)),
            Line(
                f"disk for each chunk of {text} bytes",
                "bytes",
                chunk,
                {"its text": Samples((float(text),))},
                under(2 * text + 24, "bytes", chunk),
            ),
        ],
        f"**Footprint:** {idle} MB of memory idle, {reader} KiB for each waiting reader, {chunk} bytes on disk for"
        f" each chunk of {text} bytes of text.",
    )


def first_answer(plan: Plan, name: str, command: Sequence[str | Path], number: int) -> float:
    """Milliseconds from starting a service to its first answer."""
    folder, port = plan.place(f"start-{name}-{number}"), free_port()
    began = time.monotonic()
    with running([*command, "serve", "--port", str(port), "--db", folder / "chunks.db"], folder, port):
        call(port, "GET", "/health/live")
        return (time.monotonic() - began) * 1000


def imports(number: int) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import litestar, uvicorn"], check=True, timeout=TIMEOUT)
    return (time.monotonic() - began) * 1000


def cold_start(plan: Plan) -> Row:
    """From the start of the process to its first answer."""
    binary = Path(os.environ.get("BINARY", ROOT / "dist" / "resume-stream")).resolve()
    measures: dict[str, Callable[[int], float]] = {
        "script": partial(first_answer, plan, "script", [sys.executable, ROOT / "app.py"]),
        "imports": imports,
    }
    if binary.is_file():
        measures["binary"] = partial(first_answer, plan, "binary", [binary])
    figures = sampled(plan.rounds, measures)
    ours: Figure = figures.get("binary", Missing("there is no dist/resume-stream; deploy/build_binary.py makes it"))
    aim: Aim = under(500, "ms", ours)
    beside = {"app.py under Python": figures["script"], '`python -c "import litestar, uvicorn"`': figures["imports"]}
    return Row(
        "Cold start to the first answer",
        "From starting the process, on a database that is not there yet, to the answer of /health/live, asked for"
        " every 2 ms until it accepts a connection. The page cache is warm. The import is the least that any service"
        " on this stack takes.",
        [Line("the single binary", "ms", ours, beside, aim)],
    )
