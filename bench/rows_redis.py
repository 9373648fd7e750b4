"""Rows of the second store: Redis Streams beside the SQLite file, with one process and with three."""

from __future__ import annotations

from functools import partial

from .plan import Plan, Stage
from .results import Figure, Line, Missing, Row, Samples, Unavailable, interleave, measured_share
from .rows_fan_out import BLOCK, PRODUCERS, Crowd, publish_singly, to_readers
from .rows_latency import PACE, percentile, time_deliveries
from .rows_write import append_singly
from .servers import behind_nginx, redis, resumable_stream, service

SQLITE = "the SQLite file"
ONE = "Redis, one process"
PROXIED = "Redis, one process behind nginx"
THREE = "Redis, three processes behind nginx"
PEER = "resumable-stream (npm), same Redis"
CONNECTIONS = (1, 32, 128)
READERS = (100, 1000)
HOW = (
    " One Redis with `appendfsync always` serves all of a row, with a database for each server; SQLite has"
    " synchronous=FULL. The processes, nginx, Redis, and the load share this machine's cores, so three processes can"
    " do more than one only if cores are left."
)


def start_all(stage: Stage, with_peer: bool = False) -> None:
    stage.start(SQLITE, service)
    try:
        store = stage.enter_context(redis(stage.folder / "redis"))
    except Unavailable as unavailable:
        stage.missing |= {name: Missing(str(unavailable)) for name in (ONE, PROXIED, THREE, PEER)}
        return

    def flags(database: int) -> tuple[str, str]:
        return "--store", f"redis://127.0.0.1:{store.port}/{database}"

    stage.start(ONE, partial(service, flags=flags(1)))
    stage.start(PROXIED, partial(behind_nginx, count=1, flags=flags(2)))
    stage.start(THREE, partial(behind_nginx, count=3, flags=flags(3)))
    if with_peer:
        stage.start(PEER, partial(resumable_stream, store=store))


def line_of(title: str, unit: str, figures: dict[str, Figure], charted: bool = False) -> Line:
    beside = {name: figure for name, figure in figures.items() if name != ONE}
    return Line(f"{title}, {ONE}", unit, figures[ONE], beside, charted=charted)


def redis_appends(plan: Plan) -> Row:
    """Measure single appends."""
    figures: dict[int, dict[str, Figure]] = {}
    with Stage(plan, "redis-appends") as stage:
        start_all(stage)
        for count in CONNECTIONS:
            figures[count] = stage.sample(
                {name: partial(append_singly, plan, server, count, True) for name, server in stage.servers.items()}
            )
    most = figures[CONNECTIONS[-1]]
    return Row(
        "Single appends acknowledged, on Redis",
        "As in the row of single appends, over the given number of connections, to as many threads." + HOW,
        [
            line_of(f"{count} connection{'s' if count > 1 else ''}", "appends/s", figures[count])
            for count in CONNECTIONS
        ],
        f"**Redis, appends:** {most[ONE]} single appends/s over {CONNECTIONS[-1]} connections with"
        f" `appendfsync always`, {measured_share(most[ONE], most[SQLITE])} of what the SQLite file takes;"
        f" {most[THREE]} with three processes behind nginx, {measured_share(most[THREE], most[PROXIED])} of one behind"
        " nginx.",
    )


def redis_latency(plan: Plan) -> Row:
    """Measure the time from an append to its reader."""
    count = plan.scaled(400, 100)
    with Stage(plan, "redis-latency") as stage:
        start_all(stage, with_peer=True)
        taken = interleave(
            plan.rounds,
            {name: partial(time_deliveries, server, "latency", count) for name, server in stage.servers.items()},
        )
        missing = stage.missing

    def figures(percent: int) -> dict[str, Figure]:
        found = {
            name: Samples(tuple(percentile(times.delivery, percent) for times in rounds))
            for name, rounds in taken.items()
        }
        return {**missing, **found}

    half, nearly_all = figures(50), figures(99)
    return Row(
        "Latency from append to SSE reader, on Redis",
        f"As in the row of latency: one producer, one reader, {count} single appends a round, {PACE * 1000:g} ms"
        " apart; behind nginx, each of the two is with any process. resumable-stream stores nothing: its producer's"
        " process keeps the text, and Redis passes it on." + HOW,
        [line_of("p50", "ms", half), line_of("p99", "ms", nearly_all)],
        f"**Redis, latency:** {half[ONE]} ms (p50) with one process, {half[THREE]} ms with three behind nginx;"
        f" {half[SQLITE]} ms with the SQLite file.",
    )


def redis_fan_out(plan: Plan) -> Row:
    """Measure deliveries to many readers of one thread."""
    singly: dict[int, dict[str, Figure]] = {}
    with Stage(plan, "redis-fan-out") as stage:
        start_all(stage, with_peer=True)
        for readers in READERS:
            singly[readers] = stage.sample(
                {
                    name: Crowd(plan, readers, BLOCK, partial(to_readers, server, publish_singly))
                    for name, server in stage.servers.items()
                }
            )
    most = singly[READERS[-1]]
    return Row(
        "Deliveries to many readers of one thread, on Redis",
        f"As in the row of deliveries, from {PRODUCERS} producers of single chunks. resumable-stream sends each chunk"
        " through Redis once for each reader; this service sends it once to each process that has readers." + HOW,
        [line_of(f"{n:,} readers", "deliveries/s", figures) for n, figures in singly.items()],
        f"**Redis, fan-out:** {most[ONE]} deliveries/s to {READERS[-1]:,} readers with one process,"
        f" {measured_share(most[ONE], most[PEER])} of resumable-stream's on the same Redis; {most[THREE]} with three"
        " behind nginx.",
    )
