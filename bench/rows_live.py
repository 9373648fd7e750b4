"""Rows of live readers: how soon a chunk arrives, and how many readers can be served."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from .bare import BareTable
from .load import (
    MARK,
    TIMEOUT,
    TOKEN,
    Client,
    Stream,
    call,
    checked_status,
    chunks_path,
    connect,
    open_thread,
    post_many,
    request_bytes,
    sse_request,
    stream_path,
    upload,
)
from .plan import Plan, figure
from .results import BenchError, Figure, Line, Row, Samples, Unavailable, at_least, interleave, ratio, sampled, under
from .servers import Server, durable_streams, enter, nchan, service

DURABLE = "Durable Streams, files"
PACE = 0.01  # seconds from one append to the next
POLL = 0.1  # seconds from one poll to the next
PRODUCERS = 8
BLOCK = 8  # frames that the blaster writes at a time


@contextlib.contextmanager
def child(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process of this code with a pipe to it, gone at the end of the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work, theirs, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _work(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        work(pipe, *arguments)
    except Exception as error:
        pipe.send(error)


def told(pipe: Connection, what: str) -> Any:
    """What the child says. Raises what it failed with, or BenchError when it says nothing."""
    if not pipe.poll(TIMEOUT):
        raise BenchError(f"{what}: nothing for {TIMEOUT:.0f} s")
    said = pipe.recv()
    if isinstance(said, Exception):
        raise BenchError(f"{what}: {said}")
    return said


# Latency


@dataclass
class Times:
    """Milliseconds of one round, a chunk each: until its reader had it, and until its append was answered."""

    delivery: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)


def numbered(number: int) -> str:
    """The text of a chunk that cannot be taken for another."""
    return f"n{number:06d}{MARK.decode()}"


def paced(count: int) -> Iterator[int]:
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number * PACE - time.monotonic()))
        yield number


def append_request(path: str, number: int) -> bytes:
    return request_bytes("POST", path, json.dumps({"content": numbered(number)}).encode())


def time_deliveries(client: Client, stream: Stream, path: str, count: int) -> Times:
    """One chunk under way at a time, from just before its send() until recv() gave that very chunk."""
    times = Times()
    with selectors.DefaultSelector() as selector:
        for connection in (client, stream):
            selector.register(connection, selectors.EVENT_READ)
        for number in paced(count):
            request, received = append_request(path, number), b""
            delivered = answered = None
            sent = time.monotonic()
            client.send(request)
            while delivered is None or answered is None:
                ready = [key.fileobj for key, _ in selector.select(TIMEOUT)]
                if not ready:
                    raise BenchError(f"chunk {number} did not arrive within {TIMEOUT:.0f} s")
                if stream in ready:
                    received += stream.receive()
                    now = time.monotonic()
                    if MARK in received and delivered is None:
                        delivered = now - sent
                if client in ready and client.receive() is not None:
                    answered = time.monotonic() - sent
            if received.count(MARK) != 1 or numbered(number).encode() not in received:
                raise BenchError(f"chunk {number} was sent, and {received!r} came")
            times.delivery.append(delivered * 1000)
            times.answer.append(answered * 1000)
    return times


def latency_of_service(server: Server, count: int, number: int) -> Times:
    thread = f"latency-{number}"
    open_thread(server.port, thread)
    with Stream(server.port, sse_request(stream_path(thread))) as stream, Client(server.port) as client:
        return time_deliveries(client, settled(stream), chunks_path(thread), count)


def latency_of_durable_streams(server: Server, count: int, number: int) -> Times:
    path = f"/latency-{number}"
    call(server.port, "PUT", path, extra="Content-Type: application/json\r\n")
    with Stream(server.port, sse_request(f"{path}?offset=-1&live=sse")) as stream, Client(server.port) as client:
        return time_deliveries(client, settled(stream), path, count)


def settled(stream: Stream) -> Stream:
    """The stream once it has been quiet for a while: its reader waits for what is new."""
    while select.select([stream], [], [], 0.2)[0]:
        stream.receive()
    return stream


def latency_of_polls(server: Server, count: int, number: int) -> Times:
    """Until a reader that asks for what is new every 100 ms has each chunk."""
    thread = f"poll-{number}"
    open_thread(server.port, thread)
    times, sent, seen, next_poll = Times(), [], 0, time.monotonic()
    with Client(server.port) as producer, Client(server.port) as reader:
        numbers = paced(count)
        while seen < count:
            if (chunk := next(numbers, None)) is not None:
                sent.append(time.monotonic())
                producer.exchange(append_request(chunks_path(thread), chunk))
            else:
                time.sleep(max(0.0, next_poll - time.monotonic()))
            if time.monotonic() >= next_poll:
                next_poll += POLL
                path = f"/api/threads/{thread}/chunks?after={seen}"
                found = json.loads(reader.exchange(request_bytes("GET", path)))["chunks"]
                now = time.monotonic()
                if [entry["content"] for entry in found] != [numbered(n) for n in range(seen, seen + len(found))]:
                    raise BenchError("a poll gave other chunks than those that were sent")
                times.delivery += [(now - at) * 1000 for at in sent[seen : seen + len(found)]]
                seen += len(found)
    return times


def relay(pipe: Connection) -> None:
    """Pass what a producer sends on to a reader, and answer it: the least that a delivery can take."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        reader, _ = listener.accept()
        reader.recv(65536)
        reader.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        producer, _ = listener.accept()
        for connection in (reader, producer):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while sent := producer.recv(65536):
            reader.sendall(sent)
            producer.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")


def latency_of_relay(count: int, number: int) -> Times:
    with child(relay) as pipe:
        port = told(pipe, "the relay")
        with Stream(port, sse_request("/")) as stream, Client(port) as client:
            return time_deliveries(client, stream, "/", count)


def latency_of_commits(bare: BareTable, count: int, number: int) -> Times:
    times = Times()
    for chunk in paced(count):
        began = time.monotonic()
        bare.commit([numbered(chunk)])
        times.answer.append((time.monotonic() - began) * 1000)
    return times


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def latency(plan: Plan) -> Row:
    """From an append to its reader."""
    count = plan.scaled(400, 100)
    folder = plan.place("latency")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(service(folder))
        bare = stack.enter_context(BareTable(folder / "bare.db"))
        durable = enter(stack, lambda: durable_streams(folder / "durable"))
        measures: dict[str, Callable[[int], Times]] = {
            "ours": partial(latency_of_service, server, count),
            "polls": partial(latency_of_polls, server, count),
            "relay": partial(latency_of_relay, count),
            "commits": partial(latency_of_commits, bare, count),
        }
        if not isinstance(durable, Unavailable):
            measures["durable"] = partial(latency_of_durable_streams, durable, count)
        taken = interleave(plan.rounds, measures)
    least, floor = (min(min(times.delivery) for times in taken[name]) for name in ("ours", "relay"))
    if least < floor:
        raise BenchError(f"a chunk came after {least} ms, which is less than a bare relay takes ({floor} ms)")

    def line(percent: int) -> Line:
        delivery: dict[str, Figure] = {
            name: Samples(tuple(percentile(times.delivery, percent) for times in rounds))
            for name, rounds in taken.items()
            if name != "commits"
        }
        answer = {
            name: Samples(tuple(percentile(times.answer, percent) for times in taken[name]))
            for name in ("ours", "commits")
        }
        beside = {
            DURABLE: figure(delivery, "durable", durable),
            "a poll of our own every 100 ms": delivery["polls"],
            "our append's own round trip": answer["ours"],
            "one commit of bare sqlite3": answer["commits"],
            "the load's own floor (a bare TCP relay)": delivery["relay"],
        }
        aim = under(1, "ms", delivery["ours"]) if percent == 50 else None
        return Line(f"p{percent}", "ms", delivery["ours"], beside, aim, percent == 50)

    lines = [line(50), line(99)]
    return Row(
        "Latency from append to SSE reader",
        f"One producer, one reader, no other load, synchronous=FULL, {count} single appends a round, {PACE * 1000:g} ms"
        " apart. One process has both connections and one monotonic clock; each chunk is numbered, and its time goes"
        " from just before its send() to the recv() that brought that number. The relay is a process that passes a"
        " producer's bytes on to a reader: no delivery can be quicker. The poll asks for `/chunks?after=` every 100 ms.",
        lines,
        f"**Latency:** a chunk is with its reader {lines[0].ours} ms (p50) after its append was sent, commit with"
        f" synchronous=FULL included; p99 {lines[1].ours} ms.",
    )


# Fan-out


def read_streams(pipe: Connection, port: int, request: bytes, readers: int, frames: int) -> None:
    """Say when all readers are there, and then when the last of them had its last frame."""
    connections = [_subscribed(port, request) for _ in range(readers)]
    waiting = select.epoll()
    counts = {}
    for connection in connections:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        checked_status(head, "a stream")
        counts[connection.fileno()] = head.count(MARK)
        waiting.register(connection.fileno(), select.EPOLLIN)
    receive = {connection.fileno(): connection.recv for connection in connections}
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


def _subscribed(port: int, request: bytes) -> socket.socket:
    connection = connect(port)
    connection.sendall(request)
    return connection


def blast(pipe: Connection, listener: socket.socket, readers: int) -> None:
    """Write frames to all who connect, with nothing else to do: what the readers can take."""
    frame = b'id: 1763829000123-42\ndata: {"content":"%s","timestamp":1763829000456,"messageId":"run","seq":42}\n\n'
    block = frame % TOKEN.encode() * BLOCK
    connections = []
    for _ in range(readers):
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        connections.append(connection)
    for _ in range(pipe.recv() // BLOCK):
        for connection in connections:
            connection.sendall(block)
    pipe.recv()


@dataclass
class Crowd:
    """One way to reach readers; ``frames`` a round, so that a round takes about ``seconds``."""

    port: int
    readers: int
    prepare: Callable[[str], object]
    subscription: Callable[[str], bytes]
    publish: Callable[[str, int], object]
    seconds: float
    frames: int = 2 * BLOCK

    def measure(self, number: int) -> float:
        """Deliveries a second; the warm-up finds out how many frames a round can have."""
        name = f"crowd-{self.readers}-{self.frames}-{number}"
        self.prepare(name)
        rate = self._deliver(name)
        if number == 0:
            self.frames = max(2 * BLOCK, min(50_000, int(rate * self.seconds / self.readers))) // BLOCK * BLOCK
        return rate

    def _deliver(self, name: str) -> float:
        with child(read_streams, self.port, self.subscription(name), self.readers, self.frames) as pipe:
            told(pipe, f"{name}: subscribing")
            time.sleep(0.2)
            began = time.monotonic()
            self.publish(name, self.frames)
            return self.readers * self.frames / (told(pipe, f"{name}: reading") - began)


def crowds(plan: Plan, servers: dict[str, Server | Unavailable], readers: int) -> dict[str, Crowd]:
    """Each server that is there, with so many readers of one thread."""
    seconds = 1.0 if plan.quick else 2.0
    body = json.dumps({"content": TOKEN}).encode()
    data = b'{"content":"%s","timestamp":1763829000456,"messageId":"run","seq":42}' % TOKEN.encode()
    found = {}
    if isinstance(server := servers["ours"], Server):
        port = server.port
        found["single"] = Crowd(
            port,
            readers,
            lambda name, port=port: open_thread(port, f"s-{name}"),
            lambda name: sse_request(stream_path(f"s-{name}")),
            lambda name, count, port=port: post_many(
                port, request_bytes("POST", chunks_path(f"s-{name}"), body), count, PRODUCERS
            ),
            seconds,
        )
        found["upload"] = Crowd(
            port,
            readers,
            lambda name, port=port: open_thread(port, f"u-{name}"),
            lambda name: sse_request(stream_path(f"u-{name}")),
            lambda name, count, port=port: upload(port, f"u-{name}", count),
            seconds,
            1000,
        )
    if isinstance(server := servers["nchan"], Server):
        port = server.port
        found["nchan"] = Crowd(
            port,
            readers,
            lambda name: None,
            lambda name: sse_request(f"/sub/{name}"),
            lambda name, count, port=port: post_many(
                port, request_bytes("POST", f"/pub/{name}", data), count, PRODUCERS
            ),
            seconds,
        )
    if isinstance(server := servers["durable"], Server):
        port = server.port
        found["durable"] = Crowd(
            port,
            readers,
            lambda name, port=port: call(port, "PUT", f"/{name}", extra="Content-Type: application/json\r\n"),
            lambda name: sse_request(f"/{name}?offset=-1&live=sse"),
            lambda name, count, port=port: post_many(port, request_bytes("POST", f"/{name}", body), count, PRODUCERS),
            seconds,
        )
    return found


def ceiling(readers: int, number: int) -> float:
    """Frames a second that the reading process can count."""
    frames = (20 if number == 0 else 400_000 // readers) // BLOCK * BLOCK
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        port = listener.getsockname()[1]
        with (
            child(blast, listener, readers) as blaster,
            child(read_streams, port, sse_request("/"), readers, frames) as pipe,
        ):
            told(pipe, "the ceiling: subscribing")
            began = time.monotonic()
            blaster.send(frames)
            return readers * frames / (told(pipe, "the ceiling: reading") - began)


def fan_out(plan: Plan) -> Row:
    """Deliveries a second to many readers of one thread."""
    sizes = (100, 1000)
    folder = plan.place("fan-out")
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server | Unavailable] = {
            "ours": stack.enter_context(service(folder / "ours")),
            "nchan": enter(stack, lambda: nchan(folder / "nchan")),
            "durable": enter(stack, lambda: durable_streams(folder / "durable")),
        }
        figures = {}
        for readers in sizes:
            measures = {name: crowd.measure for name, crowd in crowds(plan, servers, readers).items()}
            figures[readers] = sampled(plan.rounds, {**measures, "ceiling": partial(ceiling, readers)})

    def lines(readers: int) -> list[Line]:
        taken = figures[readers]
        limit = figure(taken, "nchan", servers["nchan"])
        load = {"the load's own ceiling (the same readers, a bare socket)": taken["ceiling"]}
        peers = {"nchan, memory only": limit, DURABLE: figure(taken, "durable", servers["durable"]), **load}
        return [
            Line(
                f"{readers:,} readers, {PRODUCERS} producers of single chunks",
                "deliveries/s",
                taken["single"],
                peers,
                at_least(1, taken["single"], limit, "nchan"),
                True,
            ),
            Line(
                f"{readers:,} readers, one NDJSON upload",
                "deliveries/s",
                taken["upload"],
                {"nchan, memory only, single messages": limit, **load},
                at_least(1, taken["upload"], limit, "nchan"),
            ),
        ]

    most = figures[sizes[-1]]
    nchan_limit = figure(most, "nchan", servers["nchan"])
    beside_nchan = (
        f" ({ratio(single, nchan_limit):.2f} times nchan, which stores nothing on disk)"
        if isinstance(nchan_limit, Samples) and isinstance(single := most["single"], Samples)
        else ""
    )
    return Row(
        "Deliveries to many readers of one thread",
        f"All readers follow one thread over SSE, synchronous=FULL; a process counts the frames of all of them with"
        f" epoll. {PRODUCERS} producers post single chunks, each awaiting its answer, in the same way to every server;"
        " from the first send to the last reader's last frame, and every reader must get every frame once. nchan has"
        " one worker, keeps its messages in memory, and is given data of the same size. This service commits together"
        f" what came meanwhile (here up to {PRODUCERS} chunks) and writes a commit's frames at once; of an NDJSON"
        " upload it commits far more at once, for which nchan has no counterpart, so its single messages stand there."
        f" The ceiling is the same reading process fed by a process that does nothing but write, {BLOCK} frames at a"
        " time.",
        [line for readers in sizes for line in lines(readers)],
        f"**Fan-out:** {most['single']} deliveries/s to {sizes[-1]:,} SSE readers of one thread, from {PRODUCERS}"
        f" producers of single chunks{beside_nchan}.",
    )
