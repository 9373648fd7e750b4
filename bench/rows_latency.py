"""The row of one live reader: the time until a chunk arrives."""

from __future__ import annotations

import json
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection

from .bare import BareTable
from .children import child, told
from .load import MARK, TIMEOUT, Client, Stream, append_request, create, request_bytes, stream_request
from .plan import Plan, Stage
from .results import LOAD, OLD, BenchError, Figure, Line, Row, Samples, at_most_times, interleave
from .servers import Server, durable_streams, old_service, service

OURS = "resume-stream"
DURABLE = "Durable Streams, files"
DURABLE_IN_MEMORY = "Durable Streams, memory only"
POLLS = "a poll of our own every 100 ms"
ROUND_TRIP = "our append's own round trip"
COMMIT = "one commit of bare sqlite3"
RELAY = f"{LOAD} floor (a bare TCP relay)"
PACE = 0.01  # seconds from one append to the next
POLL = 0.1  # seconds from one poll to the next


@dataclass
class Times:
    """The milliseconds of each chunk of a round, until its reader had it and until its append was answered."""

    delivery: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)


def numbered(number: int) -> str:
    """Return a text that only this chunk has."""
    return f"n{number:06d}{MARK.decode()}"


def body(number: int) -> bytes:
    return json.dumps({"content": numbered(number)}).encode()


def paced(count: int) -> Iterator[int]:
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number * PACE - time.monotonic()))
        yield number


def settled(stream: Stream) -> Stream:
    """Read the stream until it is quiet, and return it: its reader now waits for new chunks."""
    while select.select([stream], [], [], 0.2)[0]:
        stream.receive()
    return stream


def time_deliveries(server: Server, names: str, count: int, number: int) -> Times:
    """Time one chunk after another, from just before its send() until recv() returned that very chunk."""
    name = f"{names}-{number}"
    create(server, name)
    times = Times()
    with (
        Stream(server.port, stream_request(server, name)) as stream,
        Client(server.port) as client,
        selectors.DefaultSelector() as selector,
    ):
        for connection in (client, settled(stream)):
            selector.register(connection, selectors.EVENT_READ)
        for chunk in paced(count):
            request, received = append_request(server, name, body(chunk)), b""
            delivered = answered = None
            sent = time.monotonic()
            client.send(request)
            while delivered is None or answered is None:
                ready = [key.fileobj for key, _ in selector.select(TIMEOUT)]
                if not ready:
                    raise BenchError(f"chunk {chunk} did not arrive within {TIMEOUT:.0f} s")
                if stream in ready:
                    received += stream.receive()
                    if MARK in received and delivered is None:
                        delivered = time.monotonic() - sent
                if client in ready and client.receive() is not None:
                    answered = time.monotonic() - sent
            if received.count(MARK) != 1 or numbered(chunk).encode() not in received:
                raise BenchError(f"chunk {chunk} was sent, and {received!r} came")
            times.delivery.append(delivered * 1000)
            times.answer.append(answered * 1000)
    return times


def time_polls(server: Server, names: str, count: int, number: int) -> Times:
    """Time each chunk until a reader that polls every 100 ms has it."""
    name = f"{names}-{number}"
    create(server, name)
    times, sent, next_poll = Times(), [], time.monotonic()
    with Client(server.port) as producer, Client(server.port) as reader:
        numbers = paced(count)
        while (seen := len(times.delivery)) < count:
            if (chunk := next(numbers, None)) is None:
                time.sleep(max(0.0, next_poll - time.monotonic()))
            else:
                sent.append(time.monotonic())
                producer.exchange(append_request(server, name, body(chunk)))
            if time.monotonic() >= next_poll:
                next_poll += POLL
                answer = reader.exchange(request_bytes("GET", f"/api/threads/{name}/chunks?after={seen}"))
                now = time.monotonic()
                found = [entry["content"] for entry in json.loads(answer)["chunks"]]
                if found != [numbered(number) for number in range(seen, len(sent))]:
                    raise BenchError("a poll gave other chunks than those that were sent")
                times.delivery += [(now - at) * 1000 for at in sent[seen:]]
    return times


def relay(pipe: Connection) -> None:
    """Pass a producer's bytes on to a reader, and answer the producer: the least that a delivery can take."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        create_first, _ = listener.accept()
        create_first.recv(65536)
        create_first.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        reader, _ = listener.accept()
        reader.recv(65536)
        reader.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        producer, _ = listener.accept()
        for connection in (reader, producer):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while sent := producer.recv(65536):
            reader.sendall(sent)
            producer.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")


def time_relay(count: int, number: int) -> Times:
    with child(relay) as pipe:
        return time_deliveries(Server(told(pipe, "the relay"), 0), "relay", count, number)


def time_commits(table: BareTable, count: int, number: int) -> Times:
    times = Times()
    for chunk in paced(count):
        began = time.monotonic()
        table.commit([numbered(chunk)])
        times.answer.append((time.monotonic() - began) * 1000)
    return times


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def latency(plan: Plan) -> Row:
    """Measure the time from an append to its reader."""
    count = plan.scaled(400, 100)
    with Stage(plan, "latency") as stage:
        stage.start(OURS, service)
        stage.start(OLD, old_service)
        stage.start(DURABLE, durable_streams)
        stage.start(DURABLE_IN_MEMORY, partial(durable_streams, in_memory=True))
        table = stage.enter_context(BareTable(stage.folder / "bare.db"))
        measures: dict[str, Callable[[int], Times]] = {
            name: partial(time_deliveries, server, "latency", count) for name, server in stage.servers.items()
        }
        measures[POLLS] = partial(time_polls, stage.servers[OURS], "poll", count)
        measures[RELAY] = partial(time_relay, count)
        measures[COMMIT] = partial(time_commits, table, count)
        taken = interleave(plan.rounds, measures)
    check_floor(taken)
    lines = [latency_line(taken, stage, 50), latency_line(taken, stage, 99)]
    return Row(
        "Latency from append to SSE reader",
        f"One producer, one reader, no other load, synchronous=FULL, {count} single appends a round, {PACE * 1000:g} ms"
        " apart. One process has both connections and one monotonic clock. Each chunk is numbered; its time runs from"
        " just before its send() to the recv() that brought its number. The relay is a process that passes a producer's"
        " bytes on to a reader: no delivery can be faster, and the run fails if one seems to be. The poll asks for"
        " `/chunks?after=` every 100 ms.",
        lines,
        f"**Latency:** a reader has a chunk {lines[0].ours} ms (p50) after the producer sent it, commit with"
        f" synchronous=FULL included; p99 {lines[1].ours} ms.",
    )


def check_floor(taken: dict[str, list[Times]]) -> None:
    least, floor = (min(min(times.delivery) for times in taken[name]) for name in (OURS, RELAY))
    if least < floor:
        raise BenchError(f"a chunk came after {least} ms, which is less than a bare relay takes ({floor} ms)")


def latency_line(taken: dict[str, list[Times]], stage: Stage, percent: int) -> Line:
    def samples(name: str, of: Callable[[Times], list[float]]) -> Figure:
        if name in stage.missing:
            return stage.missing[name]
        return Samples(tuple(percentile(of(times), percent) for times in taken[name]))

    beside = {
        name: samples(name, lambda times: times.delivery) for name in (OLD, DURABLE, DURABLE_IN_MEMORY, POLLS, RELAY)
    }
    beside |= {
        ROUND_TRIP: samples(OURS, lambda times: times.answer),
        COMMIT: samples(COMMIT, lambda times: times.answer),
    }
    ours = samples(OURS, lambda times: times.delivery)
    aims = [
        at_most_times(0.65, ours, beside[OLD], OLD),
        at_most_times(1.5, ours, beside[DURABLE_IN_MEMORY], DURABLE_IN_MEMORY),
    ]
    return Line(f"p{percent}", "ms", ours, beside, aims if percent == 50 else (), percent == 50)
