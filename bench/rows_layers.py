"""The row of layers: where the processor time of an append and of a delivery goes."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .load import CHUNK, MARK, TIMEOUT, Client, Stream, append_request, create, stream_request, wrk
from .plan import Plan, Stage
from .results import OLD, BenchError, Figure, Line, Row, Samples, Stack, Unavailable, interleave
from .servers import Api, Server, old_service, peer, program, service

OURS = "resume-stream"
LAYERS = {  # by their names in bench.peer_layers; each includes those before it
    "sockets": "sockets and event loop",
    "parsed": "HTTP parser",
    "asgi": "uvicorn",
    "litestar": "Litestar",
}
LAYER = Api("/api/threads/@/messages/run/chunks", "/api/threads/@/stream")
ON_THE_LOOP = "this service, on the event loop"
OTHER_THREADS = "its other threads: SQL, commit, sync"
PRODUCERS = 32


@dataclass(frozen=True)
class Cost:
    """Microseconds of processor time of one operation, in the event loop's thread and in the others."""

    loop: float
    others: float = 0.0

    @property
    def total(self) -> float:
        return self.loop + self.others


def processor_time(pid: int) -> Cost:
    """Return the processor time of a process's threads so far, in microseconds. Raise Unavailable."""
    spent = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            spent[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1000
    if pid not in spent:
        raise Unavailable("the kernel does not tell the processor time of threads (schedstat)")
    return Cost(spent.pop(pid), sum(spent.values()))


def cost(server: Server, work: Callable[[], int]) -> Cost:
    """Do the work, and return the cost of each of its operations. The work returns their number."""
    before = processor_time(server.pid)
    count = work()
    after = processor_time(server.pid)
    return Cost((after.loop - before.loop) / count, (after.others - before.others) / count)


def cost_of_append(plan: Plan, server: Server, number: int) -> Cost:
    return cost(server, lambda: wrk(server, f"layer-{number}-", PRODUCERS, plan.seconds(number)).requests)


def cost_of_delivery(server: Server, readers: int, chunks: int, number: int) -> Cost:
    """Send one chunk at a time, the next once all readers have it: a write for each reader."""
    name = f"layer-{number}"
    create(server, name)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.port, stream_request(server, name))) for _ in range(readers)]
        waiting = stack.enter_context(contextlib.closing(select.epoll()))
        by_descriptor = {stream.fileno(): stream for stream in streams}
        for descriptor in by_descriptor:
            waiting.register(descriptor, select.EPOLLIN)
        client = stack.enter_context(Client(server.port))

        def deliver() -> int:
            for _ in range(chunks):
                client.exchange(append_request(server, name, CHUNK))
                missing = readers
                while missing > 0:
                    if not (ready := waiting.poll(TIMEOUT)):
                        raise BenchError(f"{missing} of {readers} readers did not get a chunk")
                    missing -= sum(by_descriptor[descriptor].receive().count(MARK) for descriptor, _ in ready)
            return readers * chunks

        return cost(server, deliver)


def parts(totals: list[float], service: Samples, others: Samples) -> dict[str, float]:
    """Return what each layer adds to those before it. The last two parts are the service's own."""
    names = [*list(LAYERS.values())[: len(totals)], ON_THE_LOOP, OTHER_THREADS]
    ends = [*totals, service.median - others.median, service.median]
    found, start = {}, 0.0
    for name, total in zip(names, ends, strict=True):
        end = min(max(start, total), service.median)
        found[name], start = end - start, end
    return found


def layers(plan: Plan) -> Row:
    """Measure processor time by layer, of the old version and of this one."""
    program("wrk")
    readers, chunks = plan.scaled(1_000, 200), plan.scaled(30, 10)
    costs: dict[str, dict[str, list[Cost]]] = {}
    with Stage(plan, "layers") as stage:
        stage.start(OURS, service)
        stage.start(OLD, old_service)
        for name in LAYERS:
            stage.start(name, partial(peer, module="peer_layers", arguments=[name], api=LAYER))
        append, delivery = f"an append, {PRODUCERS} connections", f"a delivery, {readers:,} readers"
        for what, measure in (
            (append, partial(cost_of_append, plan)),
            (delivery, lambda server, number: cost_of_delivery(server, readers, chunks, number)),
        ):
            measures = {name: partial(measure, server) for name, server in stage.servers.items()}
            costs[what] = interleave(plan.rounds, measures)

    def samples(what: str, name: str, of: Callable[[Cost], float] = lambda cost: cost.total) -> Samples:
        return Samples(tuple(map(of, costs[what][name])))

    def line(what: str) -> Line:
        old: Figure = stage.missing.get(OLD) or samples(what, OLD)
        alone = {f"up to {title}": samples(what, name) for name, title in LAYERS.items()}
        return Line(what, "µs of processor time", samples(what, OURS), {OLD: old, **alone})

    def stack(what: str) -> Stack:
        totals = [samples(what, name).median for name in LAYERS]
        bars = {}
        if OLD in stage.servers:
            bars[OLD] = parts(totals, samples(what, OLD), samples(what, OLD, others))
        parser = totals[:2] if what == append else totals[:1]
        bars["now"] = parts(parser, samples(what, OURS), samples(what, OURS, others))
        return Stack(what, "µs of processor time", bars)

    return Row(
        "Processor time by layer",
        f"The processor time of all threads of a server (schedstat), for each append and each delivery. wrk appends"
        f" over {PRODUCERS} connections, synchronous=FULL. Deliveries are of one chunk at a time to {readers:,} SSE"
        " readers, the next only once all have it, so each is a write of its own. Beside the service stand servers that"
        " use only the lower layers of the stack, store nothing, and answer and send as many bytes: a uvloop protocol"
        " that takes each read for a request, the same with httptools, an ASGI app on uvicorn, and a Litestar app on"
        " that, which also decodes and encodes the JSON. In the chart, a layer is what it adds to those before it, and"
        " this service is the rest; the kernel's work for a call counts for the layer that makes the call. The service"
        " answers appends right behind the parser and writes deliveries to the socket: it skips the layers between.",
        [line(append), line(delivery)],
        stacks=[stack(append), stack(delivery)],
    )


def others(cost: Cost) -> float:
    return cost.others
