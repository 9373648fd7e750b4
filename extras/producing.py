"""Streaming producers: uploads of NDJSON and plain text, and ``agent_stream`` and ``record`` for the library.

Each piece of an upload is committed as it arrives. ``agent_stream`` and ``record`` store what an async iterator
yields, and end the message when it ends.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import math
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import msgspec
from litestar import Request

from ..app import (
    PAGE_ROWS,
    UNDECODABLE,
    Append,
    Appended,
    BadRequest,
    Change,
    Chunk,
    ChunkBuffer,
    Conflict,
    DatabaseFull,
    Grant,
    InvalidContent,
    Page,
    Parts,
    Problem,
    Stopping,
    StoredChunk,
    Tail,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    checked_sizes,
)

T = TypeVar("T")
log = logging.getLogger("resume_stream")

LINES = msgspec.json.Decoder(Chunk)
CUT = 0.0  # the deadline of an upload that is cut short, by the loop's clock
BODY_TIMEOUT = 30  # seconds in which a JSON body must arrive
MOST_HELD = 32 * 1024**2  # bytes
AHEAD = 32  # pieces that a source may yield before they are committed
RETRY_PAUSE, RETRY_PAUSE_MOST = 0.05, 1.0  # seconds before a write is tried again


def mount(parts: Parts) -> None:
    parts.bodies["application/x-ndjson"] = append_lines
    parts.bodies["text/plain"] = append_text
    parts.producing = SimpleNamespace(
        while_active=while_active, patiently=patiently, holding=holding, whole_body=whole_body
    )


def attend(buffer: ChunkBuffer) -> None:
    buffer.tail_type = type("Tail", (UploadTail, buffer.tail_type), {})
    buffer.read_body = partial(whole_body, buffer)


class UploadTail(Tail):
    """A tail that interrupts uploads as soon as somebody ends their message."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: dict[asyncio.Timeout, str] = {}  # with the message that each writes, if it can still end

    def take(self, change: Change, asked: float | None) -> None:
        super().take(change, asked)
        if change.ended:
            self.cut(change.message_id)

    def clear(self, generation: int) -> None:
        is_known = self.generation <= generation
        super().clear(generation)
        if is_known:
            self.cut()

    def stop(self) -> None:
        self.cut()
        super().stop()

    def cut(self, message_id: str | None = None) -> None:
        """Interrupt the uploads of one message, or all of them."""
        for upload, name in self.uploads.items():
            if message_id in (None, name) and not upload.expired():
                upload.reschedule(CUT)


class TooSlow(Problem, status=408, kind="Request timeout"): ...


HELD: weakref.WeakKeyDictionary[ChunkBuffer, int] = weakref.WeakKeyDictionary()  # bytes of request bodies in memory


def hold(buffer: ChunkBuffer, size: int) -> None:
    """Count bytes of request bodies that come into memory, or (below 0) leave it. Raise Unavailable over the limit."""
    HELD[buffer] = held = HELD.get(buffer, 0) + size
    if size > 0 and held > MOST_HELD:
        raise Unavailable("Too much is being sent at the same time; try again, or send it in smaller parts.")


async def body_pieces(request: Request[Any, Any, Any]) -> AsyncGenerator[tuple[bytes, bool], None]:
    """Yield the body as it arrives, with True for its last piece. An answer before that closes the connection."""
    scope = cast(dict[str, Any], request.scope)
    scope["has_more_body"] = True
    while scope["has_more_body"]:
        event = await request.receive()
        if event["type"] != "http.request":
            raise BadRequest("The connection was closed before the body ended.")
        scope["has_more_body"] = event.get("more_body", False)
        yield event.get("body", b""), not scope["has_more_body"]


async def whole_body(buffer: ChunkBuffer, request: Request[Any, Any, Any], most: float = math.inf) -> bytearray:
    """Return a body of up to ``max_body`` and ``most`` bytes that arrives within 30 s. Raise Problem."""
    body, limit = bytearray(), min(most, buffer.settings.max_body)
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for piece, _ in body_pieces(request):
                body += piece
                hold(buffer, len(piece))
                if len(body) > limit:
                    raise TooLarge(f"The body has over {limit} bytes; send it in parts, or stream it as NDJSON.")
    except TimeoutError as error:
        raise TooSlow(f"The body did not come within {BODY_TIMEOUT} s; stream it as NDJSON.") from error
    finally:
        hold(buffer, -len(body))
    return body


@contextlib.asynccontextmanager
async def while_active(
    buffer: ChunkBuffer, thread_id: str, message_id: str, expires: float = math.inf
) -> AsyncIterator[Callable[[], Any]]:
    """Cancel the block when anybody ends the message, when the service stops, or at ``expires`` (seconds since 1970).

    Yield a function that lifts the watch: the block calls it before it ends the message itself. Raise Conflict,
    Unavailable, or Unauthorized if the block was cancelled.
    """
    upload = asyncio.timeout(None if expires == math.inf else expires - time.time())
    with buffer.attached(thread_id) as attached:
        tail = cast(UploadTail, attached)
        had_ended = await has_ended(buffer, tail, thread_id, message_id)
        # A message that had ended before is not watched: a retry of its last upload gets its answer again.
        tail.uploads[upload] = "" if had_ended else message_id
        lift = partial(tail.uploads.pop, upload, None)
        try:
            async with upload:
                yield lift
        except TimeoutError:
            if not upload.expired():
                raise
            if buffer.stopping:
                raise Stopping from None
            if upload.when() != CUT:
                raise Unauthorized.expired() from None
            found = await buffer.store.find(thread_id, message_id)
            raise (Conflict.ended(message_id, found) if found.ended else Conflict.cleared()) from None
        finally:
            lift()


async def has_ended(buffer: ChunkBuffer, tail: Tail, thread_id: str, message_id: str) -> bool:
    """Return whether the message has ended, by a state that is not older than the tail. Raise Unavailable."""
    found = await buffer.store.find(thread_id, message_id)
    while found.generation == tail.generation and found.order < tail.order:
        found = await buffer.store.find(thread_id, message_id)
    if buffer.stopping:
        raise Stopping
    return found.ended


@contextlib.contextmanager
def holding(buffer: ChunkBuffer) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes that are held by now (see ``hold``)."""
    held = 0

    def hold_now(size: int) -> None:
        nonlocal held
        more, held = size - held, size
        hold(buffer, more)

    try:
        yield hold_now
    finally:
        hold(buffer, -held)


async def patiently(buffer: ChunkBuffer, write: Callable[[], Awaitable[T]]) -> T:
    """Try a write again until the store takes it, for up to ``producer_timeout``. The write has to be idempotent."""
    give_up, pause = time.monotonic() + (buffer.settings.producer_timeout or math.inf), RETRY_PAUSE
    while True:
        try:
            return await write()
        except (Unavailable, DatabaseFull):
            if buffer.stopping or time.monotonic() + pause > give_up:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, RETRY_PAUSE_MOST)


# Sources


async def agent_stream(
    buffer: ChunkBuffer, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk]
) -> AsyncGenerator[str | Chunk, None]:
    """Store and yield what ``source`` yields: text, or a Chunk to name its event.

    A piece is yielded after its commit. If the consumer goes away, storing goes on. The message is completed when
    ``source`` ends. If ``source`` fails, the message is aborted with the name of the exception as its reason, and
    the exception is raised here too. If somebody else ends the message, ``source`` is closed and the iteration ends.

    Raise Conflict, and close ``source``, if the message has ended or has chunks already.
    """
    opened, _ = await buffer.open_message(thread_id, message_id)
    if opened.status != "active" or opened.chunk_count:
        await close(source)
        found = await buffer.store.find(thread_id, message_id)
        raise (
            Conflict.ended(message_id, found)
            if found.ended
            else Conflict(
                f"The message {message_id!r} has {found.chunk_count} chunks already, and a whole stream would be stored"
                " after them; begin a new message.",
                expectedIndex=found.chunk_count,
            )
        )
    place = await buffer.locate(thread_id, message_id, after=str(opened.seq))
    recording = record(buffer, thread_id, message_id, source, index=opened.chunk_count)
    # An agent's own stream is never refused because of max_readers.
    async with aclosing(buffer.follow(place, idle_timeout=0, heartbeat=1, limited=False)) as items:
        async for item in items:
            if isinstance(item, Page):
                for entry in item.entries:
                    if isinstance(entry, StoredChunk):
                        yield (Chunk(entry.content, entry.event) if entry.event else entry.content)
            elif recording.done():
                break  # it failed, and could not abort the message either
    await asyncio.wait([recording])
    if recording.cancelled():
        raise Stopping
    recording.result()


def record(
    buffer: ChunkBuffer, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk], *, index: int = 0
) -> asyncio.Task[None]:
    """Store what ``source`` yields, in a task that runs until ``source`` ends or the buffer is closed.

    What ``source`` yields during a commit becomes one append. It may be up to 32 pieces ahead. ``index`` is the
    number of its first piece in the message. While the store cannot write (a lock, a full disk), the task waits,
    for up to ``producer_timeout``. The message is completed when ``source`` ends. If ``source`` fails, the message
    is aborted with the ``reason`` or the name of the exception, and the task raises the exception. If somebody else
    ends the message, the task ends. ``source`` is closed in any case.
    """
    _ = buffer.store  # raises if the buffer is not open
    return buffer.begin(recorded(buffer, thread_id, message_id, source, index))


async def recorded(
    buffer: ChunkBuffer, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk], index: int
) -> None:
    ids = (thread_id, message_id)
    try:
        async with while_active(buffer, *ids) as lift, aclosing(gathered(source, AHEAD)) as batches:
            async for pieces in batches:
                await patiently(buffer, partial(buffer.add_chunks, *ids, pieces, index=index))
                index += len(pieces)
            lift()
            await patiently(buffer, partial(buffer.complete_message, *ids))
    except Conflict as error:
        log.info("recording stopped: %s", error.detail)
    except Exception as error:
        with contextlib.suppress(Problem):  # the error of the source matters more
            await buffer.abort_message(*ids, getattr(error, "reason", type(error).__name__))
        raise


async def gathered(source: AsyncIterable[T], ahead: int) -> AsyncGenerator[list[T], None]:
    """Yield what the source yielded since the last time, up to ``ahead`` items. Close the source at the end."""
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
            pulling.exception()  # so that asyncio does not log it
        await close(source)


async def close(source: AsyncIterable[Any]) -> None:
    if aclose := getattr(source, "aclose", None):
        await aclose()


# Uploads


async def append_lines(request: Request[Any, Any, Any], buffer: ChunkBuffer, append: Append) -> tuple[Appended, bool]:
    return await append_pieces(request, buffer, append, Lines(buffer.settings.max_chunk))


async def append_text(request: Request[Any, Any, Any], buffer: ChunkBuffer, append: Append) -> tuple[Appended, bool]:
    charset = request.content_type[1].get("charset", "utf-8")
    if charset.lower() not in ("utf-8", "us-ascii"):
        raise UnsupportedMediaType(f"Text in {charset!r:.80} cannot be appended; send it in UTF-8.")
    known = ""
    if append.index is not None:
        known, index = await stored_from(buffer, append.thread_id, append.message_id, append.index)
        append = msgspec.structs.replace(append, index=index)
    decoder = Text(buffer.settings.max_chunk, known, is_whole=append.complete)
    return await append_pieces(request, buffer, append, decoder)


async def stored_from(buffer: ChunkBuffer, thread_id: str, message_id: str, index: int) -> tuple[str, int]:
    """Return the text of the message from its chunk ``index`` on, and the index after it."""
    texts, count = list[str](), 0
    found = await buffer.store.find(thread_id, message_id)
    seq = found.before
    while found.last and seq < found.last and index < found.chunk_count:
        state, page = await buffer.store.page(thread_id, message_id, seq, PAGE_ROWS)
        if state.generation != found.generation:
            raise Conflict.cleared()
        chunks = [entry.content for entry in page.entries if isinstance(entry, StoredChunk)]
        texts += chunks[max(index - count, 0) :]
        seq, count = page.last_seq, count + len(chunks)
    return "".join(texts), max(index, count)


async def append_pieces(
    request: Request[Any, Any, Any], buffer: ChunkBuffer, append: Append, decoder: Lines | Text
) -> tuple[Appended, bool]:
    """Commit each piece of the body before the next is read. Return the answer, and whether anything was new.

    The connection's flow control slows down a producer that is too fast. Raise Problem as soon as somebody else
    ends the message.
    """
    change: Change | None = None
    is_new = False
    expires = Grant.of(request).expires
    with holding(buffer) as hold_now:
        async with (
            while_active(buffer, append.thread_id, append.message_id, expires) as lift,
            aclosing(body_pieces(request)) as pieces,
        ):
            async for piece, is_last in pieces:
                chunks, sizes, problem = decoder.feed(piece, is_last)
                hold_now(decoder.kept)
                is_end = is_last and problem is None
                completes = is_end and append.complete
                if chunks or completes or (is_end and change is None):
                    if completes:
                        lift()
                    await buffer.room()
                    part = msgspec.structs.replace(append, chunks=chunks, sizes=sizes, complete=completes)
                    change = await buffer.store.write(part)
                    is_new = is_new or change.changed
                    index = None if append.index is None else append.index + len(chunks)
                    append = msgspec.structs.replace(append, index=index, generation=change.state.generation)
                if problem is not None:
                    raise problem
    return cast(Change, change).answer, is_new


Decoded = tuple[list[Chunk], list[int], Problem | None]  # chunks, their sizes, and what is wrong after them


class Lines:
    """Decodes NDJSON that arrives in pieces: each line is a chunk."""

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._max_line = 6 * max_chunk + 1024  # JSON may take six bytes for one
        self._rest = bytearray()  # of a line that has not ended
        self._lines = 0  # that have ended

    @property
    def kept(self) -> int:
        return len(self._rest)

    def feed(self, piece: bytes, is_last: bool) -> Decoded:
        cut = len(piece) if is_last else piece.rfind(b"\n") + 1
        if not cut and not is_last:
            self._rest += piece
            chunks, sizes, problem = list[Chunk](), list[int](), None
        else:
            lines = bytes(self._rest) + piece[:cut]
            self._rest = bytearray(piece[cut:])
            chunks, sizes, problem = self._decode(lines)
            self._lines += lines.count(b"\n")
        if problem is None and len(self._rest) > self._max_line:
            problem = TooLarge(
                f"Line {self._lines + 1} has over {self._max_line} bytes, more than any chunk of max_chunk; send it in"
                " parts."
            )
        return chunks, sizes, problem

    def _decode(self, lines: bytes) -> Decoded:
        try:
            chunks = LINES.decode_lines(lines)
            return chunks, checked_sizes(chunks, self._max_chunk), None
        except (*UNDECODABLE, Problem):
            return self._decode_up_to_problem(lines)

    def _decode_up_to_problem(self, lines: bytes) -> Decoded:
        chunks, sizes = list[Chunk](), list[int]()
        for number, line in enumerate(lines.split(b"\n"), self._lines + 1):
            try:
                found = LINES.decode_lines(line)
                sizes += checked_sizes(found, self._max_chunk)
            except UNDECODABLE as error:
                return chunks, sizes, InvalidContent.json(line, error, f"Line {number}")
            except Problem as problem:
                problem.detail = f"Line {number} is refused: {problem.detail}"
                return chunks, sizes, problem
            chunks += found
        return chunks, sizes, None


class Text:
    """Decodes plain text that arrives in pieces: each piece is a chunk, and no character is cut.

    ``known`` is the text that a retry sends again. ``is_whole`` means that the body has to contain all of it.
    """

    def __init__(self, max_chunk: int, known: str, is_whole: bool) -> None:
        self._max_chunk = max_chunk
        self._known = known
        self._is_whole = is_whole
        self._compared = 0  # characters of the known text
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def kept(self) -> int:
        return len(self._known) - self._compared

    def feed(self, piece: bytes, is_last: bool) -> Decoded:
        try:
            text = self._decoder.decode(piece, final=is_last)
        except UnicodeDecodeError as error:
            return [], [], InvalidContent(f"The body is not valid UTF-8: {error.reason}.")
        known = self._known[self._compared : self._compared + len(text)]
        self._compared += len(known)
        is_short = is_last and self._is_whole and self._compared < len(self._known)
        if is_short or not text.startswith(known):
            problem = Conflict("Another text is stored from this index on: another producer writes to this message.")
            return [], [], problem
        step = max(self._max_chunk // 4, 1)  # characters, of up to four bytes
        chunks = [Chunk(text[start : start + step]) for start in range(len(known), len(text), step)]
        return chunks, checked_sizes(chunks, self._max_chunk), None
