"""The row of the relay: the cost of committing each event of an upstream before a reader sees it."""

from __future__ import annotations

import contextlib
import re
import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .load import RECEIVE, TIMEOUT, check_status, connect, request_bytes
from .plan import Plan, Stage
from .results import Aim, BenchError, Figure, Line, Row, Samples, at_least, interleave, measured_share, under
from .rows_host import KIB, resident
from .rows_latency import percentile
from .servers import Server, nginx, peer, service

OURS = "resume-stream"
HTTPX = "a Litestar handler that passes on with httpx"
NGINX = "nginx as proxy"
DIRECT = "the upstream itself"
PACE = 5  # ms from one event to the next of a paced answer
MANY = 200  # answers at once
MANY_PACE = 50  # ms, as a model that writes 20 tokens a second
AT = re.compile(rb'"at":"([0-9.]+)"')
LOCATION = """
        location /relay/bench/ {{
            proxy_pass http://127.0.0.1:{port}/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
"""


Start = Callable[[Path], contextlib.AbstractContextManager[Server]]


@dataclass
class Read:
    """One answer: when its request was sent, and the age of each event on arrival (ms)."""

    sent: float
    raw: bytearray = field(default_factory=bytearray)  # not parsed yet
    seen: bytearray = field(default_factory=bytearray)  # the body's last, incomplete event
    ages: list[float] = field(default_factory=list)
    first: float = 0.0  # ms from the request to the first event
    events: int = 0
    has_head: bool = False
    is_whole: bool = False

    def take(self, piece: bytes) -> None:
        now = time.monotonic()
        self.raw += piece
        if not self.has_head:
            head, end, rest = self.raw.partition(b"\r\n\r\n")
            if not end:
                return
            check_status(bytes(head), "an answer")
            self.raw, self.has_head = rest, True
        self._unchunk()
        whole, end, self.seen = self.seen.rpartition(b"\n\n")
        written = AT.findall(whole)
        if written and not self.events:
            self.first = (now - self.sent) * 1000
        self.events += len(written)
        self.ages += [(now - float(at)) * 1000 for at in written]

    def _unchunk(self) -> None:
        """Undo the chunked encoding. Servers cut a body elsewhere than their upstreams did."""
        place = 0
        while (end := self.raw.find(b"\r\n", place)) >= 0:
            size = int(self.raw[place:end], 16)
            if len(self.raw) < end + 4 + size:
                break
            self.seen += self.raw[end + 2 : end + 2 + size]
            place = end + 4 + size
            self.is_whole = self.is_whole or size == 0
        del self.raw[:place]


def read(port: int, paths: Sequence[str], started: Callable[[], None] | None = None) -> list[Read]:
    """Read answers at once, to their ends. Call ``started`` when all of them have begun."""
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        reads = []
        for path in paths:
            connection = stack.enter_context(connect(port))
            reads.append(one := Read(time.monotonic()))
            connection.sendall(request_bytes("GET", path))
            selector.register(connection, selectors.EVENT_READ, one)
        while not all(one.is_whole for one in reads):
            ready = selector.select(TIMEOUT)
            if not ready:
                raise BenchError(f"no event for {TIMEOUT:.0f} s")
            for key, _ in ready:
                if not (piece := key.fileobj.recv(RECEIVE)):  # type: ignore[union-attr]
                    if not key.data.is_whole:
                        raise BenchError(f"an answer ended early: {bytes(key.data.seen[-200:])!r}")
                    selector.unregister(key.fileobj)
                    continue
                key.data.take(piece)
            if started is not None and all(one.events for one in reads):
                started()
                started = None
        return reads


def checked(reads: Sequence[Read], count: int) -> Sequence[Read]:
    if wrong := [one.events for one in reads if one.events != count]:
        raise BenchError(f"{wrong[0]} events came where {count} were sent")
    return reads


def rate(server: Server, prefix: str, count: int, number: int) -> float:
    """Return the events a second of one answer from a fast upstream."""
    began = time.monotonic()
    checked(read(server.port, [f"{prefix}/{count}"]), count)
    return count / (time.monotonic() - began)


@dataclass(frozen=True)
class Taken:
    first: float  # ms, the median of some requests
    p50: float  # ms, the age of an event
    p99: float


def ages(server: Server, prefix: str, count: int, number: int) -> Taken:
    path = f"{prefix}/{count // 5}/{PACE}"
    reads = [one for _ in range(5) for one in checked(read(server.port, [path]), count // 5)]
    found = [age for one in reads for age in one.ages]
    return Taken(percentile([one.first for one in reads], 50), percentile(found, 50), percentile(found, 99))


@dataclass(frozen=True)
class Crowd:
    p50: float
    p99: float
    memory: float  # KiB for each answer when all have begun


def crowd(start: Start, prefix: str, folder: Path, count: int, number: int) -> Crowd:
    """Read many answers at once, at the pace of models, from a fresh server."""
    with start(folder / f"crowd-{number}") as server:
        checked(read(server.port, [f"{prefix}/{count}"]), count)
        before, during = resident(server.pid), list[int]()
        paths = [f"{prefix}/{count}/{MANY_PACE}/{MANY_PACE * place / MANY}" for place in range(MANY)]
        reads = checked(read(server.port, paths, lambda: during.append(resident(server.pid))), count)
    found = [age for one in reads for age in one.ages]
    return Crowd(percentile(found, 50), percentile(found, 99), max(0, during[0] - before) / MANY / KIB)


def relay(plan: Plan) -> Row:
    """Measure the relay."""
    burst, paced, many = plan.scaled(50_000, 5_000), plan.scaled(500, 100), plan.scaled(100, 20)
    with Stage(plan, "relay") as stage:
        upstream = stage.enter_context(peer(stage.folder / "upstream", "relay_apps"))
        named = ("--upstream", f"bench=http://127.0.0.1:{upstream.port}", "--max-message", "1GiB")
        starts: dict[str, Start] = {
            OURS: partial(service, flags=named),
            HTTPX: partial(peer, module="relay_apps", arguments=[upstream.port]),
            NGINX: partial(nginx, locations=LOCATION.format(port=upstream.port)),
        }
        for name, start in starts.items():
            stage.start(name, start)
        servers = {name: (server, "/relay/bench") for name, server in stage.servers.items()}
        servers[DIRECT] = (upstream, "")
        rates = stage.sample({name: partial(rate, *server, burst) for name, server in servers.items()})
        old = interleave(plan.rounds, {name: partial(ages, *server, paced) for name, server in servers.items()})
        crowds = {
            name: partial(crowd, start, "/relay/bench", plan.place(f"relay-{place}"), many)
            for place, (name, start) in enumerate(starts.items())
            if name in stage.servers
        }
        crowds[DIRECT] = partial(crowd, lambda _: contextlib.nullcontext(upstream), "", plan.folder, many)
        together = interleave(plan.rounds, crowds)

    def samples(taken: dict[str, list[Taken]] | dict[str, list[Crowd]], name: str, of: str, less: str = "") -> Figure:
        if name in stage.missing:
            return stage.missing[name]
        values = [getattr(one, of) for one in taken[name]]
        base = [getattr(one, of) for one in taken[less]] if less else [0.0] * len(values)
        return Samples(tuple(value - floor for value, floor in zip(values, base, strict=True)))

    beside = (HTTPX, NGINX)
    first, p50, p99 = (
        {name: samples(old, name, of, DIRECT) for name in (OURS, *beside)} for of in ("first", "p50", "p99")
    )
    many_p50, many_p99 = ({name: samples(together, name, of) for name in servers} for of in ("p50", "p99"))
    memory = {name: samples(together, name, "memory") for name in (OURS, *beside)}

    def line(title: str, unit: str, figures: dict[str, Figure], *aims: Aim) -> Line:
        others = {name: figures[name] for name in figures if name != OURS}
        return Line(title, unit, figures[OURS], others, aims, charted=bool(aims))

    share = at_least(0.6, rates[OURS], rates[HTTPX], HTTPX)
    return Row(
        "The relay",
        f"One upstream streams events of about 240 bytes, each with the time at which it was written. The rate is that"
        f" of one answer of {burst:,} events, as fast as they are taken. Latency is that of {paced:,} events {PACE} ms"
        f" apart, in five answers, minus what a reader of the upstream itself sees. Each of {MANY} answers at once has"
        f" {many} events {MANY_PACE} ms apart, not in step. resume-stream commits every event with synchronous=FULL"
        " before it passes the event on; the servers beside it store nothing. Memory is what a server has gained when"
        " all answers have begun.",
        [
            line("relayed events/s, one answer", "events/s", rates, share),
            line("added to an event, p50", "ms", p50, under(2, "ms", p50[OURS])),
            line("added to an event, p99", "ms", p99),
            line("added to the first event", "ms", first),
            line(f"{MANY} answers at once: age of an event, p50", "ms", many_p50),
            line(f"{MANY} answers at once: age of an event, p99", "ms", many_p99),
            line("memory for each of these answers", "KiB", memory),
        ],
        f"**Relay:** it commits and passes on {rates[OURS]} events/s of one upstream's answer,"
        f" {measured_share(rates[OURS], rates[HTTPX])} of what a handler with httpx passes on that stores nothing. It"
        f" adds {p50[OURS]} ms (p50) to an event, synchronous=FULL included.",
    )
