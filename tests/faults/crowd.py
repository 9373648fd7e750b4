"""Difficult clients: slow, rude, silent, gone in the middle, and many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from conftest import Service
from wire import JSON, masked

from .base import BROKEN_LINK, TIMEOUT, Link, Verdict, append, call, eventually, message_path, piece, thread_path

UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Version": "13",
}
MIB = 1024**2
NDJSON = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}


async def small_link(port: int) -> Link:
    """Return a connection with a tiny receive buffer, so that unread data stays with the service."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return Link(*await asyncio.open_connection(sock=connection, limit=4096))


async def follow(link: Link, thread: str) -> None:
    link.send_head("GET", thread_path(thread, "/stream"))


async def follow_by_websocket(link: Link, thread: str) -> None:
    link.send_head("GET", "/api/ws", UPGRADE)
    await link.reader.readuntil(b"\r\n\r\n")
    link.writer.write(masked({"type": "subscribe", "id": 1, "thread_id": thread}))


# Each of these clients leaves at another place.


async def leave_in_head(link: Link, thread: str) -> None:
    link.writer.write(b"GET /api/threads/")
    await link.writer.drain()


async def leave_at_once(link: Link, thread: str) -> None:
    await follow(link, thread)


async def leave_in_stream(link: Link, thread: str) -> None:
    await follow(link, thread)
    await link.reader.readline()


async def leave_long_poll(link: Link, thread: str) -> None:
    link.send_head("GET", thread_path(thread, "/chunks?after=1000000&wait=20"))
    await asyncio.sleep(0.02)


async def leave_in_body(link: Link, thread: str) -> None:
    link.send_head("POST", message_path(thread, "rude"), {"Content-Type": "application/json", "Content-Length": "100"})
    link.writer.write(b'{"content":')
    await asyncio.sleep(0.01)


async def leave_in_line(link: Link, thread: str) -> None:
    link.send_head("POST", message_path(thread, "rude"), NDJSON)
    await link.send_piece(b'{"content":"whole"}\n{"content":"ha')
    await asyncio.sleep(0.01)


async def leave_before_answer(link: Link, thread: str) -> None:
    link.send_head("POST", message_path(thread, "rude"), NDJSON)
    await link.send_piece(b'{"content":"whole"}\n')
    await link.send_piece(b"")


async def leave_known_content(link: Link, thread: str) -> None:
    body = json.dumps({"thread_id": thread, "message_id": "m", "known_content": "0~"}).encode()
    link.send_head("POST", "/api/resume-stream", {**JSON, "Content-Length": str(len(body))})
    link.writer.write(body)
    await asyncio.sleep(0.005)


async def leave_in_handshake(link: Link, thread: str) -> None:
    link.send_head("GET", "/api/ws", UPGRADE)


async def leave_in_frame(link: Link, thread: str) -> None:
    await follow_by_websocket(link, thread)
    link.writer.write(masked({"type": "append"})[:9])
    await asyncio.sleep(0.005)


async def leave_after_websocket_append(link: Link, thread: str) -> None:
    await follow_by_websocket(link, thread)
    chunks = [{"content": "whole"}]
    told = {"type": "append", "id": 2, "thread_id": thread, "message_id": "rude", "chunks": chunks}
    link.writer.write(masked(told))


RUDE: tuple[Callable[[Link, str], Awaitable[None]], ...] = (
    leave_in_head,
    leave_at_once,
    leave_in_stream,
    leave_long_poll,
    leave_in_body,
    leave_in_line,
    leave_before_answer,
    leave_known_content,
    leave_in_handshake,
    leave_in_frame,
    leave_after_websocket_append,
)


@contextlib.asynccontextmanager
async def in_background(*work: Awaitable[object]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def never_read(port: int, thread: str, way: Callable[[Link, str], Awaitable[None]]) -> None:
    link = await small_link(port)
    try:
        await way(link, thread)
        link.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(1e6)
    finally:
        link.close()


async def read_slowly(port: int, thread: str) -> None:
    link = await small_link(port)
    try:
        await follow(link, thread)
        link.writer.transport.pause_reading()  # type: ignore[attr-defined]
        connection = link.writer.get_extra_info("socket")
        while True:
            await asyncio.sleep(1)
            with contextlib.suppress(BlockingIOError):
                os.read(connection.fileno(), 1)
    finally:
        link.close()


async def survive_slow_readers(folder: Path, *, readers: int, mebibytes: int) -> Verdict:
    """Readers that do not read cost the service little memory, and other readers no time."""
    verdict = Verdict("readers that never read, or a byte a second")
    with Service(folder / "slow.db") as service, verdict.trial(f"{readers} of each"):
        await append(service.port, "t", "m", piece(0, 10))
        crowd = [
            one
            for _ in range(readers)
            for one in (
                never_read(service.port, "t", follow),
                never_read(service.port, "t", follow_by_websocket),
                read_slowly(service.port, "t"),
            )
        ]
        async with in_background(*crowd), Link.to(service.port) as link:
            await eventually(lambda: readers_are(service.port, 3 * readers), "the readers are there")
            await follow(link, "t")
            await link.read_head()
            events = link.events()
            await anext(events)
            before, waits = service.memory(), []
            size = 8000
            for number in range(1, mebibytes * 1024**2 // size):
                sent = time.perf_counter()
                answer = await append(service.port, "t", "m", piece(number, size))
                verdict.expect(answer.status == 201, f"an append was answered {answer.status}")
                event = await asyncio.wait_for(anext(events), TIMEOUT)
                waits.append(time.perf_counter() - sent)
                verdict.expect(json.loads(event["data"])["seq"] == number + 1, f"{event['data'][-80:]} came")
            grown = (service.memory() - before) / MIB
            # Each may hold a little: the kernel has the socket's buffer, and uvicorn's high-water mark is 64 KiB.
            verdict.expect(grown < 20 + 3 * readers * 0.6, f"memory grew by {grown:.0f} MiB")
            verdict.expect(statistics.median(waits) < 0.1, f"delivery took {statistics.median(waits):.3f} s")
            verdict.notes.append(f"{grown:.0f} MiB more, delivery p50 {statistics.median(waits) * 1000:.1f} ms")
        await eventually(lambda: readers_are(service.port, 0), "the readers are forgotten")
        began = time.monotonic()
        verdict.expect(service.end() == 0 and time.monotonic() - began < 3, "it did not end at once, with 0")
        verdict.expect(not service.tracebacks(), "there is a traceback in the log")
    return verdict


async def metric(port: int, name: str) -> float:
    text = (await call(port, "GET", "/metrics")).body.decode()
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


async def readers_are(port: int, count: int) -> bool:
    return await metric(port, "resume_stream_readers") == count


async def survive_rudeness(folder: Path, *, times: int, seed: int = 1) -> Verdict:
    """Clients that leave in every state leave no reader, no open file, and no half line behind."""
    verdict = Verdict("clients that leave in every state")
    rng = random.Random(seed)
    with Service(folder / "rude.db") as service:
        await append(service.port, "t", "m", *(piece(number, 500) for number in range(50)))
        files = len(os.listdir(f"/proc/{service.pid}/fd"))
        for _ in range(times):
            for rude in RUDE:
                with verdict.trial(rude.__name__):
                    async with asyncio.timeout(TIMEOUT), Link.to(service.port) as link:
                        with contextlib.suppress(*BROKEN_LINK):
                            await rude(link, "t")
                            if rng.random() < 0.5:
                                link.writer.write_eof()  # politely; otherwise with a reset
                                await asyncio.sleep(0.002)
        with verdict.trial("nothing is left behind"):
            await eventually(lambda: readers_are(service.port, 0), "the readers are forgotten", seconds=10)
            left = len(os.listdir(f"/proc/{service.pid}/fd")) - files
            verdict.expect(left <= 2, f"{left} more files are open")
            content = (await call(service.port, "GET", thread_path("t", "/chunks?limit=10000"))).json
            rude_texts = {chunk["content"] for chunk in content["chunks"] if chunk["messageId"] == "rude"}
            verdict.expect(rude_texts <= {"whole"}, f"stored: {rude_texts}")
            verdict.expect(not service.tracebacks(), f"{service.tracebacks()} tracebacks in the log")
    return verdict


async def survive_idle_readers(folder: Path, *, readers: int) -> Verdict:
    """Many idle readers all get what is appended, and cost little memory."""
    verdict = Verdict("idle readers")
    flags = ("--idle-timeout", "0", "--heartbeat", "0")
    with Service(folder / "idle.db", *flags) as service, verdict.trial(f"{readers} readers"):
        await append(service.port, "t", "m", piece(0, 10))
        before = service.memory()
        async with contextlib.AsyncExitStack() as stack:
            links = []
            for _ in range(readers):
                link = await stack.enter_async_context(Link.to(service.port))
                await follow(link, "t")
                links.append(link)
            streams = [link.events() for link in links]
            for link, stream in zip(links, streams, strict=True):
                await asyncio.wait_for(link.read_head(), TIMEOUT)
                await asyncio.wait_for(anext(stream), TIMEOUT)
            each = (service.memory() - before) / 1024 / readers
            verdict.expect(each < 60, f"{each:.0f} KiB for each")
            sent = time.perf_counter()
            await append(service.port, "t", "m", piece(1, 10), query="?complete=true")
            for stream in streams:
                events = [json.loads(event["data"]) async for event in stream]
                verdict.expect([event["seq"] for event in events] == [2, 3], f"a reader got {events}")
            verdict.notes.append(f"{each:.0f} KiB for each, all told within {time.perf_counter() - sent:.2f} s")
        await eventually(lambda: readers_are(service.port, 0), "the readers are forgotten")
        verdict.expect(not service.tracebacks(), "there is a traceback in the log")
    return verdict


async def survive_churn(folder: Path, *, seconds: float) -> Verdict:
    """Make, read, clear, and expire threads: memory and files do not grow."""
    verdict = Verdict("memory under churn")
    flags = ("--ttl", "2s", "--cleanup-interval", "500ms", "--producer-timeout", "5s")
    with Service(folder / "churn.db", *flags) as service, verdict.trial(f"{seconds:g} s"):
        port, made = service.port, 0
        samples: list[tuple[float, float]] = []
        began = time.monotonic()

        async def live(worker: int) -> None:
            nonlocal made
            while time.monotonic() < began + seconds:
                made += 1
                thread = f"churn-{worker}-{made}"
                await append(port, thread, "m", *(piece(number, 300) for number in range(20)))
                async with Link.to(port) as link:
                    await follow(link, thread)
                    await link.read_head()
                    await anext(link.events())
                    async with Link.to(port) as rude:
                        await RUDE[made % len(RUDE)](rude, thread)
                await append(port, thread, "m", "end", query="?complete=true")
                if made % 3 == 0:
                    await call(port, "DELETE", thread_path(thread))

        async def sample() -> None:
            while True:
                samples.append((time.monotonic() - began, service.memory() / MIB))
                await asyncio.sleep(0.25)

        async with in_background(sample()):
            await asyncio.gather(*map(live, range(4)))
        later = [one for one in samples if one[0] > seconds / 3]
        slope = statistics.linear_regression(*zip(*later, strict=True)).slope * 60
        low, high = min(size for _, size in later), max(size for _, size in later)
        sizes = {file.name: file.stat().st_size // 1024 for file in (service.db, Path(f"{service.db}-wal"))}
        verdict.notes.append(
            f"{made} threads, {low:.0f} to {high:.0f} MiB, {slope:+.2f} MiB a minute, KiB of files {sizes}"
        )
        verdict.expect(seconds < 60 or slope < 1, f"memory grows by {slope:.2f} MiB a minute")
        verdict.expect(high < 150, f"memory reached {high:.0f} MiB")
        verdict.expect(sum(sizes.values()) < 64 * 1024, f"the files have {sizes} KiB")
        verdict.expect(not service.tracebacks(), f"{service.tracebacks()} tracebacks in the log")
    return verdict
