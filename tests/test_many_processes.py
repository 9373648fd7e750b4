"""Many processes of the service on one Redis. None owns anything, any of them may die, and so may Redis."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import RedisServer, Service, api_client, append, wait_until, why_no_redis
from wire import TEXT, Stream, Upload, contents, data_of, message_path, problem

pytestmark = pytest.mark.skipif(bool(why_no_redis()), reason=why_no_redis())

LEARNED_WITHIN = 5.0  # seconds for an end, a clear, or an expiry; one on an idle machine
PATIENCE = 1  # seconds
GONE_FRAME = b"event: gone\ndata: {}\n\n"

Start = Callable[..., Service]
Trio = tuple[Service, Service, Service]


@pytest.fixture(scope="module")
def trio(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Three processes that most tests share."""
    folder, address = tmp_path_factory.mktemp("trio"), redis_server.address()
    with contextlib.ExitStack() as exits:
        services = [Service(folder / f"{n}.db", "--idle-timeout", "0", store=address) for n in range(3)]
        one, two, three = (exits.enter_context(service) for service in services)
        yield one, two, three


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a process of the service. All of them are killed at the end."""
    numbers = itertools.count()
    with contextlib.ExitStack() as exits:

        def start(address: str, *flags: str) -> Service:
            db = tmp_path / f"{next(numbers)}.db"
            return exits.enter_context(Service(db, "--idle-timeout", "0", *flags, store=address))

        yield start


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may stop. It keeps what it acknowledged. Services wait for it as long as ``PATIENCE``."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, "--appendonly", "yes", "--appendfsync", "always")
    yield server.start()
    server.end()


def began(stream: Stream) -> Stream:
    assert stream.line() == b"retry: 1000\n"
    return stream


def seqs(stream: Stream, count: int) -> list[int]:
    return [data_of(stream.frame())["seq"] for _ in range(count)]


def patient_seqs(service: Service, stream: Stream, after: int, count: int) -> list[int]:
    """Read on as a client does: where the stream ends because Redis does not answer, connect again."""
    seen: list[int] = []
    while len(seen) < count:
        frame = stream.frame()
        if frame.startswith(b"id: "):
            seen.append(data_of(frame)["seq"])
            continue
        assert (frame.startswith(b"event: error\n"), data_of(frame)["status"]) == (True, 503)
        assert stream.frame() == b""
        after = seen[-1] if seen else after
        with began(Stream(service, f"/threads/t/stream?follow=true&after={after}")) as again:
            return seen + patient_seqs(service, again, after, count - len(seen))
    return seen


def seqs_after(seq: int, stream: Stream, service: Service) -> list[int]:
    """Read a stream to its end. If it asked Redis during the pause, its reader is told so, and comes back."""
    frames = stream.rest().split(b"\n\n")[:-1]
    if frames and b"event: error" in frames[-1]:
        assert data_of(frames.pop())["status"] == 503
        seq = data_of(frames[-1])["seq"] if frames else seq
        with Stream(service, f"/threads/t/stream?after={seq}") as again:
            frames += began(again).rest().split(b"\n\n")[:-1]
    return [data_of(frame)["seq"] for frame in frames]


def test_producer_readers_and_abort_may_use_different_processes(trio: Trio, thread: str) -> None:
    one, two, three = trio
    with (
        api_client(one) as producer,
        api_client(three) as third,
        Stream(two, f"/threads/{thread}/stream?follow=true") as follower,
        Stream(three, f"/threads/{thread}/stream?follow=true") as another,
    ):
        began(follower), began(another)
        for number in range(20):
            append(producer, thread, "run", f"{number}", index=number).raise_for_status()
        with Stream(two, message_path(thread, "run", "stream")) as reader:
            began(reader)
            assert seqs(reader, 20) == seqs(follower, 20) == seqs(another, 20) == list(range(1, 21))
            told_at = time.monotonic()
            third.post(message_path(thread, "run", "abort"), json={"reason": "stop"}).raise_for_status()
            ends = [data_of(stream.frame()) for stream in (reader, follower, another)]
            assert time.monotonic() - told_at < LEARNED_WITHIN
            assert [(end["status"], end["seq"]) for end in ends] == [("aborted", 21)] * 3
        refused = append(producer, thread, "run", "more", index=20)
        assert (problem(refused)[0], refused.json()["reason"]) == (409, "stop")


def test_a_chunk_reaches_readers_of_another_process_within_milliseconds(trio: Trio, thread: str) -> None:
    one, two, _ = trio
    with api_client(one) as producer, Stream(two, f"/threads/{thread}/stream?follow=true") as reader:
        began(reader)
        append(producer, thread, "run", "first")
        reader.frame()
        took = []
        for number in range(50):
            began_at = time.monotonic()
            append(producer, thread, "run", f"{number}")
            reader.frame()
            took.append(time.monotonic() - began_at)
        assert sorted(took)[len(took) // 2] < 0.2  # some ms on an idle machine


def test_readers_of_another_process_are_told_of_a_clear(trio: Trio, thread: str) -> None:
    one, two, three = trio
    with (
        api_client(one) as producer,
        api_client(three) as other,
        Stream(two, f"/threads/{thread}/stream?follow=true") as reader,
    ):
        began(reader)
        append(producer, thread, "run", "a")
        assert seqs(reader, 1) == [1]
        told_at = time.monotonic()
        other.delete(f"/threads/{thread}").raise_for_status()
        assert reader.rest() == GONE_FRAME
        assert time.monotonic() - told_at < LEARNED_WITHIN
        assert append(producer, thread, "run", "b").json()["seq"] == 1
        assert contents(other, thread) == ["b"]


def test_an_abort_in_another_process_ends_an_upload(trio: Trio, thread: str) -> None:
    one, two, _ = trio
    with api_client(two) as other, Upload(one, message_path(thread, "run"), TEXT) as upload:
        upload.send(b"first")
        wait_until(lambda: other.get(f"/threads/{thread}").status_code == 200, "the first piece")
        told_at = time.monotonic()
        other.post(message_path(thread, "run", "abort")).raise_for_status()
        status, document = upload.answer()
        assert time.monotonic() - told_at < LEARNED_WITHIN
        assert (status, document["messageStatus"]) == (409, "aborted")


def test_readers_of_another_process_are_told_of_expiry_and_producer_timeout(
    redis_server: RedisServer, start: Start
) -> None:
    address = redis_server.address()
    one, two = (start(address, "--ttl", "2500ms", "--producer-timeout", "300ms") for _ in range(2))
    with api_client(one) as producer, Stream(two, "/threads/t/stream?follow=true") as reader:
        began(reader)
        append(producer, "t", "run", "a")
        assert seqs(reader, 1) == [1]
        end = data_of(reader.frame())
        assert (end["seq"], end["status"], end["reason"]) == (2, "aborted", "producer_timeout")
        before_it = time.monotonic()
        append(producer, "t", "next", "b", complete=True)
        assert seqs(reader, 2) == [3, 4]  # and no second end of the first
        assert reader.rest() == GONE_FRAME
        assert 2.5 <= time.monotonic() - before_it < 2.5 + LEARNED_WITHIN
        assert producer.get("/threads").json()["threads"] == []


def test_another_process_goes_on_after_one_is_killed(redis_server: RedisServer, start: Start) -> None:
    address = redis_server.address()
    one, two = start(address), start(address)
    with api_client(two) as other, Stream(two, "/threads/t/stream?follow=true") as reader:
        began(reader)
        with api_client(one) as producer:
            for number in range(5):
                append(producer, "t", "run", f"{number}", index=number).raise_for_status()
        one.kill()
        again = append(other, "t", "run", "4", "5", index=4, complete=True)
        assert (again.status_code, again.json()["seq"]) == (201, 7)
        assert seqs(reader, 7) == [1, 2, 3, 4, 5, 6, 7]
        assert contents(other, "t") == [f"{number}" for number in range(6)]


def test_a_restart_of_redis_loses_nothing(own_redis: RedisServer, start: Start) -> None:
    address = f"{own_redis.address()}&socket_timeout={PATIENCE}"
    one, two = start(address), start(address)
    with api_client(one) as producer, Stream(two, "/threads/t/stream?follow=true") as reader:
        began(reader)
        append(producer, "t", "run", "a", index=0).raise_for_status()
        assert seqs(reader, 1) == [1]
        own_redis.end(signal.SIGKILL)
        refused = append(producer, "t", "run", "b", index=1)
        assert problem(refused)[0] == 503
        assert "Redis" in refused.json()["detail"]
        assert httpx.get(f"{one.url}/health/ready").status_code == 503
        own_redis.start()
        wait_until(lambda: append(producer, "t", "run", "b", index=1).is_success, "an append to be taken again")
        append(producer, "t", "run", "c", index=2, complete=True).raise_for_status()
        assert patient_seqs(two, reader, 1, 3) == [2, 3, 4]
        assert contents(producer, "t") == ["a", "b", "c"]
    assert one.tracebacks() == two.tracebacks() == 0


@pytest.mark.parametrize("pause", ["CLIENT PAUSE", "SIGSTOP"])
def test_an_append_during_a_pause_of_redis_is_stored_once(own_redis: RedisServer, start: Start, pause: str) -> None:
    address = f"{own_redis.address()}&socket_timeout={PATIENCE}"
    one, two = start(address), start(address)
    with contextlib.ExitStack() as exits:
        producer = exits.enter_context(api_client(one))
        append(producer, "t", "run", "a", index=0).raise_for_status()
        reader = began(exits.enter_context(Stream(two, "/threads/t/stream")))
        assert seqs(reader, 1) == [1]
        if pause == "SIGSTOP":
            own_redis.send(signal.SIGSTOP)
        else:
            assert own_redis.says("CLIENT", "PAUSE", f"{1500 * PATIENCE}", "ALL") == b"+OK\r\n"
        refused = append(producer, "t", "run", "b", index=1)
        status, document = problem(refused)
        assert (status, "nobody knows" in document["detail"]) == (503, True)
        if pause == "SIGSTOP":
            own_redis.send(signal.SIGCONT)
        wait_until(lambda: append(producer, "t", "run", "b", index=1).is_success, "an append to be taken again")
        append(producer, "t", "run", "c", index=2, complete=True).raise_for_status()
        assert seqs_after(1, reader, two) == [2, 3, 4]
        assert contents(producer, "t") == ["a", "b", "c"]


def test_a_full_memory_is_507_and_takes_appends_again_once_there_is_room(tmp_path: Path, start: Start) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", "noeviction").start()
    try:
        with api_client(start(server.address())) as client:
            stored = 0
            while (answer := append(client, "big", "run", "x" * 100_000, index=stored)).status_code == 201:
                stored += 1
                assert stored < 100
            assert problem(answer)[0] == 507
            assert stored > 5
            assert [len(text) for text in contents(client, "big")] == [100_000] * stored
            assert client.delete("/threads/big").status_code == 204
            wait_until(lambda: append(client, "after", "run", "y").status_code == 201, "room")
    finally:
        server.end()


def refusal(start: Start, address: str) -> str:
    with pytest.raises(RuntimeError) as raised:
        start(address)
    return str(raised.value)


def test_a_redis_that_cannot_be_reached_is_refused_in_one_line(tmp_path: Path, start: Start) -> None:
    said = refusal(start, f"unix://{tmp_path}/none.sock")
    assert "resume-stream: Redis cannot be reached" in said
    assert "Traceback" not in said


def test_the_log_says_at_the_start_what_this_redis_cannot_promise(tmp_path: Path, start: Start) -> None:
    server = RedisServer(tmp_path, "--maxmemory-policy", "allkeys-lru").start()
    try:
        service = start(server.address())
        log = service.log.read_text()
        assert "set it to noeviction" in log
        assert "appendonly is no" in log
    finally:
        server.end()


def test_no_password_is_printed(redis_server: RedisServer, start: Start) -> None:
    said = refusal(start, "redis://someone:hunter2@127.0.0.1:1/0")
    assert "cannot be reached" in said
    assert "hunter2" not in said
