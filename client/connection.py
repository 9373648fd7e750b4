"""How the client talks to the service: requests, server-sent events, a reader, a producer."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import math
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

from . import (
    AccumulatedContent,
    Appended,
    Chunk,
    ClientError,
    Conflict,
    Forbidden,
    Gone,
    Item,
    MessageEnd,
    MessageStatus,
    NotFound,
    Problem,
    Reset,
    Status,
    StoredChunk,
    ThreadStatus,
    ThreadSummary,
    Unauthorized,
    Unreachable,
)

T = TypeVar("T")
Query = Mapping[str, str | int | None]
Source = AsyncIterable[str | Chunk] | Iterable[str | Chunk]

TIMEOUTS = httpx.Timeout(connect=10, read=45, write=45, pool=None)  # three heartbeats without a byte are a dead line
# The service closes a connection that was not used for 5 s; one that is about to be closed is not used again.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=2)

log = logging.getLogger("resume_stream.client")


def record(kind: type[T], data: Mapping[str, Any], **more: Any) -> T:
    """The record that is in an answer. What a newer service adds to it is passed over."""
    wire = {field.name: re.sub("_(.)", lambda found: found[1].upper(), field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**({name: data[key] for name, key in wire.items() if key in data} | more))


# ---------------------------------------------------------------------------------------------
# Server-sent events
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name ("" where it has none), its data, and the last id sent up to and with it."""

    name: str
    data: str
    id: str


class EventParser:
    """Events from bytes that come in pieces, by the rules of HTML (9.2.6)."""

    _LINE_END = re.compile("\r\n|\n|\r")

    def __init__(self) -> None:
        self.retry: int | None = None  # ms, as the stream asked for
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._line: list[str] = []
        self._after_cr = False
        self._name, self._data, self._id = "", list[str](), ""

    def feed(self, piece: bytes) -> list[Event]:
        """The events that this piece brings to their end."""
        text = self._decode(piece)
        if self._after_cr and text:
            text, self._after_cr = text.removeprefix("\n"), False
        *lines, rest = self._LINE_END.split(text)
        self._after_cr = self._after_cr or text.endswith("\r")
        if lines:
            lines[0] = "".join(self._line) + lines[0]
            self._line.clear()
        self._line.append(rest)
        return [event for line in lines if (event := self._take(line))]

    def _take(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "data":
                self._data.append(value)
            case "event":
                self._name = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry = int(value)
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._name, "\n".join(self._data), self._id) if self._data else None
        self._name, self._data = "", []
        return event


# ---------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------


class Backoff:
    """Exponential delays with full jitter, until nothing was answered for ``patience`` seconds."""

    def __init__(self, patience: float, base: float = 0.25, cap: float = 10.0) -> None:
        self.base = base
        self._patience = patience
        self._cap = cap
        self._failures = 0
        self._gives_up: float | None = None

    def answered(self) -> None:
        """The service is there."""
        self._gives_up = None

    def progressed(self) -> None:
        """The service does what it is there for: begin with the shortest delay again."""
        self._failures, self._gives_up = 0, None

    def hurry(self, patience: float) -> None:
        """From now on, be no more patient than this."""
        self._patience = min(self._patience, patience)
        if self._gives_up is not None:
            self._gives_up = min(self._gives_up, time.monotonic() + patience)

    async def wait(self, error: ClientError) -> None:
        """Until it is time to try again. Raises the error where that cannot help, or goes on for too long."""
        if not error.retryable:
            raise error
        now = time.monotonic()
        if self._gives_up is None:
            self._gives_up = now + self._patience
        delay = error.retry_after + self._draw()
        if now + delay > self._gives_up:
            raise error
        log.warning("%s Trying again in %.1f s.", error, delay)
        await asyncio.sleep(delay)

    async def pause(self) -> None:
        await asyncio.sleep(self._draw())

    def _draw(self) -> float:
        longest = min(self._cap, self.base * 2 ** min(self._failures, 32))
        self._failures += 1
        return random.uniform(0, longest)


class Service:
    """The service at a URL, and how to ask it."""

    def __init__(self, url: str, token: str | None, http: httpx.AsyncClient | None, patience: float) -> None:
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"{url!r} is not the URL of a service; give one like http://127.0.0.1:8000.")
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ValueError("The token is empty, or has characters that no token has.")
        self.url = url.rstrip("/")
        self.patience = patience
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient(limits=LIMITS)

    async def close(self) -> None:
        if self._owns_http:
            await self._http.aclose()

    async def request(self, method: str, path: str, query: Query | None = None, body: Any = None) -> httpx.Response:
        """The answer. Raises Problem where it is an error, Unreachable where there is none."""
        async with self.stream(method, path, query, body) as response:
            await response.aread()
            return response

    async def insist(
        self, backoff: Backoff, method: str, path: str, query: Query | None, body: Any
    ) -> tuple[httpx.Response, bool]:
        """The answer to a call that may be sent more than once, and whether it was."""
        was_sent = False
        while True:
            try:
                response = await self.request(method, path, query, body)
            except ClientError as error:
                await backoff.wait(error)
                was_sent = True
            else:
                backoff.progressed()
                return response, was_sent

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """An answer whose body is still to come. Raises as ``request`` does."""
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._http.stream(
                method,
                f"{self.url}/api{path}",
                params={name: value for name, value in (query or {}).items() if value is not None},
                content=content,
                headers={**kind, **self._headers, **(headers or {})},
                timeout=TIMEOUTS,
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise problem_of(response)
                yield response
        except httpx.RequestError as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Unreachable(f"The service at {self.url} cannot be reached ({why}).") from error


def problem_of(response: httpx.Response) -> Problem:
    """The problem document of an answer; a makeshift one where something before the service answered."""
    try:
        document = response.json()
    except ValueError:
        document = None
    members = document if isinstance(document, dict) else {}
    title = response.reason_phrase or "Error"
    return Problem.of({"title": title, **members, "status": response.status_code}, retry_after(response))


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer. Raises ClientError where it is of something else than the service."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ClientError(f"{response.url.host} answers with something else than JSON; is it the service's URL?")
    return answer


def retry_after(response: httpx.Response) -> float:
    """Seconds, from either form of the header (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def thread_path(thread: str) -> str:
    return f"/threads/{quoted(thread)}"


def message_path(thread: str, message: str, call: str = "") -> str:
    return f"/threads/{quoted(thread)}/messages/{quoted(message)}{call}"


def quoted(name: str) -> str:
    """An id as a part of a path; ``.`` and ``..`` would be taken out of it if they were not encoded."""
    if not name or "/" in name:
        raise ValueError(f"{name!r} cannot be an id; use 1 to 200 characters, no '/' and no control characters.")
    return name.replace(".", "%2E") if name in (".", "..") else quote(name, safe="")


def chunk_of(piece: object) -> Chunk:
    if isinstance(piece, Chunk):
        return piece
    if not isinstance(piece, str):
        raise TypeError(f"A piece is {type(piece).__name__}; give str, or Chunk.")
    return Chunk(piece)


def on_wire(chunks: Iterable[Chunk]) -> list[dict[str, str]]:
    return [
        {"content": chunk.content} if chunk.event is None else {"content": chunk.content, "event": chunk.event}
        for chunk in chunks
    ]


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


class Reader:
    """Where a reader is in a thread, over as many connections as it takes."""

    def __init__(
        self,
        service: Service,
        thread: str,
        message: str | None,
        after: str | int | None,
        known_content: str | None,
        wait: bool,
    ) -> None:
        if known_content is not None and (message is None or after is not None):
            raise ValueError("known_content is the text of one message: give the message, and no cursor.")
        if after is not None and not re.fullmatch(r"(\d{1,18}-)?\d{1,18}", str(after), re.ASCII):
            raise ValueError(f"{after!r} is not a cursor; give one as an item has it, like 1763829000123-42.")
        self._service = service
        self._path = (thread_path(thread) if message is None else message_path(thread, message)) + "/stream"
        self._thread, self._message = thread, message
        self._cursor = None if after is None else str(after)
        self._known = known_content
        self._wait = wait
        self._has_begun = self._has_ended = False

    async def items(self, patience: float) -> AsyncGenerator[Item, None]:
        backoff, waiting = Backoff(patience), Backoff(math.inf, cap=2.0)
        while not self._has_ended:
            try:
                async with aclosing(self._connection(backoff)) as items:
                    async for item in items:
                        backoff.progressed()
                        self._has_begun = True
                        yield item
            except NotFound as error:
                if self._has_begun:
                    raise self._gone() from error
                if not self._wait:
                    raise
                await waiting.pause()
            except ClientError as error:
                await backoff.wait(error)

    async def _connection(self, backoff: Backoff) -> AsyncGenerator[Item, None]:
        """What one connection gives. Returns where the next one may begin at once."""
        async with self._asked() as response:
            backoff.answered()
            if response.status_code == 204:
                self._has_ended = True
                return
            kind = response.headers.get("content-type", "nothing")
            if kind.partition(";")[0] != "text/event-stream":
                raise ClientError(f"{self._service.url} answers a stream with {kind}; is it the service's URL?")
            may_end_here = False
            async with aclosing(self._events(response, backoff)) as events:
                async for event in events:
                    if event.name == "timeout":
                        return
                    item = self._take(event)
                    may_end_here = not isinstance(item, StoredChunk)
                    yield item
                    if self._has_ended:
                        return
            if not may_end_here:
                raise Unreachable(f"The stream of {self._service.url} ended before the message did.")

    def _asked(self) -> AbstractAsyncContextManager[httpx.Response]:
        if self._known is not None:
            body = {"thread_id": self._thread, "message_id": self._message, "known_content": self._known}
            return self._service.stream("POST", "/resume-stream", body=body, headers={"Accept-Encoding": "identity"})
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if self._cursor is not None:
            headers["Last-Event-ID"] = self._cursor
        return self._service.stream("GET", self._path, {"follow": "true" if self._wait else None}, headers=headers)

    async def _events(self, response: httpx.Response, backoff: Backoff) -> AsyncGenerator[Event, None]:
        parser = EventParser()
        async for piece in response.aiter_bytes():
            for event in parser.feed(piece):
                yield event
            if parser.retry is not None:
                backoff.base = parser.retry / 1000

    def _take(self, event: Event) -> Item:
        """The item that an event stands for. Raises what it says instead."""
        data = json.loads(event.data)
        match event.name:
            case "error":
                raise Problem.of(data)
            case "gone" if not self._wait or self._message is not None:
                raise self._gone()
            case "reset" | "gone":
                self._cursor, self._known = None, None
                return Reset()
            case "complete" if data.get("exists") is False:
                raise no_message(self._thread, self._message)
        self._cursor, self._known = event.id, None
        seq, message = data["seq"], data["messageId"]
        if event.name == "complete":
            self._has_ended = self._message is not None
            return MessageEnd(message, data["status"], data["reason"], seq, event.id)
        return StoredChunk(data["content"], data["timestamp"], message, seq, event.id, event.name or None)

    def _gone(self) -> Gone:
        return Gone(f"The thread {self._thread!r} was cleared or has expired, so there is no more to read of it.")


def no_message(thread: str, message: str | None) -> NotFound:
    detail = f"There is no message {message!r} in a thread {thread!r}."
    return NotFound({"status": 404, "title": "Not found", "detail": detail})


# ---------------------------------------------------------------------------------------------
# Storing
# ---------------------------------------------------------------------------------------------

LAST_WORDS = 30.0  # seconds for which a service that is away is told that the source has failed
CANCELLED_WORDS = 5.0  # likewise, where storing was cancelled and somebody waits for it
WATCH_AFTER = 0.25  # seconds of silence of a source, after which the message is watched
SIGN_OF_LIFE = 30.0  # seconds of silence after which the service is told that the producer is there
POLL = 0.5  # seconds, likewise, of a producer that may not read and so learns of an end by this alone


class Window:
    """What the source gave and the service has not acknowledged: up to a number of chunks and of bytes."""

    def __init__(self, max_chunks: int, max_bytes: int) -> None:
        self.speaks = asyncio.Event()  # set while something waits, or the source is over
        self.in_flight = 0  # chunks that were sent, and may be stored
        self._max_chunks, self._max_bytes = max_chunks, max_bytes
        self._waiting: list[Chunk] = []
        self._waiting_bytes = self._in_flight_bytes = 0
        self._room = asyncio.Event()

    async def put(self, chunk: Chunk) -> None:
        """Take a chunk, and return when there is room for another."""
        self._waiting_bytes += len(chunk.content.encode())
        self._waiting.append(chunk)
        self.speaks.set()
        while self._is_full():
            self._room.clear()
            await self._room.wait()

    def _is_full(self) -> bool:
        return (
            len(self._waiting) + self.in_flight >= self._max_chunks
            or self._waiting_bytes + self._in_flight_bytes >= self._max_bytes
        )

    def take(self) -> list[Chunk]:
        """All that waits. It stays in the window until it is acknowledged."""
        taken, self._waiting = self._waiting, []
        self.in_flight, self._in_flight_bytes, self._waiting_bytes = len(taken), self._waiting_bytes, 0
        self.speaks.clear()
        return taken

    def acknowledge(self) -> None:
        self.in_flight = self._in_flight_bytes = 0
        self._room.set()


class Producer:
    """Stores one message from one source, and is the only one who does."""

    def __init__(self, service: Service, window: Window, thread: str, message: str) -> None:
        self._service = service
        self._window = window
        self._thread, self._message = thread, message
        self._backoff = Backoff(service.patience)
        self._index = 0
        self._seq = 0
        self._is_ours = False

    async def store(self, source: Source) -> Appended:
        try:
            return await self._store(source)
        except SourceFailed as failed:
            failure = failed.error
        except (Conflict, Gone, Unauthorized, Forbidden, Unreachable):
            raise  # the message is not ours to end, or nobody would hear of it
        except BaseException as error:
            await self._abort(error)
            raise
        await self._abort(failure)
        raise failure

    async def _store(self, source: Source) -> Appended:
        pieces = pieces_of(source)
        try:
            await self._open()
            return await self._pump(pieces)
        finally:
            if close := getattr(pieces, "aclose", None):
                await close()

    async def _open(self) -> None:
        response, _ = await self._insist("PUT")
        appended = record(Appended, answer_of(response))
        if appended.status != "active":
            await self._append([])  # the answer to this says how it ended
        if appended.chunk_count:
            raise self._not_ours()
        self._seq, self._is_ours = appended.seq, True

    async def _pump(self, pieces: AsyncIterator[str | Chunk]) -> Appended:
        pulling = asyncio.create_task(self._pull(pieces))
        pulling.add_done_callback(self._source_is_over)
        try:
            return await self._deliver(pulling)
        except ClientError as error:
            if failure := failure_of(pulling):
                failure.add_note(f"What it gave before could not all be stored: {error}")
                raise SourceFailed(failure) from error
            raise
        finally:
            await stopped(pulling)

    async def _pull(self, pieces: AsyncIterator[str | Chunk]) -> None:
        async for piece in pieces:
            await self._window.put(chunk_of(piece))

    def _source_is_over(self, pulling: asyncio.Task[None]) -> None:
        if failure_of(pulling):
            self._backoff.hurry(LAST_WORDS)
        self._window.speaks.set()

    async def _deliver(self, pulling: asyncio.Task[None]) -> Appended:
        while True:
            await self._source_speaks()
            is_over, failure = pulling.done(), failure_of(pulling)
            completes = is_over and failure is None
            batch = self._window.take()
            if batch or completes:
                appended = await self._append(batch, completes)
            if completes:
                return appended
            if failure is not None:
                raise SourceFailed(failure)

    async def _append(self, chunks: Sequence[Chunk], complete: bool = False) -> Appended:
        """Have the service store what comes next; no chunks are a sign of life. Raises Conflict, Gone."""
        query = {"index": self._index, "complete": "true" if complete else None}
        try:
            response, was_sent = await self._insist("POST", "/chunks", query, on_wire(chunks))
            appended = record(Appended, answer_of(response))
            # What is stored before it was ever sent, another producer has sent.
            if appended.chunk_count > self._index + self._window.in_flight or (
                response.status_code == 200 and not was_sent and (chunks or complete)
            ):
                raise self._not_ours()
        except Conflict as error:
            self._is_ours = False
            if error.problem.get("expectedIndex", self._index) < self._index:
                raise self._gone() from error
            raise
        if chunks:
            self._index += len(chunks)
            self._seq = appended.seq
            self._window.acknowledge()
        return appended

    async def _source_speaks(self) -> None:
        """Wait for the source. While it is silent, see whether somebody else ends the message."""
        if self._window.speaks.is_set():
            return
        speaks = asyncio.create_task(self._window.speaks.wait())
        waiting: set[asyncio.Task[Any]] = {speaks}
        try:
            await asyncio.wait(waiting, timeout=WATCH_AFTER)
            if speaks.done():
                return
            waiting.add(asyncio.create_task(self._watch()))
            while not speaks.done():
                done, waiting = await asyncio.wait(
                    waiting, timeout=SIGN_OF_LIFE if len(waiting) > 1 else POLL, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
                if not speaks.done():
                    await self._append([])
        finally:
            for task in waiting:
                await stopped(task)

    async def _watch(self) -> None:
        """Follow the message from where it is. Raises what has become of it; returns where it cannot be followed."""
        reader = Reader(self._service, self._thread, self._message, self._seq, None, wait=False)
        try:
            async with aclosing(reader.items(patience=0)) as items:
                async for item in items:
                    raise self._end_of(item)
        except NotFound as error:
            raise self._gone() from error
        except ClientError as error:
            # A token may not read, too many do, the connection is lost: appends, if they are answered, say as much.
            if not (error.retryable or isinstance(error, Forbidden)):
                raise

    def _end_of(self, item: Item) -> ClientError:
        match item:
            case Reset():
                return self._gone()
            case StoredChunk():
                return self._not_ours()
            case MessageEnd(_, status, reason):
                why = f" ({reason})" if reason else ""
                return self._conflict(
                    f"The message {self._message!r} was {status}{why} by somebody else, and an end is final; begin a"
                    " new message.",
                    messageStatus=status,
                    reason=reason,
                )

    async def _abort(self, error: BaseException) -> None:
        """Tell readers that no more will come, and why. What hinders it is noted in the error."""
        if not self._is_ours:
            return
        try:
            async with asyncio.timeout(CANCELLED_WORDS if isinstance(error, asyncio.CancelledError) else LAST_WORDS):
                await self._append([])
                await self._insist("POST", "/abort", body={"reason": type(error).__name__})
        except (ClientError, TimeoutError) as hindrance:
            error.add_note(f"The message could not be aborted: {str(hindrance) or 'the service does not answer.'}")

    async def _insist(
        self, method: str, call: str = "", query: Query | None = None, body: Any = None
    ) -> tuple[httpx.Response, bool]:
        path = message_path(self._thread, self._message, call)
        return await self._service.insist(self._backoff, method, path, query, body)

    def _conflict(self, detail: str, **members: Any) -> Problem:
        return Problem.of({"status": 409, "title": "Conflict", "detail": detail, **members})

    def _not_ours(self) -> Problem:
        return self._conflict(
            f"The message {self._message!r} has chunks of another producer; stop, or begin a new message."
        )

    def _gone(self) -> Gone:
        return Gone(
            f"The thread {self._thread!r} was cleared or has expired while the message {self._message!r} was being"
            " stored; begin a new message."
        )


class SourceFailed(Exception):
    """Carries the error of a source, which may be of any kind, past those of this client."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def pieces_of(source: Source) -> AsyncIterator[str | Chunk]:
    if isinstance(source, str):
        raise TypeError("The source is one text; put it in a list, or its characters would be a chunk each.")
    return aiter(source) if isinstance(source, AsyncIterable) else each(source)


async def each(pieces: Iterable[str | Chunk]) -> AsyncGenerator[str | Chunk, None]:
    for piece in pieces:
        yield piece


def failure_of(task: asyncio.Task[Any]) -> BaseException | None:
    if not task.done():
        return None
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def stopped(task: asyncio.Task[Any]) -> None:
    """Cancel the task, and wait until it has cleaned up."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()):
        log.warning("It failed as it was stopped.", exc_info=error)


# ---------------------------------------------------------------------------------------------
# The client
# ---------------------------------------------------------------------------------------------


class Client:
    """A client of the service at ``url``, like ``http://127.0.0.1:8000``; ``async with`` closes it.

    ``token`` is sent as a bearer token. ``patience`` is the seconds for which ``store`` and
    ``read`` go on without any answer (``math.inf``: for ever). ``store`` holds up to
    ``window_chunks`` chunks and ``window_bytes`` bytes that are not acknowledged, and one chunk
    more, in memory. ``http`` is an httpx client of one's own, for proxies, certificates or a Unix
    socket; it is not closed. One client serves any number of tasks of one event loop.

    Every call raises Problem where the service refuses (Unauthorized, Forbidden, NotFound,
    Conflict, TooLarge, InvalidContent, Unavailable …), and Unreachable. Those that are not
    retried say so at once. An id that cannot be one is a ValueError.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        http: httpx.AsyncClient | None = None,
        patience: float = 300.0,
        window_chunks: int = 1024,
        window_bytes: int = 256 * 1024,
    ) -> None:
        if window_chunks < 1 or window_bytes < 1:
            raise ValueError("The window has no room; give window_chunks and window_bytes of at least 1.")
        self._service = Service(url, token, http, patience)
        self._window = (window_chunks, window_bytes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._service.close()

    async def store(self, thread: str, message: str, source: Source) -> Appended:
        """Store what ``source`` yields as the chunks of a new message, and complete it as the source ends.

        The source is text, or Chunk, piece by piece: an async iterable, or one that never waits
        (a list), as it is iterated in the event loop. It is not pulled while the window is full.
        What is not acknowledged is kept and sent again when the connection or the service fails,
        numbered, so that nothing is lost or stored twice. While the source is silent the message
        is watched (which takes a token that may read; else the service is asked twice a second),
        and the service is told that the producer is alive.

        Where the source fails, what it gave before is stored, the message is aborted with the
        exception's name as the reason (for up to 30 s where the service is away), and the
        exception is raised. Likewise where this call is cancelled (for up to 5 s), or a chunk is
        refused.

        Raises MessageEnded where somebody else ends the message, or has ended it; Conflict where
        another producer writes to it; Gone where the thread is cleared. The source is closed then,
        and the message left as it is.
        """
        return await Producer(self._service, Window(*self._window), thread, message).store(source)

    def read(
        self,
        thread: str,
        message: str | None = None,
        after: str | int | None = None,
        known_content: str | None = None,
        wait: bool = False,
    ) -> AsyncGenerator[Item, None]:
        """Follow a message, or all of a thread's, over as many connections as it takes.

        Begins behind the cursor ``after`` (of an item, or a bare seq), or behind the text
        ``known_content`` of the message, or at the start. Ends behind the MessageEnd of the
        message; of a thread, once nothing is active. ``wait`` waits for a message, or a thread,
        that is not made yet; a thread is followed for ever then, and Reset says that it was made
        again. Where iteration stops early, ``contextlib.aclosing`` closes the connection at once.

        Raises NotFound; Gone where the thread is cleared or expires while it is read.
        """
        return Reader(self._service, thread, message, after, known_content, wait).items(self._service.patience)

    async def open(self, thread: str, message: str) -> Appended:
        """Open a message before its first chunk, so that readers can follow it."""
        return await self._appended("PUT", message_path(thread, message))

    async def append(
        self,
        thread: str,
        message: str,
        chunks: Iterable[str | Chunk],
        *,
        index: int | None = None,
        complete: bool = False,
    ) -> Appended:
        """Append chunks, all or nothing, once they are committed; ``complete`` ends the message with them.

        With ``index``, the number (from 0) of the first of them in the message, the call is sent
        again when it fails, and what is stored already is not stored twice.
        """
        if isinstance(chunks, str):
            raise TypeError("The chunks are one text; put it in a list, or its characters would be a chunk each.")
        body = on_wire(map(chunk_of, chunks))
        backoff = Backoff(0 if index is None else self._service.patience)
        query = {"index": index, "complete": "true" if complete else None}
        response, _ = await self._service.insist(backoff, "POST", message_path(thread, message, "/chunks"), query, body)
        return record(Appended, answer_of(response))

    async def complete(self, thread: str, message: str) -> Appended:
        """Complete a message; again: the same answer. Raises MessageEnded if it was aborted."""
        return await self._appended("POST", message_path(thread, message, "/complete"))

    async def abort(self, thread: str, message: str, reason: str | None = None) -> Appended:
        """Abort a message, from either side; again: the same answer. ``reason`` has up to 1,000 characters.

        Raises MessageEnded if it is completed.
        """
        return await self._appended("POST", message_path(thread, message, "/abort"), {"reason": reason})

    async def status(self, thread: str) -> ThreadStatus:
        """A thread and its messages (``get_thread_status``)."""
        data = answer_of(await self._service.request("GET", thread_path(thread)))
        return record(ThreadStatus, data, messages=tuple(record(MessageStatus, found) for found in data["messages"]))

    async def threads(self, status: Status | None = None) -> AsyncGenerator[ThreadSummary, None]:
        """All threads, or those of one status, the newest first."""
        cursor: str | None = None
        while True:
            page = answer_of(await self._service.request("GET", "/threads", {"status": status, "cursor": cursor}))
            for found in page["threads"]:
                yield record(ThreadSummary, found)
            if (cursor := page["cursor"]) is None:
                return

    def active_threads(self) -> AsyncGenerator[ThreadSummary, None]:
        """The threads in which a message is active, the newest first (``get_active_threads``)."""
        return self.threads("active")

    async def content(self, thread: str, message: str | None = None) -> AccumulatedContent:
        """The text so far, of a message or of all of a thread's (``get_accumulated_content``)."""
        response = await self._service.request("GET", f"{thread_path(thread)}/content", {"message_id": message})
        return record(AccumulatedContent, answer_of(response))

    async def clear(self, thread: str) -> None:
        """Forget a thread, and erase its text (``clear_thread_buffer``)."""
        await self._service.request("DELETE", thread_path(thread))

    async def _appended(self, method: str, path: str, body: Any = None) -> Appended:
        return record(Appended, answer_of(await self._service.request(method, path, body=body)))
