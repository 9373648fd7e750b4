"""What whoever runs the service has beside it: commands that look at the database, and systemd."""

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
import weakref
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
    Buffer,
    ChunkBuffer,
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


OTHER_VARIABLES = {"URL", "TOKEN"}  # those of the client


def set_up(settings: Settings) -> None:
    """Raises StartupError for a variable that would be a setting if it were spelled right."""
    known = [name.upper() for name in SETTINGS]
    for variable in os.environ:
        name = variable.removeprefix("RESUME_STREAM_")
        is_another = name in OTHER_VARIABLES or re.fullmatch("UPSTREAM_[A-Z0-9_]+_HEADERS", name)
        if variable.startswith("RESUME_STREAM_") and name not in known and not is_another:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"perhaps RESUME_STREAM_{near[0]} is meant" if near else "see resume-stream serve --help"
            raise StartupError(f"{variable} is no setting; {hint}")


def mount(parts: Parts) -> None:
    parts.root.append(ready)
    parts.on_start.append(tell_systemd_that_it_runs)
    parts.on_stop.append(partial(tell_systemd, "STOPPING=1"))


def add_commands(commands: Any) -> None:
    commands.add("check", "say whether the database is sound", check, "db")
    copy = commands.add("backup", "copy the database while the service runs", backup, "db")
    copy.add_argument("file", type=Path)
    put_back = commands.add("restore", "put a copy in the place of the database", restore, "db")
    put_back.add_argument("file", type=Path)
    commands.add("healthcheck", "ask the running service whether it is ready", healthcheck, "host", "port", "uds")
    commands.add("version", "print the version", lambda settings, flags: print(__version__))


PROBES: weakref.WeakKeyDictionary[ChunkBuffer, asyncio.Task[None]] = weakref.WeakKeyDictionary()


@get("/health/ready", summary="The database answers and takes writes", scope=None)
async def ready(buffer: Buffer) -> dict[str, str]:
    """Those who ask at the same time share one answer."""
    probe = PROBES.get(buffer)
    if probe is None or probe.done():
        probe = PROBES[buffer] = asyncio.create_task(buffer.store.probe())
    await asyncio.shield(probe)
    return {"status": "ok"}


@contextlib.contextmanager
def snapshot_of(path: Path) -> Iterator[sqlite3.Connection]:
    """The database as it is at one moment, while the service may run.

    Raises StartupError, also for an error of the block.
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
    """Say what the database holds, and whether it is sound. Raises StartupError if it is not."""
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
    """What is wrong with a database. A message that was deleted by hand leaves its places empty, which is not."""
    faults = [text for (text,) in connection.execute("pragma integrity_check") if text != "ok"]
    faults += [
        f"thread {thread_id!r} has a chunk in place {seq}, and its last place is {last_seq}"
        for thread_id, last_seq, seq in connection.execute(
            "select thread_id, threads.last_seq, max(places.seq) as seq from threads join"
            " (select thread, seq from chunks union all select thread, last_seq from packs) as places using (thread)"
            " where thread_id is not null group by thread having seq > threads.last_seq"
        )
    ]
    damaged = [
        f"thread {thread_id!r} has a damaged pack of the places {first_seq} to {last_seq}: {fault}"
        for thread_id, first_seq, last_seq, fault in damaged_packs(connection)
    ]
    if damaged:  # what is in them cannot be counted
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
    """With thread_id, first and last place, and what is wrong."""
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
    """Copy the database, as it is at this moment, while the service runs. Raises StartupError."""
    path, target = Path(settings.db), flags["file"]
    if target.exists():
        raise StartupError(f"{target} exists, and would be overwritten; name another file")
    with snapshot_of(path) as source, copied(source, target) as copy:
        os.link(copy, target)  # which, unlike a rename, never overwrites
    print(f"\n{target} is a copy of {path}", file=sys.stderr)


def restore(settings: Settings, flags: dict[str, Any]) -> None:
    """Put a copy in the place of the database, while no service runs. Raises StartupError.

    Whoever read the database that it replaces is told to begin anew: what follows a cursor of
    theirs is not what they would have been sent.
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
    """A copy beside ``target`` that nobody else can read, and that says it is one; gone afterwards."""
    partial_copy = target.with_name(f"{target.name}.partial")

    def progress(status: int, remaining: int, total: int) -> None:
        print(f"\r{total - remaining} of {total} pages", end="", file=sys.stderr, flush=True)

    source.execute("select * from clock").fetchone()  # the snapshot begins with the first read
    try:
        os.close(os.open(partial_copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise StartupError(f"{partial_copy} cannot be made ({error.strerror}); remove it, or make room") from error
    try:
        with contextlib.closing(sqlite3.connect(partial_copy)) as copy:
            source.backup(copy, pages=1000, progress=progress)
            with copy:
                copy.execute("update clock set is_copy = 1")
            copy.execute("pragma journal_mode = delete")  # so that all of it is in the one file
        yield partial_copy
    except (sqlite3.Error, OSError) as error:
        raise StartupError(f"{target} cannot be written ({error})") from error
    finally:
        partial_copy.unlink(missing_ok=True)


def healthcheck(settings: Settings, flags: dict[str, Any]) -> None:
    """Ask the running service whether it is ready. Raises StartupError if it is not."""
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
    """Tell systemd, where it has asked to be told (sd_notify(3)); ``@`` begins an abstract name."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0.1)  # the loop does not wait for a systemd that does not read
            try:
                sender.sendto(state.encode(), re.sub("^@", "\0", address))
            except OSError as error:
                log.warning("cannot tell systemd %s: %s", state, error)


def tell_systemd_that_it_runs() -> None:
    """And go on telling it, as often as its watchdog asks."""
    tell_systemd("READY=1")
    if interval := int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6:
        feed_watchdog(asyncio.get_running_loop(), interval / 2)


def feed_watchdog(loop: asyncio.AbstractEventLoop, every: float) -> None:
    tell_systemd("WATCHDOG=1")
    loop.call_later(every, feed_watchdog, loop, every)
