"""Storing: a producer that sends a source's chunks until they are acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from . import (
    Appended,
    Chunk,
    ClientError,
    Conflict,
    Forbidden,
    Gone,
    Item,
    MessageEnd,
    NotFound,
    Problem,
    Reset,
    StoredChunk,
    Unauthorized,
    Unreachable,
)
from .connection import Backoff, Query, Service, answer_of, chunk_of, log, message_path, on_wire, record
from .reading import Reader

Source = AsyncIterable[str | Chunk] | Iterable[str | Chunk]

ABORT_PATIENCE = 30.0  # seconds that a failed producer goes on trying to store the rest and abort its message
CANCEL_PATIENCE = 5.0  # seconds that a cancelled one tries to: somebody waits for it
WATCH_AFTER = 0.25  # seconds without a chunk from the source, after which the producer watches its message
SIGN_OF_LIFE = 30.0  # seconds between empty appends while the source is silent
POLL = 0.5  # seconds between them if the token may not read: then only their answers tell of an end


class Window:
    """The chunks that the source gave and the service has not acknowledged, bounded in number and bytes."""

    def __init__(self, max_chunks: int, max_bytes: int) -> None:
        self.has_news = asyncio.Event()  # set if a chunk waits, or the source has ended
        self.in_flight = 0  # chunks that were taken, and may be stored
        self._max_chunks, self._max_bytes = max_chunks, max_bytes
        self._waiting: list[Chunk] = []
        self._waiting_bytes = self._in_flight_bytes = 0
        self._room = asyncio.Event()

    async def put(self, chunk: Chunk) -> None:
        """Add a chunk. Return when there is room for another one."""
        self._waiting_bytes += len(chunk.content.encode())
        self._waiting.append(chunk)
        self.has_news.set()
        while self._is_full():
            self._room.clear()
            await self._room.wait()

    def _is_full(self) -> bool:
        return (
            len(self._waiting) + self.in_flight >= self._max_chunks
            or self._waiting_bytes + self._in_flight_bytes >= self._max_bytes
        )

    def take(self) -> list[Chunk]:
        """Return all chunks that wait. They count until they are acknowledged."""
        taken, self._waiting = self._waiting, []
        self.in_flight, self._in_flight_bytes, self._waiting_bytes = len(taken), self._waiting_bytes, 0
        self.has_news.clear()
        return taken

    def acknowledge(self) -> None:
        self.in_flight = self._in_flight_bytes = 0
        self._room.set()


class Producer:
    """Stores one message from one source, as the only producer of the message."""

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
        except _SourceFailed as failed:
            failure = failed.error
        except (Conflict, Gone, Unauthorized, Forbidden, Unreachable):
            raise  # the message is not ours, or an abort would not get through either
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
        response, _ = await self._request("PUT")
        appended = record(Appended, answer_of(response))
        if appended.status != "active":
            await self._append([])  # is refused with the way it ended
        if appended.chunk_count:
            raise self._not_ours()
        self._seq, self._is_ours = appended.seq, True

    async def _pump(self, pieces: AsyncIterator[str | Chunk]) -> Appended:
        pulling = asyncio.create_task(self._pull(pieces))
        pulling.add_done_callback(self._source_ended)
        try:
            return await self._deliver(pulling)
        except ClientError as error:
            if failure := failure_of(pulling):
                failure.add_note(f"What the source gave before could not all be stored: {error}")
                raise _SourceFailed(failure) from error
            raise
        finally:
            await cancel_and_wait(pulling)

    async def _pull(self, pieces: AsyncIterator[str | Chunk]) -> None:
        async for piece in pieces:
            await self._window.put(chunk_of(piece))

    def _source_ended(self, pulling: asyncio.Task[None]) -> None:
        if failure_of(pulling):
            self._backoff.hurry(ABORT_PATIENCE)
        self._window.has_news.set()

    async def _deliver(self, pulling: asyncio.Task[None]) -> Appended:
        while True:
            await self._wait_for_source()
            failure = failure_of(pulling)
            completes = pulling.done() and failure is None
            batch = self._window.take()
            if batch or completes:
                appended = await self._append(batch, completes)
            if completes:
                return appended
            if failure is not None:
                raise _SourceFailed(failure)

    async def _append(self, chunks: Sequence[Chunk], complete: bool = False) -> Appended:
        """Append the next chunks; none are a sign of life. Raise Conflict or Gone if the message is not ours."""
        query = {"index": self._index, "complete": "true" if complete else None}
        try:
            response, is_retry = await self._request("POST", "/chunks", query, on_wire(chunks))
            appended = record(Appended, answer_of(response))
            # If more is stored than was sent, or a first request finds its chunks stored, another producer sent them.
            if appended.chunk_count > self._index + self._window.in_flight or (
                response.status_code == 200 and not is_retry and (chunks or complete)
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

    async def _wait_for_source(self) -> None:
        """Wait for a chunk from the source, or its end. Raise if somebody else ends the message meanwhile."""
        if self._window.has_news.is_set():
            return
        news = asyncio.create_task(self._window.has_news.wait())
        waiting: set[asyncio.Task[Any]] = {news}
        try:
            await asyncio.wait(waiting, timeout=WATCH_AFTER)
            if news.done():
                return
            waiting.add(asyncio.create_task(self._watch()))
            while not news.done():
                done, waiting = await asyncio.wait(
                    waiting, timeout=SIGN_OF_LIFE if len(waiting) > 1 else POLL, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
                if not news.done():
                    await self._append([])
        finally:
            for task in waiting:
                await cancel_and_wait(task)

    async def _watch(self) -> None:
        """Follow the message, and raise if somebody else changes or ends it. Return if it cannot be followed."""
        reader = Reader(self._service, self._thread, self._message, self._seq, None, wait=False)
        try:
            async with aclosing(reader.items(patience=0)) as items:
                async for item in items:
                    raise self._error_for(item)
        except NotFound as error:
            raise self._gone() from error
        except ClientError as error:
            # The token may not read, there are too many readers, or the connection is lost: appends find out as well.
            if not (error.retryable or isinstance(error, Forbidden)):
                raise

    def _error_for(self, item: Item) -> ClientError:
        """Return the error for an item that this producer did not write."""
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
        """Abort the message, so that its readers stop waiting. If that fails, add a note to the error."""
        if not self._is_ours:
            return
        patience = CANCEL_PATIENCE if isinstance(error, asyncio.CancelledError) else ABORT_PATIENCE
        try:
            async with asyncio.timeout(patience):
                await self._append([])
                await self._request("POST", "/abort", body={"reason": type(error).__name__})
        except (ClientError, TimeoutError) as refusal:
            error.add_note(f"The message could not be aborted: {str(refusal) or 'the service does not answer.'}")

    async def _request(
        self, method: str, call: str = "", query: Query | None = None, body: Any = None
    ) -> tuple[httpx.Response, bool]:
        path = message_path(self._thread, self._message, call)
        return await self._service.request_until_answered(self._backoff, method, path, query, body)

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


class _SourceFailed(Exception):
    """Wraps the error of a source, which may be of any class, to tell it from an error of this client."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def pieces_of(source: Source) -> AsyncIterator[str | Chunk]:
    if isinstance(source, str):
        raise TypeError("The source is one text; put it in a list, or its characters would be a chunk each.")
    return aiter(source) if isinstance(source, AsyncIterable) else as_async(source)


async def as_async(pieces: Iterable[str | Chunk]) -> AsyncGenerator[str | Chunk, None]:
    for piece in pieces:
        yield piece


def failure_of(task: asyncio.Task[Any]) -> BaseException | None:
    if not task.done():
        return None
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()):
        log.warning("A source or reader failed while it was being stopped.", exc_info=error)
