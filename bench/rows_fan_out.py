"""The row of many live readers: deliveries a second."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

from .children import child, told
from .load import (
    CHUNK,
    MARK,
    TIMEOUT,
    TOKEN,
    append_request,
    check_status,
    connect,
    create,
    post_many,
    stream_request,
    upload,
)
from .plan import Plan, Stage
from .results import LOAD, OLD, BenchError, Figure, Line, Row, at_least, measured_share, no_less_than_before
from .servers import NCHAN, Server, durable_streams, nchan, old_service, service

OURS = "resume-stream"
UPLOAD = "one NDJSON upload"
OLD_UPLOAD = f"{OLD}, {UPLOAD}"
NCHAN_NAME = "nchan, memory only"
DURABLE = "Durable Streams, files"
PRODUCERS = 8
SINGLES = f"{PRODUCERS} producers of single chunks"
CEILING = f"{LOAD} ceiling (the same readers, a bare socket)"
UPLOAD_CEILING = f"{LOAD} ceiling (large writes)"
BLOCK = 8  # frames in one write of the bare socket
LARGE_BLOCK = 2000
SHARES = {100: 1.5, 1000: 5.0}  # aims, as shares of nchan's deliveries to so many readers
FRAME = b"id: 1763829000123-42\ndata: %s\n\n"
DATA = b'{"content":"%s","timestamp":1763829000456,"messageId":"run","seq":42}' % TOKEN.encode()


def read_streams(pipe: Connection, port: int, request: bytes, readers: int, frames: int) -> None:
    """Tell when all readers are connected, and then when the last of them had its last frame."""
    connections = [connect(port) for _ in range(readers)]
    waiting = select.epoll()
    counts, receive = {}, {}
    for connection in connections:
        connection.sendall(request)
    for connection in connections:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        check_status(head, "a stream")
        waiting.register(connection.fileno(), select.EPOLLIN)
        counts[connection.fileno()] = head.count(MARK)
        receive[connection.fileno()] = connection.recv
    pipe.send("ready")
    missing = readers * frames - sum(counts.values())
    while missing > 0:
        ready = waiting.poll(TIMEOUT)
        if not ready:
            raise BenchError(f"{missing} of {readers * frames} frames did not come")
        for descriptor, _ in ready:
            received = receive[descriptor](65536)
            if not received:
                raise BenchError(f"a stream ended, {missing} frames before the last")
            found = received.count(MARK)
            counts[descriptor] += found
            missing -= found
    ended = time.monotonic()
    if set(counts.values()) != {frames}:
        raise BenchError(f"readers got {min(counts.values())} to {max(counts.values())} frames of {frames}")
    pipe.send(ended)


def blast(pipe: Connection, listener: socket.socket, readers: int, block: int) -> None:
    """Write frames to all connections, and do nothing else."""
    connections = [listener.accept()[0] for _ in range(readers)]
    for connection in connections:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(pipe.recv() // block):
        for connection in connections:
            connection.sendall(FRAME % DATA * block)
    pipe.recv()


def deliveries(port: int, request: bytes, readers: int, frames: int, publish: Callable[[], object]) -> float:
    """Return the deliveries a second, from the first send to the last reader's last frame."""
    with child(read_streams, port, request, readers, frames) as pipe:
        told(pipe, "subscribing")
        time.sleep(0.2)
        began = time.monotonic()
        publish()
        ended: float = told(pipe, "reading")
        return readers * frames / (ended - began)


def publish_singly(server: Server, name: str, frames: int) -> None:
    body = DATA if server.api is NCHAN else CHUNK
    post_many(server.port, append_request(server, name, body), frames, PRODUCERS)


def ceiling(block: int, readers: int, name: str, frames: int) -> float:
    """Return the deliveries a second from a process that only writes."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        server = Server(listener.getsockname()[1], 0)
        with child(blast, listener, readers, block) as blaster:
            request = stream_request(server, name)
            return deliveries(server.port, request, readers, frames, partial(blaster.send, frames))


class Crowd:
    """A number of readers. The warm-up finds how many frames make a round of the right length."""

    def __init__(self, plan: Plan, readers: int, block: int, deliver: Callable[[int, str, int], float]) -> None:
        self._seconds = 1.0 if plan.quick else 1.5
        self._readers = readers
        self._block = self._frames = block
        self._deliver = deliver

    def __call__(self, number: int) -> float:
        rate = self._deliver(self._readers, f"crowd-{self._readers}-{self._block}-{number}", self._frames)
        if number == 0:
            blocks = int(rate * self._seconds / self._readers / self._block)
            self._frames = self._block * max(1, min(blocks, 100_000 // self._block))
        return rate


def to_readers(
    server: Server, publish: Callable[[Server, str, int], object], readers: int, name: str, frames: int
) -> float:
    create(server, name)
    request = stream_request(server, name)
    return deliveries(server.port, request, readers, frames, partial(publish, server, name, frames))


def measures(plan: Plan, servers: dict[str, Server], readers: int) -> dict[str, Callable[[int], float]]:
    found: dict[str, Callable[[int], float]] = {
        name: Crowd(plan, readers, BLOCK, partial(to_readers, server, publish_singly))
        for name, server in servers.items()
    }
    for name, server in ((UPLOAD, OURS), (OLD_UPLOAD, OLD)):
        if server in servers:
            found[name] = Crowd(plan, readers, LARGE_BLOCK, partial(to_readers, servers[server], upload))
    for name, block in ((CEILING, BLOCK), (UPLOAD_CEILING, LARGE_BLOCK)):
        found[name] = Crowd(plan, readers, block, partial(ceiling, block))
    return found


def fan_out(plan: Plan) -> Row:
    """Measure deliveries to many readers of one thread."""
    figures: dict[int, dict[str, Figure]] = {}
    with Stage(plan, "fan-out") as stage:
        stage.start(OURS, service)
        stage.start(OLD, old_service)
        stage.start(NCHAN_NAME, nchan)
        stage.start(DURABLE, durable_streams)
        for readers in SHARES:
            figures[readers] = stage.sample(measures(plan, stage.servers, readers))
            if OLD in stage.missing:
                figures[readers][OLD_UPLOAD] = stage.missing[OLD]

    def line(readers: int, how: str, share: float, ours: str, old: str, *beside: str) -> Line:
        taken = figures[readers]
        shown = {OLD: taken[old]} | {name: taken[name] for name in beside}
        aims = [at_least(share, taken[ours], taken[NCHAN_NAME], "nchan"), no_less_than_before(taken[ours], taken[old])]
        return Line(f"{readers:,} readers, {how}", "deliveries/s", taken[ours], shown, aims, ours == OURS)

    crowd = max(SHARES)
    most = figures[crowd]
    return Row(
        "Deliveries to many readers of one thread",
        f"All readers follow one thread over SSE, synchronous=FULL; one process counts the frames of all of them with"
        f" epoll. {PRODUCERS} producers post single chunks to every server in the same way, each awaiting its answer."
        " Time runs from the first send to the last reader's last frame; every reader must get every frame once. nchan"
        " has one worker, keeps its messages in memory, and gets data of the size of this service's frames. The chunks"
        " of an NDJSON upload are committed and sent many at a time. nchan has no counterpart, so its single messages"
        f" stand there. The ceilings are the same readers fed by a process that only writes, {BLOCK} and"
        f" {LARGE_BLOCK:,} frames at a time.",
        [
            line(readers, *how)
            for readers, share in SHARES.items()
            for how in (
                (SINGLES, share, OURS, OLD, NCHAN_NAME, DURABLE, CEILING),
                (UPLOAD, 1.0, UPLOAD, OLD_UPLOAD, NCHAN_NAME, UPLOAD_CEILING),
            )
        ],
        f"**Fan-out:** {most[OURS]} deliveries/s to {crowd:,} SSE readers of one thread, from {SINGLES}:"
        f" {measured_share(most[OURS], most[NCHAN_NAME])} of nchan's, which stores nothing on disk. {most[UPLOAD]} from"
        " one NDJSON upload.",
    )
