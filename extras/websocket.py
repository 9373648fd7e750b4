"""One WebSocket for many threads, at ``/api/ws``: subscriptions, appends, and aborts.

Over HTTP/1.1 a browser opens at most six connections to a host, and each stream takes one of them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter as Multiset
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any, ClassVar, cast

import msgspec
from litestar import WebSocket, websocket
from litestar.enums import ScopeType
from litestar.exceptions import WebSocketDisconnect
from litestar.middleware import ASGIMiddleware, DefineMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from ..app import (
    UNDECODABLE,
    BadRequest,
    Buffer,
    Change,
    Chunk,
    ChunkBuffer,
    Conflict,
    Grant,
    InvalidContent,
    MessageEnd,
    NotFound,
    Page,
    Parts,
    Problem,
    Reader,
    Record,
    Signal,
    Unavailable,
    seconds,
)

log = logging.getLogger("resume_stream")

UNREAD_ANSWERS = 32  # to appends of one WebSocket; past it no more frames are read
MOST_SUBSCRIPTIONS = 250  # of one connection
MOST_FOR_A_TOKEN = 2_500  # subscriptions of all connections with one token
MOST_SEARCHED = 4096  # characters of an invalid frame, for its id


def mount(parts: Parts) -> None:
    parts.api.append(converse)
    parts.middleware.append(DefineMiddleware(Denied()))


class Frame(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    id: str | int


class Subscribe(Frame, frozen=True, tag="subscribe"):
    thread_id: str
    message_id: str | None = None
    after: str | int | None = None
    known_content: str | None = None
    follow: bool = False
    idle_timeout: float | str | None = None
    poll_interval: float | str | None = None


class Unsubscribe(Frame, frozen=True, tag="unsubscribe"): ...


class AppendFrame(Frame, frozen=True, tag="append"):
    thread_id: str
    message_id: str
    chunks: list[Chunk]
    index: int | None = None
    complete: bool = False


class AbortFrame(Frame, frozen=True, tag="abort"):
    thread_id: str
    message_id: str
    reason: str | None = None


AnyFrame = Subscribe | Unsubscribe | AppendFrame | AbortFrame
FRAMES: msgspec.json.Decoder[AnyFrame] = msgspec.json.Decoder(AnyFrame)


class SocketFrames:
    """A format: JSON objects without their first member, which is the id of the subscription."""

    tells_all = True

    def frames(self, page: Page) -> bytes:
        """Return one object in each line."""
        frames = []
        for entry in page.entries:
            kind = b"complete" if isinstance(entry, MessageEnd) else b"chunk"
            cursor = b"%d-%d" % (page.generation, entry.seq)
            frames.append(b'"type":"%s","cursor":"%s",%s' % (kind, cursor, msgspec.json.encode(entry)[1:]))
        return b"\n".join([*frames, b""])

    def signal(self, signal: Signal, problem: Problem | None = None) -> bytes:
        return msgspec.json.encode({"type": signal.value, **(problem.document if problem else {})})[1:]


SOCKET_FRAMES = SocketFrames()


class Conversation:
    """One WebSocket. Each subscription is a reader with a task of its own; appends keep their order."""

    of_tokens: ClassVar[Multiset[Grant]] = Multiset()  # the number of subscriptions with each grant

    def __init__(self, socket: WebSocket[Any, Any, Any], buffer: ChunkBuffer) -> None:
        self._socket = socket
        self._buffer = buffer
        self._grant = Grant.of(socket)
        self._subscriptions: dict[str | int, asyncio.Task[None]] = {}
        self._appends: set[asyncio.Task[None]] = set()
        self._closed = False

    async def hold(self) -> None:
        try:
            while True:
                await self._take(await self._socket.receive_data("text"))
        except WebSocketDisconnect:
            log.debug("WebSocket closed")
        finally:
            self._closed = True
            for task in self._subscriptions.values():
                task.cancel()
            self._subscriptions.clear()  # or a cycle would keep their readers until the collector comes

    async def _take(self, text: str | bytes) -> None:
        # To wait here is backpressure: no more frames are read meanwhile.
        identity: str | int | None = None
        try:
            await self._buffer.room()
            if len(self._appends) >= UNREAD_ANSWERS:
                await asyncio.wait(self._appends, return_when=asyncio.FIRST_COMPLETED)
            frame = decode_frame(text)
            identity = frame.id
            match frame:
                case Subscribe():
                    self._subscribe(frame)
                case Unsubscribe():
                    await self._unsubscribe(frame)
                case AppendFrame():
                    self._append(frame)
                case AbortFrame():
                    self._grant.require("abort", frame.thread_id)
                    answer = await self._buffer.abort_message(frame.thread_id, frame.message_id, frame.reason)
                    await self._send("aborted", frame.id, answer)
        except Problem as problem:
            await self._send("error", identity or identity_of(text), problem.document)

    def _subscribe(self, frame: Subscribe) -> None:
        self._grant.require("read", frame.thread_id)
        if frame.id in self._subscriptions:
            raise Conflict(f"The id {frame.id!r} has a subscription already; unsubscribe it, or use another id.")
        if frame.known_content is not None and (frame.message_id is None or frame.after is not None):
            raise BadRequest("known_content goes with a message_id, and not with after.")
        if len(self._subscriptions) >= MOST_SUBSCRIPTIONS:
            raise Unavailable(f"This connection has {MOST_SUBSCRIPTIONS} subscriptions; end one, or open another.")
        if self._grant.threads is not None and self.of_tokens[self._grant] >= MOST_FOR_A_TOKEN:
            raise Unavailable(f"There are {MOST_FOR_A_TOKEN} subscriptions with this token; end one, or get another.")
        self._subscriptions[frame.id] = asyncio.create_task(self._follow(frame))

    async def _unsubscribe(self, frame: Unsubscribe) -> None:
        if (task := self._subscriptions.pop(frame.id, None)) is None:
            raise NotFound(f"There is no subscription with the id {frame.id!r}.")
        task.cancel()
        await asyncio.wait([task])
        await self._send("unsubscribed", frame.id)

    def _append(self, frame: AppendFrame) -> None:
        self._grant.require("write", frame.thread_id)
        append = self._buffer.checked_append(
            frame.thread_id, frame.message_id, frame.chunks, index=frame.index, complete=frame.complete
        )
        task = asyncio.create_task(self._acknowledge(frame.id, self._buffer.store.write(append)))
        self._appends.add(task)
        task.add_done_callback(self._appends.discard)

    async def _acknowledge(self, identity: str | int, committing: Awaitable[Change]) -> None:
        try:
            answer = (await committing).answer
            del committing  # frees the chunks, as the producer may be slow to read its answer
            await self._send("appended", identity, answer)
        except Problem as problem:
            await self._send("error", identity, problem.document)

    async def _follow(self, frame: Subscribe) -> None:
        self.of_tokens[self._grant] += 1
        try:
            await self._deliver(frame)
        except Problem as problem:
            await self._send_text(
                b'{"id":%s,' % msgspec.json.encode(frame.id) + SOCKET_FRAMES.signal(Signal.ERROR, problem)
            )
        finally:
            self.of_tokens[self._grant] -= 1
            if not self.of_tokens[self._grant]:
                del self.of_tokens[self._grant]
        self._subscriptions.pop(frame.id, None)
        if not self._buffer.stopping:  # a client reconnects after a lost connection, not after this answer
            await self._send("unsubscribed", frame.id)

    async def _deliver(self, frame: Subscribe) -> None:
        reader = Reader(
            self._buffer,
            heartbeat=0,  # WebSocket has pings
            idle_timeout=seconds("idle_timeout", frame.idle_timeout),
            expires=self._grant.expires,
        )
        seconds("poll_interval", frame.poll_interval)  # has no effect: readers do not poll
        place = await self._buffer.locate(
            frame.thread_id, frame.message_id, after=frame.after, known_content=frame.known_content, follow=frame.follow
        )
        if place.finished:
            return
        start = b'{"id":%s,' % msgspec.json.encode(frame.id)
        async with aclosing(self._buffer.follow(place, reader)) as items:
            async for item in items:
                if isinstance(item, Page):
                    frames = item.encoded(SOCKET_FRAMES)
                    self._buffer.tell("sent", item, len(frames))
                    for rest in frames.splitlines():
                        await self._send_text(start + rest)
                else:
                    await self._send_text(start + SOCKET_FRAMES.signal(item))

    async def _send(self, kind: str, identity: str | int | None, payload: Any = None) -> None:
        members = msgspec.to_builtins(payload) if payload is not None else {}
        await self._send_text(msgspec.json.encode({**members, "type": kind, "id": identity}))

    async def _send_text(self, text: bytes) -> None:
        """Send, and wait while the client is slow."""
        if not self._closed:
            try:
                await self._socket.send_text(text.decode())
            except OSError:  # uvicorn: the connection is lost
                self._closed = True


IDENTITY = re.compile(r'"id"\s*:\s*("(?:[^"\\\\]|\\\\.){0,200}"|-?\d{1,18})')


def identity_of(text: str | bytes) -> str | int | None:
    """Search the beginning of an invalid frame for its id."""
    start = text[:MOST_SEARCHED]
    found = IDENTITY.search(start if isinstance(start, str) else start.decode(errors="replace"))
    if found is None:
        return None
    try:
        return msgspec.json.decode(found[1].encode(errors="replace"), type=str | int)
    except UNDECODABLE:
        return None


def decode_frame(text: str | bytes) -> AnyFrame:
    """Raises InvalidContent."""
    try:
        return FRAMES.decode(text)
    except UNDECODABLE as error:
        raise InvalidContent(
            f"This is not a frame ({error}); send subscribe, unsubscribe, append or abort, each with an id."
        ) from error


@websocket("/ws", scope="any", token_in_query=True)
async def converse(socket: WebSocket[Any, Any, Any], buffer: Buffer) -> None:
    await socket.accept()
    await Conversation(socket, buffer).hold()


class Denied(ASGIMiddleware):
    """Answers a refused WebSocket with the problem document, in place of a bare 403."""

    scopes = (ScopeType.WEBSOCKET,)

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        can_answer = "websocket.http.response" in (cast(Any, scope).get("extensions") or {})

        async def send_denied(message: Message) -> None:
            nonlocal can_answer
            can_answer = can_answer and message["type"] != "websocket.accept"
            if not can_answer or message["type"] != "websocket.close":
                await send(message)
                return
            problem: Problem = cast(Any, scope).get("refusal") or Unavailable("The service cannot answer; try again.")
            headers = [(b"content-type", b"application/problem+json")]
            headers += [(name.lower().encode(), value.encode()) for name, value in (problem.headers or {}).items()]
            start = {"type": "websocket.http.response.start", "status": problem.status_code, "headers": headers}
            await send(cast(Message, start))
            body = msgspec.json.encode(problem.document)
            await send(cast(Message, {"type": "websocket.http.response.body", "body": body}))

        await next_app(scope, receive, send_denied)
