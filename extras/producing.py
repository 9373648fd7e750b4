"""Producers that go on for long: bodies of any length, and sources in one's own process.

Of NDJSON and of plain text each piece is committed as it arrives. ``agent_stream`` and ``record`` store what a
source yields, and end its message as it ends.
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
AHEAD = 32  # pieces that a source may be ahead of what is committed of it
CUT = 0.0  # the deadline of an upload that is cut short, by the loop's clock
BODY_TIMEOUT = 30  # seconds in which a JSON body must arrive
MOST_HELD = 32 * 1024**2  # bytes
RETRY_PAUSE, RETRY_PAUSE_MOST = 0.05, 1.0  # seconds between two tries of what the store refuses for now


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
    """Cut the block short as soon as the message is ended by anyone, or the service stops.

    Also at ``expires`` (seconds since 1970). Yields a function that lifts the watch, for the
    one who ends the message itself. Raises Conflict, Unavailable or Unauthorized: why.
    """
    upload = asyncio.timeout(None if expires == math.inf else expires - time.time())
    with buffer.attached(thread_id) as attached:
        tail = cast(UploadTail, attached)
        had_ended = await has_ended(buffer, tail, thread_id, message_id)
        # What has ended before is not ended by anyone now; a retry of its last upload is answered as before.
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
    """As of all that was told of by now. Raises Unavailable."""
    found = await buffer.store.find(thread_id, message_id)
    while found.generation == tail.generation and found.order < tail.order:
        found = await buffer.store.find(thread_id, message_id)
    if buffer.stopping:
        raise Stopping
    return found.ended


@contextlib.contextmanager
def holding(buffer: ChunkBuffer) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes that one holds by now (see ``ChunkBuffer.hold``)."""
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
    """A write that can be asked for again, until what hinders the store has passed, or for ``producer_timeout``."""
    give_up, pause = time.monotonic() + (buffer.settings.producer_timeout or math.inf), RETRY_PAUSE
    while True:
        try:
            return await write()
        except (Unavailable, DatabaseFull):
            if buffer.stopping or time.monotonic() + pause > give_up:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, RETRY_PAUSE_MOST)


# A source


async def agent_stream(
    buffer: ChunkBuffer, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk]
) -> AsyncGenerator[str | Chunk, None]:
    """Store and yield what ``source`` yields: text, or Chunks where an event has a name.

    Each piece is yielded once it is committed. When the consumer goes away, storing goes on.
    The message is completed when ``source`` ends, and aborted when it fails, with the name
    of the exception as its reason; the exception is raised here too. When the message is
    ended from outside, ``source`` is closed and the iteration ends.

    Raises Conflict where the message has ended or has chunks already; then nothing is asked of
    ``source``, which is closed.
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
    # Not limited to max_readers, as an agent's stream is no reader's.
    async with aclosing(buffer.follow(place, idle_timeout=0, heartbeat=1, limited=False)) as items:
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
    buffer: ChunkBuffer, thread_id: str, message_id: str, source: AsyncIterable[str | Chunk], *, index: int = 0
) -> asyncio.Task[None]:
    """Store what ``source`` yields, by itself, whoever comes or goes, until the buffer is left.

    All that it has yielded while the last commit was under way is one append; it is at most 32
    pieces ahead. ``index`` is the number of its first piece in the message. What hinders the store
    (a lock, a full disk) is waited for, for up to ``producer_timeout``. The message is completed
    when ``source`` ends; when it fails the message is aborted, with the error's ``reason``, or else
    its name, as the reason, and the task raises the error. When the message is ended from outside
    the task ends. ``source`` is closed in any case.
    """
    _ = buffer.store  # which has to be open, or nothing would ever be recorded
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
        with contextlib.suppress(Problem):  # the error itself is what is to be seen
            await buffer.abort_message(*ids, getattr(error, "reason", type(error).__name__))
        raise


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


# An upload


async def append_lines(request: Request[Any, Any, Any], buffer: ChunkBuffer, append: Append) -> tuple[Appended, bool]:
    longest = 6 * buffer.settings.max_chunk + 1024  # as JSON may take six bytes for one
    return await append_pieces(request, buffer, append, Lines(longest))


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
    """The message's text from its chunk ``index`` on, and the index after it."""
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
    """Commit what each piece of the body brings before reading the next; whether anything was new.

    While it is being committed nothing more is read, so that the connection's flow control slows
    a producer that is too fast. Cut short with a Problem when somebody else ends the message.
    """
    change: Change | None = None
    changed = False
    with holding(buffer) as hold_now:
        async with (
            while_active(buffer, append.thread_id, append.message_id, Grant.of(request).expires) as lift,
            aclosing(body_pieces(request)) as pieces,
        ):
            async for piece, is_last in pieces:
                chunks, problem = decoder.feed(piece, is_last)
                hold_now(decoder.kept)
                sizes, refusal = sizes_up_to_refusal(chunks, buffer.settings.max_chunk)
                if refusal is not None:
                    refusal.detail = f"{decoder.where(len(sizes))} is refused: {refusal.detail}"
                    chunks, problem = chunks[: len(sizes)], refusal
                ends = append.complete and is_last and problem is None
                if chunks or (is_last and problem is None and (ends or change is None)):
                    if ends:
                        lift()
                    await buffer.room()
                    change = await buffer.store.write(
                        msgspec.structs.replace(append, chunks=chunks, sizes=sizes, complete=ends)
                    )
                    changed = changed or change.changed
                    index = None if append.index is None else append.index + len(chunks)
                    append = msgspec.structs.replace(append, index=index, generation=change.state.generation)
                if problem is not None:
                    raise problem
    return cast(Change, change).answer, changed


def sizes_up_to_refusal(chunks: list[Chunk], max_chunk: int) -> tuple[list[int], Problem | None]:
    """The bytes of each chunk, up to the first that is refused, and why it is."""
    sizes: list[int] = []
    try:
        return checked_sizes(chunks, max_chunk), None
    except Problem:
        try:
            for chunk in chunks:
                sizes += checked_sizes([chunk], max_chunk)
        except Problem as refusal:
            return sizes, refusal
        raise


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

    @property
    def kept(self) -> int:
        """Bytes of a line that is not whole yet."""
        return len(self._rest)

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
                    return chunks, InvalidContent.json(line, error, self.where(len(chunks)))
            raise


class Text:
    """Chunks from plain text that arrives in pieces: each becomes one, never cutting a character."""

    def __init__(self, max_chunk: int, known: str, is_whole: bool) -> None:
        self._is_whole = is_whole  # then nothing of what is known may be missing
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._max_characters = max(max_chunk // 4, 1)
        self._known = known
        self._compared = 0  # characters of it

    def feed(self, piece: bytes, is_last: bool) -> tuple[list[Chunk], Problem | None]:
        """The chunks that are whole now, less the ``known`` text that a retry sends again."""
        try:
            text = self._decoder.decode(piece, final=is_last)
        except UnicodeDecodeError as error:
            return [], InvalidContent(f"The body is not valid UTF-8: {error.reason}.")
        known = self._known[self._compared : self._compared + len(text)]
        self._compared += len(known)
        is_short = is_last and self._is_whole and self._compared < len(self._known)
        if is_short or not text.startswith(known):
            return [], Conflict("Another text is stored from this index on: another producer writes to this message.")
        text = text[len(known) :]
        step = self._max_characters
        return [Chunk(text[start : start + step]) for start in range(0, len(text), step)], None

    @property
    def kept(self) -> int:
        """Bytes of the text that is still to be compared, at the least."""
        return len(self._known) - self._compared

    def where(self, number: int) -> str:
        return "The text"
