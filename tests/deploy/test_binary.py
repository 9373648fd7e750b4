"""The single binary on a host without Python. ``python deploy/build_binary.py`` makes it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Self

import httpx
import pytest
import wire
from conftest import ROOT, TIMEOUT, RedisServer, Service, api_client, append, wait_until
from relayed import Relay
from resume_stream import app
from upstream import CHAT, Upstream, shared_upstream
from websockets.sync.client import connect

BINARY = Path(os.environ.get("BINARY", ROOT / "dist" / "resume-stream"))
SECRET = "a secret of more than thirty-two bytes"
MB = 1_000_000

pytestmark = pytest.mark.skipif(not BINARY.is_file(), reason=f"there is no {BINARY}; run deploy/build_binary.py")


class Binary(Service):
    """The binary with an empty environment. It is two processes: one unpacks, the other serves."""

    command: ClassVar[list[str]] = [str(BINARY)]
    serving: int | None = None

    def start(self) -> Self:
        shutil.rmtree(self.unpacked, ignore_errors=True)  # a kill of both leaves it behind
        self.unpacked.mkdir()
        super().start()
        self.serving = int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0])
        return self

    @property
    def unpacked(self) -> Path:
        return self.db.parent / "unpacked"

    @property
    def whole_environment(self) -> dict[str, str]:
        return {"PATH": "", "TMPDIR": str(self.unpacked), **self.environment}

    def kill(self) -> None:
        """Kill both processes, as a power cut does."""
        if self.serving is not None and not self.is_gone():
            os.kill(self.serving, signal.SIGKILL)
            wait_until(self.is_gone, "the end of the process that serves")
        super().kill()

    def is_gone(self) -> bool:
        try:
            return Path(f"/proc/{self.serving}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):  # it may go before the open, or between open and read
            return True

    @property
    def pids(self) -> list[int]:
        return [self.pid, self.serving]


@pytest.fixture
def start_binary(tmp_path: Path) -> Iterator[Callable[..., Binary]]:
    with contextlib.ExitStack() as exits:

        def start(*flags: str, environment: dict[str, str] | None = None) -> Binary:
            return exits.enter_context(Binary(tmp_path / "chunks.db", *flags, environment=environment))

        yield start


upstream = shared_upstream()


@pytest.fixture(scope="module")
def shared_binary(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Binary]:
    folder = tmp_path_factory.mktemp("binary")
    with Binary(folder / "chunks.db", "--upstream", f"up={upstream.url}") as binary:
        yield binary


@pytest.fixture
def binary(shared_binary: Binary) -> Binary:
    """Return the binary that the tests share. A test may end it."""
    return shared_binary if shared_binary.is_running else shared_binary.start()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs one of the binary's commands with an empty environment."""

    def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BINARY, *words],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env={"PATH": "", "TMPDIR": str(tmp_path), **environment},
        )

    return run


def test_what_is_acknowledged_is_read_and_resumed_after_a_sigkill(binary: Binary, thread: str) -> None:
    with api_client(binary) as client:
        assert append(client, thread, "m", "Hello", " wor").json()["seq"] == 2
        with wire.Stream(binary, f"/threads/{thread}/messages/m/stream") as reader:
            assert reader.line() == b"retry: 1000\n"
            frames = [reader.frame(), reader.frame()]
            cursor = frames[1].splitlines()[0].removeprefix(b"id: ").decode()
            binary.restart()
        assert client.get(f"/threads/{thread}/content").json()["content"] == "Hello wor"
        with wire.Stream(binary, f"/threads/{thread}/messages/m/stream", {"Last-Event-ID": cursor}) as reader:
            assert append(client, thread, "m", "ld", index=2, complete="true").status_code == 201
            rest = reader.rest()
        assert [wire.data_of(frame).get("content") for frame in rest.split(b"\n\n")[:-1]] == ["ld", None]
        known = {"thread_id": thread, "message_id": "m", "known_content": "Hell"}
        with wire.Stream(binary, "/resume-stream", body=known) as reader:
            frames = reader.rest().split(b"\n\n")[:-1]
        assert [wire.data_of(frame).get("content") for frame in frames] == ["o", " wor", "ld", None]


def test_websocket(binary: Binary, thread: str) -> None:
    place = {"thread_id": thread, "message_id": "m"}
    with connect(f"ws://127.0.0.1:{binary.port}/api/ws", proxy=None) as socket:
        socket.send(json.dumps({"type": "subscribe", "id": 1, "thread_id": thread, "follow": True}))
        socket.send(json.dumps({"type": "append", "id": 2, **place, "chunks": [{"content": "Hello"}]}))
        answers = {answer["type"]: answer for answer in (json.loads(socket.recv(TIMEOUT)) for _ in range(2))}
    assert answers["appended"]["seq"] == 1
    assert answers["chunk"]["content"] == "Hello"


def test_it_relays(binary: Binary, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    with Relay(binary) as relay:
        assert relay.ask(CHAT).content.endswith(b"data: [DONE]\n\n")


def test_what_it_serves_are_the_files_beside_these_tests(binary: Binary) -> None:
    with httpx.Client(base_url=binary.url, timeout=TIMEOUT) as client:
        assert client.get("/").content == (ROOT / "static" / "index.html").read_bytes()
        for path in filter(Path.is_file, (ROOT / "static").rglob("*")):
            url = f"/{path.relative_to(ROOT).as_posix()}"
            assert client.get(url).content == path.read_bytes(), f"{path.name}: build it again"
        assets = set(re.findall(r"/schema/assets/[a-z.-]+", client.get("/schema/swagger").text))
        assert [client.get(asset).status_code for asset in assets] == [200, 200, 200]
        assert client.get("/schema/openapi.json").json()["info"]["version"] == app.__version__


def test_version(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("version")
    assert (result.returncode, result.stdout) == (0, f"{app.__version__}\n")


def test_healthcheck(binary: Binary, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert run("healthcheck", "--port", str(binary.port)).returncode == 0
    result = run("healthcheck", RESUME_STREAM_PORT="9")
    assert result.returncode == 1
    assert "does not answer" in result.stderr


def test_check_and_backup(
    binary: Binary, thread: str, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with api_client(binary) as client:
        append(client, thread, "m", "Hello", complete="true")
    copy = tmp_path / "copy.db"
    assert run("backup", "--db", binary.db, copy).returncode == 0
    result = run("check", "--db", copy)
    assert result.returncode == 0
    assert re.search(r"^completed: \d+ threads, ", result.stdout, re.MULTILINE)
    assert result.stdout.endswith(f"{copy} is sound\n")
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(copy.read_bytes()[:5000] + b"?" * 5000 + copy.read_bytes()[10_000:])
    assert run("check", "--db", damaged).returncode == 1


def test_a_token_that_it_makes_opens_what_it_serves(
    start_binary: Callable[..., Binary], run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    token = run("token", "--scope", "read write", "--thread", "t", RESUME_STREAM_SECRET=SECRET).stdout.strip()
    binary = start_binary(environment={"RESUME_STREAM_SECRET": SECRET})
    with api_client(binary) as client:
        assert append(client, "t", "m", "Hello").status_code == 401
        client.headers["Authorization"] = f"Bearer {token}"
        assert append(client, "t", "m", "Hello").status_code == 201
        assert append(client, "another", "m", "Hello").status_code == 403


def test_it_keeps_threads_in_redis_and_copies_them(
    binary: Binary,
    thread: str,
    start_binary: Callable[..., Binary],
    run: Callable[..., subprocess.CompletedProcess[str]],
    redis_server: RedisServer,
) -> None:
    address = redis_server.address()
    with api_client(binary) as client:
        append(client, thread, "m", "Hello")
    copied = run("copy", binary.db, address)
    assert copied.returncode == 0, copied.stderr
    with api_client(start_binary("--store", address)) as client:
        assert append(client, thread, "m", " world", index=1).json()["seq"] == 2
        assert client.get(f"/threads/{thread}/content").json()["content"] == "Hello world"


def test_size() -> None:
    assert BINARY.stat().st_size < 45 * MB


# Its end


def test_sigterm_ends_it_with_0_and_leaves_nothing_unpacked(binary: Binary) -> None:
    assert list(binary.unpacked.iterdir())
    assert binary.end() == 0
    assert list(binary.unpacked.iterdir()) == []


def test_first_answer_and_memory_when_idle(
    shared_binary: Binary, record_property: Callable[[str, object], None]
) -> None:
    if shared_binary.is_running:
        shared_binary.kill()
    began = time.perf_counter()
    binary = shared_binary.start()
    httpx.get(f"{binary.url}/health/ready", timeout=TIMEOUT).raise_for_status()
    took = time.perf_counter() - began
    memory = binary.memory()
    print(f"\n{BINARY.stat().st_size / MB:.1f} MB, first answer after {took:.2f} s, {memory / MB:.0f} MB when idle")
    record_property("first_answer_seconds", took)
    record_property("idle_memory_bytes", memory)
    assert took < 5  # below 1 s on a quiet machine
    assert memory < 80 * MB


def test_killing_the_process_that_was_started_ends_the_one_that_serves(binary: Binary) -> None:
    binary.process.kill()
    wait_until(binary.is_gone, "the end of the process that serves")
    assert list(binary.unpacked.iterdir()) == []
