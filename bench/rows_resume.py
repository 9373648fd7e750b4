"""Rows of readers who come back: a whole history, its last bit, and by the text they have."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable
from functools import partial

from .bare import frames_of
from .load import (
    MARK,
    TOKEN,
    call,
    chunks_path,
    post_many,
    request_bytes,
    seconds_to_last,
    sse_request,
    stream_path,
    upload,
)
from .plan import Plan, figure
from .results import Line, Row, at_most_times, sampled, under
from .servers import Server, durable_streams, enter, service

DURABLE = "Durable Streams, files"
LAST = 10  # chunks that a reader near the end does not have yet


def median_ms(times: int, measure: Callable[[], float], number: int) -> float:
    """The median of several goes in one round, in ms; one in the warm-up round would not warm much."""
    return statistics.median(measure() for _ in range(times)) * 1000


def catch_up(plan: Plan) -> Row:
    """A whole history over SSE."""
    count, times = plan.scaled(10_000, 2_000), 5
    folder = plan.place("catch-up")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(service(folder))
        upload(server.port, "history", count)
        request = sse_request(stream_path("history"))
        measures: dict[str, Callable[[int], float]] = {
            "ours": partial(median_ms, times, lambda: seconds_to_last(server.port, request, count)),
            "bare": partial(median_ms, times, lambda: frames_of(folder / "chunks.db", count)),
        }
        durable = enter(stack, lambda: durable_streams(folder / "durable"))
        if isinstance(durable, Server):
            fill_durable_streams(durable.port, count)
            peer = sse_request("/history?offset=-1&live=sse")
            port = durable.port
            measures["durable"] = partial(median_ms, times, lambda: seconds_to_last(port, peer, count))
        figures = sampled(plan.rounds, measures)
    bare = "the same rows read with bare sqlite3 and encoded"
    line = Line(
        f"{count:,} chunks",
        "ms",
        figures["ours"],
        {bare: figures["bare"], DURABLE: figure(figures, "durable", durable)},
        at_most_times(2, figures["ours"], figures["bare"], bare),
        True,
    )
    return Row(
        "Catch-up of a whole history over SSE",
        f"From sending the request, on a new connection, to the last byte of {count:,} token-sized chunks that are all"
        f" stored; the median of {times} goes a round. Bare is a loop in this process that reads the same rows from"
        " the same file with sqlite3 and makes SSE frames of them with msgspec, and sends them nowhere. Durable"
        " Streams has as many messages, appended one by one.",
        [line],
    )


def fill_durable_streams(port: int, count: int) -> None:
    call(port, "PUT", "/history", extra="Content-Type: application/json\r\n")
    post_many(port, request_bytes("POST", "/history", json.dumps({"content": TOKEN}).encode()), count, 16)


def near_the_end(plan: Plan) -> Row:
    """The last chunks of a short and of a long thread."""
    short, long, times = 1_000, plan.scaled(1_000_000, 100_000), 100
    with service(plan.place("near-the-end")) as server:
        for count in (short, long):
            upload(server.port, f"thread-{count}", count)

        def resume(count: int) -> float:
            cursor = call(server.port, "GET", f"/api/threads/thread-{count}")["cursor"]
            after = f"{cursor.partition('-')[0]}-{count - LAST}"
            request = sse_request(stream_path(f"thread-{count}", after))
            return statistics.median(seconds_to_last(server.port, request, LAST) for _ in range(times)) * 1000

        figures = sampled(plan.rounds, {"short": lambda number: resume(short), "long": lambda number: resume(long)})
    other = f"a thread of {short:,}"
    line = Line(
        f"the last {LAST} of {long:,} chunks",
        "ms",
        figures["long"],
        {f"the last {LAST} of {short:,} chunks": figures["short"]},
        at_most_times(1.2, figures["long"], figures["short"], other),
    )
    return Row(
        "Resume near the end, by cursor",
        f"From sending the request with `after=`, on a new connection, to the last of {LAST} chunks; the median of"
        f" {times} goes a round. The aim is that the length of the thread does not matter.",
        [line],
        f"**Resume:** a reader that lacks the last {LAST} chunks of {long:,} has them {figures['long']} ms after its"
        f" request; of {short:,}, after {figures['short']} ms.",
    )


def known_content(plan: Plan) -> Row:
    """Resume by the text that the reader has."""
    sizes = {"10 kB": 10_000, "100 kB": 100_000, "1 MB": 1_000_000}
    with service(plan.place("known-content")) as server:
        requests = {name: known_text_request(server.port, name.replace(" ", "-"), size) for name, size in sizes.items()}
        figures = sampled(
            plan.rounds,
            {
                name: partial(median_ms, 9, partial(seconds_to_last, server.port, request, 1))
                for name, request in requests.items()
            },
        )
    aims = {
        "10 kB": None,
        "100 kB": under(10, "ms", figures["100 kB"]),
        "1 MB": at_most_times(12, figures["1 MB"], figures["100 kB"], "100 kB (linear would be 10)"),
    }
    return Row(
        "Resume by known_content",
        "POST /api/resume-stream with all the text but the last chunk's, which is then what comes: from sending the"
        " request, on a new connection, to that chunk. The text is stored in chunks of 5 characters; the median of 9"
        " goes a round. Linear in the text means that ten times the text takes ten times as long; 12 is allowed for"
        " noise.",
        [Line(f"{name} of text", "ms", figures[name], {}, aim) for name, aim in aims.items()],
    )


def known_text_request(port: int, thread: str, size: int) -> bytes:
    """Store so much text and one chunk more; the request of a reader that has the text."""
    words = [f"{number:04d} "[-5:] for number in range(size // 5)]
    body = [{"content": word} for word in words]
    for start in range(0, len(body), 10_000):
        call(port, "POST", chunks_path(thread), body[start : start + 10_000])
    call(port, "POST", chunks_path(thread), {"content": f"end{MARK.decode()}"})
    known = {"thread_id": thread, "message_id": "run", "known_content": "".join(words)}
    return sse_request("/api/resume-stream", "POST", json.dumps(known).encode())
