"""Other people's SSE endpoints, made resumable: what they stream is recorded, and then passed on.

A request below ``/relay/NAME/`` goes on to the upstream of that name. Where its answer is a stream of
events, a task of its own (``Pump``) commits each of them as a chunk of a message, and whoever asked is
one of that message's readers (``Relay._frames``), like those who come back for it. Of dialects this file
knows that there are some (``Parts.dialects``); what is in them is in ``dialects.py``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, NamedTuple, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit
from uuid import uuid4

import msgspec
from litestar import Request, asgi
from litestar.enums import ScopeType
from litestar.types import Receive, Scope, Send

from ..app import (
    PAGE_ROWS,
    PRODUCER_TIMEOUT,
    RELAYED,
    UNDECODABLE,
    Append,
    BadRequest,
    BrokenOff,
    Change,
    Chunk,
    ChunkBuffer,
    Conflict,
    Cursor,
    CursorGone,
    End,
    Forbidden,
    Format,
    Grant,
    MessageEnd,
    NotFound,
    Page,
    Parts,
    Problem,
    Reader,
    ServerSentEvents,
    Settings,
    Signal,
    StartupError,
    StoredChunk,
    Streamed,
    TooLarge,
    Unavailable,
    checked_id,
    utf8_size,
)

log = logging.getLogger("resume_stream")

CONNECT_TIMEOUT = 10.0  # seconds
KEPT_CONNECTIONS, KEPT_FOR = 10, 5.0  # idle ones, each of which is looked at by every request, and for how many seconds
SENT_AT_ONCE = 64 * 1024  # bytes of a request's body
AHEAD = 256 * 1024  # bytes of an answer that may have come and are not committed yet
EVENTS_AT_ONCE = 1_000  # in one append
DECODED = 3  # times that a path is decoded, to see where it leads
LAST_WORDS = 1.0  # seconds for a body to end once its stream has, so that the connection can be used again

LOST, RESTARTED, CANCELLED = "upstream_lost", "service_restarted", "cancelled"
ANY = "sse"  # the dialect of what is of no other
FAILURES = {  # why a message is aborted here, and what its readers are told
    LOST: "The upstream broke the answer off.",
    RESTARTED: "The service that recorded this answer was restarted in its middle.",
    PRODUCER_TIMEOUT: "The upstream fell silent.",
    "event_too_large": "The upstream sent an event over max_chunk.",
    "message_too_large": "The answer is over max_message.",
    "not_utf8": "The upstream sent what is not UTF-8.",
    "compressed": "The upstream compressed its events, though it was asked not to.",
    "not_recorded": "The answer could not be recorded any more.",
}
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)")  # RFC 9110, 5
# What speaks of one connection only (RFC 9110, 7.6.1), is made anew, or is this service's own.
OF_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    b" upgrade".split()
)
NOT_SENT = OF_CONNECTION | frozenset(b"host accept-encoding content-length expect resume-thread resume-message".split())
NOT_PASSED_ON = OF_CONNECTION | frozenset(b"date alt-svc strict-transport-security".split())
NOT_OF_A_STREAM = NOT_PASSED_ON | frozenset(
    b"content-length content-type cache-control x-accel-buffering resume-thread resume-message".split()
)
TOKENS = frozenset({b"authorization", b"x-api-key"})
ANY_SCOPE = "any"  # to be let in; what a call takes is found out with it
SHOWN = (b"access-control-expose-headers", b"Resume-Thread, Resume-Message, Location, Content-Location")

Headers = list[tuple[bytes, bytes]]


class BadGateway(Problem, status=502, kind="Bad gateway"): ...


class GatewayTimeout(Problem, status=504, kind="Gateway timeout"): ...


def set_up(settings: Settings) -> None:
    """Raises StartupError."""
    headers_of(parse_upstreams(settings.upstream), os.environ)


def mount(parts: Parts) -> None:
    upstreams = parse_upstreams(parts.buffer.settings.upstream)
    secrets = headers_of(upstreams, os.environ)
    if not upstreams:
        return
    if not (parts.dialects and parts.producing and "raw" in parts.formats):
        raise StartupError("there is an upstream, which takes extras/dialects.py, producing.py and raw.py besides")
    relay = Relay(parts, [Target(upstream, secrets[upstream.name]) for upstream in upstreams])

    @asgi("/relay", is_mount=True, copy_scope=False, scope=ANY_SCOPE, token_in_query=True, token_header="x-api-key")
    async def relayed(scope: Scope, receive: Receive, send: Send) -> None:
        await relay.serve(scope, receive, send)

    parts.root.append(relayed)
    parts.on_start.append(relay.begin)
    parts.on_stop.append(relay.stop)


class Upstream(NamedTuple):
    """A server to relay, under a name of its own; ``url`` has no slash at its end."""

    name: str
    url: str


def parse_upstreams(settings: Sequence[str]) -> list[Upstream]:
    """Those of texts like ``openai=https://api.openai.com``. Raises StartupError."""
    found: dict[str, Upstream] = {}
    for text in settings:
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(https?://[^/?#@\s]+(?:/[^?#@\s]*)?)", text, re.ASCII)
        if match is None:
            shown = re.sub(r"\?.*", "?…", re.sub("//.*@", "//…@", text))  # as either may hold a key
            raise StartupError(f"--upstream: {shown!r} is not an upstream; write it like openai=https://api.openai.com")
        if not has_address(match[2]):
            raise StartupError(f"--upstream: {text!r} has no host, or a port that is not one of 1 to 65535")
        if match[1] in found:
            raise StartupError(f"--upstream: there are two upstreams {match[1]}; give each a name of its own")
        found[match[1]] = Upstream(match[1], match[2].rstrip("/"))
    return list(found.values())


def has_address(url: str) -> bool:
    """Whether there is a host in it, and no port that cannot be."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def headers_of(upstreams: Sequence[Upstream], environment: Mapping[str, str]) -> dict[str, Headers]:
    """Those that are set on what goes to each upstream, a line each. Raises StartupError, which shows none."""
    names = {f"RESUME_STREAM_UPSTREAM_{name.upper().replace('-', '_')}_HEADERS": name for name, _ in upstreams}
    found: dict[str, Headers] = {upstream.name: [] for upstream in upstreams}
    for variable, text in environment.items():
        if not re.fullmatch("RESUME_STREAM_UPSTREAM_[A-Z0-9_]+_HEADERS", variable):
            continue
        if variable not in names:
            raise StartupError(f"{variable} is of no upstream; name one with --upstream")
        for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
            if (match := HEADER.fullmatch(line)) is None:
                raise StartupError(f"{variable}: line {number} is not a header; write it like Authorization: Bearer …")
            found[names[variable]].append((match[1].encode(), match[2].encode()))
    return found


class Target:
    """An upstream, as requests to it need it."""

    def __init__(self, upstream: Upstream, headers: Headers) -> None:
        self.name, self.url = upstream
        parts = urlsplit(self.url)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self.host = parts.netloc.encode()
        self.path = parts.path.encode()
        self.headers = headers

    def headers_for(self, headers: Headers, body: bytes | bytearray, left_out: frozenset[bytes]) -> Headers:
        listed = frozenset(
            word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")
        )
        left_out = left_out | listed | {name.lower() for name, _ in self.headers}
        kept = [(name, value) for name, value in headers if name not in left_out]
        length = [(b"Content-Length", str(len(body)).encode())] if body else []
        return [(b"Host", self.host), *kept, (b"Accept-Encoding", b"identity"), *length, *self.headers]


class Relayed(NamedTuple):
    """A message that is recorded here, and where it comes from."""

    upstream: str
    dialect: Any
    thread_id: str
    message_id: str

    @property
    def mark(self) -> Chunk:
        """Its first chunk, which nobody is shown."""
        return Chunk("", f"{RELAYED}{self.upstream}:{self.dialect.name}")

    @property
    def headers(self) -> Headers:
        """Of every answer that is this message."""
        said = {
            **ServerSentEvents.HEADERS,
            **self.dialect.headers,
            "Resume-Thread": quote(self.thread_id, safe="!#$&'()*+,/:;=?@[]"),
            "Resume-Message": quote(self.message_id, safe="!#$&'()*+,/:;=?@[]"),
        }
        return [*((name.encode(), value.encode()) for name, value in said.items()), SHOWN]


class Answer(NamedTuple):
    """What a caller is sent."""

    status: int
    headers: Headers
    pieces: AsyncGenerator[bytes, None] | None = None
    close: Callable[[], Awaitable[None]] | None = None  # called once it is sent, whatever happens


def answer_json(status: int, what: Any) -> Answer:
    return Answer(status, [(b"Content-Type", b"application/json")], once(msgspec.json.encode(what)))


async def once(piece: bytes) -> AsyncGenerator[bytes, None]:
    yield piece


async def in_pieces(body: bytearray, sent: Callable[[], None]) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(body), SENT_AT_ONCE):
        yield bytes(body[at : at + SENT_AT_ONCE])
    sent()


NOTHING = Answer(204, [])


class Call:
    """A request to the relay. Raises NotFound, Forbidden, and BadRequest where it could leave the upstream's path."""

    def __init__(self, scope: Scope, receive: Receive, targets: Mapping[str, Target], has_secret: bool) -> None:
        self.request: Request[Any, Any, Any] = Request(scope, receive)
        self.method: str = cast(Any, scope)["method"]
        self.headers: Headers = list(scope["headers"])
        self.grant: Grant = Grant.of(self.request)
        self.query: bytes = scope["query_string"]
        self.left_out = NOT_SENT
        if has_secret:
            self.left_out |= TOKENS
            pairs = self.query.split(b"&")
            self.query = b"&".join(pair for pair in pairs if not names_token(pair))
        name, slash, path = scope["raw_path"].partition(b"/relay/")[2].partition(b"/")
        target = targets.get(name.decode("latin-1"))
        if target is None:
            raise NotFound(f"There is no upstream {name.decode('latin-1')!r:.80}; there are {', '.join(targets)}.")
        if self.header(b"sec-fetch-site") in ("cross-site", "same-site") and not self.header(b"origin"):
            raise Forbidden("A page of elsewhere may not have this asked, as for an image or a link.")
        self.target = target
        self.path = slash + path
        check_path(self.path)
        self.thread_id = self.id_in(b"resume-thread", "thread_id")

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    def id_in(self, name: bytes, kind: str) -> str | None:
        """The id in a header, percent-encoded or not. Raises BadRequest."""
        text = self.header(name)
        return checked_id(kind, unquote(text)) if text else None

    def asks(self, call: Sequence[Any] | None) -> dict[str, str] | None:
        """The ids in the path, where this is such a call: a method, and a pattern of the end of the path, or query."""
        if call is None or self.method != call[0]:
            return None
        asked = b"?" + self.query if call[1].startswith("[?") else self.path
        match = re.search(rf"{call[1]}\Z", asked.decode("latin-1"))
        return ids_in(match) if match else None

    def flag(self, name: str) -> str | None:
        return self.request.query_params.get(name)


def names_token(pair: bytes) -> bool:
    """Whether it is one of a query's that may hold the caller's token, however it is encoded."""
    return unquote_to_bytes(pair.partition(b"=")[0]) == b"access_token"


def check_path(path: bytes) -> None:
    """Not out of the upstream's base path, though it may be decoded more than once on the way. Raises BadRequest."""
    decoded = path
    for _ in range(DECODED):
        decoded = unquote_to_bytes(decoded)
    segments = {segment.partition(b";")[0] for segment in re.split(rb"[/\\]", decoded)}
    leads_out = segments & {b".", b".."} or path.startswith(b"//") or unquote_to_bytes(decoded) != decoded
    if leads_out or re.search(rb"[\x00-\x20\x7f]", path):
        raise BadRequest("The path could lead out of the upstream's base path; write it without '.', '..' and '//'.")


def ids_in(match: re.Match[str]) -> dict[str, str]:
    return {name: unquote(value) for name, value in match.groupdict().items() if value}


def usable(text: Any) -> str | None:
    """What an upstream calls something, if it can be an id here."""
    with suppress(Problem):
        return checked_id("id", text) if isinstance(text, str) else None
    return None


class Asked:
    """What an upstream has been asked for, from before it is asked until its answer has ended."""

    def __init__(self, call: Call, message_id: str | None) -> None:
        self.call = call
        self.message_id = message_id
        self.claims: set[tuple[str, str]] = set()
        self.is_recorded = False  # by a Pump, in a message that none of the claims had found
        self.members: dict[str, Any] = {}  # of the body, where a dialect has a thread's id there
        # What comes of it: a message with what its first answer says besides, or an answer that is none.
        self.answer: asyncio.Future[tuple[Relayed, Headers] | Any] = asyncio.get_running_loop().create_future()

    @property
    def threads(self) -> list[str]:
        """Those in which its message may be, where that is named: before the upstream answers, nobody knows which."""
        if self.message_id is None:
            return []
        if self.call.thread_id is not None:
            return [self.call.thread_id]
        named = [usable(name) for name in self.members.values()]
        covered = [name for name in named if name and self.call.grant.allows("any", name)]
        return list(dict.fromkeys([self.message_id, *covered]))

    def fail(self, problem: Problem) -> None:
        if not self.answer.done():
            self.answer.set_exception(problem)
            self.answer.exception()  # looked at, whether or not anybody waits for it


class Relay:
    """All upstreams of a service, and what is being recorded of them."""

    def __init__(self, parts: Parts, targets: Sequence[Target]) -> None:
        self.buffer: ChunkBuffer = parts.buffer
        self.producing = parts.producing
        self.active_message = parts.active_message
        self.dialects = {dialect.name: dialect for dialect in parts.dialects}
        self._raw: Format = parts.formats["raw"]
        self._targets = {target.name: target for target in targets}
        self._transport: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: dict[Asked, None] = {}
        self._claims: dict[tuple[str, str], Asked] = {}  # by whom a message is recorded, or about to be
        self._under_way = 0  # requests to upstreams, from the first byte to the end of the answer

    def begin(self) -> None:
        """Abort what a process before this one was recording, as nobody records it any more."""
        if self._transport is None:
            import httpx  # which is of no use, and takes a while, where there is no upstream

            # As a transport it sends and gives what it is told: no cookies, no redirects, no names of its own.
            limits = httpx.Limits(max_keepalive_connections=KEPT_CONNECTIONS, keepalive_expiry=KEPT_FOR)
            self._transport = httpx.AsyncHTTPTransport(limits=limits)
            # Where others record into the same store, nobody can tell whose it is: producer_timeout ends it.
            if not self.buffer.settings.store:
                self._go(self.producing.patiently(self.buffer, self._abort_orphans))

    def stop(self) -> None:
        """What is being recorded is aborted at the next start, so that nobody takes its end here for the answer's."""
        for task in self._tasks:
            task.cancel()
        if self._transport is not None:
            self.buffer.begin(self._transport.aclose())

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.buffer.begin(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort_orphans(self) -> None:
        cursor: str | None = None
        while True:
            threads = await self.buffer.get_active_threads(1000, cursor)
            for thread in threads.threads:
                with suppress(NotFound):
                    await self._abort_orphans_of(thread.thread_id)
            if (cursor := threads.cursor) is None:
                return

    async def _abort_orphans_of(self, thread_id: str) -> None:
        cursor: str | None = None
        while True:
            status = await self.buffer.get_thread_status(thread_id, cursor=cursor)
            for message in status.messages:
                name = message.message_id
                holder = self._claims.get((thread_id, name))
                is_ours = holder is not None and holder.is_recorded  # and not one who looks whether it is there
                if message.status == "active" and not is_ours and await self.known(thread_id, name):
                    with suppress(Conflict):
                        await self.buffer.abort_message(thread_id, name, RESTARTED)
            if (cursor := status.messages_cursor) is None:
                return

    # A request

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            cast(Any, scope)["refusal"] = refusal = Forbidden("Only HTTP is relayed; ask without an Upgrade.")
            raise refusal
        self.begin()
        call = Call(scope, receive, self._targets, bool(self.buffer.settings.secret))
        answer = await self._answer(call)
        pieces = None if call.method == "HEAD" else answer.pieces
        try:
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await Streamed(pieces or (), {}).send_body(send, receive)
        finally:
            if answer.close is not None:
                await answer.close()

    async def _answer(self, call: Call) -> Answer:
        last = call.header(b"last-event-id")
        if re.fullmatch(r"\d{1,18}-\d{1,18}", last, re.ASCII):
            return await self._going_on(call, Cursor.parse(last))
        is_absent_204 = False
        for dialect in self.dialects.values():
            ids = call.asks(dialect.resume) if last in ("", dialect.from_start) else None
            if ids is not None:
                if answer := await self._resumed(call, dialect, ids):
                    return answer
                is_absent_204 = is_absent_204 or dialect.absent_is_204
            if (ids := call.asks(dialect.cancel)) and (message := await self._find(call, dialect, ids, "abort")):
                return await self._cancelled(call, message)
        # One that goes on to the upstream is a word of the dialect's, and no id.
        if last and all(last != dialect.from_start for dialect in self.dialects.values()):
            raise CursorGone("This Last-Event-ID was not given here; ask anew, without it.")
        answer = await self._joined(call)
        if is_absent_204 and answer.status in (404, 405, 501):
            if answer.close is not None:
                await answer.close()
            return NOTHING
        return answer

    # Going on

    async def known(self, thread_id: str, message_id: str) -> Relayed | None:
        """The message, if it is there and relayed."""
        _, page = await self.buffer.store.page(thread_id, message_id, 0, 1)
        for entry in page.entries:
            if isinstance(entry, StoredChunk) and entry.event and entry.event.startswith(RELAYED):
                upstream, _, dialect = entry.event.removeprefix(RELAYED).partition(":")
                return Relayed(upstream, self.dialects.get(dialect, self.dialects[ANY]), thread_id, message_id)
        return None

    async def _going_on(self, call: Call, cursor: Cursor) -> Answer:
        """The rest of the message that the cursor is in, whatever the method."""
        call.grant.require("read", None)
        gone = CursorGone("This Last-Event-ID is of an answer that is not, or no longer, here; ask anew, without it.")
        thread_id = await thread_of(self.buffer, cast(int, cursor.generation))
        if thread_id is None or not call.grant.allows("any", thread_id):
            raise gone
        state, page = await self.buffer.store.page(thread_id, None, cursor.seq - 1, 1)
        if state.generation != cursor.generation or not page.entries or page.entries[0].seq != cursor.seq:
            raise gone
        had = page.entries[0]
        message = await self.known(thread_id, had.message_id)
        if message is None or message.upstream != call.target.name:
            raise gone
        if isinstance(had, MessageEnd) or await self._is_all(message, had):
            return NOTHING
        return await self._reading(call, message, had)

    async def _is_all(self, message: Relayed, had: StoredChunk) -> bool:
        """Whether nothing will come after it that could be sent."""
        _, page = await self.buffer.store.page(message.thread_id, message.message_id, had.seq, 1)
        return any(isinstance(end, MessageEnd) and not last_words(message.dialect, end, had) for end in page.entries)

    async def _reading(self, call: Call, message: Relayed, had: StoredChunk | None = None) -> Answer:
        return Answer(200, message.headers, await self._told(message, self._seat(call), had))

    def _seat(self, call: Call) -> Reader:
        return Reader(self.buffer, idle_timeout=0, expires=call.grant.expires)

    async def _told(
        self, message: Relayed, reader: Reader, had: StoredChunk | None = None
    ) -> AsyncGenerator[bytes, None]:
        after = None if had is None else str(had.seq)
        place = await self.buffer.locate(message.thread_id, message.message_id, after=after)
        return self._frames(message.dialect, self.buffer.follow(place, reader), had)

    async def _frames(
        self, dialect: Any, items: AsyncGenerator[Page | Signal, None], had: StoredChunk | None
    ) -> AsyncGenerator[bytes, None]:
        """Events as the upstream sent them, with our ids. Raises BrokenOff where the end cannot be said."""
        yield ServerSentEvents.RETRY
        async with aclosing(items):
            async for item in items:
                if item is Signal.HEARTBEAT:
                    yield ServerSentEvents.HEARTBEAT
                elif isinstance(item, Page):
                    frames = item.encoded(self._raw)
                    self.buffer.tell("sent", item, len(frames))
                    if frames:
                        yield frames
                    had = next((entry for entry in reversed(item.entries) if isinstance(entry, StoredChunk)), had)
                    end = item.entries[-1]
                    if isinstance(end, MessageEnd):
                        words = last_words(dialect, end, had)
                        if words is None:
                            raise BrokenOff
                        if words:
                            yield b"id: %d-%d\n%s" % (item.generation, end.seq, words)
                        return
        raise BrokenOff  # the service is stopping, the token has expired, or the thread was cleared

    # A dialect's own calls

    async def _find(self, call: Call, dialect: Any, ids: Mapping[str, str], scope: str) -> Relayed | None:
        """The message that such a call is about, if it is here, and the caller may do this with it."""
        if (thread_id := thread_for(call, ids, scope)) is None:
            return None
        message_id = usable(ids["message"]) if "message" in ids else await self._active(call, dialect, thread_id)
        return await self._known_as(call, dialect, thread_id, message_id) if message_id else None

    async def _known_as(self, call: Call, dialect: Any, thread_id: str, message_id: str) -> Relayed | None:
        """The message, if it is of the call's upstream, and of the dialect."""
        message = await self.known(thread_id, message_id)
        is_it = message is not None and message.upstream == call.target.name and message.dialect is dialect
        return message if is_it else None

    async def _active(self, call: Call, dialect: Any, thread_id: str) -> str | None:
        """The thread's active message, of which nothing may have come yet."""
        for asked in list(self._asked):
            if asked.call.target is call.target and asked.members.get(dialect.thread_in_body) == thread_id:
                with suppress(Problem):  # which the one who asked is told
                    await asyncio.shield(asked.answer)
        return cast(str | None, await self.active_message(self.buffer, thread_id))

    async def _resumed(self, call: Call, dialect: Any, ids: Mapping[str, str]) -> Answer | None:
        if (message := await self._find(call, dialect, ids, "read")) is None:
            thread_id = thread_for(call, ids, "read") if dialect.absent_is_204 else None
            return None if thread_id is None else await self._none_active(call, dialect, thread_id)
        if dialect.if_stream is not None and call.flag(dialect.if_stream) != "true":
            return await self._thing_of(message)
        return await self._reading(call, message, await self._had(call, message))

    async def _none_active(self, call: Call, dialect: Any, thread_id: str) -> Answer | None:
        """Why the thread's last answer failed here, if it did: its text may be whole where it was made."""
        state, _ = await self.buffer.store.page(thread_id, None, 0, 1)
        if not state.generation:
            return None
        _, page = await self.buffer.store.page(thread_id, None, state.last_seq - 1, 1)
        for end in page.entries:
            if isinstance(end, MessageEnd) and end.reason in FAILURES:
                message = await self._known_as(call, dialect, thread_id, end.message_id)
                if message is not None and (words := last_words(dialect, end, None)):
                    return Answer(200, message.headers, once(words))
        return NOTHING

    async def _had(self, call: Call, message: Relayed) -> StoredChunk | None:
        """The last event that a caller has who names its position."""
        parameter, name = message.dialect.position or ("", "")
        if not (text := call.flag(parameter)):
            return None
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise BadRequest(f"{parameter}={text!r:.80} is no position; send the {name} of the last event you have.")
        had, number = None, -1
        async with aclosing(self._events(message)) as events:
            async for event in events:
                position = message.dialect.json_of(event).get(name)
                number = position if isinstance(position, int) else number + 1
                if number > int(text):
                    break
                had = event
        return had

    async def _events(self, message: Relayed) -> AsyncGenerator[StoredChunk, None]:
        """Those that are there, without the mark."""
        after, has_more = 0, True
        while has_more:
            state, page = await self.buffer.store.page(message.thread_id, message.message_id, after, PAGE_ROWS)
            for entry in page.entries:
                if isinstance(entry, StoredChunk) and not (entry.event or "").startswith(RELAYED):
                    yield entry
            after, has_more = page.last_seq, bool(page.entries) and page.last_seq < state.last_seq

    async def _thing_of(self, message: Relayed) -> Answer:
        """The object that the stream is of, as it was last seen, or as it was when it was cut short."""
        dialect, thing, last = message.dialect, None, None
        async for event in self._events(message):
            last = event
            if f'"{dialect.thing}"' in event.content:
                thing = dialect.json_of(event).get(dialect.thing) or thing
        state, _ = await self.buffer.store.page(message.thread_id, message.message_id, 0, 1)
        if not isinstance(thing, dict):
            raise NotFound(f"Nothing has come of {message.message_id!r} yet; try again later.", exists=True)
        if state.status == "aborted" and (last is None or dialect.end_of(last) is None):
            code, words, failed = why(state.reason)
            thing = dialect.unfinished(thing, code, words, failed)
        return answer_json(200, thing)

    async def _cancelled(self, call: Call, message: Relayed) -> Answer:
        """The message ends at once, and its upstream hears of it too; if that knows the call, it has the word."""
        body = await self.producing.whole_body(self.buffer, call.request)
        with suppress(Conflict, NotFound):
            await self.buffer.abort_message(message.thread_id, message.message_id, CANCELLED)
        with suppress(BadGateway, GatewayTimeout), self._holding(body) as sent:
            response = await self._send(call, body, sent)
            if response.status_code < 300:
                return self._passed(response)
            await self._let_go(response)
        if message.dialect.thing is not None:
            return await self._thing_of(message)
        return answer_json(message.dialect.cancel[2], {})

    # Asking

    async def _joined(self, call: Call) -> Answer:
        """What the upstream answers, which is asked once for each message, whoever retries."""
        call.grant.require("write", call.thread_id)
        message_id = call.id_in(b"resume-message", "message_id") or call.id_in(b"idempotency-key", "message_id")
        if message_id is not None:
            call.grant.require("write", call.thread_id or message_id)
        reader = self._seat(call)
        asked = Asked(call, message_id)
        self._asked[asked] = None
        try:
            body = await self.producing.whole_body(self.buffer, call.request)
        except BaseException:
            del self._asked[asked]
            raise
        self._go(self._record(asked, body))
        answer = await asyncio.shield(asked.answer)
        if not isinstance(answer, tuple):
            return self._passed(answer)
        message, headers = answer
        call.grant.require("write", message.thread_id)  # as another one's answer may be in a thread that its body names
        return Answer(200, [*headers, *message.headers], await self._told(message, reader))

    async def taken(self, asked: Asked, thread_id: str, message_id: str, is_new: bool = False) -> Relayed | None:
        """The message, if there is one already; if not, nobody else records it from now on.

        Raises Conflict where what is there is something else.
        """
        key = (thread_id, message_id)
        while (holder := self._claims.setdefault(key, asked)) is not asked:
            if holder.call.target is not asked.call.target:
                raise not_of_this_upstream(message_id)
            with suppress(Problem):  # which the other is told
                answer = await asyncio.shield(holder.answer)
                if isinstance(answer, tuple):
                    return cast(Relayed, answer[0])
        is_new = is_new or key in asked.claims
        asked.claims.add(key)
        if is_new:
            return None
        state, _ = await self.buffer.store.page(thread_id, message_id, 0, 1)
        message = await self.known(thread_id, message_id) if state.status else None
        if state.status and (message is None or message.upstream != asked.call.target.name):
            raise not_of_this_upstream(message_id)
        return message

    def _release(self, asked: Asked) -> None:
        self._asked.pop(asked, None)
        for claim in asked.claims:
            del self._claims[claim]
        asked.claims.clear()

    async def _record(self, asked: Asked, body: bytearray) -> None:
        """From the question to the end of its answer, whoever waits for it."""
        call, outcome = asked.call, "interrupted"
        try:
            if (response := await self._asked_for(asked, body)) is None:
                outcome = "joined"
                return
            if not is_stream(call, response):
                outcome = "passed_through"
                self._release(asked)  # first, as who waits for this answer then asks for one of its own
                asked.answer.set_result(response)
                return
            try:
                outcome = await Pump(self, asked, response).run()
            finally:
                await self._let_go(response)
        except Problem as problem:
            outcome = outcome if asked.answer.done() else "refused"
            self._release(asked)
            asked.fail(problem)
        finally:
            self._release(asked)
            asked.fail(Unavailable("The service is stopping; try again when it is back."))
            self.buffer.tell("relayed", call.target.name, outcome)
            log.info("relayed %s: %s", call.target.name, outcome)

    async def _asked_for(self, asked: Asked, body: bytearray) -> Any:
        """What the upstream answers; None where its message is there already, which then is the answer."""
        with self._holding(body) as sent:
            asked.members = self._members(asked.call, body)
            for thread_id in asked.threads:
                there = await self.taken(asked, thread_id, cast(str, asked.message_id))
                if there is not None:
                    asked.answer.set_result((there, []))
                    return None
            return await self._send(asked.call, body, sent)

    @contextmanager
    def _holding(self, body: bytearray) -> Iterator[Callable[[], None]]:
        """A body counts, and is kept, until it is sent, as its answer may take long. Raises Unavailable."""
        with self.producing.holding(self.buffer) as hold:
            hold(len(body))

            def sent() -> None:
                body.clear()
                hold(0)

            try:
                yield sent
            finally:
                body.clear()

    def _members(self, call: Call, body: bytearray) -> dict[str, Any]:
        """The members of the request's JSON that may be a thread's id."""
        names = {dialect.thread_in_body for dialect in self.dialects.values() if dialect.thread_in_body}
        if not names or not call.header(b"content-type").startswith("application/json"):
            return {}
        try:
            members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            return {name: msgspec.json.decode(members[name]) for name in names & members.keys()}
        except UNDECODABLE:
            return {}  # what it is worth is for the upstream to say

    async def _send(self, call: Call, body: bytearray, sent: Callable[[], None]) -> Any:
        """The upstream's answer, still to be read and let go. Raises Unavailable, BadGateway and GatewayTimeout."""
        import httpx

        if self._under_way >= self.buffer.settings.max_relays:
            raise Unavailable("As many answers are being relayed as max_relays allows; try again later.")
        target, silence = call.target, self.buffer.settings.producer_timeout or None
        request = httpx.Request(
            call.method,
            target.origin,
            headers=target.headers_for(call.headers, body, call.left_out),
            content=in_pieces(body, sent) if body else None,
            extensions={
                "target": (target.path + call.path or b"/") + (b"?" + call.query if call.query else b""),
                "timeout": {"connect": CONNECT_TIMEOUT, "read": silence, "write": silence, "pool": silence},
            },
        )
        response = None
        self._under_way += 1
        try:
            response = await self._transport.handle_async_request(request)
            return response
        except httpx.TimeoutException as error:
            raise GatewayTimeout(f"The upstream {target.name!r} does not answer; try again later.") from error
        except httpx.TransportError as error:
            kind = type(error).__name__
            raise BadGateway(f"The upstream {target.name!r} cannot be asked ({kind}); try again later.") from error
        finally:
            if response is None:
                self._under_way -= 1

    async def _let_go(self, response: Any) -> None:
        self._under_way -= 1
        await response.aclose()

    def _passed(self, response: Any) -> Answer:
        """An answer as it comes."""
        headers = [(name, value) for name, value in response.headers.raw if is_passed_on(name, NOT_PASSED_ON)]
        return Answer(response.status_code, headers, as_it_comes(response), lambda: self._let_go(response))


async def thread_of(buffer: ChunkBuffer, generation: int) -> str | None:
    """The thread of this generation; None where there is none (any more)."""
    for thread in (await buffer.store.threads(None, 1, generation + 1, None)).threads:
        if (await buffer.store.find(thread.thread_id)).generation == generation:
            return thread.thread_id
    return None


def not_of_this_upstream(message_id: str) -> Conflict:
    return Conflict(f"The message {message_id!r} is there, and not of this upstream; name another one.")


def thread_for(call: Call, ids: Mapping[str, str], scope: str) -> str | None:
    """The thread that a dialect's call is about, where the caller may do this with it."""
    thread_id = call.thread_id or usable(ids.get("thread", ids.get("message")))
    is_allowed = thread_id is not None and call.grant.allows(scope, thread_id)
    return thread_id if is_allowed else None


def is_stream(call: Call, response: Any) -> bool:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return response.status_code == 200 and kind == "text/event-stream" and call.method != "HEAD"


def is_passed_on(name: bytes, left_out: frozenset[bytes]) -> bool:
    name = name.lower()
    return name not in left_out and not name.startswith(b"access-control-")  # who may read is said here


async def as_it_comes(response: Any) -> AsyncGenerator[bytes, None]:
    import httpx

    try:
        async for piece in response.stream:
            yield piece
    except httpx.TransportError as error:
        raise BrokenOff from error


def why(reason: str | None) -> tuple[str, str, bool]:
    """A code for why a message was aborted, words for it, and whether something failed."""
    if reason in FAILURES:
        return reason, FAILURES[reason], True
    return CANCELLED, f"The answer was stopped: {reason}." if reason else "The answer was stopped.", False


def last_words(dialect: Any, end: MessageEnd, had: StoredChunk | None) -> bytes | None:
    """What is still to be said of an end, as an event without its id; None where there are no words for it.

    Nothing is, where the upstream has said it: a terminal event is never made up.
    """
    if end.status == "completed" or (had is not None and dialect.end_of(had)):
        return b""
    if dialect.error is None:
        return None
    code, words, failed = why(end.reason)
    if failed or dialect.stop is None:
        name, data = dialect.error(code, words, dialect.json_of(had) if had else {})
    else:
        name, data = dialect.stop(end.reason or CANCELLED)
    return b"%sdata: %s\n\n" % (f"event: {name}\n".encode() if name else b"", msgspec.json.encode(data))


class Failed(Exception):
    """An answer cannot be recorded to its end; ``args`` is one of FAILURES."""


class Pump:
    """Records one answer: names its message, commits its events as they come, and ends it as it ends."""

    def __init__(self, relay: Relay, asked: Asked, response: Any) -> None:
        self._relay = relay
        self._buffer = relay.buffer
        self._producing = relay.producing
        self._asked = asked
        self._response = response
        self._now = asyncio.get_running_loop().time
        self._index = 0  # of the next chunk in the message
        self._due = 0.0  # when it takes a sign of life, by the loop's clock
        self._generation: int | None = None
        self._status: str | None = None  # as the events have it
        self._outcome = self._reason = "completed"
        self._is_over = False

    async def run(self) -> str:
        """What became of it, in a word. Raises Problem where nothing of it has been recorded."""
        if self._response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise self._useless("compressed")
        self._source = Source(self._response.stream, self._buffer.settings.max_chunk)
        try:
            events = await self._beginning()
            if (there := await self._named(events or [])) is not None:
                self._asked.answer.set_result((there, self._headers()))
                return "joined"
            if events is None and self._dialect.completes:
                raise self._useless(LOST)
            await self._recorded(events or [])
            if self._is_over:
                await self._hear_out()
            return self._outcome
        finally:
            await self._source.close()

    async def _hear_out(self) -> None:
        with suppress(Failed, TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while await self._source.take() is not None:
                    pass

    def _useless(self, reason: str) -> Problem:
        kind = GatewayTimeout if reason == PRODUCER_TIMEOUT else BadGateway
        return kind(f"The upstream {self._asked.call.target.name!r} gave nothing to record. {FAILURES[reason]}")

    async def _beginning(self) -> list[Chunk] | None:
        """The first events; none after ``heartbeat``, so that nobody has to wait for those without a sign of life.

        What has its id in them is waited for, though no longer than ``producer_timeout``.
        """
        settings = self._buffer.settings
        dialects = self._relay.dialects.values()
        needs_event = any(dialect.message_in_event for dialect in dialects if self._is_path_of(dialect))
        until = self._now() + ((not needs_event and settings.heartbeat) or settings.producer_timeout or math.inf)
        try:
            while (events := await self._source.take(until)) == []:
                if self._now() >= until:
                    if needs_event:
                        raise Failed(PRODUCER_TIMEOUT)
                    break
        except Failed as failed:
            raise self._useless(failed.args[0]) from failed
        return events

    def _is_path_of(self, dialect: Any) -> bool:
        path = self._asked.call.path.decode("latin-1")
        return dialect.path is not None and re.search(rf"{dialect.path}\Z", path) is not None

    def _dialect_of(self, first: Chunk | None) -> tuple[Any, dict[str, str]]:
        """By the answer's headers, the path, or the first event; and the ids in the headers."""
        for dialect in self._relay.dialects.values():
            name, pattern = dialect.header or ("", "")
            said = self._response.headers.get(name)
            if said is not None and (match := re.search(pattern, said)):
                return dialect, ids_in(match)
        for dialect in self._relay.dialects.values():
            opens = first is not None and (dialect.begins_with(first) or dialect.end_of(first) in dialect.aborts)
            if self._is_path_of(dialect) and (opens or first is None or not dialect.openings):
                return dialect, {}
        for dialect in self._relay.dialects.values():
            if dialect.path is None and first is not None and dialect.begins_with(first):
                return dialect, {}
        return self._relay.dialects[ANY], {}

    async def _named(self, events: list[Chunk]) -> Relayed | None:
        """Name the message; the one that there is already, if it is another's. Raises Forbidden and Conflict."""
        asked, first = self._asked, events[0] if events else None
        self._dialect, ids = self._dialect_of(first)
        in_event = None if first is None else self._dialect.message_in(first)
        in_header = asked.call.header(self._dialect.message_in_header)
        known = asked.message_id or usable(in_event) or usable(ids.get("message")) or usable(in_header)
        message_id = known or f"{asked.call.target.name}-{uuid4().hex}"
        in_body = asked.members.get(self._dialect.thread_in_body)
        thread_id = asked.call.thread_id or usable(ids.get("thread")) or usable(in_body) or message_id
        if not asked.call.grant.allows("any", thread_id):
            raise Forbidden("The token covers some threads only; name one of them in the header Resume-Thread.")
        self._message = Relayed(asked.call.target.name, self._dialect, thread_id, message_id)
        return await self._relay.taken(asked, thread_id, message_id, is_new=known is None)

    def _headers(self) -> Headers:
        """What the upstream's answer says besides. Where it leads back to the upstream, it leads back here."""
        headers, left_out = [], NOT_OF_A_STREAM | {name.encode() for name in self._dialect.headers}
        for name, value in self._response.headers.raw:
            if name.lower() in (b"location", b"content-location"):
                value = value.removeprefix(self._asked.call.target.url.encode())
            if is_passed_on(name, left_out):
                headers.append((name, value))
        return headers

    async def _recorded(self, events: list[Chunk] | None) -> None:
        message = self._message
        self._asked.is_recorded = True
        try:
            async with self._producing.while_active(self._buffer, message.thread_id, message.message_id) as lift:
                try:
                    while events is not None:
                        await self._take(events, lift)
                        events = None if self._is_over else await self._source.take()
                except Failed as failed:
                    self._failed(failed.args[0])
                except TooLarge:
                    self._not_recorded("message_too_large")
                except Conflict:
                    raise
                except Problem as problem:
                    if not self._asked.answer.done() or self._buffer.stopping:
                        raise
                    log.warning("an answer of %s cannot be recorded any more: %s", message.upstream, problem.detail)
                    self._not_recorded("not_recorded")
                lift()
                await self._end()
        except Conflict:
            if not self._asked.answer.done():
                raise
            self._outcome = "stopped"

    def _failed(self, reason: str) -> None:
        if not self._asked.answer.done():
            raise self._useless(reason)
        if self._status is None:
            self._status, self._outcome, self._reason = "aborted", reason, reason

    def _not_recorded(self, reason: str) -> None:
        """What was to end it is not in the store either, unless it was an error, which stays one."""
        if self._status == "completed":
            self._status = None
        self._failed(reason)

    async def _take(self, events: list[Chunk], lift: Callable[[], Any]) -> None:
        for number, event in enumerate(events):
            if kind := self._dialect.end_of(event):
                self._look(kind, event)
            elif self._status == "completed" and self._dialect.begins_with(event):
                self._status = None  # until this one, too, has ended
            if self._is_over:
                events = events[: number + 1]
                break
        if not events and self._index and self._now() < self._due:
            return
        chunks = events if self._index else [self._message.mark, *events]
        completes = self._is_over and self._status == "completed"
        if completes:
            lift()
        await self._append(chunks, completes)

    async def _append(self, chunks: list[Chunk], completes: bool) -> None:
        """All of them, or those that ``max_message`` has room for. Raises TooLarge."""
        sizes = [utf8_size(chunk.content) for chunk in chunks]
        message = self._message
        append = Append(message.thread_id, message.message_id, chunks, sizes, self._index, completes, self._generation)
        try:
            change = await self._producing.patiently(self._buffer, functools.partial(self._commit, append))
        except TooLarge:
            if len(chunks) == 1:
                raise
            await self._append(chunks[: len(chunks) // 2], False)
            await self._append(chunks[len(chunks) // 2 :], completes)
            return
        self._index += len(chunks)
        self._generation = change.state.generation
        self._due = self._now() + self._buffer.settings.producer_timeout / 4
        if not self._asked.answer.done():
            self._asked.answer.set_result((message, self._headers()))

    async def _commit(self, append: Append) -> Change:
        await self._buffer.room()
        return await self._buffer.store.write(append)

    def _look(self, kind: str, event: Chunk) -> None:
        """An error stays one, whatever comes after it."""
        if kind in self._dialect.aborts:
            self._status, self._outcome = "aborted", "failed"
            self._reason = self._dialect.reason_of(event)[: End.MAX_REASON]
        elif kind in self._dialect.completes and self._status is None:
            self._status = "completed"
        self._is_over = kind in self._dialect.last

    async def _end(self) -> None:
        if self._status is None and self._dialect.completes:
            self._failed(LOST)
        ids = (self._message.thread_id, self._message.message_id)
        if self._status == "completed" and self._is_over:
            return  # with its last event
        if self._status == "aborted":
            await self._producing.patiently(
                self._buffer, functools.partial(self._buffer.abort_message, *ids, self._reason)
            )
        else:
            await self._producing.patiently(self._buffer, functools.partial(self._buffer.complete_message, *ids))


class Source:
    """The events of a body, as they come; it is read a little ahead of what is taken. Raises Failed."""

    def __init__(self, body: AsyncIterator[bytes], max_chunk: int) -> None:
        self._events = Events(max_chunk)
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._filled, self._emptied = asyncio.Event(), asyncio.Event()
        self._failure: Failed | None = None
        self._reading = asyncio.create_task(self._read(body))
        self._reading.add_done_callback(lambda _: self._filled.set())

    async def _read(self, body: AsyncIterator[bytes]) -> None:
        import httpx

        try:
            async for piece in body:
                self._pieces.append(piece)
                self._size += len(piece)
                self._filled.set()
                if self._size > AHEAD:
                    self._emptied.clear()
                    await self._emptied.wait()
        except httpx.TimeoutException as error:
            raise Failed(PRODUCER_TIMEOUT) from error
        except httpx.TransportError as error:
            raise Failed(LOST) from error

    async def take(self, until: float = math.inf) -> list[Chunk] | None:
        """All that has come, or some of it; none where a piece has none, or it is ``until``; None at the end."""
        if self._failure is not None:
            raise self._failure
        if not self._pieces and not self._reading.done():
            self._filled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(None if until == math.inf else until):
                    await self._filled.wait()
        if not self._pieces and self._reading.done():
            self._reading.result()
            return None
        found: list[Chunk] = []
        try:
            while self._pieces and len(found) < EVENTS_AT_ONCE:
                piece = self._pieces.popleft()
                self._size -= len(piece)
                found.extend(self._events.feed(piece))
        except Failed as failed:
            self._failure = failed  # after what came before it
            if not found:
                raise
        self._emptied.set()
        return found

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        if not self._reading.cancelled():
            self._reading.exception()  # looked at, whether or not it was taken


class Events:
    """Server-sent events (HTML, 9.2.6) from bytes that come in pieces, without their ids and comments."""

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._rest = bytearray()
        self._is_first, self._after_cr = True, False

    def feed(self, piece: bytes) -> Iterator[Chunk]:
        """Raises Failed, after the events that are before what is wrong."""
        if self._after_cr:
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        searched = max(len(self._rest) - 1, 0)
        self._rest += piece
        if self._rest.find(b"\n\n", searched) >= 0:
            *blocks, self._rest = self._rest.split(b"\n\n")
            for block in blocks:
                if event := self._event_of(block):
                    yield event
        if len(self._rest) > 7 * self._max_chunk + 1024:  # a line may be "data: ", and nothing
            raise Failed("event_too_large")

    def _event_of(self, block: bytearray) -> Chunk | None:
        """None where it has neither a name nor data."""
        if self._is_first:
            self._is_first, block = False, block.removeprefix(b"\xef\xbb\xbf")
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            raise Failed("not_utf8") from error
        name, data = None, []
        for line in text.split("\n"):
            field, _, value = line.partition(":")
            if field == "data":
                data.append(value.removeprefix(" "))
            elif field == "event":
                name = value.removeprefix(" ") or None
        if name is None and not data:
            return None
        content = "\n".join(data)
        if utf8_size(content) + len(name or "") > self._max_chunk:
            raise Failed("event_too_large")
        return Chunk(content, name)
