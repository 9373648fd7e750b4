"""Rows of producers: single appends, and streamed uploads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial

from .bare import BareTable
from .load import TOKEN, Load, call, stored_chunks, uploads, wrk
from .plan import Plan, figure
from .results import BenchError, Figure, Line, Row, Unavailable, at_least, ratio, sampled
from .servers import Server, durable_streams, enter, handler, handler_with_redis, nginx, program, service

BODY = '{"content":"%s"}' % TOKEN
SUFFIX = "/messages/run/chunks"
HANDLER = "a handler that stores nothing"
REDIS = "Redis Streams behind a handler"
DURABLE = "Durable Streams, files"
WRK_CEILING = "the load's own ceiling (wrk, nginx)"
BARE = "bare sqlite3"
CONNECTIONS = (1, 32)


def check_held(name: str, load: Load, held: int, connections: int) -> None:
    """All that was acknowledged is there; of what was under way at the end there may be more."""
    if not load.requests <= held <= load.requests + connections:
        raise BenchError(f"{name} acknowledged {load.requests} appends, and holds {held}")


def append_to_service(server: Server, connections: int, plan: Plan, number: int) -> float:
    prefix = f"append-{connections}-{number}-"
    load = wrk(server.port, f"/api/threads/{prefix}", connections, SUFFIX, BODY, connections, plan.seconds(number, 2))
    held = sum(stored_chunks(server.port, f"{prefix}{thread}") for thread in range(1, connections + 1))
    check_held("the service", load, held, connections)
    return load.per_second


def append_to_handler(server: Server, connections: int, plan: Plan, number: int) -> float:
    seconds = plan.seconds(number, 2)
    return wrk(server.port, "/api/threads/append-1-1-", connections, SUFFIX, BODY, connections, seconds).per_second


def append_to_redis(servers: tuple[Server, Server], connections: int, plan: Plan, number: int) -> float:
    import redis

    prefix = f"append-{connections}-{number}-"
    load = wrk(
        servers[0].port, f"/api/threads/{prefix}", connections, SUFFIX, BODY, connections, plan.seconds(number, 2)
    )
    with redis.Redis(port=servers[1].port) as client:
        held = sum(int(client.xlen(f"{prefix}{thread}")) for thread in range(1, connections + 1))
    check_held("Redis", load, held, connections)
    return load.per_second


def append_to_durable_streams(server: Server, connections: int, plan: Plan, number: int) -> float:
    prefix = f"/append-{connections}-{number}-"
    threads = range(1, connections + 1)
    for thread in threads:
        call(server.port, "PUT", f"{prefix}{thread}", extra="Content-Type: application/json\r\n")
    load = wrk(server.port, prefix, connections, "", BODY, connections, plan.seconds(number, 2))
    held = sum(len(call(server.port, "GET", f"{prefix}{thread}?offset=-1")) for thread in threads)
    check_held("Durable Streams", load, held, connections)
    return load.per_second


def appends(plan: Plan) -> Row:
    """Single appends a second."""
    program("wrk")
    folder = plan.place("appends")
    with contextlib.ExitStack() as stack:
        ours = {mode: stack.enter_context(service(folder / mode, "--synchronous", mode)) for mode in ("FULL", "NORMAL")}
        plain = stack.enter_context(handler(folder / "handler"))
        bare = {mode: stack.enter_context(BareTable(folder / f"{mode}.db", mode)) for mode in ours}
        durable = enter(stack, lambda: durable_streams(folder / "durable"))
        ceiling = enter(stack, lambda: nginx(folder / "nginx"))
        redis: tuple[Server, Server] | Unavailable
        try:
            redis = stack.enter_context(handler_with_redis(folder / "redis"))
        except Unavailable as unavailable:
            redis = unavailable
        measures: dict[str, Callable[[int], float]] = {
            f"bare {mode}": lambda number, table=table: table.rows_per_second(1, plan.seconds(number, 2))
            for mode, table in bare.items()
        }
        for count in CONNECTIONS:
            measures |= {f"{mode} {count}": partial(append_to_service, ours[mode], count, plan) for mode in ours}
            measures[f"handler {count}"] = partial(append_to_handler, plain, count, plan)
            if not isinstance(redis, Unavailable):
                measures[f"redis {count}"] = partial(append_to_redis, redis, count, plan)
            if not isinstance(durable, Unavailable):
                measures[f"durable {count}"] = partial(append_to_durable_streams, durable, count, plan)
            if not isinstance(ceiling, Unavailable):
                measures[f"ceiling {count}"] = partial(append_to_handler, ceiling, count, plan)
        figures = sampled(plan.rounds, measures)

    def line(mode: str, count: int) -> Line:
        mine, limit = figures[f"{mode} {count}"], figures[f"handler {count}"]
        beside = {
            HANDLER: limit,
            REDIS: figure(figures, f"redis {count}", redis[0] if isinstance(redis, tuple) else redis),
            DURABLE: figure(figures, f"durable {count}", durable),
            WRK_CEILING: figure(figures, f"ceiling {count}", ceiling),
        }
        if count == 1:
            beside[f"{BARE}, one row a commit"] = figures[f"bare {mode}"]
        title = f"{count} connection{'s' if count > 1 else ''}, synchronous={mode}"
        return Line(title, "appends/s", mine, beside, at_least(0.6, mine, limit, HANDLER), mode == "FULL")

    lines = [line(mode, count) for mode in ("FULL", "NORMAL") for count in CONNECTIONS]
    full = figures["FULL 32"]
    share = ratio(full, figures["handler 32"])
    return Row(
        "Single appends acknowledged",
        f"wrk (one thread) posts `{BODY}` over 1 and 32 keep-alive connections, to as many threads. After each round"
        " the chunks that the server holds are counted, and must be those that were acknowledged. The handler is"
        " Litestar's under the same uvicorn settings: it reads and decodes the same body, stores nothing, and answers"
        " 201 with as many bytes. Redis is the same handler with an XADD, one pool of connections, and `appendfsync"
        " always`; Durable Streams is its Node server with the file store, a stream for each thread. Bare sqlite3"
        " commits one row at a time with the writes of an append, in one process, with no HTTP. The load's ceiling is"
        " the same wrk against nginx that answers 201 at once.",
        lines,
        f"**Appends:** {full} single appends/s are committed and acknowledged over 32 connections with"
        f" synchronous=FULL, {share:.0%} of what a Litestar handler that stores nothing answers.",
    )


def uploaded_to_nothing(count: int) -> float:
    """Chunks a second into a socket that throws them away: the ceiling of the load itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        body = b'{"chunkCount":%d,"seq":0}' % count

        def swallow() -> None:
            connection, _ = listener.accept()
            with connection:
                tail = b""
                while not tail.endswith(b"\r\n0\r\n\r\n"):
                    tail = (tail + connection.recv(256 * 1024))[-16:]
                connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=swallow, daemon=True)
        thread.start()
        rate = uploads(listener.getsockname()[1], ["nothing"], count)
        thread.join()
        return rate


def streamed(plan: Plan) -> Row:
    """Chunks a second of NDJSON uploads."""
    count = plan.scaled(200_000, 50_000)
    group = 512
    folder = plan.place("streamed")
    with service(folder) as server, BareTable(folder / "bare.db") as bare:

        def measure(at_a_time: int, number: int) -> float:
            names = [f"upload-{at_a_time}-{number}-{upload}" for upload in range(at_a_time)]
            rate = uploads(server.port, names, count // at_a_time)
            if sum(stored_chunks(server.port, name) for name in names) != count // at_a_time * at_a_time:
                raise BenchError("the service does not hold all the chunks of the uploads")
            return rate

        figures = sampled(
            plan.rounds,
            {
                "1": partial(measure, 1),
                "bare": lambda number: bare.rows_per_second(group, plan.seconds(number, 2)),
                "8": partial(measure, 8),
                "ceiling": lambda number: uploaded_to_nothing(count),
            },
        )
    limit = figures["bare"]
    beside: dict[str, Figure] = {
        f"{BARE}, {group} rows a commit": limit,
        "the load's own ceiling (a socket that throws it away)": figures["ceiling"],
    }
    aim = f"{BARE} in groups of {group}"
    return Row(
        "Streamed chunks committed",
        f"{count:,} token-sized chunks (`{TOKEN}`) in all as NDJSON, synchronous=FULL, each line a piece of its own in"
        " chunked encoding, sent as fast as it is taken; from the first byte to the last answer. Bare sqlite3 writes"
        " the same rows into the same schema and updates thread and message in each commit, in one process, with no"
        " HTTP and no JSON.",
        [
            Line(
                f"{at_a_time} upload{'s' if at_a_time > 1 else ''}",
                "chunks/s",
                mine,
                beside,
                at_least(0.5, mine, limit, aim),
                True,
            )
            for at_a_time, mine in ((1, figures["1"]), (8, figures["8"]))
        ],
        f"**Streams:** {figures['1']} token-sized chunks/s are committed from one NDJSON upload with synchronous=FULL,"
        f" {ratio(figures['1'], limit):.0%} of bare sqlite3 in groups of {group}.",
    )
