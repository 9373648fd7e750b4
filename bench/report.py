"""Write the report of a run: ``RESULTS.md``, ``results.svg``, and ``layers.svg``."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .chart import chart, layers_chart
from .plan import Plan
from .results import Line, Row
from .servers import DURABLE_STREAMS, PACKAGE, RESUMABLE_STREAM, installed_version

NOTES = PACKAGE / "NOTES.md"
PACKAGES = ("litestar", "uvicorn", "uvloop", "httptools", "msgspec", "aiosqlite", "redis")
PROGRAMS = {
    "nginx": ("nginx", "-v"),
    "nchan": ("dpkg-query", "-W", "libnginx-mod-nchan"),
    "Redis": ("redis-server", "--version"),
    "Node": ("node", "--version"),
    "wrk": ("wrk", "-v"),
}


def write_report(rows: Sequence[Row], plan: Plan, out: Path, seconds: float) -> None:
    parts = ["# What it costs", *summary(rows), machine(plan.folder.parent), versions(), conditions(plan, seconds)]
    stacks = [stack for row in rows for stack in row.stacks]
    parts += ["![the figures as bars](results.svg)", "![the cost by layer](layers.svg)" if stacks else ""]
    parts += [table(rows), *hows(rows), *unreached(rows)]
    if NOTES.exists():
        parts.append(NOTES.read_text().strip())
    out.mkdir(parents=True, exist_ok=True)
    (out / "RESULTS.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    (out / "results.svg").write_text(chart(rows))
    if stacks:
        (out / "layers.svg").write_text(layers_chart(stacks))
    print(f"{out}/RESULTS.md", file=sys.stderr)


def summary(rows: Sequence[Row]) -> list[str]:
    return ["\n".join(f"- {row.summary}" for row in rows if row.summary)]


def machine(folder: Path) -> str:
    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    cpu = named[1] if named else platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3
    return (
        f"**Machine:** {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()}"
        f" {platform.release()}, {filesystem_of(folder)}."
    )


def filesystem_of(folder: Path) -> str:
    """Return the type of the file system that has the folder."""
    path = str(folder.resolve())
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if Path(path).is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def versions() -> str:
    found = {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    found |= {name: metadata.version(name) for name in PACKAGES}
    found |= {name: said for name, command in PROGRAMS.items() if (said := first_version(command))}
    for name, _ in (DURABLE_STREAMS, RESUMABLE_STREAM):
        if version := installed_version(name):
            found[name] = version
    return f"**Versions:** {', '.join(f'{name} {version}' for name, version in found.items())}."


def first_version(command: Sequence[str]) -> str:
    """Return the first number with a point in a program's output, or nothing."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.search(r"\d+\.\d[\w.]*", said.stdout + said.stderr)
    return found[0] if found else ""


def conditions(plan: Plan, seconds: float) -> str:
    rounds = "1 short round (`--quick`), too short to rely on" if plan.quick else f"{plan.rounds} rounds"
    return (
        f"Measured on {time.strftime('%Y-%m-%d')} in {seconds / 60:.1f} minutes with `python -m bench`, {rounds}."
        " Figures are medians, with the least and the most in parentheses; a share is the median of the rounds' own"
        " shares. Each round measures everything in a row in turn; a first round warms up and is discarded. All"
        " servers and the load run on this machine and share its cores."
    )


def table(rows: Sequence[Row]) -> str:
    lines = ["| measure | resume-stream | aim | reached | beside it |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(f"| **{row.title}** | {row.failure} | | | |")
        lines += [_table_line(line) for line in row.lines]
    return "\n".join(lines)


def _table_line(line: Line) -> str:
    beside = "<br>".join(f"{name}: {figure}" for name, figure in line.beside.items())
    words = {True: "yes", False: "**no**", None: "unknown"}
    aims = "<br>".join(aim.text for aim in line.aims)
    reached = "<br>".join(f"{words[aim.reached]}: {aim.outcome}" for aim in line.aims)
    return f"| {line.title}, {line.unit} | {line.ours} | {aims} | {reached} | {beside} |"


def hows(rows: Sequence[Row]) -> list[str]:
    told = [f"- **{row.title}.** {row.how}" for row in rows if row.how]
    return ["## What each row measures", "\n".join(told)] if told else []


def unreached(rows: Sequence[Row]) -> list[str]:
    """Say which aims were missed and by how much."""
    judged = [(row, line, aim) for row in rows for line in row.lines for aim in line.aims]
    missed = [
        f"- {row.title}, {line.title}: the aim is {aim.text}; measured {aim.outcome}."
        for row, line, aim in judged
        if aim.reached is False
    ]
    unknown = [
        f"- {row.title}, {line.title}: unknown, because {aim.outcome}."
        for row, line, aim in judged
        if aim.reached is None
    ]
    failed = [f"- {row.title}: {row.failure}." for row in rows if row.failure]
    reached = sum(aim.reached is True for _, _, aim in judged)
    count = f"{reached} of {len(judged)} aims were reached in this run."
    return ["## Missed aims", count, "\n".join(missed + unknown + failed)]
