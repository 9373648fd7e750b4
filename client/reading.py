"""Reading: server-sent events, and a reader that reconnects from its cursor."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

import httpx

from . import ClientError, Gone, Item, MessageEnd, NotFound, Problem, Reset, StoredChunk, Unreachable
from .connection import Backoff, Service, message_path, thread_path


@dataclass(frozen=True, slots=True)
class Event:
    """A server-sent event. ``name`` is "" for an event without one; ``id`` is the last id of the stream so far."""

    name: str
    data: str
    id: str


class EventParser:
    """Parses server-sent events from bytes that arrive in pieces (HTML, 9.2.6)."""

    _LINE_END = re.compile("\r\n|\n|\r")

    def __init__(self) -> None:
        self.retry: int | None = None  # ms, as the stream asks
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._line: list[str] = []
        self._after_cr = False
        self._name, self._data, self._id = "", list[str](), ""

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that this piece completes."""
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


class Reader:
    """A reader of a thread or message, over as many connections as it takes."""

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
            raise ValueError("known_content is the text of one message; give the message, and no cursor.")
        if after is not None and not re.fullmatch(r"(\d{1,18}-)?\d{1,18}", str(after), re.ASCII):
            raise ValueError(f"{after!r} is not a cursor; give the cursor of an item, like 1763829000123-42.")
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
        """Yield the items of one connection. Return if the next one may begin at once; raise if it should wait."""
        async with self._request() as response:
            backoff.answered()
            if response.status_code == 204:
                self._has_ended = True
                return
            kind = response.headers.get("content-type", "nothing")
            if kind.partition(";")[0] != "text/event-stream":
                raise ClientError(f"{self._service.url} answered a stream with {kind}; is it the service's URL?")
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
                raise Unreachable(f"The stream from {self._service.url} ended before the message did.")

    def _request(self) -> AbstractAsyncContextManager[httpx.Response]:
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
        """Return the item for an event, and move the cursor. Raise the error that the event reports, if any."""
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
                detail = f"There is no message {self._message!r} in a thread {self._thread!r}."
                raise NotFound({"status": 404, "title": "Not found", "detail": detail})
        self._cursor, self._known = event.id, None
        seq, message = data["seq"], data["messageId"]
        if event.name == "complete":
            self._has_ended = self._message is not None
            return MessageEnd(message, data["status"], data["reason"], seq, event.id)
        return StoredChunk(data["content"], data["timestamp"], message, seq, event.id, event.name or None)

    def _gone(self) -> Gone:
        return Gone(f"The thread {self._thread!r} was cleared or has expired, so the rest of it cannot be read.")
