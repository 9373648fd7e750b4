"""Run the benchmark: ``python -m bench``."""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from .plan import Plan
from .report import filesystem_of, write_report
from .results import BenchError, Row, Unavailable
from .rows_fan_out import fan_out
from .rows_growth import growth
from .rows_host import cold_start, footprint, held
from .rows_latency import latency
from .rows_layers import layers
from .rows_packs import packs
from .rows_redis import redis_appends, redis_fan_out, redis_latency
from .rows_relay import relay
from .rows_resume import catch_up, known_content, near_the_end
from .rows_write import appends, streamed
from .servers import PACKAGE, ROOT

ROWS: dict[str, Callable[[Plan], Row]] = {
    "appends": appends,
    "streamed": streamed,
    "latency": latency,
    "fan-out": fan_out,
    "catch-up": catch_up,
    "near-the-end": near_the_end,
    "known-content": known_content,
    "packs": packs,
    "relay": relay,
    "redis-appends": redis_appends,
    "redis-latency": redis_latency,
    "redis-fan-out": redis_fan_out,
    "footprint": footprint,
    "held": held,
    "cold-start": cold_start,
    "growth": growth,
    "layers": layers,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description="Measure resume-stream beside its peers.")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"measure only some of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything works")
    parser.add_argument("--dir", type=Path, default=Path(), help="a folder on a real disk (default: this one)")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: bench/ for a whole run, build/bench/ for less)"
    )
    found = parser.parse_args()
    found.names = found.only.split(",") if found.only else list(ROWS)
    if unknown := set(found.names) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    found.out = found.out or (ROOT / "build" / "bench" if found.only or found.quick else PACKAGE)
    if found.rounds < 1:
        parser.error("--rounds is 1 or more")
    if filesystem_of(found.dir) in ("tmpfs", "ramfs"):
        parser.error(f"{found.dir} is in memory; name a folder on a disk with --dir")
    return found


def measured(name: str, plan: Plan) -> Row:
    """Return the row, or a row that says why there is none."""
    began = time.monotonic()
    print(f"{name} …", end=" ", file=sys.stderr, flush=True)
    try:
        row = ROWS[name](plan)
    except Unavailable as unavailable:
        row = Row(name, "", failure=f"not measured: {unavailable}")
    except BenchError as error:
        row = Row(name, "", failure=f"FAILED: {' '.join(str(error).split())[:300]}")
    except Exception as error:  # keep the other rows
        traceback.print_exc()
        row = Row(name, "", failure=f"FAILED: {error!r}")
    print(f"{row.failure or 'done'} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
    return row


def end(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, end)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))  # servers inherit it; each reader is a file
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir))).resolve()
        plan = Plan(1 if options.quick else options.rounds, options.quick, folder)
        rows = [measured(name, plan) for name in options.names]
    write_report(rows, plan, options.out, time.monotonic() - began)
    return 1 if any(row.failure.startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
