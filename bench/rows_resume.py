"""Rows of readers that resume: from the start, near the end, and by the text they have."""

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
from .results import OLD, Line, Row, at_most_times, no_more_than_before, sampled, under
from .servers import Server, durable_streams, old_service, service

BARE = "the same rows read with bare sqlite3 and encoded"
DURABLE = "Durable Streams, files"
OURS = "resume-stream"
LAST = 10  # chunks that a reader near the end lacks


def median_ms(goes: int, measure: Callable[[], float], number: int = 0) -> float:
    """Return the median of several tries of one round, in ms."""
    return statistics.median(measure() for _ in range(goes)) * 1000


def catch_up(plan: Plan) -> Row:
    """Measure a whole history over SSE."""
    count, goes = plan.scaled(10_000, 2_000), 5
    title = f"{count:,} chunks"
    with Stage(plan, "catch-up") as stage:
        stage.start(title, service)
        stage.start(OLD, old_service)
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
    beside = {OLD: figures[OLD], BARE: bare, DURABLE: figures[DURABLE]}
    aims = [at_most_times(2, ours, bare, BARE), no_more_than_before(ours, figures[OLD])]
    return Row(
        "Catch-up of a whole history over SSE",
        f"From sending the request, on a new connection, to the last byte of {count:,} stored, token-sized chunks; the"
        f" median of {goes} tries a round. Bare is a loop in this process that reads the same rows from the same file"
        " with sqlite3, makes SSE frames of them with msgspec, and sends them nowhere.",
        [Line(title, "ms", ours, beside, aims, True)],
    )


def near_the_end(plan: Plan) -> Row:
    """Measure the last chunks of a short and of a long thread."""
    short, long, goes = 1_000, plan.scaled(1_000_000, 100_000), 100
    with Stage(plan, "near-the-end") as stage:
        stage.start(OURS, service)
        stage.start(OLD, old_service)

        def resume(server: Server, count: int) -> Callable[[int], float]:
            upload(server, f"thread-{count}", count)
            generation = call(server.port, "GET", f"/api/threads/thread-{count}")["cursor"].partition("-")[0]
            request = stream_request(server, f"thread-{count}", f"{generation}-{count - LAST}")
            return partial(median_ms, goes, partial(seconds_to_last, server.port, request, LAST))

        measures = {
            (name, count): resume(server, count) for name, server in stage.servers.items() for count in (short, long)
        }
        figures = sampled(plan.rounds, measures)
    few, many = figures[OURS, short], figures[OURS, long]
    old = figures.get((OLD, long)) or stage.missing[OLD]
    aims = [at_most_times(1.2, many, few, f"a thread of {short:,}"), no_more_than_before(many, old)]
    beside = {f"the last {LAST} of {short:,} chunks": few, OLD: old}
    return Row(
        "Resume near the end, by cursor",
        f"From sending the request with `after=`, on a new connection, to the last of {LAST} chunks; the median of"
        f" {goes} tries a round. The length of the thread should not matter.",
        [Line(f"the last {LAST} of {long:,} chunks", "ms", many, beside, aims)],
    )


def known_content(plan: Plan) -> Row:
    """Measure resuming by the text that the reader has."""
    sizes, goes = {"10 kB": 10_000, "100 kB": 100_000, "1 MB": 1_000_000}, 9
    with Stage(plan, "known-content") as stage:
        stage.start(OURS, service)
        stage.start(OLD, old_service)

        def resume(server: Server, size: int) -> Callable[[int], float]:
            request = known_text_request(server, f"text-{size}", size)
            return partial(median_ms, goes, partial(seconds_to_last, server.port, request, 1))

        measures = {
            (name, text): resume(server, size) for text, size in sizes.items() for name, server in stage.servers.items()
        }
        figures = sampled(plan.rounds, measures)
    ours = {text: figures[OURS, text] for text in sizes}
    aims = {
        "100 kB": under(10, "ms", ours["100 kB"]),
        "1 MB": at_most_times(12, ours["1 MB"], ours["100 kB"], "100 kB (linear would be 10)"),
    }

    def line(text: str) -> Line:
        old = figures.get((OLD, text)) or stage.missing[OLD]
        judged = [*([aims[text]] if text in aims else []), no_more_than_before(ours[text], old)]
        return Line(f"{text} of text", "ms", ours[text], {OLD: old}, judged)

    return Row(
        "Resume by known_content",
        "POST /api/resume-stream with all of the text but the last chunk's, which then arrives: from sending the"
        f" request, on a new connection, to that chunk. The text is stored in chunks of 5 characters; the median of"
        f" {goes} tries a round. Linear in the text means that ten times the text takes ten times as long; 12 allows"
        " for noise.",
        [line(text) for text in sizes],
    )


def known_text_request(server: Server, thread: str, size: int) -> bytes:
    """Store so much text and one more chunk, and return the request of a reader that has the text."""
    words = [f"{number % 10_000:04d} " for number in range(size // 5)]
    path = server.api.append.replace("@", thread)
    for start in range(0, len(words), 10_000):
        call(server.port, "POST", path, [{"content": word} for word in words[start : start + 10_000]])
    call(server.port, "POST", path, {"content": f"end{MARK.decode()}"})
    known = {"thread_id": thread, "message_id": "run", "known_content": "".join(words)}
    return request_bytes("POST", "/api/resume-stream", json.dumps(known).encode())
