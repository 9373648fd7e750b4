"""Silent producers, services that are told to stop, and services that are killed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import random
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from buffers import impatient
from conftest import TIMEOUT, Service, append, until, wait_until
from resume_stream import app
from resume_stream.app import ChunkBuffer, MessageEnd
from resume_stream.extras import clock as clock_extra

pytestmark = pytest.mark.anyio
STORES = ("sqlite", "redis")

# Silent producers


class Clock:
    """Time that goes on only when the test says so, in a Redis too. It counts the looks at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        self._redis = None
        if address:
            self._redis = importlib.import_module("redis").Redis.from_url(address)
            scripts, *rooms = (
                importlib.import_module(f"resume_stream.extras.redis_store.{room}")
                for room in ("scripts", "records", "listening", "store")
            )
            for room in rooms:
                monkeypatch.setattr(room, "now_ms", self)
            for script in (found for found in vars(scripts).values() if isinstance(found, scripts.Script)):
                text = script.source.replace(b"redis.call('TIME')", b"redis.call('MGET', 'clock:s', 'clock:us')")
                monkeypatch.setattr(script, "source", text)
                monkeypatch.setattr(script, "sha", hashlib.sha1(text).hexdigest())
        self.now = 1_763_829_000_000
        self.looks = 0
        monkeypatch.setattr(app, "now_ms", self)
        monkeypatch.setattr(clock_extra, "now_ms", self)

    @property
    def now(self) -> int:
        return self._now

    @now.setter
    def now(self, ms: int) -> None:
        self._now = ms
        if self._redis is not None:
            self._redis.mset({"clock:s": ms // 1000, "clock:us": ms % 1000 * 1000})

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()

    def __call__(self) -> int:
        self.looks += 1
        return self.now

    async def moves_on(self, ms: int, looks: int = 4) -> None:
        """Set the time forward, and wait until the periodic tasks have seen it."""
        self.now += ms
        self.looks = 0
        await until(lambda: self.looks >= looks, f"{looks} looks at the clock")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, make_buffer: Any) -> Iterator[Clock]:
    clock = Clock(monkeypatch, make_buffer.address)
    yield clock
    clock.close()


async def status_of(buffer: ChunkBuffer, message_id: str = "m") -> tuple[str, str | None]:
    (found,) = (m for m in (await buffer.get_thread_status("t")).messages if m.message_id == message_id)
    return found.status, found.reason


TIMEOUTS = {"producer_timeout": 0.2, "ttl": 1e9, "cleanup_interval": 1e9}
TIMED_OUT = ("aborted", "producer_timeout")


async def test_a_silent_message_is_aborted_and_its_readers_are_told(make_buffer: Any, clock: Clock) -> None:
    async with make_buffer(**TIMEOUTS) as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        await buffer.open_message("t", "opened")
        items = buffer.resume_stream("t", "m", idle_timeout=10)
        await anext(items)
        await clock.moves_on(199)
        assert await status_of(buffer) == ("active", None)
        await buffer.add_chunks("t", "talking", ["text"])
        clock.now += 1
        assert await anext(items) == MessageEnd("m", *TIMED_OUT, seq=3)
        await clock.moves_on(0)
        assert await status_of(buffer, "opened") == TIMED_OUT
        assert await status_of(buffer, "talking") == ("active", None)
        with pytest.raises(app.Conflict, match="producer_timeout"):
            await buffer.add_chunks("t", "m", ["too late"])
        await items.aclose()


@pytest.mark.parametrize(
    "sign_of_life",
    [
        lambda buffer: buffer.add_chunks("t", "m", []),
        lambda buffer: buffer.add_chunks("t", "m", [], index=1),
        lambda buffer: buffer.add_chunks("t", "m", ["more"]),
        lambda buffer: buffer.open_message("t", "m"),
    ],
)
async def test_a_sign_of_life_postpones_the_abort(
    make_buffer: Any, clock: Clock, sign_of_life: Callable[[ChunkBuffer], Any]
) -> None:
    async with make_buffer(**TIMEOUTS) as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        for _ in range(3):
            await clock.moves_on(150)
            await sign_of_life(buffer)
        await clock.moves_on(199)
        assert await status_of(buffer) == ("active", None)
        await clock.moves_on(1, looks=8)
        assert await status_of(buffer) == TIMED_OUT


@pytest.mark.sqlite
async def test_time_in_which_the_database_was_locked_does_not_count(
    make_buffer: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    impatient(monkeypatch, 0.01)
    async with make_buffer(**TIMEOUTS) as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        with contextlib.closing(sqlite3.connect(tmp_path / "chunks.db", isolation_level=None)) as other:
            other.execute("begin immediate")
            clock.now += 500_000
            with pytest.raises(app.Unavailable, match="locked"):
                await buffer.add_chunks("t", "m", ["more"])  # its producer retries
            other.execute("rollback")
        await clock.moves_on(199)
        assert (await buffer.add_chunks("t", "m", ["more"])).status == "active"


async def test_time_in_which_the_service_was_down_does_not_count(make_buffer: Any, clock: Clock) -> None:
    async with make_buffer(**TIMEOUTS) as buffer:
        await buffer.add_chunks("t", "m", ["text"])
    clock.now += 3_600_000
    async with make_buffer(**TIMEOUTS) as buffer:
        await clock.moves_on(199)
        assert await status_of(buffer) == ("active", None)
        assert (await buffer.add_chunks("t", "m", ["more"], index=1)).seq == 2
        await clock.moves_on(201, looks=8)
        assert await status_of(buffer) == TIMED_OUT


async def test_no_producer_timeout_is_no_abort(make_buffer: Any, clock: Clock) -> None:
    async with make_buffer(**TIMEOUTS | {"producer_timeout": 0, "cleanup_interval": 0.01}) as buffer:
        await buffer.add_chunks("t", "m", ["text"])
        await clock.moves_on(86_400_000)
        assert await status_of(buffer) == ("active", None)


# Told to stop


def request(service: Service, head: str, body: bytes = b"", receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(TIMEOUT)
    connection.connect(("127.0.0.1", service.port))
    connection.sendall(f"{head}\r\nHost: localhost\r\n\r\n".replace("\r\n\r\n\r\n", "\r\n\r\n").encode() + body)
    return connection


def received(connection: socket.socket, until: bytes | None = None) -> bytes:
    """Return what comes up to ``until``, or to the end."""
    data = b""
    while until is None or until not in data:
        piece = connection.recv(65536)
        data += piece
        if not piece:
            break
    return data


@pytest.mark.parametrize("sig", [pytest.param(signal.SIGTERM, marks=pytest.mark.sqlite), signal.SIGINT])
def test_a_service_that_is_told_to_stop_is_gone_within_a_second(
    service: Service, client: httpx.Client, sig: signal.Signals
) -> None:
    append(client, "t", "m", "text")
    append(client, "long", "m", *["x" * 500_000] * 16)
    with contextlib.ExitStack() as exits:

        def opened(*arguments: Any, **options: Any) -> socket.socket:
            return exits.enter_context(request(service, *arguments, **options))

        readers = [opened("GET /api/threads/t/stream HTTP/1.1") for _ in range(100)]
        for reader in readers:
            received(reader, until=b'"seq":1}\n\n')
        opened("GET /api/threads/long/stream HTTP/1.1", receive_buffer=4096)
        poll = opened("GET /api/threads/t/chunks?after=1&wait=60 HTTP/1.1")
        upload = opened(
            "POST /api/threads/u/messages/m/chunks HTTP/1.1\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked",
            b"4\r\nkept\r\n",
        )
        wait_until(lambda: client.get("/threads/u").status_code == 200, "the upload's first piece")
        wait_until(
            lambda: sum(thread["readers"] for thread in client.get("/threads").json()["threads"]) == 102, "the readers"
        )
        answers, producing = producers(service, 3)
        wait_until(lambda: len(answers) > 20, "some appends")

        told_at = time.monotonic()
        service.process.send_signal(sig)
        if sig == signal.SIGINT:  # a terminal's Ctrl-C may come twice
            service.process.send_signal(sig)
        assert service.process.wait(TIMEOUT) == 0
        assert time.monotonic() - told_at < 3.0  # under a second on a machine that has nothing else to do

        for reader in readers:
            rest = received(reader)
            assert rest.endswith(b"0\r\n\r\n")
            assert b"event:" not in rest
        assert received(poll).startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 "))
        assert b'"status":503' in received(upload)
        for thread in producing:
            thread.join(TIMEOUT)
    service.process.stdout.close()
    service.process = None
    assert not Path(f"{service.db}-wal").exists()  # nor with Redis, where there is no file

    service.start()
    with httpx.Client(base_url=service.api, timeout=TIMEOUT) as again:
        assert again.get("/threads/t").json()["status"] == "active"
        assert again.get("/threads/u/content").json() | {"cursor": ""} == {
            "content": "kept",
            "cursor": "",
            "status": "active",
        }
        stored = {chunk["content"] for chunk in chunks_of(again, "load")}
    assert {status for _, status in answers} <= {201, 503, None}
    assert {text for text, status in answers if status == 201} <= stored
    assert {text for text, status in answers if status == 503}.isdisjoint(stored)


def chunks_of(client: httpx.Client, thread_id: str, message_id: str | None = None) -> list[dict[str, Any]]:
    chunks: list[dict[str, Any]] = []
    query = {"message_id": message_id} if message_id else {}
    while page := client.get(
        f"/threads/{thread_id}/chunks", params={**query, "after": len(chunks), "limit": 5000}
    ).json()["chunks"]:
        chunks += page
        if message_id:
            break
    return chunks


def producers(service: Service, count: int) -> tuple[list[tuple[str, int | None]], list[threading.Thread]]:
    """Append to one thread until the service is gone. Return what was sent, with the answers, and the threads."""
    answers: list[tuple[str, int | None]] = []

    def produce(name: int) -> None:
        with httpx.Client(base_url=service.api, timeout=TIMEOUT) as client:
            for number in range(100_000):
                text = f"{name}-{number}"
                try:
                    status: int | None = append(client, "load", f"m{name}", text).status_code
                except httpx.TransportError:
                    status = None
                answers.append((text, status))
                if status != 201:
                    return

    threads = [threading.Thread(target=produce, args=(name,), daemon=True) for name in range(count)]
    for thread in threads:
        thread.start()
    return answers, threads


@pytest.mark.parametrize("readers", [pytest.param(0, marks=pytest.mark.sqlite), 20])
def test_a_service_that_is_told_again_and_again_still_stops_cleanly(
    service: Service, client: httpx.Client, readers: int
) -> None:
    append(client, "t", "m", "text")
    assert service.is_elsewhere or Path(f"{service.db}-wal").stat().st_size > 0
    with contextlib.ExitStack() as exits:
        for _ in range(readers):
            received(exits.enter_context(request(service, "GET /api/threads/t/stream HTTP/1.1")), until=b'"seq":1}\n\n')
        process = service.process
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert process.returncode == 0
    process.stdout.close()
    service.process = None
    assert not Path(f"{service.db}-wal").exists()
    if not service.is_elsewhere:
        with contextlib.closing(sqlite3.connect(service.db)) as connection:
            assert connection.execute("select content from chunks").fetchall() == [("text",)]
    service.start()
    assert service.end() == 0  # told at once


# Killed


class Producer(threading.Thread):
    """Sends numbered chunks one after the other, each until it is acknowledged."""

    def __init__(self, service: Service, name: str) -> None:
        super().__init__(daemon=True)
        self.api, self.message = service.api, name
        self.enough = threading.Event()
        self.acknowledged: list[tuple[int, str]] = []
        self.conflicts: list[str] = []
        self.retries = 0

    def text(self, index: int) -> str:
        return f"{self.message}:{index} " + "é" * (index * 31 % 200)

    def run(self) -> None:
        with httpx.Client(base_url=self.api, timeout=TIMEOUT) as client:
            while not self.enough.is_set():
                index = len(self.acknowledged)
                try:
                    answer = append(client, "t", self.message, self.text(index), index=index)
                except httpx.TransportError:
                    self.retries += 1
                    self.enough.wait(0.02)
                    continue
                if answer.status_code in (200, 201):
                    self.acknowledged.append((answer.json()["seq"], self.text(index)))
                elif answer.status_code != 503:
                    self.conflicts.append(answer.text)
                    return


def test_nothing_acknowledged_is_missing_after_the_service_was_killed(service: Service) -> None:
    chance = random.Random(20)
    loaders = [Producer(service, f"m{number}") for number in range(3)]
    for loader in loaders:
        loader.start()

    def total() -> int:
        return sum(len(loader.acknowledged) for loader in loaders)

    for _ in range(2):
        goal = total() + chance.randrange(30, 100)
        wait_until(lambda goal=goal: total() >= goal or any(loader.conflicts for loader in loaders), "appends")
        service.restart()
    goal = total() + 30
    wait_until(lambda: total() >= goal, "appends after the last restart")
    for loader in loaders:
        loader.enough.set()
    for loader in loaders:
        loader.join(TIMEOUT)
        assert loader.conflicts == []
        assert loader.retries > 0
    with httpx.Client(base_url=service.api, timeout=TIMEOUT) as client:
        found = chunks_of(client, "t")
        last_seq = int(client.get("/threads/t").json()["cursor"].partition("-")[2])
    service.kill()

    if not service.is_elsewhere:
        with contextlib.closing(sqlite3.connect(service.db)) as connection:
            assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    stored = [(chunk["seq"], chunk["messageId"], chunk["content"]) for chunk in found]
    assert last_seq == len(stored)
    assert [seq for seq, _, _ in stored] == list(range(1, len(stored) + 1))
    for loader in loaders:
        mine = [(seq, content) for seq, message_id, content in stored if message_id == loader.message]
        assert mine[: len(loader.acknowledged)] == loader.acknowledged
        assert len(mine) - len(loader.acknowledged) in (0, 1)  # the last one may have been stored and not answered


def test_a_reader_carries_on_across_a_kill_with_what_it_has(service: Service, client: httpx.Client) -> None:
    said = ["Once upon ", "a time ", "there was", " a stream 🌊", " that went on", "."]
    have, cursor = "", ""
    append(client, "t", "m", *said[:3])
    with client.stream("GET", "/threads/t/messages/m/stream") as stream:
        for line in stream.iter_lines():
            cursor = line[4:] if line.startswith("id: ") else cursor
            if line.startswith("data: "):
                have += json.loads(line[6:])["content"]
                if len(have) > 12:
                    break  # cut off
    service.restart()
    append(client, "t", "m", *said[3:], index=3, complete=True)
    for resume, known in (
        (lambda: client.stream("GET", "/threads/t/stream", headers={"Last-Event-ID": cursor}), have),
        (lambda: resumed(client, have[:-4]), have[:-4]),
    ):
        rest, ends = "", 0
        with resume() as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    data = json.loads(line[6:])
                    rest, ends = rest + data.get("content", ""), ends + ("status" in data)
        assert (known + rest, ends) == ("".join(said), 1)


def resumed(client: httpx.Client, known: str) -> Any:
    body = {"thread_id": "t", "message_id": "m", "known_content": known}
    return client.stream("POST", "/resume-stream", json=body)
