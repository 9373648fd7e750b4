"""Fixtures: the code beside these tests, a buffer, and real service processes on real ports."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import httpx
import pytest

ROOT = Path(__file__).parent.parent


def load_app() -> Any:
    """``app.py`` under its import name, so that the tests run what is checked out beside them, ``client`` too."""
    spec = importlib.util.spec_from_file_location(
        "resume_stream", ROOT / "app.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["resume_stream"] = module
    spec.loader.exec_module(module)
    return module


load_app()

from resume_stream import ChunkBuffer, Settings  # noqa: E402


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as many tests wait for another process."""
    return (os.cpu_count() or 1) + 1


TIMEOUT = 20.0  # seconds after which a test gives up waiting


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """The first true value of a condition that some other process is about to make true."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.005)
    raise TimeoutError(f"{what} did not come true within {TIMEOUT} s")


class Service:
    """``resume-stream serve`` as a process of its own."""

    command: ClassVar[list[str]] = [sys.executable, str(ROOT / "app.py")]

    def __init__(self, db: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.db = db
        self.flags = flags
        self.environment = environment or {}
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def api(self) -> str:
        return f"{self.url}/api"

    def start(self, port: int = 0) -> Service:
        command = [*self.command, "serve", "--db", str(self.db), "--port", str(port), *self.flags]
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.whole_environment
            )
            line = self.process.stdout.readline()
            found = re.search(r"http://\S+:\d+", line)
            if not found:
                log.seek(0)
                raise RuntimeError(f"the service did not start: {line}{log.read()}")
        self.url = found[0]
        return self

    @property
    def whole_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def terminate(self) -> int:
        return self.end(signal.SIGTERM)

    def end(self, sig: int) -> int:
        self.process.send_signal(sig)
        code = self.process.wait(TIMEOUT)
        self.process.stdout.close()
        self.process = None
        return code

    def restart(self) -> Service:
        """Die without warning, and come back on the same port."""
        port = self.port
        self.kill()
        return self.start(port)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services; what is still running at the end of the test is killed."""
    started: list[Service] = []

    def start(*flags: str, db: Path | None = None, environment: dict[str, str] | None = None) -> Service:
        service = Service(db or tmp_path / "chunks.db", *flags, environment=environment)
        started.append(service)
        return service.start()

    yield start
    for service in started:
        if service.process is not None:
            service.kill()


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    return start_service()


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """A client of the running service's API."""
    with httpx.Client(base_url=service.api, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def thread() -> str:
    """A thread of the test's own, in a service that it shares with others."""
    return f"thread-{uuid4()}"


@pytest.fixture
def make_buffer(tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[ChunkBuffer]]:
    """Make buffers on the test's own database: ``async with make_buffer(ttl=1) as buffer``."""

    def make(**settings: Any) -> ChunkBuffer:
        return ChunkBuffer(Settings(**{"db": str(tmp_path / "chunks.db"), **settings}))

    return make


@pytest.fixture
async def buffer(make_buffer: Callable[..., ChunkBuffer]) -> AsyncIterator[ChunkBuffer]:
    async with make_buffer() as buffer:
        yield buffer


def append(client: httpx.Client, thread_id: str, message_id: str, *texts: str, **query: Any) -> httpx.Response:
    """Append texts as one JSON body."""
    path = f"/threads/{thread_id}/messages/{message_id}/chunks"
    return client.post(path, params=query, json=[{"content": text} for text in texts])
