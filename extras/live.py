"""The live end of threads in memory: what is committed is encoded once, and sent to all who follow it from there.

Without this each of them reads it from the store, which is as right, and slower the more they are.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from ..app import Change, ChunkBuffer, Entry, Format, MessageEnd, Page, Place, State, Status, Store, StoredChunk, Tail

CHUNK_OVERHEAD = 64  # bytes that an entry takes besides its text
LIVE_BYTES = 1024**2  # of a thread's newest pages, kept while somebody follows it
ALL_LIVE_BYTES = 32 * 1024**2  # of all threads
CALLED_AT_ONCE = 4  # readers of a thread, in one turn of the loop
MUCH_TO_SEND = LIVE_BYTES // 4  # for which all are called at once, or it would be let go before they are
JOINED = 4  # what readers at as many different places have before them, kept for those who are at the same


def attend(buffer: ChunkBuffer) -> None:
    buffer.tail_type = type("Tail", (LiveTail, buffer.tail_type), {})


class LivePage(Page):
    """A page for all who follow, or several that follow one another (``parts``), encoded once in each format.

    ``asked`` is when its append was asked for, until somebody has read it.
    """

    __slots__ = ("asked", "parts", "shared")

    def __init__(
        self,
        generation: int,
        last_seq: int,
        entries: Sequence[Entry],
        size: int,
        asked: float | None,
        parts: Sequence[LivePage] = (),
    ) -> None:
        super().__init__(generation, last_seq, entries, size)
        self.asked, self.parts = asked, parts
        self.shared: dict[Any, bytes] = {}

    @property
    def cost(self) -> int:
        """About how many bytes it takes."""
        return self.size + CHUNK_OVERHEAD * len(self.entries)

    def encoded(self, form: Format) -> bytes:
        if (known := self.shared.get(form)) is None:
            parts = [part.encoded(form) for part in self.parts]
            known = self.shared[form] = b"".join(parts) if parts else form.frames(self)
        return known


def entries_of(change: Change) -> list[Entry]:
    last_seq = change.state.last_seq
    first_seq = last_seq + 1 - change.ended - len(change.chunks)
    entries: list[Entry] = [
        StoredChunk(chunk.content, change.timestamp, change.message_id, seq, chunk.event)
        for seq, chunk in enumerate(change.chunks, first_seq)
    ]
    if change.ended:
        status = cast(Status, change.state.status)
        entries.append(MessageEnd(change.message_id, status, change.state.reason, last_seq))
    return entries


def page_for(message_id: str | None, pages: Sequence[LivePage]) -> LivePage | None:
    """What readers of one message, or of all, need of pages that follow one another; None where that is nothing."""
    parts = [page for page in pages if message_id in (None, page.entries[0].message_id)]
    if len(parts) < 2:
        return parts[0] if parts else None
    last, entries = parts[-1], [entry for part in parts for entry in part.entries]
    return LivePage(last.generation, last.last_seq, entries, 0, last.asked, parts)


class LiveTail(Tail):
    """Has the newest pages of a thread at hand."""

    all: ClassVar[weakref.WeakSet[LiveTail]] = weakref.WeakSet()
    all_kept: ClassVar[int] = 0  # about how many bytes the pages of all take

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, LivePage] = {}  # by the place of their first entry
        self._kept = 0  # bytes of them
        self._joined: dict[tuple[int, str | None], tuple[int, Page | None]] = {}  # since the newest page came
        self._loads: dict[tuple[int, str | None], asyncio.Task[tuple[State, Page]]] = {}
        self._woken: deque[Callable[[], None]] = deque()
        self._to_send = 0  # about how many bytes came since the last of them was called
        self.all.add(self)

    async def load(self, store: Store, place: Place, seq: int) -> tuple[State, Page]:
        """Let all readers at the same place share one read of the store, and one encoding of its page."""
        key = (seq, place.message_id)
        if (loading := self._loads.get(key)) is None:
            loading = self._loads[key] = asyncio.create_task(self._load(store, place, seq))
            loading.add_done_callback(lambda done: self._loads.pop(key) if self._loads.get(key) is done else None)
        return await asyncio.shield(loading)

    async def _load(self, store: Store, place: Place, seq: int) -> tuple[State, Page]:
        found, page = await super().load(store, place, seq)
        return found, LivePage(page.generation, page.last_seq, page.entries, page.size, None)

    def doubt(self) -> None:
        self._loads.clear()  # they may have begun before the change
        super().doubt()

    def keep(self, change: Change, asked: float | None) -> None:
        """The newest stays, whatever its size: all who follow are about to be sent it."""
        if not (entries := entries_of(change)):
            return
        page = LivePage(change.state.generation, change.state.last_seq, entries, change.size, asked)
        self._joined.clear()
        self._pages[entries[0].seq] = page
        self._to_send += page.cost
        self._weigh(page.cost)
        while self._kept > LIVE_BYTES and len(self._pages) > 1:
            self._weigh(-self._pages.pop(next(iter(self._pages))).cost)
        if LiveTail.all_kept > ALL_LIVE_BYTES:
            for tail in self.all:
                tail.forget()

    def after(self, seq: int, message_id: str | None) -> tuple[int, Page | None] | None:
        """All that is here, joined once for all who have as much."""
        if (known := self._joined.get((seq, message_id))) is None and seq + 1 in self._pages:
            pages, last_seq = [], seq
            while page := self._pages.get(last_seq + 1):
                pages.append(page)
                last_seq = page.last_seq
            if len(self._joined) >= JOINED:
                self._joined.clear()
            known = self._joined[seq, message_id] = (last_seq, page_for(message_id, pages))
        return known

    def forget(self) -> None:
        self._pages.clear()
        self._joined.clear()
        self._weigh(-self._kept)

    def _weigh(self, cost: int) -> None:
        self._kept += cost
        LiveTail.all_kept += cost

    def wake(self) -> None:
        """Call all who wait, a few in a turn of the loop: what producers send in between then goes out with it."""
        is_calling = bool(self._woken)
        self._woken.extend(self.waiting)
        self.waiting.clear()
        if self._woken and not is_calling:
            asyncio.get_running_loop().call_soon(self._call_some)

    def _call_some(self) -> None:
        at_once = len(self._woken) if self._to_send > MUCH_TO_SEND else CALLED_AT_ONCE
        for call in [self._woken.popleft() for _ in range(min(at_once, len(self._woken)))]:
            call()
        if self._woken:
            asyncio.get_running_loop().call_soon(self._call_some)
        else:
            self._joined.clear()
            self._to_send = 0
