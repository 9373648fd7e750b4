"""Servers to measure, each in its own process on 127.0.0.1."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .results import BenchError, Unavailable

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resume-stream-bench"
OLD_COMMIT = "95ac55e4218facc73080f1a25a9ddae0969a7eea"  # version 0.1, in this project's history
DURABLE_STREAMS = ("@durable-streams/server", "0.3.7")
RESUMABLE_STREAM = ("resumable-stream", "2.2.13")
NODE_REDIS = ("redis", "6.3.1")  # the client that resumable-stream uses
NCHAN_PLACES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
START_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class Api:
    """The paths of a kind of server. ``@`` stands for the name of a thread, stream, or channel."""

    append: str
    stream: str = ""
    create: str = ""
    create_type: str = ""


SERVICE = Api("/api/threads/@/messages/run/chunks", "/api/threads/@/stream?follow=true", "/api/threads/@/messages/run")
DURABLE_STREAMS_API = Api("/@", "/@?offset=-1&live=sse", "/@", "application/json")
RESUMABLE_STREAM_API = Api("/@", "/@", "/@")
NCHAN = Api("/pub/@", "/sub/@")


@dataclass(frozen=True)
class Server:
    """A running server. ``store`` is the port of the server that stores for it, if there is one."""

    port: int
    pid: int
    api: Api = SERVICE
    store: int | None = None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], folder: Path, port: int | None = None, api: Api = SERVICE, **variables: str
) -> Iterator[Server]:
    """Start the command and yield it once it accepts connections.

    Without ``port``, the first lines of its output say where it listens. It has its own session, so that
    Ctrl-C reaches only this process, which then ends the server.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RESUME_STREAM_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**environment, **variables},
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield Server(_listening(process, port, log), process.pid, api)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[bytes], port: int | None, log: Path) -> int:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if port is None and (said := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))):
            port = int(said[1])
        if port is not None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                return port
        time.sleep(0.002)
    raise BenchError(f"{process.args!r} did not start: {log.read_text(errors='replace')[-500:]}")


def program(name: str) -> str:
    """Return the path of a program. Raise Unavailable."""
    if (path := shutil.which(name)) is None:
        raise Unavailable(f"{name} is not installed")
    return path


def service(folder: Path, flags: Sequence[str] = (), tree: Path = ROOT) -> contextlib.AbstractContextManager[Server]:
    """Start resume-stream with its defaults, except that no stream and no message times out."""
    patience = ("--idle-timeout", "0", "--producer-timeout", "0")
    database = folder / "chunks.db"
    return running(
        [sys.executable, tree / "app.py", "serve", "--port", "0", "--db", database, *patience, *flags], folder
    )


def old_service(folder: Path, flags: Sequence[str] = ()) -> contextlib.AbstractContextManager[Server]:
    """Start version 0.1 under the same Python, with the same packages. Raise Unavailable."""
    return service(folder, flags, old_tree())


def old_tree() -> Path:
    """Return the folder of version 0.1, taken from the history into the cache. Raise Unavailable."""
    tree = CACHE / f"resume-stream-{OLD_COMMIT[:7]}"
    if tree.exists():
        return tree
    archive = [program("git"), "-C", str(ROOT), "archive", OLD_COMMIT]
    done = subprocess.run(archive, capture_output=True, check=False)
    if done.returncode:
        raise Unavailable("it is not in the history of this folder, if that has one")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(Path(folder, "tree"), filter="data")
        Path(folder, "tree").rename(tree)
    return tree


def old_binary() -> Path:
    """Return the single binary of version 0.1, built by its own script. Raise Unavailable."""
    tree = old_tree()
    binary = tree / "dist" / "resume-stream"
    if not binary.exists():
        build = [sys.executable, str(tree / "deploy" / "build_binary.py")]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"its binary cannot be built: {done.stderr.strip()[-200:]}")
    return binary


def peer(
    folder: Path, module: str, arguments: Sequence[str | int] = (), api: Api = SERVICE
) -> contextlib.AbstractContextManager[Server]:
    """Start ``python -m bench.MODULE PORT …``."""
    port = free_port()
    return running([sys.executable, "-m", f"bench.{module}", *map(str, (port, *arguments))], folder, port, api)


def redis(folder: Path) -> contextlib.AbstractContextManager[Server]:
    """Start a Redis that syncs to the disk before it acknowledges. Raise Unavailable."""
    try:
        import redis  # noqa: F401
    except ImportError as error:
        raise Unavailable("the Python package redis is not installed") from error
    port = free_port()
    flags = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always")
    folder.mkdir(parents=True, exist_ok=True)
    return running([program("redis-server"), "--port", str(port), "--dir", str(folder), *flags], folder, port)


@contextlib.contextmanager
def handler_with_redis(folder: Path) -> Iterator[Server]:
    """Start a Litestar handler in front of Redis Streams. Raise Unavailable."""
    with redis(folder) as store, peer(folder / "handler", "peer_apps", [store.port]) as server:
        yield dataclasses.replace(server, store=store.port)


@contextlib.contextmanager
def behind_nginx(folder: Path, count: int, flags: Sequence[str]) -> Iterator[Server]:
    """Start so many processes of resume-stream behind nginx. Raise Unavailable."""
    with contextlib.ExitStack() as exits:
        processes = [exits.enter_context(service(folder / f"process-{number}", flags)) for number in range(count)]
        upstream = " ".join(f"server 127.0.0.1:{process.port};" for process in processes)
        http = f"upstream processes {{ {upstream} keepalive 64; keepalive_timeout 4s; }}"
        yield exits.enter_context(nginx(folder / "nginx", PASSES_ON, http))


def durable_streams(folder: Path, *, in_memory: bool = False) -> contextlib.AbstractContextManager[Server]:
    """Start the Node server of Durable Streams, with its file store or in memory. Raise Unavailable."""
    node = program("node")
    install(DURABLE_STREAMS)
    data = folder / "data"
    data.mkdir(parents=True)
    where: list[str | Path] = [] if in_memory else [data]
    return running([node, PACKAGE / "durable_streams.mjs", CACHE, *where], folder, api=DURABLE_STREAMS_API)


def resumable_stream(folder: Path, store: Server) -> contextlib.AbstractContextManager[Server]:
    """Start the Node library resumable-stream in a server written for it. Raise Unavailable."""
    node = program("node")
    install(RESUMABLE_STREAM, NODE_REDIS)
    address = f"redis://127.0.0.1:{store.port}"
    command: list[str | Path] = [node, PACKAGE / "resumable_stream.mjs", CACHE]
    return running(command, folder, api=RESUMABLE_STREAM_API, REDIS_URL=address)


def installed_version(name: str) -> str:
    """Return the version of an npm package in the cache, or nothing."""
    manifest = CACHE / "node_modules" / name / "package.json"
    return str(json.loads(manifest.read_text())["version"]) if manifest.exists() else ""


def install(*packages: tuple[str, str]) -> None:
    """Install npm packages into a cache outside of the repository. Raise Unavailable."""
    wanted = [f"{name}@{version}" for name, version in packages if installed_version(name) != version]
    if not wanted:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [program("npm"), "install", "--prefix", str(CACHE), "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"npm cannot install {', '.join(wanted)}: {done.stderr[-200:]}")


NGINX = """
{head}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        {locations}
    }}
}}
"""

PASSES_ON = """
        location / {
            proxy_pass http://processes;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
            client_max_body_size 0;
        }
"""
ANSWERS_201 = 'location / { return 201 "{}"; }'
NCHAN_LOCATIONS = r"""
        location ~ ^/pub/(.+)$ {
            nchan_publisher;
            nchan_channel_id $1;
            nchan_message_buffer_length 1000000;
            nchan_message_timeout 1h;
        }
        location ~ ^/sub/(.+)$ { nchan_subscriber eventsource; nchan_channel_id $1; }
"""


def nginx(
    folder: Path, locations: str = ANSWERS_201, http: str = "", load_module: str = "", api: Api = SERVICE
) -> contextlib.AbstractContextManager[Server]:
    """Start nginx with one worker. Raise Unavailable."""
    path = program("nginx")
    port = free_port()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    head = "user root;\n" if os.geteuid() == 0 else ""
    head += f"load_module {load_module};" if load_module else ""
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(head=head, folder=folder, http=http, port=port, locations=locations))
    return running([path, "-p", folder, "-c", settings, "-e", folder / "error.log"], folder, port, api)


def nchan(folder: Path) -> contextlib.AbstractContextManager[Server]:
    """Start nginx with nchan, which keeps its messages in memory. Raise Unavailable."""
    places = [Path(place) / "ngx_nchan_module.so" for place in NCHAN_PLACES]
    module = next((place for place in places if place.exists()), None)
    if module is None:
        raise Unavailable("nginx's module nchan is not installed")
    return nginx(folder, NCHAN_LOCATIONS, "nchan_shared_memory_size 1024M;", str(module), NCHAN)
