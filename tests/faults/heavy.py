"""Attacks by one client that take much time or memory, and what other clients see of them.

A witness appends, follows its own appends, and asks for /health/live. No attack may delay its appends,
fill the memory, keep the service from stopping, or lose anything acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from conftest import Service
from websockets.asyncio.client import connect

from .base import BROKEN_LINK, Link, Verdict, append, call, eventually, message_path, piece, thread_path

MIB = 1024**2
MOST_HELD = 0.25  # seconds that the work for another client may delay an append
MOST_MEMORY = 200 * MIB
MOST_SECONDS_TO_END = 1.0
JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
TEXT = {"Content-Type": "text/plain"}

Attack = Callable[[int, int], Awaitable[str]]  # takes the port and a number of MiB, and returns its result in words


class Witness:
    """A client that appends, follows, and asks for /health/live, again and again."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.appends: list[float] = []
        self.lives: list[float] = []
        self.pieces: list[str] = []
        self.acknowledged = 0  # of these
        self.seen = ""
        self.memory = 0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in (self._append, self._follow, self._ask, self._measure)]
        await eventually(lambda: len(self.appends) > 20 and self.seen, "the witness works")
        self.appends.clear()
        self.lives.clear()
        self.memory = 0
        try:
            yield
            await eventually(lambda: self.seen.count("~") >= self.acknowledged, "the follower has all")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _append(self) -> None:
        async with Link.to(self.service.port) as link:
            while True:
                text = piece(len(self.pieces), 20)
                self.pieces.append(text)
                began = time.perf_counter()
                body = json.dumps({"content": text}).encode()
                answer = await link.ask("POST", message_path("witness", "m"), body, JSON)
                if answer.status != 201:
                    raise RuntimeError(f"an append of the witness was answered {answer.status}: {answer.body!r}")
                self.appends.append(time.perf_counter() - began)
                self.acknowledged = len(self.pieces)
                await asyncio.sleep(0.002)

    async def _follow(self) -> None:
        async with Link.to(self.service.port) as link:
            link.send_head("GET", "/api/threads/witness/stream?follow=true")
            await link.read_head()
            async for data in link.pieces():
                for line in data.split(b"\n"):
                    if line.startswith(b"data: "):
                        self.seen += json.loads(line[6:]).get("content", "")

    async def _ask(self) -> None:
        async with Link.to(self.service.port) as link:
            while True:
                began = time.perf_counter()
                await link.ask("GET", "/health/live")
                self.lives.append(time.perf_counter() - began)
                await asyncio.sleep(0.01)

    async def _measure(self) -> None:
        while True:
            self.memory = max(self.memory, self.service.memory())
            await asyncio.sleep(0.02)


async def fill(port: int, thread: str, mebibytes: int, line: int = MIB // 2) -> None:
    """Store a message of this size, in chunks of ``line`` bytes."""
    async with Link.to(port) as link:
        link.send_head("POST", message_path(thread, "m"), {**NDJSON, "Transfer-Encoding": "chunked"})
        text = json.dumps({"content": "x" * (line - 64)}).encode() + b"\n"
        for _ in range(mebibytes * MIB // line):
            await link.send_piece(text)
        await link.send_piece(b"")
        answer = await link.answer()
    if answer.status != 201:
        raise RuntimeError(f"the fill was answered {answer.status}: {answer.body!r}")


async def known_text_and_hang_up(port: int, mebibytes: int) -> str:
    """Look a hundred times for a missing text in a long message, and wait for no answer."""
    await fill(port, "long", mebibytes)
    body = json.dumps({"thread_id": "long", "message_id": "m", "known_content": "y" * 1000}).encode()
    for _ in range(100):
        async with Link.to(port) as link:
            link.send_head("POST", "/api/resume-stream", {**JSON, "Content-Length": str(len(body))})
            link.writer.write(body)
            await link.writer.drain()
    return "100 hung up"


async def chunks_without_text(port: int, mebibytes: int) -> str:
    """Send as many chunks as fit into a body."""
    body = b"[" + b",".join([b'{"content":""}'] * (9 * MIB // 15)) + b"]"
    statuses = [(await call(port, "POST", message_path("empty", "m"), body)).status for _ in range(5)]
    return f"answered {statuses}"


async def text_again_in_small_pieces(port: int, mebibytes: int) -> str:
    """Retry a long plain text, a few bytes at a time."""
    size = min(mebibytes, 8) * MIB
    await fill(port, "again", size // MIB, line=64 * 1024)
    async with Link.to(port) as link:
        head = {**TEXT, "Transfer-Encoding": "chunked"}
        link.send_head("POST", message_path("again", "m", "chunks?index=0"), head)
        for _ in range(3000):
            await link.send_piece(b"x" * 100)
        await link.send_piece(b"")
        return f"answered {(await link.answer()).status}"


async def intervals_without_end(port: int, mebibytes: int) -> str:
    """Open many readers, each with its own poll_interval."""
    await append(port, "polled", "m", "text")
    async with contextlib.AsyncExitStack() as links:
        for number in range(400):
            link = await links.enter_async_context(Link.to(port))
            link.send_head("GET", thread_path("polled", f"/stream?poll_interval={0.05 + number / 10_000}"))
            await link.read_head()
        await asyncio.sleep(0.5)  # time for many polls
    return "400 readers"


async def messages_without_end(port: int, mebibytes: int) -> str:
    """Make a thread of very many messages, and ask for everything about it."""
    count = 500 * mebibytes
    async with Link.to(port) as link:
        for number in range(count):
            await link.ask("PUT", message_path("crowded", f"m{number}", "").rstrip("/"))
        for path in ("", "/content", "/chunks", "/stream?idle_timeout=0.01"):
            await link.ask("GET", thread_path("crowded", path))
    return f"{count} messages"


async def clear_what_is_large(port: int, mebibytes: int) -> str:
    """Clear a large thread, then a small one beside another large one."""
    for thread in ("doomed", "large"):
        await fill(port, thread, mebibytes)
    await append(port, "small", "m", "text")
    statuses = [(await call(port, "DELETE", thread_path(thread))).status for thread in ("doomed", "small")]
    if statuses != [204, 204]:
        raise RuntimeError(f"the clears were answered {statuses}")
    return f"{mebibytes} MiB"


async def headers_without_end(port: int, mebibytes: int) -> str:
    """Send headers without end on forty connections."""

    async def send() -> int:
        async with Link.to(port) as link:
            link.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            with contextlib.suppress(OSError):
                for _ in range(10 * mebibytes):
                    link.writer.write(b"X-Junk: " + b"x" * 100_000 + b"\r\n")
                    await link.writer.drain()
            with contextlib.suppress(*BROKEN_LINK):
                return await link.read_head()
            return 0

    statuses = await asyncio.gather(*(send() for _ in range(40)))
    return f"{sum(status in (0, 431) for status in statuses)} of 40 refused"


async def sockets_that_say_nothing(port: int, mebibytes: int) -> str:
    """Open as many sockets as this process may, up to 5,000."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(5_000, soft - 200)
    async with contextlib.AsyncExitStack() as links:
        for _ in range(count):
            await links.enter_async_context(Link.to(port))
        await asyncio.sleep(1)  # they stay open for a while
    return f"{count} sockets"


async def bodies_without_end(port: int, mebibytes: int) -> str:
    """Send forty bodies of nearly 10 MiB and forty unfinished lines at the same time."""

    async def send(path: str, kind: dict[str, str], text: bytes) -> None:
        async with Link.to(port) as link:
            link.send_head("POST", path, {**kind, "Content-Length": str(10 * MIB)})
            with contextlib.suppress(OSError):
                for _ in range(9 * 16):
                    link.writer.write(text * 64 * 1024)
                    await link.writer.drain()
            await asyncio.sleep(1)  # the service holds them for a while

    bodies = [send(message_path("bodies", f"m{n}"), JSON, b" ") for n in range(40)]
    lines = [send(message_path("lines", f"m{n}"), NDJSON, b"x") for n in range(40)]
    aborts = [send(message_path("lines", f"m{n}", "abort"), JSON, b" ") for n in range(40)]
    await asyncio.gather(*bodies, *lines, *aborts)
    return "120 bodies"


async def readers_that_never_read(port: int, mebibytes: int) -> str:
    """Open a hundred readers that do not read, and append much to their thread."""
    async with contextlib.AsyncExitStack() as links:
        for _ in range(100):
            link = await links.enter_async_context(Link.to(port))
            link.send_head("GET", thread_path("deaf", "/stream?follow=true"))
            await link.read_head()
            link.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await fill(port, "deaf", min(mebibytes, 40))
    return "100 readers"


async def junk_on_a_websocket(port: int, mebibytes: int) -> str:
    """Send invalid frames of nearly 10 MiB, and subscribe to a thousand threads."""
    async with connect(f"ws://127.0.0.1:{port}/api/ws", max_size=None) as socket:
        for _ in range(10):
            await socket.send("[" * (9 * MIB))
            await socket.recv()
        for number in range(1_000):
            await socket.send(
                json.dumps({"type": "subscribe", "id": number, "thread_id": f"t{number}", "follow": True})
            )
        refused = 0
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(1):
                    refused += json.loads(await socket.recv())["type"] == "error"
    return f"{refused} of 1,000 subscriptions refused"


ATTACKS: list[Attack] = [
    headers_without_end,
    sockets_that_say_nothing,
    bodies_without_end,
    readers_that_never_read,
    junk_on_a_websocket,
    known_text_and_hang_up,
    chunks_without_text,
    text_again_in_small_pieces,
    intervals_without_end,
    messages_without_end,
    clear_what_is_large,
]
EACH_ALONE = [[attack] for attack in ATTACKS]


async def survive_heavy_work(
    folder: Path, *, mebibytes: int, attacks: Sequence[Sequence[Attack]] = EACH_ALONE, timed: bool = True
) -> Verdict:
    """Heavy work for one client holds up no other. Each list of attacks has a service of its own.

    Where the machine has other work, how long it takes means nothing: then it is not ``timed``.
    """
    verdict = Verdict("heavy work for one holds up no other")
    for number, together in enumerate(attacks):
        name = ", ".join(attack.__name__.replace("_", " ") for attack in together)
        with verdict.trial(name):
            service = Service(folder / f"heavy{number}.db", "--max-message", "1GiB").start()
            try:
                witness = Witness(service)
                async with witness.watching():
                    came_to = ", ".join([await attack(service.port, mebibytes) for attack in together])
                began = time.perf_counter()
                code = service.end()
                ended = time.perf_counter() - began
            finally:
                if service.process is not None:
                    service.kill()
            held, lived = max(witness.appends), max(witness.lives, default=0.0)
            verdict.compare(name, witness.seen, witness.pieces, witness.acknowledged)
            verdict.expect(code == 0, f"{name}: it ended with {code}")
            verdict.expect(held < MOST_HELD or not timed, f"{name}: an append was held for {held * 1000:.0f} ms")
            verdict.expect(witness.memory < MOST_MEMORY, f"{name}: it took {witness.memory / MIB:.0f} MiB")
            verdict.expect(ended < MOST_SECONDS_TO_END or not timed, f"{name}: it ended after {ended:.2f} s")
            ordered = sorted(witness.appends)
            verdict.notes.append(
                f"{name} ({came_to}): appends p99 {ordered[len(ordered) * 99 // 100] * 1000:.0f} ms,"
                f" worst {held * 1000:.0f} ms; /health/live worst {lived * 1000:.0f} ms;"
                f" {witness.memory / MIB:.0f} MiB; ended in {ended:.2f} s"
            )
    return verdict
