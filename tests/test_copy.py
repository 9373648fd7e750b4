"""``resume-stream copy``: threads go from a SQLite file to Redis and back, and readers carry on from their cursors."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RedisServer, Service, api_client, append, wait_until, why_no_redis
from resume_stream import app
from wire import Stream, data_of, message_path

pytestmark = pytest.mark.skipif(bool(why_no_redis()), reason=why_no_redis())

Copied = Callable[[str | Path, str | Path], str]


@pytest.fixture
def copied(capsys: pytest.CaptureFixture[str]) -> Copied:
    """Return a function that copies from one store to another, and returns what the command prints."""

    def copied(source: str | Path, target: str | Path) -> str:
        assert app.main(["copy", str(source), str(target)]) == 0
        return capsys.readouterr().err

    return copied


def everything(client: httpx.Client) -> dict[str, Any]:
    """Return status, chunks, and content of each thread, in the order of the list."""
    listed = client.get("/threads").json()["threads"]
    return {
        thread["threadId"]: (
            client.get(f"/threads/{thread['threadId']}").json(),
            client.get(f"/threads/{thread['threadId']}/chunks").json(),
            client.get(f"/threads/{thread['threadId']}/content").json(),
        )
        for thread in listed
    }


def fill(client: httpx.Client) -> None:
    append(client, "first", "run", *(f"{number} ü🙂," for number in range(150)), complete="true")
    append(client, "second", "one", "a", "b")
    append(client, "second", "two", "c")
    client.post(message_path("second", "two", "abort"), json={"reason": "enough"})
    append(client, "second", "one", "d")
    client.post(message_path("second", "one"), json=[{"content": "{}", "event": "tool"}])
    client.put("/threads/opened/messages/run")


def test_a_copy_equals_its_source_and_so_does_the_copy_of_the_copy(
    tmp_path: Path, redis_server: RedisServer, copied: Copied
) -> None:
    address, back = redis_server.address(), tmp_path / "back.db"
    with Service(tmp_path / "origin.db") as service, api_client(service) as client:
        fill(client)
        original = everything(client)
        said = copied(service.db, address)  # while it is served
        assert "\r3 of 3 threads" in said
        assert f"{address} has all that {service.db} has" in said
    with Service(tmp_path / "redis.db", store=address) as service, api_client(service) as client:
        assert everything(client) == original
        copied(address, back)
    with Service(back) as service, api_client(service) as client:
        assert everything(client) == original
        assert app.main(["check", "--db", str(back)]) == 0
        append(client, "third", "run", "x")
        assert list(everything(client)) == ["third", *original]


def test_readers_producers_and_their_retries_carry_on_with_the_copy(
    tmp_path: Path, redis_server: RedisServer, copied: Copied
) -> None:
    address = redis_server.address()
    with Service(tmp_path / "origin.db") as service, api_client(service) as client:
        append(client, "t", "run", *(f"{number}," for number in range(100)), index=0)
        cursor = client.get("/threads/t/chunks?limit=90").json()["cursor"]
        copied(service.db, address)
    with Service(tmp_path / "redis.db", store=address) as service, api_client(service) as client:
        with Stream(service, message_path("t", "run", "stream"), {"Last-Event-ID": cursor}) as reader:
            assert reader.line() == b"retry: 1000\n"
            assert data_of(reader.frame())["seq"] == 91
        again = append(client, "t", "run", *(f"{number}," for number in range(70, 101)), index=70, complete="true")
        assert (again.status_code, again.json()["seq"]) == (201, 102)
        assert append(client, "t", "run", "other", index=99).status_code == 409
        known = {"thread_id": "t", "message_id": "run", "known_content": "".join(f"{n}," for n in range(99))}
        with Stream(service, "/resume-stream", body=known) as reader:
            assert [data_of(frame).get("content") for frame in reader.rest().split(b"\n\n")[:-1]] == [
                "99,",
                "100,",
                None,
            ]


def test_a_second_copy_adds_new_chunks_and_drops_cleared_threads(
    tmp_path: Path, redis_server: RedisServer, copied: Copied
) -> None:
    address = redis_server.address()
    with (
        Service(tmp_path / "origin.db") as service,
        api_client(service) as client,
        Service(tmp_path / "redis.db", store=address) as other,
        api_client(other) as there,
    ):
        append(there, "of its own", "run", "x")
        append(there, "both", "run", "earlier")
        for thread in ("both", "grown", "cleared"):
            append(client, thread, "run", "a")
        copied(service.db, address)
        append(client, "grown", "run", "b", complete="true")
        client.delete("/threads/cleared")
        copied(service.db, address)
        found = {
            thread: [chunk["content"] for chunk in chunks["chunks"]]
            for thread, (_, chunks, _) in everything(there).items()
        }
        assert found == {"grown": ["a", "b"], "both": ["a"], "of its own": ["x"]}
        append(there, "both", "run", "b")
        copied(service.db, address)
        assert there.get("/threads/both/content").json()["content"] == "ab"  # it went on there


def test_a_file_with_threads_of_its_own_is_refused_and_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("origin.db", "target.db")]
    for path in paths:
        with Service(path) as service, api_client(service) as client:
            append(client, path.name, "run", "a")
            service.end()
    assert app.main(["copy", *map(str, paths)]) == 1
    assert "has threads of its own" in capsys.readouterr().err
    with contextlib.closing(sqlite3.connect(paths[1])) as connection:
        assert connection.execute("select thread_id from threads").fetchall() == [("target.db",)]


def test_a_bad_source_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    for source in (tmp_path / "none.db", __file__, f"unix://{tmp_path}/none.sock", "ftp://somewhere"):
        assert app.main(["copy", str(source), str(tmp_path / "target.db")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("resume-stream: ")
        assert "Traceback" not in said
    # A thread that is left behind would keep the process from ending.
    wait_until(lambda: before.issuperset(threading.enumerate()), "the threads of the command to end")
