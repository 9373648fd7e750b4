"""``app.py`` and ``schema.sql`` in an empty folder are the whole service."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, TIMEOUT, Service, api_client, append, wait_until
from wire import Stream, contents, data_of, message_path, problem


class Alone(Service):
    """The two files, run where they are. Without the other files, settings come from the environment."""

    def __init__(self, folder: Path, *flags: str) -> None:
        names = [flag.removeprefix("--").replace("-", "_").upper() for flag in flags[::2]]
        settings = {f"RESUME_STREAM_{name}": value for name, value in zip(names, flags[1::2], strict=True)}
        super().__init__(folder / "chunks.db", environment={"PYTHONPATH": "", **settings})
        for name in ("app.py", "schema.sql"):
            shutil.copy(ROOT / name, folder)
        self.cwd = folder

    def spawn(self) -> subprocess.Popen[str]:
        self.environment |= {"RESUME_STREAM_DB": str(self.db), "RESUME_STREAM_PORT": str(self.port)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "app.py", "serve"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.whole_environment,
                cwd=self.cwd,
            )
        return self.process


@pytest.fixture
def start_alone(tmp_path: Path) -> Iterator[Callable[..., Alone]]:
    started: list[Alone] = []

    def start(*flags: str) -> Alone:
        started.append(Alone(tmp_path, *flags))
        assert {path.name for path in tmp_path.iterdir()} == {"app.py", "schema.sql"}
        return started[-1].start()

    yield start
    for service in started:
        if service.process is not None:
            service.kill()


def test_it_streams_and_resumes_through_a_sigkill(start_alone: Callable[..., Alone]) -> None:
    service = start_alone()
    with api_client(service) as client, Stream(service, "/threads/t/stream?follow=true") as reader:
        assert reader.line() == b"retry: 1000\n"
        cursors = []
        for seq, text in enumerate(["Hel", "lo"], 1):
            answer = append(client, "t", "run", text, index=seq - 1)
            assert (answer.status_code, answer.json()["seq"]) == (201, seq)
            frame = reader.frame()
            assert (data_of(frame)["content"], data_of(frame)["seq"]) == (text, seq)
            cursors.append(frame.partition(b"\n")[0].removeprefix(b"id: ").decode())
        service.restart()
        assert contents(client, "t") == ["Hel", "lo"]
        assert append(client, "t", "run", "lo", index=1).status_code == 200  # its producer had no answer
        known = {"thread_id": "t", "message_id": "run", "known_content": "Hell"}
        with (
            Stream(service, message_path("t", "run", "stream"), {"Last-Event-ID": cursors[0]}) as by_cursor,
            Stream(service, "/resume-stream", body=known) as by_text,
        ):
            assert [one.line() for one in (by_cursor, by_text)] == [b"retry: 1000\n"] * 2
            assert [data_of(one.frame())["content"] for one in (by_cursor, by_text)] == ["lo", "o"]
            append(client, "t", "run", "!", index=2, complete=True)
            rests = [one.rest() for one in (by_cursor, by_text)]
        chunk, end, nothing = rests[0].split(b"\n\n")
        assert rests[1] == rests[0]
        assert (data_of(chunk)["content"], data_of(end)["status"], nothing) == ("!", "completed", b"")
        generation = cursors[0].partition("-")[0]
        assert client.get("/threads/t/stream", headers={"Last-Event-ID": f"{generation}-4"}).status_code == 204
        assert client.get("/threads/t/content").json() == {
            "content": "Hello!",
            "cursor": f"{generation}-4",
            "status": "completed",
        }
    assert service.end() == 0
    assert not Path(f"{service.db}-wal").exists()
    assert service.tracebacks() == 0


def test_it_opens_ends_lists_and_clears(start_alone: Callable[..., Alone]) -> None:
    service = start_alone()
    with api_client(service) as client:
        assert httpx.get(f"{service.url}/health/live").json() == {"status": "ok"}
        assert client.put("/threads/t/messages/run").status_code == 201
        assert client.put("/threads/t/messages/run").status_code == 200
        chunks = [{"content": "a"}, {"content": "b", "event": "tool"}]
        assert client.post(message_path("t", "run"), json=chunks).json()["chunkCount"] == 2
        assert problem(append(client, "t", "run", "x", index=3))[0] == 409
        assert client.post("/threads/t/messages/run/complete").json()["status"] == "completed"
        assert problem(append(client, "t", "run", "x"))[0] == 409
        append(client, "t", "stopped", "c")
        aborted = client.post("/threads/t/messages/stopped/abort", json={"reason": "enough"})
        assert aborted.json()["status"] == "aborted"

        first = client.get("/threads/t/chunks", params={"limit": 2}).json()
        rest = client.get("/threads/t/chunks", params={"after": first["cursor"]}).json()
        assert [chunk["seq"] for chunk in first["chunks"] + rest["chunks"]] == [1, 2, 4]
        assert [(end["seq"], end["reason"]) for end in rest["ends"]] == [(3, None), (5, "enough")]
        assert rest["status"] == "aborted"
        status = client.get("/threads/t").json()
        assert [message["status"] for message in status["messages"]] == ["completed", "aborted"]
        assert client.get("/threads/t/content", headers={"Accept": "text/plain"}).text == "abc"

        append(client, "u", "run", "x")
        assert [thread["threadId"] for thread in client.get("/threads").json()["threads"]] == ["u", "t"]
        active = client.get("/threads", params={"status": "active"}).json()
        assert [thread["threadId"] for thread in active["threads"]] == ["u"]
        assert client.delete("/threads/t").status_code == 204
        assert problem(client.get("/threads/t"))[0] == 404
        files = b"".join(path.read_bytes() for path in (service.db, Path(f"{service.db}-wal")))
        assert b"enough" not in files
    assert service.end() == 0


def test_it_aborts_a_message_whose_producer_is_silent(start_alone: Callable[..., Alone]) -> None:
    service = start_alone("--producer-timeout", "300ms")
    with api_client(service) as client, Stream(service, "/threads/t/stream?follow=true") as reader:
        append(client, "t", "run", "text")
        assert reader.line() == b"retry: 1000\n"
        assert data_of(reader.frame())["content"] == "text"
        assert data_of(reader.frame())["reason"] == "producer_timeout"
        assert problem(append(client, "t", "run", "too late"))[0] == 409


def test_its_wal_stays_small(start_alone: Callable[..., Alone]) -> None:
    service = start_alone("--synchronous", "NORMAL")
    with api_client(service) as client:
        for _ in range(60):
            append(client, "t", "run", "x" * 1_000_000)
        assert Path(f"{service.db}-wal").stat().st_size < 24 * 1024**2


def test_a_file_has_one_owner(start_alone: Callable[..., Alone], tmp_path: Path) -> None:
    service = start_alone()
    environment = {**service.whole_environment, "RESUME_STREAM_PORT": "0"}
    command = [sys.executable, "app.py", "serve"]
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (second.returncode, second.stdout) == (1, "")
    assert "is already served" in second.stderr
    assert service.end() == 0


def test_a_start_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = Alone(tmp_path)
        service.port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match="cannot listen"):
            service.start()
    assert not service.db.exists()


def test_it_erases_what_has_expired(start_alone: Callable[..., Alone]) -> None:
    service = start_alone("--ttl", "500ms", "--cleanup-interval", "50ms", "--poll-interval", "50ms")
    with api_client(service) as client:
        append(client, "t", "run", "a text that is erased")
        with Stream(service, "/threads/t/stream") as reader:
            assert b"a text that is erased" in reader.frame()
            assert reader.rest() == b"event: gone\ndata: {}\n\n"
        assert problem(client.get("/threads/t"))[0] == 404
        files = [service.db, Path(f"{service.db}-wal")]
        wait_until(lambda: not any(b"is erased" in file.read_bytes() for file in files), "the text erased")
        assert append(client, "t", "run", "new").json()["seq"] == 1
    assert service.tracebacks() == 0


def test_it_refuses_pages_of_other_origins(start_alone: Callable[..., Alone]) -> None:
    service = start_alone()
    own = {"Origin": service.url}
    with api_client(service) as client:
        assert client.post(message_path("t", "run"), json={"content": "x"}, headers=own).status_code == 201
        for foreign in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
            refused: list[httpx.Response] = [
                client.get("/threads/t/stream", params={"idle_timeout": 0.01}, headers=foreign),
                client.get("/threads/t", headers=foreign),
                client.post(message_path("t", "run"), content=b'{"content": "x"}', headers=foreign),
                client.put("/threads/t/messages/new", headers=foreign),
                client.delete("/threads/t", headers=foreign),
            ]
            for answer in refused:
                assert problem(answer)[0] == 403
                assert "access-control-allow-origin" not in answer.headers
        assert contents(client, "t") == ["x"]
        assert len(client.get("/threads/t").json()["messages"]) == 1


@pytest.mark.parametrize(
    ("flags", "extra"), [(("--upstream", "a=http://127.0.0.1:1"), "relay"), (("--secret", "s" * 32), "tokens")]
)
def test_it_says_what_it_cannot_do_alone(start_alone: Callable[..., Alone], flags: tuple[str, str], extra: str) -> None:
    with pytest.raises(RuntimeError, match=f"put extras/{extra} in place"):
        start_alone(*flags)


@pytest.mark.parametrize(
    ("extra", "flags", "says"),
    [
        ("page.py", (), "extras/page.py takes the folder static and extras/websocket.py"),
        ("redis_store", ("--store", "redis://127.0.0.1:1"), "--store takes extras/elsewhere.py"),
    ],
)
def test_an_extra_says_what_else_it_takes(tmp_path: Path, extra: str, flags: tuple[str, str], says: str) -> None:
    service = Alone(tmp_path, *flags)
    (tmp_path / "extras").mkdir()
    (shutil.copytree if (ROOT / "extras" / extra).is_dir() else shutil.copy)(
        ROOT / "extras" / extra, tmp_path / "extras" / extra
    )
    with pytest.raises(RuntimeError, match=says), service:
        pass


def test_what_is_left_of_a_removed_extra_does_not_count(tmp_path: Path) -> None:
    service = Alone(tmp_path, "--upstream", "a=http://127.0.0.1:1")
    (tmp_path / "extras" / "relay" / "__pycache__").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="put extras/relay in place"), service:
        pass


def test_the_commands_of_the_client_are_there_if_it_is(tmp_path: Path) -> None:
    service = Alone(tmp_path)
    (tmp_path / "extras").mkdir()
    shutil.copy(ROOT / "extras" / "clients.py", tmp_path / "extras")
    with service, api_client(service) as client:
        assert append(client, "t", "m", "x").status_code == 201
