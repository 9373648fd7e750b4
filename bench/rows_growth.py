"""The row of many threads: work that must not grow with their number."""

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
    """Measure work over few and many threads."""
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
        "Work over many threads",
        f"The library in its own process, synchronous=NORMAL, on a copy of a database of so many threads with one chunk"
        f" each, one in {ACTIVE} of them active; the median of {GOES} tries a round. Lists have up to {LISTED} threads."
        " Then all threads expire: from the first look for them until no trace is left, per thread. Meanwhile one more"
        " thread gets appends, 1 ms apart; the longest of them stands beside the longest within 2 s without expiry.",
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
