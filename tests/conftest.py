"""Fixtures: the code beside these tests, a buffer, and real service processes on real ports."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import functools
import importlib.util
import inspect
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, TextIO
from uuid import uuid4

import httpx
import pytest
from checkout import load_app
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings

ROOT = Path(__file__).parent.parent
CHECKOUT = ROOT / "tests/checkout.py"
ssl.create_default_context = functools.cache(ssl.create_default_context)  # each client would load all certificates
load_app()  # the tests run the code beside them, whatever else is installed

from resume_stream.app import ChunkBuffer, Settings  # noqa: E402
from resume_stream.extras import hot  # noqa: E402


class RootIsAFolder:
    """Collect the checkout as a folder: pytest could not import it as a package if its name has a hyphen."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsAFolder())


def pytest_xdist_auto_num_workers() -> int:
    """Return one more than there are cores, as many tests wait for another process."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Cancel a coroutine test that waits in vain, so that its buffers are closed and the next test can begin."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return

    @functools.wraps(test)
    async def within_time(**arguments: Any) -> None:
        async with asyncio.timeout(3 * TIMEOUT):
            await test(**arguments)

    pyfuncitem.obj = within_time


TIMEOUT = 20.0  # seconds after which a test gives up waiting
LONGER = int(os.environ.get("TESTS_LONGER", "1"))


def generated(examples: int, **more: Any) -> hypothesis_settings:
    """Settings for a test of generated examples: the same ones each time, or ``TESTS_LONGER`` times as many others."""
    return hypothesis_settings(
        **{"phases": [Phase.explicit, Phase.generate, Phase.shrink], **more},
        max_examples=examples * LONGER,
        derandomize=LONGER == 1,
        deadline=None,
        database=None,
        print_blob=True,
    )


def pauses() -> Iterator[float]:
    """Yield the seconds between two looks at a condition: more and more of them, as a look may cost something."""
    pause = 0.001
    while True:
        yield pause
        pause = min(pause * 1.5, 0.03)


def wait_until(condition: Callable[[], Any], what: str | Callable[[], str] = "the condition") -> Any:
    """Wait for a condition that another process makes true, and return its first true value."""
    deadline = time.monotonic() + TIMEOUT
    for pause in pauses():
        if value := condition():
            return value
        if time.monotonic() > deadline:
            break
        time.sleep(pause)
    raise TimeoutError(f"{what if isinstance(what, str) else what()} did not come true within {TIMEOUT:g} s")


async def until(
    condition: Callable[[], Any],
    what: str = "the condition",
    seconds: float = TIMEOUT,
    despite: tuple[type[Exception], ...] = (),
) -> Any:
    """Wait for a condition, plain or a coroutine, and return its first true value. Errors in ``despite`` are false."""
    deadline = time.monotonic() + seconds
    for pause in pauses():
        with contextlib.suppress(*despite):
            value = condition()
            if value := await value if inspect.isawaitable(value) else value:
                return value
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(pause)
    raise TimeoutError(f"{what} did not come true within {seconds:g} s")


class Forked:
    """A process that this one has adopted, with the methods of ``subprocess.Popen``."""

    def __init__(self, pid: int, stdout: TextIO) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        if self.poll() is None:
            process = os.pidfd_open(self.pid)
            select.select([process], [], [], timeout)
            os.close(process)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("resume-stream", timeout)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts the command in a quarter of the time that a new Python takes."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: adopt processes whose parents end
        self._requests, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen([sys.executable, "-P", str(CHECKOUT), "--fork"], stdin=other)
        self._lock = threading.Lock()
        other.close()
        atexit.register(self._end)

    def start(self, log: BinaryIO, **request: Any) -> Forked:
        output, end = os.pipe()
        with self._lock:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [end, log.fileno()])
            os.close(end)
            pid = int(self._requests.recv(100))
        return Forked(pid, os.fdopen(output))

    def _end(self) -> None:
        self._requests.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()


def run_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run ``resume-stream`` in a process of its own."""
    how = {"environment": dict(os.environ), "folder": str(Path.cwd()), "first": ""}
    with tempfile.TemporaryFile() as errors:
        process = fork_server().start(errors, arguments=[*map(str, arguments)], **how)
        with process.stdout:
            output = process.stdout.read()
        code = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output, errors.read().decode())


class Service:
    """``resume-stream serve`` as a process of its own. A restart keeps the port.

    Its log goes to a file, as a pipe that nobody reads would stop it.
    """

    command: ClassVar[list[str]] = [sys.executable, "-P", str(CHECKOUT)]
    first: ClassVar[str] = ""  # Python code that runs before the command

    def __init__(
        self,
        db: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        wrap: Sequence[str] = (),
        store: str = "",
    ) -> None:
        self.db = db
        self.flags = (*flags, "--store", store) if store else flags
        self.is_elsewhere = bool(store)  # then there is no database file
        self.environment = environment or {}
        self.wrap = wrap
        self.log = db.with_name(f"{db.name}.log")
        self.cwd: Path | None = None
        self.process: subprocess.Popen[str] | Forked | None = None
        self.url = ""
        self.port = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.kill()

    @property
    def api(self) -> str:
        return f"{self.url}/api"

    @property
    def whole_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def spawn(self) -> subprocess.Popen[str] | Forked:
        """Start the process without waiting until it serves."""
        arguments = ["serve", "--db", str(self.db), "--port", str(self.port), *self.flags]
        environment = self.whole_environment
        with self.log.open("ab") as log:
            if self.command is Service.command and not self.wrap:
                how = {"arguments": arguments, "environment": environment, "folder": str(self.cwd or Path.cwd())}
                self.process = fork_server().start(log, first=self.first, **how)
            else:
                command = [*self.wrap, *self.command, *arguments]
                self.process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=self.cwd
                )
        return self.process

    def start(self) -> Self:
        process = self.spawn()
        assert process.stdout
        impatience = threading.Timer(TIMEOUT, process.kill)
        impatience.start()
        try:
            line = process.stdout.readline()
        finally:
            impatience.cancel()
        found = re.search(r"http://\S+:(\d+)", line)
        if not found:
            code = self.end(signal.SIGKILL)
            raise RuntimeError(f"the service did not start (exit code {code}): {line}{self.log.read_text()[-2000:]}")
        self.url, self.port = found[0], int(found[1])
        return self

    def end(self, sig: int = signal.SIGTERM) -> int:
        """Send the signal and return the exit code. If the process goes on, kill it and raise TimeoutExpired."""
        process, self.process = self.process, None
        assert process
        assert process.stdout
        process.send_signal(sig)
        try:
            return process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def restart(self) -> Self:
        """Kill the process and start it again."""
        self.kill()
        return self.start()

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def pids(self) -> list[int]:
        """The ids of all processes of this service."""
        return [self.pid]

    def memory(self) -> int:
        """Return the bytes that its processes have in memory."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids]
        return sum(int(kib) * 1024 for status in statuses for kib in re.findall(r"VmRSS:\s+(\d+) kB", status))

    def tracebacks(self) -> int:
        return self.log.read_text().count("Traceback (most recent call last)")


def api_client(service: Service) -> httpx.Client:
    return httpx.Client(base_url=service.api, timeout=TIMEOUT)


class RedisServer:
    """A Redis process on a Unix socket that keeps nothing after its end. Each address is an empty database."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.options = options
        self.databases = iter(range(4096))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        command += ["--save", "", "--databases", "4096", "--logfile", str(self.folder / "redis.log"), *self.options]
        self.process = process = subprocess.Popen(command)
        wait_until(lambda: self.answers() or process.poll() is not None, "Redis to answer")
        assert process.poll() is None, (self.folder / "redis.log").read_text()
        return self

    def says(self, *command: str) -> bytes:
        """Send an inline command and return the raw answer (RESP)."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(str(self.socket))
            connection.sendall(" ".join(command).encode() + b"\r\n")
            return connection.recv(65536)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.says("PING") == b"+PONG\r\n"
        return False

    def send(self, sig: int) -> None:
        assert self.process
        self.process.send_signal(sig)

    def end(self, sig: int = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(sig)
            process.wait(TIMEOUT)

    def address(self) -> str:
        """Return the address of a database that nobody else uses."""
        return f"unix://{self.socket}?db={next(self.databases)}"


def why_no_redis() -> str:
    if importlib.util.find_spec("redis") is None:
        return "there is no redis-py; pip install '.[redis]'"
    return "" if shutil.which("redis-server") else "there is no redis-server"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a file on each store in its ``STORES``."""
    if "store" in metafunc.fixturenames and (stores := getattr(metafunc.module, "STORES", ())):
        metafunc.parametrize("store", stores, indirect=True, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what is marked ``sqlite`` on that store only."""

    def is_wanted(item: Any) -> bool:
        return not item.get_closest_marker("sqlite") or item.callspec.params.get("store", "sqlite") == "sqlite"

    items[:] = filter(is_wanted, items)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if reason := why_no_redis():
        pytest.skip(reason)
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server.start()
    server.end()


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Return a function that returns the address of an empty store, as ``--store`` takes it: "" for a SQLite file.

    With ``sqlite-in-thread`` the loop never commits by itself, as on a slow disk.
    """
    kind = getattr(request, "param", "sqlite")
    with pytest.MonkeyPatch.context() as patch:
        if kind == "sqlite-in-thread":
            patch.setattr(hot, "FEW_WRITES", 0)
        yield request.getfixturevalue("redis_server").address if kind == "redis" else str


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def start_service(tmp_path: Path, store: Callable[[], str]) -> Iterator[Callable[..., Service]]:
    """Return a function that starts a service. Services that still run at the end of the test are killed."""
    address = store()
    with contextlib.ExitStack() as exits:

        def start(*flags: str, db: Path | None = None, environment: dict[str, str] | None = None) -> Service:
            path = db or tmp_path / "chunks.db"
            return exits.enter_context(Service(path, *flags, environment=environment, store=address))

        yield start


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    return start_service()


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """A client of the service's API."""
    with api_client(service) as client:
        yield client


@pytest.fixture
def thread() -> str:
    """The id of a thread that no other test uses."""
    return f"thread-{uuid4()}"


@pytest.fixture
def make_buffer(
    tmp_path: Path, store: Callable[[], str]
) -> Callable[..., contextlib.AbstractAsyncContextManager[ChunkBuffer]]:
    """Return a function that makes a buffer on the test's database: ``async with make_buffer(ttl=1) as buffer``."""
    address = store()

    def make(**settings: Any) -> ChunkBuffer:
        return ChunkBuffer(Settings(**{"db": str(tmp_path / "chunks.db"), "store": address, **settings}))

    make.address = address
    return make


@pytest.fixture
async def buffer(make_buffer: Callable[..., ChunkBuffer]) -> AsyncIterator[ChunkBuffer]:
    buffer = make_buffer()
    await buffer.__aenter__()
    yield buffer
    async with asyncio.timeout(TIMEOUT):
        await buffer.__aexit__(None, None, None)


def append(client: httpx.Client, thread_id: str, message_id: str, *texts: str, **query: Any) -> httpx.Response:
    """Append texts with one JSON body."""
    path = f"/threads/{thread_id}/messages/{message_id}/chunks"
    return client.post(path, params=query, json=[{"content": text} for text in texts])
