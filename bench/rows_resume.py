"""Rows of readers who come back: a whole history, its last bit, and by the text they have."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial

from .bare import frames_of
from .load import (
    CHUNK,
    MARK,
    append_request,
    call,
    create,
    post_many,
    request_bytes,
    seconds_to_last,
    stream_request,
    upload,
)
from .plan import Plan, Stage
from .results import Line, Row, at_most_times, under
from .servers import Server, durable_streams, service

BARE = "the same rows read with bare sqlite3 and encoded"
DURABLE = "Durable Streams, files"
LAST = 10  # chunks that a reader near the end does not have yet


def median_ms(goes: int, measure: Callable[[], float], number: int = 0) -> float:
    """The median of several goes of one round, in ms."""
    return statistics.median(measure() for _ in range(goes)) * 1000


def catch_up(plan: Plan) -> Row:
    """A whole history over SSE."""
    count, goes = plan.scaled(10_000, 2_000), 5
    title = f"{count:,} chunks"
    with Stage(plan, "catch-up") as stage:
        stage.start(title, service)
        stage.start(DURABLE, durable_streams)
        for server in stage.servers.values():
            create(server, "history")
            post_many(server.port, append_request(server, "history", CHUNK), count, 32)
        measures: dict[str, Callable[[int], float]] = {
            name: partial(
                median_ms, goes, partial(seconds_to_last, server.port, stream_request(server, "history"), count)
            )
            for name, server in stage.servers.items()
        }
        database = stage.folder / "server-0" / "chunks.db"
        measures[BARE] = partial(median_ms, goes, partial(frames_of, database, count))
        figures = stage.sample(measures)
    ours, bare = figures[title], figures[BARE]
    beside = {BARE: bare, DURABLE: figures[DURABLE]}
    return Row(
        "Catch-up of a whole history over SSE",
        f"From sending the request, on a new connection, to the last byte of {count:,} token-sized chunks that are all"
        f" stored; the median of {goes} goes a round. Bare is a loop in this process that reads the same rows from"
        " the same file with sqlite3 and makes SSE frames of them with msgspec, and sends them nowhere.",
        [Line(title, "ms", ours, beside, at_most_times(2, ours, bare, BARE), True)],
    )


def near_the_end(plan: Plan) -> Row:
    """The last chunks of a short and of a long thread."""
    short, long, goes = 1_000, plan.scaled(1_000_000, 100_000), 100
    with Stage(plan, "near-the-end") as stage:
        server = stage.enter_context(service(stage.folder))

        def resume(count: int) -> Callable[[int], float]:
            upload(server, f"thread-{count}", count)
            generation = call(server.port, "GET", f"/api/threads/thread-{count}")["cursor"].partition("-")[0]
            request = stream_request(server, f"thread-{count}", f"{generation}-{count - LAST}")
            return partial(median_ms, goes, partial(seconds_to_last, server.port, request, LAST))

        names = {count: f"the last {LAST} of {count:,} chunks" for count in (short, long)}
        figures = stage.sample({name: resume(count) for count, name in names.items()})
    few, many = figures[names[short]], figures[names[long]]
    aim = at_most_times(1.2, many, few, f"a thread of {short:,}")
    return Row(
        "Resume near the end, by cursor",
        f"From sending the request with `after=`, on a new connection, to the last of {LAST} chunks; the median of"
        f" {goes} goes a round. The aim is that the length of the thread does not matter.",
        [Line(names[long], "ms", many, {names[short]: few}, aim)],
    )


def known_content(plan: Plan) -> Row:
    """Resume by the text that the reader has."""
    sizes, goes = {"10 kB": 10_000, "100 kB": 100_000, "1 MB": 1_000_000}, 9
    with Stage(plan, "known-content") as stage:
        server = stage.enter_context(service(stage.folder))
        requests = {name: known_text_request(server, f"text-{size}", size) for name, size in sizes.items()}
        figures = stage.sample(
            {
                name: partial(median_ms, goes, partial(seconds_to_last, server.port, request, 1))
                for name, request in requests.items()
            }
        )
    aims = {
        "10 kB": None,
        "100 kB": under(10, "ms", figures["100 kB"]),
        "1 MB": at_most_times(12, figures["1 MB"], figures["100 kB"], "100 kB (linear would be 10)"),
    }
    return Row(
        "Resume by known_content",
        "POST /api/resume-stream with all the text but the last chunk's, which is then what comes: from sending the"
        f" request, on a new connection, to that chunk. The text is stored in chunks of 5 characters; the median of"
        f" {goes} goes a round. Linear in the text means that ten times the text takes ten times as long; 12 is allowed"
        " for noise.",
        [Line(f"{name} of text", "ms", figures[name], {}, aim) for name, aim in aims.items()],
    )


def known_text_request(server: Server, thread: str, size: int) -> bytes:
    """Store so much text and one chunk more; the request of a reader that has the text."""
    words = [f"{number % 10_000:04d} " for number in range(size // 5)]
    path = server.api.append.replace("@", thread)
    for start in range(0, len(words), 10_000):
        call(server.port, "POST", path, [{"content": word} for word in words[start : start + 10_000]])
    call(server.port, "POST", path, {"content": f"end{MARK.decode()}"})
    known = {"thread_id": thread, "message_id": "run", "known_content": "".join(words)}
    return request_bytes("POST", "/api/resume-stream", json.dumps(known).encode())
