"""For those who run the service: commands for the database, health checks, and notifications to systemd."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import os
import re
import socket
import sqlite3
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from litestar import get

from ..app import (
    BUSY_TIMEOUT,
    SETTINGS,
    Parts,
    Settings,
    SQLiteStore,
    StartupError,
    __version__,
    open_packs,
    sole_owner,
    unpacked,
)

log = logging.getLogger("resume_stream")

OTHER_VARIABLES = {"URL", "TOKEN"}  # of the client


def set_up(settings: Settings) -> None:
    """Raise StartupError for an environment variable that looks like a misspelled setting."""
    known = [name.upper() for name in SETTINGS]
    for variable in os.environ:
        name = variable.removeprefix("RESUME_STREAM_")
        is_another = name in OTHER_VARIABLES or re.fullmatch("UPSTREAM_[A-Z0-9_]+_HEADERS", name)
        if variable.startswith("RESUME_STREAM_") and name not in known and not is_another:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"perhaps RESUME_STREAM_{near[0]} is meant" if near else "see resume-stream serve --help"
            raise StartupError(f"{variable} is no setting; {hint}")


def mount(parts: Parts) -> None:
    probe: asyncio.Task[None] | None = None

    @get("/health/ready", summary="The database answers and takes writes", scope=None)
    async def ready() -> dict[str, str]:
        """Requests at the same time share one probe."""
        nonlocal probe
        if probe is None or probe.done():
            probe = asyncio.create_task(parts.buffer.store.probe())
        await asyncio.shield(probe)
        return {"status": "ok"}

    parts.root.append(ready)
    parts.on_start.append(start_systemd_notifications)
    parts.on_stop.append(partial(tell_systemd, "STOPPING=1"))


def add_commands(commands: Any) -> None:
    commands.add("check", "say whether the database is sound", check, "db")
    copy = commands.add("backup", "copy the database while the service runs", backup, "db")
    copy.add_argument("file", type=Path)
    put_back = commands.add("restore", "replace the database by a copy", restore, "db")
    put_back.add_argument("file", type=Path)
    commands.add("healthcheck", "ask the running service whether it is ready", healthcheck, "host", "port", "uds")
    commands.add("version", "print the version", lambda settings, flags: print(__version__))


@contextlib.contextmanager
def snapshot_of(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a snapshot of the database, which a service may be using.

    Raise StartupError, also for an SQLite error in the block.
    """
    if not path.exists():
        raise StartupError(f"there is no {path}")
    uri = f"file:{quote(str(path))}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            open_packs(connection)
            if connection.execute("pragma application_id").fetchone() != (SQLiteStore.APPLICATION_ID,):
                raise StartupError(f"{path} is not a database of resume-stream")
            connection.execute("begin")
            yield connection
    except sqlite3.Error as error:
        raise StartupError(f"{path} is damaged, or cannot be read ({error})") from error


def check(settings: Settings, flags: dict[str, Any]) -> None:
    """Print what the database holds. Raise StartupError if it is not sound."""
    path = Path(settings.db)
    with snapshot_of(path) as connection:
        faults = unsound(connection)
        for status, threads, messages, chunks, size in connection.execute(
            "select status, count(*), sum(message_count), sum(chunk_count), sum(size) from thread_summary"
            " group by status order by status"
        ):
            print(f"{status}: {threads} threads, {messages} messages, {chunks} chunks, {size} bytes of text")
    if faults:
        raise StartupError(f"{path} is not sound: {'; '.join(faults)}")
    print(f"{path} is sound")


def unsound(connection: sqlite3.Connection) -> list[str]:
    """Return the faults of a database. A gap in the sequence is none: a message may have been deleted by hand."""
    faults = [text for (text,) in connection.execute("pragma integrity_check") if text != "ok"]
    faults += [
        f"thread {thread_id!r} has a chunk with seq {seq}, and its last seq is {last_seq}"
        for thread_id, last_seq, seq in connection.execute(
            "select thread_id, threads.last_seq, max(places.seq) as seq from threads join"
            " (select thread, seq from chunks union all select thread, last_seq from packs) as places using (thread)"
            " where thread_id is not null group by thread having seq > threads.last_seq"
        )
    ]
    damaged = [
        f"thread {thread_id!r} has a damaged pack (seq {first_seq} to {last_seq}): {fault}"
        for thread_id, first_seq, last_seq, fault in damaged_packs(connection)
    ]
    if damaged:  # the chunks in them cannot be counted
        return faults + damaged
    faults += [
        f"message {message_id!r} says {chunk_count} chunks and has {count}"
        for message_id, chunk_count, count in connection.execute(
            "select message_id, chunk_count, coalesce(held, 0) as count from messages join threads using (thread)"
            " left join (select message as holder, thread as place, count(content) as held from entries group by 1, 2)"
            " on holder = message and place = thread where thread_id is not null and count <> chunk_count"
        )
    ]
    return faults


def damaged_packs(connection: sqlite3.Connection) -> Iterator[tuple[str | None, int, int, str]]:
    """Yield thread_id, first and last seq, and the fault of each damaged pack."""
    for thread_id, first_seq, last_seq, size, data in connection.execute(
        "select thread_id, first_seq, packs.last_seq, size, data from packs left join threads using (thread)"
    ):
        try:
            text = unpacked(data, size)
            entries = len(msgspec.json.decode(text, type=list[tuple[int, str | None, str | None, int]]))
        except (ValueError, TypeError, zlib.error) as error:
            yield thread_id, first_seq, last_seq, str(error)
        else:
            if entries != last_seq + 1 - first_seq:
                yield thread_id, first_seq, last_seq, f"it has {entries} entries"


def backup(settings: Settings, flags: dict[str, Any]) -> None:
    """Copy the database while the service runs. Raise StartupError if that fails."""
    path, target = Path(settings.db), flags["file"]
    if target.exists():
        raise StartupError(f"{target} exists, and would be overwritten; name another file")
    with snapshot_of(path) as source, copied(source, target) as copy:
        os.link(copy, target)  # unlike a rename, this never overwrites
    print(f"\n{target} is a copy of {path}", file=sys.stderr)


def restore(settings: Settings, flags: dict[str, Any]) -> None:
    """Replace the database by a copy while no service runs. Raise StartupError if that fails.

    The service will answer the cursors of the old database with ``reset``, because other text may follow them.
    """
    path, origin = Path(settings.db).resolve(), flags["file"]
    with snapshot_of(origin) as source, sole_owner(path):
        if faults := unsound(source):
            raise StartupError(f"{origin} is not sound: {'; '.join(faults)}")
        with copied(source, path) as copy:
            for rest in ("-wal", "-shm"):
                Path(f"{path}{rest}").unlink(missing_ok=True)
            copy.replace(path)
    print(f"\n{path} is as {origin} is", file=sys.stderr)


@contextlib.contextmanager
def copied(source: sqlite3.Connection, target: Path) -> Iterator[Path]:
    """Make a copy beside ``target`` that only its owner can read, marked as a copy. Delete it afterwards."""
    partial_copy = target.with_name(f"{target.name}.partial")

    def progress(status: int, remaining: int, total: int) -> None:
        print(f"\r{total - remaining} of {total} pages", end="", file=sys.stderr, flush=True)

    source.execute("select * from clock").fetchone()  # the first read takes the snapshot
    try:
        os.close(os.open(partial_copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise StartupError(f"{partial_copy} cannot be made ({error.strerror}); remove it, or make room") from error
    try:
        with contextlib.closing(sqlite3.connect(partial_copy)) as copy:
            source.backup(copy, pages=1000, progress=progress)
            with copy:
                copy.execute("update clock set is_doubtful = 1")
            copy.execute("pragma journal_mode = delete")  # so that the copy is one file
        yield partial_copy
    except (sqlite3.Error, OSError) as error:
        raise StartupError(f"{target} cannot be written ({error})") from error
    finally:
        partial_copy.unlink(missing_ok=True)


def healthcheck(settings: Settings, flags: dict[str, Any]) -> None:
    """Raise StartupError unless the running service is ready."""
    try:
        with contextlib.closing(connection_to(settings)) as connection:
            connection.request("GET", "/health/ready", headers={"Host": "localhost"})
            answer = connection.getresponse()
            body = answer.read().decode()
    except OSError as error:
        raise StartupError(f"the service does not answer ({error})") from error
    if answer.status != HTTPStatus.OK:
        raise StartupError(f"the service is not ready: {body}")
    print("ready")


def connection_to(settings: Settings) -> HTTPConnection:
    connection = HTTPConnection(settings.host, settings.port, timeout=2 * BUSY_TIMEOUT)
    if settings.uds:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(2 * BUSY_TIMEOUT)
        connection.sock.connect(settings.uds)
    return connection


def tell_systemd(state: str) -> None:
    """Notify systemd if it started this process (sd_notify(3)). An address with ``@`` is an abstract socket."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0.1)  # the loop must not wait for systemd
            try:
                sender.sendto(state.encode(), re.sub("^@", "\0", address))
            except OSError as error:
                log.warning("cannot tell systemd %s: %s", state, error)


def start_systemd_notifications() -> None:
    """Tell systemd that the service is ready, and then feed its watchdog."""
    tell_systemd("READY=1")
    if interval := int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6:
        feed_watchdog(asyncio.get_running_loop(), interval / 2)


def feed_watchdog(loop: asyncio.AbstractEventLoop, every: float) -> None:
    tell_systemd("WATCHDOG=1")
    loop.call_later(every, feed_watchdog, loop, every)
