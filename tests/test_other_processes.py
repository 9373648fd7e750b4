"""Changes with the ``sqlite3`` shell, while the service runs, come out right."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from buffers import FailsOnce, Polls, Reading, attached, follow, take
from conftest import TIMEOUT, Service, append, until, wait_until
from httpx_sse import connect_sse
from resume_stream import app
from resume_stream.app import ChunkBuffer, Signal
from wire import NDJSON, Upload, message_path

pytestmark = pytest.mark.anyio

SOON = 1.0  # seconds: the default poll_interval of 100 ms, and room for two busy cores
DELETE = "delete from threads where thread_id = 't'"
ABORT = "update messages set status = 'aborted', reason = 'by hand' where message_id = 'm'"


def shell(db: Path | str, sql: str, *options: str) -> str:
    command = ["sqlite3", "-batch", "-cmd", ".timeout 5000", *options, str(db), sql]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


class Reader(threading.Thread):
    """Follows a stream to its end, in a thread of its own."""

    def __init__(self, url: str, **query: Any) -> None:
        super().__init__(daemon=True)
        self.url, self.query = url, query
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.Client(timeout=TIMEOUT) as client,
            connect_sse(client, "GET", self.url, params=self.query) as source,
        ):
            for event in source.iter_sse():
                self.events.append((event.event, event.json()))
        self.ended_at = time.monotonic()

    def waits_after(self, count: int) -> Reader:
        wait_until(lambda: len(self.events) >= count, f"{count} events from {self.url}")
        return self

    def finished(self) -> list[tuple[str, dict[str, Any]]]:
        self.join(TIMEOUT)
        assert not self.is_alive()
        return self.events


# A running service, and the shell


def test_readers_of_a_thread_that_the_shell_deletes_are_told_soon(service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one", "two")
    append(client, "other", "m", "stays")
    thread = f"{service.api}/threads/t"
    readers = [
        Reader(f"{thread}/stream"),
        Reader(f"{thread}/stream", follow="true"),
        Reader(f"{thread}/messages/m/stream"),
        Reader(f"{thread}/messages/m/stream", after=1),
    ]
    other = Reader(f"{service.api}/threads/other/stream").waits_after(1)
    for reader in readers:
        reader.waits_after(1 if "after" in reader.query else 2)
    shell(service.db, DELETE)
    deleted_at = time.monotonic()
    for reader in readers:
        assert reader.finished()[-1] == ("gone", {})
        assert reader.ended_at - deleted_at < SOON
    assert shell(service.db, "select count(*) from chunks") == "1\n"
    assert client.get("/threads/t").status_code == 404
    append(client, "other", "m", "still here")
    assert [data["content"] for _, data in other.waits_after(2).events] == ["stays", "still here"]


def test_a_long_poll_on_a_thread_that_the_shell_deletes_is_answered_soon(
    service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "one")
    answers: list[httpx.Response] = []
    path = f"{service.api}/threads/t/chunks"
    polling = threading.Thread(
        target=lambda: answers.append(httpx.get(path, params={"after": 1, "wait": 15}, timeout=TIMEOUT))
    )
    polling.start()
    wait_until(lambda: client.get("/threads/t").json()["readers"] == 1, "the long poll")
    shell(service.db, DELETE)
    deleted_at = time.monotonic()
    polling.join(TIMEOUT)
    assert time.monotonic() - deleted_at < SOON
    assert answers[0].status_code in (404, 410)


def test_an_end_made_with_the_shell_ends_readers_and_uploads(service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one")
    append(client, "t", "n", "two")
    whole = Reader(f"{service.api}/threads/t/stream").waits_after(2)
    reader = Reader(f"{service.api}/threads/t/messages/m/stream").waits_after(1)
    with Upload(service, message_path("t", "m"), NDJSON) as upload:
        upload.send(b'{"content":"three"}\n')
        whole.waits_after(3)
        shell(service.db, ABORT)
        ended_at = time.monotonic()
        end = ("complete", {"messageId": "m", "status": "aborted", "reason": "by hand", "seq": 4})
        assert reader.finished()[-1] == end
        assert reader.ended_at - ended_at < SOON
        status, answer = upload.answer()
        assert time.monotonic() - ended_at < SOON
    assert (status, answer["reason"]) == (409, "by hand")
    refused = append(client, "t", "m", "too late")
    assert (refused.status_code, refused.json()["reason"]) == (409, "by hand")
    assert append(client, "t", "n", "five").json()["seq"] == 5
    client.post("/threads/t/messages/n/complete")
    assert [data["seq"] for _, data in whole.finished()] == [1, 2, 3, 4, 5, 6]
    assert whole.events[3] == end
    shown = shell(service.db, "select seq, event, content from sequence where seq = 4")
    assert shown == "4|complete|aborted: by hand\n"


def test_an_upload_into_a_thread_that_the_shell_deletes_is_answered_early(
    service: Service, client: httpx.Client
) -> None:
    with Upload(service, message_path("t", "m"), NDJSON) as upload:
        upload.send(b'{"content":"one"}\n')
        wait_until(lambda: client.get("/threads/t").status_code == 200, "the thread")
        shell(service.db, DELETE)
        assert upload.answer()[0] == 409
    assert client.get("/threads/t").status_code == 404


def test_an_ended_message_cannot_be_opened_again_with_the_shell(service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one")
    with pytest.raises(RuntimeError, match="CHECK"):
        shell(service.db, "update messages set status = 'paused'")
    client.post("/threads/t/messages/m/complete")
    for status in ("active", "aborted"):
        with pytest.raises(RuntimeError, match="an end is final"):
            shell(service.db, f"update messages set status = '{status}'")
    assert client.get("/threads/t").json()["status"] == "completed"
    assert append(client, "t", "m", "two").status_code == 409


def test_a_thread_made_again_after_the_shell_deleted_it_has_a_new_generation(
    service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "one", "two")
    old = client.get("/threads/t/content").json()["cursor"]
    shell(service.db, DELETE)
    assert append(client, "t", "m", "other", complete=True).json()["seq"] == 2
    new = client.get("/threads/t/content").json()["cursor"]
    assert int(new.split("-")[0]) > int(old.split("-")[0])
    assert client.get("/threads/t/chunks", params={"after": old}).status_code == 410
    events = Reader(f"{service.api}/threads/t/stream", after=old).finished()
    assert [event for event, _ in events] == ["reset", "message", "complete"]
    assert events[1][1]["content"] == "other"


def test_the_views_show_a_prefix_at_any_time_while_chunks_are_written(service: Service, client: httpx.Client) -> None:
    count, done, texts, failures = 400, threading.Event(), [""], []
    whole = "".join(f"{number} " for number in range(count))
    append(client, "t", "m")
    look = "select text from transcript; select chunks, bytes from overview; select max(seq), count(*) from sequence"

    def read() -> None:
        try:
            while not done.is_set():
                rows = shell(service.db, look, "-readonly").splitlines()
                texts.append(rows[0])
                chunks, size = map(int, rows[1].split("|"))
                assert size == len("".join(whole.split(" ")[:chunks])) + chunks
                last_seq, places = rows[2].split("|")
                assert int(last_seq or 0) == int(places) >= chunks
        except Exception as error:
            failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    for number in range(count):
        assert append(client, "t", "m", f"{number} ").status_code == 201
    wait_until(lambda: failures or texts[-1] == whole, "the last look")
    done.set()
    reading.join(TIMEOUT)
    assert failures == []
    assert all(whole.startswith(text) for text in texts)
    assert texts == sorted(texts, key=len)
    assert len(set(texts)) > 5


# The same, with nothing polled yet


@pytest.fixture
async def blind(make_buffer: Any) -> Any:
    """A buffer that does not look for other processes' changes within this test."""
    async with make_buffer(poll_interval=600) as buffer:
        yield buffer


async def test_an_append_right_after_the_shell_takes_the_next_place(blind: ChunkBuffer) -> None:
    await blind.add_chunks("t", "m", ["one"])
    await blind.add_chunks("t", "n", ["two"])
    reading = await attached(blind, follow(blind, "t", follow=True, idle_timeout=10), 7)
    for message_id, place in (("m", 4), ("n", 6)):
        shell(blind.settings.db, ABORT.replace("'m'", f"'{message_id}'"))
        assert (await blind.add_chunks("t", f"after {message_id}", [message_id])).seq == place
    with pytest.raises(app.Conflict):
        await blind.add_chunks("t", "m", ["too late"])
    await blind.complete_message("t", "after m")
    assert await reading == [
        (1, "one"),
        (2, "two"),
        (3, "by hand"),
        (4, "m"),
        (5, "by hand"),
        (6, "n"),
        (7, "completed"),
    ]


async def test_an_append_right_after_the_shell_deleted_the_thread_makes_a_new_one(blind: ChunkBuffer) -> None:
    await blind.add_chunks("t", "m", ["one", "two"])
    old = (await blind.get_accumulated_content("t")).cursor
    reading = await Reading(blind.resume_stream("t", "m", idle_timeout=10)).has((1, "one"), (2, "two"))
    shell(blind.settings.db, DELETE)
    assert (await blind.add_chunks("t", "m", ["other"])).seq == 1
    assert await reading == [(1, "one"), (2, "two"), Signal.GONE]
    assert await take(blind.resume_stream("t", "m", after=old), 2) == [Signal.RESET, (1, "other")]


async def test_an_early_follower_is_told_that_the_thread_is_another_one(blind: ChunkBuffer) -> None:
    """Otherwise it would wait at its old place, and miss all before that in the new thread."""
    reading = await attached(blind, follow(blind, "t", follow=True, idle_timeout=3))
    await blind.add_chunks("t", "m", ["one", "two", "three"])
    await reading.has(*(old := [(1, "one"), (2, "two"), (3, "three")]))
    shell(blind.settings.db, DELETE)
    for text in "abcde":
        await blind.add_chunks("t", "m", [text])
    assert await reading == [*old, Signal.GONE]


async def test_text_of_the_deleted_thread_is_never_served_to_readers_of_the_new_one(blind: ChunkBuffer) -> None:
    await blind.open_message("t", "m")
    slow = blind.resume_stream("t", "m", idle_timeout=10)
    reading = asyncio.create_task(anext(slow))
    await until(lambda: blind.readers, "the reader")
    for text in ("old 1", "old 2", "old 3"):
        await blind.add_chunks("t", "m", [text])
    assert (await reading).content == "old 1"  # and this reader reads no further
    shell(blind.settings.db, DELETE)
    await blind.add_chunks("t", "m", ["new 1", "new 2", "new 3"], complete=True)
    for after in range(3):
        got = await take(blind.resume_stream("t", "m", after=after))
        assert got == [*((seq, f"new {seq}") for seq in range(after + 1, 4)), (4, "completed")]
    await slow.aclose()


# Polling


@pytest.mark.parametrize("change", [DELETE, ABORT])
async def test_the_first_reader_of_all_is_told_too(make_buffer: Any, change: str) -> None:
    async with make_buffer(poll_interval=0.3) as buffer:
        await buffer.add_chunks("t", "m", ["one"])
        items = buffer.resume_stream("t", "m", idle_timeout=3)
        assert (await anext(items)).seq == 1
        shell(buffer.settings.db, change)
        last = await anext(items)
        assert last is Signal.GONE or getattr(last, "reason", None) == "by hand"
        await items.aclose()


async def test_a_patient_reader_does_not_delay_another(make_buffer: Any) -> None:
    async with make_buffer(poll_interval=0.05) as buffer:
        for thread_id in ("t", "u"):
            await buffer.add_chunks(thread_id, "m", ["one"])
        # Once it has got something, the buffer polls for it.
        patient = await Reading(buffer.resume_stream("u", "m", None, 600, idle_timeout=60)).has((1, "one"))
        other = await Reading(buffer.resume_stream("t", "m", idle_timeout=3)).has((1, "one"))
        shell(buffer.settings.db, DELETE)
        assert await other == [(1, "one"), Signal.GONE]
        await patient.cancel()


async def test_a_change_that_could_not_be_read_is_read_again(make_buffer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_buffer(poll_interval=0.02) as buffer:
        await buffer.add_chunks("t", "m", ["one"])
        polls = Polls(buffer, monkeypatch)
        reading = await Reading(buffer.resume_stream("t", "m", idle_timeout=3)).has((1, "one"))
        await polls.go_on(2)
        failure = FailsOnce(buffer, monkeypatch)
        shell(buffer.settings.db, DELETE)
        assert await reading == [(1, "one"), Signal.GONE]
        assert failure.has_failed


async def test_nothing_is_polled_while_no_one_reads(make_buffer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_buffer(poll_interval=0.01) as buffer:
        await buffer.add_chunks("t", "m", ["one"])
        polls = Polls(buffer, monkeypatch)
        reading = await Reading(buffer.resume_stream("t", "m")).has((1, "one"))
        await polls.go_on(3)
        await reading.cancel()
        for _ in range(5):  # a poll may be under way
            await asyncio.sleep(0.01)
        rest = polls.count
        for _ in range(10):
            await asyncio.sleep(0.01)
        assert polls.count == rest
