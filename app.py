"""resume-stream keeps what an agent streams, so that a reader can resume from the exact place where it stopped.

Producers append chunks to the messages of a thread. The service commits every chunk to SQLite before it
acknowledges it, and gives it a place in the thread's one sequence. Readers follow that sequence by cursor.

The file reads from top to bottom, and each part knows only the parts above it. Each file in ``extras/`` adds
something, if it is there. As a library::

    async with ChunkBuffer(Settings(db="answers.db")) as buffer:
        await buffer.add_chunks("thread-1", "run-1", ["Hello", " world"], complete=True)
        async for item in buffer.resume_stream("thread-1", "run-1", known_content="Hel"):
            print(item)
"""

from __future__ import annotations

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
import time
import weakref
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, aclosing
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated, Any, ClassVar, Literal, NewType, Protocol, Self, TypeVar, cast, get_args, get_type_hints
from urllib.parse import quote, unquote_to_bytes

import aiosqlite
import msgspec
import uvicorn
import uvloop
from litestar import Controller, Litestar, Request, Response, Router, delete, get, post, put
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import MutableScopeHeaders
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.middleware import DefineMiddleware
from litestar.openapi import OpenAPIConfig
from litestar.params import FromQuery, PathParameter, QueryParameter
from litestar.plugins.problem_details import ProblemDetailsException
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import ASGIApp, ExceptionHandlersMap, Guard, Message, Receive, Send
from litestar.types import Scope as ASGIScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__version__ = "0.1.0"
if not __package__:  # run as a file, or copied beside other code: extras still import it as resume_stream.app
    __path__ = [str(Path(__file__).parent)]
    sys.modules["resume_stream"] = sys.modules["resume_stream.app"] = sys.modules[__name__]

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Exception)
_S = TypeVar("_S", bound="ThreadSummary")
_log = logging.getLogger("resume_stream")

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

Duration = NewType("Duration", float)
Size = NewType("Size", int)

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def parse_duration(text: str) -> Duration:
    """Return the seconds in ``100ms``, ``30s``, ``5m``, ``1h``, ``2d``, or a bare number. Raise ValueError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|d)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 100ms, 30s, 5m or 1h")
    return Duration(float(match[1]) * _DURATION_UNITS[match[2] or "s"])


def _parse_size(text: str) -> Size:
    """Return the bytes in ``64KiB``, ``10MiB``, ``2GiB``, or a bare number. Raise ValueError."""
    match = re.fullmatch(r"(\d{1,15})(B|KiB|MiB|GiB)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 64KiB, 10MiB or 2GiB")
    return Size(int(match[1]) * _SIZE_UNITS[match[2] or "B"])


def _parse_list(text: str) -> tuple[str, ...]:
    """Split a list at its commas. Browsers send an origin without a final slash (RFC 6454), so drop it."""
    return tuple(item.strip().rstrip("/") for item in text.split(",") if item.strip())


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the service. A duration is seconds or like ``"30s"``, a size is bytes or like ``"64KiB"``."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    uds: str = ""  # a Unix socket in place of host and port
    db: str = "resume-stream.db"
    store: str = ""  # the address of a Redis in place of the SQLite file
    ttl: Duration = Duration(3600)
    cleanup_interval: Duration = Duration(300)
    idle_timeout: Duration = Duration(30)  # 0: never
    heartbeat: Duration = Duration(15)
    poll_interval: Duration = Duration(0.1)
    producer_timeout: Duration = Duration(300)  # 0: never
    packing: bool = True
    synchronous: Literal["FULL", "NORMAL"] = "FULL"
    max_chunk: Size = Size(1024**2)
    max_body: Size = Size(10 * 1024**2)
    max_message: Size = Size(64 * 1024**2)
    max_db: Size = Size(0)  # 0: as large as the disk
    max_readers: int = 10_000
    secret: str = ""
    upstream: tuple[str, ...] = ()
    max_relays: int = 1_000
    cors_origins: tuple[str, ...] = ()
    allow_anonymous: bool = False
    log_format: Literal["auto", "console", "json"] = "auto"

    def __post_init__(self) -> None:
        for name in SETTINGS:
            msgspec.structs.force_setattr(self, name, _checked_setting(name, getattr(self, name)))
        if self.cleanup_interval < 0.01:
            raise ValueError("the cleanup_interval is so short that it would never pause; give it 1s or more")
        if 0 < (size := len(self.secret.encode())) < 32:
            raise ValueError(
                f"the secret has {size} bytes, and HS256 asks for 32 or more (RFC 7518, 3.2); make one"
                " with: openssl rand -hex 32"
            )


_PARSERS: dict[Any, Callable[[str], Any]] = {Duration: parse_duration, Size: _parse_size, tuple[str, ...]: _parse_list}
_KINDS = {str: "TEXT", int: "NUMBER", bool: "true|false", Duration: "DURATION", Size: "SIZE", tuple[str, ...]: "LIST"}
SETTINGS: dict[str, tuple[Any, str]] = {  # the type of each setting, and what people call it
    name: (kind, _KINDS.get(kind) or "|".join(get_args(kind))) for name, kind in get_type_hints(Settings).items()
}


def _checked_setting(name: str, value: Any, is_text: bool = False) -> Any:
    """Return the value of a setting, parsed from text if need be. Raise ValueError with one sentence for a person."""
    kind, called = SETTINGS[name]
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
RELAYED = "relayed:"  # begins the event of a relayed message's first chunk, which names the upstream
_CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f]")
_MAX_NAME = 200  # characters of an id or an event
PRODUCER_TIMEOUT = "producer_timeout"


class Record(msgspec.Struct, frozen=True, rename="camel"):
    """A frozen record, in camelCase on the wire."""


class Chunk(Record, frozen=True, forbid_unknown_fields=True):
    """A piece of a message, as a producer sends it."""

    content: str  # up to max_chunk bytes in UTF-8
    event: str | None = None  # an SSE event name: 1 to 200 characters, no control character, none of the service's own


class StoredChunk(Record, frozen=True):
    """A chunk in its place. ``timestamp`` is the time at which its transaction began, in ms since 1970."""

    content: str
    timestamp: int
    message_id: str
    seq: int
    event: str | None = None


class MessageEnd(Record, frozen=True):
    """The end of a message, which takes a place in the sequence like a chunk."""

    message_id: str
    status: Status
    reason: str | None
    seq: int


Entry = StoredChunk | MessageEnd


class Signal(enum.Enum):
    """What a reader is told besides chunks and ends."""

    RESET = "reset"  # forget what you have; everything follows
    GONE = "gone"  # the thread was cleared or expired
    TIMEOUT = "timeout"  # no chunk for idle_timeout
    HEARTBEAT = "heartbeat"  # no chunk, and the stream is alive
    ERROR = "error"  # a problem follows


class Cursor(Record, frozen=True):
    """A place in a thread's sequence, ``<generation>-<seq>`` on the wire: the reader has everything up to ``seq``."""

    seq: int
    generation: int | None = None  # None: a bare seq, which cannot tell a thread from a later one of the same name

    def __str__(self) -> str:
        return str(self.seq) if self.generation is None else f"{self.generation}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        match = re.fullmatch(r"(?:(\d{1,18})-)?(\d{1,18})", text, re.ASCII)
        if match is None:
            raise BadRequest(f"{text!r:.80} is not a cursor; send an id as the stream gave it, like 1763829000123-42.")
        return cls(int(match[2]), int(match[1]) if match[1] else None)


class Appended(Record, frozen=True):
    """The answer to a producer."""

    thread_id: str
    message_id: str
    seq: int  # the place of the last entry that it asked for
    chunk_count: int  # the message's chunks up to there, which is the index of the next one
    status: Status


class MessageStatus(Record, frozen=True):
    """One message of a thread. ``last_seq`` is the place of its end once it has ended."""

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
    """One thread with its messages in the order in which they began. ``messages_cursor`` gets the next page."""

    cursor: str = ""
    messages: list[MessageStatus] = []
    messages_cursor: str | None = None
    exists: bool = True


class ThreadPage(Record, frozen=True):
    """Threads, the newest first. ``cursor`` gets the next page; it is None on the last page."""

    threads: list[ThreadSummary]
    cursor: str | None


class AccumulatedContent(Record, frozen=True):
    """The text so far. A stream from ``cursor`` gives exactly what comes after it."""

    content: str
    cursor: str
    status: Status


class ChunkPage(Record, frozen=True):
    """The entries after a cursor. ``status`` is completed or aborted only on the page that holds the end."""

    chunks: list[StoredChunk]
    ends: list[MessageEnd]
    cursor: str
    status: Status


class Page:
    """Consecutive entries of a thread's sequence. Its reader then has everything it asked for up to ``last_seq``."""

    __slots__ = ("entries", "generation", "last_seq", "size")
    shared: dict[Any, bytes] | None = None  # encodings that all readers share (see extras/live.py)

    def __init__(self, generation: int, last_seq: int, entries: Sequence[Entry], size: int = 0) -> None:
        self.generation, self.last_seq, self.entries, self.size = generation, last_seq, entries, size

    @property
    def end(self) -> MessageEnd | None:
        end = self.entries[-1]
        return end if isinstance(end, MessageEnd) else None

    def encoded(self, form: Format) -> bytes:
        return form.frames(self)


class Format(Protocol):
    """How a stream says things on one kind of wire. What it has no word for is empty."""

    tells_all: bool  # False: the body is broken off instead of saying what this wire has no word for

    def frames(self, page: Page) -> bytes: ...
    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes: ...


class State(Record, frozen=True):
    """A thread and one of its messages, as one transaction sees them."""

    generation: int = 0  # 0: there is no such thread
    last_seq: int = 0
    active: bool = False  # True if any message of the thread is active
    status: Status | None = None  # None: the thread has no such message
    reason: str | None = None
    chunk_count: int = 0
    size: int = 0  # bytes of the message's text, in UTF-8
    first: int | None = None  # the message's first and last place
    last: int | None = None
    updated_at: int = 0  # the message's last change, in ms since 1970
    version: int = 0  # of the thread: grows with each change, in stores that may tell of changes out of order

    @property
    def order(self) -> tuple[int, int, int]:
        """The key that orders two states of one thread by age."""
        return self.generation, self.last_seq, self.version

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "aborted")

    @property
    def before(self) -> int:
        """The place right before the message's first entry."""
        return self.last_seq if self.first is None else self.first - 1

    @property
    def cursor(self) -> str:
        """The cursor of a reader that has the whole thread."""
        return str(Cursor(self.last_seq, self.generation))


class Append(Record, frozen=True):
    """A write: append chunks, and open the message if need be."""

    thread_id: str
    message_id: str
    chunks: Sequence[Chunk]
    sizes: Sequence[int]  # bytes of each chunk in UTF-8
    index: int | None = None  # the number of the first chunk in its message
    complete: bool = False
    generation: int | None = None  # the thread must have it: a long upload stays in the thread in which it began


class Open(Record, frozen=True):
    """A write: make the message and its thread if need be, else record a sign of life."""

    thread_id: str
    message_id: str


class End(Record, frozen=True):
    """A write: end a message. With ``untouched_since`` (ms), only if nobody has appended to it since."""

    MAX_REASON: ClassVar[int] = 1000  # characters

    thread_id: str
    message_id: str
    status: Status
    reason: str | None = None
    untouched_since: int | None = None


class Clear(Record, frozen=True):
    """A write: forget a thread. With ``untouched_since`` (ms), only if nobody has touched it since."""

    thread_id: str
    untouched_since: int | None = None


Write = Append | Open | End | Clear


class Change(Record, frozen=True):
    """What a write did: the state right after it, and the entries that it added."""

    thread_id: str
    message_id: str
    state: State
    timestamp: int
    chunks: Sequence[Chunk] = ()
    size: int = 0  # bytes of the chunks' text
    ended: bool = False
    made: bool = False  # the message is new
    cleared: bool = False  # the thread is forgotten

    @property
    def changed(self) -> bool:
        return bool(self.chunks) or self.ended or self.made or self.cleared

    @property
    def answer(self) -> Appended:
        state = self.state
        return Appended(self.thread_id, self.message_id, state.last or 0, state.chunk_count, cast(Status, state.status))


class Place(Record, frozen=True):
    """The place from which a reader reads on."""

    thread_id: str
    message_id: str | None
    generation: int  # 0 if the thread does not exist yet
    after: int
    follow: bool = False  # wait for a thread or message that does not exist yet, and for a thread's next message
    skip: int = 0  # bytes of the next chunk that the reader has already
    reset: bool = False
    finished: bool = False  # nothing will ever come after this place


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class Problem(ProblemDetailsException):
    """An error for people, a problem document on the wire (RFC 9457). ``members`` are its extension members."""

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

    @property
    def document(self) -> dict[str, Any]:
        members = self.extra if isinstance(self.extra, dict) else {}
        return {"status": self.status_code, "title": self.title, "detail": self.detail, **members}


class BadRequest(Problem, status=400, kind="Bad request"): ...


class Unauthorized(Problem, status=401, kind="Unauthorized", headers={"WWW-Authenticate": "Bearer"}):
    @classmethod
    def expired(cls) -> Self:
        return cls("The token has expired; get a new one, and carry on from the cursor.")


class Forbidden(Problem, status=403, kind="Forbidden"): ...


class NotFound(Problem, status=404, kind="Not found"):
    @classmethod
    def thread(cls, thread_id: str) -> Self:
        return cls(f"There is no thread {thread_id!r}; it was never made, or was cleared or expired.", exists=False)

    @classmethod
    def message(cls, thread_id: str, message_id: str) -> Self:
        return cls(f"The thread {thread_id!r} has no message {message_id!r}.", exists=False)


class Conflict(Problem, status=409, kind="Conflict"):
    @classmethod
    def ended(cls, message_id: str, state: State) -> Self:
        why = f" ({state.reason})" if state.reason else ""
        return cls(
            f"The message {message_id!r} was {state.status}{why}, and an end is final; begin a new message.",
            messageStatus=state.status,
            reason=state.reason,
            chunkCount=state.chunk_count,
        )

    @classmethod
    def cleared(cls) -> Self:
        return cls("The thread was cleared while this message was being written; begin a new message.")

    @classmethod
    def gap(cls, append: Append, state: State) -> Self:
        return cls(
            f"The message {append.message_id!r} has {state.chunk_count} chunks, so index={append.index} would leave a"
            f" gap; go on with index={state.chunk_count}.",
            expectedIndex=state.chunk_count,
        )

    @classmethod
    def other_chunk(cls, message_id: str, index: int, state: State) -> Self:
        return cls(
            f"Another chunk is stored as index {index} of the message {message_id!r}: another producer writes to it,"
            " or this one sent something else before. Stop, or begin a new message.",
            expectedIndex=state.chunk_count,
        )

    @classmethod
    def other_producer(cls, message_id: str, state: State) -> Self:
        return cls(
            f"The message {message_id!r} has chunks after those that would complete it: another producer writes to it."
            " Stop, or begin a new message.",
            expectedIndex=state.chunk_count,
        )


class CursorGone(Problem, status=410, kind="Cursor of another generation"):
    @classmethod
    def unknown(cls) -> Self:
        return cls(
            "This cursor is of a thread that was cleared or expired, or lies beyond its end; read from the start, with"
            " no after."
        )


class TooLarge(Problem, status=413, kind="Over a limit"):
    @classmethod
    def message(cls, size: int, max_message: int) -> Self:
        return cls(
            f"The message would take {size} bytes, of which each chunk is {CHUNK_WEIGHT} besides its text, over"
            f" max_message ({max_message}); complete it and go on in another."
        )

    @classmethod
    def chunks(cls) -> Self:
        return cls(f"There are over {_MAX_CHUNKS} chunks in one append; send them in parts.")


class UnsupportedMediaType(Problem, status=415, kind="Unsupported media type"): ...


class InvalidContent(Problem, status=422, kind="Invalid content"):
    @classmethod
    def json(cls, text: bytes | bytearray, error: Exception, where: str = "The body") -> Self:
        pairs = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\\\", re.DOTALL)
        if not isinstance(error, msgspec.ValidationError) and re.search(rb"\\u[dD][89a-fA-F]", pairs.sub(b"", text)):
            return cls(
                f"{where} has a lone surrogate, which is not valid Unicode; send both halves of the pair in one chunk."
            )
        return cls(f'{where} is not a chunk like {{"content": "text"}}: {error}.')


class Unavailable(Problem, status=503, kind="Unavailable", headers={"Retry-After": "1"}): ...


class BadRows(Unavailable, status=503, kind="Unavailable", headers={"Retry-After": "1"}):
    """The rows of one thread may be the cause, so the writes of a commit are tried one by one."""


class DatabaseFull(Problem, status=507, kind="Database full"): ...


class Stopping(Unavailable, status=503, kind="Unavailable", headers={"Retry-After": "1"}):
    def __init__(self) -> None:
        super().__init__("The service is stopping; try again when it is back.")


class StartupError(Exception):
    """Why the service cannot start, in one line."""


class BrokenOff(Exception):
    """The body must be broken off: its end would look like a complete answer (RFC 9112, 8)."""


# ---------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------

_SCHEMA_VERSION = 3

CHUNK_WEIGHT = 16  # bytes that a chunk counts in its message besides its text
_CHUNK_OVERHEAD = 64  # bytes that a waiting chunk counts besides its text
_MAX_CHUNKS = 10_000  # in one append
_PENDING_BYTES = 8 * 1024**2  # waiting for a commit; beyond it producers wait
PAGE_ROWS = 512
PAGE_BYTES = 256 * 1024  # of a page's text, counted in characters
_MESSAGES = 1_000  # most messages on one page of a thread's status
BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process's lock
_WAL_BYTES = 16 * 1024**2  # beyond this size a checkpoint also truncates the WAL

Told = Callable[[Sequence[tuple[Change, float | None]], float | None], None]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Store(Protocol):
    """What the buffer needs of a store.

    A write is done after its commit, and writes are committed in the order of the calls. Before it answers, the store
    calls ``told`` with the changes of each commit, in order: each with the time of its call (time.perf_counter), and
    all with the seconds that the commit took, or without times if another process made them. Each call reads one
    moment, and may raise Problem; then a write has changed nothing. Times are ms since 1970.
    """

    # Raise StartupError if the store cannot be served, and leave everything as it was. Closing commits what waits.
    async def open(self, told: Told) -> None: ...
    async def close(self) -> None: ...
    def stop(self) -> None: ...  # close() is near: interrupt long reads

    # A producer waits for room before it writes text. Writes raise NotFound, Conflict, and TooLarge.
    def write(self, write: Write) -> Awaitable[Change]: ...
    async def room(self) -> None: ...
    @property
    def has_room(self) -> bool: ...

    # match and status raise NotFound.
    async def find(self, thread_id: str, message_id: str | None = None) -> State: ...
    # Return up to ``limit`` entries after ``after``, and the state that they belong to.
    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]: ...
    # Return the place from which a reader with this text of the message reads on.
    async def match(self, thread_id: str, message_id: str, known_content: str) -> Place: ...
    # Return the thread with up to ``limit`` of its messages, without the first ``after``.
    async def status(self, thread_id: str, limit: int, after: int) -> ThreadStatus: ...
    # Return the newest threads of a generation below ``before`` that an id or ``prefix*`` in ``covered`` names.
    async def threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage: ...

    # Return some (thread, message) pairs that are active and had no append since.
    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]: ...
    async def expire(self, untouched_since: int) -> int: ...  # forget some threads; return how many
    async def erase(self) -> bool: ...  # erase the text of forgotten threads; False: try again later
    async def upkeep(self) -> None: ...  # do other periodic work
    async def probe(self) -> None: ...  # write something, to learn whether the store takes writes
    async def measure(self) -> tuple[int, int, int]: ...  # bytes of the database and its WAL, active messages


def check_exists(found: State, thread_id: str, message_id: str | None = None) -> None:
    """Raise NotFound if the state has no such thread or message."""
    if not found.generation:
        raise NotFound.thread(thread_id)
    if message_id is not None and found.status is None:
        raise NotFound.message(thread_id, message_id)


def _place_of(found: State, thread_id: str, message_id: str | None, cursor: Cursor | None, follow: bool) -> Place:
    """Return the place from which a reader with this cursor reads on. Raise NotFound."""
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
    """Return where in the text (RFC 3629, 1: UTF-8 occurs where its bytes do) a prefix or unique part ends, or None."""
    start = 0 if text.startswith(known) else text.find(known)
    is_unique = start == 0 or (start > 0 and text.find(known, start + 1) < 0)
    return start + len(known) if is_unique else None


@contextlib.contextmanager
def logged_problems(task: str) -> Iterator[None]:
    """Log a Problem, so that a periodic task goes on after it: its cause may go away."""
    try:
        yield
    except Stopping:
        return
    except Problem as error:
        _log.warning("%s failed, and will be tried again: %s", task, error)


class GroupCommit:
    """Commits all writes of one turn of the loop together, in order, and tells of them before it answers."""

    def __init__(self) -> None:
        self._told: Told = lambda changes, took: None
        self._waiting: list[tuple[Write, float, asyncio.Future[Change]]] = []  # with the time of the call
        self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._committing: asyncio.Task[None] | None = None
        self._last_batch = 1  # writes in the last commit
        self.refused_ms = 0  # the time of the last failed commit

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        """Commit the writes in one transaction and return an outcome for each. Raise Problem if it fails."""
        raise NotImplementedError

    async def all_committed(self) -> None:
        if self._committing is not None:
            await asyncio.shield(self._committing)

    @property
    def has_room(self) -> bool:
        """True if a producer may write without waiting."""
        return self._has_room.is_set()

    async def room(self) -> None:
        while not self._has_room.is_set():  # another producer may have filled it again
            await self._has_room.wait()

    def write(self, write: Write) -> asyncio.Future[Change]:
        """Queue the write for the next commit."""
        size = _CHUNK_OVERHEAD
        if isinstance(write, Append):
            size = sum(write.sizes) + _CHUNK_OVERHEAD * len(write.chunks)
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
            self._last_batch = len(batch)
            await self._commit_batch(batch, size)

    async def _gather(self) -> None:
        """Wait for more writes, or producers would split into halves that wait for each other's commits."""
        quiet, seen = 0, len(self._waiting)
        while self._last_batch > 1 and quiet < 3 and seen < 512:  # three turns without a new write, or 512 writes
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            seen = len(self._waiting)

    def refused(self, error: _E) -> _E:
        """Note that a commit failed through no fault of the producers, and return the error."""
        _log.error("commit failed: %s", error)
        self.refused_ms = now_ms()
        return error

    async def _commit_batch(self, batch: Sequence[tuple[Write, float, asyncio.Future[Change]]], size: int) -> None:
        began = time.perf_counter()
        outcomes: Sequence[Change | Exception]
        try:
            outcomes = await self.commit([write for write, _, _ in batch], size)
        except Exception as error:
            outcomes = [self.refused(error)] * len(batch)
        else:
            pairs = zip(batch, outcomes, strict=True)
            changes = [(outcome, asked) for (_, asked, _), outcome in pairs if isinstance(outcome, Change)]
            self._told(changes, time.perf_counter() - began)
        for (_, _, waiting), outcome in zip(batch, outcomes, strict=True):
            if waiting.done():
                continue  # the producer has gone; its write stays committed
            if isinstance(outcome, Change):
                waiting.set_result(outcome)
            else:
                waiting.set_exception(outcome)


# SQLite


def database_problem(error: Exception) -> Problem:
    """Return the Problem for an error of SQLite (https://www.sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == 0 and not isinstance(error, OSError):
        code = sqlite3.SQLITE_CORRUPT  # Python itself finds text that is not UTF-8, and has no code for it
    if code == sqlite3.SQLITE_INTERRUPT or "closed database" in str(error):
        return Stopping()
    if code == sqlite3.SQLITE_FULL:
        return DatabaseFull("The disk or the size limit (max_db) is full; free space and retry.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable("Another process keeps the database locked; retry once it is done.")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return BadRows(f"The rows of this thread do not fit together ({error}), as after an edit by hand; clear it.")
    if str(error) in ("user-defined function raised exception", "malformed JSON"):  # from the view "entries"
        return BadRows("A pack of this thread is damaged; clear the thread, or restore the database from a backup.")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return BadRows("The database is damaged; restore it from a backup.")
    kind = BadRows if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH) else Unavailable
    return kind(f"The database cannot be used ({error}); mend the cause and retry.")


def unpacked(data: bytes, size: int) -> str:
    """Return the JSON text of a pack. zlib compares its checksum."""
    return zlib.decompress(data).decode()


def open_packs(db: sqlite3.Connection) -> None:
    """Give this connection the function that opens packs. The sqlite3 shell has it built in."""
    db.create_function("sqlar_uncompress", 2, unpacked, deterministic=True)


class Row(State, frozen=True):
    """A State with the keys of its rows. A key is None if the row does not exist yet."""

    thread: int | None = None
    message: int | None = None


# The chunks of a message. SQLite opens only the packs that overlap its places.
_OF_MESSAGE = (
    " from entries where thread = ?1 and message = ?2 and seq between ?3 and ?4 and last >= ?3 and first <= ?4"
    " and content is not null"
)


def _row_of(db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> Row:
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


def _existing(db: sqlite3.Connection, thread_id: str, message_id: str | None = None) -> Row:
    found = _row_of(db, thread_id, message_id)
    check_exists(found, thread_id, message_id)
    return found


def _page_of(
    db: sqlite3.Connection, thread_id: str, message_id: str | None, after: int, limit: int
) -> tuple[State, Page]:
    found = _row_of(db, thread_id, message_id)
    begin, end = (after, found.last_seq) if message_id is None else (max(after, found.before), found.last or 0)
    query = (
        "select seq, message, event, content, timestamp, last from entries"
        " where thread = ?1 and seq between ?2 and ?3 and last >= ?2 and first <= ?3"
        " and (?4 is null or message = ?4) order by last"
    )
    messages: dict[int, tuple[str, Status, str | None] | None] = {}  # a join would open every pack
    entries: list[Entry] = []
    size, is_full = 0, False
    # The cursor has no name: an error's traceback would keep it, and with it this snapshot.
    for seq, message, event, content, timestamp, _ in db.execute(query, (found.thread, begin + 1, end, found.message)):
        if message not in messages:
            of_it = "select message_id, status, reason from messages where message = ?"
            messages[message] = db.execute(of_it, (message,)).fetchone()
        if (known := messages[message]) is None:
            continue  # somebody deleted the message by hand, before its text was deleted with it
        is_end = content is None
        entries.append(MessageEnd(*known, seq) if is_end else StoredChunk(content, timestamp, known[0], seq, event))
        size += len(content or "")
        if is_full := size >= PAGE_BYTES or len(entries) == limit:
            break
    return found, Page(found.generation, entries[-1].seq if is_full else found.last_seq, entries, size)


def _match(db: sqlite3.Connection, thread_id: str, message_id: str, known: bytes) -> Place:
    """Search from the end, because a reader that resumes mostly has nearly all of the text."""
    found = _existing(db, thread_id, message_id)
    of_message = (found.thread, found.message, found.first, found.last)
    # As a blob, because SQLite's text functions stop at a NUL.
    whole = f"select cast(group_concat(content, '') as blob) from (select content, last {_OF_MESSAGE} order by last)"
    text = db.execute(whole, of_message).fetchone()[0] or b""
    offset = bytes_known(known, text)
    begin = Place(thread_id, message_id, found.generation, found.before, reset=offset is None)
    if not offset:
        return begin
    before, sizes = len(text), "seq, length(cast(content as blob)), last"
    for seq, size, _ in db.execute(f"select {sizes} {_OF_MESSAGE} order by last desc, seq desc", of_message):
        before -= size
        if before < offset:
            after, skip = (seq, 0) if before + size == offset else (seq - 1, offset - before)
            return msgspec.structs.replace(begin, after=after, skip=skip)
    return begin


def _status_of(db: sqlite3.Connection, thread_id: str, limit: int, after: int) -> ThreadStatus:
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


def _list_threads(
    db: sqlite3.Connection, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
) -> ThreadPage:
    """The cursor is a generation, which is a time: a row number would tell how many threads were ever made."""
    source, where, order = "thread_summary", "(?1 is null or generation < ?1)", "generation"
    if status is not None:  # few threads may have it, so start from its messages; row numbers grow like generations
        source, order = "messages as m cross join thread_summary using (thread)", "m.thread"
        where += " and m.status = ?2 and thread_summary.status = ?2"
    if covered is not None:
        where += (
            " and thread in (select threads.thread from json_each(?3) as range"
            " cross join threads on threads.thread_id between range.value ->> 0 and range.value ->> 1)"
        )
    ends = {True: chr(sys.maxunicode), False: ""}  # what the highest id of a prefix ends with
    ranges = [(name.removesuffix("*"), name.removesuffix("*") + ends[name.endswith("*")]) for name in covered or ()]
    rows = db.execute(
        f"select distinct thread_summary.* from {source} where {where} order by {order} desc limit ?4",
        (before, status, msgspec.json.encode(ranges).decode(), limit + 1),
    ).fetchall()
    cursor = str(rows[limit - 1][1]) if len(rows) > limit else None
    return ThreadPage([ThreadSummary(*row[2:]) for row in rows[:limit]], cursor)


class Transaction:
    """The writes of one group commit. Each sees those before it; one that raises a Problem changes nothing."""

    def __init__(self, db: sqlite3.Connection, max_message: int) -> None:
        self._db = db
        self._max_message = max_message
        self.now = now_ms()
        self.minute = self.now - self.now % 60_000

    def outcome(self, write: Write) -> Change | Problem:
        try:
            if isinstance(write, Append):
                return self._append(write)
            if isinstance(write, Open):
                return self._open(write)
            return self._end(write) if isinstance(write, End) else self._clear(write)
        except Problem as problem:
            return problem

    def _append(self, append: Append) -> Change:
        thread_id, message_id, index, complete = append.thread_id, append.message_id, append.index, append.complete
        found = _row_of(self._db, thread_id, message_id)
        if append.generation not in (None, found.generation):
            raise Conflict.cleared()
        stored = [] if index in (None, found.chunk_count) else self._stored(append, found)
        count = found.chunk_count if index is None else index + len(append.chunks)  # if all of them are stored
        chunks, size = append.chunks[len(stored) :], sum(append.sizes[len(stored) :])
        if stored and not chunks and not complete:
            found = msgspec.structs.replace(found, last=stored[-1], chunk_count=count)
            return Change(thread_id, message_id, found, self.now)
        if found.ended:
            # The retry of the append that completed the message gets the first answer again.
            is_retry = complete and (index is not None or not append.chunks)
            if is_retry and found.status == "completed" and found.chunk_count == count:
                return Change(thread_id, message_id, found, self.now)
            raise Conflict.ended(message_id, found)
        if complete and count < found.chunk_count:
            raise Conflict.other_producer(message_id, found)
        self.check_size(found, chunks, size)
        if found.message is None:
            found = self._made(thread_id, message_id, found)
        found, rows = self.grown(found, chunks, size)
        self.save([found], rows)
        self.touch([found])
        if complete:
            found = self._ended(thread_id, message_id, found, "completed", None)
        return Change(thread_id, message_id, found, self.now, chunks, size, ended=complete)

    def check_size(self, found: Row, chunks: Sequence[Chunk], size: int) -> None:
        """Raise TooLarge if the message would grow over ``max_message``."""
        weight = found.size + size + CHUNK_WEIGHT * (found.chunk_count + len(chunks))
        if weight > self._max_message:
            raise TooLarge.message(weight, self._max_message)

    def _open(self, write: Open) -> Change:
        names = write.thread_id, write.message_id
        found = _row_of(self._db, *names)
        if is_new := found.message is None:
            found = self._made(*names, found)
        self._db.execute("update threads set updated_at = ? where thread = ?", (self.now, found.thread))
        self._db.execute(
            "update messages set updated_at = ? where message = ? and status = 'active'", (self.now, found.message)
        )
        return Change(*names, found, self.now, made=is_new)

    def _end(self, write: End) -> Change:
        names = write.thread_id, write.message_id
        found = _existing(self._db, *names)
        if found.status == write.status:
            return Change(*names, found, self.now)
        if found.ended:
            raise Conflict.ended(write.message_id, found)
        if write.untouched_since is not None and found.updated_at > write.untouched_since:
            raise Conflict(f"The message {write.message_id!r} was appended to in the meantime.")
        found = self._ended(*names, found, write.status, write.reason)
        return Change(*names, found, self.now, ended=True)

    def _clear(self, write: Clear) -> Change:
        found = _existing(self._db, write.thread_id)
        forgotten = self._db.execute(
            "update threads set thread_id = null where thread = ?1 and (?2 is null or updated_at <= ?2)",
            (found.thread, write.untouched_since),
        ).rowcount
        if not forgotten:
            raise NotFound.thread(write.thread_id)
        return Change(write.thread_id, "", found, self.now, cleared=True)

    def _stored(self, append: Append, found: Row) -> list[int]:
        """Return the places of the chunks that are stored already. Raise Conflict for a gap or another chunk."""
        index = cast(int, append.index)
        if index > found.chunk_count:
            raise Conflict.ended(append.message_id, found) if found.ended else Conflict.gap(append, found)
        # Count from the end: a retry nearly always repeats the newest chunks.
        rows = self._db.execute(
            f"select seq, content, event from (select seq, content, event, last {_OF_MESSAGE}"
            " order by last desc, seq desc limit ?5) order by seq limit ?6",
            (found.thread, found.message, found.first, found.last, found.chunk_count - index, len(append.chunks)),
        ).fetchall()
        for number, ((_, *stored), chunk) in enumerate(zip(rows, append.chunks, strict=False), index):
            if stored != [chunk.content, chunk.event]:
                raise Conflict.other_chunk(append.message_id, number, found)
        return [seq for seq, _, _ in rows]

    def _made(self, thread_id: str, message_id: str, found: Row) -> Row:
        """Insert the message, and its thread if need be."""
        thread = found.thread
        if thread is None:
            ((generation,),) = self._db.execute(
                "update clock set latest_generation = max(latest_generation + 1, ?) returning latest_generation",
                (self.now,),
            ).fetchall()
            thread = self._db.execute(
                "insert into threads (thread_id, generation, created_at, updated_at, touched_at)"
                " values (?1, ?2, ?3, ?3, ?3)",
                (thread_id, generation, self.now),
            ).lastrowid
        self._db.execute(
            "insert into messages (thread, message_id, created_at, updated_at, touched_at) values (?1, ?2, ?3, ?3, ?3)",
            (thread, message_id, self.now),
        )
        return _row_of(self._db, thread_id, message_id)

    def grown(self, found: Row, chunks: Sequence[Chunk], size: int) -> tuple[Row, list[tuple[Any, ...]]]:
        """Return the row as it is with these chunks, and the rows of the chunks."""
        first_seq, last_seq = found.last_seq + 1, found.last_seq + len(chunks)
        rows = [
            (found.thread, seq, found.message, chunk.event, chunk.content, self.now)
            for seq, chunk in enumerate(chunks, first_seq)
        ]
        grown = msgspec.structs.replace(
            found,
            last_seq=last_seq,
            chunk_count=found.chunk_count + len(chunks),
            size=found.size + size,
            first=found.first or (first_seq if chunks else None),
            last=last_seq if chunks else found.last,
        )
        return grown, rows

    def save(self, messages: Sequence[Row], chunks: Sequence[tuple[Any, ...]]) -> None:
        """Write the chunks, and the rows of their messages and threads, with one statement for each table."""
        self._db.executemany(
            "insert into chunks (thread, seq, message, event, content, timestamp) values (?, ?, ?, ?, ?, ?)", chunks
        )
        threads = {row.thread: (row.last_seq, self.now, row.thread) for row in messages}
        self._db.executemany("update threads set last_seq = ?, updated_at = ? where thread = ?", threads.values())
        self._db.executemany(
            "update messages set chunk_count = ?, size = ?, first_seq = ?, last_seq = ?, updated_at = ?"
            " where message = ?",
            [(row.chunk_count, row.size, row.first, row.last, self.now, row.message) for row in messages],
        )

    def touch(self, messages: Sequence[Row]) -> None:
        """Note the minute, in a statement of its own: setting an indexed column writes to the index each time."""
        for table in ("thread", "message"):
            self._db.executemany(
                f"update {table}s set touched_at = ?1 where {table} = ?2 and touched_at <> ?1",
                [(self.minute, getattr(row, table)) for row in messages],
            )

    def _ended(self, thread_id: str, message_id: str, found: Row, status: Status, reason: str | None) -> Row:
        """End the message. A trigger gives the end its place, so that the sqlite3 shell can end messages too."""
        self._db.execute(
            "update messages set status = ?, reason = ? where message = ?", (status, reason, found.message)
        )
        return _row_of(self._db, thread_id, message_id)


class Database(aiosqlite.Connection):
    """A connection whose thread runs whole functions: one hop each, and no cancelled request leaves one half done."""

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run the function. Raise Problem; Stopping if the connection is closed."""
        if self._connection is None or not self._running:
            raise Stopping
        try:
            return await cast("Callable[..., Awaitable[_T]]", self._execute)(work, self._conn)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise database_problem(error) from error


@contextlib.contextmanager
def sole_owner(path: Path) -> Iterator[int]:
    """Lock the file itself (flock(2)), made if need be, and yield its descriptor. Raise StartupError if it is locked.

    A process loses SQLite's own locks when it closes any descriptor on the file
    (https://www.sqlite.org/howtocorrupt.html, 2.2), so this one is closed last.
    """
    existed = path.exists()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartupError(f"{path} is already served") from error  # never close it: this process may serve the file
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        if not existed and os.fstat(descriptor).st_size == 0:
            path.unlink(missing_ok=True)  # a start that fails leaves nothing behind
        os.close(descriptor)


def _renew_generations(db: sqlite3.Connection) -> None:
    """Give every thread a new generation, because committed places may be lost and will be taken anew."""
    latest, lowest = db.execute("select latest_generation, (select min(generation) from threads) from clock").fetchone()
    shift = max(latest, now_ms()) + 1 - (lowest or 0)
    db.execute("update threads set generation = generation + ?", (shift,))
    db.execute("update clock set latest_generation = coalesce((select max(generation) from threads), ?)", (latest,))


def checkpoint(db: sqlite3.Connection) -> bool:
    """Empty the WAL. Return False if a reader kept it busy."""
    db.execute("pragma busy_timeout = 100")  # ms that it waits for readers
    try:
        ((is_busy, _, _),) = db.execute("pragma wal_checkpoint(truncate)")
    finally:
        db.execute(f"pragma busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
    return not is_busy


def _shrink(db: sqlite3.Connection) -> bool:
    """Give some free pages back to the disk. Return False if no more can be. Without free pages, take no lock."""
    (free,) = db.execute("pragma freelist_count").fetchone()
    if free:  # a script, because execute() steps such a pragma only once, which gives one page back
        db.executescript("pragma incremental_vacuum(256)")
    return 0 < cast(int, db.execute("pragma freelist_count").fetchone()[0]) < cast(int, free)


class SQLiteStore(GroupCommit):
    """Threads in one SQLite file, which has one owner and a WAL that stays small. Keepers override its methods.

    Only one connection writes and makes checkpoints: two at the same time could corrupt a WAL
    (https://www.sqlite.org/wal.html#walresetbug). Two read: one for short reads, one for long ones.
    """

    APPLICATION_ID = 0x72737472
    database = Database

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.path = Path(settings.db).resolve()
        self.wal, self.journal = Path(f"{self.path}-wal"), Path(f"{self.path}-journal")
        self.exits = contextlib.AsyncExitStack()
        self.erasure = asyncio.Lock()
        self.wal_limit = _WAL_BYTES

    async def open(self, told: Told) -> None:
        async with contextlib.AsyncExitStack() as exits:
            self.descriptor = exits.enter_context(sole_owner(self.path))
            try:
                await self.check()
                self.writer = await self.opened("rw", exits)
                await self.writer.run(self.prepare)
                self.readers = [await self.opened("ro", exits) for _ in range(2)]
            except (Problem, sqlite3.Error, OSError) as error:
                raise StartupError(f"{self.path} cannot be opened: {error.__cause__ or error}") from error
            self.exits = exits.pop_all()
        self._told = told

    async def opened(self, mode: Literal["ro", "rw"], exits: contextlib.AsyncExitStack) -> Database:
        options: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False}
        uri = f"file:{quote(str(self.path))}?mode={mode}"
        database = self.database(
            partial(sqlite3.connect, uri, timeout=BUSY_TIMEOUT, **options), iter_chunk_size=PAGE_ROWS
        )
        await database
        exits.push_async_callback(database.close)
        await database.run(open_packs)
        return database

    async def check(self) -> None:
        """Look at the file before anything opens it for writing. Raise StartupError."""

    def check_contents(self, db: sqlite3.Connection) -> bool:
        """Return True for a database of this version, False for an empty file. Raise StartupError."""
        ((tables, application_id, version),) = db.execute(
            "select (select count(*) from sqlite_schema), * from pragma_application_id, pragma_user_version"
        )
        if not (tables or application_id or 0 < self.path.stat().st_size < 512):
            return False  # new, or a crash cut its making short
        if application_id != self.APPLICATION_ID:
            raise StartupError(
                f"{self.path} is the database of another application, or is not a database; name another file with --db"
            )
        if version != _SCHEMA_VERSION:
            raise StartupError(
                f"{self.path} has version {version}, and this resume-stream knows {_SCHEMA_VERSION}; use the one that"
                " made it, or name another file with --db"
            )
        return True

    def prepare(self, db: sqlite3.Connection) -> None:
        if not self.check_contents(db):
            db.execute("pragma auto_vacuum = incremental")  # has no effect inside a transaction
            db.executescript(f"begin immediate; {Path(__file__).with_name('schema.sql').read_text()}; commit;")
        db.execute("pragma journal_mode = wal")
        db.execute(f"pragma synchronous = {self.settings.synchronous}")
        db.execute("pragma secure_delete = on")
        ((page_size,),) = db.execute("pragma page_size").fetchall()
        if self.settings.max_db:
            db.execute(f"pragma max_page_count = {max(self.settings.max_db // page_size, 1)}")
        with db:
            db.execute("begin immediate")
            (is_doubtful,) = db.execute("select is_doubtful from clock").fetchone()
            if is_doubtful:
                _renew_generations(db)
            if is_doubtful != (is_normal := self.settings.synchronous == "NORMAL"):
                db.execute("update clock set is_doubtful = ?", (is_normal,))
        if is_normal:
            checkpoint(db)  # the doubt reaches the disk before a commit that a power cut may take

    async def close(self) -> None:
        try:
            await self.all_committed()
            if self.settings.synchronous == "NORMAL":
                with logged_problems("note that the end is clean"):
                    await self.change(lambda db: db.execute("update clock set is_doubtful = 0"))
        finally:
            await self.exits.aclose()

    def stop(self) -> None:
        """A keeper may interrupt long reads here."""

    # Writing

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        try:
            return await self.transact(writes, size)
        except Problem as problem:
            if len(writes) > 1 and isinstance(problem, BadRows):  # one by one: nobody is refused for another's rows
                return [outcome for write in writes for outcome in await self.commit([write], size)]
            return [self.refused(problem)] * len(writes)

    async def transact(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        """Commit the writes, of about ``size`` bytes, in one transaction."""

        def outcomes(db: sqlite3.Connection) -> list[Change | Problem]:
            transaction = Transaction(db, self.settings.max_message)
            return [transaction.outcome(write) for write in writes]

        return await self.change(outcomes)

    async def change(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run the function in a transaction, all of it or nothing. Raise Problem."""
        answer = await self.maintain(partial(self.in_transaction, work))
        if self.wal_size() > self.wal_limit:
            with logged_problems("truncate the WAL"):  # readers that always overlap would let it grow
                is_empty = await self.maintain(checkpoint)
                self.wal_limit = _WAL_BYTES if is_empty else self.wal_size() + _WAL_BYTES
        return answer

    @staticmethod
    def in_transaction(work: Callable[[sqlite3.Connection], _T], db: sqlite3.Connection) -> _T:
        with db:  # commits, or rolls back
            db.execute("begin immediate")  # wait for the lock now, and not in the middle
            return work(db)

    async def maintain(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run the function on the writing connection, between two transactions. It waits for locks."""
        return await self.writer.run(work)

    def wal_size(self) -> int:
        return self.wal.stat().st_size if self.wal.exists() else 0

    async def probe(self) -> None:
        """Write by a pragma, because SQLite writes no page for an update that changes nothing."""
        await self.change(lambda db: db.execute(f"pragma user_version = {_SCHEMA_VERSION}"))

    # Reading

    async def read(self, work: Callable[[sqlite3.Connection], _T], heavy: bool = False) -> _T:
        """Run the function in one snapshot. A ``heavy`` one does not hold up the others. Raise Problem."""

        def in_snapshot(db: sqlite3.Connection) -> _T:
            with db:
                db.execute("begin")
                return work(db)

        return await self.readers[heavy].run(in_snapshot)

    async def find(self, thread_id: str, message_id: str | None = None) -> State:
        return await self.read(lambda db: _row_of(db, thread_id, message_id))

    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]:
        return await self.read(lambda db: _page_of(db, thread_id, message_id, after, limit))

    async def match(self, thread_id: str, message_id: str, known_content: str) -> Place:
        return await self.read(lambda db: _match(db, thread_id, message_id, known_content.encode()), heavy=True)

    async def status(self, thread_id: str, limit: int, after: int) -> ThreadStatus:
        return await self.read(lambda db: _status_of(db, thread_id, limit, after))

    async def threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage:
        return await self.read(lambda db: _list_threads(db, status, limit, before, covered), heavy=True)

    async def measure(self) -> tuple[int, int, int]:
        active = "select count(*) from messages where status = 'active'"
        ((count,),) = await self.read(lambda db: db.execute(active).fetchall())
        return self.path.stat().st_size, self.wal_size(), count

    # Upkeep

    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]:
        if untouched_since < self.refused_ms:
            return []  # their producers may be alive: the store refused their appends
        idle = (
            "select thread_id, message_id from messages indexed by active_messages_by_age join threads using (thread)"
            " where status = 'active' and messages.touched_at <= ?1 and messages.updated_at <= ?1"
            " and thread_id is not null limit 1000"
        )
        return await self.read(lambda db: db.execute(idle, (untouched_since,)).fetchall(), heavy=True)

    async def expire(self, untouched_since: int) -> int:
        idle = "select thread_id from threads where thread_id is not null and touched_at <= ?1 and updated_at <= ?1"
        # No more at a time: the appends that come meanwhile wait for the same commit.
        found = await self.read(lambda db: db.execute(idle, (untouched_since,)).fetchmany(100), heavy=True)
        clearing = [self.write(Clear(thread_id, untouched_since)) for (thread_id,) in found]
        outcomes = await asyncio.gather(*clearing, return_exceptions=True)  # a producer may have touched some since
        return sum(isinstance(outcome, Change) for outcome in outcomes)

    async def erase(self) -> bool:
        """Delete forgotten threads; SQLite overwrites their text (secure_delete). Then empty the WAL."""
        async with self.erasure:
            while await self.change(self.erase_some):
                await self.room()
            await self.shrink()
            return await self.maintain(checkpoint)

    def erase_some(self, db: sqlite3.Connection) -> bool:
        """Delete a forgotten thread; a trigger deletes its rows. Return False if there is none."""
        one = "delete from threads where thread = (select thread from threads where thread_id is null limit 1)"
        return db.execute(one).rowcount > 0

    async def upkeep(self) -> None:
        """A keeper may do other periodic work here."""

    async def shrink(self) -> None:
        """Give free pages back to the disk."""
        while await self.maintain(_shrink):
            await self.room()


# ---------------------------------------------------------------------------------------------
# Extras
# ---------------------------------------------------------------------------------------------

_EXTRAS = "logs tokens metrics page websocket live producing raw operate copy clients openapi relay limits express"
_STORES = {"redis": "redis_store", "rediss": "redis_store", "unix": "redis_store"}  # by the scheme of the address
_KEEPERS = "guard hot packs erasure elsewhere"  # each has KEEPER, a mixin of SQLiteStore
_ATTENDANTS = "live producing guard clock elsewhere"  # each has attend(buffer)


def _extra(name: str) -> ModuleType | None:
    """Import an extra, or return None if its file is not there."""
    try:
        module = importlib.import_module(f"resume_stream.extras.{name}")
        return module if module.__file__ else None  # a folder without files, such as one with __pycache__ alone
    except ModuleNotFoundError as error:
        if error.name not in ("resume_stream.extras", f"resume_stream.extras.{name}"):
            raise
        return None


def _seams(seam: str, names: str) -> list[Any]:
    """Return what each of these extras adds to this seam."""
    return [getattr(extra, seam) for extra in map(_extra, names.split()) if hasattr(extra, seam)]


def store_for(settings: Settings) -> Store:
    """Return the store that the settings name: the SQLite file, or the one of ``--store``. Raise StartupError."""
    scheme, found, _ = settings.store.partition("://")
    if not settings.store:
        return cast(Store, type("Store", (*_seams("KEEPER", _KEEPERS), SQLiteStore), {})(settings))
    if not found or scheme not in _STORES:
        raise StartupError(f"--store is no address of a store; it begins with {', '.join(_STORES)}, and then ://")
    if (extra := _extra(_STORES[scheme])) is None:
        raise StartupError(f"{scheme}:// takes extras/{_STORES[scheme]}; put it in place")
    return cast(Store, extra.store_for(settings))


# ---------------------------------------------------------------------------------------------
# The buffer
# ---------------------------------------------------------------------------------------------


class Tail:
    """The live end of a thread, shared by its users. It keeps no pages (see extras/live.py)."""

    def __init__(self) -> None:
        self.generation, self.last_seq, self.version = 0, -1, 0  # 0: no such thread; -1: not known whether there is one
        self.active = True
        self.doubts = 0  # how often another process may have changed the thread
        self.gone = 0  # generations up to this one are cleared or expired
        self.users = 0
        self.followers = 0  # the users that read
        self.waiting: dict[Callable[[], None], None] = {}  # each is called once, at the next event

    @property
    def order(self) -> tuple[int, int, int]:
        return self.generation, self.last_seq, self.version

    def learn(self, state: State, or_as_new: bool = False) -> None:
        """Take over a state that somebody read, unless a newer change is known."""
        if 0 < state.generation <= self.gone:
            return  # it was cleared meanwhile
        if state.generation > self.generation > 0:
            self.clear(self.generation)
        self.gone = max(self.gone, state.generation - 1)
        if state.order > self.order or (or_as_new and state.order == self.order):
            (self.generation, self.last_seq, self.version), self.active = state.order, state.active

    def take(self, change: Change, asked: float | None) -> None:
        """Take over a change. ``asked`` is the time of the call (time.perf_counter)."""
        if change.state.generation <= self.gone:
            return  # a reader has already found a later thread of this name
        if change.cleared:
            self.clear(change.state.generation)
            return
        self.learn(change.state, or_as_new=True)
        if self.followers:
            self.keep(change, asked)
        self.wake()

    def clear(self, generation: int) -> None:
        """Note that this generation and those before it are gone."""
        self.gone = max(self.gone, generation)
        if self.generation <= generation:
            self.generation, self.last_seq, self.version, self.active = 0, -1, 0, True
            self.forget()
            self.wake()

    def doubt(self) -> None:
        """Forget the state: another process may have changed anything, so readers load again."""
        self.last_seq = -1
        self.doubts += 1
        self.forget()
        self.wake()

    def stop(self) -> None:
        self.wake()

    def wake(self) -> None:
        calls, self.waiting = self.waiting, {}
        for call in calls:
            asyncio.get_running_loop().call_soon(call)

    async def wait(self, until: float) -> None:
        """Wait for the next event, or until the loop's clock shows ``until``."""
        event = asyncio.Event()
        self.waiting[event.set] = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(None if until == math.inf else until):
                    await event.wait()
        finally:
            self.waiting.pop(event.set, None)

    async def load(self, store: Store, place: Place, seq: int) -> tuple[State, Page]:
        """Return the next page for a reader that has everything up to ``seq``."""
        return await store.page(place.thread_id, place.message_id, seq, PAGE_ROWS)

    def keep(self, change: Change, asked: float | None) -> None:
        """Keep the change's entries in memory for the followers."""

    def after(self, seq: int, message_id: str | None) -> tuple[int, Page | None] | None:
        """Return the last place in memory after ``seq``, and the page up to there, None if it would be empty."""

    def forget(self) -> None:
        """Drop all pages in memory."""


class Step(enum.Enum):
    """What to do for a reader that has nothing to be sent."""

    LOAD, WAIT, END = "load", "wait", "end"


class Reader:
    """A reader of a thread or message. ``step()`` returns the next thing to send.

    Making it raises Stopping, and Unavailable if there are ``max_readers``, unless it is not ``limited``. Times are
    seconds and default to the settings; 0 turns ``idle_timeout`` or ``heartbeat`` off; ``expires`` is seconds since
    1970. A reader that waits takes its next step when it is ``due``, by the loop's clock.
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
        self.loaded: Page | None = None  # from the store, for the next step
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
        """Return what to send or do next. Call it once the step before is sent. Raise Unauthorized once it expires."""
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
                return self._without_skipped(page)
        # A message is over with its end, a thread when none of its messages is active.
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
            raise Unauthorized.expired()
        return Signal.TIMEOUT

    def _without_skipped(self, page: Page) -> Page:
        skip, self._skip = self._skip, 0
        chunk = page.entries[0]
        if not (skip and isinstance(chunk, StoredChunk)):
            return page
        rest = msgspec.structs.replace(chunk, content=chunk.content.encode()[skip:].decode())
        return Page(page.generation, page.last_seq, [rest, *page.entries[1:]])


def checked_id(kind: str, text: str) -> str:
    """Return the id if it has 1 to 200 characters, no ``/``, and no control character. Raise BadRequest."""
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
    """Return the bytes of the text in UTF-8. Raise InvalidContent for a lone surrogate."""
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
            f" the service's own names ({', '.join(sorted(_RESERVED_EVENTS))}, {RELAYED}…)."
        )
    utf8_size(event)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{name}={value} is out of range; it goes from {low:g} to {high:g}.")


def _list_place(cursor: str | None) -> int | None:
    """Parse the cursor of a list. Raise BadRequest."""
    if cursor is not None and not re.fullmatch(r"\d{1,18}", cursor, re.ASCII):
        raise BadRequest(f"{cursor!r:.80} is not a cursor of this list; send the one that its last page gave.")
    return None if cursor is None else int(cursor)


def checked_sizes(chunks: Sequence[Chunk], max_chunk: int) -> list[int]:
    """Return the bytes of each chunk. Raise InvalidContent and TooLarge."""
    sizes = []
    for chunk in chunks:
        if chunk.event is not None:
            _check_event(chunk.event)
        sizes.append(size := utf8_size(chunk.content))
        if size > max_chunk:
            raise TooLarge(f"A chunk has {size} bytes, over max_chunk ({max_chunk}); send it in parts.")
    return sizes


class ChunkBuffer:
    """Keeps what agents stream, and lets readers resume from where they stopped.

    An asynchronous context manager: entering it opens the store, leaving it commits what waits and closes the store.
    Call its methods in the loop that entered it. Errors are Problems, whose ``status_code`` is that of the HTTP answer.
    """

    def __init__(self, settings: Settings | None = None, store: Store | None = None) -> None:
        self.settings = settings = settings or Settings()
        self.tell: Callable[..., None] = lambda event, *what: None  # an extra may count events
        self.stopping = False
        self._store: Store = store or store_for(settings)
        self._entered = False
        self.watch: Callable[[AbstractSet[str]], None] = lambda thread_ids: None  # told whose tails are in use
        self.read_body: Callable[[Request[Any, Any, Any], float], Awaitable[bytes | bytearray]] = _read_body
        self.while_connected: Callable[[Any, Coroutine[Any, Any, Place]], Awaitable[Place]] = lambda request, work: work
        self.clock_set_at: Callable[[], int] = lambda: 0  # ms since 1970: ages from before then mean nothing
        self.tail_type: type[Tail] = Tail  # attendants put mixins before it
        self.tails: dict[str, Tail] = {}
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()  # a reader leaves it with its stream
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Open the store. Raise StartupError."""
        await self._store.open(self._take)
        self._entered, self.stopping, self.tail_type = True, False, Tail  # it may have been entered before
        self._started_ms = now_ms()
        for attend in _seams("attend", _ATTENDANTS):
            attend(self)
        self.begin(self._clean_up_forever())
        self.begin(self._abort_idle_messages_forever())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self.store.close()

    def stop(self) -> None:
        """End every stream now, without an end event, so that clients reconnect elsewhere or later."""
        self.stopping = True
        self.store.stop()
        for tail in self.tails.values():
            tail.stop()

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def store(self) -> Store:
        """The open store. Raise Problem before it is open: nothing would ever answer."""
        if not self._entered:
            raise Problem(
                "The buffer was not entered: write 'async with ChunkBuffer(…) as buffer', or give it to the lifespan of"
                " the app. A mounted app gets no lifespan of its own; enter its buffer in that of the other one."
            )
        return self._store

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task until it ends or the buffer is left."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Producers

    async def room(self) -> None:
        """Wait until a producer may write. Raise Stopping."""
        await self.store.room()
        if self.stopping:
            raise Stopping

    async def open_message(self, thread_id: str, message_id: str) -> tuple[Appended, bool]:
        """Open a message before its first chunk. Return False if it was open, which is then a sign of life."""
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
        """Append chunks, all or nothing, and return once they are committed. Open the message if need be.

        ``index`` (from 0), the number of the first chunk in this message, makes a retry safe: chunks that are stored
        already are compared and skipped. ``complete`` ends the message in the same transaction. An empty list is a
        sign of life. Raise Conflict, TooLarge, InvalidContent, Unavailable, DatabaseFull; then nothing has changed.
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
        """Return the write if its ids, index, events, sizes, and text are valid. Raise Problem."""
        _check_ids(thread_id, message_id)
        if index is not None and not 0 <= index < 2**63:
            raise BadRequest(f"index={index} cannot be; it is the number of the first chunk in its message, from 0.")
        if len(chunks) > _MAX_CHUNKS:
            raise TooLarge.chunks()
        sizes = checked_sizes(chunks, self.settings.max_chunk)
        return Append(thread_id, message_id, chunks, sizes, index, complete)

    async def complete_message(self, thread_id: str, message_id: str) -> Appended:
        """End a message. A second call gets the same answer. Raise NotFound; Conflict if it was aborted."""
        _check_ids(thread_id, message_id)
        await self.room()
        return (await self.store.write(End(thread_id, message_id, "completed"))).answer

    async def abort_message(self, thread_id: str, message_id: str, reason: str | None = None) -> Appended:
        """Abort a message. A second call gets the same answer. Raise NotFound; Conflict if it is completed."""
        _check_ids(thread_id, message_id)
        if reason is not None:
            utf8_size(reason)
            if len(reason) > End.MAX_REASON:
                raise TooLarge(f"The reason has {len(reason)} characters; say it in {End.MAX_REASON} or fewer.")
        await self.room()
        return (await self.store.write(End(thread_id, message_id, "aborted", reason))).answer

    def agent_stream(
        self, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk]
    ) -> AsyncGenerator[str | Chunk, None]:
        """Store and yield what ``source`` yields; go on storing if the consumer leaves (see extras/producing.py)."""
        return cast("AsyncGenerator[str | Chunk, None]", _producing().agent_stream(self, thread_id, message_id, source))

    def record(
        self, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk], *, index: int = 0
    ) -> asyncio.Task[None]:
        """Store what ``source`` yields in a task of its own (see extras/producing.py)."""
        return cast("asyncio.Task[None]", _producing().record(self, thread_id, message_id, source, index=index))

    async def clear_thread_buffer(self, thread_id: str) -> None:
        """Forget a thread, and return once its text is in neither the database nor the WAL. Raise NotFound."""
        _check_ids(thread_id)
        await self.room()
        await self.store.write(Clear(thread_id))
        try:
            await self.store.erase()
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
        """Yield what the reader does not have yet of a message, until it ends.

        The reader has ``known_content``: a prefix of the text, or a part that occurs exactly once, resumes right after
        it, inside a chunk if need be; any other text gets Signal.RESET and everything. ``after`` (a cursor or a
        sequence number) takes its place. ``idle_timeout`` is seconds; ``poll_interval`` has no effect. The stream ends
        after a MessageEnd, Signal.GONE, or Signal.TIMEOUT. Raise NotFound, BadRequest, Unavailable.
        """
        known = known_content if after is None else None
        place = await self.locate(thread_id, message_id, after=after, known_content=known)
        if place.finished:
            return
        async with aclosing(self.follow(place, idle_timeout=idle_timeout, heartbeat=0)) as items:
            async for item in items:
                for entry in item.entries if isinstance(item, Page) else [item]:
                    yield entry

    async def get_accumulated_content(self, thread_id: str, message_id: str | None = None) -> AccumulatedContent:
        """Return the text of a message, or of a thread's messages in the order in which they began. Raise NotFound."""
        content, rest = await self.content(thread_id, message_id)
        return msgspec.structs.replace(content, content=content.content + "".join([piece async for piece in rest]))

    async def content(
        self, thread_id: str, message_id: str | None = None
    ) -> tuple[AccumulatedContent, AsyncGenerator[str, None]]:
        """Return the first million characters of the text, and a generator of the rest. Raise NotFound."""
        _check_ids(thread_id, message_id)
        if message_id is None:
            thread = await self.store.status(thread_id, 1, 0)
            cursor, status = thread.cursor, thread.status
        else:
            found = await self.store.find(thread_id, message_id)
            check_exists(found, thread_id, message_id)
            cursor, status = found.cursor, cast(Status, found.status)
        pieces, first = self._pieces(thread_id, message_id, Cursor.parse(cursor)), ""
        while len(first) < 1_000_000 and (piece := await anext(pieces, None)) is not None:
            first += piece
        return AccumulatedContent(first, cursor, status), pieces

    async def _pieces(self, thread_id: str, message_id: str | None, up_to: Cursor) -> AsyncGenerator[str, None]:
        names, after = ([], 0) if message_id is None else ([message_id], None)
        while names or after is not None:
            if not names:
                status = await self.store.status(thread_id, _MESSAGES, after or 0)
                names, after = [message.message_id for message in status.messages], _list_place(status.messages_cursor)
                continue
            name, seq = names.pop(0), 0
            while seq < up_to.seq:
                found, page = await self.store.page(thread_id, name, seq, PAGE_ROWS)
                if found.generation != up_to.generation:
                    raise NotFound.thread(thread_id)  # it was cleared meanwhile
                seq = page.last_seq
                yield "".join(e.content for e in page.entries if isinstance(e, StoredChunk) and e.seq <= up_to.seq)

    async def get_thread_status(
        self, thread_id: str, limit: int = _MESSAGES, cursor: str | None = None
    ) -> ThreadStatus:
        """Return a thread with up to ``limit`` (1 to 1,000) of its messages, after ``cursor``. Raise NotFound."""
        _check_ids(thread_id)
        _check_range("limit", limit, 1, _MESSAGES)
        return self._with_readers(await self.store.status(thread_id, limit, _list_place(cursor) or 0))

    async def get_threads(
        self,
        status: Status | None = None,
        limit: int = 100,
        cursor: str | None = None,
        covered: Sequence[str] | None = None,
    ) -> ThreadPage:
        """Return up to ``limit`` (1 to 1,000) threads, the newest first, that have the status and are covered."""
        _check_range("limit", limit, 1, 1000)
        page = await self.store.threads(status, limit, _list_place(cursor), covered)
        return ThreadPage([self._with_readers(thread) for thread in page.threads], page.cursor)

    def _with_readers(self, thread: _S) -> _S:
        tail = self.tails.get(thread.thread_id)
        return msgspec.structs.replace(thread, readers=tail.followers if tail else 0)

    async def get_active_threads(self, limit: int = 100, cursor: str | None = None) -> ThreadPage:
        """Return the threads that have an active message. Raise BadRequest."""
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
        """Return up to ``limit`` (1 to 10,000) entries after a cursor; wait up to ``wait`` s (0 to 300) for the first.

        Raise NotFound, CursorGone, and Unauthorized if the token ``expires`` (seconds since 1970) during the wait.
        """
        _check_range("limit", limit, 1, 10_000)
        _check_range("wait", wait, 0, 300)
        place = await self.locate(thread_id, message_id, after=after)
        if place.reset:
            raise CursorGone.unknown()
        page = await self._chunk_page(place, limit)
        if wait and not (place.finished or page.chunks or page.ends):
            async with aclosing(self.follow(place, idle_timeout=wait, heartbeat=0, expires=expires)) as items:
                await anext(items, None)
            page = await self._chunk_page(place, limit)
        return page

    async def _chunk_page(self, place: Place, limit: int) -> ChunkPage:
        found, page = await self.store.page(place.thread_id, place.message_id, place.after, limit)
        if found.generation != place.generation:
            raise NotFound.thread(place.thread_id)
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
        """Return the place from which a reader with this cursor, text, or nothing reads on. Raise NotFound."""
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
        """Yield what comes after a place, as it is committed. No transaction is open while the consumer works."""
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
        """Load the reader's next page from the store, unless its thread turns out to be another one."""
        tail = reader.tail
        doubts = tail.doubts
        found, page = await tail.load(self.store, reader.place, reader.seq)
        if tail.doubts == doubts:
            tail.learn(found)
        if reader.generation not in (0, found.generation):
            tail.clear(reader.generation)
        elif found.generation == tail.generation and page.last_seq > reader.seq:
            reader.loaded = page

    @contextlib.contextmanager
    def attached(self, thread_id: str, reader: Reader | None = None) -> Iterator[Tail]:
        """Yield the thread's tail, which hears of every change while somebody uses it."""
        tail = self.tails.setdefault(thread_id, self.tail_type())
        tail.users += 1
        if tail.users == 1:
            self.watch(self.tails.keys())
        tail.followers += reader is not None
        if reader is not None:
            reader.tail = tail
            if 0 < tail.generation < reader.place.generation:
                tail.clear(tail.generation)  # another process made the thread anew
        try:
            yield tail
        finally:
            tail.users -= 1
            tail.followers -= reader is not None
            if not tail.followers:
                tail.forget()
            if not tail.users:
                del self.tails[thread_id]
                self.watch(self.tails.keys())
            if reader is not None:
                self._readers.discard(reader)

    # What the store and the clock do

    def _take(self, changes: Sequence[tuple[Change, float | None]], seconds: float | None = None) -> None:
        """Hand the store's changes to the tails, before it answers the producers."""
        if seconds is not None:
            self.tell("committed", [change for change, _ in changes], seconds)
        for change, asked in changes:
            if tail := self.tails.get(change.thread_id):
                tail.take(change, asked)

    async def _clean_up_forever(self) -> None:
        interval = self.settings.cleanup_interval
        while True:
            is_erased = False
            with logged_problems("clean up"):
                untouched_since = now_ms() - round(self.settings.ttl * 1000)
                while untouched_since >= self.clock_set_at() and (expired := await self.store.expire(untouched_since)):
                    self.tell("expired", expired)
            with logged_problems("erase"):
                is_erased = await self.store.erase()
            with logged_problems("upkeep"):
                await self.store.upkeep()
            await asyncio.sleep(interval if is_erased else min(interval, BUSY_TIMEOUT))

    async def _abort_idle_messages_forever(self) -> None:
        timeout = self.settings.producer_timeout
        while timeout:
            await asyncio.sleep(min(max(timeout / 10, 0.02), 5))
            untouched_since = now_ms() - round(timeout * 1000)
            if untouched_since < max(self._started_ms, self.clock_set_at()):
                continue  # nobody could append while the service was down
            with logged_problems("abort idle messages"):
                for idle in await self.store.idle_messages(untouched_since):
                    with contextlib.suppress(NotFound, Conflict):  # it was touched or ended meanwhile
                        await self.store.write(End(*idle, "aborted", PRODUCER_TIMEOUT, untouched_since))


async def _read_body(request: Request[Any, Any, Any], most: float) -> bytes:
    """Return the body, if it has at most ``most`` bytes; Litestar holds it to ``max_body``. Raise TooLarge."""
    if len(body := await request.body()) > most:
        raise TooLarge(f"The body has over {most} bytes; send it in parts.")
    return body


def _producing() -> ModuleType:
    if (producing := _extra("producing")) is None:
        raise Problem("Recording a source takes extras/producing.py; put it in place.")
    return producing


# ---------------------------------------------------------------------------------------------
# The wire formats
# ---------------------------------------------------------------------------------------------

_encode = msgspec.json.Encoder().encode
UNDECODABLE = (msgspec.DecodeError, UnicodeError, RecursionError)  # the last one for deeply nested arrays


class ServerSentEvents:
    """Server-sent events (HTML, 9.2) with LF line ends and JSON as data, as browsers dispatch none without data."""

    HEADERS: ClassVar = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    RETRY = b"retry: 1000\n"
    HEARTBEAT = b": hb\n"  # without a blank line after it: some clients would dispatch an empty event

    tells_all = True

    def frames(self, page: Page) -> bytes:
        generation = page.generation
        names: dict[str, bytes] = {}
        frames = []
        for entry in page.entries:
            if isinstance(entry, MessageEnd):
                frames.append(b"id: %d-%d\nevent: complete\ndata: %s\n\n" % (generation, entry.seq, _encode(entry)))
                continue
            if (name := names.get(entry.message_id)) is None:
                name = names[entry.message_id] = _encode(entry.message_id)
            # A relayed event "error" must not look like an event of our own.
            named = entry.event is not None and entry.event not in _RESERVED_EVENTS
            event = b"event: %s\n" % cast(str, entry.event).encode() if named else b""
            frames.append(
                b'id: %d-%d\n%sdata: {"content":%s,"timestamp":%d,"messageId":%s,"seq":%d}\n\n'
                % (generation, entry.seq, event, _encode(entry.content), entry.timestamp, name, entry.seq)
            )
        return b"".join(frames)

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        if signal is Signal.HEARTBEAT:
            return self.HEARTBEAT
        return self.event(signal.value, problem.document if problem else {})

    def event(self, name: str, data: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode(data))


_SERVER_SENT = ServerSentEvents()


def can_end(form: Format, end: MessageEnd | None) -> bool:
    """Return False if the body must be broken off, because its end would look like that of a completed message."""
    return form.tells_all or (end is not None and end.status == "completed")


async def _sent(buffer: ChunkBuffer, reader: Reader, form: Format) -> AsyncGenerator[bytes, None]:
    """Yield the bytes for a reader. The first line goes at once, so that headers and bytes flow. Raise BrokenOff."""
    yield ServerSentEvents.RETRY
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
    """Decode a chunk or an array of chunks. Raise InvalidContent and TooLarge."""
    if body.count(b'"content"') > 2 * _MAX_CHUNKS:  # as a name, or perhaps as a value: cheaper than decoding them
        raise TooLarge.chunks()
    try:
        chunks = _CHUNKS.decode(body)
    except UNDECODABLE as error:
        raise InvalidContent.json(body, error) from error
    return chunks if isinstance(chunks, list) else [chunks]


# ---------------------------------------------------------------------------------------------
# The routes
# ---------------------------------------------------------------------------------------------

_SMALL_BODY = 16 * 1024  # bytes of a body that has no reason to be larger


class Grant(Record, frozen=True):
    """What a caller may do. Without a secret that is everything."""

    threads: tuple[str, ...] | None = None  # ids or ``prefix*``; None: all
    expires: float = math.inf  # seconds since 1970

    @classmethod
    def of(cls, connection: ASGIConnection[Any, Any, Any, Any]) -> Grant:
        return cast(Grant, connection.scope.get("auth", _ANYONE))

    def allows(self, scope: str, thread_id: str | None) -> bool:
        return True

    def require(self, scope: str, thread_id: str | None) -> None:
        """Raise Unauthorized or Forbidden, without telling whether the thread exists."""


_ANYONE = Grant()


def seconds(name: str, value: str | float | None) -> float | None:
    """Return the duration that a reader asks for, from 0 to a day. Raise BadRequest."""
    if value is None:
        return None
    try:
        parsed = parse_duration(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRequest(f"{name}: {error}.") from error
    _check_range(name, parsed, 0, 86400)
    return parsed


def _refused_type(request: Request[Any, Any, Any], kinds: Sequence[str]) -> UnsupportedMediaType:
    kind = request.headers.get("content-type", "no content type")
    return UnsupportedMediaType(
        f"{kind!r:.80} is not what this call takes; send Content-Type: {' or '.join(kinds)} (curl -d says another one"
        " unless -H names it)."
    )


async def json_body(
    request: Request[Any, Any, Any],
    buffer: ChunkBuffer,
    kind: type[_T],
    default: _T | None = None,
    most: float = _SMALL_BODY,
) -> _T:
    """Decode the body of a call that takes no chunks; an empty one is ``default``. Raise Problem."""
    body = await buffer.read_body(request, most)
    if not body and default is not None:
        return default
    if request.content_type[0] != "application/json":
        raise _refused_type(request, ["application/json"])
    try:
        return msgspec.json.decode(body, type=kind)
    except UNDECODABLE as error:
        raise InvalidContent(f"The body does not have the form that this call takes: {error}.") from error


async def _append_json(request: Request[Any, Any, Any], buffer: ChunkBuffer, append: Append) -> tuple[Appended, bool]:
    """Append the chunks in the body, all or nothing. Return the answer, and True if anything was new."""
    if (asked := cast(Any, request.scope).get("asked")) is None:  # extras/express.py may have asked already
        await buffer.room()
        body = await buffer.read_body(request, math.inf)
        if time.time() >= Grant.of(request).expires:
            raise Unauthorized.expired()
        append = buffer.checked_append(
            append.thread_id, append.message_id, chunks_from_json(body), index=append.index, complete=append.complete
        )
        await buffer.room()
        asked = buffer.store.write(append)
    change: Change = await asked
    return change.answer, change.changed


class Streamed(ASGIStreamingResponse):
    """A body in pieces, which is broken off if their iterator raises BrokenOff or a Problem."""

    TAKES_READER = "resume_stream.takes_reader"  # an ASGI extension: the connection sends to the reader by itself

    def __init__(self, pieces: Any, headers: Mapping[str, str], *reader_and_form: Any) -> None:
        super().__init__(iterator=pieces, headers=dict(headers), status_code=200)
        self._reader_and_form = reader_and_form

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        take: Any = (scope.get("extensions") or {}).get(self.TAKES_READER) if self._reader_and_form else None
        if take is None or not await take(scope, partial(self.start_response, send), *self._reader_and_form):
            await super().__call__(scope, receive, send)

    async def send_body(self, send: Send, receive: Receive) -> None:
        try:
            await super().send_body(send, receive)
        except* (BrokenOff, Problem):
            _log.debug("the body was broken off")  # the server closes a connection whose answer is not complete


def _event_stream(buffer: ChunkBuffer, place: Place, form: Format = _SERVER_SENT, **times: Any) -> ASGIResponse:
    """Answer with a stream, or 204 if nothing more will come: an EventSource then stops reconnecting (HTML, 9.2.3)."""
    if place.finished:
        return ASGIResponse(status_code=204)
    reader = Reader(buffer, **times)
    reader.begin(place)
    return Streamed(_sent(buffer, reader, form), ServerSentEvents.HEADERS, reader, form)


class Reading(Record, frozen=True):
    """What a reader's query asks for."""

    buffer: ChunkBuffer
    cursor: str | None
    follow: bool
    form: Format
    times: dict[str, Any]


Buffer = NamedDependency[ChunkBuffer]
THREAD = "/threads/{thread_id:str}"
_MESSAGE = f"{THREAD}/messages/{{message_id:str}}"
ThreadId = Annotated[str, PathParameter(description="1 to 200 characters, no control characters, no /")]
_Form = Annotated[str | None, QueryParameter(name="format")]


def _reading_of(
    request: Request[Any, Any, Any],
    buffer: Buffer,
    after: FromQuery[str | None] = None,
    follow: FromQuery[bool] = False,
    idle_timeout: FromQuery[str | None] = None,
    poll_interval: FromQuery[str | None] = None,
    form: _Form = None,
) -> Reading:
    """Take the cursor from Last-Event-ID, which a browser sends when it reconnects, or from ``after``."""
    seconds("poll_interval", poll_interval)  # without effect: readers are notified
    formats = request.route_handler.opt["formats"]
    if form not in formats:
        raise BadRequest(f"There is no format {form!r:.80}; there is {', '.join(filter(None, formats)) or 'none'}.")
    times = {"idle_timeout": seconds("idle_timeout", idle_timeout), "expires": Grant.of(request).expires}
    return Reading(buffer, request.headers.get("last-event-id") or after, follow, formats[form], times)


async def stream(reading: Reading, thread_id: str, message_id: str | None = None) -> ASGIResponse:
    buffer, cursor, follow, form = reading.buffer, reading.cursor, reading.follow, reading.form
    place = await buffer.locate(thread_id, message_id, after=cursor, follow=follow)
    if not form.tells_all:
        if place.reset:
            raise CursorGone.unknown()
        if cursor is not None and place.generation and not follow:
            page = await buffer.get_chunks(thread_id, message_id, after=cursor)
            place = msgspec.structs.replace(place, finished=not page.chunks and page.status != "active")
    return _event_stream(buffer, place, form, **reading.times)


class AbortBody(Record, frozen=True, forbid_unknown_fields=True):
    reason: str | None = None


class ResumeBody(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    """``known_content`` or ``after``; ``idle_timeout`` in seconds, or like ``30s``."""

    thread_id: str
    message_id: str
    known_content: str | None = None
    after: str | int | None = None
    poll_interval: float | str | None = None
    idle_timeout: float | str | None = None


class _Threads(Controller):
    """The calls below /api."""

    @put(_MESSAGE, summary="Open a message before its first chunk", scope="write")
    async def open_message(self, buffer: Buffer, thread_id: ThreadId, message_id: ThreadId) -> Response[Appended]:
        answer, is_new = await buffer.open_message(thread_id, message_id)
        return Response(answer, status_code=201 if is_new else 200)

    @post(_MESSAGE + "/chunks", summary="Append chunks", scope="write", body=Chunk | list[Chunk])
    async def append_chunks(
        self,
        request: Request[Any, Any, Any],
        buffer: Buffer,
        thread_id: ThreadId,
        message_id: ThreadId,
        index: FromQuery[int | None] = None,
        complete: FromQuery[bool] = False,
    ) -> Response[Appended]:
        """Answered after the commit. JSON: a chunk, or an array of chunks, all or nothing. NDJSON: a
        chunk a line, committed and readable as the lines arrive. Plain text: likewise, a chunk a piece."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise UnsupportedMediaType("The body is compressed; send it as it is.")
        kinds = request.route_handler.opt["bodies"]
        if (take := kinds.get(request.content_type[0])) is None:
            raise _refused_type(request, list(kinds))
        append = buffer.checked_append(thread_id, message_id, index=index, complete=complete)
        answer, is_new = await take(request, buffer, append)
        return Response(answer, status_code=201 if is_new else 200)

    @post(_MESSAGE + "/complete", status_code=200, summary="Complete a message", scope="write")
    async def complete_message(self, buffer: Buffer, thread_id: ThreadId, message_id: ThreadId) -> Appended:
        return await buffer.complete_message(thread_id, message_id)

    @post(_MESSAGE + "/abort", status_code=200, summary="Abort a message", scope="abort", body=AbortBody | None)
    async def abort_message(
        self, request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId, message_id: ThreadId
    ) -> Appended:
        """From either side; the body is `{"reason": "…"}`, or nothing."""
        body = await json_body(request, buffer, AbortBody, AbortBody())
        return await buffer.abort_message(thread_id, message_id, body.reason)

    @get(THREAD + "/stream", summary="Follow a thread (SSE)", scope="read", token_in_query=True)
    async def stream_thread(self, reading: NamedDependency[Reading], thread_id: ThreadId) -> ASGIResponse:
        """With `follow=true` it waits for a thread not made yet, and for the next message."""
        return await stream(reading, thread_id)

    @get(_MESSAGE + "/stream", summary="Follow a message (SSE)", scope="read", token_in_query=True)
    async def stream_message(
        self, reading: NamedDependency[Reading], thread_id: ThreadId, message_id: ThreadId
    ) -> ASGIResponse:
        """With `follow=true` it waits for a message not made yet."""
        return await stream(reading, thread_id, message_id)

    @post(
        "/resume-stream",
        status_code=200,
        summary="Resume a message by the text one has (SSE)",
        body=ResumeBody,
        scope="read",
        token_in_query=True,
    )
    async def resume_stream(self, request: Request[Any, Any, Any], buffer: Buffer) -> ASGIResponse:
        body = await json_body(request, buffer, ResumeBody, most=math.inf)
        if body.known_content is not None and body.after is not None:
            raise BadRequest("known_content and after exclude each other; send the one that you have.")
        quiet, _ = seconds("idle_timeout", body.idle_timeout), seconds("poll_interval", body.poll_interval)
        grant = Grant.of(request)
        grant.require("read", body.thread_id)
        locating = buffer.locate(body.thread_id, body.message_id, after=body.after, known_content=body.known_content)
        try:
            place = await buffer.while_connected(request, locating)
        except NotFound:
            pieces = [ServerSentEvents.RETRY, _SERVER_SENT.event("complete", {"exists": False})]
            return Streamed(pieces, ServerSentEvents.HEADERS)
        return _event_stream(buffer, place, idle_timeout=quiet, expires=grant.expires)

    @get(THREAD + "/chunks", summary="Read chunks by pages, or by a long poll", scope="read", token_in_query=True)
    async def get_chunks(
        self,
        request: Request[Any, Any, Any],
        buffer: Buffer,
        thread_id: ThreadId,
        after: FromQuery[str | None] = None,
        message_id: FromQuery[str | None] = None,
        limit: FromQuery[int] = PAGE_ROWS,
        wait: FromQuery[float] = 0,
    ) -> ChunkPage:
        expires = Grant.of(request).expires
        return await buffer.get_chunks(thread_id, message_id, after=after, limit=limit, wait=wait, expires=expires)

    @get(THREAD + "/content", summary="The text so far", scope="read", token_in_query=True)
    async def get_accumulated_content(
        self,
        request: Request[Any, Any, Any],
        buffer: Buffer,
        thread_id: ThreadId,
        message_id: FromQuery[str | None] = None,
    ) -> ASGIResponse:
        is_text = request.accept.best_match(["application/json", "text/plain"]) == "text/plain"
        kind = "text/plain; charset=utf-8" if is_text else "application/json"
        content, pieces = await buffer.content(thread_id, message_id)
        return Streamed(_encoded_text(content, pieces, is_text), {"Vary": "Accept", "Content-Type": kind})

    @get(THREAD, summary="A thread and its messages", scope="read", token_in_query=True)
    async def get_thread_status(
        self,
        buffer: Buffer,
        thread_id: ThreadId,
        limit: FromQuery[int] = _MESSAGES,
        cursor: FromQuery[str | None] = None,
    ) -> ThreadStatus:
        """`messagesCursor` gets the next of its messages, where there are more."""
        return await buffer.get_thread_status(thread_id, limit, cursor)

    @get("/threads", summary="Threads, the newest first", scope="read", token_in_query=True)
    async def get_threads(
        self,
        request: Request[Any, Any, Any],
        buffer: Buffer,
        status: FromQuery[Status | None] = None,
        limit: FromQuery[int] = 100,
        cursor: FromQuery[str | None] = None,
    ) -> ThreadPage:
        return await buffer.get_threads(status, limit, cursor, Grant.of(request).threads)

    @delete(THREAD, summary="Forget a thread, and erase its text", scope="admin")
    async def clear_thread_buffer(self, buffer: Buffer, thread_id: ThreadId) -> None:
        await buffer.clear_thread_buffer(thread_id)


async def _encoded_text(
    content: AccumulatedContent, pieces: AsyncGenerator[str, None], is_text: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the text, or an AccumulatedContent with it, without ever holding all of it in memory."""
    yield b"" if is_text else b'{"content":"'
    yield content.content.encode() if is_text else _encode(content.content)[1:-1]
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece.encode() if is_text else _encode(piece)[1:-1]
    yield b"" if is_text else f'","cursor":"{content.cursor}","status":"{content.status}"}}'.encode()


@get("/health/live", summary="The process answers")
async def _live() -> dict[str, str]:
    return {"status": "ok"}


# ---------------------------------------------------------------------------------------------
# The app
# ---------------------------------------------------------------------------------------------


class Parts:
    """The parts of the app. Each extra's ``mount(parts)`` adds to them."""

    def __init__(self, buffer: ChunkBuffer) -> None:
        self.buffer = buffer
        self.api: list[Any] = [_Threads]  # routes below /api
        self.root: list[Any] = []  # routes below /
        self.pages: list[Any] = [_live]  # routes below / that are open to everybody
        # The function that takes an append's body, by content type; the format of a stream, by the query's name for it.
        self.bodies: dict[str, Callable[..., Awaitable[tuple[Appended, bool]]]] = {"application/json": _append_json}
        self.formats: dict[str | None, Format] = {None: _SERVER_SENT}
        self.producing: Any = None  # what extras/producing.py lets other extras do
        self.active_message: Any = None  # likewise, by extras/raw.py
        # The headers of answers below a path that do not say themselves how they may be cached.
        self.headers = {"/api": {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}}
        self.guards: list[Guard] = []
        self.grant_of: Callable[[str], Grant] | None = None  # what a token allows, if there is a secret
        self.connection: list[type[HttpToolsProtocol]] = []  # mixins for uvicorn's protocol, the outermost first
        self.middleware: list[DefineMiddleware] = [DefineMiddleware(Gate, settings=buffer.settings)]
        self.openapi: OpenAPIConfig | None = None
        self.openapi_pages: list[Any] = []
        self.on_start: list[Callable[[], None]] = []  # called once the service listens
        self.on_stop: list[Callable[[], None]] = []  # called as soon as it is told to stop
        for mount in _seams("mount", _EXTRAS):
            mount(self)
        for setting, needed in (("secret", "tokens"), ("upstream", "relay")):
            if getattr(buffer.settings, setting) and _extra(needed) is None:
                raise StartupError(f"{setting} is set, and nothing here knows of it; put extras/{needed} in place")

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

    async def add_headers(self, message: Message, scope: ASGIScope) -> None:
        if message["type"] == "http.response.start" and "cache-control" not in (said := MutableScopeHeaders(message)):
            for path, headers in self.headers.items():
                if scope["path"].startswith(path):
                    said.update(headers)

    def app(self, lifespan: Sequence[AbstractAsyncContextManager[Any]] = ()) -> Litestar:
        origins = list(self.buffer.settings.cors_origins)
        return Litestar(
            [self.router("/api", self.api), self.router("/", self.root), *self.pages],
            lifespan=list(lifespan),
            middleware=self.middleware,
            before_send=[self.add_headers],
            cors_config=CORSConfig(allow_origins=origins) if origins else None,
            openapi_config=self.openapi,
            request_max_body_size=self.buffer.settings.max_body,
            exception_handlers=_ERROR_ANSWERS,
            logging_config=None,
        )


def router(buffer: ChunkBuffer, path: str = "/api") -> Router:
    """Return the routes for your own Litestar app: ``Litestar([router(buffer)], lifespan=[buffer])``.

    On shutdown call ``buffer.stop()`` as early as you can: a server waits for open streams first.
    """
    parts = Parts(buffer)
    return parts.router(path, parts.api)


def create_app(settings: Settings | None = None, *, buffer: ChunkBuffer | None = None) -> Litestar:
    """Return the service as an ASGI app that opens its own database, or uses a buffer that its maker enters."""
    if buffer is not None:
        return Parts(buffer).app()
    buffer = ChunkBuffer(settings)
    return Parts(buffer).app(lifespan=[buffer])


def _answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer with a problem document. Only the log says what an unexpected error is."""
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Problem):
        problem = error
    elif isinstance(error, HTTPException):  # from Litestar itself
        detail = error.detail or HTTPStatus(error.status_code).phrase
        if isinstance(error, ValidationException) and isinstance(error.extra, list):
            detail = "; ".join(f"{item.get('key', 'body')}: {item['message']}" for item in error.extra) + "."
        problem = Problem(detail)
        problem.status_code, problem.title = error.status_code, HTTPStatus(error.status_code).phrase
    else:
        _log.error("unexpected: %s", error, exc_info=error)
        problem = Problem("Something went wrong here; the log of the service says what.")
    if cast(Any, request.scope).get("has_more_body"):
        headers["Connection"] = "close"  # nobody reads the rest of the body
    return Response(
        problem.document, media_type="application/problem+json", status_code=problem.status_code, headers=headers
    )


_ERROR_ANSWERS: ExceptionHandlersMap = dict.fromkeys((HTTPException, Exception), _answer_error)


class Gate:
    """Refuses pages of other origins. Without a secret it refuses a Host that is no loopback name, too."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._any_host = bool(settings.secret or settings.uds) or not _is_loopback(settings.host)
        self._origins = settings.cors_origins

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
            if refusal := self.refusal(hosts or [""], origins):
                _log.warning("refused: %s", refusal.detail)
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
    """Return True if the Host header names this machine (RFC 9110, 7.2)."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^][:@/\s]+))(?::[0-9]{1,5})?", header)
    return match is not None and _is_loopback(match[1] or match[2])


def _is_loopback(name: str) -> bool:
    """Return True if only this machine can reach what listens on this name."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------
# Serve
# ---------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """A uvicorn server that ends streams as soon as it is told to stop, and exits with 0 however often it is told."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts
        self._loop = asyncio.get_running_loop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ignore signals once the server stops: they must not end the process while the store closes."""
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
        kept = re.sub("//[^/]*@", "//", settings.store.partition("?")[0])  # without its password
        kept = kept or f"SQLite {sqlite3.sqlite_version}, database {settings.db}, synchronous={settings.synchronous}"
        who = "anyone who can connect" if settings.allow_anonymous else "this machine only"
        who = "whoever has a token" if settings.secret else who
        print(f"resume-stream {__version__} on {where}, {kept}, open to {who}", flush=True)
        for tell in self._parts.on_start:
            tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for tell in self._parts.on_stop:
            tell()
        await super().shutdown(sockets)


def _url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listening(settings: Settings) -> list[socket.socket]:
    """Return the sockets to serve, none if uvicorn makes the Unix socket. Raise StartupError."""
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
            f"{settings.host} can be reached from other machines; set a secret, or allow_anonymous (--allow-anonymous)"
        )
    async with contextlib.AsyncExitStack() as exits:
        # Listen first: if the port is taken, no database is left behind.
        sockets = [exits.enter_context(listener) for listener in _listening(settings)]
        parts = Parts(await exits.enter_async_context(ChunkBuffer(settings)))
        config = uvicorn.Config(
            parts.app(),
            http=type("Connection", (*parts.connection, HttpToolsProtocol), {}),
            uds=settings.uds or None,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,  # s; extras/limits.py is quicker
            server_header=False,
            proxy_headers=False,
            ws_max_size=settings.max_body,
            ws_per_message_deflate=False,  # a few compressed bytes could become very many
        )
        gc.freeze()  # the collector need not walk what exists by now
        await _Server(config, parts).serve(sockets or None)


def settings_from(environment: Mapping[str, str], flags: Mapping[str, str]) -> Settings:
    """Return the settings of these environment variables and flags; a flag wins. Raise StartupError."""
    values, source = {}, "settings"
    try:
        for name in SETTINGS:
            flag, variable = f"--{name.replace('_', '-')}", f"RESUME_STREAM_{name.upper()}"
            if name in flags or variable in environment:
                source, text = (flag, flags[name]) if name in flags else (variable, environment[variable])
                value = _checked_setting(name, text, is_text=True)
                values[name] = getattr(Settings(**{name: value}), name)  # alone, so that an error names its source
        return Settings(**values)
    except ValueError as error:
        raise StartupError(f"{source}: {error}") from error


def serve(settings: Settings) -> None:
    """Serve until a signal ends it. Raise StartupError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for set_up in _seams("set_up", _EXTRAS):
        set_up(settings)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its lines have queries in them, which may hold a token
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing" not in record.msg)  # see BrokenOff
    uvloop.run(_serve(settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Without extras/command_line.py the only command is ``serve``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if command_line := _extra("command_line"):
            return int(command_line.run(arguments, _seams("add_commands", _EXTRAS)))
        if arguments != ["serve"]:
            raise StartupError("say 'serve', and set RESUME_STREAM_… variables; flags take extras/command_line.py")
        serve(settings_from(os.environ, {}))
    except StartupError as error:
        print(f"resume-stream: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
