"""The recording of one stream: it commits the events as they come, and ends the message as the stream ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from ...app import Append, Change, Chunk, Conflict, End, Parts, Problem, TooLarge, utf8_size
from .client import nothing_recorded
from .dialects import LOST
from .events import Failed, Source
from .messages import Relayed

log = logging.getLogger("resume_stream")


class Recording:
    """The recording of one stream. It calls ``began`` once the first chunk is committed."""

    def __init__(self, parts: Parts, source: Source, message: Relayed, began: Callable[[], None]) -> None:
        self._buffer, self._source, self._began = parts.buffer, source, began
        self._while_active = partial(parts.producing.while_active, parts.buffer)
        self._patiently = partial(parts.producing.patiently, parts.buffer)
        self._message, self._dialect = message, message.dialect
        self._now = asyncio.get_running_loop().time
        self._index = 0  # of the next chunk in the message
        self._sign_due = 0.0  # when an append without chunks has to show that the upstream is alive
        self._generation: int | None = None
        self._outcome: str | None = None  # "completed", or another word for an abort
        self._reason = ""
        self.is_over = False  # the dialect's last event has come

    async def run(self, events: list[Chunk] | None) -> str:
        """Record these events and those of the source, and return the outcome. Raise Problem if nothing is recorded."""
        try:
            async with self._while_active(*self._message.ids) as lift:
                await self._record(events, lift)
                lift()
                await self._end()
        except Conflict:
            if not self._index:
                raise
            return "stopped"
        return self._outcome or "completed"

    async def _record(self, events: list[Chunk] | None, lift: Callable[[], Any]) -> None:
        try:
            while events is not None:
                await self._take(events, lift)
                events = None if self.is_over else await self._source.take()
        except Failed as failed:
            self._fail(str(failed))
        except TooLarge:
            self._fail("message_too_large", is_stored=False)
        except Conflict:
            raise
        except Problem as problem:
            if not self._index or self._buffer.stopping:
                raise
            log.warning("the rest of an answer of %s is not recorded: %s", self._message.upstream, problem.detail)
            self._fail("not_recorded", is_stored=False)

    def _fail(self, reason: str, is_stored: bool = True) -> None:
        """Abort the message, unless the upstream has ended it. Its completion counts only if it is stored."""
        if not self._index:
            raise nothing_recorded(self._message.upstream, reason)
        if self._outcome is None or (self._outcome == "completed" and not is_stored):
            self._outcome = self._reason = reason

    async def _take(self, events: list[Chunk], lift: Callable[[], Any]) -> None:
        for number, event in enumerate(events):
            if kind := self._dialect.end_of(event):
                self._learn(kind, event)
            elif self._outcome == "completed" and self._dialect.begins_with(event):
                self._outcome = None  # another run begins, which has to end too
            if self.is_over:
                events = events[: number + 1]
                break
        if not events and self._index and self._now() < self._sign_due:
            return
        chunks = events if self._index else [self._message.mark, *events]
        completes = self.is_over and self._outcome == "completed"
        if completes:
            lift()
        await self._append(chunks, completes)

    def _learn(self, kind: str, event: Chunk) -> None:
        """Take the outcome from an event that ends the stream. An error stays, whatever follows it."""
        if kind in self._dialect.aborts:
            self._outcome, self._reason = "failed", self._dialect.reason_of(event)[: End.MAX_REASON]
        elif kind in self._dialect.completes and self._outcome is None:
            self._outcome = "completed"
        self.is_over = kind in self._dialect.last

    async def _append(self, chunks: list[Chunk], completes: bool) -> None:
        """Commit the chunks, or as many as ``max_message`` allows. Raise TooLarge."""
        sizes = [utf8_size(chunk.content) for chunk in chunks]
        append = Append(*self._message.ids, chunks, sizes, self._index, completes, self._generation)
        try:
            change = await self._patiently(lambda: self._commit(append))
        except TooLarge:
            if len(chunks) == 1:
                raise
            await self._append(chunks[: len(chunks) // 2], False)
            await self._append(chunks[len(chunks) // 2 :], completes)
            return
        if not self._index:
            self._began()
        self._index += len(chunks)
        self._generation = change.state.generation
        self._sign_due = self._now() + self._buffer.settings.producer_timeout / 4

    async def _commit(self, append: Append) -> Change:
        await self._buffer.room()
        return await self._buffer.store.write(append)

    async def _end(self) -> None:
        ids = self._message.ids
        if self._outcome is None and self._dialect.completes:
            self._fail(LOST)
        if self._outcome not in (None, "completed"):
            await self._patiently(lambda: self._buffer.abort_message(*ids, self._reason))
        elif not (self._outcome and self.is_over):  # else the last append has completed it
            await self._patiently(lambda: self._buffer.complete_message(*ids))
