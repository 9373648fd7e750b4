"""SIGKILL at random moments, under producers that retry and readers that resume."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from conftest import Service
from resume_stream import app
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from wire import JSON

from .base import BROKEN_LINK, TIMEOUT, Answer, Link, Verdict, append, call, message_path, piece, thread_path

WAYS_TO_PRODUCE = ("single", "ndjson", "text")
WAYS_TO_READ = ("sse", "websocket", "poll", "known")


class Broken(Exception):
    """Raised where it makes no sense to go on."""


class Producer:
    """Sends the pieces of one message, and sends again what was not acknowledged, with ``index``."""

    for_now: tuple[int, ...] = (503,)  # statuses after which it tries again

    def __init__(self, verdict: Verdict, service: Service, thread: str, message: str, way: str, rng: random.Random):
        self.verdict, self.service, self.rng = verdict, service, rng
        self.thread, self.message, self.way = thread, message, way
        self.pieces: list[str] = []
        self.text = ""
        self.acknowledged = 0
        self.index = 0  # number of the next chunk; the service cuts plain text into chunks
        self.finishing = False
        self.was_acknowledged = asyncio.Event()
        self.refusals: Counter[int] = Counter()

    async def run(self) -> None:
        while True:
            closing = self.finishing
            batch = self._batch()
            try:
                answer = await self._send(batch, closing)
            except BROKEN_LINK:
                await asyncio.sleep(0.05)
                continue
            if answer.status in self.for_now:
                self.refusals[answer.status] += 1
                self.verdict.expect(answer.is_problem, f"{answer.status} came with {answer.body[:200]!r}")
                await asyncio.sleep(0.1)
            elif answer.status not in (200, 201):
                self.verdict.fail(f"{self.message} ({self.way}): {answer.status} {answer.body[:200]!r}")
                raise Broken  # its readers would wait in vain
            else:
                self.acknowledged += len(batch)
                self.index = answer.json["chunkCount"]
                self.was_acknowledged.set()
                if closing:
                    return
                await asyncio.sleep(self.rng.uniform(0, 0.02))

    def _batch(self) -> list[str]:
        """Return what was not acknowledged, and perhaps more: a retry need not be the same request."""
        wanted = self.acknowledged + (self.rng.randint(1, 3) if self.way == "single" else self.rng.randint(1, 40))
        while len(self.pieces) < wanted:
            self.pieces.append(piece(len(self.pieces), self.rng.choice((0, 5, 40, 900))))
            self.text += self.pieces[-1]
        return self.pieces[self.acknowledged :]

    async def _send(self, batch: list[str], closing: bool) -> Answer:
        query = f"?index={self.index}" + ("&complete=true" if closing else "")
        if self.way == "single":
            return await append(self.service.port, self.thread, self.message, *batch, query=query)
        kind = "application/x-ndjson" if self.way == "ndjson" else "text/plain"
        headers = {"Content-Type": kind, "Transfer-Encoding": "chunked"}
        async with Link.to(self.service.port) as link:
            link.send_head("POST", message_path(self.thread, self.message, f"chunks{query}"), headers)
            for text in batch:
                line = json.dumps({"content": text}).encode() + b"\n" if self.way == "ndjson" else text.encode()
                cut = self.rng.randint(1, len(line))
                for part in filter(None, (line[:cut], line[cut:])):
                    await link.send_piece(part)
                await asyncio.sleep(self.rng.choice((0, 0, 0.005, 0.02)))
            await link.send_piece(b"")
            return await link.answer()


class Reader:
    """Follows one message or a whole thread, and resumes after every lost connection."""

    def __init__(
        self, service: Service, thread: str, producers: list[Producer], whole: bool, way: str, rng: random.Random
    ):
        self.service, self.thread, self.way, self.rng = service, thread, way, rng
        self.producers = {producer.message: producer for producer in producers}
        self.verdict = producers[0].verdict
        self.message = None if whole else producers[0].message
        self.name = f"{way} reader of {self.message or thread}"
        self.read: dict[str, int] = defaultdict(int)  # characters of each message
        self.ended: set[str] = set()
        self.cursor = ""
        self.seq = 0
        self.resumes = 0
        self.bad = False

    async def run(self) -> None:
        while not self.bad and len(self.ended) < len(self.producers):
            with contextlib.suppress(*BROKEN_LINK, WebSocketException):
                async with asyncio.timeout(self.rng.choice((0.3, 2, 20))):  # then this reader goes away
                    async for entry in getattr(self, f"_{self.way}")():
                        self._take(entry)
            self.resumes += 1
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    def _fail(self, what: str) -> None:
        self.bad = True
        self.verdict.fail(f"{self.name}, after seq {self.seq}: {what}")

    def _take(self, entry: dict[str, Any]) -> None:
        """Check a chunk or an end as it comes."""
        seq, message = entry["seq"], entry["messageId"]
        known = self.way == "known"  # it may resume inside a chunk, and then gets its seq again
        if (seq != self.seq + 1) if self.message is None else not (seq > self.seq or known):
            self.verdict.lost += seq > self.seq
            self.verdict.duplicated += seq == self.seq
            self.verdict.out_of_order += seq < self.seq
            return self._fail(f"seq {seq} came")
        self.seq = seq
        if message in self.ended:
            return self._fail(f"something came after the end of {message}")
        producer = self.producers[message]
        if "status" in entry:
            self.ended.add(message)
            if self.read[message] != len(producer.text) or entry["status"] != "completed":
                self._fail(f"{message} ended after {self.read[message]} of {len(producer.text)} characters")
        else:
            content = entry["content"]
            if not producer.text.startswith(content, self.read[message]):
                return self._fail(f"{content!r:.80} is not what comes next in {message}")
            self.read[message] += len(content)
        return None

    def _signal(self, event: str, data: str = "") -> None:
        if event in ("reset", "gone"):
            self._fail(f"was told {event}")
        elif event == "error" and json.loads(data)["status"] != 503:
            self._fail(f"was told {data}")

    async def _sse(self) -> AsyncIterator[dict[str, Any]]:
        path = (
            message_path(self.thread, self.message, "stream") if self.message else thread_path(self.thread, "/stream")
        )
        async with Link.to(self.service.port) as link:
            link.send_head("GET", path, {"Last-Event-ID": self.cursor} if self.cursor else {})
            async for entry in self._entries(link):
                yield entry

    async def _known(self) -> AsyncIterator[dict[str, Any]]:
        assert self.message
        read = self.read[self.message] = max(self.read[self.message] - self.rng.choice((0, 0, 1, 3)), 0)
        known = self.producers[self.message].text[:read]
        async with Link.to(self.service.port) as link:
            body = json.dumps({"thread_id": self.thread, "message_id": self.message, "known_content": known}).encode()
            link.send_head("POST", "/api/resume-stream", {**JSON, "Content-Length": str(len(body))})
            link.writer.write(body)
            self.seq = 0
            async for entry in self._entries(link):
                if "exists" not in entry:
                    yield entry

    async def _entries(self, link: Link) -> AsyncIterator[dict[str, Any]]:
        if await link.read_head() != 200:
            if link.status not in (404, 503):
                self._fail(f"was answered {link.status}")
            return
        async for event in link.events():
            if event.get("event", "complete") == "complete":
                yield json.loads(event["data"])
                self.cursor = event.get("id", "")
            else:
                self._signal(event["event"], event["data"])

    async def _poll(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            query = {"wait": "2", "limit": str(self.rng.choice((3, 50, 1000)))}
            query |= {"after": self.cursor} if self.cursor else {}
            query |= {"message_id": self.message} if self.message else {}
            answer = await call(self.service.port, "GET", thread_path(self.thread, f"/chunks?{urlencode(query)}"))
            if answer.status != 200:
                if answer.status not in (404, 503):
                    self._fail(f"was answered {answer.status} {answer.body!r:.200}")
                return
            page = answer.json
            for entry in sorted([*page["chunks"], *page["ends"]], key=lambda entry: entry["seq"]):
                yield entry
            self.cursor = page["cursor"]
            if len(self.ended) == len(self.producers):
                return

    async def _websocket(self) -> AsyncIterator[dict[str, Any]]:
        subscribe = {"type": "subscribe", "id": 1, "thread_id": self.thread}
        subscribe |= {"message_id": self.message} if self.message else {"follow": True}
        subscribe |= {"after": self.cursor} if self.cursor else {}
        async with connect(f"ws://127.0.0.1:{self.service.port}/api/ws", max_size=None, close_timeout=0) as socket:
            await socket.send(json.dumps(subscribe))
            async for text in socket:
                frame = json.loads(text)
                if frame["type"] in ("chunk", "complete"):
                    self.cursor = frame["cursor"]
                    yield frame
                elif frame["type"] == "error" and frame["status"] == 404:
                    return
                else:
                    self._signal(frame["type"], text)
                if frame["type"] == "unsubscribed" or len(self.ended) == len(self.producers):
                    return


class World:
    """Threads of two messages each, with their producers and readers."""

    def __init__(self, verdict: Verdict, service: Service, name: str, producers: int, readers: int, seed: int) -> None:
        rng = random.Random(seed)
        self.verdict, self.service = verdict, service
        self.producers = [
            Producer(
                verdict,
                service,
                f"{name}-{number // 2}",
                f"{name}-{number // 2}-{number % 2}",
                WAYS_TO_PRODUCE[number % len(WAYS_TO_PRODUCE)],
                random.Random(rng.random()),
            )
            for number in range(producers)
        ]
        self.readers = []
        for number in range(readers):
            way = WAYS_TO_READ[number % len(WAYS_TO_READ)]
            whole = way != "known" and number // len(WAYS_TO_READ) % 2 == 0
            first = self.producers[number % producers]
            read = [p for p in self.producers if p.thread == first.thread] if whole else [first]
            self.readers.append(Reader(service, first.thread, read, whole, way, random.Random(rng.random())))

    async def open(self) -> None:
        for producer in self.producers:
            await call(self.service.port, "PUT", message_path(producer.thread, producer.message, "").rstrip("/"))

    def check(self, acknowledged: dict[str, int]) -> None:
        """Compare the file with what had been acknowledged."""
        with contextlib.closing(sqlite3.connect(f"file:{self.service.db}?mode=ro", uri=True)) as connection:
            app.open_packs(connection)
            for producer in self.producers:
                rows = connection.execute(
                    "select content from entries join messages using (message)"
                    " where message_id = ? and content is not null order by seq",
                    (producer.message,),
                )
                found = "".join(content for (content,) in rows)
                self.verdict.compare(producer.message, found, producer.pieces, acknowledged[producer.message])
            for thread, count, last in connection.execute(
                "select thread_id, count(seq), last_seq from threads left join entries using (thread) group by thread"
            ):
                self.verdict.expect(count == last, f"{thread}: {count} places in a sequence up to {last}")

    def check_end(self) -> None:
        for producer in self.producers:
            self.verdict.expect(producer.acknowledged == len(producer.pieces), f"{producer.message} was not finished")
        self.check({producer.message: producer.acknowledged for producer in self.producers})
        with contextlib.closing(sqlite3.connect(self.service.db)) as connection:
            (answer,) = connection.execute("pragma integrity_check").fetchone()
        self.verdict.expect(answer == "ok", f"integrity_check: {answer}")


async def acknowledgement(producer: Producer) -> None:
    """Wait for the next acknowledgement."""
    producer.was_acknowledged.clear()
    async with asyncio.timeout(TIMEOUT):
        await producer.was_acknowledged.wait()


async def kill(world: World, rng: random.Random) -> None:
    """Kill the service, perhaps again while it starts, and let it come back on its port.

    Half of the kills come right after an acknowledgement, before a later commit can hide that it came too early.
    """
    service = world.service
    if rng.random() < 0.5:
        await acknowledgement(rng.choice(world.producers))
    acknowledged = {producer.message: producer.acknowledged for producer in world.producers}
    service.kill()
    for _ in range(rng.choice((0, 0, 0, 1))):
        service.spawn()
        await asyncio.sleep(rng.uniform(0, 1))
        service.kill()
    await asyncio.to_thread(service.start)
    await asyncio.to_thread(world.check, acknowledged)


async def survive_kills(
    folder: Path, *, kills: int, producers: int, readers: int, longest: float, seed: int = 1
) -> Verdict:
    """Kill the service under load. After at most five kills, finish and compare the threads and make new ones."""
    verdict = Verdict("SIGKILL under load")
    rng = random.Random(seed)
    flags = ("--idle-timeout", "1s", "--poll-interval", "50ms")
    with Service(folder / "kill.db", *flags) as service:
        for number in range(0, kills, 5):
            world = World(verdict, service, f"world{number}", producers, readers, seed + number)
            await kill_often(world, range(number, min(number + 5, kills)), longest, rng)
            if not service.is_running:
                return verdict
            with verdict.trial(f"everything of {number} to {number + 4}"):
                world.check_end()
        verdict.expect(service.end(signal.SIGTERM) == 0, "it did not end with 0")
        verdict.expect(not service.tracebacks(), "there is a traceback in the log")
    return verdict


async def kill_often(world: World, numbers: range, longest: float, rng: random.Random) -> None:
    """Kill the service under load, until everything is written and read, or something is broken."""
    await world.open()
    try:
        await load_and_kill(world, numbers, longest, rng)
    except* Broken:
        pass  # the verdict says why
    except* TimeoutError:
        world.verdict.fail("something hangs")


async def load_and_kill(world: World, numbers: range, longest: float, rng: random.Random) -> None:
    async with asyncio.TaskGroup() as tasks:
        for one in [*world.producers, *world.readers]:
            tasks.create_task(asyncio.wait_for(one.run(), 5 * (longest + 20) + 2 * TIMEOUT))
        for number in numbers:
            await asyncio.sleep(rng.uniform(0.05, longest))
            with world.verdict.trial(f"kill {number}"):
                await kill(world, rng)
            if not world.service.is_running:
                raise Broken
        await asyncio.sleep(rng.uniform(0, 0.3))
        for producer in world.producers:
            producer.finishing = True
