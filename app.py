"""resume-stream keeps what an agent is streaming, so that a reader carries on from where it stopped.

Producers append chunks to the messages of a thread; every chunk is committed to SQLite before it
is acknowledged, and has a place in the thread's one sequence. Readers follow that sequence by
cursor. The file reads from top to bottom: settings, records, errors, the store, the buffer, the
wire formats, the routes, the app, serve. Each part knows only those above it. What goes beyond
these is in ``extras/``, a file each, mounted where it is there.

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
import contextlib
import difflib
import enum
import fcntl
import gc
import importlib
import ipaddress
import logging
import math
import os
import re
import socket
import sqlite3
import sys
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, aclosing
from functools import lru_cache, partial
from http import HTTPStatus
from operator import itemgetter
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    Literal,
    NamedTuple,
    NewType,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
)
from urllib.parse import quote, unquote_to_bytes, urlsplit

import aiosqlite
import msgspec
import uvicorn
import uvloop
from litestar import Litestar, MediaType, Request, Response, Router, delete, get, post, put
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.middleware import DefineMiddleware
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import FromQuery, PathParameter, QueryParameter
from litestar.plugins.problem_details import ProblemDetailsException
from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import ASGIApp, ExceptionHandlersMap, Guard, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
# What the files in extras/ may use besides, and nothing else: who changes one of these looks there.
FOR_EXTRAS = [
    "ABORT",
    "ADMIN",
    "ANYONE",
    "API_HEADERS",
    "Append",
    "BUSY_TIMEOUT",
    "BadRequest",
    "Body",
    "BrokenOff",
    "Buffer",
    "CHUNK_OVERHEAD",
    "CHUNK_WEIGHT",
    "Change",
    "ChunkPage",
    "Commands",
    "Conflict",
    "Cursor",
    "CursorGone",
    "DatabaseFull",
    "Entry",
    "Forbidden",
    "Format",
    "Gate",
    "Grant",
    "GroupCommit",
    "HEARTBEAT",
    "InvalidContent",
    "Listener",
    "MAX_REASON",
    "MESSAGES",
    "MessageStatus",
    "NotFound",
    "PAGE_BYTES",
    "PAGE_ROWS",
    "PRODUCER_TIMEOUT",
    "Page",
    "Parts",
    "Place",
    "RAW",
    "READ",
    "RELAYED",
    "RETRY",
    "Reader",
    "Record",
    "SCOPES",
    "SMALL_BODY",
    "SQLiteStore",
    "SSE_HEADERS",
    "StartupError",
    "State",
    "Status",
    "Step",
    "Stopping",
    "Store",
    "StreamedBody",
    "TAKES_READER",
    "THREAD",
    "ThreadId",
    "ThreadPage",
    "ThreadSummary",
    "Told",
    "TooLarge",
    "UNDECODABLE",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "Upstream",
    "WRITE",
    "__version__",
    "add_command",
    "another_goes_on",
    "another_is_stored",
    "answered_early",
    "body_pieces",
    "bytes_known",
    "check_exists",
    "checked_id",
    "checked_sizes",
    "chunks_from_json",
    "decode_body",
    "encode_json",
    "granted",
    "has_word_for_end",
    "invalid_json",
    "message_ended",
    "message_too_large",
    "no_message",
    "no_thread",
    "now_ms",
    "parse_duration",
    "place_of",
    "problem_document",
    "seconds",
    "sole_owner",
    "store_for",
    "thread_cleared",
    "token_expired",
    "unpacked",
    "utf8_size",
    "whole_body",
    "word_for",
    "would_leave_a_gap",
]

# This file is the package resume_stream, also where it is run as it is, and extras/ beside it is part of that.
__path__ = [str(Path(__file__).parent)]
sys.modules.setdefault("resume_stream", sys.modules[__name__])

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
W = TypeVar("W")
P = ParamSpec("P")
S = TypeVar("S", bound="ThreadSummary")
log = logging.getLogger("resume_stream")

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

Duration = NewType("Duration", float)
Size = NewType("Size", int)

DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
MIN_CLEANUP_INTERVAL = 0.01  # seconds
SECRET_BYTES = 32


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


class Upstream(NamedTuple):
    """A server to relay, under a name of its own; ``url`` has no slash at its end."""

    name: str
    url: str


def parse_upstreams(text: str) -> tuple[Upstream, ...]:
    """Those of a comma-separated list like ``openai=https://api.openai.com``. Raises ValueError."""
    found: dict[str, Upstream] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(https?://[^/?#@\s]+(?:/[^?#@\s]*)?)", item, re.ASCII)
        if match is None:
            shown = re.sub(r"\?.*", "?…", re.sub("//.*@", "//…@", item))  # as either may hold a key
            raise ValueError(f"{shown!r} is not an upstream; write it like openai=https://api.openai.com")
        if not has_address(match[2]):
            raise ValueError(f"{item!r} has no host, or a port that is not one of 1 to 65535")
        if match[1] in found:
            raise ValueError(f"there are two upstreams {match[1]}; give each a name of its own")
        found[match[1]] = Upstream(match[1], match[2].rstrip("/"))
    return tuple(found.values())


def has_address(url: str) -> bool:
    """Whether there is a host in it, and no port that cannot be."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def described(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the service runs. Durations are seconds or like ``"30s"``, sizes are bytes or like ``"64KiB"``.

    Each is also an environment variable (``RESUME_STREAM_IDLE_TIMEOUT``) and a flag of
    ``resume-stream serve`` (``--idle-timeout``); the flag wins. Raises ValueError for what cannot be.
    """

    host: Annotated[str, described("address to listen on")] = "127.0.0.1"
    port: Annotated[int, described("port to listen on; 0 picks a free one and prints it")] = 8000
    uds: Annotated[str, described("Unix socket to listen on, in place of host and port")] = ""
    db: Annotated[str, described("the SQLite file")] = "resume-stream.db"
    store: Annotated[
        str, described("Redis in place of the SQLite file: redis://host:6379/0, rediss://… or unix:///path")
    ] = ""
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
    packing: Annotated[bool, described("keep what has ended compressed, once the clean-up has come by")] = True
    synchronous: Annotated[
        Literal["FULL", "NORMAL"], described("FULL: what is acknowledged survives a power cut; NORMAL: a crash")
    ] = "FULL"
    max_chunk: Annotated[Size, described("largest chunk")] = Size(1024**2)
    max_body: Annotated[Size, described("largest JSON body")] = Size(10 * 1024**2)
    max_message: Annotated[Size, described("largest message: its text, and 16 bytes a chunk")] = Size(64 * 1024**2)
    max_db: Annotated[Size, described("largest database file; 0: as large as the disk")] = Size(0)
    max_readers: Annotated[int, described("most readers at a time")] = 10_000
    secret: Annotated[str, described("turns authentication on: the key of HS256 tokens, 32 bytes or more")] = ""
    upstream: Annotated[
        tuple[Upstream, ...],
        described("what to relay, like openai=https://api.openai.com, with commas or more than once"),
    ] = ()
    max_relays: Annotated[int, described("most answers of upstreams at a time")] = 1_000
    cors_origins: Annotated[
        tuple[str, ...], described("other origins whose pages may connect, like https://chat.example, with commas")
    ] = ()
    allow_anonymous: Annotated[bool, described("serve others than loopback without a secret")] = False
    log_format: Annotated[Literal["auto", "console", "json"], described("auto: console on a terminal, else json")] = (
        "auto"
    )

    def __post_init__(self) -> None:
        for name in SETTING_TYPES:
            msgspec.structs.force_setattr(self, name, checked_setting(name, getattr(self, name)))


SETTING_HINTS: dict[str, Any] = get_type_hints(Settings, include_extras=True)
SETTING_TYPES: dict[str, Any] = {name: get_args(hint)[0] for name, hint in SETTING_HINTS.items()}
SETTING_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Settings)}
SETTING_METAVARS: dict[Any, str] = {
    str: "TEXT",
    int: "NUMBER",
    bool: "true|false",
    Duration: "DURATION",
    Size: "SIZE",
    tuple[str, ...]: "ORIGINS",
    tuple[Upstream, ...]: "NAME=URL",
}
SETTING_PARSERS: dict[Any, Callable[[str], Any]] = {
    Duration: parse_duration,
    Size: parse_size,
    tuple[str, ...]: parse_origins,
    tuple[Upstream, ...]: parse_upstreams,
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


def checked_setting(name: str, value: Any) -> Any:
    """The value, also of its text (``"1s"``). Raises ValueError with one sentence for a person."""
    kind = SETTING_TYPES[name]
    if isinstance(value, str) and kind in SETTING_PARSERS:
        value = parse_setting(name, value)
    try:
        value = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}={value!r:.80} cannot be: {error}") from error
    if isinstance(value, float | int) and not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} cannot be; it is 0 or more")
    if name == "cleanup_interval" and value < MIN_CLEANUP_INTERVAL:
        raise ValueError(f"cleanup_interval={value} cannot be; it would never pause; give it 1s or more")
    if name == "secret" and 0 < len(value.encode()) < SECRET_BYTES:
        raise ValueError(
            f"the secret has {len(value.encode())} bytes, and HS256 asks for {SECRET_BYTES} or more (RFC 7518, 3.2);"
            " make one with: openssl rand -hex 32"
        )
    return value


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

Status = Literal["active", "completed", "aborted"]

RESERVED_EVENTS = frozenset({"complete", "timeout", "reset", "gone", "error", "open"})
RELAYED = "relayed:"  # begins the event of a relayed message's first chunk, which says whence it came
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
    what allowed the reader to read has expired. ERROR: reading went wrong; a problem says how.
    """

    RESET = "reset"
    GONE = "gone"
    TIMEOUT = "timeout"
    HEARTBEAT = "heartbeat"
    EXPIRED = "expired"
    ERROR = "error"


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
    """``get_thread_status``: one thread with its messages, in the order they began.

    ``messages_cursor`` gets the next of them, None where there are no more.
    """

    cursor: str = ""
    messages: list[MessageStatus] = []
    messages_cursor: str | None = None
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


class Page:
    """Consecutive entries of a thread's sequence, encoded once in each format for all who read them.

    Its reader has everything up to ``last_seq`` once it has this page, even where entries of
    other messages were left out.
    """

    __slots__ = ("_encoded", "_parts", "asked", "entries", "generation", "last_seq", "size", "unread", "wires")

    def __init__(
        self, generation: int, last_seq: int, entries: Sequence[Entry], size: int = 0, asked: float | None = None
    ) -> None:
        self.generation = generation
        self.last_seq = last_seq
        self.entries = entries
        self.size = size
        self.asked = asked  # when its append was asked for (time.perf_counter), until somebody reads it
        self.unread = True
        self.wires: dict[Format, bytes] = {}  # what an extra makes of it once for all
        self._parts: Sequence[Page] = ()
        self._encoded: dict[Format, list[bytes]] = {}

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

    @property
    def completes(self) -> bool:
        end = self.entries[-1]
        return isinstance(end, MessageEnd) and end.status == "completed"

    @property
    def cost(self) -> int:
        """About how many bytes it takes."""
        return self.size + CHUNK_OVERHEAD * len(self.entries)

    def encoded(self, form: Format) -> list[bytes]:
        if self._parts:
            return [piece for part in self._parts for piece in part.encoded(form)]
        if (known := self._encoded.get(form)) is None:
            known = self._encoded[form] = form.frames(self)
        return known


class Format(Protocol):
    """How readers are told what they read, on one kind of wire."""

    def frames(self, page: Page) -> list[bytes]:
        """The page's entries, as what is sent of them: in one piece, or one for each entry."""

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        """What is sent of anything else: nothing, where this wire has no word for it."""


class State(Record, frozen=True):
    """A thread and one of its messages, as one transaction sees them.

    ``generation`` is 0 where there is no such thread, ``status`` None where it has no such message.
    """

    generation: int = 0
    last_seq: int = 0
    active: bool = False  # whether any message of the thread is
    status: Status | None = None
    reason: str | None = None
    chunk_count: int = 0
    size: int = 0  # of the message's text, in bytes of UTF-8
    first: int | None = None  # the message's first and last place
    last: int | None = None
    updated_at: int = 0  # the message, ms since 1970
    version: int = 0  # of the thread: grows with each change, where changes may be told of out of order

    @property
    def order(self) -> tuple[int, int]:
        """By which of two states of one thread, the later is known."""
        return self.last_seq, self.version

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "aborted")

    @property
    def before(self) -> int:
        """The last place in the thread's sequence before anything of this message."""
        return self.last_seq if self.first is None else self.first - 1

    @property
    def cursor(self) -> str:
        """Of one who has all of the thread."""
        return str(Cursor(self.last_seq, self.generation))


class Append(Record, frozen=True):
    """What is to be appended; ``sizes`` are those of the chunks, in bytes of UTF-8.

    ``index`` is the number in its message of the first chunk, ``generation`` that of the thread
    it has to be: a long upload is held to the one in which it began.
    """

    thread_id: str
    message_id: str
    chunks: Sequence[Chunk]
    sizes: Sequence[int]
    index: int | None = None
    complete: bool = False
    generation: int | None = None


class Change(Record, frozen=True):
    """What a write did: the state right after it, and the chunks and the end that are new with it.

    ``made`` and ``cleared`` are the other ways in which it may have changed something.
    """

    thread_id: str
    message_id: str
    state: State
    timestamp: int
    chunks: Sequence[Chunk] = ()
    size: int = 0  # of their text, in bytes
    ended: bool = False
    made: bool = False
    cleared: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.chunks) or self.ended or self.made or self.cleared

    @property
    def answer(self) -> Appended:
        state = self.state
        return Appended(self.thread_id, self.message_id, state.last or 0, state.chunk_count, cast(Status, state.status))

    def entries(self) -> list[Entry]:
        last_seq = self.state.last_seq
        first_seq = last_seq + 1 - self.ended - len(self.chunks)
        entries: list[Entry] = [
            StoredChunk(chunk.content, self.timestamp, self.message_id, seq, chunk.event)
            for seq, chunk in enumerate(self.chunks, first_seq)
        ]
        if self.ended:
            entries.append(MessageEnd(self.message_id, cast(Status, self.state.status), self.state.reason, last_seq))
        return entries


class Place(Record, frozen=True):
    """Where a reader begins.

    ``generation`` is 0 for a thread not made yet. ``follow`` means that it waits for what is not
    made yet, and for a thread's next message. ``skip`` is how many bytes of the next chunk the
    reader has already. ``finished`` means that nothing will ever come after it.
    """

    thread_id: str
    message_id: str | None
    generation: int
    after: int
    follow: bool = False
    skip: int = 0
    reset: bool = False
    finished: bool = False

    def ends_with(self, page: Page) -> bool:
        return self.message_id is not None and isinstance(page.entries[-1], MessageEnd)

    def ends_where(self, active: bool) -> bool:
        """A message ends with its end, a thread where none of its messages is active."""
        return not (self.follow or active or self.message_id is not None)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class Problem(ProblemDetailsException):
    """An error for people: one sentence that says what is wrong and what would be right.

    On the wire it is a problem document (RFC 9457); ``members`` are its extension members.
    """

    status_code = 500
    kind: ClassVar[str] = "Internal error"
    always: ClassVar[dict[str, str]] = {}  # headers

    def __init_subclass__(cls, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        cls.status_code, cls.kind, cls.always = status, kind, headers or {}

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(
            detail=detail,
            title=self.kind,
            status_code=self.status_code,
            headers=dict(self.always) or None,
            extra=members or None,
        )


class BadRequest(Problem, status=400, kind="Bad request"): ...


class Unauthorized(Problem, status=401, kind="Unauthorized", headers={"WWW-Authenticate": "Bearer"}): ...


class Forbidden(Problem, status=403, kind="Forbidden"): ...


class NotFound(Problem, status=404, kind="Not found"): ...


class TooSlow(Problem, status=408, kind="Request timeout"): ...


class Conflict(Problem, status=409, kind="Conflict"): ...


class CursorGone(Problem, status=410, kind="Cursor of another generation"): ...


class TooLarge(Problem, status=413, kind="Over a limit"): ...


class UnsupportedMediaType(Problem, status=415, kind="Unsupported media type"): ...


class InvalidContent(Problem, status=422, kind="Invalid content"): ...


class Unavailable(Problem, status=503, kind="Unavailable", headers={"Retry-After": "1"}): ...


class DatabaseFull(Problem, status=507, kind="Database full"): ...


class Stopping(Unavailable, status=503, kind="Unavailable", headers={"Retry-After": "1"}):
    def __init__(self) -> None:
        super().__init__("The service is stopping; try again when it is back.")


class NotEntered(Problem, status=500, kind="Not entered"):
    def __init__(self) -> None:
        super().__init__(
            "The buffer was not entered: write 'async with ChunkBuffer(…) as buffer', or give it to the lifespan of the"
            " app. An app that is mounted in another one gets no lifespan of its own; enter its buffer in the other's."
        )


class StartupError(Exception):
    """Why the service cannot start, in one line."""


class BrokenOff(Exception):
    """The body is to be broken off, as its end would be taken for a complete answer (RFC 9112, 8)."""


def no_thread(thread_id: str) -> NotFound:
    return NotFound(f"There is no thread {thread_id!r}; it was never made, or was cleared or expired.", exists=False)


def no_message(thread_id: str, message_id: str) -> NotFound:
    return NotFound(f"The thread {thread_id!r} has no message {message_id!r}.", exists=False)


def message_ended(message_id: str, state: State) -> Conflict:
    why = f" ({state.reason})" if state.reason else ""
    return Conflict(
        f"The message {message_id!r} was {state.status}{why}, and an end is final; begin a new message.",
        messageStatus=state.status,
        reason=state.reason,
        chunkCount=state.chunk_count,
    )


def thread_cleared() -> Conflict:
    return Conflict("The thread was cleared while this message was being written; begin a new message.")


def would_leave_a_gap(append: Append, state: State) -> Conflict:
    return Conflict(
        f"The message {append.message_id!r} has {state.chunk_count} chunks, so index={append.index} would leave a gap;"
        f" go on with index={state.chunk_count}.",
        expectedIndex=state.chunk_count,
    )


def another_is_stored(message_id: str, index: int, state: State) -> Conflict:
    return Conflict(
        f"Another chunk is stored as index {index} of the message {message_id!r}: another producer writes to it, or"
        " this one sent something else before. Stop, or begin a new message.",
        expectedIndex=state.chunk_count,
    )


def has_chunks(message_id: str, state: State) -> Conflict:
    return Conflict(
        f"The message {message_id!r} has {state.chunk_count} chunks already, and a whole stream would be stored after"
        " them; begin a new message.",
        expectedIndex=state.chunk_count,
    )


def another_goes_on(message_id: str, state: State) -> Conflict:
    return Conflict(
        f"The message {message_id!r} has chunks after those that would complete it: another producer writes to it."
        " Stop, or begin a new message.",
        expectedIndex=state.chunk_count,
    )


def message_too_large(size: int, max_message: int) -> TooLarge:
    return TooLarge(
        f"The message would take {size} bytes, of which each chunk is {CHUNK_WEIGHT} besides its text, over max_message"
        f" ({max_message}); complete it and go on in another."
    )


def too_many_chunks() -> TooLarge:
    return TooLarge(f"There are over {MAX_CHUNKS} chunks in one append; send them in parts.")


def cursor_gone() -> CursorGone:
    return CursorGone(
        "This cursor is of a thread that was cleared or expired, or lies beyond its end; read from the start, with no"
        " after."
    )


def token_expired() -> Unauthorized:
    return Unauthorized("The token has expired; get a new one, and carry on from the cursor.")


# ---------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------

APPLICATION_ID = 0x72737472
SCHEMA_VERSION = 3
SCHEMA = Path(__file__).with_name("schema.sql")

CHUNK_OVERHEAD = 64  # bytes that a chunk takes besides its text
CHUNK_WEIGHT = 16  # bytes that a chunk counts in its message besides its text
MAX_CHUNKS = 10_000  # in one append
PENDING_BYTES = 8 * 1024**2  # waiting to be committed, all together; past it producers wait
BATCH_WRITES = 512  # enough for one transaction not to wait for more
QUIET_TURNS = 3  # of the loop without another write, after which a transaction begins
HOT_THREADS = 1_024  # kept from one commit to the next
FEW_WRITES, FEW_BYTES = 8, 16 * 1024  # that the loop may commit itself,
QUICK = 0.001  # seconds that this may take,
PAUSE = 20  # times as long as one took that took longer, for which it does not;
IN_A_ROW = 128  # commits, of which the last is left to the other thread in any case
PAGE_ROWS = 512
PAGE_BYTES = 256 * 1024
MESSAGES = 1_000  # of a thread's, told of at once
EXPIRED_AT_ONCE = 500  # threads
ERASE_ROWS = 500  # rows deleted in one transaction
ERASE_BYTES = 1024**2  # of text, likewise
ERASE_PAUSE = 0.25  # seconds between two tries to empty the WAL while another process reads
SHRINK_PAGES = 256  # of the file, given back between two commits
MIN_POLL_INTERVAL = 0.01  # seconds
BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process's lock
INTERRUPT_EVERY = 100_000  # steps of SQLite, after which it is looked whether anybody still waits for the rest
SMALLEST_DATABASE, SMALLEST_PAGE = 64 * 1024, 512  # bytes
CHECKPOINT_PAGES = 1_000  # of the WAL, after which SQLite makes a checkpoint
CHECKPOINT_TIMEOUT = 0.1  # seconds that a checkpoint waits for readers
WAL_BYTES = 16 * 1024**2  # past this, a checkpoint also resets the WAL


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Open(Record, frozen=True):
    """Make the message (and its thread) if need be; otherwise it is a sign of life."""

    thread_id: str
    message_id: str


class End(Record, frozen=True):
    """End a message; with ``untouched_since`` only if nobody appended to it since."""

    thread_id: str
    message_id: str
    status: Status
    reason: str | None = None
    untouched_since: int | None = None


class Clear(Record, frozen=True):
    """Forget a thread; with ``untouched_since`` only if nobody touched it since."""

    thread_id: str
    untouched_since: int | None = None


Write = Append | Open | End | Clear
Told = Callable[[Sequence[tuple[Change, float | None]], float | None], None]


class Store(Protocol):
    """What the buffer needs of whatever keeps its threads.

    A write is asked for at once, and its Change comes back after its commit; writes are committed in
    the order in which they were asked for. ``told`` is called with the changes of each commit, each
    with the time at which it was asked for (time.perf_counter), and with the seconds that the commit
    took: before anybody is answered, in order; without these times, where another process made them.
    What one call reads is of one moment. All of them raise Problem; a write that does has changed
    nothing. Times are ms since 1970.
    """

    # Raises StartupError, and leaves everything as it was, where it cannot be served; closing commits what waits.
    async def open(self, told: Told) -> None: ...
    async def close(self) -> None: ...
    def stop(self) -> None: ...  # it is about to be closed: let nothing go on that takes long

    # Whoever writes text waits for room first: until less than a limit is waiting to be committed.
    def write(self, write: Write) -> Awaitable[Change]: ...  # raises NotFound, Conflict and TooLarge
    async def room(self) -> None: ...
    @property
    def has_room(self) -> bool: ...

    # The text, the match and the status of what is not there raise NotFound.
    async def find(self, thread_id: str, message_id: str | None = None) -> State: ...
    # Up to ``limit`` entries after ``after``, and the state they belong to.
    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]: ...
    # The text of a message from its chunk ``index`` on, or of all of a thread's.
    async def text(self, thread_id: str, message_id: str | None, index: int = 0) -> tuple[State, str]: ...
    # Where a reader with this text of the message begins.
    async def match(self, thread_id: str, message_id: str, known_content: str) -> Place: ...
    # With up to ``limit`` of its messages, those after the first ``after``.
    async def status(self, thread_id: str, limit: int, after: int) -> ThreadStatus: ...
    # The newest of a generation ``before`` this, whose id is ``covered`` by an id or a ``prefix*`` (None: all).
    async def threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage: ...

    # Some of the active messages to which nobody appended since, with their threads.
    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]: ...
    # Forget some of the threads that nobody touched since; how many.
    async def expire(self, untouched_since: int) -> int: ...
    async def erase(self) -> bool: ...  # leave no trace of what was forgotten; False: to be tried again
    async def upkeep(self) -> None: ...  # whatever else is to be done now and then
    async def probe(self) -> None: ...  # write, so that it is known whether that can be done
    # Bytes of the database and of its WAL, and how many messages are active.
    async def measure(self) -> tuple[int, int, int]: ...

    # Have what other processes do to these threads noticed; called again when the set has changed.
    def watch(self, thread_ids: AbstractSet[str]) -> None: ...
    # Yields those of them to which they have done nobody knows what.
    def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]: ...


def check_exists(found: State, thread_id: str, message_id: str | None = None) -> None:
    """Raises NotFound."""
    if not found.generation:
        raise no_thread(thread_id)
    if message_id is not None and found.status is None:
        raise no_message(thread_id, message_id)


def place_of(found: State, thread_id: str, message_id: str | None, cursor: Cursor | None, follow: bool) -> Place:
    """Where a reader with this cursor begins. Raises NotFound."""
    if not follow:
        check_exists(found, thread_id, message_id)
    if not found.generation:
        return Place(thread_id, message_id, 0, 0, follow, reset=cursor is not None and str(cursor) != "0")
    lies = cursor is not None and (cursor.generation not in (None, found.generation) or cursor.seq > found.last_seq)
    after = 0 if lies or cursor is None else cursor.seq
    if message_id is None:
        finished = not (follow or found.active) and after >= found.last_seq
    else:
        after = max(after, found.before)
        finished = found.ended and after >= cast(int, found.last)
    return Place(thread_id, message_id, found.generation, after, follow, reset=lies, finished=finished and not lies)


def bytes_known(known: bytes, text: bytes) -> int | None:
    """How many bytes of the text a reader has who knows this of it: up to where it ends, if it is a
    prefix or occurs exactly once. In UTF-8 a text occurs where its bytes do (RFC 3629, 1)."""
    start = 0 if text.startswith(known) else text.find(known)
    is_unique = start == 0 or (start > 0 and text.find(known, start + 1) < 0)
    return start + len(known) if is_unique else None


class Waiting(NamedTuple):
    """A write that is to be committed, and who waits for it."""

    write: Write
    asked: float
    done: asyncio.Future[Change]


class GroupCommit:
    """Commits together, in order, what is asked for in one turn of the loop, and tells of it before it answers."""

    def __init__(self) -> None:
        self._told: Told = lambda changes, took: None
        self._waiting: list[Waiting] = []
        self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._committing: asyncio.Task[None] | None = None
        self._together = 1  # of the last commit, how many writes
        self._refused_ms = 0  # when a commit failed last

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        """What became of each of these, about ``size`` bytes. Raises Problem where that is the same for all."""
        raise NotImplementedError

    async def all_committed(self) -> None:
        if self._committing is not None:
            await self._committing

    @property
    def has_room(self) -> bool:
        return self._has_room.is_set()

    async def room(self) -> None:
        while not self._has_room.is_set():  # the first of those who waited may have filled it again
            await self._has_room.wait()

    def write(self, write: Write) -> asyncio.Future[Change]:
        """Commit it, right behind what was asked for before, and with all else that is waiting by then."""
        size = CHUNK_OVERHEAD
        if isinstance(write, Append):
            size = sum(write.sizes) + CHUNK_OVERHEAD * len(write.chunks)
        done: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(write, time.perf_counter(), done))
        self._waiting_bytes += size
        if self._waiting_bytes >= PENDING_BYTES:
            self._has_room.clear()
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_waiting())
        return done

    async def _commit_waiting(self) -> None:
        while self._waiting:
            await self._gather()
            batch, size = self._waiting, self._waiting_bytes
            self._waiting, self._waiting_bytes = [], 0
            self._has_room.set()
            self._together = len(batch)
            await self._commit_batch(batch, size)

    async def _gather(self) -> None:
        """Let in what is about to come, as a commit costs about the same for many as for one.

        Those whom the last commit answered come again at about the same time. Without them, producers
        would split into halves that wait for each other's commits. One alone waits for nobody.
        """
        quiet, seen = 0, len(self._waiting)
        while self._together > 1 and quiet < QUIET_TURNS and seen < BATCH_WRITES:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            seen = len(self._waiting)

    def refused(self, error: E) -> E:
        """Note that something was not committed for no fault of whoever asked for it."""
        log.error("commit failed: %s", error)
        self._refused_ms = now_ms()
        return error

    async def _commit_batch(self, batch: Sequence[Waiting], size: int) -> None:
        began = time.perf_counter()
        outcomes: Sequence[Change | Exception]
        try:
            outcomes = await self.commit([waiting.write for waiting in batch], size)
        except Exception as error:
            outcomes = [self.refused(error)] * len(batch)
        else:
            done = zip(outcomes, batch, strict=True)
            changes = [(outcome, waiting.asked) for outcome, waiting in done if isinstance(outcome, Change)]
            self._told(changes, time.perf_counter() - began)
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.done.done():
                continue  # the one who asked is gone; what was committed stays committed
            if isinstance(outcome, Change):
                waiting.done.set_result(outcome)
            else:
                waiting.done.set_exception(outcome)


# What is in SQLite


def database_problem(error: Exception) -> Problem:
    """What went wrong in SQLite (https://www.sqlite.org/rescode.html), for the one who asked."""
    # Text that is not UTF-8 is found by Python's own part, which has no code for it.
    code = code_of(error) or (0 if isinstance(error, OSError) else sqlite3.SQLITE_CORRUPT)
    if code == sqlite3.SQLITE_FULL:
        return DatabaseFull("The disk or the size limit (max_db) is full; free space and retry.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable("Another process keeps the database locked; retry once it is done.")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return Unavailable(
            f"The rows of this thread do not fit together ({error}), as after an edit by hand; clear it."
        )
    if str(error) in ("user-defined function raised exception", "malformed JSON"):  # which are of the view "entries"
        return Unavailable("A pack of this thread is damaged; clear the thread, or restore the database from a backup.")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return Unavailable("The database is damaged; restore it from a backup.")
    return Unavailable(f"The database cannot be used ({error}); mend the cause and retry.")


DATABASE_ERRORS = (sqlite3.Error, OSError, UnicodeDecodeError)


def code_of(error: BaseException | None) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_of_its_rows(error: BaseException | None) -> bool:
    """Whether it has to do with what one write found, and not with the file, the disk or another process."""
    codes = (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH)
    return isinstance(error, UnicodeDecodeError) or code_of(error) in codes


def unpacked(data: bytes, size: int) -> str:
    """The JSON text of a pack, whose checksum zlib compares."""
    return zlib.decompress(data).decode()


def open_packs(db: sqlite3.Connection) -> None:
    """Let this connection see into packs, as the sqlite3 shell does by itself."""
    db.create_function("sqlar_uncompress", 2, unpacked, deterministic=True)


class Row(State, frozen=True):
    """A State, and where it is in the database; None is not made yet."""

    thread: int | None = None
    message: int | None = None

    @property
    def places(self) -> tuple[int | None, ...]:
        """What OF_MESSAGE takes."""
        return self.thread, self.message, self.first, self.last


# The chunks of a message; of the packs only those are opened in which some of them are.
OF_MESSAGE = (
    " from entries where thread = ?1 and message = ?2 and seq between ?3 and ?4 and last >= ?3 and first <= ?4"
    " and content is not null"
)


def row_of(db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> Row:
    row = db.execute(
        "select t.generation, t.last_seq,"
        " exists (select 1 from messages where thread = t.thread and status = 'active'),"
        " m.status, m.reason, coalesce(m.chunk_count, 0), coalesce(m.size, 0), m.first_seq, m.last_seq,"
        " coalesce(m.updated_at, 0), 0, t.thread, m.message"
        " from threads as t left join messages as m on m.thread = t.thread and m.message_id = ?"
        " where t.thread_id = ?",
        (message_id, thread_id),
    ).fetchone()
    return Row(*row) if row else Row()


def existing(db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> Row:
    """Raises NotFound."""
    found = row_of(db, thread_id, message_id)
    check_exists(found, thread_id, message_id)
    return found


def text_of(db: sqlite3.Connection, found: Row, index: int = 0) -> bytes:
    # As a blob, since SQLite's own text functions stop at a NUL.
    (text,) = db.execute(
        "select cast(group_concat(content, '') as blob)"
        f" from (select content, last {OF_MESSAGE} order by last limit -1 offset ?5)",
        (*found.places, index),
    ).fetchone()
    return text or b""


HotRows = dict[str, tuple[str, Row]]


def range_of(pattern: str) -> tuple[str, str]:
    """Between which ids lie those that are it, or begin with it if it ends with ``*``."""
    return (pattern[:-1], pattern[:-1] + chr(sys.maxunicode)) if pattern.endswith("*") else (pattern, pattern)


class Transaction:
    """One group commit: a write sees what the earlier ones in it did, and one that raises a Problem did nothing.

    What is appended is gathered, and written with one statement a table, at the end or when something
    has to see it. ``hot`` is, of threads that are appended to, the message that was last, and its row.
    """

    def __init__(self, db: sqlite3.Connection, max_message: int, hot: HotRows) -> None:
        self._db = db
        self._max_message = max_message
        self._hot = hot
        self._now = now_ms()
        self._chunks: list[tuple[Any, ...]] = []
        self._rows: dict[int | None, Row] = {}  # of messages, by their number

    def outcome(self, write: Write) -> Change | Problem:
        try:
            if isinstance(write, Append):
                return self.append(write)
            self.flush()
            self._hot.pop(write.thread_id, None)
            if isinstance(write, Open):
                return self.open(write)
            return self.end(write) if isinstance(write, End) else self.clear(write)
        except Problem as problem:
            return problem

    def flush(self) -> None:
        """Write what was gathered, of each thread to one message."""
        if not self._rows:
            return
        self._db.executemany(
            "insert into chunks (thread, seq, message, event, content, timestamp) values (?, ?, ?, ?, ?, ?)",
            self._chunks,
        )
        self._db.executemany(
            "update threads set last_seq = ?, updated_at = ? where thread = ?",
            [(row.last_seq, self._now, row.thread) for row in self._rows.values()],
        )
        self._db.executemany(
            "update messages set chunk_count = ?, size = ?, first_seq = ?, last_seq = ?, updated_at = ?"
            " where message = ?",
            [(row.chunk_count, row.size, row.first, row.last, self._now, key) for key, row in self._rows.items()],
        )
        self._chunks.clear()
        self._rows.clear()

    def append(self, append: Append) -> Change:
        thread_id, message_id, index, complete = append.thread_id, append.message_id, append.index, append.complete
        name, found = self._hot.pop(thread_id, ("", Row()))
        if name != message_id:
            self.flush()
            found = row_of(self._db, thread_id, message_id)
        if append.generation not in (None, found.generation):
            raise thread_cleared()
        stored = [] if index in (None, found.chunk_count) else self._stored(append, found)
        count = found.chunk_count if index is None else index + len(append.chunks)  # with these, if all are stored
        chunks, size = append.chunks[len(stored) :], sum(append.sizes[len(stored) :])
        if stored and not chunks and not complete:
            found = msgspec.structs.replace(found, last=stored[-1], chunk_count=count)
            return Change(thread_id, message_id, found, self._now)
        if found.ended:
            # Answered as before, if it was this append that completed the message.
            is_retry = complete and (index is not None or not append.chunks)
            if is_retry and found.status == "completed" and found.chunk_count == count:
                return Change(thread_id, message_id, found, self._now)
            raise message_ended(message_id, found)
        if complete and count < found.chunk_count:
            raise another_goes_on(message_id, found)
        weight = found.size + size + CHUNK_WEIGHT * (found.chunk_count + len(chunks))
        if weight > self._max_message:
            raise message_too_large(weight, self._max_message)
        if found.message is None:
            found = self._made(thread_id, message_id, found)
        found = self._added(found, chunks, size)
        if complete:
            self.flush()
            found = self._ended(thread_id, message_id, found, "completed", None)
        else:
            self._hot[thread_id] = message_id, found
        return Change(thread_id, message_id, found, self._now, chunks, size, ended=complete)

    def open(self, write: Open) -> Change:
        names = write.thread_id, write.message_id
        found = row_of(self._db, *names)
        if is_new := found.message is None:
            found = self._made(*names, found)
        self._db.execute("update threads set updated_at = ? where thread = ?", (self._now, found.thread))
        self._db.execute(
            "update messages set updated_at = ? where message = ? and status = 'active'", (self._now, found.message)
        )
        return Change(*names, found, self._now, made=is_new)

    def end(self, write: End) -> Change:
        names = write.thread_id, write.message_id
        found = existing(self._db, *names)
        if found.status == write.status:
            return Change(*names, found, self._now)
        if found.ended:
            raise message_ended(write.message_id, found)
        if write.untouched_since is not None and found.updated_at > write.untouched_since:
            raise Conflict(f"The message {write.message_id!r} was appended to in the meantime.")
        found = self._ended(*names, found, write.status, write.reason)
        return Change(*names, found, self._now, ended=True)

    def clear(self, write: Clear) -> Change:
        found = existing(self._db, write.thread_id)
        forgotten = self._db.execute(
            "update threads set thread_id = null where thread = ?1 and (?2 is null or updated_at <= ?2)",
            (found.thread, write.untouched_since),
        ).rowcount
        if not forgotten:
            raise no_thread(write.thread_id)
        self._db.execute("update clock set owed = 1")
        return Change(write.thread_id, "", found, self._now, cleared=True)

    def _stored(self, append: Append, found: Row) -> list[int]:
        """The places of those of the chunks that are stored already, the first ones.

        Raises Conflict where ``index`` leaves a gap, or another chunk has a chunk's place.
        """
        index = cast(int, append.index)
        if index > found.chunk_count:
            raise message_ended(append.message_id, found) if found.ended else would_leave_a_gap(append, found)
        self.flush()
        # Counted from the end, as a retry is nearly always of what came last.
        rows = self._db.execute(
            f"select seq, content, event from (select seq, content, event, last {OF_MESSAGE}"
            " order by last desc, seq desc limit ?5) order by seq limit ?6",
            (*found.places, found.chunk_count - index, len(append.chunks)),
        ).fetchall()
        for number, ((_, *stored), chunk) in enumerate(zip(rows, append.chunks, strict=False), index):
            if stored != [chunk.content, chunk.event]:
                raise another_is_stored(append.message_id, number, found)
        return [seq for seq, _, _ in rows]

    def _made(self, thread_id: str, message_id: str, found: Row) -> Row:
        """The message, new, and its thread if need be."""
        thread = found.thread
        if thread is None:
            ((generation,),) = self._db.execute(
                "update clock set latest_generation = max(latest_generation + 1, ?) returning latest_generation",
                (self._now,),
            ).fetchall()
            thread = self._db.execute(
                "insert into threads (thread_id, generation, created_at, updated_at) values (?1, ?2, ?3, ?3)",
                (thread_id, generation, self._now),
            ).lastrowid
        self._db.execute(
            "insert into messages (thread, message_id, created_at, updated_at) values (?1, ?2, ?3, ?3)",
            (thread, message_id, self._now),
        )
        return row_of(self._db, thread_id, message_id)

    def _added(self, found: Row, chunks: Sequence[Chunk], size: int) -> Row:
        first_seq, last_seq = found.last_seq + 1, found.last_seq + len(chunks)
        self._chunks += [
            (found.thread, seq, found.message, chunk.event, chunk.content, self._now)
            for seq, chunk in enumerate(chunks, first_seq)
        ]
        found = self._rows[found.message] = msgspec.structs.replace(
            found,
            last_seq=last_seq,
            chunk_count=found.chunk_count + len(chunks),
            size=found.size + size,
            first=found.first or (first_seq if chunks else None),
            last=last_seq if chunks else found.last,
        )
        return found

    def _ended(self, thread_id: str, message_id: str, found: Row, status: Status, reason: str | None) -> Row:
        """A trigger gives the end its place, as it does for the sqlite3 shell."""
        self._db.execute(
            "update messages set status = ?, reason = ? where message = ?", (status, reason, found.message)
        )
        return row_of(self._db, thread_id, message_id)


class Database(aiosqlite.Connection):
    """A connection whose thread runs whole functions, in the order in which they were asked for.

    A transaction that is one function cannot be left open by a request that is cancelled, and costs one
    thread hop, whatever the number of its statements. What nobody waits for any more is interrupted.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_used = threading.Lock()  # by its thread, or by the loop
        self.stopped = False

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Raises Problem: Stopping once it is closed or stopped."""
        is_abandoned = False

        def in_turn(db: sqlite3.Connection) -> T:
            with self.is_used:
                db.set_progress_handler(lambda: is_abandoned or self.stopped, INTERRUPT_EVERY)
                try:
                    if is_abandoned or self.stopped:
                        raise Stopping
                    return work(db)
                finally:
                    db.set_progress_handler(None, 0)

        if self._connection is None or not self._running:
            raise Stopping
        try:
            return await cast("Callable[..., Awaitable[T]]", self._execute)(in_turn, self._conn)
        except asyncio.CancelledError:
            is_abandoned = True
            raise
        except DATABASE_ERRORS as error:
            raise (Stopping() if code_of(error) == sqlite3.SQLITE_INTERRUPT else database_problem(error)) from error

    def run_here(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """In the loop's own thread, which has made sure that it is not used."""
        return work(self._conn)

    async def close(self) -> None:
        self.stopped = True
        await super().close()


@contextlib.contextmanager
def sole_owner(path: Path) -> Iterator[int]:
    """Hold a lock on the file itself (flock(2)), made if need be for nobody else to read; its descriptor.

    It does not hinder SQLite, which has locks of another kind. Those a process loses where it closes any
    descriptor on the file (https://www.sqlite.org/howtocorrupt.html, 2.2), so this one is closed last;
    and never where it may be this process that serves the file. Raises StartupError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartupError(f"{path} is already served") from error
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        if (names := os.fstat(descriptor).st_nlink) != 1:
            raise StartupError(f"{path} has {names} names, and each would get a WAL of its own; keep one of them")
        yield descriptor
    finally:
        os.close(descriptor)


def renew_generations(db: sqlite3.Connection) -> None:
    """Where committed places may have been lost, no cursor from before may be taken for one of those that come."""
    latest, lowest = db.execute("select latest_generation, (select min(generation) from threads) from clock").fetchone()
    shift = max(latest, now_ms()) + 1 - (lowest or 0)
    db.execute("update threads set generation = generation + ?", (shift,))
    db.execute(
        "update clock set is_copy = 0, latest_generation = coalesce((select max(generation) from threads), ?)",
        (latest,),
    )


def checkpoint(db: sqlite3.Connection) -> bool:
    """Empty the WAL; False if a reader kept it from that for so long."""
    db.execute(f"pragma busy_timeout = {CHECKPOINT_TIMEOUT * 1000:.0f}")
    (is_busy, _, _) = db.execute("pragma wal_checkpoint(truncate)").fetchone()
    return not is_busy


def with_room(work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
    """Where the disk is full, make what room the WAL takes, and try once more."""
    try:
        return work(db)
    except sqlite3.OperationalError as error:
        if code_of(error) != sqlite3.SQLITE_FULL or not checkpoint(db):
            raise
        return work(db)


# What is erased of threads that have lost their name: of which table, by thread and what, and how large a row is.
ERASED = (
    ("chunks", "seq", "coalesce(length(cast(content as blob)), 0)"),
    ("packs", "last_seq", "length(data)"),
    ("messages", "message_id", "0"),
)


def erase_some(db: sqlite3.Connection) -> bool:
    """Delete a bounded part of what threads have that have lost their name; False once there are none of them."""
    threads = db.execute("select thread from threads where thread_id is null limit ?", (ERASE_ROWS,)).fetchall()
    for table, key, size in ERASED:
        rows = db.execute(
            f"select thread, {key}, {size} from json_each(?) cross join {table} on thread = value ->> 0 limit ?",
            (msgspec.json.encode(threads).decode(), ERASE_ROWS),
        )
        chosen, total = list[tuple[Any, ...]](), 0
        while total < ERASE_BYTES and (row := next(rows, None)):
            chosen, total = [*chosen, row[:2]], total + row[2]
        rows.close()
        if chosen:
            db.executemany(f"delete from {table} where thread = ? and {key} = ?", chosen)
            return True
    db.executemany("delete from threads where thread = ?", threads)
    return bool(threads)


def shrink(db: sqlite3.Connection) -> bool:
    """Give some of the free pages back to the disk; False once there are none."""
    # As a script, since Python takes only the first step of what has no columns, which gives one page back.
    db.executescript(f"pragma incremental_vacuum({SHRINK_PAGES})")
    return bool(db.execute("pragma freelist_count").fetchone()[0])


def reads(
    work: Callable[Concatenate[SQLiteStore, sqlite3.Connection, P], T], heavy: bool = False
) -> Callable[Concatenate[SQLiteStore, P], Coroutine[Any, Any, T]]:
    """Make a method that reads the database one that does so in a snapshot, on a connection for reading."""

    async def method(store: SQLiteStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await store.read(lambda db: work(store, db, *args, **kwargs), heavy)

    return method


reads_much = partial(reads, heavy=True)  # on a connection of its own, so that it does not hold up what is soon done


class SQLiteStore(GroupCommit):
    """Threads in one SQLite file (see Store), which has one owner, and a WAL that stays small.

    One connection writes, and does the checkpoints too, as two that do so at the same time can
    corrupt a WAL (https://www.sqlite.org/wal.html#walresetbug). Two others read: one what is soon
    done, and one what may take long. An extra may add to what is done in ``chores``, by the clean-up,
    and in ``erasing``: what is left to do once something was deleted; False where that is not done yet.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.path = Path(settings.db).resolve()
        self.wal, self.journal = Path(f"{self.path}-wal"), Path(f"{self.path}-journal")
        self.chores: list[Callable[[], Awaitable[None]]] = []
        self.erasing: list[Callable[[], Awaitable[bool]]] = []
        self.exits = contextlib.AsyncExitStack()
        self._erasure = asyncio.Lock()
        self._hot: HotRows = {}  # as of the last commit (see Transaction)
        self._hot_version: int | None = None  # of the data (PRAGMA data_version) that they are of
        self._little = 0  # changes that were
        self._not_here_until = 0.0  # seconds (time.perf_counter)
        self._wal_limit = WAL_BYTES
        self._watched: AbstractSet[str] = frozenset()

    async def open(self, told: Told) -> None:
        if 0 < self.settings.max_db < SMALLEST_DATABASE:
            raise StartupError(f"max_db is {self.settings.max_db} bytes, too few for a database; give it 1MiB or more")
        async with contextlib.AsyncExitStack() as exits:
            self.descriptor = exits.enter_context(sole_owner(self.path))
            try:
                is_new = not await self.check()
                was_killed = self.wal.exists() and self.wal.stat().st_size > 0
                self._writer = await self.opened("rw", exits)
                await self._writer.run(partial(self._prepare, is_new, was_killed))
                self.readers = [await self.opened("ro", exits) for _ in range(2)]
                self._version = await self.data_version()
            except (Problem, sqlite3.Error, OSError) as error:
                raise StartupError(f"{self.path} cannot be opened: {error.__cause__ or error}") from error
            self.exits = exits.pop_all()
        self._told = told

    async def opened(self, mode: Literal["ro", "rw"], exits: contextlib.AsyncExitStack) -> Database:
        options: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False}
        uri = f"file:{quote(str(self.path))}?mode={mode}"
        database = Database(partial(sqlite3.connect, uri, timeout=BUSY_TIMEOUT, **options), iter_chunk_size=PAGE_ROWS)
        await database
        exits.push_async_callback(database.close)
        await database.run(open_packs)
        return database

    async def check(self) -> bool:
        """False where it is empty, or its making was cut short, which a writer takes back. Raises StartupError."""
        async with contextlib.AsyncExitStack() as exits:
            database = await self.opened("rw" if self.journal.exists() else "ro", exits)
            try:
                ((tables, application_id, version, verdict),) = await database.execute_fetchall(
                    "select (select count(*) from sqlite_schema), *"
                    " from pragma_application_id, pragma_user_version, pragma_integrity_check(1)"
                )
            except sqlite3.DatabaseError as error:
                verdict = str(error)
        if verdict != "ok":
            raise StartupError(
                f"{self.path} is damaged, or is not a database ({' '.join(verdict.split())}); restore it from a backup,"
                " or name another file with --db"
            )
        if not (tables or application_id or 0 < self.path.stat().st_size < SMALLEST_PAGE):
            return False
        if application_id != APPLICATION_ID:
            raise StartupError(
                f"{self.path} is the database of another application, or is not a database; name another file with --db"
            )
        if version != SCHEMA_VERSION:
            raise StartupError(
                f"{self.path} has version {version}, and this resume-stream knows {SCHEMA_VERSION}; use the one that"
                " made it, or name another file with --db"
            )
        return True

    def _prepare(self, is_new: bool, was_killed: bool, db: sqlite3.Connection) -> None:
        if is_new:
            db.execute("pragma auto_vacuum = incremental")  # has no effect inside a transaction
            db.executescript(f"begin immediate; {SCHEMA.read_text()}; commit;")
        db.execute("pragma journal_mode = wal")
        db.execute(f"pragma synchronous = {self.settings.synchronous}")
        db.execute("pragma secure_delete = on")
        ((page_size,),) = db.execute("pragma page_size").fetchall()
        if self.settings.max_db:
            db.execute(f"pragma max_page_count = {self.settings.max_db // page_size}")
        with db:
            db.execute("begin immediate")
            (is_copy,) = db.execute("select is_copy from clock").fetchone()
            if is_copy or (was_killed and self.settings.synchronous == "NORMAL"):
                renew_generations(db)
        self._inodes = os.stat(self.path).st_ino, os.stat(self.wal).st_ino

    async def close(self) -> None:
        await self.all_committed()
        await self.exits.aclose()

    def stop(self) -> None:
        self.readers[True].stopped = True

    # Writing

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        is_little = len(writes) <= FEW_WRITES and size <= FEW_BYTES
        try:
            outcomes, self._hot = await self.change(partial(self._outcomes, writes), is_little)
            return outcomes
        except Problem as problem:
            if len(writes) > 1 and is_of_its_rows(problem.__cause__):  # alone, so that nobody is refused for another's
                return [outcome for write in writes for outcome in await self.commit([write], size)]
            return [self.refused(problem)] * len(writes)

    def _outcomes(self, writes: Sequence[Write], db: sqlite3.Connection) -> tuple[list[Change | Problem], HotRows]:
        hot, self._hot = self._hot, {}  # nothing is kept of what fails
        ((version,),) = db.execute("pragma data_version")
        if version != self._hot_version or len(hot) > HOT_THREADS:
            hot, self._hot_version = {}, version  # another process may have changed what was kept
        transaction = Transaction(db, self.settings.max_message, hot)
        outcomes = [transaction.outcome(write) for write in writes]
        transaction.flush()
        return outcomes, hot

    async def change(self, work: Callable[[sqlite3.Connection], T], is_little: bool = False) -> T:
        """Run it in a transaction, all of it or nothing. Raises Problem.

        What ``is_little`` the loop does itself, without two changes of threads, each of which waits for
        Python's lock: where it waits for no other thread or process. After one that took long it does
        none for a while, so that it waits for the disk for a twentieth of its time at the most.
        Checkpoints, which take long, are made in the other thread.
        """

        def in_transaction(db: sqlite3.Connection) -> T:
            with db:  # commits, or rolls back
                db.execute("begin immediate")  # as the lock is to be waited for now, and not in the middle
                return work(db)

        is_long, began, writer = self.wal_size() > self._wal_limit, time.perf_counter(), self._writer
        self._little += is_little
        is_allowed = is_little and self._little % IN_A_ROW and began >= self._not_here_until and not is_long
        if is_allowed and writer.is_used.acquire(blocking=False):
            try:
                return writer.run_here(in_transaction)
            except DATABASE_ERRORS as error:
                if code_of(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
                    raise database_problem(error) from error
            finally:
                writer.is_used.release()
                if (took := time.perf_counter() - began) > QUICK:
                    self._not_here_until = began + PAUSE * took
        answer = await self.maintain(in_transaction)
        if is_long:
            await self.maintain(self._limit_wal)
        return answer

    async def maintain(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run it on the writing connection, between two transactions; only here that waits for locks."""

        def patiently(db: sqlite3.Connection) -> T:
            db.execute(f"pragma busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
            db.execute(f"pragma wal_autocheckpoint = {CHECKPOINT_PAGES}")
            try:
                return with_room(work, db)
            finally:
                db.execute("pragma busy_timeout = 0")
                db.execute("pragma wal_autocheckpoint = 0")

        return await self._writer.run(patiently)

    def wal_size(self) -> int:
        """Raises Unavailable: SQLite itself would go on writing to files that nobody can open any more."""
        with contextlib.suppress(FileNotFoundError):
            wal = os.stat(self.wal)
            if (os.stat(self.path).st_ino, wal.st_ino) == self._inodes:
                return wal.st_size
        raise Unavailable(f"{self.path.name} or its WAL was deleted or replaced; restart the service.")

    def _limit_wal(self, db: sqlite3.Connection) -> None:
        """Readers that always overlap would keep the WAL growing, and one of another process may stay for long."""
        try:
            self._wal_limit = WAL_BYTES if checkpoint(db) else self.wal_size() + WAL_BYTES
        except sqlite3.Error as error:
            log.warning("checkpoint failed, and will be tried again: %s", error)  # what is committed stays so

    async def probe(self) -> None:
        """By a pragma, as SQLite writes no page for an update that changes nothing."""
        await self.change(lambda db: db.execute(f"pragma user_version = {SCHEMA_VERSION}"))

    # Reading

    async def read(self, work: Callable[[sqlite3.Connection], T], heavy: bool = False) -> T:
        """Run it in one snapshot; what is ``heavy`` does not hold up what is not. Raises Problem."""

        def in_snapshot(db: sqlite3.Connection) -> T:
            with db:
                db.execute("begin")
                return work(db)

        return await self.readers[heavy].run(in_snapshot)

    @reads
    def find(self, db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> State:
        return row_of(db, thread_id, message_id)

    @reads
    def page(
        self, db: sqlite3.Connection, thread_id: str, message_id: str | None, after: int, limit: int
    ) -> tuple[State, Page]:
        found = row_of(db, thread_id, message_id)
        last_seq = found.last_seq if message_id is None else found.last or 0
        rows = db.execute(
            "select seq, message, event, content, timestamp, last from entries"
            " where thread = ?1 and seq between ?2 and ?3 and last >= ?2 and first <= ?3"
            " and (?4 is null or message = ?4) order by last",
            (found.thread, after + 1, last_seq, found.message),
        )
        messages: dict[int, tuple[str, Status, str | None] | None] = {}  # a join would open every pack
        entries: list[Entry] = []
        size, is_full = 0, False
        for seq, message, event, content, timestamp, _ in rows:
            if message not in messages:
                of_it = "select message_id, status, reason from messages where message = ?"
                messages[message] = db.execute(of_it, (message,)).fetchone()
            if (known := messages[message]) is None:
                continue  # deleted by hand, before its text was deleted with it
            is_end = content is None
            entries.append(MessageEnd(*known, seq) if is_end else StoredChunk(content, timestamp, known[0], seq, event))
            size += len(content or "")
            if is_full := size >= PAGE_BYTES or len(entries) == limit:
                break
        return found, Page(found.generation, entries[-1].seq if is_full else found.last_seq, entries, size)

    @reads_much
    def text(self, db: sqlite3.Connection, thread_id: str, message_id: str | None, index: int = 0) -> tuple[State, str]:
        found = existing(db, thread_id, message_id)
        if message_id is not None:
            return found, text_of(db, found, min(index, found.chunk_count)).decode()
        names = db.execute("select message_id from messages where thread = ? order by message", (found.thread,))
        return found, b"".join([text_of(db, row_of(db, thread_id, name)) for (name,) in names.fetchall()]).decode()

    @reads_much
    def match(self, db: sqlite3.Connection, thread_id: str, message_id: str, known_content: str) -> Place:
        """Looked for from the end, as whoever resumes has nearly all of it mostly."""
        found = existing(db, thread_id, message_id)
        text = text_of(db, found)
        offset = bytes_known(known_content.encode(), text)
        begin = Place(thread_id, message_id, found.generation, found.before, reset=offset is None)
        if not offset:
            return begin
        before, sizes = len(text), "seq, length(cast(content as blob)), last"
        for seq, size, _ in db.execute(f"select {sizes} {OF_MESSAGE} order by last desc, seq desc", found.places):
            before -= size
            if before < offset:
                is_whole = before + size == offset
                after, skip = (seq, 0) if is_whole else (seq - 1, offset - before)
                return msgspec.structs.replace(begin, after=after, skip=skip)
        return begin

    @reads
    def status(self, db: sqlite3.Connection, thread_id: str, limit: int, after: int) -> ThreadStatus:
        found = existing(db, thread_id)
        messages = db.execute(
            "select message_id, status, reason, chunk_count, first_seq, last_seq, created_at, updated_at"
            " from messages where thread = ? order by message limit ? offset ?",
            (found.thread, limit + 1, after),
        ).fetchall()
        ((_, _, *summary),) = db.execute("select * from thread_summary where thread = ?", (found.thread,))
        return ThreadStatus(
            **msgspec.structs.asdict(ThreadSummary(*summary)),
            cursor=found.cursor,
            messages=[MessageStatus(*message) for message in messages[:limit]],
            messages_cursor=str(after + limit) if len(messages) > limit else None,
        )

    @reads_much
    def threads(
        self,
        db: sqlite3.Connection,
        status: Status | None,
        limit: int,
        before: int | None,
        covered: Sequence[str] | None,
    ) -> ThreadPage:
        """By generation, which is a time: a number would tell how many threads were ever made."""
        where = "(?1 is null or generation < ?1) and (?2 is null or status = ?2)"
        if status in ("active", "aborted"):  # which few are
            where += " and thread in (select thread from messages where status = ?2)"
        if covered is not None:
            where += (
                " and thread in (select threads.thread from json_each(?3) as range"
                " cross join threads on threads.thread_id between range.value ->> 0 and range.value ->> 1)"
            )
        ranges = msgspec.json.encode([range_of(pattern) for pattern in covered or ()]).decode()
        rows = db.execute(
            f"select * from thread_summary where {where} order by generation desc limit ?4",
            (before, status, ranges, limit + 1),
        ).fetchall()
        cursor = str(rows[limit - 1][1]) if len(rows) > limit else None
        return ThreadPage([ThreadSummary(*row[2:]) for row in rows[:limit]], cursor)

    @reads
    def measure(self, db: sqlite3.Connection) -> tuple[int, int, int]:
        (active,) = db.execute("select count(*) from messages where status = 'active'").fetchone()
        return self.path.stat().st_size, self.wal.stat().st_size, active

    # Upkeep

    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]:
        if untouched_since < self._refused_ms:
            return []  # their producers may be alive, and were refused
        idle = (
            "select thread_id, message_id from messages cross join threads using (thread)"
            " where status = 'active' and messages.updated_at <= ? and thread_id is not null limit 1000"
        )
        return await self.read(lambda db: db.execute(idle, (untouched_since,)).fetchall(), heavy=True)

    async def expire(self, untouched_since: int) -> int:
        idle = "select thread_id from threads where thread_id is not null and updated_at <= ? limit ?"
        found = await self.read(lambda db: db.execute(idle, (untouched_since, EXPIRED_AT_ONCE)).fetchall(), heavy=True)
        clearing = [self.write(Clear(thread_id, untouched_since)) for (thread_id,) in found]
        outcomes = await asyncio.gather(*clearing, return_exceptions=True)  # some were touched in the meantime
        return sum(isinstance(outcome, Change) for outcome in outcomes)

    async def erase(self) -> bool:
        """By SQLite's own means: deleted bytes are overwritten (secure_delete), free pages given back, the WAL emptied.

        Where another process reads, its snapshot keeps the WAL: wait a while, then leave it for later.
        """
        give_up = asyncio.get_running_loop().time() + BUSY_TIMEOUT
        nameless = "exists (select 1 from threads where thread_id is null)"
        async with self._erasure:
            if await self.read(lambda db: db.execute(f"select owed or {nameless} from clock").fetchone()) == (0,):
                return True  # whoever had its turn before has erased it
            while await self.change(erase_some):
                await self.room()
            await self.shrink()
            while not await self.maintain(checkpoint):
                if asyncio.get_running_loop().time() >= give_up:
                    return False
                await asyncio.sleep(ERASE_PAUSE)
            for step in self.erasing:
                if not await step():
                    return False
            await self.change(lambda db: db.execute(f"update clock set owed = {nameless}"))
            return True

    async def shrink(self) -> None:
        while await self.maintain(shrink):
            await self.room()

    async def upkeep(self) -> None:
        for chore in self.chores:
            await chore()

    # Other processes

    def watch(self, thread_ids: AbstractSet[str]) -> None:
        self._watched = thread_ids

    async def data_version(self) -> int:
        """Another number each time that another process has written (PRAGMA data_version)."""
        return await self.maintain(lambda db: cast(int, db.execute("pragma data_version").fetchone()[0]))

    async def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]:
        """All of them, as nobody knows where in the file another process has written."""
        while True:
            await asyncio.sleep(max(self.settings.poll_interval, MIN_POLL_INTERVAL))
            latest = await self.data_version() if self._watched else self._version
            if latest != self._version:
                yield set(self._watched)
                self._version = latest  # once it has been taken in


# ---------------------------------------------------------------------------------------------
# What is beside this file
# ---------------------------------------------------------------------------------------------

EXTRAS = (
    *("logs", "tokens", "metrics", "page", "websocket", "uploads", "operate", "copy", "clients", "openapi"),
    *("dialects", "relay", "limits", "express", "packs", "erasure"),
)
KEEPERS = ("packs", "erasure")  # those of them that add to what the SQLite store does
STORES = {"redis": "redis_store", "rediss": "redis_store", "unix": "redis_store"}  # by the scheme of their address


def found_extras(names: Sequence[str] = EXTRAS) -> Iterator[ModuleType]:
    """Those that are beside this file; each has some of ``mount``, ``add_commands``, ``set_up`` and ``keep``."""
    for name in names:
        try:
            yield importlib.import_module(f"resume_stream.extras.{name}")
        except ModuleNotFoundError as error:
            if error.name not in ("resume_stream.extras", f"resume_stream.extras.{name}"):
                raise


def store_for(settings: Settings) -> Store:
    """Where threads are kept: the SQLite file, or what ``--store`` names. Raises StartupError."""
    scheme, found, _ = settings.store.partition("://")
    if not settings.store:
        kept = SQLiteStore(settings)
        for extra in found_extras(KEEPERS):
            extra.keep(kept)
        return kept
    if not found or scheme not in STORES:
        raise StartupError(f"--store is no address of a store; it begins with {', '.join(STORES)}, and then ://")
    try:
        extra = importlib.import_module(f"resume_stream.extras.{STORES[scheme]}")
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--store {scheme}:// needs {error.name}, which is not here; pip install 'resume-stream[redis]'"
        ) from error
    store: Store = extra.store_for(settings)
    return store


# ---------------------------------------------------------------------------------------------
# The buffer
# ---------------------------------------------------------------------------------------------

CLOCK_STEP_MS = 2_000  # more than a clock drifts between two looks
RETRY_PAUSE, RETRY_PAUSE_MOST = 0.05, 1.0  # seconds between two tries of what the store refuses for now
AHEAD = 32  # pieces that a source may be ahead of what is committed of it
CUT = 0.0  # the moment, by the loop's clock, to which an upload is cut short
LONG_TEXT = 1024**2  # bytes, past which a text is read in pieces
LIVE_BYTES = 1024**2  # of a thread's newest pages, kept while somebody follows it
ALL_LIVE_BYTES = 32 * 1024**2  # of all threads
HELD_BYTES = 32 * 1024**2  # of bodies that are still coming in, or to be sent on
CALLED_AT_ONCE = 4  # readers of a thread, in one turn of the loop
MUCH_TO_SEND = LIVE_BYTES // 4  # for which all are called at once, or it would be let go before they are
JOINED = 4  # what readers at as many different places have before them, kept for those who are at the same


class Listener:
    """Who wants to know what happens in a buffer, for instance to count it."""

    def resumed(self, kind: str, place: Place) -> None: ...

    def committed(self, changes: Sequence[Change], seconds: float) -> None: ...

    def delivered(self, page: Page) -> None: ...

    def sent(self, size: int) -> None: ...

    def relayed(self, upstream: str, outcome: str) -> None: ...

    def expired(self, threads: int) -> None: ...


class Live:
    """About how many bytes the live ends of all threads take together."""

    total = 0


class Tail:
    """The live end of one thread, from its making to its clearing: what those who follow it share.

    ``generation`` is 0 until the thread is made, ``last_seq`` None until it is known.
    """

    def __init__(self, generation: int, live: Live) -> None:
        self.generation = generation
        self.last_seq: int | None = None
        self.doubts = 0
        self.version = 0
        self.active = True
        self.gone = False
        self.users = 0
        self.followers = 0  # of the users, those who read
        self.uploads: dict[asyncio.Timeout, str] = {}  # of which message, if that can still end
        self._pages: dict[int, Page] = {}  # by the place of their first entry
        self._cost = 0  # of these, about how many bytes they take
        self._live = live
        self._joined: dict[tuple[int, str | None], tuple[int, Page | None]] = {}  # since the newest page came
        self._waiting: dict[Callable[[], None], None] = {}
        self._woken: deque[Callable[[], None]] = deque()
        self._is_calling = False
        self._to_send = 0  # about how many bytes came since the last of them was called

    def learn(self, state: State) -> None:
        """Take what a reader found, if it is newer: a change may have been told of since that takes no place."""
        if self.last_seq is None or state.order > (self.last_seq, self.version):
            self._set(state)

    def take(self, change: Change, asked: float | None) -> None:
        state = change.state
        if self.last_seq is None or state.order >= (self.last_seq, self.version):
            self._set(state)
        if self.followers and (entries := change.entries()):
            self._keep(Page(state.generation, state.last_seq, entries, change.size, asked))
        if change.ended:
            self.cut(change.message_id)
        self.wake()

    def doubt(self) -> None:
        """Another process may have changed anything: whoever follows looks anew, and learns it."""
        self.forget()
        self.last_seq = None
        self.doubts += 1
        self.wake()

    def retire(self) -> None:
        self.gone = True
        self.forget()
        self.cut()
        self.wake()

    def knows_more_than(self, found: State) -> bool:
        """Whether something has been told of since a state was read."""
        is_same = not self.gone and self.generation == found.generation and self.last_seq is not None
        return is_same and found.order < (self.last_seq or 0, self.version)

    def may_have_more(self, seq: int) -> bool:
        return self.last_seq is None or seq < self.last_seq

    def after(self, seq: int, message_id: str | None) -> tuple[int, Page | None] | None:
        """All that is here, joined once for all who have as much: up to where, and what of it is the message's."""
        if (known := self._joined.get((seq, message_id))) is None and seq + 1 in self._pages:
            pages, last_seq = [], seq
            while page := self._pages.get(last_seq + 1):
                pages.append(page)
                last_seq = page.last_seq
            if len(self._joined) >= JOINED:
                self._joined.clear()
            known = self._joined[seq, message_id] = (last_seq, page_for(message_id, pages))
        return known

    def forget(self) -> None:
        self._pages.clear()
        self._joined.clear()
        self._weigh(-self._cost)

    def cut(self, message_id: str | None = None) -> None:
        """Interrupt the uploads of one message, or all of them."""
        for upload, name in self.uploads.items():
            if message_id in (None, name) and not upload.expired():
                upload.reschedule(CUT)

    def call_once(self, call: Callable[[], None]) -> None:
        """When something happens next."""
        self._waiting[call] = None

    def call_off(self, call: Callable[[], None]) -> None:
        self._waiting.pop(call, None)

    def wake(self) -> None:
        """Call all who wait, a few in a turn of the loop: what producers send in between then goes out with it."""
        self._woken.extend(self._waiting)
        self._waiting.clear()
        if self._woken and not self._is_calling:
            self._is_calling = True
            asyncio.get_running_loop().call_soon(self._call_some)

    def _call_some(self) -> None:
        count = len(self._woken)
        try:
            for _ in range(count if self._to_send > MUCH_TO_SEND else min(CALLED_AT_ONCE, count)):
                self._woken.popleft()()
        finally:
            self._is_calling = bool(self._woken)
            if self._is_calling:
                asyncio.get_running_loop().call_soon(self._call_some)
            else:
                self._joined.clear()
                self._to_send = 0

    async def wait(self, until: float) -> None:
        """Until something happens, or the loop's clock shows ``until``."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        timer = None if until == math.inf else loop.call_at(until, wake_up, waiting)
        call = partial(wake_up, waiting)
        self.call_once(call)
        try:
            await waiting
        finally:
            self.call_off(call)
            if timer is not None:
                timer.cancel()

    def _set(self, state: State) -> None:
        self.generation, self.active = state.generation, state.active
        self.last_seq, self.version = state.order

    def _keep(self, page: Page) -> None:
        """The newest stays, whatever its size: all who follow are about to be sent it."""
        self._joined.clear()
        self._pages[page.entries[0].seq] = page
        self._to_send += page.cost
        self._weigh(page.cost)
        while self._cost > LIVE_BYTES and len(self._pages) > 1:
            self._weigh(-self._pages.pop(next(iter(self._pages))).cost)

    def _weigh(self, cost: int) -> None:
        self._cost += cost
        self._live.total += cost


def wake_up(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class Step(enum.Enum):
    """What there is to do for a reader that is to be sent nothing: load, wait, or leave it."""

    LOAD = "load"
    WAIT = "wait"
    END = "end"


class Reader:
    """One who follows, and is counted while it is there: what it is to be sent next, by whatever sends it.

    Times are seconds, by default those of the settings; 0 turns ``idle_timeout`` and ``heartbeat``
    off; ``expires`` is in seconds since 1970. ``due`` is when, by the loop's clock, a reader that
    waits is to be told that it does. It has a ``place`` once it begins, and a ``tail`` while it is
    attached (see ChunkBuffer.attached).
    """

    __slots__ = (
        *("__weakref__", "_beat", "_buffer", "_expires", "_has_page", "_heartbeat", "_idle", "_idle_timeout"),
        *("_is_told", "_loaded", "_now", "_reset", "_skip", "place", "seq", "tail"),
    )

    def __init__(
        self,
        buffer: ChunkBuffer,
        idle_timeout: float | None = None,
        heartbeat: float | None = None,
        expires: float = math.inf,
    ) -> None:
        settings = buffer.settings
        self._buffer = buffer
        self.tail: Tail
        self._loaded: Page | None = None
        self._has_page = self._is_told = False
        self._idle = self._beat = math.inf
        self._idle_timeout = (settings.idle_timeout if idle_timeout is None else idle_timeout) or math.inf
        self._heartbeat = (settings.heartbeat if heartbeat is None else heartbeat) or math.inf
        self._now = asyncio.get_running_loop().time
        self._expires = self._now() + expires - time.time()

    def begin(self, place: Place) -> None:
        """Follow from this place on."""
        self.place = place
        self.seq, self._skip, self._reset = place.after, place.skip, place.reset
        self._got_something()

    @property
    def due(self) -> float:
        return min(self._expires, self._idle, self._beat)

    def load(self, page: Page) -> None:
        """Take what the store has, to be sent with the next step."""
        self._loaded = page

    def step(self) -> Page | Signal | Step:
        """What it is to be sent now; when it is asked for the next, that has been taken off its hands."""
        if self._has_page:
            self._got_something()
        tail, place = self.tail, self.place
        if self._reset:
            self._reset = False
            return Signal.RESET
        while not (self._is_told or self._buffer.stopping or tail.gone):
            if tail.may_have_more(self.seq) and self._now() < self._expires:
                if (found := self._next()) is None:
                    return Step.LOAD
                self.seq, page = found
                if page is not None:
                    self._has_page, self._is_told = True, place.ends_with(page)
                    return self._less_skipped(page)
            elif place.ends_where(tail.active) and not tail.may_have_more(self.seq):
                return Step.END
            else:
                return self._signal()
        if tail.gone and not self._is_told:
            self._is_told = True
            return Signal.GONE
        return Step.END

    def _next(self) -> tuple[int, Page | None] | None:
        if (page := self._loaded) is not None:
            self._loaded = None
            return page.last_seq, page_for(self.place.message_id, [page])
        return self.tail.after(self.seq, self.place.message_id)

    def _signal(self) -> Signal | Step:
        when, signal = min(
            (self._expires, Signal.EXPIRED),
            (self._idle, Signal.TIMEOUT),
            (self._beat, Signal.HEARTBEAT),
            key=itemgetter(0),
        )
        if when > self._now():
            return Step.WAIT
        if signal is Signal.HEARTBEAT:
            self._beat = self._now() + self._heartbeat
        else:
            self._is_told = True
        return signal

    def _got_something(self) -> None:
        self._has_page = False
        now = self._now()
        self._idle, self._beat = now + self._idle_timeout, now + self._heartbeat

    def _less_skipped(self, page: Page) -> Page:
        skip, self._skip = self._skip, 0
        chunk = page.entries[0]
        if not (skip and isinstance(chunk, StoredChunk)):
            return page
        rest = msgspec.structs.replace(chunk, content=chunk.content.encode()[skip:].decode())
        return Page(page.generation, page.last_seq, [rest, *page.entries[1:]])


def checked_id(kind: str, text: str) -> str:
    """The id, of 1 to 200 characters, no ``/`` and no control character. Raises BadRequest."""
    if not 1 <= len(text) <= MAX_NAME or "/" in text or CONTROL_CHARACTER.search(text):
        raise BadRequest(
            f"{text!r:.80} cannot be a {kind}; use 1 to {MAX_NAME} characters, no '/' and no control characters."
        )
    utf8_size(text)
    return text


def check_ids(thread_id: str, message_id: str | None = None) -> None:
    checked_id("thread_id", thread_id)
    if message_id is not None:
        checked_id("message_id", message_id)


def utf8_size(text: str) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidContent(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}), which is not valid Unicode;"
            " send both halves of the pair in one chunk."
        ) from error


def is_reserved(event: str) -> bool:
    return event in RESERVED_EVENTS or event.startswith(RELAYED)


def check_event(event: str) -> None:
    if not 1 <= len(event) <= MAX_NAME or CONTROL_CHARACTER.search(event) or is_reserved(event):
        raise InvalidContent(
            f"{event!r:.80} cannot be an event; use 1 to {MAX_NAME} characters, no control characters, and none of"
            f" the service's own names ({', '.join(sorted(RESERVED_EVENTS))})."
        )
    utf8_size(event)


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{name}={value} is out of range; it goes from {low:g} to {high:g}.")


def list_place(cursor: str | None) -> int | None:
    """Where a page of a list ended. Raises BadRequest."""
    if cursor is None:
        return None
    if not re.fullmatch(r"\d{1,18}", cursor, re.ASCII):
        raise BadRequest(f"{cursor!r:.80} is not a cursor of this list; send the one that its last page gave.")
    return int(cursor)


def checked_sizes(chunks: Sequence[Chunk], max_chunk: int) -> tuple[list[int], Problem | None]:
    """The bytes of each chunk, up to the first that is refused, and why it is."""
    sizes: list[int] = []
    try:
        for chunk in chunks:
            if chunk.event is not None:
                check_event(chunk.event)
            if (size := utf8_size(chunk.content)) > max_chunk:
                raise TooLarge(f"A chunk has {size} bytes, over max_chunk ({max_chunk}); send it in parts.")
            sizes.append(size)
    except Problem as problem:
        return sizes, problem
    return sizes, None


class ChunkBuffer:
    """Keeps what agents stream, and lets readers carry on from where they stopped.

    An asynchronous context manager: entering it opens the store, leaving it commits what is
    waiting and closes it. All methods belong to the event loop it was entered in. Errors are
    subclasses of Problem, whose ``status_code`` is that of the HTTP answer. ``store`` is where
    the threads are kept: by default what the settings name.
    """

    def __init__(self, settings: Settings | None = None, store: Store | None = None) -> None:
        self.settings = settings = settings or Settings()
        self.listener = Listener()
        self.stopping = False
        self._threads: Store = store or store_for(settings)
        self._entered = False
        self._tails: dict[str, Tail] = {}
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()  # gone with their streams, be they read or not
        self._live = Live()
        self._held = 0  # bytes of bodies that are still coming in, or to be sent on
        self._erasure_owed = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises StartupError where the store cannot be served."""
        await self._threads.open(self._take)
        self._entered = True
        self._started_ms = now_ms()
        self._clock_offset, self._clock_set_ms = now_ms() - ms_since_boot(), 0
        for work in (self._watch_other_processes, self._clean_up_forever, self._abort_idle_messages_forever):
            self.begin(work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    def stop(self) -> None:
        """End every stream now, without an end event, so that clients reconnect elsewhere or later."""
        self.stopping = True
        self._store.stop()
        for tail in self._tails.values():
            tail.cut()
            tail.wake()

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def _store(self) -> Store:
        """Raises NotEntered, as what is asked of a store that is not open would never be answered."""
        if not self._entered:
            raise NotEntered
        return self._threads

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """What goes on by itself, until the buffer is left."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Producers

    async def room(self) -> None:
        """Wait until less than the limit is waiting to be committed. Raises Unavailable."""
        await self._store.room()
        if self.stopping:
            raise Stopping

    @property
    def has_room(self) -> bool:
        """Whether ``room`` would neither wait nor raise."""
        return not self.stopping and self._store.has_room

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Yields a function to call with the bytes that one holds of what is still coming in, or to be sent on.

        It raises Unavailable where all together would hold over 32 MiB.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            self._held += size - held
            held = size
            if self._held > HELD_BYTES:
                raise Unavailable("Too much is being sent at the same time; try again, or send it in smaller parts.")

        try:
            yield hold
        finally:
            self._held -= held

    async def open_message(self, thread_id: str, message_id: str) -> tuple[Appended, bool]:
        """Open a message before its first chunk, so that readers can wait for it.

        The second value is whether it is new; a message that is there already counts the call as
        a sign of life. Raises BadRequest for an id that cannot be one.
        """
        check_ids(thread_id, message_id)
        await self.room()
        change = await self._store.write(Open(thread_id, message_id))
        return change.answer, change.made

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
        await self.room()
        return (await self.append(append)).answer

    def checked_append(
        self, thread_id: str, message_id: str, chunks: Sequence[Chunk] = (), *, index: int | None, complete: bool
    ) -> Append:
        """The append, if its ids, its index, and the events, sizes and text of its chunks are good."""
        check_ids(thread_id, message_id)
        if index is not None and not 0 <= index < 2**63:
            raise BadRequest(f"index={index} cannot be; it is the number of the first chunk in its message, from 0.")
        if len(chunks) > MAX_CHUNKS:
            raise too_many_chunks()
        sizes, refusal = checked_sizes(chunks, self.settings.max_chunk)
        if refusal is not None:
            raise refusal
        return Append(thread_id, message_id, chunks, sizes, index, complete)

    def append(self, append: Append) -> Awaitable[Change]:
        """What was checked, right behind what was asked for before; the caller has waited for ``room``."""
        return self._store.write(append)

    async def complete_message(self, thread_id: str, message_id: str) -> Appended:
        """End a message; again: the same answer. Raises NotFound; Conflict if it was aborted."""
        check_ids(thread_id, message_id)
        await self.room()
        return (await self._store.write(End(thread_id, message_id, "completed"))).answer

    async def abort_message(self, thread_id: str, message_id: str, reason: str | None = None) -> Appended:
        """Abort a message, from either side; again: the same answer.

        ``reason`` has up to 1,000 characters. Raises NotFound; Conflict if it is completed; TooLarge.
        """
        check_ids(thread_id, message_id)
        if reason is not None:
            utf8_size(reason)
            if len(reason) > MAX_REASON:
                raise TooLarge(f"The reason has {len(reason)} characters; say it in {MAX_REASON} or fewer.")
        await self.room()
        return (await self._store.write(End(thread_id, message_id, "aborted", reason))).answer

    async def clear_thread_buffer(self, thread_id: str) -> None:
        """Forget a thread; returns once its text is in neither the database nor the WAL.

        Raises NotFound.
        """
        check_ids(thread_id)
        await self.room()
        await self._store.write(Clear(thread_id))
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

        Raises Conflict where the message has ended or has chunks already; then nothing is asked of
        ``source``, which is closed.
        """
        opened, _ = await self.open_message(thread_id, message_id)
        if opened.status != "active" or opened.chunk_count:
            await close(source)
            found = await self._store.find(thread_id, message_id)
            raise message_ended(message_id, found) if found.ended else has_chunks(message_id, found)
        place = await self.locate(thread_id, message_id, after=str(opened.seq))
        recording = self.record(thread_id, message_id, source, index=opened.chunk_count)
        # Not limited to max_readers, as an agent's stream is no reader's.
        items = self.follow(place, idle_timeout=0, heartbeat=1, limited=False)
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Page):
                    for entry in item.entries:
                        if isinstance(entry, StoredChunk):
                            yield (Chunk(entry.content, entry.event) if entry.event else entry.content)
                elif recording.done():
                    break  # it failed, and could not even abort the message
        await asyncio.wait([recording])
        if recording.cancelled():
            raise Stopping
        recording.result()

    def record(
        self, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk], *, index: int = 0
    ) -> asyncio.Task[None]:
        """Store what ``source`` yields, by itself, whoever comes or goes, until the buffer is left.

        All that it has yielded while the last commit was under way is one append; it is at most 32
        pieces ahead. ``index`` is the number of its first piece in the message. What hinders the store
        (a lock, a full disk) is waited for, for up to ``producer_timeout``. The message is completed
        when ``source`` ends; when it fails the message is aborted, with the error's ``reason``, or else
        its name, as the reason, and the task raises the error. When the message is ended from outside
        the task ends. ``source`` is closed in any case.
        """
        return self.begin(self._record(thread_id, message_id, source, index))

    async def _record(self, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk], index: int) -> None:
        try:
            async with self.while_active(thread_id, message_id) as lift, aclosing(gathered(source, AHEAD)) as batches:
                async for pieces in batches:
                    await self.patiently(partial(self.add_chunks, thread_id, message_id, pieces, index=index))
                    index += len(pieces)
                lift()
                await self.patiently(partial(self.complete_message, thread_id, message_id))
        except Conflict as error:
            log.info("recording stopped: %s", error.detail)
        except Exception as error:
            with contextlib.suppress(Problem):  # the error itself is what is to be seen
                await self.abort_message(thread_id, message_id, getattr(error, "reason", type(error).__name__))
            raise

    async def patiently(self, write: Callable[[], Awaitable[T]]) -> T:
        """A write that can be asked for again, until what hinders the store has passed."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + (self.settings.producer_timeout or math.inf)
        pause = RETRY_PAUSE
        while True:
            try:
                return await write()
            except (Unavailable, DatabaseFull):
                if self.stopping or loop.time() + pause > give_up:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_PAUSE_MOST)

    @contextlib.asynccontextmanager
    async def while_active(
        self, thread_id: str, message_id: str, expires: float = math.inf
    ) -> AsyncIterator[Callable[[], Any]]:
        """Cut the block short as soon as the message is ended by anyone, or the service stops.

        Also at ``expires`` (seconds since 1970). Yields a function that lifts the watch, for the
        one who ends the message itself. Raises Conflict, Unavailable or Unauthorized: why.
        """
        upload = asyncio.timeout(None if expires == math.inf else expires - time.time())
        with self._attached(thread_id) as tail:
            had_ended = await self._has_ended(tail, thread_id, message_id)
            # What has ended before is not ended by anyone now; a retry of its last upload is answered as before.
            tail.uploads[upload] = "" if had_ended else message_id
            lift = partial(tail.uploads.pop, upload, None)
            try:
                async with upload:
                    yield lift
            except TimeoutError:
                if not upload.expired():
                    raise
                raise (
                    await self._why_cut(thread_id, message_id) if upload.when() == CUT else token_expired()
                ) from None
            finally:
                lift()

    async def _has_ended(self, tail: Tail, thread_id: str, message_id: str) -> bool:
        """As of all that was told of by now. Raises Unavailable."""
        found = await self._store.find(thread_id, message_id)
        while tail.knows_more_than(found):
            found = await self._store.find(thread_id, message_id)
        if self.stopping:
            raise Stopping
        return found.ended

    async def _why_cut(self, thread_id: str, message_id: str) -> Problem:
        if self.stopping:
            return Stopping()
        found = await self._store.find(thread_id, message_id)
        return message_ended(message_id, found) if found.ended else thread_cleared()

    async def stored_text(self, thread_id: str, message_id: str, index: int) -> tuple[str, int]:
        """The text stored from chunk ``index`` on, and the index after it."""
        try:
            found, text = await self._store.text(thread_id, message_id, index)
        except NotFound:
            return "", index
        return text, max(index, found.chunk_count)

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
        stands in its place. ``idle_timeout`` is in seconds, by default that of the settings, which
        alone say how often other processes are looked for, whatever the ``poll_interval``. Ends
        after a MessageEnd, Signal.GONE or Signal.TIMEOUT.

        Raises NotFound, BadRequest (a bad cursor), Unavailable (too many readers).
        """
        if after is not None:
            known_content = None
        place = await self.locate(thread_id, message_id, after=after, known_content=known_content)
        if place.finished:
            return
        items = self.follow(place, idle_timeout=idle_timeout, heartbeat=0)
        async with aclosing(items):
            async for item in items:
                for entry in item.entries if isinstance(item, Page) else [item]:
                    yield entry

    async def get_accumulated_content(self, thread_id: str, message_id: str | None = None) -> AccumulatedContent:
        """The text of a message so far, or of a thread's messages in the order they began.

        Raises NotFound, BadRequest.
        """
        check_ids(thread_id, message_id)
        found, text = await self._store.text(thread_id, message_id)
        return AccumulatedContent(text, found.cursor, found.status or await self._status_of(thread_id, found))

    async def _status_of(self, thread_id: str, found: State) -> Status:
        """Of a thread, for one who has all of it that was found."""
        if found.active:
            return "active"
        whole = await self._store.status(thread_id, 1, 0)
        return whole.status if whole.cursor == found.cursor else "active"

    async def get_long_content(
        self, thread_id: str, message_id: str | None = None
    ) -> tuple[AccumulatedContent, AsyncGenerator[str, None]] | None:
        """The same where the text is over 1 MiB: without it, and it in pieces; None where it is not.

        Raises NotFound, BadRequest. The generator raises BrokenOff where the thread is cleared meanwhile.
        """
        check_ids(thread_id, message_id)
        whole = await self._store.status(thread_id, 1, 0)
        size, status = whole.size, whole.status
        if message_id is not None:
            found = await self._store.find(thread_id, message_id)
            if found.status is None:
                raise no_message(thread_id, message_id)
            size, status = found.size, found.status
        if size <= LONG_TEXT:
            return None
        pieces = self._content_pieces(thread_id, message_id, Cursor.parse(whole.cursor))
        return AccumulatedContent("", whole.cursor, status), pieces

    async def _content_pieces(self, thread_id: str, message_id: str | None, up_to: Cursor) -> AsyncGenerator[str, None]:
        messages: list[str] = [] if message_id is None else [message_id]
        places: int | None = 0 if message_id is None else None
        while messages or places is not None:
            if not messages:
                status = await self._store.status(thread_id, MESSAGES, cast(int, places))
                messages = [message.message_id for message in status.messages]
                places = list_place(status.messages_cursor)
                continue
            name, seq = messages.pop(0), 0
            while seq < up_to.seq:
                found, page = await self._store.page(thread_id, name, seq, PAGE_ROWS)
                if found.generation != up_to.generation:
                    raise BrokenOff
                seq = page.last_seq
                yield "".join(e.content for e in page.entries if isinstance(e, StoredChunk) and e.seq <= up_to.seq)

    async def get_thread_status(self, thread_id: str, limit: int = MESSAGES, cursor: str | None = None) -> ThreadStatus:
        """A thread with up to ``limit`` (1 to 1,000) of its messages, those after ``cursor``.

        Raises NotFound, BadRequest.
        """
        check_ids(thread_id)
        check_range("limit", limit, 1, MESSAGES)
        return self._with_readers(await self._store.status(thread_id, limit, list_place(cursor) or 0))

    async def get_threads(
        self,
        status: Status | None = None,
        limit: int = 100,
        cursor: str | None = None,
        covered: Sequence[str] | None = None,
    ) -> ThreadPage:
        """Up to ``limit`` (1 to 1000) threads, the newest first, of one status or of any.

        ``covered`` leaves only those whose id it has, itself or as a ``prefix*``. Raises BadRequest.
        """
        check_range("limit", limit, 1, 1000)
        page = await self._store.threads(status, limit, list_place(cursor), covered)
        return ThreadPage([self._with_readers(thread) for thread in page.threads], page.cursor)

    def _with_readers(self, thread: S) -> S:
        tail = self._tails.get(thread.thread_id)
        return msgspec.structs.replace(thread, readers=tail.followers if tail else 0)

    async def get_active_threads(self, limit: int = 100, cursor: str | None = None) -> ThreadPage:
        """The threads of which a message is active. Raises BadRequest."""
        return await self.get_threads("active", limit, cursor)

    async def get_active_message(self, thread_id: str) -> str | None:
        """The thread's active message, the one that began last; None where there is none. Raises BadRequest."""
        check_ids(thread_id)
        with contextlib.suppress(NotFound):
            first = (await self._store.status(thread_id, 1, 0)).message_count
            while first > 0:
                first = max(first - MESSAGES, 0)
                status = await self._store.status(thread_id, MESSAGES, first)
                if active := [message.message_id for message in status.messages if message.status == "active"]:
                    return active[-1]
        return None

    async def thread_of(self, generation: int) -> str | None:
        """The thread of this generation; None where there is none (any more)."""
        for thread in (await self._store.threads(None, 1, generation + 1, None)).threads:
            if (await self._store.find(thread.thread_id)).generation == generation:
                return thread.thread_id
        return None

    async def page(
        self, thread_id: str, message_id: str | None, after: int = 0, limit: int = PAGE_ROWS
    ) -> tuple[State, Page]:
        """Up to ``limit`` entries after a place, for one who is no reader, and the state they belong to."""
        check_ids(thread_id, message_id)
        return await self._store.page(thread_id, message_id, after, limit)

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
        check_range("limit", limit, 1, 10_000)
        check_range("wait", wait, 0, 300)
        place = await self.locate(thread_id, message_id, after=after)
        if place.reset:
            raise cursor_gone()
        page = await self._chunk_page(place, limit)
        if not wait or place.finished or page.chunks or page.ends:
            return page
        async with aclosing(self.follow(place, idle_timeout=wait, heartbeat=0, expires=expires)) as items:
            await anext(items, None)
        if time.time() >= expires:
            raise token_expired()
        return await self._chunk_page(place, limit)

    async def _chunk_page(self, place: Place, limit: int) -> ChunkPage:
        found, page = await self._store.page(place.thread_id, place.message_id, place.after, limit)
        if found.generation != place.generation:
            raise no_thread(place.thread_id)
        status: Status = "active"
        if place.message_id is None:
            status = await self._status_of(place.thread_id, found) if found.last_seq == page.last_seq else "active"
        elif found.ended and cast(int, found.last) <= page.last_seq:
            status = cast(Status, found.status)
        return ChunkPage(
            [entry for entry in page.entries if isinstance(entry, StoredChunk)],
            [entry for entry in page.entries if isinstance(entry, MessageEnd)],
            str(Cursor(page.last_seq, page.generation)),
            status,
        )

    async def locate(
        self,
        thread_id: str,
        message_id: str | None = None,
        *,
        after: str | int | None = None,
        known_content: str | None = None,
        follow: bool = False,
    ) -> Place:
        """Where a reader begins who has all up to this cursor, or this text of the message, or nothing.

        With ``follow`` it waits for what is not made yet. Raises NotFound (without ``follow``),
        BadRequest and InvalidContent.
        """
        check_ids(thread_id, message_id)
        if known_content is not None:
            if message_id is None:
                raise BadRequest("known_content is the text of one message; say which, by its message_id.")
            utf8_size(known_content)
            kind, place = "content", await self._store.match(thread_id, message_id, known_content)
        else:
            cursor = None if after is None else Cursor.parse(str(after))
            kind = "start" if cursor is None else "cursor"
            place = place_of(await self._store.find(thread_id, message_id), thread_id, message_id, cursor, follow)
        self.listener.resumed(kind, place)
        return place

    def seat(
        self,
        *,
        idle_timeout: float | None = None,
        heartbeat: float | None = None,
        expires: float = math.inf,
        limited: bool = True,
    ) -> Reader:
        """A place among those who follow, taken before any work is done for them. Times are as for a Reader.

        It is free again once the reader is gone. Raises Unavailable if there are ``max_readers``
        already, unless it is not ``limited``.
        """
        if self.stopping:
            raise Stopping
        if limited and self.readers >= self.settings.max_readers:
            raise Unavailable(f"There are {self.readers} readers, as many as max_readers allows; try again later.")
        reader = Reader(self, idle_timeout, heartbeat, expires)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """Free a seat at once, and not only when nothing knows of its reader any more."""
        self._readers.discard(reader)

    def follow(self, place: Place, reader: Reader | None = None, **times: Any) -> AsyncGenerator[Page | Signal, None]:
        """What comes after a place, as it is committed, for one who has a seat, or else gets one as with ``seat``.

        No transaction is open while the consumer has a page.
        """
        reader = reader or self.seat(**times)
        reader.begin(place)
        return self.read(reader)

    async def read(self, reader: Reader) -> AsyncGenerator[Page | Signal, None]:
        with self.attached(reader) as tail:
            while (step := reader.step()) is not Step.END:
                if step is Step.WAIT:
                    await tail.wait(reader.due)
                elif step is Step.LOAD:
                    await self.load(reader)
                else:
                    if isinstance(step, Page):
                        self.listener.delivered(step)
                    yield step

    async def load(self, reader: Reader) -> None:
        """What the store has for it; nothing, if meanwhile its tail is known to be of another thread."""
        tail, place = reader.tail, reader.place
        wanted, doubts = tail.generation, tail.doubts
        found, page = await self._store.page(place.thread_id, place.message_id, reader.seq, PAGE_ROWS)
        if wanted not in (0, found.generation):
            self._retire(place.thread_id, tail)
        elif not tail.gone and tail.generation in (0, found.generation):
            if tail.doubts == doubts:
                tail.learn(found)
            if page.last_seq > reader.seq:
                reader.load(page)

    @contextlib.contextmanager
    def attached(self, reader: Reader) -> Iterator[Tail]:
        place = reader.place
        with self._attached(place.thread_id, place.generation) as tail:
            reader.tail = tail
            tail.followers += 1
            try:
                yield tail
            finally:
                tail.followers -= 1
                if not tail.followers:
                    tail.forget()
                self._readers.discard(reader)

    @contextlib.contextmanager
    def _attached(self, thread_id: str, generation: int = 0) -> Iterator[Tail]:
        """The thread's tail; what other processes do to the thread is noticed in the meantime."""
        tail = self._tail(thread_id, generation)
        tail.users += 1
        if tail.users == 1:
            self._store.watch(self._tails.keys())
        try:
            yield tail
        finally:
            tail.users -= 1
            if not tail.users and self._tails.get(thread_id) is tail:
                del self._tails[thread_id]
                self._store.watch(self._tails.keys())

    def _tail(self, thread_id: str, generation: int) -> Tail:
        """Generations only grow: of two threads under one name, the lower is gone."""
        tail = self._tails.get(thread_id)
        if tail and 0 < tail.generation < generation:
            self._retire(thread_id, tail)
            tail = None
        if tail is None:
            tail = self._tails[thread_id] = Tail(generation, self._live)
        elif generation and not tail.generation:
            tail.generation, tail.last_seq = generation, None
            tail.wake()
        elif generation and tail.generation != generation:
            tail = Tail(generation, self._live)
            tail.retire()
        return tail

    def _retire(self, thread_id: str, tail: Tail) -> None:
        if self._tails.get(thread_id) is tail:
            del self._tails[thread_id]
        tail.retire()

    # What the store and the clock do

    def _take(self, changes: Sequence[tuple[Change, float | None]], seconds: float | None) -> None:
        if seconds is not None:
            self.listener.committed([change for change, _ in changes], seconds)
        for change, asked in changes:
            tail, generation = self._tails.get(change.thread_id), change.state.generation
            if tail is None or (generation < tail.generation):
                continue  # a reader has found the thread that came after it
            if change.cleared or tail.generation not in (0, generation):
                self._retire(change.thread_id, tail)
            else:
                tail.take(change, asked)
        if self._live.total > ALL_LIVE_BYTES:
            for tail in self._tails.values():
                tail.forget()

    async def _watch_other_processes(self) -> None:
        while True:
            with logged_problems("watch other processes"):
                async with aclosing(self._store.changed_elsewhere()) as elsewhere:
                    async for thread_ids in elsewhere:
                        for thread_id, tail in [*self._tails.items()]:
                            if thread_id in thread_ids:
                                await self._doubt(thread_id, tail)

    async def _doubt(self, thread_id: str, tail: Tail) -> None:
        """Whoever reads looks for itself; whoever uploads has to be told of an end."""
        tail.doubt()
        for message_id in {*filter(None, tail.uploads.values())}:
            generation, found = tail.generation, await self._store.find(thread_id, message_id)
            if generation not in (0, found.generation):
                self._retire(thread_id, tail)
            elif found.ended:
                tail.cut(message_id)

    async def _clean_up_forever(self) -> None:
        while True:
            with logged_problems("clean up"):
                await self._clean_up()
            interval = self.settings.cleanup_interval
            await asyncio.sleep(min(interval, BUSY_TIMEOUT) if self._erasure_owed else interval)

    async def _clean_up(self) -> None:
        untouched_since = now_ms() - round(self.settings.ttl * 1000)
        while untouched_since >= self._clock_set_at() and (expired := await self._store.expire(untouched_since)):
            self.listener.expired(expired)
        await self._erase()
        await self._store.upkeep()

    async def _erase(self) -> None:
        self._erasure_owed = True
        self._erasure_owed = not await self._store.erase()

    def _clock_set_at(self) -> int:
        """When the clock was last set, by its own new time (ms); what is older cannot be told apart by age."""
        offset = now_ms() - ms_since_boot()
        if abs(offset - self._clock_offset) > CLOCK_STEP_MS:
            log.warning("the clock was set; nothing expires until its time has passed anew")
            self._clock_offset, self._clock_set_ms = offset, now_ms()
        return self._clock_set_ms

    async def _abort_idle_messages_forever(self) -> None:
        timeout = self.settings.producer_timeout
        while timeout:
            await asyncio.sleep(min(max(timeout / 10, 0.02), 5))
            untouched_since = now_ms() - round(timeout * 1000)
            if untouched_since < max(self._started_ms, self._clock_set_at()):
                continue  # while the service was down nobody could append
            with logged_problems("abort idle messages"):
                for thread_id, message_id in await self._store.idle_messages(untouched_since):
                    with contextlib.suppress(NotFound, Conflict):  # touched or ended in the meantime
                        await self._store.write(
                            End(thread_id, message_id, "aborted", PRODUCER_TIMEOUT, untouched_since)
                        )

    async def check_ready(self) -> None:
        """Raises Unavailable or DatabaseFull unless the store answers and takes writes."""
        if self._probe is None or self._probe.done():  # those who ask at the same time share one answer
            self._probe = asyncio.create_task(self._store.probe())
        await asyncio.shield(self._probe)

    async def measure(self) -> tuple[int, int, int]:
        """Bytes of the database file and of its WAL, and how many messages are active."""
        return await self._store.measure()


def ms_since_boot() -> int:
    """A clock that nobody can set."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


async def gathered(source: AsyncIterable[T], ahead: int) -> AsyncGenerator[list[T], None]:
    """All that a source has yielded since the consumer last asked, of at most ``ahead`` items; closes it."""
    waiting: list[T] = []
    filled, emptied = asyncio.Event(), asyncio.Event()

    async def pull() -> None:
        async for item in source:
            waiting.append(item)
            filled.set()
            if len(waiting) >= ahead:
                emptied.clear()
                await emptied.wait()

    pulling = asyncio.create_task(pull())
    pulling.add_done_callback(lambda _: filled.set())
    try:
        while waiting or not pulling.done():
            await filled.wait()
            filled.clear()
            items = waiting.copy()
            waiting.clear()
            emptied.set()
            if items:
                yield items
        pulling.result()
    finally:
        pulling.cancel()
        await asyncio.wait([pulling])
        if not pulling.cancelled():
            pulling.exception()  # looked at, whether or not anybody is there to be told
        await close(source)


async def close(source: AsyncIterable[Any]) -> None:
    if aclose := getattr(source, "aclose", None):
        await aclose()


def page_for(message_id: str | None, pages: Sequence[Page]) -> Page | None:
    """The pages as the readers of one message, or of all, need them, or None if there is nothing in them for it."""
    parts = [page for page in pages if page.entries and message_id in (None, page.entries[0].message_id)]
    return Page.joined(parts) if parts else None


@contextlib.contextmanager
def logged_problems(task: str) -> Iterator[None]:
    """A periodic task goes on after an error, since its cause may go away."""
    try:
        yield
    except Stopping:
        return
    except Problem as error:
        log.warning("%s failed, and will be tried again: %s", task, error)


# ---------------------------------------------------------------------------------------------
# The wire formats
# ---------------------------------------------------------------------------------------------

encode_json = msgspec.json.Encoder().encode
UNDECODABLE = (msgspec.DecodeError, UnicodeError, RecursionError)  # the last for arrays in arrays in arrays …

RETRY = b"retry: 1000\n"
HEARTBEAT = b": hb\n"  # with no blank line after it: some clients dispatch an empty event for one
SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
LINE_END = re.compile("\r\n|\n|\r")


def problem_document(problem: ProblemDetailsException) -> dict[str, Any]:
    members = problem.extra if isinstance(problem.extra, dict) else {}
    return {"status": problem.status_code, "title": problem.title, "detail": problem.detail, **members}


class ServerSentEvents:
    """Entries and signals as server-sent events (HTML, 9.2), with LF line ends, and JSON as their data.

    Data is on one line, as a line end inside JSON is always escaped, and never missing: browsers
    do not dispatch an event without it (HTML, 9.2.6). Only what has a place has an id.
    """

    def frames(self, page: Page) -> list[bytes]:
        generation = page.generation
        names: dict[str, bytes] = {}
        frames = []
        for entry in page.entries:
            if isinstance(entry, MessageEnd):
                frames.append(b"id: %d-%d\nevent: complete\ndata: %s\n\n" % (generation, entry.seq, encode_json(entry)))
                continue
            if (name := names.get(entry.message_id)) is None:
                name = names[entry.message_id] = encode_json(entry.message_id)
            # What somebody else's stream calls "error" must not be taken for an event of our own.
            named = entry.event is not None and entry.event not in RESERVED_EVENTS
            event = b"event: %s\n" % cast(str, entry.event).encode() if named else b""
            frames.append(
                b'id: %d-%d\n%sdata: {"content":%s,"timestamp":%d,"messageId":%s,"seq":%d}\n\n'
                % (generation, entry.seq, event, encode_json(entry.content), entry.timestamp, name, entry.seq)
            )
        return [b"".join(frames)]

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        if signal is Signal.HEARTBEAT:
            return HEARTBEAT
        return self.event(signal.value, problem_document(problem) if problem else {})

    def event(self, name: str, data: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (name.encode(), encode_json(data))


class RawEvents:
    """Chunks as server-sent events whose data is their content, and nothing of our own besides the id.

    What a client expects that knows only its producer. A line end inside the content divides the
    data into lines, which readers join with LF (HTML, 9.2.6).
    """

    def frames(self, page: Page) -> list[bytes]:
        frames = []
        for entry in page.entries:
            if isinstance(entry, StoredChunk) and not (entry.event or "").startswith(RELAYED):
                event = "" if entry.event is None else f"event: {entry.event}\n"
                data = "\ndata: ".join(LINE_END.split(entry.content))
                frames.append(f"id: {page.generation}-{entry.seq}\n{event}data: {data}\n\n".encode())
        return [b"".join(frames)]

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        return HEARTBEAT if signal is Signal.HEARTBEAT else b""


SERVER_SENT = ServerSentEvents()
RAW = RawEvents()


def word_for(signal: Signal, form: Format) -> bytes:
    if signal is Signal.EXPIRED:
        return form.signal(Signal.ERROR, token_expired())
    return form.signal(signal)


def has_word_for_end(form: Format, completed: bool) -> bool:
    """Otherwise the body has to be broken off, or it would be taken for that of a completed message."""
    return completed or form is not RAW


async def sent(
    items: AsyncGenerator[Page | Signal, None], form: Format, listener: Listener
) -> AsyncGenerator[bytes, None]:
    """What a reader is sent. The first line goes at once, so that headers and bytes flow.

    Raises BrokenOff where the format has no word for an end that is not that of a completed message.
    """
    yield RETRY
    completed = False
    async with aclosing(items):
        try:
            async for item in items:
                if isinstance(item, Page):
                    completed = item.completes
                    frames = b"".join(item.encoded(form))
                    listener.sent(len(frames))
                    yield frames
                else:
                    yield word_for(item, form)
        except Problem as problem:
            yield form.signal(Signal.ERROR, problem)
    if not has_word_for_end(form, completed):
        raise BrokenOff


TAKES_READER = "resume_stream.takes_reader"  # an extension of the ASGI scope, where extras/express.py is in place

CHUNKS = msgspec.json.Decoder(Chunk | list[Chunk])


def chunks_from_json(body: bytes | bytearray) -> list[Chunk]:
    """A chunk, or an array of chunks. Raises InvalidContent and TooLarge."""
    if body.count(b'"content"') > 2 * MAX_CHUNKS:  # a name, or perhaps a value: seen without decoding any
        raise too_many_chunks()
    try:
        chunks = CHUNKS.decode(body)
    except UNDECODABLE as error:
        raise invalid_json(body, error) from error
    return chunks if isinstance(chunks, list) else [chunks]


def invalid_json(text: bytes | bytearray, error: Exception, where: str = "The body") -> InvalidContent:
    if not isinstance(error, msgspec.ValidationError) and re.search(rb"\\u[dD][89a-fA-F]", text):
        return InvalidContent(
            f"{where} has a lone surrogate, which is not valid Unicode; send both halves of the pair in one chunk."
        )
    return InvalidContent(f'{where} is not a chunk like {{"content": "text"}}: {error}.')


# ---------------------------------------------------------------------------------------------
# The routes
# ---------------------------------------------------------------------------------------------

BODY_TIMEOUT = 30  # seconds in which a JSON body has to be there
SMALL_BODY = 16 * 1024  # bytes, of one that has no reason to be larger

READ = frozenset({"read"})
WRITE = frozenset({"write"})
ABORT = frozenset({"abort", "write"})
ADMIN = frozenset({"admin"})
SCOPES = ("read", "write", "abort", "admin")


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


ANYONE = Grant()  # what everybody may do where there is no secret


def granted(connection: ASGIConnection[Any, Any, Any, Any]) -> Grant:
    return cast(Grant, connection.scope.get("auth", ANYONE))


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
    check_range(name, parsed, 0, 86400)
    return parsed


def refused_type(request: Request[Any, Any, Any], kinds: Iterable[str]) -> UnsupportedMediaType:
    kind = request.headers.get("content-type", "no content type")
    return UnsupportedMediaType(
        f"{kind!r:.80} is not what this call takes; send Content-Type: {' or '.join(kinds)} (curl -d says another one"
        " unless -H names it)."
    )


def decode_body(request: Request[Any, Any, Any], body: bytes | bytearray, kind: type[T]) -> T:
    if request.content_type[0] != "application/json":
        raise refused_type(request, ["application/json"])
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


async def whole_body(request: Request[Any, Any, Any], buffer: ChunkBuffer, most: int | None = None) -> bytearray:
    """Up to ``max_body``, or ``most``, bytes, in up to 30 s. Raises TooLarge, TooSlow and Unavailable."""
    limit = buffer.settings.max_body if most is None else min(most, buffer.settings.max_body)
    body = bytearray()
    with answered_early(), buffer.holding() as hold:
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for piece, _ in body_pieces(request):
                    body += piece
                    hold(len(body))
                    if len(body) > limit:
                        raise TooLarge(f"The body has over {limit} bytes; send it in parts, or stream it as NDJSON.")
        except TimeoutError as error:
            raise TooSlow(f"The body did not come within {BODY_TIMEOUT} s; stream it as NDJSON.") from error
    return body


async def while_connected(request: Request[Any, Any, Any], reading: Coroutine[Any, Any, T]) -> T:
    """What it reads, which takes long: not for a client that has hung up. Its body has been read."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone, read = asyncio.create_task(hung_up()), asyncio.create_task(reading)
    try:
        await asyncio.wait((gone, read), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (gone, read):
            task.cancel()  # of no effect where it is done
    if not read.done():
        raise BadRequest("The connection was closed before there was an answer.")
    return read.result()


class Body(NamedTuple):
    """The body of an append, still to be read, and where it goes."""

    request: Request[Any, Any, Any]
    buffer: ChunkBuffer
    append: Append  # without its chunks


async def append_json(body: Body) -> tuple[Appended, bool]:
    """All or nothing; the answer, and whether anything was new."""
    buffer, append = body.buffer, body.append
    if (asked := cast(Any, body.request.scope).get("asked")) is not None:
        change = await asked  # by whoever took the request before us (see extras/express.py)
        return change.answer, change.changed
    await buffer.room()
    whole = await whole_body(body.request, buffer)
    if time.time() >= granted(body.request).expires:
        raise token_expired()
    append = buffer.checked_append(
        append.thread_id, append.message_id, chunks_from_json(whole), index=append.index, complete=append.complete
    )
    await buffer.room()
    change = await buffer.append(append)
    return change.answer, change.changed


class Streamed(Response[Any]):
    """A body in pieces, which is broken off where their iterator raises BrokenOff."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(None)
        self._pieces, self._all_headers = pieces, headers

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIResponse:
        return StreamedBody(iterator=self._pieces, headers=self._all_headers, status_code=200)


class StreamedBody(ASGIStreamingResponse):
    async def send_body(self, send: Send, receive: Receive) -> None:
        try:
            await super().send_body(send, receive)
        except* BrokenOff:
            log.debug("the body was broken off")  # as the server closes a connection whose answer is not complete


class EventStream(Response[Any]):
    """What a reader is sent, as server-sent events."""

    def __init__(self, buffer: ChunkBuffer, reader: Reader, form: Format) -> None:
        super().__init__(None)
        self._stream = buffer, reader, form

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> ASGIResponse:
        return StreamedEvents(*self._stream)


class StreamedEvents(StreamedBody):
    """Hands its reader over to the connection where that can take it, or else sends what the reader is to have."""

    def __init__(self, buffer: ChunkBuffer, reader: Reader, form: Format) -> None:
        self._reader, self._form = reader, form
        events = sent(buffer.read(reader), form, buffer.listener)
        super().__init__(iterator=events, headers=SSE_HEADERS, status_code=200)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        take: Any = (scope.get("extensions") or {}).get(TAKES_READER)
        if take is None or not await take(scope, partial(self.start_response, send), self._reader, self._form):
            await super().__call__(scope, receive, send)


def event_stream(buffer: ChunkBuffer, place: Place, form: Format = SERVER_SENT, **times: Any) -> Response[Any]:
    """204 where nothing more will come, which tells an EventSource to stop reconnecting (HTML, 9.2.3)."""
    if place.finished:
        return Response(None, status_code=204)
    reader = buffer.seat(**times)
    reader.begin(place)
    return EventStream(buffer, reader, form)


Buffer = NamedDependency[ChunkBuffer]
THREAD = "/threads/{thread_id:str}"
MESSAGE = f"{THREAD}/messages/{{message_id:str}}"
NAME = "1 to 200 characters, no control characters, no /"
ThreadId = Annotated[str, PathParameter(description=NAME)]
MessageId = Annotated[str, PathParameter(description=NAME)]
ListCursor = Annotated[str | None, QueryParameter(name="cursor", description="as the page before gave it")]
After = Annotated[str | None, QueryParameter(name="after", description="a cursor as a stream gave it, or a bare seq")]
FormatName = Annotated[
    Literal["raw"] | None,
    QueryParameter(name="format", description="raw: each chunk's content is the data, and no events of our own"),
]


@put(MESSAGE, summary="Open a message before its first chunk", scopes=WRITE)
async def open_message(buffer: Buffer, thread_id: ThreadId, message_id: MessageId) -> Response[Appended]:
    answer, is_new = await buffer.open_message(thread_id, message_id)
    return Response(answer, status_code=201 if is_new else 200)


@post(MESSAGE + "/chunks", summary="Append chunks", scopes=WRITE, body=Chunk | list[Chunk])
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
    kinds = request.route_handler.opt["bodies"]
    if (take := kinds.get(request.content_type[0])) is None:
        raise refused_type(request, kinds)
    append = buffer.checked_append(thread_id, message_id, index=index, complete=complete)
    answer, is_new = await take(Body(request, buffer, append))
    return Response(answer, status_code=201 if is_new else 200)


@post(MESSAGE + "/complete", status_code=200, summary="Complete a message", scopes=WRITE)
async def complete_message(buffer: Buffer, thread_id: ThreadId, message_id: MessageId) -> Appended:
    return await buffer.complete_message(thread_id, message_id)


@post(MESSAGE + "/abort", status_code=200, summary="Abort a message", scopes=ABORT, body=AbortBody | None)
async def abort_message(
    request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId, message_id: MessageId
) -> Appended:
    """From either side; the body is `{"reason": "…"}`, or nothing."""
    body = await whole_body(request, buffer, SMALL_BODY)
    reason = decode_body(request, body, AbortBody).reason if body else None
    return await buffer.abort_message(thread_id, message_id, reason)


class Reading(NamedTuple):
    """What a reader's query asks for."""

    after: str | None
    follow: bool
    idle_timeout: str | None
    poll_interval: str | None
    form: str | None


async def stream(
    request: Request[Any, Any, Any], buffer: ChunkBuffer, thread_id: str, message_id: str | None, reading: Reading
) -> Response[Any]:
    """From Last-Event-ID (which a browser sends when it reconnects), from ``after``, or the start."""
    seconds("poll_interval", reading.poll_interval)
    options: dict[str, Any] = {
        "idle_timeout": seconds("idle_timeout", reading.idle_timeout),
        "expires": granted(request).expires,
    }
    cursor = request.headers.get("last-event-id") or reading.after
    place = await buffer.locate(thread_id, message_id, after=cursor, follow=reading.follow)
    if reading.form is None:
        return event_stream(buffer, place, **options)
    if place.reset:
        raise cursor_gone()  # as this format has no word for it
    if cursor is not None and place.generation and not reading.follow:
        page = await buffer.get_chunks(thread_id, message_id, after=cursor)
        place = msgspec.structs.replace(place, finished=not page.chunks and page.status != "active")
    return event_stream(buffer, place, RAW, **options)


@get(THREAD + "/stream", summary="Follow a thread (SSE)", scopes=READ, token_in_query=True)
async def stream_thread(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    after: After = None,
    follow: FromQuery[bool] = False,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
    form: FormatName = None,
) -> Response[Any]:
    """With `follow=true` it waits for a thread not made yet, and for the next message."""
    return await stream(request, buffer, thread_id, None, Reading(after, follow, idle_timeout, poll_interval, form))


@get(MESSAGE + "/stream", summary="Follow a message (SSE)", scopes=READ, token_in_query=True)
async def stream_message(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    message_id: MessageId,
    after: After = None,
    follow: FromQuery[bool] = False,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
    form: FormatName = None,
) -> Response[Any]:
    """With `follow=true` it waits for a message not made yet."""
    return await stream(
        request, buffer, thread_id, message_id, Reading(after, follow, idle_timeout, poll_interval, form)
    )


async def unfinished_at(buffer: ChunkBuffer, thread_id: str, cursor: Cursor, form: str | None) -> str | None:
    """The message that the cursor is in, if one who has all up to there can be sent more of it."""
    state, page = await buffer.page(thread_id, None, cursor.seq - 1, 1)
    had = page.entries[0] if page.entries else None
    if had is None or had.seq != cursor.seq or cursor.generation not in (None, state.generation):
        return None
    state, page = await buffer.page(thread_id, had.message_id, cursor.seq, 1)
    is_more = any(form is None or isinstance(entry, StoredChunk) for entry in page.entries)
    return had.message_id if is_more or state.status == "active" else None


@get(THREAD + "/live", summary="Follow the active message of a thread (SSE)", scopes=READ, token_in_query=True)
async def stream_active_message(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    after: After = None,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
    form: FormatName = None,
) -> Response[Any]:
    """From its start; 204 where none is active. Of several it is the one that began last.

    One who comes back with a cursor first gets the rest of the message that it is in, though that has ended meanwhile.
    """
    cursor = request.headers.get("last-event-id") or after
    message_id = None if cursor is None else await unfinished_at(buffer, thread_id, Cursor.parse(cursor), form)
    message_id = message_id or await buffer.get_active_message(thread_id)
    if message_id is None:
        return Response(None, status_code=204)
    return await stream(
        request, buffer, thread_id, message_id, Reading(after, False, idle_timeout, poll_interval, form)
    )


@post(
    "/resume-stream",
    status_code=200,
    summary="Resume a message by the text one has (SSE)",
    scopes=READ,
    token_in_query=True,
    body=ResumeBody,
)
async def resume_stream(request: Request[Any, Any, Any], buffer: Buffer) -> Response[Any]:
    body = decode_body(request, await whole_body(request, buffer), ResumeBody)
    if body.known_content is not None and body.after is not None:
        raise BadRequest("known_content and after exclude each other; send the one that you have.")
    quiet, _ = seconds("idle_timeout", body.idle_timeout), seconds("poll_interval", body.poll_interval)
    granted(request).require(READ, body.thread_id)
    try:
        place = await while_connected(
            request, buffer.locate(body.thread_id, body.message_id, after=body.after, known_content=body.known_content)
        )
    except NotFound:
        return Stream([RETRY, SERVER_SENT.event("complete", {"exists": False})], headers=SSE_HEADERS, status_code=200)
    return event_stream(buffer, place, idle_timeout=quiet, expires=granted(request).expires)


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
    is_text = request.accept.best_match(["application/json", "text/plain"]) == "text/plain"
    headers = {"Vary": "Accept"}
    if long := await buffer.get_long_content(thread_id, message_id):
        kind = "text/plain; charset=utf-8" if is_text else "application/json"
        return Streamed(content_in_pieces(*long, is_text), {**API_HEADERS, **headers, "Content-Type": kind})
    content = await buffer.get_accumulated_content(thread_id, message_id)
    if is_text:
        return Response(content.content, media_type=MediaType.TEXT, headers=headers)
    return Response(content, headers=headers)


async def content_in_pieces(
    content: AccumulatedContent, pieces: AsyncGenerator[str, None], is_text: bool
) -> AsyncGenerator[bytes, None]:
    """The text, or an AccumulatedContent with it, which is never whole in memory."""
    before, after = encode_json(content).split(b'""', 1)
    yield b"" if is_text else before + b'"'
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece.encode() if is_text else encode_json(piece)[1:-1]
    yield b"" if is_text else b'"' + after


@get(THREAD, summary="A thread and its messages", scopes=READ, token_in_query=True)
async def get_thread_status(
    buffer: Buffer, thread_id: ThreadId, limit: FromQuery[int] = MESSAGES, list_cursor: ListCursor = None
) -> ThreadStatus:
    """`messagesCursor` gets the next of its messages, where there are more."""
    return await buffer.get_thread_status(thread_id, limit, list_cursor)


@get("/threads", summary="Threads, the newest first", scopes=READ, token_in_query=True)
async def get_threads(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    status: FromQuery[Status | None] = None,
    limit: FromQuery[int] = 100,
    list_cursor: ListCursor = None,
) -> ThreadPage:
    return await buffer.get_threads(status, limit, list_cursor, granted(request).threads)


@delete(THREAD, summary="Forget a thread, and erase its text", scopes=ADMIN)
async def clear_thread_buffer(buffer: Buffer, thread_id: ThreadId) -> None:
    await buffer.clear_thread_buffer(thread_id)


@get("/health/live", summary="The process answers")
async def live() -> dict[str, str]:
    return {"status": "ok"}


@get("/health/ready", summary="The database answers and takes writes", scopes=None)
async def ready(buffer: Buffer) -> dict[str, str]:
    await buffer.check_ready()
    return {"status": "ok"}


# ---------------------------------------------------------------------------------------------
# The app
# ---------------------------------------------------------------------------------------------

TESTED_UVICORN = ((0, 54), (0, 55))  # from the first on, and before the second


class Parts:
    """What the service is put together from; each extra adds to it.

    ``api`` is mounted below ``/api``, ``root`` below ``/``, where ``pages`` are open to everybody.
    ``bodies`` says by content type how the body of an append is taken, ``dialects`` what is known of
    other people's streams, ``grant_of`` what a token allows, where there is a secret. ``connection``
    is what serves a connection, the first one outermost. What is in ``on_start`` is called once the
    service listens, what is in ``on_stop`` as soon as it is told to stop. ``headers`` are those that
    answers have below a path, unless they say themselves how they may be cached.
    """

    def __init__(self, buffer: ChunkBuffer) -> None:
        self.buffer = buffer
        self.api: list[Any] = [
            open_message,
            append_chunks,
            complete_message,
            abort_message,
            stream_thread,
            stream_message,
            stream_active_message,
            resume_stream,
            get_chunks,
            get_accumulated_content,
            get_thread_status,
            get_threads,
            clear_thread_buffer,
        ]
        self.root: list[Any] = [ready]
        self.pages: list[Any] = [live]
        self.bodies: dict[str, Callable[[Body], Awaitable[tuple[Appended, bool]]]] = {"application/json": append_json}
        self.dialects: list[Any] = []
        self.headers: dict[str, dict[str, str]] = {"/api": API_HEADERS}
        self.guards: list[Guard] = []
        self.grant_of: Callable[[str], Grant] | None = None
        self.connection: list[type[HttpToolsProtocol]] = []
        self.middleware: list[DefineMiddleware] = [
            DefineMiddleware(Gate, settings=buffer.settings, headers=self.headers)
        ]
        self.openapi: Callable[..., OpenAPIConfig] = OpenAPIConfig
        self.openapi_pages: list[OpenAPIRenderPlugin] = []
        self.on_start: list[Callable[[], None]] = []
        self.on_stop: list[Callable[[], None]] = []
        mounted = set()
        for extra in found_extras():
            mounted.add(extra.__name__.rpartition(".")[2])
            if hasattr(extra, "mount"):
                extra.mount(self)
        if buffer.settings.upstream and not {"dialects", "relay"} <= mounted:
            raise StartupError(
                "there is an upstream, and nothing here that relays; put extras/relay.py and dialects.py in place"
            )
        if buffer.settings.secret and not self.guards:
            raise StartupError(
                "there is a secret, and nothing here that knows of tokens; put extras/tokens.py in place"
            )

    def protocol(self) -> type[HttpToolsProtocol]:
        """What is over uvicorn's own is bound to its inside, and so to the versions that were tested."""
        first, end = TESTED_UVICORN
        if first <= tuple(map(int, uvicorn.__version__.split(".")[:2])) < end:
            return type("Connection", (*self.connection, HttpToolsProtocol), {})
        log.warning(
            "uvicorn %s was not tested, so connections are its own: slower, and without limits", uvicorn.__version__
        )
        return HttpToolsProtocol

    def router(self, path: str, handlers: Sequence[Any]) -> Router:
        return Router(
            path,
            route_handlers=handlers,
            guards=self.guards,
            dependencies={"buffer": Provide(lambda: self.buffer, use_cache=True, sync_to_thread=False)},
            exception_handlers=ERROR_ANSWERS,
            opt={"bodies": self.bodies},
        )


def router(buffer: ChunkBuffer, path: str = "/api") -> Router:
    """The routes, for one's own Litestar app, which also has to enter the buffer::

        buffer = ChunkBuffer(Settings(db="answers.db"))
        app = Litestar([router(buffer)], lifespan=[buffer])

    On shutdown call ``buffer.stop()`` as early as you can: a server waits for open streams first.
    """
    parts = Parts(buffer)
    return parts.router(path, parts.api)


def create_app(settings: Settings | None = None, *, buffer: ChunkBuffer | None = None) -> Litestar:
    """The service as an ASGI app that opens its own database.

    With a ``buffer`` it opens nothing, and whoever made the buffer enters it: that is how it is
    mounted in another app, since a mounted app gets no lifespan of its own.
    """
    if buffer is not None:
        return app_of(Parts(buffer))
    buffer = ChunkBuffer(settings)
    return app_of(Parts(buffer), lifespan=[buffer])


def app_of(parts: Parts, lifespan: Sequence[AbstractAsyncContextManager[Any]] = ()) -> Litestar:
    settings, bearer = parts.buffer.settings, SecurityScheme(type="http", scheme="bearer", bearer_format="JWT")
    return Litestar(
        [parts.router("/api", parts.api), parts.router("/", parts.root), *parts.pages],
        lifespan=list(lifespan),
        middleware=parts.middleware,
        cors_config=CORSConfig(allow_origins=list(settings.cors_origins)) if settings.cors_origins else None,
        openapi_config=parts.openapi(
            title="resume-stream",
            version=__version__,
            components=Components(security_schemes={"bearerAuth": bearer}),
            security=[{"bearerAuth": []}],
            render_plugins=parts.openapi_pages or [JsonRenderPlugin()],
        ),
        exception_handlers=ERROR_ANSWERS,
        logging_config=None,
    )


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


def answer_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """What nobody has thought of: it is in the log, whole, and its answer says nothing of it."""
    log.error("unexpected: %s", error, exc_info=error)
    return answer_problem(request, Problem("Something went wrong here; the log of the service says what."))


ERROR_ANSWERS: ExceptionHandlersMap = {
    ProblemDetailsException: answer_problem,
    HTTPException: answer_http_error,
    Exception: answer_unexpected,
}
API_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Gate:
    """Who may connect at all.

    A page of another origin must not reach a service that trusts whoever is on the same machine,
    neither directly nor by a name of its own that resolves to loopback: without a secret ``Host``
    has to be a loopback name, and a foreign ``Origin`` has to be among ``cors_origins``.
    """

    def __init__(self, app: ASGIApp, settings: Settings, headers: Mapping[str, Mapping[str, str]]) -> None:
        self._app = app
        self._headers = [
            (path, [(name.lower().encode(), value.encode()) for name, value in of_path.items()])
            for path, of_path in headers.items()
        ]
        self._any_host = bool(settings.secret or settings.uds) or not is_loopback(settings.host)
        self._origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
            if refusal := self.refusal(hosts or [""], origins):
                log.warning("refused: %s", refusal.detail)
                raise refusal
            if "\ufffd" in scope["path"] and not is_utf8(unquote_to_bytes(scope.get("raw_path", b""))):
                raise BadRequest("The path is not valid UTF-8; percent-encode ids as UTF-8.")
            for path, headers in self._headers:
                if scope["path"].startswith(path):
                    send = with_headers(send, headers)
        await self._app(scope, receive, send)

    def refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> Forbidden | None:
        if not self._any_host and not (len(hosts) == 1 and is_loopback_host(hosts[0])):
            return Forbidden(f"{hosts!r:.80} is not a loopback name; set a secret to serve others than this machine.")
        if all(origin in self._origins or origin.partition("://")[2] == hosts[0] for origin in origins):
            return None
        return Forbidden(f"Pages of the origin {origins!r:.80} may not connect; name it in cors_origins.")


def with_headers(send: Send, headers: Sequence[tuple[bytes, bytes]]) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            said = list(message["headers"])
            if all(name.lower() != b"cache-control" for name, _ in said):
                message["headers"] = [*said, *headers]
        await send(message)

    return send_with_headers


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


# ---------------------------------------------------------------------------------------------
# Serve
# ---------------------------------------------------------------------------------------------

LONGEST_UDS = 107  # bytes (unix(7))
STUCK_AFTER = 0.2  # seconds after which a connection whose reader does not read is cut on shutdown


class Server(uvicorn.Server):
    """uvicorn, which ends streams as soon as it is told to stop, and then exits with 0."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        addresses = [listener.getsockname() for server in self.servers for listener in server.sockets]
        where = ", ".join(a if isinstance(a, str) else url_of(*a[:2]) for a in addresses)
        print(start_line(self._parts.buffer.settings, where), flush=True)
        for tell in self._parts.on_start:
            tell()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._parts.buffer.stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for tell in self._parts.on_stop:
            tell()
        self._loop.call_later(STUCK_AFTER, self._cut_stuck_connections)
        await super().shutdown(sockets)

    def _cut_stuck_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def kept_in(settings: Settings) -> str:
    """Where, with no password in it."""
    if settings.store:
        return re.sub("//[^/]*@", "//", settings.store.partition("?")[0])
    return f"SQLite {sqlite3.sqlite_version}, database {settings.db}"


def start_line(settings: Settings, where: str) -> str:
    if settings.secret:
        who = "whoever has a token"
    elif settings.allow_anonymous:
        who = "anyone who can connect"
    else:
        who = "this machine only"
    return (
        f"resume-stream {__version__} on {where}, {kept_in(settings)}"
        f" (synchronous={settings.synchronous}, ttl={settings.ttl:g}s, max_message={settings.max_message},"
        f" max_db={settings.max_db or 'none'}, max_readers={settings.max_readers}), open to {who}"
    )


def listening(settings: Settings) -> list[socket.socket]:
    """None of them where uvicorn makes the Unix socket. Raises StartupError."""
    if settings.uds:
        folder = Path(settings.uds).absolute().parent
        if not os.access(folder, os.W_OK | os.X_OK) or len(os.fsencode(settings.uds)) > LONGEST_UDS:
            raise StartupError(
                f"cannot listen on {settings.uds}: {folder} is no folder that can be written, or the path has over"
                f" {LONGEST_UDS} bytes"
            )
        return []
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
    async with contextlib.AsyncExitStack() as exits:
        # First, as a port that is taken is to leave no database behind.
        sockets = [exits.enter_context(listener) for listener in listening(settings)]
        parts = Parts(await exits.enter_async_context(ChunkBuffer(settings)))
        config = uvicorn.Config(
            app_of(parts),
            http=parts.protocol(),
            uds=settings.uds or None,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws_max_size=settings.max_body,
            ws_per_message_deflate=False,  # which lets a few bytes become very many
        )
        gc.freeze()  # what is there by now stays: the collector need not walk it, neither now nor at the end
        await Server(config, parts).serve(sockets or None)


def settings_from(environment: Mapping[str, str], flags: Mapping[str, Any]) -> Settings:
    """Raises StartupError."""
    check_variables(environment)
    values = {}
    for name in SETTING_TYPES:
        variable = f"RESUME_STREAM_{name.upper()}"
        flag = f"--{name.replace('_', '-')}"
        if name in flags:
            source, text = flag, flags[name] if isinstance(flags[name], str) else ",".join(flags[name])
        elif variable in environment:
            source, text = variable, environment[variable]
        else:
            continue
        try:
            values[name] = checked_setting(name, parse_setting(name, text))
        except ValueError as error:
            raise StartupError(f"{source}: {error}") from error
    return Settings(**values)


def check_variables(environment: Mapping[str, str]) -> None:
    """Raises StartupError for a variable that would be a setting if it were spelled right."""
    known = [name.upper() for name in SETTING_TYPES]
    for variable in environment:
        name = variable.removeprefix("RESUME_STREAM_")
        is_another = name in OTHER_VARIABLES or re.fullmatch("UPSTREAM_[A-Z0-9_]+_HEADERS", name)
        if variable.startswith("RESUME_STREAM_") and name not in known and not is_another:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"perhaps RESUME_STREAM_{near[0]} is meant" if near else "see resume-stream serve --help"
            raise StartupError(f"{variable} is no setting; {hint}")


# Those of the client.
OTHER_VARIABLES = {"URL", "TOKEN"}
Commands = Any  # argparse keeps the type of what add_subparsers returns to itself
Command = Callable[[Settings, dict[str, Any]], int | None]


def add_command(commands: Commands, name: str, summary: str, run: Command, *settings: str) -> argparse.ArgumentParser:
    """A command with a flag for each of these settings; what it runs gives its exit status, or raises StartupError."""
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, argument_default=argparse.SUPPRESS
    )
    added.set_defaults(run=lambda flags: run(settings_from(os.environ, flags), flags))
    for setting in settings:
        kind, default = SETTING_TYPES[setting], SETTING_DEFAULTS[setting]
        flag = f"--{setting.replace('_', '-')}"
        text = f"{get_args(SETTING_HINTS[setting])[1].description} (default: {setting_text(kind, default)})"
        metavar = SETTING_METAVARS.get(kind) or "|".join(get_args(kind))
        if kind is bool:
            added.add_argument(flag, help=text, nargs="?", const="true", metavar=metavar)
        elif kind in (tuple[str, ...], tuple[Upstream, ...]):
            added.add_argument(flag, help=text, action="append", metavar=metavar)
        else:
            added.add_argument(flag, help=text, metavar=metavar)
    return added


def setting_text(kind: Any, value: Any) -> str:
    """The value as one would write it: the other way round than parse_setting."""
    if kind in (Duration, Size) and value:
        units = DURATION_UNITS if kind is Duration else SIZE_UNITS
        unit, factor = next((unit, factor) for unit, factor in reversed(units.items()) if round(value / factor, 9) >= 1)
        return f"{value / factor:g}{unit}"
    return {"": "none", "()": "none", "False": "false", "True": "true"}.get(str(value), str(value))


def run_serve(settings: Settings, flags: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for extra in found_extras():
        if hasattr(extra, "set_up"):
            extra.set_up(settings)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its own lines have queries in them, which may hold a token
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing" not in record.msg)  # see BrokenOff
    uvloop.run(serve(settings))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("resume-stream", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_command(commands, "serve", "run the service", run_serve, *SETTING_TYPES)
    for extra in found_extras():
        if hasattr(extra, "add_commands"):
            extra.add_commands(commands)
    parsed, unknown = parser.parse_known_args(arguments)
    flags = vars(parsed)
    if unknown:
        commands.choices[flags["command"]].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return flags["run"](flags) or 0
    except StartupError as error:
        print(f"resume-stream: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
