"""``python -m tests.faults --minutes N``: try every fault at length, and print a line for each."""

from __future__ import annotations

import argparse
import asyncio
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from conftest import load_app, why_no_redis

from . import clock, crowd, disk, fuzz, heavy, instances, kill, power
from .base import Verdict

EXPECTED_MINUTES = 20  # that the counts below take


def faults(minutes: float) -> Iterator[tuple[str, Callable[[Path], Verdict | Coroutine[Any, Any, Verdict]]]]:
    """Yield each fault, with counts that fit the time, and the reason why it cannot be tried ("" if it can)."""
    share = minutes / EXPECTED_MINUTES

    def times(count: int, least: int = 1) -> int:
        return max(round(count * share), least)

    no_strace = power.why_not()
    yield "", lambda folder: kill.survive_kills(folder, kills=times(100, 50), producers=32, readers=64, longest=3)
    on_redis = [
        (instances.kill_an_instance, times(30, 5)),
        (instances.kill_redis, times(10, 3)),
        (instances.cut_connections, times(10, 2)),
        (instances.pause_redis, times(4)),
        (instances.stop_redis, times(4)),
        (instances.fill_redis, times(4)),
    ]
    yield why_no_redis(), lambda folder: instances.survive_on_redis(folder, faults=on_redis)
    yield no_strace, lambda folder: power.survive_power_cuts(folder, cuts=times(1500, 100), appends=times(300, 50))
    yield "", lambda folder: disk.survive_full_disk(folder, times=times(20, 4))
    yield "", lambda folder: disk.survive_size_limit(folder, times=times(10, 2))
    yield "", lambda folder: disk.survive_lock(folder, seconds=12)
    yield "", lambda folder: disk.survive_damage(folder, places=times(400, 100))
    yield "", disk.survive_read_only
    every = {"errors": ("EIO", "EROFS", "ENOSPC"), "calls": ("pwrite64", "fdatasync", "ftruncate")}
    yield no_strace, lambda folder: disk.survive_failing_disk(folder, **every)
    yield "", disk.survive_taken_away
    yield "", lambda folder: clock.survive_clock(folder, step=-clock.HOUR)
    yield "", lambda folder: clock.survive_clock(folder, step=clock.DAY)
    yield "", lambda folder: crowd.survive_slow_readers(folder, readers=20, mebibytes=times(32, 8))
    yield "", lambda folder: crowd.survive_rudeness(folder, times=times(100, 10))
    yield "", lambda folder: crowd.survive_idle_readers(folder, readers=5000)
    yield "", lambda folder: heavy.survive_heavy_work(folder, mebibytes=times(120, 60))
    yield "", lambda folder: fuzz.survive_fuzzing(folder, examples=times(1000, 100))
    yield fuzz.why_no_schemathesis(), lambda folder: fuzz.survive_schemathesis(folder, examples=times(100, 20))
    yield "", lambda folder: crowd.survive_churn(folder, seconds=max(minutes * 60 / 2, 30))


def run(fault: Callable[[Path], Verdict | Coroutine[Any, Any, Verdict]]) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        verdict = fault(Path(folder))
        return verdict if isinstance(verdict, Verdict) else asyncio.run(verdict)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=EXPECTED_MINUTES, help="about how long (default: %(default)s)")
    parser.add_argument("--only", default="", help="only those whose function matches this pattern")
    minutes, only = (arguments := parser.parse_args()).minutes, arguments.only
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load_app()
    broken = 0
    for reason, fault in faults(minutes):
        if not re.search(only, " ".join((fault.__name__, *fault.__code__.co_names))):
            continue
        if reason:
            print(f"not tried: {reason}", flush=True)
            continue
        began = time.monotonic()
        try:
            verdict = run(fault)
        except Exception as error:
            print(f"could not be tried: {type(error).__name__}: {error}", flush=True)
            broken += 1
            continue
        if not verdict.tried and verdict.is_sound:
            print(f"{verdict.fault:<44} not tried: this machine does not let us", flush=True)
            continue
        print(f"{verdict}  ({time.monotonic() - began:.0f} s)", flush=True)
        for note in verdict.notes:
            print(f"    {note}", flush=True)
        for what in dict.fromkeys(verdict.broken[:10]):
            print(f"    BROKEN {what}", flush=True)
        broken += not verdict.is_sound
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
