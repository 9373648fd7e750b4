"""Exchanges with upstreams: each sends a request, finds out its message, and has the stream recorded."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from functools import partial
from typing import Any, cast
from uuid import uuid4

import httpx
import msgspec

from ...app import PRODUCER_TIMEOUT, UNDECODABLE, Chunk, Conflict, Forbidden, NotFound, Parts, Problem, Stopping
from .calls import Call, Headers, valid_id
from .client import NOT_OF_A_STREAM, Client, nothing_recorded, passed_headers
from .dialects import DIALECTS, LOST, RESTARTED, dialect_of
from .events import Failed, Source
from .messages import Relayed, look_up
from .recording import Recording

log = logging.getLogger("resume_stream")


class Exchanges:
    """The exchanges of a service that have not ended, and what they share."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.buffer, self.producing = parts, parts.buffer, parts.producing
        self.client = Client(parts.buffer.settings)
        self.active: set[Exchange] = set()
        self.claims: dict[tuple[str, str], Exchange] = {}  # who records a message, or may do so soon
        # Where several services share a store, nobody can tell whose message it is: producer_timeout ends it.
        if not self.buffer.settings.store:
            self.buffer.begin(self._abort_orphans())

    def stop(self) -> None:
        """Stop recording. The next start aborts the messages: an end now would look like the upstream's."""
        for exchange in self.active:
            exchange.task.cancel()
        self.buffer.begin(self.client.close())

    async def _abort_orphans(self) -> None:
        """Abort the messages that an earlier process was recording, once the store answers."""
        with suppress(Stopping):
            await self.producing.patiently(self.buffer, self._abort_all_orphans)

    async def _abort_all_orphans(self) -> None:
        cursor: str | None = None
        while True:
            page = await self.buffer.get_active_threads(1000, cursor)
            for thread in page.threads:
                with suppress(NotFound):
                    await self._abort_orphans_of(thread.thread_id)
            if (cursor := page.cursor) is None:
                return

    async def _abort_orphans_of(self, thread_id: str) -> None:
        cursor: str | None = None
        while True:
            thread = await self.buffer.get_thread_status(thread_id, cursor=cursor)
            for message in thread.messages:
                ids = (thread_id, message.message_id)
                is_ours = ids in self.claims and self.claims[ids].is_recording
                if message.status == "active" and not is_ours and (await look_up(self.buffer.store, *ids))[1]:
                    with suppress(Conflict):
                        await self.buffer.abort_message(*ids, RESTARTED)
            if (cursor := thread.messages_cursor) is None:
                return

    async def first_events(self, call: Call, thread_id: str, member: str | None) -> None:
        """Wait for the first events of the thread's answers. This member of a request's JSON names the thread."""
        while waiting := [
            exchange.answer
            for exchange in self.active
            if exchange.call.upstream is call.upstream
            and exchange.members.get(member) == thread_id
            and not exchange.answer.done()
        ]:
            await asyncio.wait(waiting)


class Exchange:
    """A request to an upstream, from before it is sent until its answer has ended, whoever waits for it.

    ``answer`` is a message, with more headers for its first reader, or a response that is not recorded.
    """

    def __init__(self, exchanges: Exchanges, call: Call, message_id: str | None, body: bytearray) -> None:
        self._exchanges, self._buffer = exchanges, exchanges.buffer
        self.call, self._upstream, self._message_id = call, call.upstream, message_id
        self.members = thread_members(call, body)
        self.answer: asyncio.Future[tuple[Relayed, Headers] | httpx.Response] = asyncio.Future()
        self._claims: set[tuple[str, str]] = set()
        self.is_recording = False  # until then it may only be looking for the message
        self.task = self._buffer.begin(self._run(body))
        exchanges.active.add(self)

    async def _run(self, body: bytearray) -> None:
        outcome = "interrupted"
        refusal: Problem = Stopping()
        try:
            outcome = await self._outcome(body)
        except Problem as problem:
            outcome, refusal = outcome if self.answer.done() else "refused", problem
        finally:
            if not self.answer.done():
                self.answer.set_exception(refusal)
                self.answer.exception()  # asyncio logs an exception that nobody has looked at
            # Those who wait for the answer run after this, and may then claim the same message.
            self._exchanges.active.discard(self)
            for claim in self._claims:
                del self._exchanges.claims[claim]
            self._buffer.tell("relayed", self._upstream.name, outcome)
            log.info("relayed %s: %s", self._upstream.name, outcome)

    async def _outcome(self, body: bytearray) -> str:
        response = await self._ask(body)
        if response is None:
            return "joined"
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if response.status_code != 200 or kind != "text/event-stream" or self.call.method == "HEAD":
            self.answer.set_result(response)
            return "passed_through"
        try:
            return await self._record(response)
        finally:
            await self._exchanges.client.release(response)

    async def _ask(self, body: bytearray) -> httpx.Response | None:
        """Return the upstream's response, or None if the message exists."""
        with self._exchanges.producing.holding(self._buffer) as hold:
            hold(len(body))
            if self._message_id is not None:
                for thread_id in self._possible_threads(self._message_id):
                    if (message := await self._claim(thread_id, self._message_id)) is not None:
                        self.answer.set_result((message, []))
                        return None
            return await self._exchanges.client.send(self.call, body, hold)

    def _possible_threads(self, message_id: str) -> list[str]:
        """Return the threads in which the message may be. Only the upstream's answer tells which one it is."""
        if self.call.thread_id is not None:
            return [self.call.thread_id]
        in_body = filter(None, map(valid_id, self.members.values()))
        return [message_id, *(name for name in in_body if self.call.grant.allows("any", name))]

    async def _claim(self, thread_id: str, message_id: str, is_new: bool = False) -> Relayed | None:
        """Return the message if it exists, or None, and let no other exchange record it. Raise Conflict."""
        ids, claims = (thread_id, message_id), self._exchanges.claims
        other = Conflict(f"The message {message_id!r} exists and is not of this upstream; choose another name.")
        while (holder := claims.setdefault(ids, self)) is not self:
            if holder.call.upstream is not self._upstream:
                raise other
            with suppress(Problem):
                answer = await asyncio.shield(holder.answer)
                if isinstance(answer, tuple):
                    return answer[0]
        is_new = is_new or ids in self._claims
        self._claims.add(ids)
        if is_new:
            return None
        state, message = await look_up(self._buffer.store, *ids)
        if state.status and (message is None or message.upstream != self._upstream.name):
            raise other
        return message

    async def _record(self, response: httpx.Response) -> str:
        """Record a stream and return the outcome. Raise Problem if nothing is recorded."""
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise nothing_recorded(self._upstream.name, "compressed")
        source = Source(cast(httpx.AsyncByteStream, response.stream), self._buffer.settings.max_chunk)
        try:
            events = await self._first_events(source)
            message, is_new = self._named(response, events[0] if events else None)
            left_out = NOT_OF_A_STREAM | {name.encode() for name in message.dialect.headers}
            headers = passed_headers(response, left_out, self._upstream.url.encode())
            if (existing := await self._claim(*message.ids, is_new)) is not None:
                self.answer.set_result((existing, headers))
                return "joined"
            if events is None and message.dialect.completes:
                raise nothing_recorded(self._upstream.name, LOST)
            self.is_recording = True
            began = partial(self.answer.set_result, (message, headers))
            recording = Recording(self._exchanges.parts, source, message, began)
            outcome = await recording.run(events or [])
            if recording.is_over:
                await source.drain()
            return outcome
        finally:
            await source.close()

    async def _first_events(self, source: Source) -> list[Chunk] | None:
        """Return the first events, or an empty list after ``heartbeat``, as readers need a sign of life.

        If the first event may have the message's id, wait for it up to ``producer_timeout``.
        """
        settings, now = self._buffer.settings, asyncio.get_running_loop().time
        needs_event = any(dialect.message_in_event for dialect in DIALECTS if dialect.is_path(self.call.path))
        until = now() + ((not needs_event and settings.heartbeat) or settings.producer_timeout or math.inf)
        try:
            while (events := await source.take(until)) == [] and now() < until:
                pass
            if events == [] and needs_event:
                raise Failed(PRODUCER_TIMEOUT)
        except Failed as failed:
            raise nothing_recorded(self._upstream.name, str(failed)) from failed
        return events

    def _named(self, response: httpx.Response, first: Chunk | None) -> tuple[Relayed, bool]:
        """Return the message of the stream, and whether its id was made up. Raise Forbidden."""
        call, upstream = self.call, self._upstream.name
        dialect, ids = dialect_of(call.path, response.headers, first)
        in_event = None if first is None else dialect.message_in(first)
        in_header = call.header(dialect.message_in_header)
        known = self._message_id or valid_id(in_event) or valid_id(ids.get("message")) or valid_id(in_header)
        message_id = known or f"{upstream}-{uuid4().hex}"
        in_body = self.members.get(dialect.thread_in_body)
        thread_id = call.thread_id or valid_id(ids.get("thread")) or valid_id(in_body) or message_id
        if not call.grant.allows("any", thread_id):
            raise Forbidden("The token covers some threads only; name one of them in the header Resume-Thread.")
        return Relayed(upstream, dialect, thread_id, message_id), known is None


def thread_members(call: Call, body: bytearray) -> dict[str | None, Any]:
    """Return the members of the request's JSON that may be a thread's id."""
    if not call.header(b"content-type").startswith("application/json"):
        return {}
    names = {dialect.thread_in_body for dialect in DIALECTS}
    try:
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return {name: msgspec.json.decode(raw) for name, raw in members.items() if name in names}
    except UNDECODABLE:
        return {}  # the upstream will say what is wrong
