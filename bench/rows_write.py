"""Rows of producers: single appends and streamed uploads."""

from __future__ import annotations

import socket
import threading
from functools import partial

from .bare import BareTable
from .load import CHUNK, create, stored_chunks, uploads, wrk
from .plan import Plan, Stage
from .results import (
    LOAD,
    OLD,
    Aim,
    BenchError,
    Figure,
    Line,
    Row,
    at_least,
    measured_share,
    no_less_than_before,
    one_after_another,
    sampled,
)
from .servers import Server, durable_streams, handler_with_redis, nginx, old_service, peer, program, service

HANDLER = "a handler that stores nothing"
REDIS = "Redis Streams behind a handler"
DURABLE = "Durable Streams, files"
WRK_CEILING = f"{LOAD} ceiling (wrk, nginx)"
OURS = "resume-stream"
MODES = ("FULL", "NORMAL")
UPLOADS = (1, 8)  # at once
RARELY_POLLED = "FULL, and poll_interval=600s"
CONNECTIONS = (1, 8, 32)
SHARES = {  # aims, as shares of the handler's answers
    ("FULL", 1): 0.35,
    ("FULL", 8): 0.85,
    ("FULL", 32): 1.3,
    ("NORMAL", 1): 0.65,
    ("NORMAL", 32): 1.5,
}
COMMIT_AND_WIRE = "bare sqlite3's commit, and then nginx's answer"


def append_singly(plan: Plan, server: Server, connections: int, is_storing: bool, number: int) -> float:
    """Return the appends a second to new threads. The server must then hold all that it acknowledged."""
    names = f"append-{connections}-{number}-"
    threads = [f"{names}{thread}" for thread in range(1, connections + 1)]
    for thread in threads if is_storing and server.store is None else ():
        create(server, thread)
    load = wrk(server, names, connections, plan.seconds(number))
    if is_storing:
        held = sum(stored_chunks(server, thread) for thread in threads)
        # An append under way at the end may be stored but not acknowledged.
        if not load.requests <= held <= load.requests + load.refused + connections:
            raise BenchError(f"{load.requests} appends were acknowledged, and {held} are held")
    return load.requests / load.seconds


def commit_singly(plan: Plan, table: BareTable, number: int) -> float:
    return table.rows_per_second(1, plan.seconds(number))


def appends(plan: Plan) -> Row:
    """Measure single appends."""
    program("wrk")
    with Stage(plan, "appends") as stage:
        for mode in MODES:
            stage.start(mode, partial(service, flags=("--synchronous", mode)))
            stage.start(f"{OLD}, {mode}", partial(old_service, flags=("--synchronous", mode)))
        stage.start(RARELY_POLLED, partial(service, flags=("--poll-interval", "600s")))
        stage.start(HANDLER, partial(peer, module="peer_apps"))
        stage.start(REDIS, handler_with_redis)
        stage.start(DURABLE, durable_streams)
        stage.start(WRK_CEILING, nginx)
        bare = {mode: stage.enter_context(BareTable(stage.folder / f"{mode}.db", mode)) for mode in MODES}
        figures = sampled(
            plan.rounds,
            {
                **{
                    (name, count): partial(append_singly, plan, server, count, name not in (HANDLER, WRK_CEILING))
                    for name, server in stage.servers.items()
                    for count in CONNECTIONS
                },
                **{("bare", mode): partial(commit_singly, plan, table) for mode, table in bare.items()},
            },
        )
    figures |= {(name, count): missing for name, missing in stage.missing.items() for count in CONNECTIONS}

    def line(mode: str, count: int) -> Line:
        ours = figures[mode, count]
        beside = {OLD: figures[f"{OLD}, {mode}", count]}
        beside |= {name: figures[name, count] for name in (HANDLER, REDIS, DURABLE, WRK_CEILING)}
        if count == 1:
            beside["bare sqlite3, one row a commit"] = figures["bare", mode]
            beside[COMMIT_AND_WIRE] = one_after_another(figures["bare", mode], beside[WRK_CEILING])
        if mode == "FULL":
            beside[RARELY_POLLED] = figures[RARELY_POLLED, count]
        title = f"{count} connection{'s' if count > 1 else ''}, synchronous={mode}"
        return Line(title, "appends/s", ours, beside, aims(mode, count, ours, beside), mode == "FULL")

    def aims(mode: str, count: int, ours: Figure, beside: dict[str, Figure]) -> list[Aim]:
        share = SHARES.get((mode, count))
        found = [at_least(share, ours, beside[HANDLER], HANDLER)] if share else []
        if count == 1:
            found.append(at_least(0.7, ours, beside[COMMIT_AND_WIRE], COMMIT_AND_WIRE))
        return [*found, no_less_than_before(ours, beside[OLD])]

    most = figures["FULL", CONNECTIONS[-1]]
    return Row(
        "Single appends acknowledged",
        f"wrk (one thread) posts `{CHUNK.decode()}` over 1, 8, and 32 keep-alive connections, to as many threads. After"
        " each round, the chunks that the server holds are counted, and must be the acknowledged ones."
        f" {OLD.capitalize()}, here and in the other rows, comes from this project's history and runs under the same"
        " Python with the same packages. The handler is a Litestar handler under the same uvicorn settings: it reads"
        " and decodes the same body, stores nothing, and answers 201 with as many bytes. Redis is the same handler with"
        " an XADD, one connection pool, and `appendfsync always`. Durable Streams is its Node server with the file"
        " store and a stream for each thread; appends that it refuses are not counted. Both sync each append in the"
        " lines of NORMAL too. Bare sqlite3 commits one row at a time, with the writes of an append, in one process"
        " without HTTP. With the wire's round trip added, it is the rate of one such commit followed by one answer of"
        " nginx over one connection, both as measured in the same round. With a long poll_interval, only the producers"
        " themselves decide which appends a commit gathers. The load's ceiling is the same wrk against an nginx that"
        " answers 201 at once.",
        [line(mode, count) for mode in MODES for count in CONNECTIONS],
        f"**Appends:** it commits and acknowledges {most} single appends/s over 32 connections with synchronous=FULL,"
        f" {measured_share(most, figures[HANDLER, CONNECTIONS[-1]])} of what a Litestar handler answers that stores"
        " nothing.",
    )


def swallow(listener: socket.socket, count: int) -> None:
    """Read one upload of so many chunks and discard it."""
    connection, _ = listener.accept()
    with connection:
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            tail = (tail + connection.recv(256 * 1024))[-16:]
        body = b'{"chunkCount":%d}' % count
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def upload_to_nothing(count: int, number: int) -> float:
    """Return the chunks a second that the load itself can send."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=swallow, args=(listener, count), daemon=True)
        thread.start()
        rate = uploads(Server(listener.getsockname()[1], 0), ["nothing"], count)
        thread.join()
        return rate


def streamed(plan: Plan) -> Row:
    """Measure NDJSON uploads."""
    count, group = plan.scaled(200_000, 50_000), 512
    bare, ceiling = f"bare sqlite3, {group} rows a commit", f"{LOAD} ceiling (a socket that throws it away)"
    with Stage(plan, "streamed") as stage:
        stage.start(OURS, service)
        stage.start(OLD, old_service)
        table = stage.enter_context(BareTable(stage.folder / "bare.db"))

        def measure(server: Server, at_a_time: int, number: int) -> float:
            names = [f"upload-{at_a_time}-{number}-{upload}" for upload in range(at_a_time)]
            rate = uploads(server, names, count // at_a_time)
            if sum(stored_chunks(server, name) for name in names) != count:
                raise BenchError("the service does not hold all the chunks of the uploads")
            return rate

        figures = sampled(
            plan.rounds,
            {
                **{
                    (name, at_a_time): partial(measure, server, at_a_time)
                    for at_a_time in UPLOADS
                    for name, server in stage.servers.items()
                },
                (bare, 1): lambda number: table.rows_per_second(group, plan.seconds(number)),
                (ceiling, 1): partial(upload_to_nothing, count),
            },
        )
    figures |= {(name, at_a_time): missing for name, missing in stage.missing.items() for at_a_time in UPLOADS}

    def line(at_a_time: int) -> Line:
        ours, old, limit = figures[OURS, at_a_time], figures[OLD, at_a_time], figures[bare, 1]
        beside = {OLD: old, bare: limit, ceiling: figures[ceiling, 1]}
        aims = [at_least(0.5, ours, limit, bare), no_less_than_before(ours, old)]
        return Line(f"{at_a_time} upload{'s' if at_a_time > 1 else ''}", "chunks/s", ours, beside, aims, True)

    one = figures[OURS, 1]
    return Row(
        "Streamed chunks committed",
        f"{count:,} token-sized chunks in all as NDJSON, synchronous=FULL, each line as its own piece in chunked"
        " encoding, sent as fast as the server takes them; from connecting to the last answer. Bare sqlite3 writes the"
        " same rows into the same schema and updates thread and message in each commit, in one process without HTTP"
        " and JSON.",
        [line(at_a_time) for at_a_time in UPLOADS],
        f"**Streams:** it commits {one} token-sized chunks/s from one NDJSON upload with synchronous=FULL,"
        f" {measured_share(one, figures[bare, 1])} of {bare}.",
    )
