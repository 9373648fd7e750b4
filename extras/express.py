"""The two hot paths past the framework: common appends, and readers that wait, on the connection itself.

What is anything but common is handed on as it came, so that routes, errors, logs and documents
are Litestar's.
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

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..app import (
    ANYONE,
    API_HEADERS,
    RETRY,
    SMALL_BODY,
    TAKES_READER,
    WRITE,
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
    Signal,
    Step,
    can_end,
    chunks_from_json,
    encode_json,
)

log = logging.getLogger("resume_stream")

TESTED_UVICORN = ((0, 54), (0, 55))  # from the first on, and before the second
BODY_TIMEOUT = 1.0  # seconds, after which whoever is slower is left to the ordinary way, which has its limits
NAME = rb"([A-Za-z0-9_:@~-][A-Za-z0-9_.:@~-]{0,199})"
PATH = re.compile(
    rb"/api/threads/" + NAME + rb"/messages/" + NAME + rb"/chunks"
    rb"(?:\?(?:index=(0|[1-9][0-9]{0,14})(?:&complete=(true))?|complete=(true)))?"
)
ONCE = (b"content-type", b"content-length", b"host", b"authorization")
UNCOMMON = frozenset({b"origin", b"x-request-id", b"content-encoding", b"transfer-encoding", b"expect", b"upgrade"})


def mount(parts: Parts) -> None:
    """What is over uvicorn's own is bound to its inside, and so to the versions that were tested."""
    first, end = TESTED_UVICORN
    if not first <= tuple(map(int, uvicorn.__version__.split(".")[:2])) < end:
        log.warning("uvicorn %s was not tested, so connections are its own: without limits", uvicorn.__version__)
        parts.connection.clear()
        return
    parts.connection.append(type("ExpressConnection", (Express,), {"rules": Rules(parts), "buffer": parts.buffer}))


class Rules:
    """Which appends are common enough, and who may make them."""

    def __init__(self, parts: Parts) -> None:
        self.settings = parts.buffer.settings
        self.headers = b"".join(f"{name.lower()}: {value}\r\n".encode() for name, value in API_HEADERS.items())
        self._gate = Gate(cast(Any, None), self.settings)
        # Cached are only tokens that are good, and whether one has expired is asked of each grant anew.
        self._grant_of = lru_cache(1024)(parts.grant_of) if parts.grant_of else None
        self._is_open = not parts.guards or (len(parts.guards) == 1 and self._grant_of is not None)

    def admitted(self, headers: list[tuple[bytes, bytes]], thread_id: str) -> Grant | None:
        """By which grant, if the ordinary way would answer as this one does, as far as the headers tell."""
        found: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in UNCOMMON or (name in ONCE and name in found):
                return None
            found[name] = value
        length = found.get(b"content-length", b"")
        is_common = (
            self._is_open
            and found.get(b"content-type") == b"application/json"
            and length.isdigit()
            and 0 < int(length) <= min(SMALL_BODY, self.settings.max_body)
            and self._gate.refusal([found.get(b"host", b"").decode("latin-1")], []) is None
        )
        return self._granted(found.get(b"authorization", b"").decode("latin-1"), thread_id) if is_common else None

    def _granted(self, authorization: str, thread_id: str) -> Grant | None:
        if self._grant_of is None:
            return ANYONE
        scheme, _, token = authorization.partition(" ")
        try:
            if scheme.lower() == "bearer" and token:
                grant = self._grant_of(token.strip())
                grant.require(WRITE, thread_id)
                return grant
        except Problem as problem:
            log.debug("left to the ordinary way: %s", problem.detail)
        return None


class Taken:
    """What uvicorn asks of the request that is under way, in the place of its own cycle."""

    __slots__ = ("connection", "disconnected", "keep_alive", "response_complete")

    def __init__(self, connection: Express, keep_alive: bool) -> None:
        self.connection = connection
        self.keep_alive = keep_alive
        self.disconnected = self.response_complete = False

    @property
    def message_event(self) -> Taken:
        return self

    def set(self) -> None:
        """uvicorn's way to say that there is something new, as that the client is gone."""

    def end(self, last: bytes) -> None:
        self.response_complete = True
        transport = self.connection.transport
        if not (self.disconnected or transport.is_closing()):
            transport.write(last)
            if not self.keep_alive:
                transport.close()
            self.connection.on_response_complete()


class ExpressAppend(Taken):
    """An append, from its headers to its answer."""

    __slots__ = ("_grant", "_timer", "body", "complete", "headers", "index", "message_id", "scope", "thread_id", "url")

    def __init__(self, connection: Express, keep_alive: bool, match: re.Match[bytes], grant: Grant) -> None:
        super().__init__(connection, keep_alive)
        self._grant = grant
        self._timer: asyncio.TimerHandle | None = None
        self.thread_id, self.message_id = match[1].decode(), match[2].decode()
        self.index = None if match[3] is None else int(match[3])
        self.complete = bool(match[4] or match[5])
        self.scope, self.url = cast(dict[str, Any], connection.scope), connection.url
        self.body = b""

    def wait(self) -> None:
        """For the rest of the body."""
        if self._timer is None:
            self._timer = self.connection.loop.call_later(BODY_TIMEOUT, self._hand_on_what_is_here)

    def _hand_on_what_is_here(self) -> None:
        self.connection.taking = None
        if not self.disconnected:
            self.hand_on(is_whole=False)

    def ask(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        buffer = self.connection.buffer
        try:
            chunks = chunks_from_json(self.body)
            append = buffer.checked_append(
                self.thread_id, self.message_id, chunks, index=self.index, complete=self.complete
            )
        except Problem:
            self.hand_on()  # and be told of it there
            return
        if not buffer.stopping and buffer.store.has_room and time.time() < self._grant.expires:
            asyncio.ensure_future(buffer.store.write(append)).add_done_callback(self._answer)
        else:
            self.hand_on()  # and wait, or be refused, there

    def _answer(self, asked: asyncio.Future[Change]) -> None:
        connection = self.connection
        if asked.cancelled() or asked.exception() is not None or connection.flow.write_paused:
            self.scope["asked"] = asked
            self.hand_on()
            return
        change = asked.result()
        body = encode_json(change.answer)
        head = b"".join([b"%s: %s\r\n" % header for header in connection.server_state.default_headers])
        self.end(
            b"%s%scontent-type: application/json\r\ncontent-length: %d\r\n%s%s\r\n%s"
            % (
                STATUS_LINE[201 if change.changed else 200],
                head,
                len(body),
                self.connection.rules.headers,
                b"" if self.keep_alive else b"connection: close\r\n",
                body,
            )
        )

    def hand_on(self, is_whole: bool = True) -> None:
        """To the app, as uvicorn would have at once."""
        connection, path, query = self.connection, *self.url.partition(b"?")[::2]
        self.scope |= {"method": "POST", "path": path.decode(), "raw_path": path, "query_string": query}
        cycle = RequestResponseCycle(
            scope=cast(Any, self.scope),
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
    """A reader on its connection, with no task but while it is behind: a place, and a time."""

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
        """Send all there is, as far as the connection takes it."""
        try:
            if self.connection.transport.is_closing():
                self._detach()  # and its end is about to be told
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
        self._end, shared = page.end, page.shared
        if shared is None or (wire := shared.get(self._key)) is None:
            wire = in_a_chunk(page.encoded(self._form))
            if shared is not None:
                shared[self._key] = wire
        self.connection.buffer.tell("sent", page, size_in(wire))
        if wire:
            self.connection.transport.write(wire)

    def _write(self, text: bytes) -> None:
        if text:
            self.connection.transport.write(in_a_chunk(text))

    def _wait_until(self, due: float) -> None:
        """The timer is left as it is where it comes early: then there is another look."""
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
        log.exception("a reader could not be sent what there is")
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
    """As a chunk of the body (RFC 9112, 7.1); nothing where there is nothing, as an empty one would end it."""
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


def size_in(chunk: bytes) -> int:
    return int(chunk[: chunk.index(b"\r")], 16) if chunk else 0


class Express(HttpToolsProtocol):
    """A connection of uvicorn that has both express ways."""

    buffer: ChunkBuffer
    rules: Rules
    taking: ExpressAppend | None = None
    detached: Detached | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.taking is not None:
            self.taking.wait()

    def on_headers_complete(self) -> None:
        match = PATH.fullmatch(self.url)
        if match is not None and (grant := self._admitted(match)) is not None:
            self.taking = ExpressAppend(self, self.parser.should_keep_alive(), match, grant)
            self.cycle = cast(Any, self.taking)
            return
        self.taking = None
        if self.parser.get_http_version() == "1.1":
            cast(Any, self.scope)["extensions"] = {TAKES_READER: partial(take_reader, weakref.ref(self))}
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
        if self.taking is None:
            super().on_body(body)
        else:
            self.taking.body += body

    def on_message_complete(self) -> None:
        if self.taking is None:
            super().on_message_complete()
        else:
            taken, self.taking = self.taking, None
            taken.ask()

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
        """Begin the answer, and send from then on what the reader is to have; False leaves all of it to the app."""
        cycle = self.cycle
        if cast(Any, cycle.scope) is not scope or cycle.more_body or self.detached is not None:
            return False
        await start()
        cycle.response_complete = True  # as far as uvicorn has to do with it
        if cycle.disconnected:
            return True
        self.transport.write(in_a_chunk(RETRY))
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
