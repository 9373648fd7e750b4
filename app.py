"""resume-stream keeps what an agent is streaming, so that a reader carries on from where it stopped.

Producers append chunks to the messages of a thread; every chunk is committed to SQLite before it
is acknowledged, and has a place in the thread's one sequence. Readers follow that sequence by
cursor. The file reads from top to bottom: settings, records, errors, the store, the buffer, the
wire formats, the routes, the app, the command line. Each part knows only those above it.

As a library::

    from resume_stream import ChunkBuffer, Settings

    async with ChunkBuffer(Settings(db="answers.db")) as buffer:
        await buffer.add_chunks("thread-1", "run-1", ["Hello", " world"], complete=True)
        async for item in buffer.resume_stream("thread-1", "run-1", known_content="Hel"):
            print(item)
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import enum
import fcntl
import gc
import http.client
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import socket
import sqlite3
import sys
import time
import warnings
import weakref
from collections import Counter as Multiset
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, ClassVar, Literal, NewType, Self, TypeVar, cast, get_args, get_type_hints
from urllib.parse import quote, unquote_to_bytes

import aiosqlite
import jwt
import msgspec
import uvicorn
import uvloop
from jwt.warnings import InsecureKeyLengthWarning
from litestar import Litestar, MediaType, Request, Response, Router, WebSocket, delete, get, post, put, websocket
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, ValidationException, WebSocketDisconnect
from litestar.handlers import BaseRouteHandler
from litestar.middleware import DefineMiddleware
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.openapi.spec import Components, OpenAPIMediaType, RequestBody, SecurityScheme
from litestar.openapi.spec import Operation as OpenAPIOperation
from litestar.params import FromPath, FromQuery, PathParameter, QueryParameter
from litestar.plugins.problem_details import ProblemDetailsException
from litestar.response import File, Stream
from litestar.static_files import create_static_files_router
from litestar.types import ASGIApp, ExceptionHandlersMap, Guard, Message, Receive, Scope, Send
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__version__ = "0.1.0"
__all__ = [
    "AccumulatedContent",
    "Appended",
    "Chunk",
    "ChunkBuffer",
    "MessageEnd",
    "Problem",
    "Settings",
    "Signal",
    "StoredChunk",
    "ThreadStatus",
    "create_app",
    "router",
]

T = TypeVar("T")
log = logging.getLogger("resume_stream")


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

Duration = NewType("Duration", float)
Size = NewType("Size", int)

DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def parse_duration(text: str) -> Duration:
    """Seconds from ``100ms``, ``30s``, ``5m``, ``1h``, ``2d``; a bare number is in seconds.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|d)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 100ms, 30s, 5m or 1h")
    return Duration(float(match[1]) * DURATION_UNITS[match[2] or "s"])


def parse_size(text: str) -> Size:
    """Bytes from ``64KiB``, ``10MiB``, ``2GiB``; a bare number is in bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,15})(B|KiB|MiB|GiB)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 64KiB, 10MiB or 2GiB")
    return Size(int(match[1]) * SIZE_UNITS[match[2] or "B"])


def parse_origins(text: str) -> tuple[str, ...]:
    """The origins of a comma-separated list, as browsers send them (RFC 6454), without a slash."""
    return tuple(origin.strip().rstrip("/") for origin in text.split(",") if origin.strip())


def described(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the service runs. Durations are seconds, sizes are bytes.

    Each is also an environment variable (``RESUME_STREAM_IDLE_TIMEOUT``) and a flag of
    ``resume-stream serve`` (``--idle-timeout``); the flag wins.
    """

    host: Annotated[str, described("address to listen on")] = "127.0.0.1"
    port: Annotated[int, described("port to listen on; 0 picks a free one and prints it")] = 8000
    uds: Annotated[str, described("Unix socket to listen on, in place of host and port")] = ""
    db: Annotated[str, described("the SQLite file")] = "resume-stream.db"
    ttl: Annotated[Duration, described("a thread untouched for so long is erased")] = Duration(3600)
    cleanup_interval: Annotated[Duration, described("how often expired threads are looked for")] = Duration(300)
    idle_timeout: Annotated[Duration, described("a stream with nothing new for so long ends; 0: never")] = Duration(30)
    heartbeat: Annotated[Duration, described("a quiet stream sends a comment this often")] = Duration(15)
    poll_interval: Annotated[
        Duration, described("the longest that a change by another process (the sqlite3 shell) goes unnoticed")
    ] = Duration(0.1)
    producer_timeout: Annotated[Duration, described("a message nobody appends to for so long is aborted; 0: never")] = (
        Duration(300)
    )
    synchronous: Annotated[
        Literal["FULL", "NORMAL"], described("FULL: what is acknowledged survives a power cut; NORMAL: a crash")
    ] = "FULL"
    max_chunk: Annotated[Size, described("largest chunk")] = Size(1024**2)
    max_body: Annotated[Size, described("largest JSON body")] = Size(10 * 1024**2)
    max_message: Annotated[Size, described("most text in a message")] = Size(64 * 1024**2)
    max_db: Annotated[Size, described("largest database file; 0: as large as the disk")] = Size(0)
    max_readers: Annotated[int, described("most readers at a time")] = 10_000
    secret: Annotated[str, described("turns authentication on: the key of HS256 tokens, 32 bytes or more")] = ""
    cors_origins: Annotated[
        tuple[str, ...], described("other origins whose pages may connect, like https://chat.example, with commas")
    ] = ()
    allow_anonymous: Annotated[bool, described("serve others than loopback without a secret")] = False
    log_format: Annotated[Literal["auto", "console", "json"], described("auto: console on a terminal, else json")] = (
        "auto"
    )


SETTING_HINTS: dict[str, Any] = get_type_hints(Settings, include_extras=True)
SETTING_TYPES: dict[str, Any] = {name: get_args(hint)[0] for name, hint in SETTING_HINTS.items()}
SETTING_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Settings)}
SETTING_PARSERS: dict[Any, Callable[[str], Any]] = {
    Duration: parse_duration,
    Size: parse_size,
    tuple[str, ...]: parse_origins,
}


def parse_setting(name: str, text: str) -> Any:
    """The value of the setting ``name``. Raises ValueError with one sentence for a person."""
    kind = SETTING_TYPES[name]
    if kind is str and not text:
        raise ValueError(f"{name} is empty; give it a value, or leave it out")
    if parser := SETTING_PARSERS.get(kind):
        return parser(text)
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        choices = " or ".join(map(str, get_args(kind))) or kind.__name__
        raise ValueError(f"{text!r} is not {choices}") from error


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

Status = Literal["active", "completed", "aborted"]

RESERVED_EVENTS = frozenset({"complete", "timeout", "reset", "gone", "error", "open"})
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f]")
MAX_NAME = 200
MAX_REASON = 1000
PRODUCER_TIMEOUT = "producer_timeout"


class Record(msgspec.Struct, frozen=True, rename="camel"):
    """Frozen; camelCase on the wire."""


class Chunk(Record, frozen=True, forbid_unknown_fields=True):
    """A piece of a message, as a producer gives it.

    ``content`` is text, of up to ``max_chunk`` bytes in UTF-8. ``event`` is a name for the SSE
    ``event`` field, of up to 200 characters, none of them a control character; the names that
    the service itself uses are refused.
    """

    content: str
    event: str | None = None


class StoredChunk(Record, frozen=True):
    """A chunk in its place. ``timestamp`` is ms since 1970, when it was committed."""

    content: str
    timestamp: int
    message_id: str
    seq: int
    event: str | None = None


class MessageEnd(Record, frozen=True):
    """The end of a message, which takes a place in the sequence as a chunk does."""

    message_id: str
    status: Status
    reason: str | None
    seq: int


Entry = StoredChunk | MessageEnd


class Signal(enum.Enum):
    """What a reader is told besides chunks and ends.

    RESET: forget what you have, all of it follows. GONE: the thread was cleared or expired.
    TIMEOUT: nothing new for ``idle_timeout``. HEARTBEAT: nothing new, and still here. EXPIRED:
    what allowed the reader to read has expired.
    """

    RESET = "reset"
    GONE = "gone"
    TIMEOUT = "timeout"
    HEARTBEAT = "heartbeat"
    EXPIRED = "expired"


class Cursor(Record, frozen=True):
    """A place in a thread's sequence: everything up to and with ``seq`` has been read.

    On the wire ``<generation>-<seq>``. A bare ``seq`` names no generation, and so cannot tell a
    thread from one made again under the same name.
    """

    seq: int
    generation: int | None = None

    def __str__(self) -> str:
        return str(self.seq) if self.generation is None else f"{self.generation}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        match = re.fullmatch(r"(?:(\d{1,18})-)?(\d{1,18})", text, re.ASCII)
        if match is None:
            raise BadRequest(f"{text!r:.80} is not a cursor; send an id as the stream gave it, like 1763829000123-42.")
        return cls(int(match[2]), int(match[1]) if match[1] else None)


class Appended(Record, frozen=True):
    """What a producer is told: ``seq`` is the place of the last thing it asked for.

    ``chunk_count`` counts this message's chunks up to there, so it is the ``index`` of the next.
    """

    thread_id: str
    message_id: str
    seq: int
    chunk_count: int
    status: Status


class MessageStatus(Record, frozen=True):
    """One message of a thread; ``last_seq`` is the place of its end once it has ended."""

    message_id: str
    status: Status
    reason: str | None
    chunk_count: int
    first_seq: int | None
    last_seq: int | None
    created_at: int
    updated_at: int


class ThreadSummary(Record, frozen=True):
    """One thread. Times are ms since 1970, ``size`` is bytes of text, ``readers`` follow it now."""

    thread_id: str
    status: Status
    message_count: int
    chunk_count: int
    size: int
    created_at: int
    updated_at: int
    readers: int = 0


class ThreadStatus(ThreadSummary, frozen=True):
    """``get_thread_status``: one thread with its messages, in the order they began."""

    cursor: str = ""
    messages: list[MessageStatus] = []
    exists: bool = True


class ThreadPage(Record, frozen=True):
    """``threads``, newest first; ``cursor`` gets the next page, None where there is none."""

    threads: list[ThreadSummary]
    cursor: str | None


class AccumulatedContent(Record, frozen=True):
    """The text so far; following from ``cursor`` gives exactly what comes after it."""

    content: str
    cursor: str
    status: Status


class ChunkPage(Record, frozen=True):
    """What follows a cursor, with the ends among it.

    ``status`` is the reader's view at ``cursor``: it turns ``completed`` or ``aborted`` only with
    the page that holds the end.
    """

    chunks: list[StoredChunk]
    ends: list[MessageEnd]
    cursor: str
    status: Status


class Grant(Record, frozen=True):
    """What a caller may do.

    ``scope`` is words of read, write, abort and admin (RFC 8693, 4.2), ``threads`` ids or
    ``prefix*`` (None: all), ``expires`` seconds since 1970.
    """

    scope: frozenset[str] = frozenset({"admin"})
    threads: tuple[str, ...] | None = None
    expires: float = math.inf

    def covers(self, thread_id: str) -> bool:
        return self.threads is None or any(
            thread_id.startswith(pattern[:-1]) if pattern.endswith("*") else thread_id == pattern
            for pattern in self.threads
        )

    def has(self, scopes: AbstractSet[str]) -> bool:
        return "admin" in self.scope or not scopes.isdisjoint(self.scope)

    def require(self, scopes: AbstractSet[str], thread_id: str | None) -> None:
        """Raises Unauthorized, or Forbidden: the same whether there is such a thread or not."""
        if time.time() >= self.expires:
            raise token_expired()
        if not self.has(scopes):
            raise Forbidden(f"The token's scope is {' '.join(sorted(self.scope))!r}; this takes {' or '.join(scopes)}.")
        if thread_id is not None and not self.covers(thread_id):
            raise Forbidden(f"The token does not cover the thread {thread_id!r}; get one that names it.")


class Page:
    """Consecutive entries of a thread's sequence, encoded once for all who read them.

    Its reader has everything up to ``last_seq`` once it has this page, even where entries of
    other messages were left out.
    """

    __slots__ = ("_encoded", "_parts", "entries", "generation", "last_seq", "queued", "size")

    def __init__(
        self, generation: int, last_seq: int, entries: Sequence[Entry], size: int = 0, queued: float | None = None
    ) -> None:
        self.generation = generation
        self.last_seq = last_seq
        self.entries = entries
        self.size = size
        self.queued = queued  # when its append was asked for (time.perf_counter), until somebody reads it
        self._parts: Sequence[Page] = ()
        self._encoded: dict[Any, list[bytes]] = {}

    @classmethod
    def joined(cls, parts: Sequence[Page]) -> Page:
        """Pages that follow one another, as one that shares what they encoded."""
        if len(parts) == 1:
            return parts[0]
        page = cls(parts[-1].generation, parts[-1].last_seq, [entry for part in parts for entry in part.entries])
        page._parts = parts
        return page

    @property
    def parts(self) -> Sequence[Page]:
        return self._parts or (self,)

    def encoded(self, encode: Callable[[Page], list[bytes]]) -> list[bytes]:
        if self._parts:
            return [piece for part in self._parts for piece in part.encoded(encode)]
        if (known := self._encoded.get(encode)) is None:
            known = self._encoded[encode] = encode(self)
        return known


class Head(Record, frozen=True):
    """The state of a thread: its last place taken, and whether any message is still active."""

    thread: int
    generation: int
    last_seq: int
    active: bool


class Position(Record, frozen=True):
    """Where a reader begins.

    ``thread`` is None for a thread not made yet. ``skip`` is how many bytes of the next chunk the
    reader has already. ``finished`` means that nothing will ever come after it.
    """

    thread_id: str
    message_id: str | None
    thread: int | None
    message: int | None
    after: int
    skip: int = 0
    reset: bool = False
    finished: bool = False

    def ends_with(self, page: Page) -> bool:
        return self.message_id is not None and isinstance(page.entries[-1], MessageEnd)

    def may_have_more(self, head: Head | None, follow: bool) -> bool:
        """At the end of what there is: a message ends with its end, a thread when none is active."""
        return follow or self.message_id is not None or head is None or head.active


class OpenMessage(Record, frozen=True):
    """Make the message (and its thread) if need be."""

    thread_id: str
    message_id: str


class Append(Record, frozen=True):
    """Append to a message; ``thread`` holds a long upload to the thread it began in."""

    thread_id: str
    message_id: str
    chunks: Sequence[Chunk]
    sizes: Sequence[int]
    index: int | None = None
    complete: bool = False
    thread: int | None = None


class EndMessage(Record, frozen=True):
    """End a message; with ``untouched_since`` (ms) only if nobody appended since."""

    thread_id: str
    message_id: str
    status: Status
    reason: str | None = None
    untouched_since: int | None = None


class ClearThread(Record, frozen=True):
    """Forget a thread; with ``untouched_since`` (ms) only if nobody touched it since."""

    thread_id: str
    untouched_since: int | None = None


Operation = OpenMessage | Append | EndMessage | ClearThread


class Commit(Record, frozen=True):
    """What an operation did, as the readers of its thread need to know it.

    ``last_seq`` and ``active`` are the thread's, right after this operation.
    """

    thread_id: str
    thread: int
    generation: int
    last_seq: int
    active: bool
    answer: Appended | None = None
    changed: bool = False
    cleared: bool = False
    first_seq: int = 0
    timestamp: int = 0
    chunks: Sequence[Chunk] = ()
    end: MessageEnd | None = None


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class Problem(ProblemDetailsException):
    """An error for people: one sentence that says what is wrong and what would be right.

    On the wire it is a problem document (RFC 9457); ``members`` are its extension members.
    """

    status_code = 500
    default_title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, *, retry_after: int | None = None, **members: Any) -> None:
        super().__init__(
            detail=detail,
            title=self.default_title,
            status_code=self.status_code,
            headers=None if retry_after is None else {"Retry-After": str(retry_after)},
            extra=members or None,
        )


class BadRequest(Problem):
    status_code = 400
    default_title = "Bad request"


class Unauthorized(Problem):
    """With a challenge (RFC 6750, 3)."""

    status_code = 401
    default_title = "Unauthorized"

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail, **members)
        self.headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(Problem):
    status_code = 403
    default_title = "Forbidden"


class NotFound(Problem):
    status_code = 404
    default_title = "Not found"


class Conflict(Problem):
    """A second producer lost the race, or the message has ended."""

    status_code = 409
    default_title = "Conflict"


class CursorGone(Problem):
    status_code = 410
    default_title = "Cursor of another generation"


class TooLarge(Problem):
    status_code = 413
    default_title = "Over a limit"


class UnsupportedMediaType(Problem):
    status_code = 415
    default_title = "Unsupported media type"


class InvalidContent(Problem):
    status_code = 422
    default_title = "Invalid content"


class Unavailable(Problem):
    """The same request may well succeed later; ``Retry-After`` says when to try."""

    status_code = 503
    default_title = "Unavailable"

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail, retry_after=1, **members)


class Stopping(Unavailable):
    """The service is told to stop."""

    def __init__(self) -> None:
        super().__init__("The service is stopping; try again when it is back.")


class DatabaseFull(Problem):
    status_code = 507
    default_title = "Database full"


class StartupError(Exception):
    """Why the service cannot start, in one line."""


def no_thread(thread_id: str) -> NotFound:
    return NotFound(f"There is no thread {thread_id!r}; it was never made, or was cleared or expired.", exists=False)


def no_message(thread_id: str, message_id: str) -> NotFound:
    return NotFound(f"The thread {thread_id!r} has no message {message_id!r}.", exists=False)


def message_ended(message_id: str, status: str, reason: str | None, chunk_count: int) -> Conflict:
    why = f" ({reason})" if reason else ""
    return Conflict(
        f"The message {message_id!r} was {status}{why}, and an end is final; begin a new message.",
        messageStatus=status,
        reason=reason,
        chunkCount=chunk_count,
    )


def token_expired() -> Unauthorized:
    return Unauthorized("The token has expired; get a new one, and carry on from the cursor.")


def thread_cleared() -> Conflict:
    return Conflict("The thread was cleared while this message was being written; begin a new message.")


DATABASE_ERRORS = (sqlite3.Error, OSError, UnicodeDecodeError)


def database_problem(error: Exception) -> Problem:
    """What went wrong in SQLite (https://www.sqlite.org/rescode.html), for the one who asked."""
    # Text that is not UTF-8 is found by Python's own part, which has no code for it.
    code = getattr(error, "sqlite_errorcode", 0 if isinstance(error, OSError) else sqlite3.SQLITE_CORRUPT) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return DatabaseFull("The disk or the size limit (max_db) is full; free space and retry.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable("Another process keeps the database locked; retry once it is done.")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return Unavailable("The database is damaged; restore it from a backup.")
    return Unavailable(f"The database cannot be used ({error}); mend the cause and retry.")


def problem_of(error: Exception) -> Exception:
    """The error as its asker is to see it; one of our own making stays what it is."""
    return database_problem(error) if isinstance(error, DATABASE_ERRORS) else error


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------

LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)


class Metrics:
    """What one buffer counts, for Prometheus."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.chunks_in = Counter("resume_stream_chunks_in", "Chunks committed", registry=registry)
        self.bytes_in = Counter("resume_stream_bytes_in", "Text committed, in bytes of UTF-8", registry=registry)
        self.entries_out = Counter("resume_stream_chunks_out", "Chunks and ends sent to readers", registry=registry)
        self.bytes_out = Counter("resume_stream_bytes_out", "Bytes sent to readers", registry=registry)
        self.commit_chunks = Histogram(
            "resume_stream_commit_chunks", "Chunks in a commit", registry=registry, buckets=SIZE_BUCKETS
        )
        self.commit_seconds = Histogram(
            "resume_stream_commit_seconds", "Time of a commit", registry=registry, buckets=LATENCY_BUCKETS
        )
        self.delivery_seconds = Histogram(
            "resume_stream_append_to_reader_seconds",
            "From an append's arrival to its first reader",
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )
        self.readers = Gauge("resume_stream_readers", "Readers connected", registry=registry)
        self.active_messages = Gauge("resume_stream_active_messages", "Messages not ended", registry=registry)
        self.resumes = Counter("resume_stream_resumes", "Streams begun", ["kind", "outcome"], registry=registry)
        self.aborts = Counter("resume_stream_aborts", "Messages aborted", ["reason"], registry=registry)
        self.expired = Counter("resume_stream_expired_threads", "Threads that outlived the ttl", registry=registry)
        self.database_bytes = Gauge("resume_stream_database_bytes", "Size of the database file", registry=registry)
        self.wal_bytes = Gauge("resume_stream_wal_bytes", "Size of the WAL", registry=registry)

    def count_resume(self, kind: str, position: Position) -> None:
        outcome = "reset" if position.reset else "finished" if position.finished else "resumed"
        self.resumes.labels(kind, outcome).inc()

    def count_commit(self, sizes: Sequence[int], seconds: float) -> None:
        self.chunks_in.inc(len(sizes))
        self.bytes_in.inc(sum(sizes))
        self.commit_chunks.observe(len(sizes))
        self.commit_seconds.observe(seconds)

    def count_end(self, end: MessageEnd) -> None:
        if end.status == "aborted":
            # Reasons are free text; only the service's own may become a label.
            self.aborts.labels(PRODUCER_TIMEOUT if end.reason == PRODUCER_TIMEOUT else "requested").inc()

    def count_delivery(self, page: Page) -> None:
        self.entries_out.inc(len(page.entries))
        for part in page.parts:
            if part.queued is not None:
                self.delivery_seconds.observe(time.perf_counter() - part.queued)
                part.queued = None


# ---------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------

APPLICATION_ID = 0x72737472
SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("schema.sql")

BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process's lock
ERASE_ROWS = 2_000  # chunks deleted in one transaction
SMALLEST_DATABASE = 64 * 1024
PAGE_ROWS = 512
PAGE_BYTES = 256 * 1024
WAL_BYTES = 16 * 1024**2  # past this, a checkpoint also resets the WAL
VACUUM_BYTES = 64 * 1024**2  # up to this size a vacuum is over in about half a second


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def entry_from_row(row: tuple[Any, ...]) -> Entry:
    """From (seq, message_id, event, content, timestamp, status, reason); no content is an end."""
    seq, message_id, event, content, timestamp, status, reason = row
    if content is None:
        return MessageEnd(message_id, status, reason, seq)
    return StoredChunk(content, timestamp, message_id, seq, event)


class MessageRow(Record, frozen=True):
    """What a transaction needs to know of a message and its thread; None: not made yet."""

    thread: int | None
    generation: int
    thread_last_seq: int
    message: int | None
    status: Status
    reason: str | None
    chunk_count: int
    size: int
    first_seq: int | None
    last_seq: int | None
    updated_at: int

    @property
    def ended(self) -> bool:
        return self.status != "active"

    @property
    def before(self) -> int:
        """The last place in the thread's sequence before anything of this message."""
        return self.thread_last_seq if self.first_seq is None else self.first_seq - 1


def find_message(connection: sqlite3.Connection, thread_id: str, message_id: str | None) -> MessageRow:
    row = connection.execute(
        "select threads.thread, threads.generation, threads.last_seq, messages.message,"
        " coalesce(messages.status, 'active'), messages.reason, coalesce(messages.chunk_count, 0),"
        " coalesce(messages.size, 0), messages.first_seq, messages.last_seq, coalesce(messages.updated_at, 0)"
        " from threads left join messages"
        " on messages.thread = threads.thread and messages.message_id = ?"
        " where threads.thread_id = ?",
        (message_id, thread_id),
    ).fetchone()
    return MessageRow(*(row or (None, 0, 0, None, "active", None, 0, 0, None, None, 0)))


def thread_is_active(connection: sqlite3.Connection, thread: int) -> bool:
    row = connection.execute(
        "select exists (select 1 from messages where thread = ? and status = 'active')", (thread,)
    ).fetchone()
    return bool(row[0])


class Transaction:
    """One group commit: operations see what the earlier ones in it did.

    An operation that raises a Problem has changed nothing.
    """

    def __init__(self, connection: sqlite3.Connection, max_message: int) -> None:
        self._connection = connection
        self._max_message = max_message
        self._now = now_ms()

    def apply(self, operation: Operation) -> Commit:
        match operation:
            case Append():
                return self._append(operation)
            case OpenMessage():
                return self._open(operation)
            case EndMessage():
                return self._end(operation)
            case ClearThread():
                return self._clear(operation)

    def _append(self, append: Append) -> Commit:
        found = find_message(self._connection, append.thread_id, append.message_id)
        if append.thread is not None and found.thread != append.thread:
            raise thread_cleared()
        stored = self._compare_stored(append, found)
        nothing_new = append.index is not None and len(stored) == len(append.chunks) > 0
        if nothing_new and not append.complete:
            return self._unchanged(append, found, stored[-1], cast(int, append.index) + len(stored))
        if found.ended:
            return self._answer_completing_retry(append, found)
        if append.complete and append.index is not None and append.index + len(append.chunks) < found.chunk_count:
            raise Conflict(
                f"The message {append.message_id!r} has chunks after those that would complete it: another producer"
                " writes to it. Stop, or begin a new message.",
                expectedIndex=found.chunk_count,
            )
        chunks, sizes = append.chunks[len(stored) :], append.sizes[len(stored) :]
        if (size := found.size + sum(sizes)) > self._max_message:
            raise TooLarge(
                f"The message would hold {size} bytes of text, over max_message ({self._max_message});"
                " complete it and go on in another."
            )
        return self._insert(append, self._make(append.thread_id, append.message_id, found), chunks, size)

    def _insert(self, append: Append, found: MessageRow, chunks: Sequence[Chunk], size: int) -> Commit:
        first_seq, last_seq = (found.thread_last_seq + 1, found.thread_last_seq + len(chunks))
        self._connection.executemany(
            "insert into chunks (thread, seq, message, event, content, timestamp) values (?, ?, ?, ?, ?, ?)",
            [
                (found.thread, seq, found.message, chunk.event, chunk.content, self._now)
                for seq, chunk in enumerate(chunks, first_seq)
            ],
        )
        self._connection.execute(
            "update threads set last_seq = ?, updated_at = ? where thread = ?", (last_seq, self._now, found.thread)
        )
        found = msgspec.structs.replace(
            found,
            thread_last_seq=last_seq,
            chunk_count=found.chunk_count + len(chunks),
            first_seq=found.first_seq or (first_seq if chunks else None),
            last_seq=last_seq if chunks else found.last_seq,
        )
        self._connection.execute(
            "update messages set chunk_count = ?, size = ?, first_seq = ?, last_seq = ?, updated_at = ?"
            " where message = ?",
            (found.chunk_count, size, found.first_seq, found.last_seq, self._now, found.message),
        )
        if append.complete:
            return self._ended(append, found, "completed", None, chunks, first_seq)
        return self._committed(append, found, True, chunks=chunks, first_seq=first_seq, changed=bool(chunks))

    def _open(self, opened: OpenMessage) -> Commit:
        found = find_message(self._connection, opened.thread_id, opened.message_id)
        if found.message is None:
            found = self._make(opened.thread_id, opened.message_id, found)
            return self._committed(opened, found, True, changed=True)
        self._connection.execute("update threads set updated_at = ? where thread = ?", (self._now, found.thread))
        self._connection.execute(
            "update messages set updated_at = ? where message = ? and status = 'active'", (self._now, found.message)
        )
        return self._unchanged(opened, found, found.last_seq or 0, found.chunk_count)

    def _end(self, end: EndMessage) -> Commit:
        found = find_message(self._connection, end.thread_id, end.message_id)
        if found.thread is None:
            raise no_thread(end.thread_id)
        if found.message is None:
            raise no_message(end.thread_id, end.message_id)
        if found.status == end.status:
            return self._unchanged(end, found, found.last_seq or 0, found.chunk_count)
        if found.ended:
            raise message_ended(end.message_id, found.status, found.reason, found.chunk_count)
        if end.untouched_since is not None and found.updated_at > end.untouched_since:
            raise Conflict(f"The message {end.message_id!r} was appended to in the meantime.")
        return self._ended(end, found, end.status, end.reason)

    def _clear(self, clear: ClearThread) -> Commit:
        row = self._connection.execute(
            "update threads set thread_id = null where thread_id = ?1 and (?2 is null or updated_at <= ?2)"
            " returning thread, generation, last_seq",
            (clear.thread_id, clear.untouched_since),
        ).fetchone()
        if row is None:
            raise no_thread(clear.thread_id)
        return Commit(clear.thread_id, row[0], row[1], row[2], active=False, changed=True, cleared=True)

    def _compare_stored(self, append: Append, found: MessageRow) -> list[int]:
        """The places of those of the chunks that are stored already, the first ones.

        Raises Conflict where ``index`` leaves a gap, or another chunk has a chunk's place.
        """
        if append.index is None:
            return []
        if append.index > found.chunk_count and found.ended:
            raise message_ended(append.message_id, found.status, found.reason, found.chunk_count)
        if append.index > found.chunk_count:
            raise Conflict(
                f"The message {append.message_id!r} has {found.chunk_count} chunks, so index={append.index} would"
                f" leave a gap; go on with index={found.chunk_count}.",
                expectedIndex=found.chunk_count,
            )
        # Counted from the end, as a retry is nearly always of what came last.
        rows = self._connection.execute(
            "select * from (select seq, content, event from chunks"
            " where thread = ? and message = ? and seq between ? and ? and content is not null"
            " order by seq desc limit ?) order by seq limit ?",
            (
                found.thread,
                found.message,
                found.first_seq,
                found.last_seq,
                found.chunk_count - append.index,
                len(append.chunks),
            ),
        ).fetchall()
        for place, ((_, content, event), chunk) in enumerate(zip(rows, append.chunks, strict=False), append.index):
            if (content, event) != (chunk.content, chunk.event):
                raise Conflict(
                    f"Another chunk is stored as index {place} of the message {append.message_id!r}: another producer"
                    " writes to it, or this one sent something else before. Stop, or begin a new message.",
                    expectedIndex=found.chunk_count,
                )
        return [seq for seq, _, _ in rows]

    def _answer_completing_retry(self, append: Append, found: MessageRow) -> Commit:
        """As the first one was answered, if it was this append that completed the message."""
        chunk_count = found.chunk_count if append.index is None else append.index + len(append.chunks)
        is_retry = append.complete and (append.index is not None or not append.chunks)
        if is_retry and found.status == "completed" and found.chunk_count == chunk_count:
            return self._unchanged(append, found, found.last_seq or 0, found.chunk_count)
        raise message_ended(append.message_id, found.status, found.reason, found.chunk_count)

    def _make(self, thread_id: str, message_id: str, found: MessageRow) -> MessageRow:
        """The message, made (and its thread) unless it is there."""
        if found.thread is None:
            (generation,) = self._connection.execute(
                "update clock set latest_generation = max(latest_generation + 1, ?) returning latest_generation",
                (self._now,),
            ).fetchone()
            (thread,) = self._connection.execute(
                "insert into threads (thread_id, generation, created_at, updated_at) values (?, ?, ?, ?)"
                " returning thread",
                (thread_id, generation, self._now, self._now),
            ).fetchone()
            found = msgspec.structs.replace(found, thread=thread, generation=generation)
        if found.message is None:
            (message,) = self._connection.execute(
                "insert into messages (thread, message_id, created_at, updated_at) values (?, ?, ?, ?)"
                " returning message",
                (found.thread, message_id, self._now, self._now),
            ).fetchone()
            self._connection.execute("update threads set updated_at = ? where thread = ?", (self._now, found.thread))
            found = msgspec.structs.replace(found, message=message)
        return found

    def _ended(
        self,
        operation: Append | EndMessage,
        found: MessageRow,
        status: Status,
        reason: str | None,
        chunks: Sequence[Chunk] = (),
        first_seq: int = 0,
    ) -> Commit:
        """End the message; a trigger gives the end its place, as it does for the sqlite3 shell."""
        self._connection.execute(
            "update messages set status = ?, reason = ? where message = ?", (status, reason, found.message)
        )
        found = find_message(self._connection, operation.thread_id, operation.message_id)
        end = MessageEnd(operation.message_id, status, reason, found.thread_last_seq)
        active = thread_is_active(self._connection, cast(int, found.thread))
        return self._committed(operation, found, active, chunks=chunks, first_seq=first_seq, end=end, changed=True)

    def _unchanged(
        self, operation: OpenMessage | Append | EndMessage, found: MessageRow, seq: int, chunk_count: int
    ) -> Commit:
        """A retry, answered as the first was."""
        found = msgspec.structs.replace(found, last_seq=seq, chunk_count=chunk_count)
        active = thread_is_active(self._connection, cast(int, found.thread))
        return self._committed(operation, found, active)

    def _committed(
        self,
        operation: OpenMessage | Append | EndMessage,
        found: MessageRow,
        active: bool,
        *,
        chunks: Sequence[Chunk] = (),
        first_seq: int = 0,
        end: MessageEnd | None = None,
        changed: bool = False,
    ) -> Commit:
        return Commit(
            operation.thread_id,
            cast(int, found.thread),
            found.generation,
            found.thread_last_seq,
            active,
            Appended(operation.thread_id, operation.message_id, found.last_seq or 0, found.chunk_count, found.status),
            changed,
            first_seq=first_seq,
            timestamp=self._now,
            chunks=chunks,
            end=end,
        )


class Snapshot:
    """What one read transaction sees; every method's answer agrees with every other's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def head(self, thread_id: str) -> Head | None:
        row = self._connection.execute(
            "select thread, generation, last_seq from threads where thread_id = ?", (thread_id,)
        ).fetchone()
        return self._head(row) if row else None

    def latest_thread(self) -> int:
        (latest,) = self._connection.execute("select coalesce(max(seq), 0) from sqlite_sequence").fetchone()
        return cast(int, latest)

    def _head(self, row: tuple[int, int, int]) -> Head:
        thread, generation, last_seq = row
        return Head(thread, generation, last_seq, thread_is_active(self._connection, thread))

    def ended(self, thread_id: str, message_ids: Sequence[str]) -> list[str]:
        return [message_id for message_id in message_ids if find_message(self._connection, thread_id, message_id).ended]

    def message(self, thread_id: str, message_id: str) -> MessageRow:
        found = find_message(self._connection, thread_id, message_id)
        if found.thread is None:
            raise no_thread(thread_id)
        if found.message is None:
            raise no_message(thread_id, message_id)
        return found

    def locate(self, thread_id: str, message_id: str | None, cursor: Cursor | None, follow: bool) -> Position:
        """Where a reader with this cursor begins."""
        head = self.head(thread_id)
        if head is None:
            if not follow:
                raise no_thread(thread_id)
            return Position(thread_id, message_id, None, None, 0, reset=cursor is not None and str(cursor) != "0")
        message = self.message(thread_id, message_id) if message_id is not None else None
        lies = cursor is not None and (cursor.generation not in (None, head.generation) or cursor.seq > head.last_seq)
        after = 0 if lies or cursor is None else cursor.seq
        if message is None:
            finished = not follow and not head.active and after >= head.last_seq
        else:
            after = max(after, message.before)
            finished = message.ended and after >= cast(int, message.last_seq)
        return Position(
            thread_id,
            message_id,
            head.thread,
            message.message if message else None,
            after,
            reset=lies,
            finished=finished and not lies,
        )

    def match(self, thread_id: str, message_id: str, known_content: str) -> Position:
        """Where a reader with this text of the message begins.

        After it, if it is a prefix of the message's text or occurs in it exactly once; otherwise
        at the start, with a reset. In UTF-8 a text occurs where its bytes do (RFC 3629, 1).
        """
        found = self.message(thread_id, message_id)
        known, text = known_content.encode(), self._text(found)
        start = 0 if text.startswith(known) else text.find(known)
        unique = start == 0 or (start > 0 and text.find(known, start + 1) < 0)
        begin = Position(thread_id, message_id, found.thread, found.message, found.before, reset=not unique)
        if not unique or not known:
            return begin
        return self._after_bytes(begin, found, len(text), start + len(known))

    def _text(self, found: MessageRow) -> bytes:
        # As a blob, since SQLite's own text functions stop at a NUL.
        (text,) = self._connection.execute(
            "select cast(group_concat(content, '') as blob) from (select content from chunks"
            " where thread = ? and message = ? and seq between ? and ? order by seq)",
            (found.thread, found.message, found.first_seq, found.last_seq),
        ).fetchone()
        return text or b""

    def _after_bytes(self, begin: Position, found: MessageRow, size: int, offset: int) -> Position:
        """Right after the first ``offset`` of the message's bytes, which are mostly nearly all.

        So the chunk is looked for from the end, in ever longer stretches, and then by halving.
        """
        first, high = cast(int, found.first_seq), cast(int, found.last_seq)
        low, before, stretch = high + 1, size, 64
        while before >= offset:
            low, stretch = max(first, high + 1 - stretch), 4 * stretch
            before = size - self._size(found, low, high)
        while low < high:
            middle = (low + high) // 2
            size = self._size(found, low, middle)
            if before + size >= offset:
                high = middle
            else:
                before += size
                low = middle + 1
        if before + self._size(found, low, low) == offset:
            return msgspec.structs.replace(begin, after=low)
        return msgspec.structs.replace(begin, after=low - 1, skip=offset - before)

    def _size(self, found: MessageRow, first_seq: int, last_seq: int) -> int:
        (size,) = self._connection.execute(
            "select coalesce(sum(length(cast(content as blob))), 0) from chunks"
            " where thread = ? and message = ? and seq between ? and ?",
            (found.thread, found.message, first_seq, last_seq),
        ).fetchone()
        return cast(int, size)

    def text_from(self, thread_id: str, message_id: str, index: int) -> tuple[str, int]:
        """The text of the message's chunks from number ``index`` on, and the number after them."""
        found = find_message(self._connection, thread_id, message_id)
        rows = self._connection.execute(
            "select content from chunks where thread = ? and message = ? and seq between ? and ?"
            " and content is not null order by seq limit -1 offset ?",
            (found.thread, found.message, found.first_seq, found.last_seq, min(index, found.chunk_count)),
        )
        return "".join(content for (content,) in rows), max(index, found.chunk_count)

    def page(self, thread: int, message: int | None, after: int, limit: int) -> tuple[Head, Page] | None:
        """Up to ``limit`` entries after ``after``, with the head they belong to; None: no thread."""
        row = self._connection.execute(
            "select thread, generation, last_seq from threads where thread = ? and thread_id is not null", (thread,)
        ).fetchone()
        if row is None:
            return None
        head = self._head(row)
        rows = self._connection.execute(
            "select chunks.seq, messages.message_id, chunks.event, chunks.content, chunks.timestamp,"
            " messages.status, messages.reason"
            " from chunks join messages on messages.message = chunks.message"
            " where chunks.thread = ?1 and chunks.seq > ?2 and (?3 is null or chunks.message = ?3)"
            " and chunks.seq <= iif(?3 is null, ?4, (select coalesce(last_seq, 0) from messages where message = ?3))"
            " order by chunks.seq limit ?5",
            (thread, after, message, head.last_seq, limit),
        )
        entries: list[Entry] = []
        size = 0
        for fields in rows:
            entries.append(entry_from_row(fields))
            size += len(fields[3] or "")
            if size >= PAGE_BYTES:
                break
        is_full = size >= PAGE_BYTES or len(entries) == limit
        return head, Page(head.generation, entries[-1].seq if is_full else head.last_seq, entries, size)

    def chunk_page(self, position: Position, limit: int) -> ChunkPage:
        found = self.page(cast(int, position.thread), position.message, position.after, limit)
        if found is None:
            raise no_thread(position.thread_id)
        head, page = found
        status: Status = "active"
        if position.message_id is not None:
            message = self.message(position.thread_id, position.message_id)
            if message.ended and cast(int, message.last_seq) <= page.last_seq:
                status = message.status
        elif not head.active and head.last_seq == page.last_seq:
            status = self.summary(position.thread_id).status
        return ChunkPage(
            [entry for entry in page.entries if isinstance(entry, StoredChunk)],
            [entry for entry in page.entries if isinstance(entry, MessageEnd)],
            str(Cursor(page.last_seq, page.generation)),
            status,
        )

    def content(self, thread_id: str, message_id: str | None) -> AccumulatedContent:
        head = self.head(thread_id)
        if head is None:
            raise no_thread(thread_id)
        if message_id is None:
            rows = self._connection.execute(
                "select message_id from messages where thread = ? order by message", (head.thread,)
            ).fetchall()
            message_ids = [message_id for (message_id,) in rows]
            status = self.summary(thread_id).status
        else:
            message_ids, status = ([message_id], self.message(thread_id, message_id).status)
        content = b"".join(self._text(self.message(thread_id, message_id)) for message_id in message_ids).decode()
        return AccumulatedContent(content, str(Cursor(head.last_seq, head.generation)), status)

    def summary(self, thread_id: str) -> ThreadSummary:
        row = self._connection.execute(
            "select thread_id, status, message_count, chunk_count, size, created_at, updated_at from thread_summary"
            " where thread_id = ?",
            (thread_id,),
        ).fetchone()
        if row is None:
            raise no_thread(thread_id)
        return ThreadSummary(*row)

    def status(self, thread_id: str) -> ThreadStatus:
        summary = self.summary(thread_id)
        head = cast(Head, self.head(thread_id))
        rows = self._connection.execute(
            "select message_id, status, reason, chunk_count, first_seq, last_seq, created_at, updated_at"
            " from messages where thread = ? order by message",
            (head.thread,),
        )
        messages = [MessageStatus(*row) for row in rows]
        cursor = str(Cursor(head.last_seq, head.generation))
        return ThreadStatus(**msgspec.structs.asdict(summary), cursor=cursor, messages=messages)

    def threads(
        self, status: Status | None, limit: int, before: int | None, covers: Callable[[str], bool]
    ) -> ThreadPage:
        rows = self._connection.execute(
            "select thread, thread_id, status, message_count, chunk_count, size, created_at, updated_at"
            " from thread_summary"
            " where (?1 is null or thread < ?1) and (?2 is null or status = ?2) order by thread desc",
            (before, status),
        )
        taken = list(itertools.islice((row for row in rows if covers(row[1])), limit + 1))
        threads = [ThreadSummary(*row[1:]) for row in taken[:limit]]
        return ThreadPage(threads, str(taken[limit - 1][0]) if len(taken) > limit else None)

    def active_messages(self) -> int:
        (count,) = self._connection.execute("select count(*) from messages where status = 'active'").fetchone()
        return cast(int, count)

    def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]:
        return self._connection.execute(
            "select threads.thread_id, messages.message_id from messages join threads using (thread)"
            " where messages.status = 'active' and messages.updated_at <= ? and threads.thread_id is not null"
            " limit 1000",
            (untouched_since,),
        ).fetchall()

    def idle_threads(self, untouched_since: int) -> list[str]:
        rows = self._connection.execute(
            "select thread_id from threads where thread_id is not null and updated_at <= ? limit 1000",
            (untouched_since,),
        )
        return [thread_id for (thread_id,) in rows]


class Database(aiosqlite.Connection):
    """A connection whose thread runs whole functions.

    A transaction that is one function cannot be left open by a request that is cancelled, and
    costs one thread hop, whatever the number of its statements.
    """

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            raise Stopping
        execute = cast("Callable[..., Awaitable[T]]", self._execute)
        return await execute(work, self._conn)


def database_uri(path: Path, mode: Literal["ro", "rw", "rwc"]) -> str:
    return f"file:{quote(str(path))}?mode={mode}"


async def connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> Database:
    connector = partial(sqlite3.connect, database_uri(path, mode), uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
    database = Database(connector, iter_chunk_size=PAGE_ROWS)
    await database
    return database


class Store:
    """The SQLite file: one connection that writes, one that reads, one owner.

    Every write and every checkpoint is done by the first, as two connections that do so at the
    same time can corrupt a WAL (https://www.sqlite.org/wal.html#walresetbug).
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = Path(settings.db).resolve()  # so that one file has one lock, whatever it is called
        self._wal = Path(f"{self._path}-wal")
        self._wal_limit = WAL_BYTES
        self._vacuum_owed = True  # a process before this one may not have come to it
        self._exits = contextlib.AsyncExitStack()

    async def open(self) -> None:
        """Raises StartupError, and leaves the file as it was, where it cannot be served."""
        async with contextlib.AsyncExitStack() as exits:
            exits.enter_context(sole_owner(self._path))
            try:
                is_new = is_to_be_made(self._path)
                if not is_new:
                    await self._check()
                self._writer = await connect(self._path, "rwc")
                exits.push_async_callback(self._writer.close)
                await self._writer.run(partial(self._prepare, is_new=is_new))
                self._reader = await connect(self._path, "ro")
                exits.push_async_callback(self._reader.close)
                await self._reader.run(lambda reader: reader.execute("pragma query_only = on"))
            except (sqlite3.Error, OSError) as error:
                raise StartupError(f"{self._path} cannot be opened: {error}") from error
            self._exits = exits.pop_all()

    async def close(self) -> None:
        """Checkpoints, as SQLite does when the last connection closes, and lets go of the file."""
        await self._exits.aclose()

    async def commit(self, operations: Sequence[Operation]) -> list[Commit | Problem]:
        """What became of each operation, all committed together. Raises sqlite3.Error: of none."""
        return await self._writer.run(partial(with_room, partial(self._commit, operations)))

    async def erase_some(self) -> bool:
        """Delete a bounded number of the chunks of cleared threads; False once none is left."""
        return await self._writer.run(partial(with_room, self._erase_some))

    async def scrub(self, at_any_size: bool) -> bool:
        """Leave no trace of what was deleted; False if the WAL must be emptied again."""
        return await self._writer.run(partial(with_room, partial(self._scrub, at_any_size)))

    async def probe(self) -> None:
        """Write what is there already. Raises sqlite3.Error."""
        await self._writer.run(self._probe)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the database file, and of its WAL."""
        return self._path.stat().st_size, self._wal.stat().st_size

    async def data_version(self) -> int:
        """Another number each time that another process has written (PRAGMA data_version)."""
        ((version,),) = await self._writer.execute_fetchall("pragma data_version")
        return cast(int, version)

    async def read(self, work: Callable[[Snapshot], T]) -> T:
        """What ``work`` finds in one snapshot. Raises Problem."""
        try:
            return await self._reader.run(partial(self._in_snapshot, work))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise database_problem(error) from error

    async def _check(self) -> None:
        with self._path.open("r+b"):  # or else say now that it cannot be written
            if not is_database(self._path):
                raise StartupError(f"{self._path} is not a database; name another file with --db")
        connection = await connect(self._path, "ro")
        try:
            ((application_id,),) = await connection.execute_fetchall("pragma application_id")
            ((version,),) = await connection.execute_fetchall("pragma user_version")
            ((verdict,),) = await connection.execute_fetchall("pragma integrity_check(1)")
        except sqlite3.DatabaseError as error:
            raise StartupError(f"{self._path} is damaged ({error}); restore it from a backup") from error
        finally:
            await connection.close()
        if verdict != "ok":
            raise StartupError(f"{self._path} is damaged ({' '.join(verdict.split())}); restore it from a backup")
        if application_id != APPLICATION_ID:
            raise StartupError(f"{self._path} is the database of another application; name another file with --db")
        if version != SCHEMA_VERSION:
            raise StartupError(
                f"{self._path} has version {version}, and this resume-stream knows {SCHEMA_VERSION}; use the one that"
                " made it"
            )

    def _prepare(self, connection: sqlite3.Connection, is_new: bool) -> None:
        if is_new:
            connection.execute("pragma auto_vacuum = incremental")  # has no effect inside a transaction
            connection.executescript(f"begin immediate; {SCHEMA.read_text()}; commit;")
        connection.execute("pragma journal_mode = wal")
        connection.execute(f"pragma synchronous = {self._settings.synchronous}")
        connection.execute("pragma secure_delete = on")
        ((page_size,),) = connection.execute("pragma page_size").fetchall()
        if 0 < self._settings.max_db < SMALLEST_DATABASE:
            raise StartupError(f"max_db is {self._settings.max_db} bytes, too few for a database; give it 1MiB or more")
        if self._settings.max_db:
            connection.execute(f"pragma max_page_count = {self._settings.max_db // page_size}")
        try_write(connection)  # makes the WAL
        self._opened_inodes = self._inodes()

    def _commit(self, operations: Sequence[Operation], connection: sqlite3.Connection) -> list[Commit | Problem]:
        self._check_in_place()
        with writing(connection):
            transaction = Transaction(connection, self._settings.max_message)
            outcomes = [outcome_of(transaction, operation) for operation in operations]
        self._limit_wal(connection)
        return outcomes

    def _limit_wal(self, connection: sqlite3.Connection) -> None:
        if self._wal.stat().st_size > self._wal_limit:
            # Readers that always overlap would keep the WAL growing; where one of another process
            # stays, wait for it no longer than this, and not again before the WAL has grown.
            try:
                is_reset = checkpoint(connection, busy_timeout=0.1)
            except sqlite3.Error as error:
                log.warning("checkpoint failed, and will be tried again: %s", error)  # what is committed stays so
                is_reset = False
            self._wal_limit = WAL_BYTES if is_reset else self._wal.stat().st_size + WAL_BYTES

    def _erase_some(self, connection: sqlite3.Connection) -> bool:
        with writing(connection):
            row = connection.execute("select thread from threads where thread_id is null limit 1").fetchone()
            if row is None:
                return False
            self._vacuum_owed = True
            erased = connection.execute(
                "delete from chunks where thread = ?1 and seq in"
                " (select seq from chunks where thread = ?1 order by seq limit ?2)",
                (row[0], ERASE_ROWS),
            ).rowcount
            if erased < ERASE_ROWS:
                connection.execute("delete from threads where thread = ?", row)
        return True

    def _scrub(self, at_any_size: bool, connection: sqlite3.Connection) -> bool:
        """Rewrite the file, once for all that was deleted, and empty the WAL.

        With secure_delete SQLite overwrites what it deletes, but a page that was rebalanced may
        keep older copies of cells in its unused space; only a vacuum is sure to drop them. A
        large file is vacuumed when no message is active, as appends wait for it, or when it has
        to be.
        """
        if self._vacuum_owed:
            ((size,),) = connection.execute("select page_count * page_size from pragma_page_count, pragma_page_size")
            ((is_quiet,),) = connection.execute("select not exists (select 1 from messages where status = 'active')")
            if size <= VACUUM_BYTES or is_quiet or at_any_size:
                connection.execute("vacuum")
                self._vacuum_owed = False
            else:
                connection.execute("pragma incremental_vacuum").fetchall()
        return checkpoint(connection, busy_timeout=0.1)

    def _check_in_place(self) -> None:
        """SQLite itself would go on writing to files that nobody can open any more."""
        if self._inodes() != self._opened_inodes:
            raise FileNotFoundError(f"{self._path.name} or its WAL was deleted or replaced; restart the service")

    def _inodes(self) -> tuple[int, int] | None:
        try:
            return os.stat(self._path).st_ino, os.stat(self._wal).st_ino
        except FileNotFoundError:
            return None

    def _probe(self, connection: sqlite3.Connection) -> None:
        self._check_in_place()
        with writing(connection):  # a pragma, as SQLite writes no page for an update that changes nothing
            connection.execute(f"pragma user_version = {SCHEMA_VERSION}")

    @staticmethod
    def _in_snapshot(work: Callable[[Snapshot], T], connection: sqlite3.Connection) -> T:
        connection.execute("begin")
        try:
            return work(Snapshot(connection))
        finally:
            connection.execute("commit")


def is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def is_to_be_made(path: Path) -> bool:
    """Whether there is no database yet, or one whose making was cut short before it had a table."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    if not is_database(path):
        return False
    mode: Literal["ro", "rw"] = "rw" if Path(f"{path}-journal").exists() else "ro"  # only a writer can roll back
    try:
        with contextlib.closing(sqlite3.connect(database_uri(path, mode), uri=True)) as connection:
            ((application_id,),) = connection.execute("pragma application_id")
            ((is_empty,),) = connection.execute("select not exists (select 1 from sqlite_schema)")
    except sqlite3.DatabaseError:
        return False  # and the check says what it is
    return bool(is_empty) and application_id == 0


def outcome_of(transaction: Transaction, operation: Operation) -> Commit | Problem:
    try:
        return transaction.apply(operation)
    except Problem as problem:
        return problem


@contextlib.contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction, which waits for the lock now and not in its middle."""
    connection.execute("begin immediate")
    try:
        yield
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:  # a full disk may have rolled it back already
            connection.execute("rollback")
        raise


def try_write(connection: sqlite3.Connection) -> None:
    with writing(connection):
        connection.execute("update clock set latest_generation = latest_generation")


def checkpoint(connection: sqlite3.Connection, busy_timeout: float) -> bool:
    """Empty the WAL; False if a reader of another process kept it from that for so long."""
    connection.execute(f"pragma busy_timeout = {busy_timeout * 1000:.0f}")
    try:
        (is_busy, _, _) = connection.execute("pragma wal_checkpoint(truncate)").fetchone()
    finally:
        connection.execute(f"pragma busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
    return not is_busy


def with_room(work: Callable[[sqlite3.Connection], T], connection: sqlite3.Connection) -> T:
    """Where the disk is full, make what room the WAL takes, and try once more."""
    try:
        return work(connection)
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_FULL or not checkpoint(
            connection, busy_timeout=0.1
        ):
            raise
        return work(connection)


@contextlib.contextmanager
def sole_owner(path: Path) -> Iterator[None]:
    """Hold the lock beside the database, whose name ends in .lock and which stays when we go."""
    lock = Path(f"{path}.lock")
    try:
        file = lock.open("a+")
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {lock} cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise StartupError(f"{path} is already served, by process {owner}") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


# ---------------------------------------------------------------------------------------------
# The buffer
# ---------------------------------------------------------------------------------------------

PENDING_BYTES = 16 * 1024**2  # waiting to be committed; past it producers wait
PENDING_CHUNK_BYTES = 64  # what a chunk costs besides its text
CLOCK_STEP_MS = 2_000  # more than a clock drifts between two looks
SCRUB_PAUSE = 0.25  # seconds between two tries to empty the WAL while another process reads
BATCH_BYTES = 4 * 1024**2  # what one transaction takes
BATCH_OPERATIONS = 512  # enough for one transaction not to wait for more
QUIET_TURNS = 3  # of the loop without another operation, after which a transaction begins
MIN_POLL_INTERVAL = 0.01  # seconds
LIVE_BYTES = 256 * 1024  # of a thread's newest pages, kept while somebody follows it


class Pending:
    """Work for the writer, and who waits for it."""

    __slots__ = ("done", "queued", "size", "work")

    def __init__(self, work: Operation | Callable[[], Awaitable[Any]], size: int) -> None:
        self.work = work
        self.size = size
        self.queued = time.perf_counter()
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def answer(self, outcome: Any) -> None:
        if self.done.done():
            return  # the one who asked is gone; what was committed stays committed
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


class Channel:
    """What those who follow one thread share: its head, its newest pages, and their wake-up."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.followers = 0
        self._cleared = 0
        self._pages: dict[int, Page] = {}
        self._size = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._watchers: dict[str, set[Callable[[], None]]] = {}

    @property
    def unused(self) -> bool:
        return not self.followers and not self._watchers

    def has_lost(self, thread: int) -> bool:
        """Whether this thread was cleared; numbers are never used twice, and only grow."""
        return thread <= self._cleared or (self.head is not None and thread < self.head.thread)

    def learn(self, head: Head, is_committed: bool = False) -> None:
        """Take a head from a commit, or from the store where no commit has told of a later one."""
        known = self.head
        if self.has_lost(head.thread) or (known and (head.thread, head.last_seq) < (known.thread, known.last_seq)):
            return
        if known and not is_committed and (head.thread, head.last_seq) == (known.thread, known.last_seq):
            return  # a message may have been opened since, which takes no place
        if known and known.thread != head.thread:
            self.forget()
        self.head = head

    def publish(self, commit: Commit, queued: float) -> None:
        if commit.cleared:
            self.clear(commit.thread)
        else:
            self.learn(Head(commit.thread, commit.generation, commit.last_seq, commit.active), is_committed=True)
            if commit.changed and self.followers and not self.has_lost(commit.thread):
                self._keep(commit, queued)
            if commit.end:
                self._end_watch(commit.end.message_id)
        self.wake()

    def clear(self, thread: int) -> None:
        """Every thread up to this one is gone."""
        if self.head is not None and self.head.thread <= thread:
            self.head = None
            self.forget()
            self.end_watches()
        self._cleared = max(self._cleared, thread)

    def refresh(self, head: Head | None, latest_thread: int, ended: Sequence[str]) -> None:
        """Take over what another process may have changed."""
        self.forget()
        self.clear(latest_thread if head is None else head.thread - 1)
        self.head = head
        for message_id in ended:
            self._end_watch(message_id)
        self.wake()

    def pages_after(self, seq: int) -> list[Page]:
        """All that is here, so that a reader is sent it at once."""
        pages = []
        while page := self._pages.get(seq + 1):
            pages.append(page)
            seq = page.last_seq
        return pages

    def forget(self) -> None:
        self._pages.clear()
        self._size = 0

    def wake(self) -> None:
        woken, self._waiting = self._waiting, set()
        for waiting in woken:
            wake_up(waiting)

    async def wait(self, until: float | None) -> None:
        """Until something happens, or the loop's clock shows ``until``."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        timer = None if until is None else loop.call_at(until, wake_up, waiting)
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if timer is not None:
                timer.cancel()

    def watch(self, message_id: str, on_end: Callable[[], None]) -> None:
        self._watchers.setdefault(message_id, set()).add(on_end)

    def unwatch(self, message_id: str, on_end: Callable[[], None]) -> None:
        watchers = self._watchers.get(message_id, set())
        watchers.discard(on_end)
        if not watchers:
            self._watchers.pop(message_id, None)

    @property
    def watched(self) -> AbstractSet[str]:
        return self._watchers.keys()

    def end_watches(self) -> None:
        for message_id in list(self._watchers):
            self._end_watch(message_id)

    def _end_watch(self, message_id: str) -> None:
        for on_end in self._watchers.pop(message_id, set()):
            on_end()

    def _keep(self, commit: Commit, queued: float) -> None:
        message_id = cast(Appended, commit.answer).message_id
        entries: list[Entry] = [
            StoredChunk(chunk.content, commit.timestamp, message_id, seq, chunk.event)
            for seq, chunk in enumerate(commit.chunks, commit.first_seq)
        ]
        if commit.end:
            entries.append(commit.end)
        if not entries:
            return
        size = sum(len(chunk.content) for chunk in commit.chunks)
        page = Page(commit.generation, commit.last_seq, entries, size, queued)
        self._pages[entries[0].seq] = page
        self._size += page.size + PENDING_CHUNK_BYTES * len(entries)
        while self._size > LIVE_BYTES and len(self._pages) > 1:
            oldest = self._pages.pop(next(iter(self._pages)))
            self._size -= oldest.size + PENDING_CHUNK_BYTES * len(oldest.entries)


def wake_up(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def checked_id(kind: str, text: str) -> str:
    """The id, of 1 to 200 characters, no ``/`` and no control character. Raises BadRequest."""
    if not 1 <= len(text) <= MAX_NAME or "/" in text or CONTROL_CHARACTER.search(text):
        raise BadRequest(
            f"{text!r:.80} cannot be a {kind}; use 1 to {MAX_NAME} characters, no '/' and no control characters."
        )
    utf8_size(text)
    return text


def checked_ids(thread_id: str, message_id: str) -> tuple[str, str]:
    return checked_id("thread_id", thread_id), checked_id("message_id", message_id)


def utf8_size(text: str) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidContent(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}), which is not valid Unicode;"
            " send both halves of the pair in one chunk."
        ) from error


def checked_event(event: str) -> None:
    if not 1 <= len(event) <= MAX_NAME or CONTROL_CHARACTER.search(event) or event in RESERVED_EVENTS:
        raise InvalidContent(
            f"{event!r:.80} cannot be an event; use 1 to {MAX_NAME} characters, no control characters, and none of"
            f" the service's own names ({', '.join(sorted(RESERVED_EVENTS))})."
        )
    utf8_size(event)


class ChunkBuffer:
    """Keeps what agents stream, and lets readers carry on from where they stopped.

    An asynchronous context manager: entering it opens the database, leaving it commits what is
    waiting and closes it. All methods belong to the event loop it was entered in. Errors are
    subclasses of Problem, whose ``status_code`` is that of the HTTP answer.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings = settings or Settings()
        self._store = Store(settings)
        self._channels: dict[str, Channel] = {}
        self._queue: list[Pending] = []
        self._queued = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._poll_intervals: Multiset[float] = Multiset()
        self.readers = 0
        self.metrics = Metrics()
        self._polled = asyncio.Event()
        self._hurry = asyncio.Event()
        self._scrub_owed = True
        self._erasing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None
        self.stopping = False

    async def __aenter__(self) -> Self:
        """Raises StartupError where the database cannot be served."""
        await self._store.open()
        self._started_ms = now_ms()
        self._clock_offset, self._clock_set_ms = now_ms() - ms_since_boot(), 0
        self._writer = asyncio.create_task(self._write(), name="writer")
        self._tasks = [
            asyncio.create_task(self._watch_other_processes(), name="watch other processes"),
            asyncio.create_task(self._clean_up_forever(), name="clean up"),
            asyncio.create_task(self._abort_idle_messages_forever(), name="abort idle messages"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for task in [*self._tasks, *self._pumps]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._pumps, return_exceptions=True)
        self._work.set()
        await self._writer
        await self._store.close()

    def stop(self) -> None:
        """End every stream now, without an end event, so that clients reconnect elsewhere or later."""
        self.stopping = True
        for channel in self._channels.values():
            channel.end_watches()
            channel.wake()

    # Producers

    async def open_message(self, thread_id: str, message_id: str) -> tuple[Appended, bool]:
        """Open a message before its first chunk, so that readers can wait for it.

        The second value is whether it is new; a message that is there already counts the call as
        a sign of life. Raises BadRequest for an id that cannot be one.
        """
        commit = await self._submit(OpenMessage(*checked_ids(thread_id, message_id)))
        return cast(Appended, commit.answer), commit.changed

    async def add_chunks(
        self,
        thread_id: str,
        message_id: str,
        chunks: Sequence[Chunk | str],
        *,
        index: int | None = None,
        complete: bool = False,
    ) -> Appended:
        """Append chunks, all or nothing, and return once they are committed.

        Opens the message if need be. ``index`` (from 0) is the number in this message of the
        first of the chunks, and makes a retry safe: what is stored already is compared and
        skipped. ``complete`` ends the message in the same transaction. No chunks at all are a
        sign of life.

        Raises Conflict (the message has ended, ``index`` leaves a gap, or another chunk is
        stored there), TooLarge, InvalidContent, Unavailable, DatabaseFull. After any of them
        nothing has changed.
        """
        if isinstance(chunks, str):
            raise BadRequest("The chunks are one text; put it in a list, or its characters would be a chunk each.")
        taken = [Chunk(chunk) if isinstance(chunk, str) else chunk for chunk in chunks]
        append = self.checked_append(thread_id, message_id, taken, index=index, complete=complete)
        return cast(Appended, (await self.submit_append(append)).answer)

    def checked_append(
        self,
        thread_id: str,
        message_id: str,
        chunks: Sequence[Chunk],
        *,
        index: int | None = None,
        complete: bool = False,
        thread: int | None = None,
    ) -> Append:
        """The append, if its ids, its events and the size and text of its chunks are good."""
        if index is not None and not 0 <= index < 2**63:
            raise BadRequest(f"index={index} cannot be; it is the number of the first chunk in its message, from 0.")
        sizes, refusal = self.checked_sizes(chunks)
        if refusal is not None:
            raise refusal
        return Append(*checked_ids(thread_id, message_id), chunks, sizes, index, complete, thread)

    def checked_sizes(self, chunks: Sequence[Chunk]) -> tuple[list[int], Problem | None]:
        """The bytes of each chunk, up to the first that is refused, and why it is."""
        sizes: list[int] = []
        try:
            for chunk in chunks:
                if chunk.event is not None:
                    checked_event(chunk.event)
                if (size := utf8_size(chunk.content)) > self.settings.max_chunk:
                    raise TooLarge(
                        f"A chunk has {size} bytes, over max_chunk ({self.settings.max_chunk}); send it in parts."
                    )
                sizes.append(size)
        except Problem as problem:
            return sizes, problem
        return sizes, None

    async def stored_text(self, thread_id: str, message_id: str, index: int | None) -> tuple[str, int | None]:
        """The text stored from chunk ``index`` on, and the index after it: none, without an index."""
        if index is None:
            return "", None
        return await self._store.read(lambda snapshot: snapshot.text_from(thread_id, message_id, index))

    async def submit_append(self, append: Append) -> Commit:
        await self.room()
        return await self.queue_append(append)

    def queue_append(self, append: Append) -> asyncio.Future[Commit]:
        """Put it right behind what was asked for before; the caller has waited for ``room``."""
        return self._enqueue(append, sum(append.sizes) + PENDING_CHUNK_BYTES * len(append.chunks))

    async def complete_message(self, thread_id: str, message_id: str) -> Appended:
        """End a message; again: the same answer. Raises NotFound; Conflict if it was aborted."""
        commit = await self._submit(EndMessage(*checked_ids(thread_id, message_id), "completed"))
        return cast(Appended, commit.answer)

    async def abort_message(self, thread_id: str, message_id: str, reason: str | None = None) -> Appended:
        """Abort a message, from either side; again: the same answer.

        ``reason`` has up to 1,000 characters. Raises NotFound; Conflict if it is completed; TooLarge.
        """
        if reason is not None:
            utf8_size(reason)
            if len(reason) > MAX_REASON:
                raise TooLarge(f"The reason has {len(reason)} characters; say it in {MAX_REASON} or fewer.")
        commit = await self._submit(EndMessage(*checked_ids(thread_id, message_id), "aborted", reason))
        return cast(Appended, commit.answer)

    async def clear_thread_buffer(self, thread_id: str) -> None:
        """Forget a thread; returns once its text is in neither the database nor the WAL.

        Raises NotFound.
        """
        await self._submit(ClearThread(checked_id("thread_id", thread_id)))
        try:
            await self._erase()
        except (DatabaseFull, Unavailable) as problem:
            problem.detail = f"The thread is cleared, and its text will be erased later. {problem.detail}"
            raise

    async def agent_stream(
        self, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk]
    ) -> AsyncGenerator[str | Chunk, None]:
        """Store and yield what ``source`` yields: text, or Chunks where an event has a name.

        Each piece is yielded once it is committed. When the consumer goes away, storing goes on.
        The message is completed when ``source`` ends, and aborted when it fails, with the name
        of the exception as its reason; the exception is raised here too. When the message is
        ended from outside, ``source`` is closed and the iteration ends.
        """
        opened, _ = await self.open_message(thread_id, message_id)
        position = await self._locate(thread_id, message_id, after=str(opened.seq))
        pump = asyncio.create_task(self._pump(thread_id, message_id, source))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)
        # Not refused when there are max_readers, as an agent's stream is no reader's.
        quiet = Quiet(self.settings, idle_timeout=0, heartbeat=1, expires=math.inf)
        async with aclosing(self._follow(Seat(self), position, False, None, quiet)) as items:
            async for item in items:
                if isinstance(item, Page):
                    for entry in item.entries:
                        if isinstance(entry, StoredChunk):
                            yield (Chunk(entry.content, entry.event) if entry.event else entry.content)
                elif pump.done():
                    break  # it failed, and could not even abort the message
        await asyncio.wait([pump])
        if pump.cancelled():
            raise Stopping
        pump.result()

    async def _pump(self, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk]) -> None:
        try:
            async with self.while_active(thread_id, message_id) as stop_watching:
                async for piece in source:
                    await self.add_chunks(thread_id, message_id, [piece])
                stop_watching()
                await self.complete_message(thread_id, message_id)
        except Conflict:
            log.info("agent stopped: its message was ended from outside")
        except Exception as error:
            with contextlib.suppress(Problem):  # the error itself is what the consumer must see
                await self.abort_message(thread_id, message_id, type(error).__name__)
            raise
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    @contextlib.asynccontextmanager
    async def while_active(
        self, thread_id: str, message_id: str, expires: float = math.inf
    ) -> AsyncIterator[Callable[[], None]]:
        """Cut the block short as soon as the message is ended by anyone, or the service stops.

        Also at ``expires`` (seconds since 1970). Yields a function that lifts the watch, for the
        one who ends the message itself. Raises Conflict, Unavailable or Unauthorized: why.
        """
        loop = asyncio.get_running_loop()
        channel = self._channel(thread_id)
        scope = asyncio.timeout(None if expires == math.inf else expires - time.time())

        was_ended = False

        def cut() -> None:
            nonlocal was_ended
            was_ended = True
            if not scope.expired():
                scope.reschedule(loop.time())

        channel.watch(message_id, cut)
        lift = partial(channel.unwatch, message_id, cut)
        try:
            with self._polling():
                async with scope:
                    yield lift
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            lift()
            self._release(thread_id, channel)
        if scope.expired():
            raise await self._why_cut(thread_id, message_id) if was_ended else token_expired()

    async def _why_cut(self, thread_id: str, message_id: str) -> Problem:
        if self.stopping:
            return Stopping()
        try:
            found = await self._store.read(lambda snapshot: snapshot.message(thread_id, message_id))
        except NotFound:
            return thread_cleared()
        if not found.ended:
            return thread_cleared()
        return message_ended(message_id, found.status, found.reason, found.chunk_count)

    # Readers

    async def resume_stream(
        self,
        thread_id: str,
        message_id: str,
        known_content: str | None = None,
        poll_interval: float | None = None,
        *,
        after: str | int | None = None,
        idle_timeout: float | None = None,
    ) -> AsyncGenerator[StoredChunk | MessageEnd | Signal, None]:
        """What the reader does not have yet of a message, until it ends.

        ``known_content`` is text it has: a prefix of the message's text resumes right after it,
        inside a chunk if need be; so does a text that occurs exactly once; anything else is
        answered with Signal.RESET and everything. ``after`` (a cursor or a bare sequence number)
        stands in its place. ``poll_interval`` and ``idle_timeout`` are seconds, by default those
        of the settings. Ends after a MessageEnd, Signal.GONE or Signal.TIMEOUT.

        Raises NotFound, BadRequest (a bad cursor), Unavailable (too many readers).
        """
        if known_content is not None and after is None:
            position = await self.match(thread_id, message_id, known_content)
        else:
            position = await self.locate(thread_id, message_id, after=None if after is None else str(after))
        if position.finished:
            return
        items = self.follow(position, idle_timeout=idle_timeout, heartbeat=0, poll_interval=poll_interval)
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Page):
                    for entry in item.entries:
                        yield entry
                else:
                    yield item

    async def get_accumulated_content(self, thread_id: str, message_id: str | None = None) -> AccumulatedContent:
        """The text of a message so far, or of a thread's messages in the order they began.

        Raises NotFound, BadRequest.
        """
        checked_id("thread_id", thread_id)
        if message_id is not None:
            checked_id("message_id", message_id)
        return await self._store.read(lambda snapshot: snapshot.content(thread_id, message_id))

    async def get_thread_status(self, thread_id: str) -> ThreadStatus:
        """A thread with its messages. Raises NotFound, BadRequest."""
        checked_id("thread_id", thread_id)
        status = await self._store.read(lambda snapshot: snapshot.status(thread_id))
        return msgspec.structs.replace(status, readers=self._followers(thread_id))

    async def get_threads(
        self,
        status: Status | None = None,
        limit: int = 100,
        cursor: str | None = None,
        covers: Callable[[str], bool] = lambda thread_id: True,
    ) -> ThreadPage:
        """Up to ``limit`` (1 to 1000) threads, the newest first, of one status or of any.

        ``covers`` leaves out those for whose id it is false. Raises BadRequest.
        """
        checked_range("limit", limit, 1, 1000)
        if cursor is not None and not re.fullmatch(r"\d{1,18}", cursor, re.ASCII):
            raise BadRequest(f"{cursor!r:.80} is not a cursor of this list; send the one that its last page gave.")
        before = None if cursor is None else int(cursor)
        page = await self._store.read(lambda snapshot: snapshot.threads(status, limit, before, covers))
        threads = [
            msgspec.structs.replace(thread, readers=self._followers(thread.thread_id)) for thread in page.threads
        ]
        return msgspec.structs.replace(page, threads=threads)

    def _followers(self, thread_id: str) -> int:
        channel = self._channels.get(thread_id)
        return channel.followers if channel else 0

    async def get_active_threads(self, limit: int = 100, cursor: str | None = None) -> ThreadPage:
        """The threads of which a message is active. Raises BadRequest."""
        return await self.get_threads("active", limit, cursor)

    async def get_chunks(
        self,
        thread_id: str,
        message_id: str | None = None,
        *,
        after: str | None = None,
        limit: int = PAGE_ROWS,
        wait: float = 0,
        expires: float = math.inf,
    ) -> ChunkPage:
        """Up to ``limit`` (1 to 10,000) entries after a cursor; waits up to ``wait`` s (0 to 300).

        ``expires`` is in seconds since 1970. Raises NotFound, BadRequest, Unauthorized (expired
        while it waited), and CursorGone for a cursor of another generation.
        """
        checked_range("limit", limit, 1, 10_000)
        checked_range("wait", wait, 0, 300)
        position = await self._locate(thread_id, message_id, after)
        if position.reset:
            raise CursorGone(
                "This cursor is of a thread that was cleared or expired, or lies beyond its end; read from the start,"
                " with no after."
            )
        page = await self._store.read(lambda snapshot: snapshot.chunk_page(position, limit))
        if not wait or position.finished or page.chunks or page.ends:
            return page
        async with aclosing(self.follow(position, idle_timeout=wait, heartbeat=0, expires=expires)) as items:
            await anext(items, None)
        if time.time() >= expires:
            raise token_expired()
        return await self._store.read(lambda snapshot: snapshot.chunk_page(position, limit))

    async def locate(
        self, thread_id: str, message_id: str | None = None, *, after: str | None = None, follow: bool = False
    ) -> Position:
        """Where a reader with this cursor begins.

        Raises NotFound (unless ``follow``, for a thread) and BadRequest.
        """
        return await self._locate(thread_id, message_id, after, follow)

    async def _locate(
        self, thread_id: str, message_id: str | None, after: str | None, follow: bool = False
    ) -> Position:
        checked_id("thread_id", thread_id)
        if message_id is not None:
            checked_id("message_id", message_id)
        cursor = None if after is None else Cursor.parse(after)
        position = await self._store.read(lambda snapshot: snapshot.locate(thread_id, message_id, cursor, follow))
        self.metrics.count_resume("start" if cursor is None else "cursor", position)
        return position

    async def match(self, thread_id: str, message_id: str, known_content: str) -> Position:
        """Where a reader with this text begins. Raises NotFound, BadRequest, InvalidContent."""
        checked_ids(thread_id, message_id)
        utf8_size(known_content)
        position = await self._store.read(lambda snapshot: snapshot.match(thread_id, message_id, known_content))
        self.metrics.count_resume("content", position)
        return position

    def _check_room_for_reader(self) -> None:
        if self.stopping:
            raise Stopping
        if self.readers >= self.settings.max_readers:
            raise Unavailable(f"There are {self.readers} readers, as many as max_readers allows; try again later.")

    def follow(
        self,
        position: Position,
        *,
        follow: bool = False,
        idle_timeout: float | None = None,
        heartbeat: float | None = None,
        poll_interval: float | None = None,
        expires: float = math.inf,
    ) -> AsyncGenerator[Page | Signal, None]:
        """What comes after a position, as it is committed; with ``follow`` also after the end.

        Times are seconds, by default those of the settings; 0 turns ``idle_timeout`` and
        ``heartbeat`` off; ``expires`` is in seconds since 1970. No transaction is open while the
        consumer has a page. Raises Unavailable if there are ``max_readers`` already.
        """
        self._check_room_for_reader()
        quiet = Quiet(self.settings, idle_timeout, heartbeat, expires)
        return self._follow(Seat(self), position, follow, poll_interval, quiet)

    async def _follow(
        self, seat: Seat, position: Position, follow: bool, poll_interval: float | None, quiet: Quiet
    ) -> AsyncGenerator[Page | Signal, None]:
        with contextlib.closing(seat), self._attached(position.thread_id, poll_interval) as channel:
            if position.reset:
                yield Signal.RESET
            if position.thread is None:
                await self._learn_head(position.thread_id, channel)
            async with aclosing(self._events(channel, position, follow, quiet)) as events:
                async for event in events:
                    yield event

    async def _events(
        self, channel: Channel, position: Position, follow: bool, quiet: Quiet
    ) -> AsyncGenerator[Page | Signal, None]:
        seq, skip = position.after, position.skip
        while not self.stopping:
            if position.thread is None and channel.head:
                position = msgspec.structs.replace(position, thread=channel.head.thread)
            more = await self._more(channel, position, seq)
            if isinstance(more, list) and not quiet.is_expired():
                seq = more[-1].last_seq
                if picked := pick(more, position.message_id, skip):
                    skip = 0
                    self.metrics.count_delivery(picked)
                    yield picked
                    quiet.broken()
                    if position.ends_with(picked):
                        return
                continue
            if more is None:
                if not position.may_have_more(channel.head, follow):
                    return
                await channel.wait(quiet.until())
            signal_ = more if more is Signal.GONE else quiet.due()
            if signal_:
                yield signal_
            if signal_ not in (None, Signal.HEARTBEAT):
                return

    async def _more(self, channel: Channel, position: Position, seq: int) -> list[Page] | Signal | None:
        """What comes after ``seq``: pages, GONE, or None for nothing yet."""
        head, thread = channel.head, position.thread
        if thread is None:
            return None
        if channel.has_lost(thread):
            return Signal.GONE
        if head and seq >= head.last_seq:
            return None
        if pages := channel.pages_after(seq):
            return pages
        found = await self._store.read(lambda snapshot: snapshot.page(thread, position.message, seq, PAGE_ROWS))
        if found is None:
            return Signal.GONE
        channel.learn(found[0])
        return [found[1]]

    async def check_ready(self) -> None:
        """Raises Unavailable or DatabaseFull unless the database answers and takes writes."""
        if self._probe is None or self._probe.done():  # those who ask at the same time share one answer
            self._probe = asyncio.create_task(self._maintain(self._store.probe))
        await asyncio.shield(self._probe)

    async def scrape(self) -> bytes:
        """The metrics, in Prometheus' text format."""
        metrics = self.metrics
        metrics.readers.set(self.readers)
        metrics.active_messages.set(await self._store.read(Snapshot.active_messages))
        database_bytes, wal_bytes = self._store.sizes()
        metrics.database_bytes.set(database_bytes)
        metrics.wal_bytes.set(wal_bytes)
        return generate_latest(metrics.registry)

    async def _learn_head(self, thread_id: str, channel: Channel) -> None:
        head = await self._store.read(lambda snapshot: snapshot.head(thread_id))
        if head is not None:
            channel.learn(head)

    @contextlib.contextmanager
    def _attached(self, thread_id: str, poll_interval: float | None) -> Iterator[Channel]:
        channel = self._channel(thread_id)
        channel.followers += 1
        try:
            with self._polling(poll_interval):
                yield channel
        finally:
            channel.followers -= 1
            if not channel.followers:
                channel.forget()
            self._release(thread_id, channel)

    @contextlib.contextmanager
    def _polling(self, interval: float | None = None) -> Iterator[None]:
        """Have other processes' changes noticed within so many seconds."""
        interval = max(self.settings.poll_interval if interval is None else interval, MIN_POLL_INTERVAL)
        if interval < min(self._poll_intervals, default=math.inf):
            self._hurry.set()
        self._poll_intervals[interval] += 1
        self._polled.set()
        try:
            yield
        finally:
            self._poll_intervals[interval] -= 1
            self._poll_intervals += Multiset()  # drops what has come to zero
            if not self._poll_intervals:
                self._polled.clear()

    def _channel(self, thread_id: str) -> Channel:
        return self._channels.setdefault(thread_id, Channel())

    def _release(self, thread_id: str, channel: Channel) -> None:
        if channel.unused and self._channels.get(thread_id) is channel:
            del self._channels[thread_id]

    # The writer

    async def _submit(self, operation: Operation) -> Commit:
        """Raises Problem, with nothing changed."""
        await self.room()
        return cast(Commit, await self._enqueue(operation, PENDING_CHUNK_BYTES))

    async def _maintain(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run on the writer, alone, between two commits."""
        await self.room()
        return cast(T, await self._enqueue(work, 0))

    def _enqueue(self, work: Operation | Callable[[], Awaitable[Any]], size: int) -> asyncio.Future[Any]:
        pending = Pending(work, size)
        self._queue.append(pending)
        self._queued += size
        if self._queued >= PENDING_BYTES:
            self._room.clear()
        self._work.set()
        return pending.done

    async def room(self) -> None:
        """Wait until less than the limit is waiting to be committed. Raises Unavailable."""
        while not self._room.is_set():  # the first of those who waited may have filled it again
            await self._room.wait()
        if self.stopping:
            raise Stopping

    async def _write(self) -> None:
        """The one writer: commits together what came while the last commit was under way."""
        while True:
            await self._work.wait()
            if self._queue:
                await self._gather()
            batch = self._take_batch()
            if not batch:
                self._work.clear()
                if self.stopping:
                    return
            elif isinstance(batch[0].work, Record):
                await self._commit(batch)
            else:
                try:
                    batch[0].answer(await batch[0].work())
                except Exception as error:
                    batch[0].answer(problem_of(error))

    async def _gather(self) -> None:
        """Let in what is about to come: a commit costs about the same for many as for one.

        Those whom the last commit answered need some turns of the loop to come again; without
        them, producers would split into halves that wait for each other's commits.
        """
        quiet, seen = 0, len(self._queue)
        while quiet < QUIET_TURNS and seen < BATCH_OPERATIONS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._queue) == seen else 0
            seen = len(self._queue)

    def _take_batch(self) -> list[Pending]:
        """Operations for one transaction, or one piece of maintenance; what came first, first."""
        size = taken = 0
        for pending in self._queue:
            if not isinstance(pending.work, Record):
                taken = taken or 1
                break
            if taken and size + pending.size > BATCH_BYTES:
                break
            size += pending.size
            taken += 1
        batch, self._queue = self._queue[:taken], self._queue[taken:]
        self._queued -= size
        if self._queued < PENDING_BYTES:
            self._room.set()
        return batch

    async def _commit(self, batch: list[Pending]) -> None:
        began = time.perf_counter()
        try:
            outcomes = await self._store.commit([cast(Operation, pending.work) for pending in batch])
        except Exception as error:
            log.error("commit failed: %s", error)
            for pending in batch:
                pending.answer(problem_of(error))
            return
        sizes: list[int] = []
        for pending, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Commit):
                if outcome.chunks:
                    sizes += cast(Append, pending.work).sizes[-len(outcome.chunks) :]
                self._publish(outcome, pending)
            pending.answer(outcome)
        self.metrics.count_commit(sizes, time.perf_counter() - began)

    def _publish(self, commit: Commit, pending: Pending) -> None:
        if commit.end:
            self.metrics.count_end(commit.end)
        if commit.cleared:
            self._scrub_owed = True
        if channel := self._channels.get(commit.thread_id):
            channel.publish(commit, pending.queued)

    # Periodic work

    async def _watch_other_processes(self) -> None:
        version = await self._maintain(self._store.data_version)
        while not self.stopping:
            await self._polled.wait()
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._poll_intervals, default=MIN_POLL_INTERVAL)):
                    await self._hurry.wait()
                    continue  # with the interval of the one who came
            with logged_problems("watch other processes"):
                latest = await self._maintain(self._store.data_version)
                if latest != version:
                    await self._maintain(self._refresh)
                    version = latest

    async def _refresh(self) -> None:
        """Bring every channel up to date; on the writer, so that no commit comes in between."""
        watched = {thread_id: list(channel.watched) for thread_id, channel in self._channels.items()}
        latest, found = await self._store.read(
            lambda snapshot: (
                snapshot.latest_thread(),
                [(snapshot.head(key), snapshot.ended(key, ids)) for key, ids in watched.items()],
            )
        )
        for thread_id, (head, ended) in zip(watched, found, strict=True):
            if channel := self._channels.get(thread_id):
                channel.refresh(head, latest, ended)

    async def _clean_up_forever(self) -> None:
        while not self.stopping:
            with logged_problems("clean up"):
                await self._clean_up()
            interval = self.settings.cleanup_interval
            await asyncio.sleep(min(interval, BUSY_TIMEOUT) if self._scrub_owed else interval)

    async def _clean_up(self) -> None:
        untouched_since = now_ms() - round(self.settings.ttl * 1000)
        while untouched_since >= self._clock_set_at() and (
            expired := await self._store.read(lambda snapshot: snapshot.idle_threads(untouched_since))
        ):
            for thread_id in expired:
                with contextlib.suppress(NotFound):  # touched or cleared in the meantime
                    await self._submit(ClearThread(thread_id, untouched_since))
                    self.metrics.expired.inc()
        await self._erase(at_any_size=True)

    def _clock_set_at(self) -> int:
        """When the clock was last set, by its own new time (ms); what is older cannot be told apart by age."""
        offset = now_ms() - ms_since_boot()
        if abs(offset - self._clock_offset) > CLOCK_STEP_MS:
            log.warning("the clock was set; nothing expires until its time has passed anew")
            self._clock_offset, self._clock_set_ms = offset, now_ms()
        return self._clock_set_ms

    async def _erase(self, at_any_size: bool = False) -> None:
        """Where another process reads, its snapshot keeps the WAL: wait a while, then leave it owed."""
        async with self._erasing:
            while await self._maintain(self._store.erase_some):
                self._scrub_owed = True
            give_up = asyncio.get_running_loop().time() + BUSY_TIMEOUT
            while self._scrub_owed or at_any_size:
                self._scrub_owed = not await self._maintain(partial(self._store.scrub, at_any_size))
                at_any_size = False
                if self._scrub_owed:
                    if asyncio.get_running_loop().time() >= give_up:
                        return
                    await asyncio.sleep(SCRUB_PAUSE)

    async def _abort_idle_messages_forever(self) -> None:
        timeout = self.settings.producer_timeout
        while timeout and not self.stopping:
            await asyncio.sleep(min(max(timeout / 10, 0.02), 5))
            untouched_since = now_ms() - round(timeout * 1000)
            if untouched_since < max(self._started_ms, self._clock_set_at()):
                continue  # while the service was down nobody could append
            with logged_problems("abort idle messages"):
                await self._abort_idle_messages(untouched_since)

    async def _abort_idle_messages(self, untouched_since: int) -> None:
        for thread_id, message_id in await self._store.read(lambda snapshot: snapshot.idle_messages(untouched_since)):
            with contextlib.suppress(NotFound, Conflict):  # touched or ended in the meantime
                await self._submit(EndMessage(thread_id, message_id, "aborted", PRODUCER_TIMEOUT, untouched_since))


def ms_since_boot() -> int:
    """A clock that nobody can set."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


class Seat:
    """One of ``max_readers``: taken at once, free when its stream is over, or dropped unread."""

    def __init__(self, buffer: ChunkBuffer) -> None:
        buffer.readers += 1
        self.close = weakref.finalize(self, self._free, buffer)

    @staticmethod
    def _free(buffer: ChunkBuffer) -> None:
        buffer.readers -= 1


class Quiet:
    """When a reader to whom nothing comes is due a heartbeat, and when its time is up."""

    def __init__(self, settings: Settings, idle_timeout: float | None, heartbeat: float | None, expires: float) -> None:
        self._idle_timeout = (settings.idle_timeout if idle_timeout is None else idle_timeout) or math.inf
        self._heartbeat = (settings.heartbeat if heartbeat is None else heartbeat) or math.inf
        self._now = asyncio.get_running_loop().time
        self._expires = self._now() + expires - time.time()
        self.broken()

    def broken(self) -> None:
        self._since = self._last_sent = self._now()

    def is_expired(self) -> bool:
        return self._now() >= self._expires

    def until(self) -> float | None:
        soonest = min(self._since + self._idle_timeout, self._last_sent + self._heartbeat, self._expires)
        return None if soonest == math.inf else soonest

    def due(self) -> Signal | None:
        now = self._now()
        if now >= self._expires:
            return Signal.EXPIRED
        if now >= self._since + self._idle_timeout:
            return Signal.TIMEOUT
        if now >= self._last_sent + self._heartbeat:
            self._last_sent = now
            return Signal.HEARTBEAT
        return None


def pick(pages: Sequence[Page], message_id: str | None, skip: int) -> Page | None:
    """The pages as one reader needs them, or None if there is nothing in them for it."""
    parts = [page for page in pages if page.entries and message_id in (None, page.entries[0].message_id)]
    if not parts:
        return None
    page = parts[0]
    first = page.entries[0]
    if skip and isinstance(first, StoredChunk):
        rest = msgspec.structs.replace(first, content=first.content.encode()[skip:].decode())
        parts[0] = Page(page.generation, page.last_seq, [rest, *page.entries[1:]])
    return Page.joined(parts)


@contextlib.contextmanager
def logged_problems(task: str) -> Iterator[None]:
    """A periodic task goes on after an error, since its cause may go away."""
    try:
        yield
    except Problem as error:
        if isinstance(error, Stopping):
            return
        log.warning("%s failed, and will be tried again: %s", task, error)


def checked_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{name}={value} is out of range; it goes from {low:g} to {high:g}.")


# ---------------------------------------------------------------------------------------------
# The wire formats
# ---------------------------------------------------------------------------------------------

encode_json = msgspec.json.Encoder().encode
UNDECODABLE = (msgspec.DecodeError, UnicodeError, RecursionError)  # the last for arrays in arrays in arrays …

RETRY = b"retry: 1000\n"
HEARTBEAT = b": hb\n"  # with no blank line after it: some clients dispatch an empty event for one
SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def sse_event(event: str, data: bytes = b"{}") -> bytes:
    """A frame with no id. Browsers do not dispatch an event without data (HTML, 9.2.6)."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), data)


def sse_frames(page: Page) -> list[bytes]:
    """The page's entries as server-sent events (HTML, 9.2), in one piece.

    LF line ends, and data on one line, as a line end inside JSON is always escaped.
    """
    generation = page.generation
    names: dict[str, bytes] = {}
    frames = []
    for entry in page.entries:
        if isinstance(entry, MessageEnd):
            frames.append(b"id: %d-%d\nevent: complete\ndata: %s\n\n" % (generation, entry.seq, encode_json(entry)))
            continue
        if (name := names.get(entry.message_id)) is None:
            name = names[entry.message_id] = encode_json(entry.message_id)
        event = b"" if entry.event is None else b"event: %s\n" % entry.event.encode()
        frames.append(
            b'id: %d-%d\n%sdata: {"content":%s,"timestamp":%d,"messageId":%s,"seq":%d}\n\n'
            % (generation, entry.seq, event, encode_json(entry.content), entry.timestamp, name, entry.seq)
        )
    return [b"".join(frames)]


async def sse(items: AsyncGenerator[Page | Signal, None], metrics: Metrics) -> AsyncGenerator[bytes, None]:
    """What a reader is sent. The first line goes at once, so that headers and bytes flow."""
    yield RETRY
    async with aclosing(items):
        try:
            async for item in items:
                if isinstance(item, Page):
                    frames = b"".join(item.encoded(sse_frames))
                    metrics.bytes_out.inc(len(frames))
                    yield frames
                elif item is Signal.HEARTBEAT:
                    yield HEARTBEAT
                elif item is Signal.EXPIRED:
                    raise token_expired()
                else:
                    yield sse_event(item.value)
        except Problem as problem:
            yield sse_event("error", encode_json(problem_document(problem)))


def ws_entries(page: Page) -> list[bytes]:
    """The page's entries as WebSocket messages, less their first member, the subscriber's id."""
    frames = []
    for entry in page.entries:
        kind = b"complete" if isinstance(entry, MessageEnd) else b"chunk"
        cursor = b"%d-%d" % (page.generation, entry.seq)
        frames.append(b'"type":"%s","cursor":"%s",%s' % (kind, cursor, encode_json(entry)[1:]))
    return frames


def problem_document(problem: ProblemDetailsException) -> dict[str, Any]:
    members = problem.extra if isinstance(problem.extra, dict) else {}
    return {"status": problem.status_code, "title": problem.title, "detail": problem.detail, **members}


CHUNKS = msgspec.json.Decoder(Chunk | list[Chunk])
LINES = msgspec.json.Decoder(Chunk)


def chunks_from_json(body: bytes) -> list[Chunk]:
    """A chunk, or an array of chunks. Raises InvalidContent."""
    try:
        chunks = CHUNKS.decode(body)
    except UNDECODABLE as error:
        raise invalid_json(body, error) from error
    return chunks if isinstance(chunks, list) else [chunks]


def invalid_json(text: bytes, error: Exception, where: str = "The body") -> InvalidContent:
    if not isinstance(error, msgspec.ValidationError) and re.search(rb"\\u[dD][89a-fA-F]", text):
        return InvalidContent(
            f"{where} has a lone surrogate, which is not valid Unicode; send both halves of the pair in one chunk."
        )
    return InvalidContent(f'{where} is not a chunk like {{"content": "text"}}: {error}.')


class Lines:
    """Chunks from NDJSON that arrives in pieces: one on each line, of any length up to ``max_line``."""

    def __init__(self, max_line: int) -> None:
        self._max_line = max_line
        self._rest = bytearray()
        self._whole = b""
        self._lines = 0  # those before what is whole now

    def feed(self, piece: bytes, is_last: bool) -> tuple[list[Chunk], Problem | None]:
        """The chunks of the lines that are whole now, and what is wrong with the line after them."""
        self._lines += self._whole.count(b"\n")
        cut = len(piece) if is_last else piece.rfind(b"\n") + 1
        if cut or is_last:
            self._whole = bytes(self._rest) + piece[:cut]
            self._rest = bytearray(piece[cut:])
        else:
            self._whole = b""
            self._rest += piece
        chunks, problem = self._decode()
        if problem is None and len(self._rest) > self._max_line:
            problem = TooLarge(
                f"{self.where(len(chunks))} has over {self._max_line} bytes, more than any chunk of max_chunk; send it"
                " in parts."
            )
        return chunks, problem

    def where(self, number: int) -> str:
        """The line of a chunk, by its number (from 0) among those that are whole now."""
        lines = [line for line, text in enumerate(self._whole.split(b"\n"), self._lines + 1) if text.strip()]
        after = self._lines + self._whole.count(b"\n") + 1
        return f"Line {lines[number] if number < len(lines) else after}"

    def _decode(self) -> tuple[list[Chunk], Problem | None]:
        try:
            return LINES.decode_lines(self._whole), None
        except UNDECODABLE:
            chunks: list[Chunk] = []
            for line in self._whole.split(b"\n"):
                try:
                    chunks += LINES.decode_lines(line)
                except UNDECODABLE as error:
                    return chunks, invalid_json(line, error, self.where(len(chunks)))
            raise


class Text:
    """Chunks from plain text that arrives in pieces: each becomes one, never cutting a character."""

    def __init__(self, max_chunk: int, known: str, is_whole: bool) -> None:
        self._is_whole = is_whole  # then nothing of what is known may be missing
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._max_characters = max(max_chunk // 4, 1)
        self._known = known

    def feed(self, piece: bytes, is_last: bool) -> tuple[list[Chunk], Problem | None]:
        """The chunks that are whole now, less the ``known`` text that a retry sends again."""
        try:
            text = self._decoder.decode(piece, final=is_last)
        except UnicodeDecodeError as error:
            return [], InvalidContent(f"The body is not valid UTF-8: {error.reason}.")
        known, self._known = self._known[: len(text)], self._known[len(text) :]
        if not text.startswith(known) or (is_last and self._is_whole and self._known):
            return [], Conflict("Another text is stored from this index on: another producer writes to this message.")
        text = text[len(known) :]
        step = self._max_characters
        return [Chunk(text[start : start + step]) for start in range(0, len(text), step)], None

    def where(self, number: int) -> str:
        return "The text"


# ---------------------------------------------------------------------------------------------
# The routes
# ---------------------------------------------------------------------------------------------


READ = frozenset({"read"})
WRITE = frozenset({"write"})
ABORT = frozenset({"abort", "write"})
ADMIN = frozenset({"admin"})
ANYONE = Grant()  # what everybody may do where there is no secret
SCOPES = ("read", "write", "abort", "admin")


class Claims(msgspec.Struct, frozen=True):
    """Those of a token (RFC 7519) that count here."""

    exp: float
    scope: str = ""
    threads: tuple[str, ...] | None = None


def token_for(secret: str, grant: Grant) -> str:
    claims: dict[str, Any] = {"exp": int(grant.expires), "scope": " ".join(sorted(grant.scope))}
    if grant.threads is not None:
        claims["threads"] = list(grant.threads)
    return jwt.encode(claims, secret, algorithm="HS256")


def grant_of(token: str, secret: str) -> Grant:
    """What a token allows; its signature is compared in constant time. Raises Unauthorized."""
    try:
        claims = msgspec.convert(jwt.decode(token, secret, algorithms=["HS256"], options={"require": ["exp"]}), Claims)
    except jwt.ExpiredSignatureError as error:
        raise token_expired() from error
    except (jwt.InvalidTokenError, msgspec.ValidationError) as error:
        raise Unauthorized(
            f"The token is not valid here ({error}); get one made with this service's secret."
        ) from error
    return Grant(frozenset(claims.scope.split()), claims.threads, claims.exp)


async def authorize(secret: str, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard: find out what the caller may do, and whether this call is among it.

    An EventSource and a browser's WebSocket cannot send headers, so for what only reads, and for
    a WebSocket, the token may be in the query too. Raises Unauthorized or Forbidden.
    """
    scopes = handler.opt["scopes"]
    if scopes is None:
        return
    try:
        connection.scope["auth"] = grant_for(connection, secret, scopes, bool(handler.opt.get("token_in_query")))
    except Problem as problem:
        connection.scope["refusal"] = problem  # type: ignore[typeddict-unknown-key]
        raise


def grant_for(
    connection: ASGIConnection[Any, Any, Any, Any], secret: str, scopes: AbstractSet[str], token_in_query: bool
) -> Grant:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = connection.query_params.get("access_token", "") if token_in_query else ""
    if not token:
        raise Unauthorized("This takes a token; send it as 'Authorization: Bearer …'.")
    grant = grant_of(token.strip(), secret)
    grant.require(scopes, connection.path_params.get("thread_id"))
    return grant


def guards(settings: Settings) -> list[Guard]:
    return [partial(authorize, settings.secret)] if settings.secret else []


def granted(connection: ASGIConnection[Any, Any, Any, Any]) -> Grant:
    return cast(Grant, connection.scope.get("auth", ANYONE))


class TokenBody(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    """``scope`` is words of read, write and abort; ``expires_in`` is seconds, or like ``10m``."""

    scope: str = "read"
    expires_in: float | str = 900


class Token(Record, frozen=True):
    """``expires_at`` is ms since 1970."""

    token: str
    scope: str
    thread_id: str
    expires_at: int


class AbortBody(Record, frozen=True, forbid_unknown_fields=True):
    reason: str | None = None


class ResumeBody(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    """``known_content`` or ``after``; ``poll_interval`` in seconds, or like ``100ms``."""

    thread_id: str
    message_id: str
    known_content: str | None = None
    after: str | int | None = None
    poll_interval: float | str | None = None
    idle_timeout: float | str | None = None


def seconds(name: str, value: str | float | None) -> float | None:
    """The duration, from 0 to a day, that a reader asks for."""
    if value is None:
        return None
    try:
        parsed = parse_duration(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRequest(f"{name}: {error}.") from error
    checked_range(name, parsed, 0, 86400)
    return parsed


def decode_body(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise InvalidContent(f"The body does not have the form that this call takes: {error}.") from error


async def body_pieces(request: Request[Any, Any, Any]) -> AsyncGenerator[tuple[bytes, bool], None]:
    """The body as it arrives; the flag is set with its last piece."""
    is_last = False
    while not is_last:
        event = await request.receive()
        if event["type"] != "http.request":
            raise BadRequest("The connection was closed before the body ended.")
        is_last = not event.get("more_body", False)
        yield event.get("body", b""), is_last


@contextlib.contextmanager
def answered_early() -> Iterator[None]:
    """A body that is answered before its end is not read on, so its connection cannot be kept."""
    try:
        yield
    except Problem as problem:
        problem.headers = {**(problem.headers or {}), "Connection": "close"}
        raise


async def whole_body(request: Request[Any, Any, Any], limit: int) -> bytes:
    body = bytearray()
    with answered_early():
        async for piece, _ in body_pieces(request):
            body += piece
            if len(body) > limit:
                raise TooLarge(f"The body has over {limit} bytes; send it in parts, or stream it as NDJSON.")
    return bytes(body)


def appended_response(commit: Commit) -> Response[Appended]:
    return Response(cast(Appended, commit.answer), status_code=201 if commit.changed else 200)


def sse_response(buffer: ChunkBuffer, items: AsyncGenerator[Page | Signal, None]) -> Stream:
    return Stream(sse(items, buffer.metrics), headers=SSE_HEADERS, media_type="text/event-stream", status_code=200)


Buffer = NamedDependency[ChunkBuffer]
THREAD = "/threads/{thread_id:str}"
MESSAGE = f"{THREAD}/messages/{{message_id:str}}"
ThreadId = Annotated[str, PathParameter(description="1 to 200 characters, no control characters, no /")]
MessageId = Annotated[str, PathParameter(description="1 to 200 characters, no control characters, no /")]
ListCursor = Annotated[str | None, QueryParameter(name="cursor", description="as the page before gave it")]
After = Annotated[str | None, QueryParameter(name="after", description="a cursor as a stream gave it, or a bare seq")]


BODY_SCHEMAS, BODY_COMPONENTS = msgspec.json.schema_components(
    (Chunk | list[Chunk], AbortBody, ResumeBody, TokenBody), ref_template="#/components/schemas/{name}"
)
STREAMED = {"type": "string", "format": "binary"}


def body_of(schema: Any, required: bool, *streamed: str) -> RequestBody:
    content = {"application/json": schema, **dict.fromkeys(streamed, STREAMED)}
    return RequestBody({kind: OpenAPIMediaType(schema=schema) for kind, schema in content.items()}, required=required)


# These read their bodies themselves, so the OpenAPI document is told of them here.


@dataclass
class TakesChunks(OpenAPIOperation):
    def __post_init__(self) -> None:
        self.request_body = body_of(BODY_SCHEMAS[0], True, "application/x-ndjson", "text/plain")


@dataclass
class TakesReason(OpenAPIOperation):
    def __post_init__(self) -> None:
        self.request_body = body_of(BODY_SCHEMAS[1], False)


@dataclass
class TakesKnownContent(OpenAPIOperation):
    def __post_init__(self) -> None:
        self.request_body = body_of(BODY_SCHEMAS[2], True)


@dataclass
class TakesScope(OpenAPIOperation):
    def __post_init__(self) -> None:
        self.request_body = body_of(BODY_SCHEMAS[3], False)


@put(MESSAGE, summary="Open a message before its first chunk", scopes=WRITE)
async def open_message(buffer: Buffer, thread_id: ThreadId, message_id: MessageId) -> Response[Appended]:
    appended, is_new = await buffer.open_message(thread_id, message_id)
    return Response(appended, status_code=201 if is_new else 200)


@post(MESSAGE + "/chunks", summary="Append chunks", scopes=WRITE, operation_class=TakesChunks)
async def append_chunks(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    message_id: MessageId,
    index: FromQuery[int | None] = None,
    complete: FromQuery[bool] = False,
) -> Response[Appended]:
    """Answered after the commit. JSON: a chunk, or an array of chunks, all or nothing. NDJSON: a
    chunk a line, committed and readable as the lines arrive. Plain text: likewise, a chunk a piece."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("The body is compressed; send it as it is.")
    kind, parameters = request.content_type
    if kind == "application/json":
        await buffer.room()
        chunks = chunks_from_json(await whole_body(request, buffer.settings.max_body))
        append = buffer.checked_append(thread_id, message_id, chunks, index=index, complete=complete)
        return appended_response(await buffer.submit_append(append))
    begin = buffer.checked_append(thread_id, message_id, [], index=index)
    decoder: Lines | Text
    if kind == "application/x-ndjson":
        decoder = Lines(6 * buffer.settings.max_chunk + 1024)  # JSON takes up to six bytes for one
    elif kind == "text/plain" and parameters.get("charset", "utf-8").lower() in ("utf-8", "us-ascii"):
        known, index = await buffer.stored_text(thread_id, message_id, index)
        begin = msgspec.structs.replace(begin, index=index)
        decoder = Text(buffer.settings.max_chunk, known, is_whole=complete)
    else:
        raise UnsupportedMediaType(
            f"{request.headers.get('content-type', 'no content type')!r:.80} cannot be appended; send"
            " application/json, application/x-ndjson, or text/plain in UTF-8."
        )
    with answered_early():
        commit = await append_stream(buffer, begin, body_pieces(request), decoder, complete, granted(request).expires)
    return appended_response(commit)


async def append_stream(
    buffer: ChunkBuffer,
    begin: Append,
    pieces: AsyncGenerator[tuple[bytes, bool], None],
    decoder: Lines | Text,
    complete: bool,
    expires: float,
) -> Commit:
    """Commit what each piece of the body brings before reading the next.

    While it is being committed nothing more is read, so that the connection's flow control slows
    a producer that is too fast. Cut short with a Problem when somebody else ends the message.
    """
    append, last, changed = begin, None, False
    async with buffer.while_active(begin.thread_id, begin.message_id, expires) as lift, aclosing(pieces):
        async for piece, is_last in pieces:
            chunks, problem = decoder.feed(piece, is_last)
            sizes, refusal = buffer.checked_sizes(chunks)
            if refusal is not None:
                refusal.detail = f"{decoder.where(len(sizes))} is refused: {refusal.detail}"
                chunks, problem = chunks[: len(sizes)], refusal
            ends = complete and is_last and problem is None
            if chunks or (is_last and problem is None and (ends or last is None)):
                if ends:
                    lift()
                append = buffer.checked_append(
                    begin.thread_id,
                    begin.message_id,
                    chunks,
                    index=append.index,
                    complete=ends,
                    thread=last.thread if last else None,
                )
                last = await buffer.submit_append(append)
                changed = changed or last.changed
                if append.index is not None:
                    append = msgspec.structs.replace(append, index=append.index + len(chunks))
            if problem is not None:
                raise problem
    return msgspec.structs.replace(cast(Commit, last), changed=changed)


@post(MESSAGE + "/complete", status_code=200, summary="Complete a message", scopes=WRITE)
async def complete_message(buffer: Buffer, thread_id: ThreadId, message_id: MessageId) -> Appended:
    return await buffer.complete_message(thread_id, message_id)


@post(MESSAGE + "/abort", status_code=200, summary="Abort a message", scopes=ABORT, operation_class=TakesReason)
async def abort_message(
    request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId, message_id: MessageId
) -> Appended:
    """From either side; the body is `{"reason": "…"}`, or nothing."""
    body = await whole_body(request, buffer.settings.max_body)
    reason = decode_body(body, AbortBody).reason if body else None
    return await buffer.abort_message(thread_id, message_id, reason)


@get(THREAD + "/stream", summary="Follow a thread (SSE)", scopes=READ, token_in_query=True)
async def stream_thread(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    after: After = None,
    follow: FromQuery[bool] = False,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
) -> Response[Any]:
    return await stream(request, buffer, thread_id, None, after, follow, idle_timeout, poll_interval)


@get(MESSAGE + "/stream", summary="Follow a message (SSE)", scopes=READ, token_in_query=True)
async def stream_message(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    message_id: MessageId,
    after: After = None,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
) -> Response[Any]:
    return await stream(request, buffer, thread_id, message_id, after, False, idle_timeout, poll_interval)


async def stream(
    request: Request[Any, Any, Any],
    buffer: ChunkBuffer,
    thread_id: str,
    message_id: str | None,
    after: str | None,
    follow: bool,
    idle_timeout: str | None,
    poll_interval: str | None,
) -> Response[Any]:
    """From Last-Event-ID (which a browser sends when it reconnects), from ``after``, or the start.

    204 where nothing more will come, which tells an EventSource to stop reconnecting (HTML, 9.2.3).
    """
    quiet, poll = seconds("idle_timeout", idle_timeout), seconds("poll_interval", poll_interval)
    cursor = request.headers.get("last-event-id") or after
    position = await buffer.locate(thread_id, message_id, after=cursor, follow=follow)
    if position.finished:
        return Response(None, status_code=204)
    return sse_response(
        buffer,
        buffer.follow(
            position, follow=follow, idle_timeout=quiet, poll_interval=poll, expires=granted(request).expires
        ),
    )


@post(
    "/resume-stream",
    status_code=200,
    summary="Resume a message by the text one has (SSE)",
    scopes=READ,
    token_in_query=True,
    operation_class=TakesKnownContent,
)
async def resume_stream(request: Request[Any, Any, Any], buffer: Buffer) -> Response[Any]:
    body = decode_body(await whole_body(request, buffer.settings.max_body), ResumeBody)
    if body.known_content is not None and body.after is not None:
        raise BadRequest("known_content and after exclude each other; send the one that you have.")
    quiet, poll = seconds("idle_timeout", body.idle_timeout), seconds("poll_interval", body.poll_interval)
    granted(request).require(READ, body.thread_id)
    try:
        if body.known_content is not None:
            position = await buffer.match(body.thread_id, body.message_id, body.known_content)
        else:
            cursor = None if body.after is None else str(body.after)
            position = await buffer.locate(body.thread_id, body.message_id, after=cursor)
    except NotFound:
        return Stream([RETRY, sse_event("complete", b'{"exists":false}')], headers=SSE_HEADERS, status_code=200)
    if position.finished:
        return Response(None, status_code=204)
    items = buffer.follow(position, idle_timeout=quiet, poll_interval=poll, expires=granted(request).expires)
    return sse_response(buffer, items)


@get(THREAD + "/chunks", summary="Read chunks by pages, or by a long poll", scopes=READ, token_in_query=True)
async def get_chunks(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    after: After = None,
    message_id: FromQuery[str | None] = None,
    limit: FromQuery[int] = PAGE_ROWS,
    wait: FromQuery[float] = 0,
) -> ChunkPage:
    expires = granted(request).expires
    return await buffer.get_chunks(thread_id, message_id, after=after, limit=limit, wait=wait, expires=expires)


@get(THREAD + "/content", summary="The text so far", scopes=READ, token_in_query=True)
async def get_accumulated_content(
    request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId, message_id: FromQuery[str | None] = None
) -> Response[Any]:
    content = await buffer.get_accumulated_content(thread_id, message_id)
    if request.accept.best_match(["application/json", "text/plain"]) == "text/plain":
        return Response(content.content, media_type=MediaType.TEXT)
    return Response(content)


@get(THREAD, summary="A thread and its messages", scopes=READ, token_in_query=True)
async def get_thread_status(buffer: Buffer, thread_id: ThreadId) -> ThreadStatus:
    return await buffer.get_thread_status(thread_id)


@get("/threads", summary="Threads, the newest first", scopes=READ, token_in_query=True)
async def get_threads(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    status: FromQuery[Status | None] = None,
    limit: FromQuery[int] = 100,
    list_cursor: ListCursor = None,
) -> ThreadPage:
    return await buffer.get_threads(status, limit, list_cursor, granted(request).covers)


@delete(THREAD, summary="Forget a thread, and erase its text", scopes=ADMIN)
async def clear_thread_buffer(buffer: Buffer, thread_id: ThreadId) -> None:
    await buffer.clear_thread_buffer(thread_id)


@post(THREAD + "/tokens", summary="Mint a short-lived token for a browser", scopes=WRITE, operation_class=TakesScope)
async def mint_token(request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId) -> Token:
    """For this thread alone, and no wider than one's own; for up to a day."""
    body = await whole_body(request, buffer.settings.max_body)
    wanted = decode_body(body, TokenBody) if body else TokenBody()
    own = granted(request)
    if not buffer.settings.secret:
        raise BadRequest("Authentication is off, so there are no tokens; start the service with a secret.")
    if checked_id("thread_id", thread_id).endswith("*"):
        raise BadRequest("A thread whose id ends in '*' cannot have a token of its own, as that would be a pattern.")
    scope = frozenset(wanted.scope.split())
    if not scope or not scope <= set(SCOPES):
        raise InvalidContent(f"{wanted.scope!r:.80} is not a scope; use words of {', '.join(SCOPES)}.")
    if not ("admin" in own.scope or scope <= own.scope | ({"abort"} if "write" in own.scope else set())):
        raise Forbidden("A token cannot allow more than the one it is made with; ask for less.")
    lifetime = cast(float, seconds("expires_in", wanted.expires_in))
    grant = Grant(scope, (thread_id,), min(time.time() + lifetime, own.expires))
    token = token_for(buffer.settings.secret, grant)
    return Token(token, " ".join(sorted(scope)), thread_id, int(grant.expires) * 1000)


UNREAD_ANSWERS = 32  # of appends on one WebSocket, past which it is not read on


class Subscribe(Record, frozen=True, rename=None, tag="subscribe", forbid_unknown_fields=True):
    id: str | int
    thread_id: str
    message_id: str | None = None
    after: str | int | None = None
    known_content: str | None = None
    follow: bool = False
    idle_timeout: float | str | None = None
    poll_interval: float | str | None = None


class Unsubscribe(Record, frozen=True, rename=None, tag="unsubscribe", forbid_unknown_fields=True):
    id: str | int


class AppendFrame(Record, frozen=True, rename=None, tag="append", forbid_unknown_fields=True):
    id: str | int
    thread_id: str
    message_id: str
    chunks: list[Chunk]
    index: int | None = None
    complete: bool = False


class AbortFrame(Record, frozen=True, rename=None, tag="abort", forbid_unknown_fields=True):
    id: str | int
    thread_id: str
    message_id: str
    reason: str | None = None


FRAMES = msgspec.json.Decoder(Subscribe | Unsubscribe | AppendFrame | AbortFrame)


class Conversation:
    """One WebSocket: many subscriptions, each a reader of its own, and appends in their order."""

    def __init__(self, socket: WebSocket[Any, Any, Any], buffer: ChunkBuffer) -> None:
        self._socket = socket
        self._buffer = buffer
        self._grant = granted(socket)
        self._subscriptions: dict[str | int, asyncio.Task[None]] = {}
        self._appends: set[asyncio.Task[None]] = set()
        self._closed = False

    async def hold(self) -> None:
        try:
            while True:
                await self._take(await self._socket.receive_data("text"))
        except WebSocketDisconnect:
            log.debug("WebSocket closed")
        finally:
            self._closed = True
            for task in self._subscriptions.values():
                task.cancel()

    async def _take(self, text: str | bytes) -> None:
        # Not read on while too much is waiting to be committed or told, so that the producer is slowed.
        identity: str | int | None = None
        try:
            await self._buffer.room()
            if len(self._appends) >= UNREAD_ANSWERS:
                await asyncio.wait(self._appends, return_when=asyncio.FIRST_COMPLETED)
            frame = decode_frame(text)
            identity = frame.id
            match frame:
                case Subscribe():
                    self._subscribe(frame)
                case Unsubscribe():
                    await self._unsubscribe(frame)
                case AppendFrame():
                    self._append(frame)
                case AbortFrame():
                    self._grant.require(ABORT, frame.thread_id)
                    answer = await self._buffer.abort_message(frame.thread_id, frame.message_id, frame.reason)
                    await self._send("aborted", frame.id, answer)
        except Problem as problem:
            await self._send("error", identity or identity_of(text), problem_document(problem))

    def _subscribe(self, frame: Subscribe) -> None:
        self._grant.require(READ, frame.thread_id)
        if frame.id in self._subscriptions:
            raise Conflict(f"The id {frame.id!r} has a subscription already; unsubscribe it, or use another id.")
        if frame.known_content is not None and (frame.message_id is None or frame.after is not None):
            raise BadRequest("known_content goes with a message_id, and not with after.")
        self._subscriptions[frame.id] = asyncio.create_task(self._follow(frame))

    async def _unsubscribe(self, frame: Unsubscribe) -> None:
        if (task := self._subscriptions.pop(frame.id, None)) is None:
            raise NotFound(f"There is no subscription with the id {frame.id!r}.")
        task.cancel()
        await asyncio.wait([task])
        await self._send("unsubscribed", frame.id)

    def _append(self, frame: AppendFrame) -> None:
        self._grant.require(WRITE, frame.thread_id)
        append = self._buffer.checked_append(
            frame.thread_id, frame.message_id, frame.chunks, index=frame.index, complete=frame.complete
        )
        task = asyncio.create_task(self._acknowledge(frame.id, self._buffer.queue_append(append)))
        self._appends.add(task)
        task.add_done_callback(self._appends.discard)

    async def _acknowledge(self, identity: str | int, committing: asyncio.Future[Commit]) -> None:
        try:
            answer = (await committing).answer
            del committing  # and with it what was appended, as its producer may be slow to read this
            await self._send("appended", identity, answer)
        except Problem as problem:
            await self._send("error", identity, problem_document(problem))

    async def _follow(self, frame: Subscribe) -> None:
        try:
            await self._deliver(frame)
        except Problem as problem:
            await self._send("error", frame.id, problem_document(problem))
        del self._subscriptions[frame.id]
        if not self._buffer.stopping:  # then the client is to come back, and go on
            await self._send("unsubscribed", frame.id)

    async def _deliver(self, frame: Subscribe) -> None:
        if frame.known_content is not None:
            position = await self._buffer.match(frame.thread_id, cast(str, frame.message_id), frame.known_content)
        else:
            after = None if frame.after is None else str(frame.after)
            position = await self._buffer.locate(frame.thread_id, frame.message_id, after=after, follow=frame.follow)
        if position.finished:
            return
        items = self._buffer.follow(
            position,
            follow=frame.follow,
            heartbeat=0,  # WebSocket has pings
            idle_timeout=seconds("idle_timeout", frame.idle_timeout),
            poll_interval=seconds("poll_interval", frame.poll_interval),
            expires=self._grant.expires,
        )
        start = b'{"id":%s,' % encode_json(frame.id)
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Page):
                    for rest in item.encoded(ws_entries):
                        self._buffer.metrics.bytes_out.inc(len(rest))
                        await self._send_text(start + rest)
                elif item is Signal.EXPIRED:
                    raise token_expired()
                else:
                    await self._send(item.value, frame.id)

    async def _send(self, kind: str, identity: str | int | None, payload: Any = None) -> None:
        members = msgspec.to_builtins(payload) if payload is not None else {}
        await self._send_text(encode_json({**members, "type": kind, "id": identity}))

    async def _send_text(self, text: bytes) -> None:
        """Waits while the reader is slow, which holds up nobody else."""
        if not self._closed:
            try:
                await self._socket.send_text(text.decode())
            except OSError:  # how uvicorn tells that the connection is lost
                self._closed = True


def identity_of(text: str | bytes) -> str | int | None:
    """The id of a frame, if it has one, however wrong the rest is."""
    with contextlib.suppress(ValueError, RecursionError):  # of the standard library, as it takes lone surrogates
        frame = json.loads(text)
        if isinstance(frame, dict) and isinstance(identity := frame.get("id"), (str, int)):
            return identity.encode(errors="replace").decode() if isinstance(identity, str) else identity
    return None


def decode_frame(text: str | bytes) -> Subscribe | Unsubscribe | AppendFrame | AbortFrame:
    """Raises InvalidContent."""
    try:
        return cast(Subscribe | Unsubscribe | AppendFrame | AbortFrame, FRAMES.decode(text))
    except UNDECODABLE as error:
        raise InvalidContent(
            f"This is not a frame ({error}); send subscribe, unsubscribe, append or abort, each with an id."
        ) from error


@websocket("/ws", scopes=frozenset(SCOPES), token_in_query=True)
async def converse(socket: WebSocket[Any, Any, Any], buffer: Buffer) -> None:
    await socket.accept()
    await Conversation(socket, buffer).hold()


# ---------------------------------------------------------------------------------------------
# The app
# ---------------------------------------------------------------------------------------------


def answer_problem(request: Request[Any, Any, Any], problem: ProblemDetailsException) -> Response[Any]:
    return Response(
        problem_document(problem),
        media_type="application/problem+json",
        status_code=problem.status_code,
        headers=problem.headers,
    )


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """What Litestar itself refuses, in the same form."""
    detail = error.detail
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        detail = "; ".join(f"{item.get('key', 'body')}: {item['message']}" for item in error.extra) + "."
    problem = Problem(detail or HTTPStatus(error.status_code).phrase)
    problem.status_code, problem.title = error.status_code, HTTPStatus(error.status_code).phrase
    problem.headers = error.headers
    return answer_problem(request, problem)


ERROR_ANSWERS: ExceptionHandlersMap = {ProblemDetailsException: answer_problem, HTTPException: answer_http_error}


def router(buffer: ChunkBuffer, path: str = "/api") -> Router:
    """The routes, for one's own Litestar app, which also has to enter the buffer::

        buffer = ChunkBuffer(Settings(db="answers.db"))
        app = Litestar([router(buffer)], lifespan=[buffer])

    On shutdown call ``buffer.stop()`` as early as you can: a server waits for open streams first.
    """
    return Router(
        path,
        route_handlers=[
            open_message,
            append_chunks,
            complete_message,
            abort_message,
            stream_thread,
            stream_message,
            resume_stream,
            get_chunks,
            get_accumulated_content,
            get_thread_status,
            get_threads,
            clear_thread_buffer,
            mint_token,
            converse,
        ],
        guards=guards(buffer.settings),
        dependencies={"buffer": Provide(lambda: buffer, use_cache=True, sync_to_thread=False)},
        exception_handlers=ERROR_ANSWERS,
    )


@get("/health/live", summary="The process answers")
async def live() -> dict[str, str]:
    return {"status": "ok"}


@get("/health/ready", summary="The database answers and takes writes", scopes=None)
async def ready(buffer: Buffer) -> dict[str, str]:
    await buffer.check_ready()
    return {"status": "ok"}


@get("/metrics", summary="For Prometheus", media_type=MediaType.TEXT, scopes=ADMIN)
async def metrics(buffer: Buffer) -> Response[bytes]:
    return Response(await buffer.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@get("/", include_in_schema=False, media_type=MediaType.HTML)
async def page() -> Response[bytes]:
    return with_page_headers(Response((STATIC / "index.html").read_bytes(), media_type=MediaType.HTML))


STATIC = Path(__file__).with_name("static")
SWAGGER = Path(cast(ModuleSpec, find_spec("swagger_ui")).origin or "").with_name("static")
SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "swagger-ui-standalone-preset.js")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def with_page_headers(response: Response[Any]) -> Response[Any]:
    """Asked for again each time, as a new version of the service has new files under the same names."""
    response.headers.update(PAGE_HEADERS)
    return response


@get("/schema/assets/{name:str}", include_in_schema=False)
async def swagger_file(name: FromPath[str]) -> File:
    if name not in SWAGGER_FILES:
        raise NotFound(f"There is no file {name!r}.")
    return File(SWAGGER / name, filename=name, content_disposition_type="inline")


request_id: ContextVar[str] = ContextVar("request_id", default="-")
RUN = secrets.token_hex(4)
REQUESTS = itertools.count(1)


class Gate:
    """Who may connect at all, and what is logged of them.

    A page of another origin must not reach a service that trusts whoever is on the same machine,
    neither directly nor by a name of its own that resolves to loopback: without a secret ``Host``
    has to be a loopback name, and a foreign ``Origin`` has to be among ``cors_origins``.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._any_host = bool(settings.secret or settings.uds) or not is_loopback(settings.host)
        self._origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        self._admit(scope)
        await self._app(
            scope, receive, denied(scope, send) if scope["type"] == ScopeType.WEBSOCKET else logged(scope, send)
        )

    def _admit(self, scope: Scope) -> None:
        found: dict[bytes, list[str]] = {b"x-request-id": [], b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name in found:
                found[name].append(value.decode("latin-1"))
        request_id.set("".join(found[b"x-request-id"])[:64] or f"{RUN}-{next(REQUESTS):x}")
        if refusal := self._refusal(found[b"host"] or [""], found[b"origin"]):
            log.warning("refused: %s", refusal.detail)
            raise refusal
        if "\ufffd" in scope["path"] and not is_utf8(unquote_to_bytes(scope.get("raw_path", b""))):
            raise BadRequest("The path is not valid UTF-8; percent-encode ids as UTF-8.")

    def _refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> Forbidden | None:
        if not self._any_host and not (len(hosts) == 1 and is_loopback_host(hosts[0])):
            return Forbidden(f"{hosts!r:.80} is not a loopback name; set a secret to serve others than this machine.")
        if all(origin in self._origins or origin.partition("://")[2] == hosts[0] for origin in origins):
            return None
        return Forbidden(f"Pages of the origin {origins!r:.80} may not connect; name it in cors_origins.")


def logged(scope: Scope, send: Send) -> Send:
    """Write a line when the answer begins, except of appends that went well, which are too many.

    Without the query, which may hold a token.
    """
    began = time.perf_counter()

    async def send_logged(message: Message) -> None:
        try:
            await send(message)
        except RuntimeError as error:
            if "closed" not in str(error):
                raise
            log.debug("the client is gone: %s", error)  # uvloop's way to say so
        if message["type"] == "http.response.start":
            status, path = message["status"], scope["path"]
            if status >= 400 or not path.endswith("/chunks"):
                took = round((time.perf_counter() - began) * 1000, 1)
                log.info("%s %s %d %s ms", cast(Any, scope)["method"], quote(path), status, took)

    return send_logged


def denied(scope: Scope, send: Send) -> Send:
    """Answer a WebSocket that is refused before it is accepted with the problem, where it can be."""
    can_answer = "websocket.http.response" in (cast(Any, scope).get("extensions") or {})
    is_accepted = False

    async def send_denied(message: Message) -> None:
        nonlocal is_accepted
        is_accepted = is_accepted or message["type"] == "websocket.accept"
        if is_accepted or not can_answer or message["type"] != "websocket.close":
            await send(message)
            return
        problem: Problem = cast(Any, scope).get("refusal") or Unavailable("The service cannot answer; try again.")
        headers = [(b"content-type", b"application/problem+json")]
        headers += [(name.lower().encode(), value.encode()) for name, value in (problem.headers or {}).items()]
        start = {"type": "websocket.http.response.start", "status": problem.status_code, "headers": headers}
        await send(cast(Message, start))
        body = encode_json(problem_document(problem))
        await send(cast(Message, {"type": "websocket.http.response.body", "body": body}))

    return send_denied


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^][:@/\s]+))(?::[0-9]{1,5})?")  # RFC 9110, 7.2


@lru_cache(maxsize=256)
def is_loopback_host(header: str) -> bool:
    """Whether a Host header names this machine."""
    match = HOST.fullmatch(header)
    return match is not None and is_loopback(match[1] or match[2])


def is_loopback(name: str) -> bool:
    """Whether what listens on this name can be reached from this machine only."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def create_app(settings: Settings | None = None) -> Litestar:
    """The service as an ASGI app that opens its own database."""
    buffer = ChunkBuffer(settings)
    return app_of(buffer, lifespan=[buffer])


def app_of(buffer: ChunkBuffer, lifespan: Sequence[AbstractAsyncContextManager[Any]] = ()) -> Litestar:
    settings = buffer.settings
    operations = Router(
        "/",
        route_handlers=[metrics, ready],
        guards=guards(settings),
        dependencies={"buffer": Provide(lambda: buffer, use_cache=True, sync_to_thread=False)},
    )
    pages = create_static_files_router("/static", [STATIC], after_request=with_page_headers)
    return Litestar(
        [router(buffer), operations, live, page, pages, swagger_file],
        lifespan=list(lifespan),
        middleware=[DefineMiddleware(Gate, settings=settings)],
        cors_config=CORSConfig(allow_origins=list(settings.cors_origins)) if settings.cors_origins else None,
        openapi_config=OpenAPIConfig(
            title="resume-stream",
            version=__version__,
            components=Components(
                schemas=cast(Any, BODY_COMPONENTS),
                security_schemes={"bearerAuth": SecurityScheme(type="http", scheme="bearer", bearer_format="JWT")},
            ),
            security=[{"bearerAuth": []}],
            render_plugins=[
                SwaggerRenderPlugin(
                    path="/swagger",
                    css_url=f"/schema/assets/{SWAGGER_FILES[0]}",
                    js_url=f"/schema/assets/{SWAGGER_FILES[1]}",
                    standalone_preset_js_url=f"/schema/assets/{SWAGGER_FILES[2]}",
                    favicon='<link rel="icon" href="data:,">',
                )
            ],
        ),
        exception_handlers=ERROR_ANSWERS,
        logging_config=None,
    )


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

SECRET_BYTES = 32
STUCK_AFTER = 0.2  # seconds after which a connection whose reader does not read is cut on shutdown


class JSONFormatter(logging.Formatter):
    """A line of JSON for each record, for machines to read."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": int(record.created * 1000),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "request": request_id.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return encode_json(line).decode()


def set_up_logging(log_format: str) -> None:
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s") if console else JSONFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # uvicorn's own lines of WebSockets have the query in them, which may hold a token.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class Server(uvicorn.Server):
    """uvicorn, which ends streams as soon as it is told to stop, and then exits with 0."""

    def __init__(self, config: uvicorn.Config, buffer: ChunkBuffer) -> None:
        super().__init__(config)
        self._buffer = buffer
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        addresses = [listener.getsockname() for server in self.servers for listener in server.sockets]
        where = ", ".join(a if isinstance(a, str) else url_of(*a[:2]) for a in addresses)
        print(start_line(self._buffer.settings, where), flush=True)
        notify_systemd("READY=1")
        if interval := int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6:
            self._feed_watchdog(interval / 2)

    def _feed_watchdog(self, every: float) -> None:
        notify_systemd("WATCHDOG=1")
        self._loop.call_later(every, self._feed_watchdog, every)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._buffer.stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        notify_systemd("STOPPING=1")
        self._loop.call_later(STUCK_AFTER, self._cut_stuck_connections)
        await super().shutdown(sockets)

    def _cut_stuck_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def notify_systemd(state: str) -> None:
    """Tell systemd, where it has asked to be told (sd_notify(3)); ``@`` begins an abstract name."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0.1)  # the loop does not wait for a systemd that does not read
            try:
                sender.sendto(state.encode(), re.sub("^@", "\0", address))
            except OSError as error:
                log.warning("cannot tell systemd %s: %s", state, error)


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start_line(settings: Settings, where: str) -> str:
    if settings.secret:
        who = "whoever has a token"
    elif settings.allow_anonymous:
        who = "anyone who can connect"
    else:
        who = "this machine only"
    return (
        f"resume-stream {__version__} on {where}, SQLite {sqlite3.sqlite_version}, database {settings.db}"
        f" (synchronous={settings.synchronous}, ttl={settings.ttl:g}s, max_message={settings.max_message},"
        f" max_db={settings.max_db or 'none'}, max_readers={settings.max_readers}), open to {who}"
    )


def listening(settings: Settings) -> list[socket.socket] | None:
    """None where uvicorn makes the Unix socket. Raises StartupError."""
    if settings.uds:
        return None
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return [socket.create_server((settings.host, settings.port), family=family, backlog=2048)]
    except (OSError, OverflowError) as error:
        raise StartupError(f"cannot listen on {url_of(settings.host, settings.port)}: {error}") from error


async def serve(settings: Settings) -> None:
    if not (settings.secret or settings.allow_anonymous or settings.uds or is_loopback(settings.host)):
        raise StartupError(
            f"{settings.host} can be reached from other machines; set a secret, or say --allow-anonymous"
        )
    if 0 < len(settings.secret.encode()) < SECRET_BYTES:
        log.warning("the secret is shorter than the %d bytes that RFC 7518 (3.2) asks for", SECRET_BYTES)
        warnings.simplefilter("ignore", InsecureKeyLengthWarning)
    async with ChunkBuffer(settings) as buffer:
        config = uvicorn.Config(
            app_of(buffer),
            uds=settings.uds or None,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws_max_size=settings.max_body,
        )
        await Server(config, buffer).serve(listening(settings))


def settings_from(environment: Mapping[str, str], flags: Mapping[str, str]) -> Settings:
    """Raises StartupError."""
    values = {}
    for name in SETTING_TYPES:
        variable = f"RESUME_STREAM_{name.upper()}"
        flag = f"--{name.replace('_', '-')}"
        if name in flags:
            source, text = flag, flags[name]
        elif variable in environment:
            source, text = variable, environment[variable]
        else:
            continue
        try:
            values[name] = parse_setting(name, text)
        except ValueError as error:
            raise StartupError(f"{source}: {error}") from error
    return Settings(**values)


def make_token(settings: Settings, scope: str, threads: Sequence[str], expires_in: str) -> None:
    """Print a token. Raises StartupError."""
    words = frozenset(scope.split())
    if not settings.secret:
        raise StartupError("a token is made with a secret; set RESUME_STREAM_SECRET, or say --secret")
    if not words or not words <= set(SCOPES):
        raise StartupError(f"--scope: {scope!r} is not a scope; use words of {', '.join(SCOPES)}")
    try:
        expires = time.time() + parse_duration(expires_in)
    except ValueError as error:
        raise StartupError(f"--expires-in: {error}") from error
    warnings.simplefilter("ignore", InsecureKeyLengthWarning)
    print(token_for(settings.secret, Grant(words, tuple(threads) or None, expires)))


@contextlib.contextmanager
def opened_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """One snapshot of the database, while the service may run. Raises StartupError."""
    if not path.exists():
        raise StartupError(f"there is no {path}")
    try:
        with contextlib.closing(
            sqlite3.connect(database_uri(path, "ro"), uri=True, isolation_level=None)
        ) as connection:
            connection.execute("begin")
            if connection.execute("pragma application_id").fetchone() != (APPLICATION_ID,):
                raise StartupError(f"{path} is not a database of resume-stream")
            yield connection
    except sqlite3.Error as error:
        raise StartupError(f"{path} is damaged, or cannot be read ({error})") from error


def check(path: Path) -> None:
    """Say what the database holds, and whether it is sound. Raises StartupError if it is not."""
    with opened_read_only(path) as connection:
        faults = [text for (text,) in connection.execute("pragma integrity_check") if text != "ok"]
        faults += [
            f"thread {thread_id!r} has {count} places in its sequence, and the last one is {last_seq}"
            for thread_id, last_seq, count in connection.execute(
                "select thread_id, last_seq,"
                " (select count(*) from chunks where chunks.thread = threads.thread) as count from threads"
                " where thread_id is not null and count <> last_seq"
            )
        ]
        faults += [
            f"message {message_id!r} says {chunk_count} chunks and has {count}"
            for message_id, chunk_count, count in connection.execute(
                "select message_id, chunk_count, (select count(*) from chunks where chunks.thread = messages.thread"
                " and chunks.message = messages.message and content is not null) as count from messages"
                " join threads using (thread) where thread_id is not null and count <> chunk_count"
            )
        ]
        for status, threads, messages, chunks, size in connection.execute(
            "select status, count(*), sum(message_count), sum(chunk_count), sum(size) from thread_summary"
            " group by status order by status"
        ):
            print(f"{status}: {threads} threads, {messages} messages, {chunks} chunks, {size} bytes of text")
    if faults:
        raise StartupError(f"{path} is not sound: {'; '.join(faults)}")
    print(f"{path} is sound")


def backup(path: Path, target: Path) -> None:
    """Copy the database, as it is at this moment, while the service runs. Raises StartupError."""
    partial_copy = target.with_name(f"{target.name}.partial")
    if target.exists() or partial_copy.exists():
        raise StartupError(f"{target} (or its .partial) exists, and would be overwritten; name another file")

    def progress(status: int, remaining: int, total: int) -> None:
        print(f"\r{total - remaining} of {total} pages", end="", file=sys.stderr, flush=True)

    with opened_read_only(path) as source:
        source.execute("select * from clock").fetchone()  # the snapshot begins with the first read
        try:
            with contextlib.closing(sqlite3.connect(partial_copy)) as copy:
                source.backup(copy, pages=1000, progress=progress)
            os.link(partial_copy, target)  # which, unlike a rename, never overwrites
        except (sqlite3.Error, OSError) as error:
            raise StartupError(f"{target} cannot be written ({error})") from error
        finally:
            partial_copy.unlink(missing_ok=True)
    print(f"\n{target} is a copy of {path}", file=sys.stderr)


def healthcheck(settings: Settings) -> None:
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


def connection_to(settings: Settings) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=2 * BUSY_TIMEOUT)
    if settings.uds:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(2 * BUSY_TIMEOUT)
        connection.sock.connect(settings.uds)
    return connection


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("resume-stream", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str, *setting_names: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, argument_default=argparse.SUPPRESS)
        for setting in setting_names:
            hint, default = SETTING_HINTS[setting], SETTING_DEFAULTS[setting]
            flag, text = f"--{setting.replace('_', '-')}", f"{get_args(hint)[1].description} (default: {default!r})"
            if SETTING_TYPES[setting] is bool:
                added.add_argument(flag, help=text, nargs="?", const="true")
            else:
                added.add_argument(flag, help=text)
        return added

    command("serve", "run the service", *SETTING_TYPES)
    token = command("token", "make a token", "secret")
    token.add_argument("--scope", default="read", help="words of read, write, abort, admin (default: read)")
    token.add_argument("--thread", action="append", default=[], help="an id, or prefix*, more than once (default: all)")
    token.add_argument("--expires-in", default="1h", help="how long it is good for (default: 1h)")
    command("check", "say whether the database is sound", "db")
    command("backup", "copy the database while the service runs", "db").add_argument("file", type=Path)
    command("healthcheck", "ask the running service whether it is ready", "host", "port", "uds")
    command("version", "print the version")
    return parser


def run(command: str, flags: dict[str, Any]) -> None:
    settings = settings_from(os.environ, flags)
    match command:
        case "serve":
            set_up_logging(settings.log_format)
            uvloop.run(serve(settings))
        case "token":
            make_token(settings, flags["scope"], flags["thread"], flags["expires_in"])
        case "check":
            check(Path(settings.db))
        case "backup":
            backup(Path(settings.db), flags["file"])
        case "healthcheck":
            healthcheck(settings)
        case "version":
            print(__version__)


def main(arguments: Sequence[str] | None = None) -> int:
    gc.freeze()  # what is imported stays: the collector need not walk it, neither now nor at the end
    flags = vars(argument_parser().parse_args(arguments))
    try:
        run(flags.pop("command"), flags)
    except StartupError as error:
        print(f"resume-stream: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
