"""The ``Client``: every call of the service, for producers and readers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import Any, Self

import httpx

from . import AccumulatedContent, Appended, Chunk, Item, MessageStatus, Status, ThreadStatus, ThreadSummary
from .connection import Backoff, Service, answer_of, chunk_of, message_path, on_wire, record, thread_path
from .reading import Reader
from .storing import Producer, Source, Window


class Client:
    """A client of the service at ``url``, like ``http://127.0.0.1:8000``. ``async with`` closes it.

    ``token`` is sent as a bearer token. ``store`` and ``read`` retry for up to ``patience``
    seconds without an answer (``math.inf``: without limit). ``store`` keeps up to
    ``window_chunks`` chunks and ``window_bytes`` bytes that are not acknowledged in memory, and
    one chunk more. ``http`` is your own httpx client, for proxies, certificates, or a Unix
    socket; the client does not close it. One client serves any number of tasks of one event loop.

    Every call raises Problem if the service refuses (Unauthorized, Forbidden, NotFound, Conflict,
    TooLarge, InvalidContent, Unavailable …), and Unreachable if it does not answer. Calls without
    retries raise at once. An invalid id is a ValueError.
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
            raise ValueError("The window has no room; window_chunks and window_bytes have to be at least 1.")
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
        """Store what ``source`` yields as the chunks of a new message. Complete the message when the source ends.

        The source yields str or Chunk. It is an async iterable, or an iterable that never blocks
        (like a list), because the event loop iterates it. While the window is full, the source is
        not pulled. Chunks that are not acknowledged are sent again, numbered, after a failure of
        the connection or the service, so that none is lost or stored twice. While the source is
        silent, the client sends signs of life and watches the message. To watch takes a token
        that may read; without one, the client asks twice a second.

        If the source fails, the chunks before that are stored, the message is aborted with the
        exception's name as the reason (within 30 s), and the exception is raised. The message is
        also aborted if this call is cancelled (within 5 s), or if the service refuses a chunk.

        Raises MessageEnded if somebody else ends or ended the message, Conflict if another
        producer writes to it, and Gone if the thread is cleared. Then the source is closed, and
        the message stays as it is.
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
        """Follow a message, or all messages of a thread, over as many connections as it takes.

        Starts after the cursor ``after`` (of an item, or a bare sequence number), or after the
        text ``known_content`` of the message, or at the beginning. Ends after the MessageEnd of
        the message; for a thread, once none of its messages is active. With ``wait`` it waits for
        a message or thread that does not exist yet. It then follows a thread without end, and
        yields Reset if the thread is created again. If you stop the iteration early, use
        ``contextlib.aclosing`` to close the connection at once.

        Raises NotFound, and Gone if the thread is cleared or expires while it is read.
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
        """Append chunks, all or nothing, and return once they are committed. ``complete`` also ends the message.

        ``index`` is the number of the first chunk in the message, from 0. With it, a failed call
        is sent again, and no chunk is stored twice.
        """
        if isinstance(chunks, str):
            raise TypeError("The chunks are one text; put it in a list, or its characters would be a chunk each.")
        body = on_wire(map(chunk_of, chunks))
        backoff = Backoff(0 if index is None else self._service.patience)
        query = {"index": index, "complete": "true" if complete else None}
        path = message_path(thread, message, "/chunks")
        response, _ = await self._service.request_until_answered(backoff, "POST", path, query, body)
        return record(Appended, answer_of(response))

    async def complete(self, thread: str, message: str) -> Appended:
        """Complete a message. A second call has the same answer. Raises MessageEnded if the message was aborted."""
        return await self._appended("POST", message_path(thread, message, "/complete"))

    async def abort(self, thread: str, message: str, reason: str | None = None) -> Appended:
        """Abort a message, as its producer or a reader. ``reason`` has up to 1,000 characters.

        A second call has the same answer. Raises MessageEnded if the message is completed.
        """
        return await self._appended("POST", message_path(thread, message, "/abort"), {"reason": reason})

    async def status(self, thread: str) -> ThreadStatus:
        """Return a thread and its messages (``get_thread_status``)."""
        data = await self._service.ask("GET", thread_path(thread))
        return record(ThreadStatus, data, messages=tuple(record(MessageStatus, found) for found in data["messages"]))

    async def threads(self, status: Status | None = None) -> AsyncGenerator[ThreadSummary, None]:
        """Yield all threads, or those of one status, the newest first."""
        cursor: str | None = None
        while True:
            page = await self._service.ask("GET", "/threads", {"status": status, "cursor": cursor})
            for found in page["threads"]:
                yield record(ThreadSummary, found)
            if (cursor := page["cursor"]) is None:
                return

    def active_threads(self) -> AsyncGenerator[ThreadSummary, None]:
        """Yield the threads that have an active message, the newest first (``get_active_threads``)."""
        return self.threads("active")

    async def content(self, thread: str, message: str | None = None) -> AccumulatedContent:
        """Return the text so far of a message or of a whole thread (``get_accumulated_content``)."""
        data = await self._service.ask("GET", f"{thread_path(thread)}/content", {"message_id": message})
        return record(AccumulatedContent, data)

    async def clear(self, thread: str) -> None:
        """Delete a thread and erase its text (``clear_thread_buffer``)."""
        await self._service.request("DELETE", thread_path(thread))

    async def _appended(self, method: str, path: str, body: Any = None) -> Appended:
        return record(Appended, await self._service.ask(method, path, body=body))
