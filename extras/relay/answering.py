"""Which answer a request gets: a message that is in the store, the rest of one, or what the upstream answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

import httpx
from litestar.types import Receive, Scope

from ...app import Conflict, Cursor, CursorGone, MessageEnd, NotFound, Parts
from .calls import Call, Upstream, valid_id
from .client import NOT_PASSED_ON, BadGateway, GatewayTimeout, body_of, passed_headers
from .dialects import CANCELLED, DIALECTS, FAILURES, Dialect
from .exchanges import Exchange, Exchanges
from .messages import Relayed, event_at, find, has_rest, look_up
from .replies import NO_CONTENT, Answer, Replies, answer_json


class Relay:
    def __init__(self, parts: Parts, upstreams: Mapping[str, Upstream]) -> None:
        self._buffer, self._producing, self._upstreams = parts.buffer, parts.producing, upstreams
        self._active_message = parts.active_message
        self._exchanges, self._replies = Exchanges(parts), Replies(parts)
        self._client = self._exchanges.client
        self.stop = self._exchanges.stop

    async def answer(self, scope: Scope, receive: Receive) -> Answer:
        call = Call(scope, receive, self._upstreams, bool(self._buffer.settings.secret))
        last = call.header(b"last-event-id")
        if re.fullmatch(r"\d{1,18}-\d{1,18}", last, re.ASCII):
            return await self._rest_after(call, Cursor.parse(last))
        is_absent_204 = False
        for dialect in DIALECTS:
            ids = call.matches(dialect.resume) if last in ("", dialect.from_start) else None
            if ids is not None:
                if answer := await self._resumed(call, dialect, ids):
                    return answer
                is_absent_204 = is_absent_204 or dialect.absent_is_204
            if (ids := call.matches(dialect.cancel)) and (message := await self._find(call, dialect, ids, "abort")):
                return await self._cancelled(call, message)
        if last and all(last != dialect.from_start for dialect in DIALECTS):
            raise CursorGone("This service did not give this Last-Event-ID; ask again without it.")
        return await self._asked(call, is_absent_204)

    async def _asked(self, call: Call, is_absent_204: bool) -> Answer:
        """Return the upstream's answer. A message that has a name is asked for once, whoever retries."""
        message_id = call.id_in(b"resume-message", "message_id") or call.id_in(b"idempotency-key", "message_id")
        call.grant.require("write", call.thread_id or message_id)
        reader = self._replies.reader(call)
        exchange = Exchange(
            self._exchanges, call, message_id, await self._producing.whole_body(self._buffer, call.request)
        )
        answer = await asyncio.shield(exchange.answer)
        if isinstance(answer, httpx.Response):
            if not is_absent_204 or answer.status_code not in (404, 405, 501):
                return self._passed_on(answer)
            await self._client.release(answer)
            return NO_CONTENT
        message, headers = answer
        call.grant.require("write", message.thread_id)  # it may be another caller's, in a thread that its body names
        reply = await self._replies.stream(message, reader)
        return reply._replace(headers=[*headers, *reply.headers])

    def _passed_on(self, response: httpx.Response) -> Answer:
        headers = passed_headers(response, NOT_PASSED_ON)
        return Answer(response.status_code, headers, body_of(response), lambda: self._client.release(response))

    # Resuming

    async def _rest_after(self, call: Call, cursor: Cursor) -> Answer:
        """Return the rest of the message that the cursor is in, whatever the method and the path."""
        call.grant.require("read", None)
        found = await find(self._buffer.store, cursor)
        if found is None or found[0].upstream != call.upstream.name or not call.grant.allows("any", found[0].thread_id):
            raise CursorGone("This service has no answer with this Last-Event-ID, or no longer; ask again without it.")
        message, had = found
        if isinstance(had, MessageEnd) or not await has_rest(self._buffer.store, message, had):
            return NO_CONTENT
        return await self._replies.stream(message, self._replies.reader(call), had)

    async def _resumed(self, call: Call, dialect: Dialect, ids: dict[str, str]) -> Answer | None:
        """Answer a dialect's call that resumes a message. Return None if the upstream has to answer it."""
        message = await self._find(call, dialect, ids, "read")
        if message is None:
            thread_id = call.thread_in(ids, "read") if dialect.absent_is_204 else None
            return None if thread_id is None else await self._none_active(call, dialect, thread_id)
        parameters, had = call.request.query_params, None
        if dialect.stream_flag is not None and parameters.get(dialect.stream_flag) != "true":
            return await self._replies.object_of(message)
        if dialect.position and (position := parameters.get(dialect.position[0])):
            had = await event_at(self._buffer.store, message, position)
        return await self._replies.stream(message, self._replies.reader(call), had)

    async def _none_active(self, call: Call, dialect: Dialect, thread_id: str) -> Answer | None:
        """Tell why the thread's last answer failed here. Its upstream does not know, and may have all of it."""
        state = await self._buffer.store.find(thread_id)
        if not state.generation:
            return None
        _, page = await self._buffer.store.page(thread_id, None, state.last_seq - 1, 1)
        for end in page.entries:
            if isinstance(end, MessageEnd) and end.reason in FAILURES:
                message = await self._of_dialect(call, dialect, thread_id, end.message_id)
                if message is not None and (words := dialect.last_words(end, None)):
                    return Answer(200, message.headers, [words])
        return NO_CONTENT

    async def _find(self, call: Call, dialect: Dialect, ids: dict[str, str], scope: str) -> Relayed | None:
        """Return the message that a dialect's call is about, if it is here and the caller may do this with it."""
        thread_id = call.thread_in(ids, scope)
        if thread_id is None:
            return None
        if "message" in ids:
            message_id = valid_id(ids["message"])
        else:
            await self._exchanges.first_events(call, thread_id, dialect.thread_in_body)
            message_id = await self._active_message(self._buffer, thread_id)
        return await self._of_dialect(call, dialect, thread_id, message_id) if message_id else None

    async def _of_dialect(self, call: Call, dialect: Dialect, thread_id: str, message_id: str) -> Relayed | None:
        _, message = await look_up(self._buffer.store, thread_id, message_id)
        is_it = message is not None and message.upstream == call.upstream.name and message.dialect is dialect
        return message if is_it else None

    # Cancelling

    async def _cancelled(self, call: Call, message: Relayed) -> Answer:
        """Abort the message, and pass the call on. The answer is the upstream's, unless that is an error."""
        body = await self._producing.whole_body(self._buffer, call.request)
        with suppress(Conflict, NotFound):
            await self._buffer.abort_message(*message.ids, CANCELLED)
        with suppress(BadGateway, GatewayTimeout), self._producing.holding(self._buffer) as hold:
            hold(len(body))
            response = await self._client.send(call, body, hold)
            if response.status_code < 300:
                return self._passed_on(response)
            await self._client.release(response)
        if message.dialect.object_in is not None:
            return await self._replies.object_of(message)
        return answer_json(cast(Any, message.dialect.cancel)[2], {})
