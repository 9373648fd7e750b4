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
import enum
import fcntl
import gc
import importlib
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
import weakref
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, aclosing
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType, ModuleType
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
from urllib.parse import quote, unquote_to_bytes

import aiosqlite
import msgspec
import uvicorn
import uvloop
from litestar import Litestar, Request, Response, Router, delete, get, post, put
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.middleware import DefineMiddleware
from litestar.openapi import OpenAPIConfig
from litestar.params import FromQuery, PathParameter, QueryParameter
from litestar.plugins.problem_details import ProblemDetailsException
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

if not __package__:  # run as a file, or copied beside other code: extras still import it as resume_stream.app
    __path__ = [str(Path(__file__).parent)]
    sys.modules["resume_stream"] = sys.modules["resume_stream.app"] = sys.modules[__name__]

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Exception)
_P = ParamSpec("_P")
_S = TypeVar("_S", bound="ThreadSummary")
log = logging.getLogger("resume_stream")

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

Duration = NewType("Duration", float)
Size = NewType("Size", int)

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def parse_duration(text: str) -> Duration:
    """Seconds from ``100ms``, ``30s``, ``5m``, ``1h``, ``2d``; a bare number is in seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|d)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 100ms, 30s, 5m or 1h")
    return Duration(float(match[1]) * _DURATION_UNITS[match[2] or "s"])


def _parse_size(text: str) -> Size:
    """Bytes from ``64KiB``, ``10MiB``, ``2GiB``; a bare number is in bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,15})(B|KiB|MiB|GiB)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 64KiB, 10MiB or 2GiB")
    return Size(int(match[1]) * _SIZE_UNITS[match[2] or "B"])


def _parse_list(text: str) -> tuple[str, ...]:
    """What is between commas: origins, as browsers send them (RFC 6454), and upstreams, without a slash at the end."""
    return tuple(item.strip().rstrip("/") for item in text.split(",") if item.strip())


def _says(description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the service runs. Durations are seconds or like ``"30s"``, sizes are bytes or like ``"64KiB"``.

    Each is also an environment variable (``RESUME_STREAM_IDLE_TIMEOUT``) and a flag of
    ``resume-stream serve`` (``--idle-timeout``); the flag wins. Raises ValueError for what cannot be.
    """

    host: Annotated[str, _says("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _says("port to listen on; 0 picks a free one and prints it")] = 8000
    uds: Annotated[str, _says("Unix socket to listen on, in place of host and port")] = ""
    db: Annotated[str, _says("the SQLite file")] = "resume-stream.db"
    store: Annotated[
        str, _says("Redis in place of the SQLite file: redis://host:6379/0, rediss://… or unix:///path")
    ] = ""
    ttl: Annotated[Duration, _says("a thread untouched for so long is erased")] = Duration(3600)
    cleanup_interval: Annotated[Duration, _says("how often expired threads are looked for")] = Duration(300)
    idle_timeout: Annotated[Duration, _says("a stream with nothing new for so long ends; 0: never")] = Duration(30)
    heartbeat: Annotated[Duration, _says("a quiet stream sends a comment this often")] = Duration(15)
    poll_interval: Annotated[
        Duration, _says("the longest that a change by another process (the sqlite3 shell) goes unnoticed")
    ] = Duration(0.1)
    producer_timeout: Annotated[Duration, _says("a message nobody appends to for so long is aborted; 0: never")] = (
        Duration(300)
    )
    packing: Annotated[bool, _says("keep what has ended compressed, once the clean-up has come by")] = True
    synchronous: Annotated[
        Literal["FULL", "NORMAL"], _says("FULL: what is acknowledged survives a power cut; NORMAL: a crash")
    ] = "FULL"
    max_chunk: Annotated[Size, _says("largest chunk")] = Size(1024**2)
    max_body: Annotated[Size, _says("largest JSON body")] = Size(10 * 1024**2)
    max_message: Annotated[Size, _says("largest message: its text, and 16 bytes a chunk")] = Size(64 * 1024**2)
    max_db: Annotated[Size, _says("largest database file; 0: as large as the disk")] = Size(0)
    max_readers: Annotated[int, _says("most readers at a time")] = 10_000
    secret: Annotated[str, _says("turns authentication on: the key of HS256 tokens, 32 bytes or more")] = ""
    upstream: Annotated[
        tuple[str, ...], _says("what to relay, like openai=https://api.openai.com, with commas or more than once")
    ] = ()
    max_relays: Annotated[int, _says("most answers of upstreams at a time")] = 1_000
    cors_origins: Annotated[
        tuple[str, ...], _says("other origins whose pages may connect, like https://chat.example, with commas")
    ] = ()
    allow_anonymous: Annotated[bool, _says("serve others than loopback without a secret")] = False
    log_format: Annotated[Literal["auto", "console", "json"], _says("auto: console on a terminal, else json")] = "auto"

    def __post_init__(self) -> None:
        for name in SETTINGS:
            msgspec.structs.force_setattr(self, name, _checked_setting(name, getattr(self, name)))
        if self.cleanup_interval < 0.01:
            raise ValueError("a cleanup_interval of 0 cannot be; it would never pause; give it 1s or more")
        if 0 < (size := len(self.secret.encode())) < 32:
            raise ValueError(
                f"the secret has {size} bytes, and HS256 asks for 32 or more (RFC 7518, 3.2); make one"
                " with: openssl rand -hex 32"
            )


_PARSERS: dict[Any, Callable[[str], Any]] = {Duration: parse_duration, Size: _parse_size, tuple[str, ...]: _parse_list}
_KINDS = {str: "TEXT", int: "NUMBER", bool: "true|false", Duration: "DURATION", Size: "SIZE", tuple[str, ...]: "LIST"}
SETTINGS: dict[str, tuple[Any, str, str]] = {  # of each its type, how that is called, and what it says
    name: (kind, _KINDS.get(kind) or "|".join(get_args(kind)), meta.description)
    for name, hint in get_type_hints(Settings, include_extras=True).items()
    for kind, meta in [get_args(hint)]
}


def _checked_setting(name: str, value: Any, is_text: bool = False) -> Any:
    """The value of a setting, also of its text (``"1s"``). Raises ValueError with one sentence for a person."""
    kind, called, _ = SETTINGS[name]
    if is_text and not value:
        raise ValueError(f"{name} is empty; give it a value, or leave it out")
    if isinstance(value, str) and kind in _PARSERS:
        value = _PARSERS[kind](value)
    try:
        value = msgspec.convert(value, kind, strict=not is_text)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}={value!r:.80} cannot be; it is {called}") from error
    if isinstance(value, float | int) and not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} cannot be; it is 0 or more")
    return value


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

Status = Literal["active", "completed", "aborted"]

_RESERVED_EVENTS = frozenset({"complete", "timeout", "reset", "gone", "error", "open"})
RELAYED = "relayed:"  # begins the event of a relayed message's first chunk, which says whence it came
_CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f]")
_MAX_NAME = 200
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
    TIMEOUT: nothing new for ``idle_timeout``. HEARTBEAT: nothing new, and still here. ERROR: a
    problem says what went wrong.
    """

    RESET = "reset"
    GONE = "gone"
    TIMEOUT = "timeout"
    HEARTBEAT = "heartbeat"
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
    """One thread with its messages, in the order they began; ``messages_cursor`` gets the next, where there are any."""

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
    """What follows a cursor. ``status`` is completed or aborted only with the page that holds the end."""

    chunks: list[StoredChunk]
    ends: list[MessageEnd]
    cursor: str
    status: Status


class Page:
    """Consecutive entries of a thread's sequence.

    Its reader has everything up to ``last_seq`` once it has this page, even where entries of other messages
    were left out.
    """

    __slots__ = ("entries", "generation", "last_seq", "size")
    shared: dict[Any, bytes] | None = None  # what is made of it once for all (see extras/live.py)

    def __init__(self, generation: int, last_seq: int, entries: Sequence[Entry], size: int = 0) -> None:
        self.generation, self.last_seq, self.entries, self.size = generation, last_seq, entries, size

    @property
    def end(self) -> MessageEnd | None:
        end = self.entries[-1]
        return end if isinstance(end, MessageEnd) else None

    def encoded(self, form: Format) -> bytes:
        return form.frames(self)


class Format(Protocol):
    """How readers are told what they read, on one kind of wire."""

    tells_all: bool  # or else the body is broken off where a reader is to be told what there is no word for

    def frames(self, page: Page) -> bytes:
        """What is sent of the page's entries."""

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
    def order(self) -> tuple[int, int, int]:
        """By which, of two states under one name, the later is known."""
        return self.generation, self.last_seq, self.version

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
        headers = dict(self.always) or None
        super().__init__(
            detail=detail, title=self.kind, status_code=self.status_code, headers=headers, extra=members or None
        )


class BadRequest(Problem, status=400, kind="Bad request"): ...


class Unauthorized(Problem, status=401, kind="Unauthorized", headers={"WWW-Authenticate": "Bearer"}): ...


class Forbidden(Problem, status=403, kind="Forbidden"): ...


class NotFound(Problem, status=404, kind="Not found"): ...


class _TooSlow(Problem, status=408, kind="Request timeout"): ...


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


class StartupError(Exception):
    """Why the service cannot start, in one line."""


class BrokenOff(Exception):
    """The body is to be broken off, as its end would be taken for a complete answer (RFC 9112, 8)."""


# What is said in more than one place.


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


def _too_many_chunks() -> TooLarge:
    return TooLarge(f"There are over {_MAX_CHUNKS} chunks in one append; send them in parts.")


def _cursor_gone() -> CursorGone:
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
_SCHEMA_VERSION = 3

CHUNK_OVERHEAD = 64  # bytes that a chunk takes besides its text
CHUNK_WEIGHT = 16  # bytes that a chunk counts in its message besides its text
_MAX_CHUNKS = 10_000  # in one append
_PENDING_BYTES = 8 * 1024**2  # waiting to be committed, all together; past it producers wait
_FEW_WRITES, _FEW_BYTES = 8, 16 * 1024  # that the loop may commit itself,
_QUICK = 0.001  # seconds that this may take,
_PAUSE = 20  # times as long as one took that took longer, for which it does not;
_IN_A_ROW = 128  # commits, of which the last is left to the other thread in any case
PAGE_ROWS = 512
PAGE_BYTES = 256 * 1024
MESSAGES = 1_000  # of a thread's, told of at once
BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process's lock
_CHECKPOINT_PAGES = 1_000  # of the WAL, after which SQLite makes a checkpoint
_WAL_BYTES = 16 * 1024**2  # past this, a checkpoint also resets the WAL


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

    # The match and the status of what is not there raise NotFound.
    async def find(self, thread_id: str, message_id: str | None = None) -> State: ...
    # Up to ``limit`` entries after ``after``, and the state they belong to.
    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]: ...
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


def _place_of(found: State, thread_id: str, message_id: str | None, cursor: Cursor | None, follow: bool) -> Place:
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


class GroupCommit:
    """Commits together, in order, what is asked for in one turn of the loop, and tells of it before it answers."""

    def __init__(self) -> None:
        self._told: Told = lambda changes, took: None
        self._waiting: list[tuple[Write, float, asyncio.Future[Change]]] = []  # when each was asked for, and who waits
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
        self._waiting.append((write, time.perf_counter(), done))
        self._waiting_bytes += size
        if self._waiting_bytes >= _PENDING_BYTES:
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
        while self._together > 1 and quiet < 3 and seen < 512:  # turns of the loop without another write, and writes
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            seen = len(self._waiting)

    def refused(self, error: _E) -> _E:
        """Note that something was not committed for no fault of whoever asked for it."""
        log.error("commit failed: %s", error)
        self._refused_ms = now_ms()
        return error

    async def _commit_batch(self, batch: Sequence[tuple[Write, float, asyncio.Future[Change]]], size: int) -> None:
        began = time.perf_counter()
        outcomes: Sequence[Change | Exception]
        try:
            outcomes = await self.commit([write for write, _, _ in batch], size)
        except Exception as error:
            outcomes = [self.refused(error)] * len(batch)
        else:
            asked = [asked for _, asked, _ in batch]
            changes = [(known, when) for known, when in zip(outcomes, asked, strict=True) if isinstance(known, Change)]
            self._told(changes, time.perf_counter() - began)
        for (_, _, waiting), outcome in zip(batch, outcomes, strict=True):
            if waiting.done():
                continue  # the one who asked is gone; what was committed stays committed
            if isinstance(outcome, Change):
                waiting.set_result(outcome)
            else:
                waiting.set_exception(outcome)


# What is in SQLite


def database_problem(error: Exception) -> Problem:
    """What went wrong in SQLite (https://www.sqlite.org/rescode.html), for the one who asked."""
    # Text that is not UTF-8 is found by Python's own part, which has no code for it.
    code = _code_of(error) or (0 if isinstance(error, OSError) else sqlite3.SQLITE_CORRUPT)
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


_DATABASE_ERRORS = (sqlite3.Error, OSError, UnicodeDecodeError)


def _code_of(error: BaseException | None) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_of_its_rows(error: BaseException | None) -> bool:
    """Whether it has to do with what one write found, and not with the file, the disk or another process."""
    codes = (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH)
    return isinstance(error, UnicodeDecodeError) or _code_of(error) in codes


def unpacked(data: bytes, size: int) -> str:
    """The JSON text of a pack, whose checksum zlib compares."""
    return zlib.decompress(data).decode()


def open_packs(db: sqlite3.Connection) -> None:
    """Let this connection see into packs, as the sqlite3 shell does by itself."""
    db.create_function("sqlar_uncompress", 2, unpacked, deterministic=True)


class _Row(State, frozen=True):
    """A State, and where it is in the database; None is not made yet."""

    thread: int | None = None
    message: int | None = None

    @property
    def places(self) -> tuple[int | None, ...]:
        """What _OF_MESSAGE takes."""
        return self.thread, self.message, self.first, self.last


# The chunks of a message; of the packs only those are opened in which some of them are.
_OF_MESSAGE = (
    " from entries where thread = ?1 and message = ?2 and seq between ?3 and ?4 and last >= ?3 and first <= ?4"
    " and content is not null"
)


def _row_of(db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> _Row:
    row = db.execute(
        "select t.generation, t.last_seq,"
        " exists (select 1 from messages where thread = t.thread and status = 'active'),"
        " m.status, m.reason, coalesce(m.chunk_count, 0), coalesce(m.size, 0), m.first_seq, m.last_seq,"
        " coalesce(m.updated_at, 0), 0, t.thread, m.message"
        " from threads as t left join messages as m on m.thread = t.thread and m.message_id = ?"
        " where t.thread_id = ?",
        (message_id, thread_id),
    ).fetchone()
    return _Row(*row) if row else _Row()


def _existing(db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> _Row:
    """Raises NotFound."""
    found = _row_of(db, thread_id, message_id)
    check_exists(found, thread_id, message_id)
    return found


_HotRows = dict[str, tuple[str, _Row]]


def _range_of(pattern: str) -> tuple[str, str]:
    """Between which ids lie those that are it, or begin with it if it ends with ``*``."""
    return (pattern[:-1], pattern[:-1] + chr(sys.maxunicode)) if pattern.endswith("*") else (pattern, pattern)


class _Transaction:
    """One group commit: a write sees what the earlier ones in it did, and one that raises a Problem did nothing.

    What is appended is gathered, and written with one statement a table, at the end or when something
    has to see it. ``hot`` is, of threads that are appended to, the message that was last, and its row.
    """

    def __init__(self, db: sqlite3.Connection, max_message: int, hot: _HotRows) -> None:
        self._db = db
        self._max_message = max_message
        self._hot = hot
        self._now = now_ms()
        self._chunks: list[tuple[Any, ...]] = []
        self._rows: dict[int | None, _Row] = {}  # of messages, by their number

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
        for key in ("thread", "message"):  # apart, as setting what has an index writes to that, be it new or not
            self._db.executemany(
                f"update {key}s set touched_at = ?1 where {key} = ?2 and touched_at <> ?1",
                [(self._now - self._now % 60_000, getattr(row, key)) for row in self._rows.values()],
            )
        self._chunks.clear()
        self._rows.clear()

    def append(self, append: Append) -> Change:
        thread_id, message_id, index, complete = append.thread_id, append.message_id, append.index, append.complete
        name, found = self._hot.pop(thread_id, ("", _Row()))
        if name != message_id:
            self.flush()
            found = _row_of(self._db, thread_id, message_id)
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
        found = _row_of(self._db, *names)
        if is_new := found.message is None:
            found = self._made(*names, found)
        self._db.execute("update threads set updated_at = ? where thread = ?", (self._now, found.thread))
        self._db.execute(
            "update messages set updated_at = ? where message = ? and status = 'active'", (self._now, found.message)
        )
        return Change(*names, found, self._now, made=is_new)

    def end(self, write: End) -> Change:
        names = write.thread_id, write.message_id
        found = _existing(self._db, *names)
        if found.status == write.status:
            return Change(*names, found, self._now)
        if found.ended:
            raise message_ended(write.message_id, found)
        if write.untouched_since is not None and found.updated_at > write.untouched_since:
            raise Conflict(f"The message {write.message_id!r} was appended to in the meantime.")
        found = self._ended(*names, found, write.status, write.reason)
        return Change(*names, found, self._now, ended=True)

    def clear(self, write: Clear) -> Change:
        found = _existing(self._db, write.thread_id)
        forgotten = self._db.execute(
            "update threads set thread_id = null where thread = ?1 and (?2 is null or updated_at <= ?2)",
            (found.thread, write.untouched_since),
        ).rowcount
        if not forgotten:
            raise no_thread(write.thread_id)
        self._db.execute("update clock set owed = 1")
        return Change(write.thread_id, "", found, self._now, cleared=True)

    def _stored(self, append: Append, found: _Row) -> list[int]:
        """The places of those of the chunks that are stored already, the first ones.

        Raises Conflict where ``index`` leaves a gap, or another chunk has a chunk's place.
        """
        index = cast(int, append.index)
        if index > found.chunk_count:
            raise message_ended(append.message_id, found) if found.ended else would_leave_a_gap(append, found)
        self.flush()
        # Counted from the end, as a retry is nearly always of what came last.
        rows = self._db.execute(
            f"select seq, content, event from (select seq, content, event, last {_OF_MESSAGE}"
            " order by last desc, seq desc limit ?5) order by seq limit ?6",
            (*found.places, found.chunk_count - index, len(append.chunks)),
        ).fetchall()
        for number, ((_, *stored), chunk) in enumerate(zip(rows, append.chunks, strict=False), index):
            if stored != [chunk.content, chunk.event]:
                raise another_is_stored(append.message_id, number, found)
        return [seq for seq, _, _ in rows]

    def _made(self, thread_id: str, message_id: str, found: _Row) -> _Row:
        """The message, new, and its thread if need be."""
        thread = found.thread
        if thread is None:
            ((generation,),) = self._db.execute(
                "update clock set latest_generation = max(latest_generation + 1, ?) returning latest_generation",
                (self._now,),
            ).fetchall()
            thread = self._db.execute(
                "insert into threads (thread_id, generation, created_at, updated_at, touched_at)"
                " values (?1, ?2, ?3, ?3, ?3)",
                (thread_id, generation, self._now),
            ).lastrowid
        self._db.execute(
            "insert into messages (thread, message_id, created_at, updated_at, touched_at) values (?1, ?2, ?3, ?3, ?3)",
            (thread, message_id, self._now),
        )
        return _row_of(self._db, thread_id, message_id)

    def _added(self, found: _Row, chunks: Sequence[Chunk], size: int) -> _Row:
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

    def _ended(self, thread_id: str, message_id: str, found: _Row, status: Status, reason: str | None) -> _Row:
        """A trigger gives the end its place, as it does for the sqlite3 shell."""
        self._db.execute(
            "update messages set status = ?, reason = ? where message = ?", (status, reason, found.message)
        )
        return _row_of(self._db, thread_id, message_id)


class _Database(aiosqlite.Connection):
    """A connection whose thread runs whole functions, in the order in which they were asked for.

    A transaction that is one function cannot be left open by a request that is cancelled, and costs one
    thread hop, whatever the number of its statements. What nobody waits for any more is interrupted.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_used = threading.Lock()  # by its thread, or by the loop
        self.stopped = False

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Raises Problem: Stopping once it is closed or stopped."""
        is_abandoned = False

        def in_turn(db: sqlite3.Connection) -> _T:
            with self.is_used:
                db.set_progress_handler(lambda: is_abandoned or self.stopped, 100_000)  # steps
                try:
                    if is_abandoned or self.stopped:
                        raise Stopping
                    return work(db)
                finally:
                    db.set_progress_handler(None, 0)

        if self._connection is None or not self._running:
            raise Stopping
        try:
            return await cast("Callable[..., Awaitable[_T]]", self._execute)(in_turn, self._conn)
        except asyncio.CancelledError:
            is_abandoned = True
            raise
        except _DATABASE_ERRORS as error:
            raise (Stopping() if _code_of(error) == sqlite3.SQLITE_INTERRUPT else database_problem(error)) from error

    def run_here(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
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


def _renew_generations(db: sqlite3.Connection) -> None:
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
    db.execute("pragma busy_timeout = 100")  # ms that it waits for readers
    (is_busy, _, _) = db.execute("pragma wal_checkpoint(truncate)").fetchone()
    return not is_busy


def _with_room(work: Callable[[sqlite3.Connection], _T], db: sqlite3.Connection) -> _T:
    """Where the disk is full, make what room the WAL takes, and try once more."""
    try:
        return work(db)
    except sqlite3.OperationalError as error:
        if _code_of(error) != sqlite3.SQLITE_FULL or not checkpoint(db):
            raise
        return work(db)


def _erase_thread(db: sqlite3.Connection) -> bool:
    """Delete one of the threads that lost their name, and (by a trigger) all it has; False where there is none."""
    one = "delete from threads where thread = (select thread from threads where thread_id is null limit 1)"
    return db.execute(one).rowcount > 0


def _shrink(db: sqlite3.Connection) -> bool:
    """Give some of the free pages back to the disk; False once there are none. Without any it takes no lock."""
    (free,) = db.execute("pragma freelist_count").fetchone()
    if free:  # as a script, since Python takes only the first step of what has no columns, which gives one page back
        db.executescript("pragma incremental_vacuum(256)")
    return cast(int, free) > 256


def _reads(
    work: Callable[Concatenate[SQLiteStore, sqlite3.Connection, _P], _T], heavy: bool = False
) -> Callable[Concatenate[SQLiteStore, _P], Coroutine[Any, Any, _T]]:
    """Make a method that reads the database one that does so in a snapshot, on a connection for reading."""

    async def method(store: SQLiteStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await store.read(lambda db: work(store, db, *args, **kwargs), heavy)

    return method


_reads_much = partial(_reads, heavy=True)  # on a connection of its own, so that it does not hold up what is soon done


class SQLiteStore(GroupCommit):
    """Threads in one SQLite file (see Store), which has one owner, and a WAL that stays small.

    One connection writes, and does the checkpoints too, as two that do so at the same time can
    corrupt a WAL (https://www.sqlite.org/wal.html#walresetbug). Two others read: one what is soon
    done, and one what may take long. An extra may add to what is done in ``chores``, by the clean-up,
    and in ``erasing``: what is left to do once something was deleted; False where that is not done yet.
    And it may have ``erase_some`` delete less at once; that says whether there may be more to delete.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.path = Path(settings.db).resolve()
        self.wal, self.journal = Path(f"{self.path}-wal"), Path(f"{self.path}-journal")
        self.chores: list[Callable[[], Awaitable[None]]] = []
        self.erase_some = _erase_thread
        self.erasing: list[Callable[[], Awaitable[bool]]] = []
        self.exits = contextlib.AsyncExitStack()
        self._erasure = asyncio.Lock()
        self._hot: _HotRows = {}  # as of the last commit (see _Transaction)
        self._hot_version: int | None = None  # of the data (PRAGMA data_version) that they are of
        self._little = 0  # changes that were
        self._not_here_until = 0.0  # seconds (time.perf_counter)
        self._wal_limit = _WAL_BYTES
        self._watched: AbstractSet[str] = frozenset()

    async def open(self, told: Told) -> None:
        if 0 < self.settings.max_db < 64 * 1024:
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

    async def opened(self, mode: Literal["ro", "rw"], exits: contextlib.AsyncExitStack) -> _Database:
        options: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False}
        uri = f"file:{quote(str(self.path))}?mode={mode}"
        database = _Database(partial(sqlite3.connect, uri, timeout=BUSY_TIMEOUT, **options), iter_chunk_size=PAGE_ROWS)
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
        if not (tables or application_id or 0 < self.path.stat().st_size < 512):
            return False
        if application_id != APPLICATION_ID:
            raise StartupError(
                f"{self.path} is the database of another application, or is not a database; name another file with --db"
            )
        if version != _SCHEMA_VERSION:
            raise StartupError(
                f"{self.path} has version {version}, and this resume-stream knows {_SCHEMA_VERSION}; use the one that"
                " made it, or name another file with --db"
            )
        return True

    def _prepare(self, is_new: bool, was_killed: bool, db: sqlite3.Connection) -> None:
        if is_new:
            db.execute("pragma auto_vacuum = incremental")  # has no effect inside a transaction
            db.executescript(f"begin immediate; {Path(__file__).with_name('schema.sql').read_text()}; commit;")
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
                _renew_generations(db)
        self._inodes = os.stat(self.path).st_ino, os.stat(self.wal).st_ino

    async def close(self) -> None:
        await self.all_committed()
        await self.exits.aclose()

    def stop(self) -> None:
        self.readers[True].stopped = True

    # Writing

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        is_little = len(writes) <= _FEW_WRITES and size <= _FEW_BYTES
        try:
            outcomes, self._hot = await self.change(partial(self._outcomes, writes), is_little)
            return outcomes
        except Problem as problem:
            if len(writes) > 1 and is_of_its_rows(problem.__cause__):  # alone, so that nobody is refused for another's
                return [outcome for write in writes for outcome in await self.commit([write], size)]
            return [self.refused(problem)] * len(writes)

    def _outcomes(self, writes: Sequence[Write], db: sqlite3.Connection) -> tuple[list[Change | Problem], _HotRows]:
        hot, self._hot = self._hot, {}  # nothing is kept of what fails
        ((version,),) = db.execute("pragma data_version")
        if version != self._hot_version or len(hot) > 1_024:
            hot, self._hot_version = {}, version  # another process may have changed what was kept
        transaction = _Transaction(db, self.settings.max_message, hot)
        outcomes = [transaction.outcome(write) for write in writes]
        transaction.flush()
        return outcomes, hot

    async def change(self, work: Callable[[sqlite3.Connection], _T], is_little: bool = False) -> _T:
        """Run it in a transaction, all of it or nothing. Raises Problem.

        What ``is_little`` the loop does itself, without two changes of threads, each of which waits for
        Python's lock: where it waits for no other thread or process. After one that took long it does
        none for a while, so that it waits for the disk for a twentieth of its time at the most.
        Checkpoints, which take long, are made in the other thread.
        """

        def in_transaction(db: sqlite3.Connection) -> _T:
            with db:  # commits, or rolls back
                db.execute("begin immediate")  # as the lock is to be waited for now, and not in the middle
                return work(db)

        is_long, began, writer = self.wal_size() > self._wal_limit, time.perf_counter(), self._writer
        self._little += is_little
        is_allowed = is_little and self._little % _IN_A_ROW and began >= self._not_here_until and not is_long
        if is_allowed and writer.is_used.acquire(blocking=False):
            try:
                return writer.run_here(in_transaction)
            except _DATABASE_ERRORS as error:
                if _code_of(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
                    raise database_problem(error) from error
            finally:
                writer.is_used.release()
                if (took := time.perf_counter() - began) > _QUICK:
                    self._not_here_until = began + _PAUSE * took
        answer = await self.maintain(in_transaction)
        if is_long:
            await self.maintain(self._limit_wal)
        return answer

    async def maintain(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run it on the writing connection, between two transactions; only here that waits for locks."""

        def patiently(db: sqlite3.Connection) -> _T:
            db.execute(f"pragma busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
            db.execute(f"pragma wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            try:
                return _with_room(work, db)
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
            self._wal_limit = _WAL_BYTES if checkpoint(db) else self.wal_size() + _WAL_BYTES
        except sqlite3.Error as error:
            log.warning("checkpoint failed, and will be tried again: %s", error)  # what is committed stays so

    async def probe(self) -> None:
        """By a pragma, as SQLite writes no page for an update that changes nothing."""
        await self.change(lambda db: db.execute(f"pragma user_version = {_SCHEMA_VERSION}"))

    # Reading

    async def read(self, work: Callable[[sqlite3.Connection], _T], heavy: bool = False) -> _T:
        """Run it in one snapshot; what is ``heavy`` does not hold up what is not. Raises Problem."""

        def in_snapshot(db: sqlite3.Connection) -> _T:
            with db:
                db.execute("begin")
                return work(db)

        return await self.readers[heavy].run(in_snapshot)

    @_reads
    def find(self, db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> State:
        return _row_of(db, thread_id, message_id)

    @_reads
    def page(
        self, db: sqlite3.Connection, thread_id: str, message_id: str | None, after: int, limit: int
    ) -> tuple[State, Page]:
        found = _row_of(db, thread_id, message_id)
        begin, end = (after, found.last_seq) if message_id is None else (max(after, found.before), found.last or 0)
        rows = db.execute(
            "select seq, message, event, content, timestamp, last from entries"
            " where thread = ?1 and seq between ?2 and ?3 and last >= ?2 and first <= ?3"
            " and (?4 is null or message = ?4) order by last",
            (found.thread, begin + 1, end, found.message),
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

    @_reads_much
    def match(self, db: sqlite3.Connection, thread_id: str, message_id: str, known_content: str) -> Place:
        """Looked for from the end, as whoever resumes has nearly all of it mostly."""
        found = _existing(db, thread_id, message_id)
        # As a blob, since SQLite's own text functions stop at a NUL.
        whole = (
            f"select cast(group_concat(content, '') as blob) from (select content, last {_OF_MESSAGE} order by last)"
        )
        text = db.execute(whole, found.places).fetchone()[0] or b""
        offset = bytes_known(known_content.encode(), text)
        begin = Place(thread_id, message_id, found.generation, found.before, reset=offset is None)
        if not offset:
            return begin
        before, sizes = len(text), "seq, length(cast(content as blob)), last"
        for seq, size, _ in db.execute(f"select {sizes} {_OF_MESSAGE} order by last desc, seq desc", found.places):
            before -= size
            if before < offset:
                is_whole = before + size == offset
                after, skip = (seq, 0) if is_whole else (seq - 1, offset - before)
                return msgspec.structs.replace(begin, after=after, skip=skip)
        return begin

    @_reads
    def status(self, db: sqlite3.Connection, thread_id: str, limit: int, after: int) -> ThreadStatus:
        found = _existing(db, thread_id)
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

    @_reads_much
    def threads(
        self,
        db: sqlite3.Connection,
        status: Status | None,
        limit: int,
        before: int | None,
        covered: Sequence[str] | None,
    ) -> ThreadPage:
        """By generation, which is a time: a number would tell how many threads were ever made."""
        source, where, order = "thread_summary", "(?1 is null or generation < ?1)", "generation"
        if status is not None:  # few may have it: found by its messages, and by number, which grows likewise
            source, order = "messages as m cross join thread_summary using (thread)", "m.thread"
            where += " and m.status = ?2 and thread_summary.status = ?2"
        if covered is not None:
            where += (
                " and thread in (select threads.thread from json_each(?3) as range"
                " cross join threads on threads.thread_id between range.value ->> 0 and range.value ->> 1)"
            )
        ranges = msgspec.json.encode([_range_of(pattern) for pattern in covered or ()]).decode()
        rows = db.execute(
            f"select distinct thread_summary.* from {source} where {where} order by {order} desc limit ?4",
            (before, status, ranges, limit + 1),
        ).fetchall()
        cursor = str(rows[limit - 1][1]) if len(rows) > limit else None
        return ThreadPage([ThreadSummary(*row[2:]) for row in rows[:limit]], cursor)

    @_reads
    def measure(self, db: sqlite3.Connection) -> tuple[int, int, int]:
        (active,) = db.execute("select count(*) from messages where status = 'active'").fetchone()
        return self.path.stat().st_size, self.wal.stat().st_size, active

    # Upkeep

    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]:
        if untouched_since < self._refused_ms:
            return []  # their producers may be alive, and were refused
        idle = (
            "select thread_id, message_id from messages indexed by active_messages_by_age join threads using (thread)"
            " where status = 'active' and messages.touched_at <= ?1 and messages.updated_at <= ?1"
            " and thread_id is not null limit 1000"
        )
        return await self.read(lambda db: db.execute(idle, (untouched_since,)).fetchall(), heavy=True)

    async def expire(self, untouched_since: int) -> int:
        idle = "select thread_id from threads where thread_id is not null and touched_at <= ?1 and updated_at <= ?1"
        found = await self.read(lambda db: db.execute(idle, (untouched_since,)).fetchmany(500), heavy=True)
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
            while await self.change(self.erase_some):
                await self.room()
            await self.shrink()
            while not await self.maintain(checkpoint):
                if asyncio.get_running_loop().time() >= give_up:
                    return False
                await asyncio.sleep(0.25)
            for step in self.erasing:
                if not await step():
                    return False
            await self.change(lambda db: db.execute(f"update clock set owed = {nameless}"))
            return True

    async def shrink(self) -> None:
        while await self.maintain(_shrink):
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
            await asyncio.sleep(max(self.settings.poll_interval, 0.01))
            latest = await self.data_version() if self._watched else self._version
            if latest != self._version:
                yield set(self._watched)
                self._version = latest  # once it has been taken in


# ---------------------------------------------------------------------------------------------
# What is beside this file
# ---------------------------------------------------------------------------------------------

EXTRAS = (
    *("logs", "tokens", "metrics", "page", "websocket", "live", "producing", "raw", "operate", "copy", "clients"),
    *("openapi", "dialects", "relay", "limits", "express", "packs", "erasure"),
)
KEEPERS = ("packs", "erasure")  # those of them that add to what the SQLite store does
STORES = {"redis": "redis_store", "rediss": "redis_store", "unix": "redis_store"}  # by the scheme of their address


def _found_extras(names: Sequence[str] = EXTRAS) -> Iterator[ModuleType]:
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
        for extra in _found_extras(KEEPERS):
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

_CLOCK_STEP_MS = 2_000  # more than a clock drifts between two looks
CUT = 0.0  # the moment, by the loop's clock, to which an upload is cut short


class Tail:
    """What those who follow a thread share, though it be cleared and made again meanwhile.

    ``generation`` is 0 while no such thread is known, ``last_seq`` -1 while it is not known whether there is one.
    What had a generation up to ``gone`` is no more, as generations only grow. Whoever is ``waiting`` is called
    once, when something happens next. It keeps none of what comes, which is in the store (see extras/live.py).
    """

    def __init__(self) -> None:
        self.generation, self.last_seq, self.version = 0, -1, 0
        self.doubts = 0
        self.active = True
        self.gone = 0
        self.users = 0
        self.followers = 0  # of the users, those who read
        self.uploads: dict[asyncio.Timeout, str] = {}  # of which message, if that can still end
        self.waiting: dict[Callable[[], None], None] = {}

    @property
    def order(self) -> tuple[int, int, int]:
        return self.generation, self.last_seq, self.version

    def learn(self, state: State, or_as_new: bool = False) -> None:
        """Take what was found, if it is newer: a change that takes no place may have been told of since."""
        if state.generation > self.generation > 0:
            self.clear(self.generation)
        self.gone = max(self.gone, state.generation - 1)
        if state.order > self.order or (or_as_new and state.order == self.order):
            (self.generation, self.last_seq, self.version), self.active = state.order, state.active

    def take(self, change: Change, asked: float | None) -> None:
        """``asked`` is when it was asked for (time.perf_counter)."""
        if change.state.generation <= self.gone:
            return  # a reader has found the thread that came after it
        if change.cleared:
            self.clear(change.state.generation)
            return
        self.learn(change.state, or_as_new=True)
        if self.followers:
            self.keep(change, asked)
        if change.ended:
            self.cut(change.message_id)
        self.wake()

    def clear(self, generation: int) -> None:
        """This one and those before it are no more."""
        self.gone = max(self.gone, generation)
        if self.generation <= generation:
            self.generation, self.last_seq, self.version, self.active = 0, -1, 0, True
            self.forget()
            self.cut()
            self.wake()

    def doubt(self) -> None:
        """Another process may have changed anything: whoever follows looks anew, and learns it."""
        self.last_seq = -1
        self.doubts += 1
        self.forget()
        self.wake()

    def cut(self, message_id: str | None = None) -> None:
        """Interrupt the uploads of one message, or all of them."""
        for upload, name in self.uploads.items():
            if message_id in (None, name) and not upload.expired():
                upload.reschedule(CUT)

    def wake(self) -> None:
        calls, self.waiting = self.waiting, {}
        for call in calls:
            asyncio.get_running_loop().call_soon(call)

    async def wait(self, until: float) -> None:
        """Until something happens, or the loop's clock shows ``until``."""
        something = asyncio.Event()
        self.waiting[something.set] = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(None if until == math.inf else until):
                    await something.wait()
        finally:
            self.waiting.pop(something.set, None)

    def keep(self, change: Change, asked: float | None) -> None:
        """Have what came at hand for those who follow."""

    def after(self, seq: int, message_id: str | None) -> tuple[int, Page | None] | None:
        """What is at hand after a place: up to where it goes, and what of it is of the message (None: of any)."""

    def forget(self) -> None:
        """Have nothing at hand."""


class Step(enum.Enum):
    """What there is to do for a reader that is to be sent nothing: load, wait, or leave it."""

    LOAD = "load"
    WAIT = "wait"
    END = "end"


class Reader:
    """One who follows, and is counted while it is there: what it is to be sent next, by whatever sends it.

    It is made before any work is done for it. Times are seconds, by default those of the settings; 0 turns
    ``idle_timeout`` and ``heartbeat`` off; ``expires`` is in seconds since 1970. ``due`` is when, by the loop's
    clock, one that waits is to be told that it does. Raises Unavailable where there are ``max_readers`` already,
    unless it is not ``limited``.
    """

    __slots__ = (
        *("__weakref__", "_beat", "_buffer", "_expires", "_has_page", "_heartbeat", "_idle", "_idle_timeout"),
        *("_is_told", "_now", "_reset", "_skip", "generation", "loaded", "place", "seq", "tail"),
    )

    def __init__(
        self,
        buffer: ChunkBuffer,
        idle_timeout: float | None = None,
        heartbeat: float | None = None,
        expires: float = math.inf,
        limited: bool = True,
    ) -> None:
        settings, count = buffer.settings, buffer.readers
        if buffer.stopping:
            raise Stopping
        if limited and count >= settings.max_readers:
            raise Unavailable(f"There are {count} readers, as many as max_readers allows; try again later.")
        self._buffer = buffer
        self.tail: Tail
        self.loaded: Page | None = None  # what the store has, to be sent with the next step
        self._idle_timeout = (settings.idle_timeout if idle_timeout is None else idle_timeout) or math.inf
        self._heartbeat = (settings.heartbeat if heartbeat is None else heartbeat) or math.inf
        self._now = asyncio.get_running_loop().time
        self._expires = self._now() + expires - time.time()
        buffer._readers.add(self)

    def begin(self, place: Place) -> None:
        self.place, self.generation, self.seq = place, place.generation, place.after
        self._skip, self._reset = place.skip, place.reset
        self._has_page, self._is_told = True, False

    @property
    def due(self) -> float:
        return min(self._expires, self._idle, self._beat)

    def step(self) -> Page | Signal | Step:
        """What it is to be sent now; when it is asked for the next, that has been taken off its hands.

        Raises Unauthorized, once, where it has expired.
        """
        tail, place, now = self.tail, self.place, self._now()
        if self._has_page:
            self._has_page, self._idle, self._beat = False, now + self._idle_timeout, now + self._heartbeat
        if self._reset:
            self._reset = False
            return Signal.RESET
        self.generation = self.generation or tail.generation
        if self._is_told or self._buffer.stopping:
            return Step.END
        if 0 < self.generation <= tail.gone:
            self._is_told = True
            return Signal.GONE
        while (has_more := tail.last_seq < 0 or self.seq < tail.last_seq) and now < self._expires:
            if (found := self._next()) is None:
                return Step.LOAD
            self.seq, page = found
            if page is not None:
                self._has_page, self._is_told = True, place.message_id is not None and page.end is not None
                return self._less_skipped(page)
        # A message ends with its end, and a thread where none of its messages is active.
        is_over = not (has_more or place.follow or tail.active or place.message_id is not None)
        return Step.END if is_over else self._signal(now)

    def _next(self) -> tuple[int, Page | None] | None:
        if (page := self.loaded) is not None:
            self.loaded = None
            return page.last_seq, page if page.entries else None
        return self.tail.after(self.seq, self.place.message_id)

    def _signal(self, now: float) -> Signal | Step:
        if self.due > now:
            return Step.WAIT
        if self._beat < min(self._idle, self._expires):
            self._beat = now + self._heartbeat
            return Signal.HEARTBEAT
        self._is_told = True
        if self._expires <= self._idle:
            raise token_expired()
        return Signal.TIMEOUT

    def _less_skipped(self, page: Page) -> Page:
        skip, self._skip = self._skip, 0
        chunk = page.entries[0]
        if not (skip and isinstance(chunk, StoredChunk)):
            return page
        rest = msgspec.structs.replace(chunk, content=chunk.content.encode()[skip:].decode())
        return Page(page.generation, page.last_seq, [rest, *page.entries[1:]])


def checked_id(kind: str, text: str) -> str:
    """The id, of 1 to 200 characters, no ``/`` and no control character. Raises BadRequest."""
    if not 1 <= len(text) <= _MAX_NAME or "/" in text or _CONTROL_CHARACTER.search(text):
        raise BadRequest(
            f"{text!r:.80} cannot be a {kind}; use 1 to {_MAX_NAME} characters, no '/' and no control characters."
        )
    utf8_size(text)
    return text


def _check_ids(thread_id: str, message_id: str | None = None) -> None:
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


def _check_event(event: str) -> None:
    is_ours = event in _RESERVED_EVENTS or event.startswith(RELAYED)
    if not 1 <= len(event) <= _MAX_NAME or _CONTROL_CHARACTER.search(event) or is_ours:
        raise InvalidContent(
            f"{event!r:.80} cannot be an event; use 1 to {_MAX_NAME} characters, no control characters, and none of"
            f" the service's own names ({', '.join(sorted(_RESERVED_EVENTS))})."
        )
    utf8_size(event)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{name}={value} is out of range; it goes from {low:g} to {high:g}.")


def _list_place(cursor: str | None) -> int | None:
    """Where a page of a list ended. Raises BadRequest."""
    if cursor is not None and not re.fullmatch(r"\d{1,18}", cursor, re.ASCII):
        raise BadRequest(f"{cursor!r:.80} is not a cursor of this list; send the one that its last page gave.")
    return None if cursor is None else int(cursor)


def checked_sizes(chunks: Sequence[Chunk], max_chunk: int) -> list[int]:
    """The bytes of each chunk. Raises InvalidContent and TooLarge."""
    sizes = []
    for chunk in chunks:
        if chunk.event is not None:
            _check_event(chunk.event)
        sizes.append(size := utf8_size(chunk.content))
        if size > max_chunk:
            raise TooLarge(f"A chunk has {size} bytes, over max_chunk ({max_chunk}); send it in parts.")
    return sizes


class ChunkBuffer:
    """Keeps what agents stream, and lets readers carry on from where they stopped.

    An asynchronous context manager: entering it opens the store, leaving it commits what is
    waiting and closes it. All methods belong to the event loop it was entered in. Errors are
    subclasses of Problem, whose ``status_code`` is that of the HTTP answer. ``store`` is where
    the threads are kept: by default what the settings name.
    """

    def __init__(self, settings: Settings | None = None, store: Store | None = None) -> None:
        self.settings = settings = settings or Settings()
        self.tell: Callable[..., None] = lambda event, *what: None  # of what happens, for whoever counts it
        self.stopping = False
        self._store: Store = store or store_for(settings)
        self._entered = False
        # How readers have what comes: out of memory where extras/live.py is in place, else each out of the store.
        self._tail_type: type[Tail] = next((extra.LiveTail for extra in _found_extras(["live"])), Tail)
        self._tails: dict[str, Tail] = {}
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()  # gone with their streams, be they read or not
        self._held = 0  # bytes of bodies that are still coming in, or to be sent on
        self._erasure_owed = True
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Raises StartupError where the store cannot be served."""
        await self._store.open(self._take)
        self._entered = True
        self._started_ms = now_ms()
        self._clock_offset, self._clock_set_ms = now_ms() - _ms_since_boot(), 0
        for work in (self._watch_other_processes, self._clean_up_forever, self._abort_idle_messages_forever):
            self.begin(work())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.close()

    def stop(self) -> None:
        """End every stream now, without an end event, so that clients reconnect elsewhere or later."""
        self.stopping = True
        self.store.stop()
        for tail in self._tails.values():
            tail.cut()
            tail.wake()

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def store(self) -> Store:
        """Raises Problem before it is open, as what is asked of it then would never be answered."""
        if not self._entered:
            raise Problem(
                "The buffer was not entered: write 'async with ChunkBuffer(…) as buffer', or give it to the lifespan of"
                " the app. A mounted app gets no lifespan of its own; enter its buffer in that of the other one."
            )
        return self._store

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """What goes on by itself, until the buffer is left."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Producers

    async def room(self) -> None:
        """Wait until less than the limit is waiting to be committed. Raises Unavailable."""
        await self.store.room()
        if self.stopping:
            raise Stopping

    def hold(self, size: int) -> None:
        """Count bytes of bodies that are still coming in, or to be sent on, or (below 0) are no longer.

        Raises Unavailable where that is over 32 MiB of all of them.
        """
        self._held += size
        if size > 0 and self._held > 32 * 1024**2:
            raise Unavailable("Too much is being sent at the same time; try again, or send it in smaller parts.")

    async def open_message(self, thread_id: str, message_id: str) -> tuple[Appended, bool]:
        """Open a message before its first chunk; whether it is new. If not, that is a sign of life."""
        _check_ids(thread_id, message_id)
        await self.room()
        change = await self.store.write(Open(thread_id, message_id))
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

        Opens the message if need be. ``index`` (from 0) is the number in this message of the first of the
        chunks, and makes a retry safe: what is stored already is compared and skipped. ``complete`` ends the
        message in the same transaction. No chunks at all are a sign of life. Raises Conflict (the message has
        ended, ``index`` leaves a gap, or another chunk is stored there), TooLarge, InvalidContent, Unavailable,
        DatabaseFull; then nothing has changed.
        """
        if isinstance(chunks, str):
            raise BadRequest("The chunks are one text; put it in a list, or its characters would be a chunk each.")
        taken = [Chunk(chunk) if isinstance(chunk, str) else chunk for chunk in chunks]
        append = self.checked_append(thread_id, message_id, taken, index=index, complete=complete)
        await self.room()
        return (await self.store.write(append)).answer

    def checked_append(
        self, thread_id: str, message_id: str, chunks: Sequence[Chunk] = (), *, index: int | None, complete: bool
    ) -> Append:
        """For the store, if its ids, its index, and the events, sizes and text of its chunks are good."""
        _check_ids(thread_id, message_id)
        if index is not None and not 0 <= index < 2**63:
            raise BadRequest(f"index={index} cannot be; it is the number of the first chunk in its message, from 0.")
        if len(chunks) > _MAX_CHUNKS:
            raise _too_many_chunks()
        sizes = checked_sizes(chunks, self.settings.max_chunk)
        return Append(thread_id, message_id, chunks, sizes, index, complete)

    async def complete_message(self, thread_id: str, message_id: str) -> Appended:
        """End a message; again: the same answer. Raises NotFound; Conflict if it was aborted."""
        _check_ids(thread_id, message_id)
        await self.room()
        return (await self.store.write(End(thread_id, message_id, "completed"))).answer

    async def abort_message(self, thread_id: str, message_id: str, reason: str | None = None) -> Appended:
        """Abort a message, from either side; again: the same answer. Raises NotFound; Conflict if it is completed."""
        _check_ids(thread_id, message_id)
        if reason is not None:
            utf8_size(reason)
            if len(reason) > MAX_REASON:
                raise TooLarge(f"The reason has {len(reason)} characters; say it in {MAX_REASON} or fewer.")
        await self.room()
        return (await self.store.write(End(thread_id, message_id, "aborted", reason))).answer

    async def clear_thread_buffer(self, thread_id: str) -> None:
        """Forget a thread; returns once its text is in neither the database nor the WAL. Raises NotFound."""
        _check_ids(thread_id)
        await self.room()
        await self.store.write(Clear(thread_id))
        try:
            await self._erase()
        except (DatabaseFull, Unavailable) as problem:
            problem.detail = f"The thread is cleared, and its text will be erased later. {problem.detail}"
            raise

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

        ``known_content`` is text it has: a prefix of the message's text resumes right after it, inside a chunk
        if need be; so does a text that occurs exactly once; anything else is answered with Signal.RESET and
        everything. ``after`` (a cursor or a bare sequence number) stands in its place. ``idle_timeout`` is in
        seconds, by default that of the settings; ``poll_interval`` changes nothing, as nothing is polled for a
        reader. Ends after a MessageEnd, Signal.GONE or Signal.TIMEOUT. Raises NotFound, BadRequest, Unavailable.
        """
        if after is not None:
            known_content = None
        place = await self.locate(thread_id, message_id, after=after, known_content=known_content)
        if place.finished:
            return
        async with aclosing(self.follow(place, idle_timeout=idle_timeout, heartbeat=0)) as items:
            async for item in items:
                for entry in item.entries if isinstance(item, Page) else [item]:
                    yield entry

    async def get_accumulated_content(self, thread_id: str, message_id: str | None = None) -> AccumulatedContent:
        """The text of a message so far, or of a thread's messages in the order they began. Raises NotFound."""
        content, rest = await self.content(thread_id, message_id)
        return msgspec.structs.replace(content, content=content.content + "".join([piece async for piece in rest]))

    async def content(
        self, thread_id: str, message_id: str | None = None
    ) -> tuple[AccumulatedContent, AsyncGenerator[str, None]]:
        """The same with the first of its text, and the rest in pieces, as it may be long."""
        _check_ids(thread_id, message_id)
        if message_id is None:
            thread = await self.store.status(thread_id, 1, 0)
            cursor, status = thread.cursor, thread.status
        else:
            found = await self.store.find(thread_id, message_id)
            check_exists(found, thread_id, message_id)
            cursor, status = found.cursor, cast(Status, found.status)
        pieces = self._pieces(thread_id, message_id, Cursor.parse(cursor))
        return AccumulatedContent(await anext(pieces, ""), cursor, status), pieces

    async def _pieces(
        self, thread_id: str, message_id: str | None, up_to: Cursor, seq: int = 0
    ) -> AsyncGenerator[str, None]:
        """Raises NotFound where the thread is cleared meanwhile."""
        if message_id is None:
            after: int | None = 0
            while after is not None:
                status = await self.store.status(thread_id, MESSAGES, after)
                for message in status.messages:
                    async for piece in self._pieces(thread_id, message.message_id, up_to, (message.first_seq or 1) - 1):
                        yield piece
                after = _list_place(status.messages_cursor)
            return
        while seq < up_to.seq:
            found, page = await self.store.page(thread_id, message_id, seq, PAGE_ROWS)
            if found.generation != up_to.generation:
                raise no_thread(thread_id)
            seq = page.last_seq
            yield "".join(e.content for e in page.entries if isinstance(e, StoredChunk) and e.seq <= up_to.seq)

    async def get_thread_status(self, thread_id: str, limit: int = MESSAGES, cursor: str | None = None) -> ThreadStatus:
        """A thread with up to ``limit`` (1 to 1,000) of its messages, those after ``cursor``. Raises NotFound."""
        _check_ids(thread_id)
        _check_range("limit", limit, 1, MESSAGES)
        return self._with_readers(await self.store.status(thread_id, limit, _list_place(cursor) or 0))

    async def get_threads(
        self,
        status: Status | None = None,
        limit: int = 100,
        cursor: str | None = None,
        covered: Sequence[str] | None = None,
    ) -> ThreadPage:
        """Up to ``limit`` (1 to 1,000) threads, the newest first, of a status, covered by an id or ``prefix*``."""
        _check_range("limit", limit, 1, 1000)
        page = await self.store.threads(status, limit, _list_place(cursor), covered)
        return ThreadPage([self._with_readers(thread) for thread in page.threads], page.cursor)

    def _with_readers(self, thread: _S) -> _S:
        tail = self._tails.get(thread.thread_id)
        return msgspec.structs.replace(thread, readers=tail.followers if tail else 0)

    async def get_active_threads(self, limit: int = 100, cursor: str | None = None) -> ThreadPage:
        """The threads of which a message is active. Raises BadRequest."""
        return await self.get_threads("active", limit, cursor)

    async def get_active_message(self, thread_id: str) -> str | None:
        """The thread's active message, the one that began last; None where there is none. Raises BadRequest."""
        _check_ids(thread_id)
        with contextlib.suppress(NotFound):
            first = (await self.store.status(thread_id, 1, 0)).message_count
            while first > 0:
                first = max(first - MESSAGES, 0)
                status = await self.store.status(thread_id, MESSAGES, first)
                if active := [message.message_id for message in status.messages if message.status == "active"]:
                    return active[-1]
        return None

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
        """Up to ``limit`` (1 to 10,000) entries after a cursor; waits up to ``wait`` s (0 to 300) for the first.

        Raises NotFound, CursorGone for a cursor of another generation, and Unauthorized where it ``expires``
        (seconds since 1970) while it waits.
        """
        _check_range("limit", limit, 1, 10_000)
        _check_range("wait", wait, 0, 300)
        place = await self.locate(thread_id, message_id, after=after)
        if place.reset:
            raise _cursor_gone()
        page = await self._chunk_page(place, limit)
        if wait and not (place.finished or page.chunks or page.ends):
            async with aclosing(self.follow(place, idle_timeout=wait, heartbeat=0, expires=expires)) as items:
                await anext(items, None)
            page = await self._chunk_page(place, limit)
        return page

    async def _chunk_page(self, place: Place, limit: int) -> ChunkPage:
        found, page = await self.store.page(place.thread_id, place.message_id, place.after, limit)
        if found.generation != place.generation:
            raise no_thread(place.thread_id)
        status: Status = "active"
        if place.message_id is not None:
            if found.ended and cast(int, found.last) <= page.last_seq:
                status = cast(Status, found.status)
        elif not found.active and found.last_seq == page.last_seq:
            whole = await self.store.status(place.thread_id, 1, 0)
            status = whole.status if whole.cursor == found.cursor else "active"
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

        With ``follow`` it waits for what is not made yet; else raises NotFound.
        """
        _check_ids(thread_id, message_id)
        if known_content is not None:
            utf8_size(known_content)
            kind, place = "content", await self.store.match(thread_id, cast(str, message_id), known_content)
        else:
            cursor = None if after is None else Cursor.parse(str(after))
            kind = "start" if cursor is None else "cursor"
            place = _place_of(await self.store.find(thread_id, message_id), thread_id, message_id, cursor, follow)
        self.tell("resumed", kind, place)
        return place

    def follow(self, place: Place, reader: Reader | None = None, **times: Any) -> AsyncGenerator[Page | Signal, None]:
        """What comes after a place, as it is committed. No transaction is open while the consumer has a page."""
        reader = reader or Reader(self, **times)
        reader.begin(place)
        return self.read(reader)

    async def read(self, reader: Reader) -> AsyncGenerator[Page | Signal, None]:
        with self.attached(reader.place.thread_id, reader) as tail:
            while (step := reader.step()) is not Step.END:
                if step is Step.WAIT:
                    await tail.wait(reader.due)
                elif step is Step.LOAD:
                    await self.load(reader)
                else:
                    yield step

    async def load(self, reader: Reader) -> None:
        """What the store has for it; nothing, if meanwhile its thread is known to be another one."""
        tail, place = reader.tail, reader.place
        doubts = tail.doubts
        found, page = await self.store.page(place.thread_id, place.message_id, reader.seq, PAGE_ROWS)
        if tail.doubts == doubts:
            tail.learn(found)
        if reader.generation not in (0, found.generation):
            tail.clear(reader.generation)
        elif found.generation == tail.generation and page.last_seq > reader.seq:
            reader.loaded = page

    @contextlib.contextmanager
    def attached(self, thread_id: str, reader: Reader | None = None) -> Iterator[Tail]:
        """The thread's tail, which is told of all that happens while anybody uses it, and keeps it for readers."""
        tail = self._tails.setdefault(thread_id, self._tail_type())
        tail.users += 1
        if tail.users == 1:
            self.store.watch(self._tails.keys())
        tail.followers += reader is not None
        if reader is not None:
            reader.tail = tail
        try:
            yield tail
        finally:
            tail.users -= 1
            tail.followers -= reader is not None
            if not tail.followers:
                tail.forget()
            if not tail.users:
                del self._tails[thread_id]
                self.store.watch(self._tails.keys())
            if reader is not None:
                self._readers.discard(reader)

    # What the store and the clock do

    def _take(self, changes: Sequence[tuple[Change, float | None]], seconds: float | None = None) -> None:
        """What the store tells of, before it is answered; the seconds are those of a commit."""
        if seconds is not None:
            self.tell("committed", [change for change, _ in changes], seconds)
        for change, asked in changes:
            if tail := self._tails.get(change.thread_id):
                tail.take(change, asked)

    async def _watch_other_processes(self) -> None:
        while True:
            with _logged_problems("watch other processes"):
                async with aclosing(self.store.changed_elsewhere()) as elsewhere:
                    async for thread_ids in elsewhere:
                        # First, as readers are told to look only once there is an answer; if not, this is tried again.
                        await self.store.find(next(iter(thread_ids)))
                        for thread_id in thread_ids:
                            if tail := self._tails.get(thread_id):
                                await self._doubt(thread_id, tail)

    async def _doubt(self, thread_id: str, tail: Tail) -> None:
        """Whoever reads looks for itself; whoever uploads has to be told of an end."""
        tail.doubt()
        for message_id in {*filter(None, tail.uploads.values())}:
            generation, found = tail.generation, await self.store.find(thread_id, message_id)
            if tail.generation == generation not in (0, found.generation):
                tail.clear(generation)
            elif found.ended:
                tail.cut(message_id)

    async def _clean_up_forever(self) -> None:
        interval = self.settings.cleanup_interval
        while True:
            with _logged_problems("clean up"):
                untouched_since = now_ms() - round(self.settings.ttl * 1000)
                while untouched_since >= self._clock_set_at() and (expired := await self.store.expire(untouched_since)):
                    self.tell("expired", expired)
                await self._erase()
                await self.store.upkeep()
            await asyncio.sleep(min(interval, BUSY_TIMEOUT) if self._erasure_owed else interval)

    async def _erase(self) -> None:
        self._erasure_owed = True
        self._erasure_owed = not await self.store.erase()

    def _clock_set_at(self) -> int:
        """When the clock was last set, by its own new time (ms); what is older cannot be told apart by age."""
        offset = now_ms() - _ms_since_boot()
        if abs(offset - self._clock_offset) > _CLOCK_STEP_MS:
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
            with _logged_problems("abort idle messages"):
                for idle in await self.store.idle_messages(untouched_since):
                    with contextlib.suppress(NotFound, Conflict):  # touched or ended in the meantime
                        await self.store.write(End(*idle, "aborted", PRODUCER_TIMEOUT, untouched_since))


def _ms_since_boot() -> int:
    """A clock that nobody can set."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000


@contextlib.contextmanager
def _logged_problems(task: str) -> Iterator[None]:
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


def problem_document(problem: ProblemDetailsException) -> dict[str, Any]:
    members = problem.extra if isinstance(problem.extra, dict) else {}
    return {"status": problem.status_code, "title": problem.title, "detail": problem.detail, **members}


class ServerSentEvents:
    """Entries and signals as server-sent events (HTML, 9.2), with LF line ends, and JSON as their data.

    Data is on one line, as a line end inside JSON is always escaped, and never missing: browsers
    do not dispatch an event without it (HTML, 9.2.6). Only what has a place has an id.
    """

    tells_all = True

    def frames(self, page: Page) -> bytes:
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
            named = entry.event is not None and entry.event not in _RESERVED_EVENTS
            event = b"event: %s\n" % cast(str, entry.event).encode() if named else b""
            frames.append(
                b'id: %d-%d\n%sdata: {"content":%s,"timestamp":%d,"messageId":%s,"seq":%d}\n\n'
                % (generation, entry.seq, event, encode_json(entry.content), entry.timestamp, name, entry.seq)
            )
        return b"".join(frames)

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        if signal is Signal.HEARTBEAT:
            return HEARTBEAT
        return self.event(signal.value, problem_document(problem) if problem else {})

    def event(self, name: str, data: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (name.encode(), encode_json(data))


_SERVER_SENT = ServerSentEvents()


def can_end(form: Format, end: MessageEnd | None) -> bool:
    """Or else the body has to be broken off, as it would be taken for that of a completed message."""
    return form.tells_all or (end is not None and end.status == "completed")


async def _sent(buffer: ChunkBuffer, reader: Reader, form: Format) -> AsyncGenerator[bytes, None]:
    """What a reader is sent. The first line goes at once, so that headers and bytes flow. Raises BrokenOff."""
    yield RETRY
    end: MessageEnd | None = None
    async with aclosing(buffer.read(reader)) as items:
        try:
            async for item in items:
                if isinstance(item, Page):
                    end, frames = item.end, item.encoded(form)
                    buffer.tell("sent", item, len(frames))
                    yield frames
                else:
                    yield form.signal(item)
        except Problem as problem:
            yield form.signal(Signal.ERROR, problem)
    if not can_end(form, end):
        raise BrokenOff


_CHUNKS = msgspec.json.Decoder(Chunk | list[Chunk])


def chunks_from_json(body: bytes | bytearray) -> list[Chunk]:
    """A chunk, or an array of chunks. Raises InvalidContent and TooLarge."""
    if body.count(b'"content"') > 2 * _MAX_CHUNKS:  # a name, or perhaps a value: seen without decoding any
        raise _too_many_chunks()
    try:
        chunks = _CHUNKS.decode(body)
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

_BODY_TIMEOUT = 30  # seconds in which a JSON body has to be there
SMALL_BODY = 16 * 1024  # bytes, of one that has no reason to be larger
TAKES_READER = "resume_stream.takes_reader"  # an extension of the ASGI scope, where extras/express.py is in place

SCOPES = ("read", "write", "abort", "admin")
READ, WRITE, ABORT, ADMIN = map(frozenset, (["read"], ["write"], ["abort", "write"], ["admin"]))


class Grant(Record, frozen=True):
    """What a caller may do: all, where there is no secret (see extras/tokens.py)."""

    threads: tuple[str, ...] | None = None  # ids or ``prefix*``; None: all
    expires: float = math.inf  # seconds since 1970

    def covers(self, thread_id: str) -> bool:
        return True

    def has(self, scopes: AbstractSet[str]) -> bool:
        return True

    def require(self, scopes: AbstractSet[str], thread_id: str | None) -> None:
        """Raises Unauthorized, or Forbidden: the same whether there is such a thread or not."""


ANYONE = Grant()  # what everybody may do where there is no secret


def granted(connection: ASGIConnection[Any, Any, Any, Any]) -> Grant:
    return cast(Grant, connection.scope.get("auth", ANYONE))


def seconds(name: str, value: str | float | None) -> float | None:
    """The duration, from 0 to a day, that a reader asks for."""
    if value is None:
        return None
    try:
        parsed = parse_duration(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRequest(f"{name}: {error}.") from error
    _check_range(name, parsed, 0, 86400)
    return parsed


def _refused_type(request: Request[Any, Any, Any], kinds: Iterable[str]) -> UnsupportedMediaType:
    kind = request.headers.get("content-type", "no content type")
    return UnsupportedMediaType(
        f"{kind!r:.80} is not what this call takes; send Content-Type: {' or '.join(kinds)} (curl -d says another one"
        " unless -H names it)."
    )


async def body_pieces(request: Request[Any, Any, Any]) -> AsyncGenerator[tuple[bytes, bool], None]:
    """The body as it arrives; the flag is set with its last piece. Until then an answer ends the connection."""
    scope = cast(dict[str, Any], request.scope)
    scope["has_more_body"] = True
    while scope["has_more_body"]:
        event = await request.receive()
        if event["type"] != "http.request":
            raise BadRequest("The connection was closed before the body ended.")
        scope["has_more_body"] = event.get("more_body", False)
        yield event.get("body", b""), not scope["has_more_body"]


async def whole_body(request: Request[Any, Any, Any], buffer: ChunkBuffer, most: float = math.inf) -> bytearray:
    """Up to ``max_body``, or ``most``, bytes, in up to 30 s. Raises TooLarge, TooSlow and Unavailable."""
    body, limit = bytearray(), min(most, buffer.settings.max_body)
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            async for piece, _ in body_pieces(request):
                body += piece
                buffer.hold(len(piece))
                if len(body) > limit:
                    raise TooLarge(f"The body has over {limit} bytes; send it in parts, or stream it as NDJSON.")
    except TimeoutError as error:
        raise _TooSlow(f"The body did not come within {_BODY_TIMEOUT} s; stream it as NDJSON.") from error
    finally:
        buffer.hold(-len(body))
    return body


async def json_body(
    request: Request[Any, Any, Any],
    buffer: ChunkBuffer,
    kind: type[_T],
    default: _T | None = None,
    most: float = math.inf,
) -> _T:
    """What a call takes besides chunks. Raises what ``whole_body`` does, UnsupportedMediaType and InvalidContent."""
    body = await whole_body(request, buffer, most)
    if not body and default is not None:
        return default
    if request.content_type[0] != "application/json":
        raise _refused_type(request, ["application/json"])
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise InvalidContent(f"The body does not have the form that this call takes: {error}.") from error


async def _append_json(request: Request[Any, Any, Any], buffer: ChunkBuffer, append: Append) -> tuple[Appended, bool]:
    """The append, whose chunks are the body, all or nothing; the answer, and whether anything was new."""
    if (asked := cast(Any, request.scope).get("asked")) is None:  # by whoever took it before us (extras/express.py)
        await buffer.room()
        body = await whole_body(request, buffer)
        if time.time() >= granted(request).expires:
            raise token_expired()
        append = buffer.checked_append(
            append.thread_id, append.message_id, chunks_from_json(body), index=append.index, complete=append.complete
        )
        await buffer.room()
        asked = buffer.store.write(append)
    change: Change = await asked
    return change.answer, change.changed


class Streamed(ASGIStreamingResponse):
    """A body in pieces, which is broken off where their iterator raises BrokenOff, or finds that they are gone.

    A reader is handed over to the connection, where that can send what the reader is to have.
    """

    def __init__(self, pieces: Any, headers: Mapping[str, str], *reader_and_form: Any) -> None:
        super().__init__(iterator=pieces, headers=dict(headers), status_code=200)
        self._reader_and_form = reader_and_form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        take: Any = (scope.get("extensions") or {}).get(TAKES_READER) if self._reader_and_form else None
        if take is None or not await take(scope, partial(self.start_response, send), *self._reader_and_form):
            await super().__call__(scope, receive, send)

    async def send_body(self, send: Send, receive: Receive) -> None:
        try:
            await super().send_body(send, receive)
        except* (BrokenOff, Problem):
            log.debug("the body was broken off")  # as the server closes a connection whose answer is not complete


def _event_stream(buffer: ChunkBuffer, place: Place, form: Format = _SERVER_SENT, **times: Any) -> ASGIResponse:
    """204 where nothing more will come, which tells an EventSource to stop reconnecting (HTML, 9.2.3)."""
    if place.finished:
        return ASGIResponse(status_code=204)
    reader = Reader(buffer, **times)
    reader.begin(place)
    return Streamed(_sent(buffer, reader, form), SSE_HEADERS, reader, form)


Buffer = NamedDependency[ChunkBuffer]
THREAD = "/threads/{thread_id:str}"
_MESSAGE = f"{THREAD}/messages/{{message_id:str}}"
_NAME = PathParameter(description="1 to 200 characters, no control characters, no /")
ThreadId = Annotated[str, _NAME]
_MessageId = Annotated[str, _NAME]
_ListCursor = Annotated[str | None, QueryParameter(name="cursor", description="as the page before gave it")]
_After = Annotated[str | None, QueryParameter(name="after", description="a cursor as a stream gave it, or a bare seq")]


@put(_MESSAGE, summary="Open a message before its first chunk", scopes=WRITE)
async def open_message(buffer: Buffer, thread_id: ThreadId, message_id: _MessageId) -> Response[Appended]:
    answer, is_new = await buffer.open_message(thread_id, message_id)
    return Response(answer, status_code=201 if is_new else 200)


@post(_MESSAGE + "/chunks", summary="Append chunks", scopes=WRITE, body=Chunk | list[Chunk])
async def append_chunks(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    message_id: _MessageId,
    index: FromQuery[int | None] = None,
    complete: FromQuery[bool] = False,
) -> Response[Appended]:
    """Answered after the commit. JSON: a chunk, or an array of chunks, all or nothing. NDJSON: a
    chunk a line, committed and readable as the lines arrive. Plain text: likewise, a chunk a piece."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("The body is compressed; send it as it is.")
    kinds = request.route_handler.opt["bodies"]
    if (take := kinds.get(request.content_type[0])) is None:
        raise _refused_type(request, kinds)
    append = buffer.checked_append(thread_id, message_id, index=index, complete=complete)
    answer, is_new = await take(request, buffer, append)
    return Response(answer, status_code=201 if is_new else 200)


@post(_MESSAGE + "/complete", status_code=200, summary="Complete a message", scopes=WRITE)
async def complete_message(buffer: Buffer, thread_id: ThreadId, message_id: _MessageId) -> Appended:
    return await buffer.complete_message(thread_id, message_id)


class AbortBody(Record, frozen=True, forbid_unknown_fields=True):
    reason: str | None = None


@post(_MESSAGE + "/abort", status_code=200, summary="Abort a message", scopes=ABORT, body=AbortBody | None)
async def abort_message(
    request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId, message_id: _MessageId
) -> Appended:
    """From either side; the body is `{"reason": "…"}`, or nothing."""
    body = await json_body(request, buffer, AbortBody, AbortBody(), SMALL_BODY)
    return await buffer.abort_message(thread_id, message_id, body.reason)


class Reading(NamedTuple):
    """What a reader's query asks for."""

    buffer: ChunkBuffer
    cursor: str | None
    follow: bool
    form: Format
    times: dict[str, Any]


def _reading_of(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    after: _After = None,
    follow: FromQuery[bool] = False,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
    form: Annotated[
        str | None, QueryParameter(name="format", description="raw: chunks as their producer sent them")
    ] = None,
) -> Reading:
    """From Last-Event-ID (which a browser sends when it reconnects), from ``after``, or the start."""
    seconds("poll_interval", poll_interval)  # of no effect, as nothing is polled for a reader
    formats = request.route_handler.opt["formats"]
    if form not in formats:
        raise BadRequest(f"There is no format {form!r:.80}; there is {', '.join(filter(None, formats)) or 'none'}.")
    times = {"idle_timeout": seconds("idle_timeout", idle_timeout), "expires": granted(request).expires}
    return Reading(buffer, request.headers.get("last-event-id") or after, follow, formats[form], times)


async def stream(reading: Reading, thread_id: str, message_id: str | None = None) -> ASGIResponse:
    buffer, cursor, follow, form, times = reading
    place = await buffer.locate(thread_id, message_id, after=cursor, follow=follow)
    if not form.tells_all:
        if place.reset:
            raise _cursor_gone()
        if cursor is not None and place.generation and not follow:
            page = await buffer.get_chunks(thread_id, message_id, after=cursor)
            place = msgspec.structs.replace(place, finished=not page.chunks and page.status != "active")
    return _event_stream(buffer, place, form, **times)


@get(THREAD + "/stream", summary="Follow a thread (SSE)", scopes=READ, token_in_query=True)
async def stream_thread(reading: NamedDependency[Reading], thread_id: ThreadId) -> ASGIResponse:
    """With `follow=true` it waits for a thread not made yet, and for the next message."""
    return await stream(reading, thread_id)


@get(_MESSAGE + "/stream", summary="Follow a message (SSE)", scopes=READ, token_in_query=True)
async def stream_message(
    reading: NamedDependency[Reading], thread_id: ThreadId, message_id: _MessageId
) -> ASGIResponse:
    """With `follow=true` it waits for a message not made yet."""
    return await stream(reading, thread_id, message_id)


class ResumeBody(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    """``known_content`` or ``after``; ``idle_timeout`` in seconds, or like ``30s``."""

    thread_id: str
    message_id: str
    known_content: str | None = None
    after: str | int | None = None
    poll_interval: float | str | None = None
    idle_timeout: float | str | None = None


@post(
    "/resume-stream",
    status_code=200,
    summary="Resume a message by the text one has (SSE)",
    scopes=READ,
    token_in_query=True,
    body=ResumeBody,
)
async def resume_stream(request: Request[Any, Any, Any], buffer: Buffer) -> ASGIResponse:
    body = await json_body(request, buffer, ResumeBody)
    if body.known_content is not None and body.after is not None:
        raise BadRequest("known_content and after exclude each other; send the one that you have.")
    quiet, _ = seconds("idle_timeout", body.idle_timeout), seconds("poll_interval", body.poll_interval)
    granted(request).require(READ, body.thread_id)
    locating = buffer.locate(body.thread_id, body.message_id, after=body.after, known_content=body.known_content)
    try:
        place = await _while_connected(request, locating)
    except NotFound:
        return Streamed([RETRY, _SERVER_SENT.event("complete", {"exists": False})], SSE_HEADERS)
    return _event_stream(buffer, place, idle_timeout=quiet, expires=granted(request).expires)


async def _while_connected(request: Request[Any, Any, Any], reading: Coroutine[Any, Any, _T]) -> _T:
    """What it reads, which takes long: not for a client that has hung up. Its body has been read."""
    gone, read = asyncio.ensure_future(request.receive()), asyncio.ensure_future(reading)
    try:
        await asyncio.wait((gone, read), return_when=asyncio.FIRST_COMPLETED)
        if not read.done():
            raise BadRequest("The connection was closed before there was an answer.")
        return read.result()
    finally:
        for task in (gone, read):
            task.cancel()  # of no effect where it is done


@get(THREAD + "/chunks", summary="Read chunks by pages, or by a long poll", scopes=READ, token_in_query=True)
async def get_chunks(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    thread_id: ThreadId,
    after: _After = None,
    message_id: FromQuery[str | None] = None,
    limit: FromQuery[int] = PAGE_ROWS,
    wait: FromQuery[float] = 0,
) -> ChunkPage:
    expires = granted(request).expires
    return await buffer.get_chunks(thread_id, message_id, after=after, limit=limit, wait=wait, expires=expires)


@get(THREAD + "/content", summary="The text so far", scopes=READ, token_in_query=True)
async def get_accumulated_content(
    request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId, message_id: FromQuery[str | None] = None
) -> ASGIResponse:
    is_text = request.accept.best_match(["application/json", "text/plain"]) == "text/plain"
    kind = "text/plain; charset=utf-8" if is_text else "application/json"
    content, pieces = await buffer.content(thread_id, message_id)
    return Streamed(_encoded_text(content, pieces, is_text), {"Vary": "Accept", "Content-Type": kind})


async def _encoded_text(
    content: AccumulatedContent, pieces: AsyncGenerator[str, None], is_text: bool
) -> AsyncGenerator[bytes, None]:
    """The text, or an AccumulatedContent with it, which is never whole in memory."""
    yield b"" if is_text else b'{"content":"'
    yield content.content.encode() if is_text else encode_json(content.content)[1:-1]
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece.encode() if is_text else encode_json(piece)[1:-1]
    yield b"" if is_text else f'","cursor":"{content.cursor}","status":"{content.status}"}}'.encode()


@get(THREAD, summary="A thread and its messages", scopes=READ, token_in_query=True)
async def get_thread_status(
    buffer: Buffer, thread_id: ThreadId, limit: FromQuery[int] = MESSAGES, list_cursor: _ListCursor = None
) -> ThreadStatus:
    """`messagesCursor` gets the next of its messages, where there are more."""
    return await buffer.get_thread_status(thread_id, limit, list_cursor)


@get("/threads", summary="Threads, the newest first", scopes=READ, token_in_query=True)
async def get_threads(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    status: FromQuery[Status | None] = None,
    limit: FromQuery[int] = 100,
    list_cursor: _ListCursor = None,
) -> ThreadPage:
    return await buffer.get_threads(status, limit, list_cursor, granted(request).threads)


@delete(THREAD, summary="Forget a thread, and erase its text", scopes=ADMIN)
async def clear_thread_buffer(buffer: Buffer, thread_id: ThreadId) -> None:
    await buffer.clear_thread_buffer(thread_id)


# ---------------------------------------------------------------------------------------------
# The app
# ---------------------------------------------------------------------------------------------

API_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Parts:
    """What the service is put together from; each extra adds to it."""

    def __init__(self, buffer: ChunkBuffer) -> None:
        self.buffer = buffer
        self.api: list[Any] = [  # below /api
            *(open_message, append_chunks, complete_message, abort_message, stream_thread, stream_message),
            *(resume_stream, get_chunks, get_accumulated_content, get_thread_status, get_threads, clear_thread_buffer),
        ]
        self.root: list[Any] = []  # below /
        self.pages: list[Any] = []  # below / too, and open to everybody
        # How the body of an append is taken, by its content type, and how a stream is told, by the query's format.
        self.bodies: dict[str, Callable[..., Awaitable[tuple[Appended, bool]]]] = {"application/json": _append_json}
        self.formats: dict[str | None, Format] = {None: _SERVER_SENT}
        self.dialects: list[Any] = []  # what is known of other people's streams
        self.producing: Any = None  # what extras/producing.py lets others do too
        # Those of answers below a path, unless they say themselves how they may be cached.
        self.headers: dict[str, dict[str, str]] = {"/api": API_HEADERS}
        self.guards: list[Guard] = []
        self.grant_of: Callable[[str], Grant] | None = None  # what a token allows, where there is a secret
        self.connection: list[type[HttpToolsProtocol]] = []  # what serves a connection, the first one outermost
        self.middleware: list[DefineMiddleware] = [DefineMiddleware(Gate, settings=buffer.settings)]
        self.openapi: OpenAPIConfig | None = None
        self.openapi_pages: list[Any] = []
        self.on_start: list[Callable[[], None]] = []  # called once the service listens
        self.on_stop: list[Callable[[], None]] = []  # called as soon as it is told to stop
        mounted = set()
        for extra in _found_extras():
            mounted.add(extra.__name__.rpartition(".")[2])
            if hasattr(extra, "mount"):
                extra.mount(self)
        for setting, needed in (("secret", "tokens"), ("upstream", "relay")):
            if getattr(buffer.settings, setting) and needed not in mounted:
                raise StartupError(f"{setting} is set, and nothing here knows of it; put extras/{needed}.py in place")

    def router(self, path: str, handlers: Sequence[Any]) -> Router:
        return Router(
            path,
            route_handlers=handlers,
            guards=self.guards,
            dependencies={
                "buffer": Provide(lambda: self.buffer, use_cache=True, sync_to_thread=False),
                "reading": Provide(_reading_of, sync_to_thread=False),
            },
            exception_handlers=_ERROR_ANSWERS,
            opt={"bodies": self.bodies, "formats": self.formats},
        )

    async def add_headers(self, message: Message, scope: Scope) -> None:
        if message["type"] == "http.response.start":
            said = list(message["headers"])
            if all(name.lower() != b"cache-control" for name, _ in said):
                of_path = [headers for path, headers in self.headers.items() if scope["path"].startswith(path)]
                added = [(name.lower().encode(), value.encode()) for some in of_path for name, value in some.items()]
                message["headers"] = said + added


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
        return _app_of(Parts(buffer))
    buffer = ChunkBuffer(settings)
    return _app_of(Parts(buffer), lifespan=[buffer])


def _app_of(parts: Parts, lifespan: Sequence[AbstractAsyncContextManager[Any]] = ()) -> Litestar:
    origins = list(parts.buffer.settings.cors_origins)
    return Litestar(
        [parts.router("/api", parts.api), parts.router("/", parts.root), *parts.pages],
        lifespan=list(lifespan),
        middleware=parts.middleware,
        before_send=[parts.add_headers],
        cors_config=CORSConfig(allow_origins=origins) if origins else None,
        openapi_config=parts.openapi,
        exception_handlers=_ERROR_ANSWERS,
        logging_config=None,
    )


def _answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Whatever it is, as a problem document; of what nobody has thought of, only the log says what it is."""
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, ProblemDetailsException):
        problem = error
    elif isinstance(error, HTTPException):  # what Litestar itself refuses
        detail = error.detail or HTTPStatus(error.status_code).phrase
        if isinstance(error, ValidationException) and isinstance(error.extra, list):
            detail = "; ".join(f"{item.get('key', 'body')}: {item['message']}" for item in error.extra) + "."
        problem = Problem(detail)
        problem.status_code, problem.title = error.status_code, HTTPStatus(error.status_code).phrase
    else:
        log.error("unexpected: %s", error, exc_info=error)
        problem = Problem("Something went wrong here; the log of the service says what.")
    if cast(Any, request.scope).get("has_more_body"):
        headers["Connection"] = "close"  # as a body that is answered before its end is not read on
    return Response(
        problem_document(problem),
        media_type="application/problem+json",
        status_code=problem.status_code,
        headers=headers,
    )


_ERROR_ANSWERS: ExceptionHandlersMap = dict.fromkeys((HTTPException, Exception), _answer_error)


class Gate:
    """Who may connect at all.

    A page of another origin must not reach a service that trusts whoever is on the same machine,
    neither directly nor by a name of its own that resolves to loopback: without a secret ``Host``
    has to be a loopback name, and a foreign ``Origin`` has to be among ``cors_origins``.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._any_host = bool(settings.secret or settings.uds) or not _is_loopback(settings.host)
        self._origins = settings.cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
            if refusal := self.refusal(hosts or [""], origins):
                log.warning("refused: %s", refusal.detail)
                raise refusal
            try:
                unquote_to_bytes(scope.get("raw_path", b"")).decode()
            except UnicodeDecodeError as error:
                raise BadRequest("The path is not valid UTF-8; percent-encode ids as UTF-8.") from error
        await self._app(scope, receive, send)

    def refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> Forbidden | None:
        if not self._any_host and not (len(hosts) == 1 and _is_loopback_host(hosts[0])):
            return Forbidden(f"{hosts!r:.80} is not a loopback name; set a secret to serve others than this machine.")
        if all(origin in self._origins or origin.partition("://")[2] == hosts[0] for origin in origins):
            return None
        return Forbidden(f"Pages of the origin {origins!r:.80} may not connect; name it in cors_origins.")


@lru_cache(maxsize=256)
def _is_loopback_host(header: str) -> bool:
    """Whether a Host header names this machine."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^][:@/\s]+))(?::[0-9]{1,5})?", header)  # RFC 9110, 7.2
    return match is not None and _is_loopback(match[1] or match[2])


def _is_loopback(name: str) -> bool:
    """Whether what listens on this name can be reached from this machine only."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------
# Serve
# ---------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn, which ends streams as soon as it is told to stop, and then exits with 0, however often it is told."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts
        self._loop = asyncio.get_running_loop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """What tells it to stop once more must not end the process while the store is being closed, or after that."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, signal.SIG_IGN if self.should_exit else handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._parts.buffer.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        settings = self._parts.buffer.settings
        addresses = [listener.getsockname() for server in self.servers for listener in server.sockets]
        where = ", ".join(a if isinstance(a, str) else _url_of(*a[:2]) for a in addresses)
        kept = re.sub("//[^/]*@", "//", settings.store.partition("?")[0])  # with no password in it
        kept = kept or f"SQLite {sqlite3.sqlite_version}, database {settings.db}, synchronous={settings.synchronous}"
        who = "anyone who can connect" if settings.allow_anonymous else "this machine only"
        who = "whoever has a token" if settings.secret else who
        print(f"resume-stream {__version__} on {where}, {kept}, open to {who}", flush=True)
        for tell in self._parts.on_start:
            tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for tell in self._parts.on_stop:
            tell()
        self._loop.call_later(0.2, self._cut_stuck_connections)  # whose readers do not read
        await super().shutdown(sockets)

    def _cut_stuck_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listening(settings: Settings) -> list[socket.socket]:
    """None of them where uvicorn makes the Unix socket. Raises StartupError."""
    if settings.uds:
        folder = Path(settings.uds).absolute().parent
        if not os.access(folder, os.W_OK | os.X_OK) or len(os.fsencode(settings.uds)) > 107:
            raise StartupError(
                f"cannot listen on {settings.uds}: {folder} is no folder that can be written, or the path has over"
                " 107 bytes (unix(7))"
            )
        return []
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return [socket.create_server((settings.host, settings.port), family=family, backlog=2048)]
    except (OSError, OverflowError) as error:
        raise StartupError(f"cannot listen on {_url_of(settings.host, settings.port)}: {error}") from error


async def _serve(settings: Settings) -> None:
    if not (settings.secret or settings.allow_anonymous or settings.uds or _is_loopback(settings.host)):
        raise StartupError(
            f"{settings.host} can be reached from other machines; set a secret, or say --allow-anonymous"
        )
    async with contextlib.AsyncExitStack() as exits:
        # First, as a port that is taken is to leave no database behind.
        sockets = [exits.enter_context(listener) for listener in _listening(settings)]
        parts = Parts(await exits.enter_async_context(ChunkBuffer(settings)))
        config = uvicorn.Config(
            _app_of(parts),
            http=type("Connection", (*parts.connection, HttpToolsProtocol), {}),
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
        await _Server(config, parts).serve(sockets or None)


Commands = Any  # argparse keeps the type of what add_subparsers returns to itself
_Command = Callable[[Settings, dict[str, Any]], int | None]


def add_command(commands: Commands, name: str, summary: str, run: _Command, *settings: str) -> argparse.ArgumentParser:
    """A command with a flag for each of these settings; what it runs gives its exit status, or raises StartupError."""
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, argument_default=argparse.SUPPRESS
    )
    added.set_defaults(run=lambda flags: run(_settings_from(os.environ, flags), flags))
    for setting in settings:
        kind, called, says = SETTINGS[setting]
        options: dict[str, Any] = {"help": f"{says} (default: {_setting_text(setting)})", "metavar": called}
        if kind is bool:
            options |= {"nargs": "?", "const": "true"}
        if kind == tuple[str, ...]:
            options |= {"action": "append"}
        added.add_argument(f"--{setting.replace('_', '-')}", **options)
    return added


def _setting_text(name: str) -> str:
    """The default as one would write it."""
    kind, value = SETTINGS[name][0], getattr(Settings(), name)
    if kind in (Duration, Size) and value:
        units = _DURATION_UNITS if kind is Duration else _SIZE_UNITS
        unit, factor = next((unit, factor) for unit, factor in reversed(units.items()) if round(value / factor, 9) >= 1)
        return f"{value / factor:g}{unit}"
    return "none" if value in ("", ()) else str(value).lower() if kind is bool else str(value)


def _settings_from(environment: Mapping[str, str], flags: Mapping[str, Any]) -> Settings:
    """Raises StartupError."""
    values, source = {}, "settings"
    try:
        for name in SETTINGS:
            flag, variable = f"--{name.replace('_', '-')}", f"RESUME_STREAM_{name.upper()}"
            if name in flags or variable in environment:
                source, text = (flag, flags[name]) if name in flags else (variable, environment[variable])
                value = _checked_setting(name, ",".join(text) if isinstance(text, list) else text, is_text=True)
                values[name] = getattr(Settings(**{name: value}), name)  # alone, so that it is said where it comes from
        return Settings(**values)
    except ValueError as error:
        raise StartupError(f"{source}: {error}") from error


def _run_serve(settings: Settings, flags: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for extra in _found_extras():
        if hasattr(extra, "set_up"):
            extra.set_up(settings)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its own lines have queries in them, which may hold a token
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing" not in record.msg)  # see BrokenOff
    uvloop.run(_serve(settings))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("resume-stream", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_command(commands, "serve", "run the service", _run_serve, *SETTINGS)
    for extra in _found_extras():
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
