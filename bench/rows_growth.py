"""The row of many threads: what must not grow with their number."""

from __future__ import annotations

from functools import partial

from .library import ACTIVE, GOES, LISTED, filled, upkeep
from .plan import Plan
from .results import Line, Row, Samples, at_most_times, interleave, under

MEASURES = {
    "active": "list of a status that one thread in a hundred has",
    "no status": "list of a status that none has",
    "not covered": "list with a token that covers none",
    "idle messages": "look for idle messages",
    "idle threads": "look for expired threads",
    "expiry": "expiry and erasure of a thread, when all expire",
}


def growth(plan: Plan) -> Row:
    """What is done to few and to many threads."""
    counts = [1_000, plan.scaled(10_000, 5_000), plan.scaled(100_000, 20_000)]
    few, some, many = (f"{count:,} threads" for count in counts)
    folder = plan.place("growth")
    for count in counts:
        filled(folder / f"{count}.db", count)
    taken = interleave(
        plan.rounds,
        {f"{count:,} threads": partial(upkeep, folder / f"{count}.db", folder / "copy.db") for count in counts},
    )

    def samples(name: str, threads: str) -> Samples:
        return Samples(tuple(found[name] for found in taken[threads]))

    def line(name: str, title: str) -> Line:
        ours, least = samples(name, many), samples(name, few)
        return Line(
            f"{title}, {many}",
            "ms",
            ours,
            {few: least, some: samples(name, some)},
            [at_most_times(1.5, ours, least, few)],
        )

    calm, stirred = samples("longest append", many), samples("longest append in expiry", many)
    more = Samples(tuple(max(0.0, b - a) for a, b in zip(calm.values, stirred.values, strict=True)))
    return Row(
        "What is done to many threads",
        f"The library in a process of its own, synchronous=NORMAL, on a copy of a database of so many threads with a"
        f" chunk each, of which one in {ACTIVE} is active; the median of {GOES} goes a round. Lists are of up to"
        f" {LISTED} threads. Then all of them expire: from the first look for them until no trace is left, for each"
        " thread; meanwhile one more thread is appended to, with 1 ms between two appends, and the longest of these is"
        " set beside the longest within 2 s without.",
        [
            *(line(name, title) for name, title in MEASURES.items()),
            Line(
                f"longest append while {many} expire, beyond that without",
                "ms",
                more,
                {"while they expire": stirred, "without": calm},
                [under(20, "ms", more)],
            ),
        ],
    )
