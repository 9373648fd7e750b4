"""Two express paths past the framework: the connection itself answers common appends, and sends to readers that wait.

Every other request takes the ordinary path through uvicorn and Litestar, with its routes, errors, and logs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import weakref
from collections.abc import Awaitable, Callable
from functools import lru_cache, partial
from typing import Any, cast

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..app import (
    Change,
    ChunkBuffer,
    Format,
    Gate,
    Grant,
    MessageEnd,
    Page,
    Parts,
    Problem,
    Reader,
    ServerSentEvents,
    Signal,
    Step,
    Streamed,
    can_end,
    chunks_from_json,
)

log = logging.getLogger("resume_stream")

TESTED_UVICORN = ((0, 54), (0, 55))  # from the first version on, and before the second
BODY_TIMEOUT = 1.0  # seconds, after which an append goes on along the ordinary path, which limits slow bodies
SMALL_BODY = 16 * 1024  # bytes; a larger body takes the ordinary path
NAME = rb"([A-Za-z0-9_:@~-][A-Za-z0-9_.:@~-]{0,199})"
PATH = re.compile(
    rb"/api/threads/" + NAME + rb"/messages/" + NAME + rb"/chunks"
    rb"(?:\?(?:index=(0|[1-9][0-9]{0,14})(?:&complete=(true))?|complete=(true)))?"
)
ONCE = (b"content-type", b"content-length", b"host", b"authorization")
UNCOMMON = frozenset({b"origin", b"x-request-id", b"content-encoding", b"transfer-encoding", b"expect", b"upgrade"})


def mount(parts: Parts) -> None:
    """Use uvicorn's own connections if its version is not tested: those of extras depend on its inside."""
    first, end = TESTED_UVICORN
    if not first <= tuple(map(int, uvicorn.__version__.split(".")[:2])) < end:
        log.warning("uvicorn %s was not tested, so connections are its own: without limits", uvicorn.__version__)
        parts.connection.clear()
        return
    parts.connection.append(type("ExpressConnection", (Express,), {"rules": Rules(parts), "buffer": parts.buffer}))


class Rules:
    """Decides which appends take the express path."""

    def __init__(self, parts: Parts) -> None:
        self.settings = parts.buffer.settings
        self.headers = b"".join(
            f"{name.lower()}: {value}\r\n".encode() for name, value in parts.headers["/api"].items()
        )
        self._gate = Gate(cast(Any, None), self.settings)
        # The cache holds only valid tokens, and each append checks the expiry of its grant.
        self._grant_of = lru_cache(1024)(parts.grant_of) if parts.grant_of else None
        self._knows_guards = not parts.guards or (len(parts.guards) == 1 and self._grant_of is not None)

    def admitted(self, headers: list[tuple[bytes, bytes]], thread_id: str) -> Grant | None:
        """Return the grant of a common append to this thread, or None if it has to take the ordinary path."""
        found: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in UNCOMMON or (name in ONCE and name in found):
                return None
            found[name] = value
        length = found.get(b"content-length", b"")
        is_common = (
            self._knows_guards
            and found.get(b"content-type") == b"application/json"
            and length.isdigit()
            and 0 < int(length) <= min(SMALL_BODY, self.settings.max_body)
            and self._gate.refusal([found.get(b"host", b"").decode("latin-1")], []) is None
        )
        return self._granted(found.get(b"authorization", b"").decode("latin-1"), thread_id) if is_common else None

    def _granted(self, authorization: str, thread_id: str) -> Grant | None:
        if self._grant_of is None:
            return Grant()
        scheme, _, token = authorization.partition(" ")
        try:
            if scheme.lower() == "bearer" and token:
                grant = self._grant_of(token.strip())
                grant.require("write", thread_id)
                return grant
        except Problem as problem:
            log.debug("left to the ordinary path: %s", problem.detail)
        return None


class Taken:
    """A request on an express path, in the place of uvicorn's RequestResponseCycle, which costs more."""

    __slots__ = ("connection", "disconnected", "keep_alive", "response_complete")

    def __init__(self, connection: Express, keep_alive: bool) -> None:
        self.connection = connection
        self.keep_alive = keep_alive
        self.disconnected = self.response_complete = False

    @property
    def message_event(self) -> Taken:
        return self

    def set(self) -> None:
        """uvicorn calls this when there is news for the request, such as the loss of the connection."""

    def end(self, last: bytes) -> None:
        """Send the last bytes of the answer."""
        self.response_complete = True
        transport = self.connection.transport
        if not (self.disconnected or transport.is_closing()):
            transport.write(last)
            if not self.keep_alive:
                transport.close()
            self.connection.on_response_complete()


class ExpressAppend(Taken):
    """An append, from its headers to its answer."""

    __slots__ = ("_grant", "_match", "_scope", "_timer", "body")

    def __init__(self, connection: Express, keep_alive: bool, match: re.Match[bytes], grant: Grant) -> None:
        super().__init__(connection, keep_alive)
        self._match, self._grant, self._scope = match, grant, cast(dict[str, Any], connection.scope)
        self._timer: asyncio.TimerHandle | None = None
        self.body = b""

    def wait_for_body(self) -> None:
        if self._timer is None:
            self._timer = self.connection.loop.call_later(BODY_TIMEOUT, self._stop_waiting)

    def _stop_waiting(self) -> None:
        self.connection.appending = None
        if not self.disconnected:
            self.hand_on(is_whole=False)

    def commit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        buffer = self.connection.buffer
        thread_id, message_id, index, complete, only_complete = self._match.groups()
        try:
            append = buffer.checked_append(
                thread_id.decode(),
                message_id.decode(),
                chunks_from_json(self.body),
                index=None if index is None else int(index),
                complete=bool(complete or only_complete),
            )
        except Problem:
            self.hand_on()  # the ordinary path meets the same problem, and answers it
            return
        if not buffer.stopping and buffer.store.has_room and time.time() < self._grant.expires:
            asyncio.ensure_future(buffer.store.write(append)).add_done_callback(self._answer)
        else:
            self.hand_on()  # the ordinary path waits, or refuses

    def _answer(self, asked: asyncio.Future[Change]) -> None:
        connection = self.connection
        if asked.cancelled() or asked.exception() is not None or connection.flow.write_paused:
            self._scope["asked"] = asked
            self.hand_on()
            return
        change = asked.result()
        body = msgspec.json.encode(change.answer)
        head = b"".join([b"%s: %s\r\n" % header for header in connection.server_state.default_headers])
        self.end(
            b"%s%scontent-type: application/json\r\ncontent-length: %d\r\n%s%s\r\n%s"
            % (
                STATUS_LINE[201 if change.changed else 200],
                head,
                len(body),
                connection.rules.headers,
                b"" if self.keep_alive else b"connection: close\r\n",
                body,
            )
        )

    def hand_on(self, is_whole: bool = True) -> None:
        """Start the ordinary path, as uvicorn would have done at once."""
        connection, path, query = self.connection, *self._match[0].partition(b"?")[::2]
        self._scope |= {"method": "POST", "path": path.decode(), "raw_path": path, "query_string": query}
        cycle = RequestResponseCycle(
            scope=cast(Any, self._scope),
            transport=connection.transport,
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=self.keep_alive,
            on_response=connection.on_response_complete,
        )
        cycle.body, cycle.more_body, cycle.disconnected = bytearray(self.body), not is_whole, self.disconnected
        cycle.message_event.set()
        if cast(Any, connection.cycle) is self:
            connection.cycle = cycle
        connection._start_asgi_task(cycle, connection.app)


class Detached(Taken):
    """A reader that its connection serves. It has a timer, and has a task only while it reads from the store."""

    __slots__ = ("_attached", "_end", "_form", "_key", "_loading", "_reader", "_timer")

    def __init__(self, connection: Express, keep_alive: bool, reader: Reader, form: Format) -> None:
        super().__init__(connection, keep_alive)
        self._reader, self._form, self._key = reader, form, ("in a chunk", form)
        self._timer: asyncio.TimerHandle | None = None
        self._loading: asyncio.Task[None] | None = None
        self._end: MessageEnd | None = None
        self._attached = connection.buffer.attached(reader.place.thread_id, reader)
        self._attached.__enter__()

    def __call__(self) -> None:
        """Send all there is, as long as the connection takes it."""
        try:
            if self.connection.transport.is_closing():
                self._detach()
            else:
                self._go_on()
        except Exception:
            self._fail()

    def _go_on(self) -> None:
        reader, flow = self._reader, self.connection.flow
        while not (self.response_complete or self._loading or flow.write_paused):
            try:
                step = reader.step()
            except Problem as problem:
                self._end_with(problem)
                return
            if step is Step.WAIT:
                reader.tail.waiting[self] = None
                self._wait_until(reader.due)
                return
            if step is Step.LOAD:
                self._loading = asyncio.get_running_loop().create_task(self._load())
            elif step is Step.END:
                self._leave()
            elif isinstance(step, Page):
                self._deliver(step)
            else:
                self._write(self._form.signal(step))

    def set(self) -> None:
        if self.disconnected:
            self._detach()

    def _deliver(self, page: Page) -> None:
        self._end, frames = page.end, page.encoded(self._form)
        self.connection.buffer.tell("sent", page, len(frames))
        if not frames:
            return
        shared = {} if page.shared is None else page.shared
        if (wire := shared.get(self._key)) is None:
            wire = shared[self._key] = in_a_chunk(frames)
        self.connection.transport.write(wire)

    def _write(self, text: bytes) -> None:
        if text:
            self.connection.transport.write(in_a_chunk(text))

    def _wait_until(self, due: float) -> None:
        """Call again at this time. A timer that is set for an earlier time stays, as one call more does no harm."""
        if self._timer is not None and self._timer.when() > due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due != math.inf:
            self._timer = asyncio.get_running_loop().call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self()

    async def _load(self) -> None:
        try:
            await self.connection.buffer.load(self._reader)
        except Problem as problem:
            self._end_with(problem)
        except Exception:
            self._fail()
        finally:
            self._loading = None
        self()

    def _end_with(self, problem: Problem) -> None:
        if not self.response_complete:
            self._write(self._form.signal(Signal.ERROR, problem))
            self._leave()

    def _fail(self) -> None:
        log.exception("sending to a reader failed")
        self._break_off()

    def _leave(self) -> None:
        if can_end(self._form, self._end):
            self._detach()
            self.end(b"0\r\n\r\n")
        else:
            self._break_off()

    def _break_off(self) -> None:
        self._detach()
        self.connection.transport.close()

    def _detach(self) -> None:
        if self.response_complete:
            return
        self.response_complete = True
        if self._timer is not None:
            self._timer.cancel()
        self._reader.tail.waiting.pop(self, None)
        self._attached.__exit__(None, None, None)
        if self.connection.detached is self:
            self.connection.detached = None


def in_a_chunk(data: bytes) -> bytes:
    """Return a chunk of the body (RFC 9112, 7.1). The data is not empty: an empty chunk would end the body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Express(HttpToolsProtocol):
    """A connection of uvicorn with both express paths."""

    buffer: ChunkBuffer
    rules: Rules
    appending: ExpressAppend | None = None  # the append whose body is coming in
    detached: Detached | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.appending is not None:
            self.appending.wait_for_body()

    def on_headers_complete(self) -> None:
        match = PATH.fullmatch(self.url)
        if match is not None and (grant := self._admitted(match)) is not None:
            self.appending = ExpressAppend(self, self.parser.should_keep_alive(), match, grant)
            self.cycle = cast(Any, self.appending)
            return
        self.appending = None
        if self.parser.get_http_version() == "1.1":
            cast(Any, self.scope)["extensions"] = {Streamed.TAKES_READER: partial(take_reader, weakref.ref(self))}
        super().on_headers_complete()

    def _admitted(self, match: re.Match[bytes]) -> Grant | None:
        is_common = (
            (self.cycle is None or self.cycle.response_complete)
            and not self.access_log
            and self.limit_concurrency is None
            and not self.root_path
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and not self.buffer.stopping
            and self.buffer.store.has_room
        )
        return self.rules.admitted(self.headers, match[1].decode()) if is_common else None

    def on_body(self, body: bytes) -> None:
        if self.appending is None:
            super().on_body(body)
        else:
            self.appending.body += body

    def on_message_complete(self) -> None:
        if self.appending is None:
            super().on_message_complete()
        else:
            append, self.appending = self.appending, None
            append.commit()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.detached is not None:
            self.detached()

    def connection_lost(self, exc: Exception | None) -> None:
        detached = self.detached
        if detached is not None:
            detached.disconnected = True
            detached.set()
        super().connection_lost(exc)

    async def take_reader(
        self, scope: dict[str, Any], start: Callable[[], Awaitable[None]], reader: Reader, form: Format
    ) -> bool:
        """Begin the answer, and serve the reader from then on. Return False to leave the whole answer to the app."""
        cycle = self.cycle
        if cast(Any, cycle.scope) is not scope or cycle.more_body or self.detached is not None:
            return False
        await start()
        cycle.response_complete = True  # uvicorn is done with it
        if cycle.disconnected:
            return True
        self.transport.write(in_a_chunk(ServerSentEvents.RETRY))
        detached = Detached(self, cycle.keep_alive, reader, form)
        if self.cycle is cycle:
            self.cycle = cast(Any, detached)
            self.scope, self.headers = cast(Any, None), cast(Any, None)
        self.detached = detached
        detached()
        return True


async def take_reader(connection: weakref.ref[Express], scope: dict[str, Any], *how: Any) -> bool:
    found = connection()
    return found is not None and await found.take_reader(scope, *how)
