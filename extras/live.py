"""Live pages: the newest pages of each followed thread stay in memory, encoded once for all of its readers.

Without this extra each reader reads the store, with the same result, but at a cost that grows with their number.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

from ..app import Change, ChunkBuffer, Entry, Format, MessageEnd, Page, Place, State, Status, Store, StoredChunk, Tail

CHUNK_OVERHEAD = 64  # bytes that an entry takes besides its text
LIVE_BYTES = 1024**2  # of a thread's newest pages, kept while somebody follows it
ALL_LIVE_BYTES = 32 * 1024**2  # of all threads
CALLED_AT_ONCE = 4  # readers of a thread, in one turn of the loop
MUCH_TO_SEND = LIVE_BYTES // 4  # past this all readers are called at once, before the pages are dropped
RUNS = 4  # runs of pages that a thread keeps: readers are at as many different places


def attend(buffer: ChunkBuffer) -> None:
    buffer.tail_type = type("Tail", (LiveTail, buffer.tail_type), {})


class LivePage(Page):
    """A page that all readers share, or several joined ones (``parts``). It is encoded once in each format.

    ``asked`` is the time at which the append arrived, until the first reader gets the page.
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

    @classmethod
    def joined(cls, parts: Sequence[LivePage]) -> LivePage:
        last, entries = parts[-1], [entry for part in parts for entry in part.entries]
        return cls(last.generation, last.last_seq, entries, 0, last.asked, parts)

    @property
    def cost(self) -> int:
        """The approximate size in bytes."""
        return self.size + CHUNK_OVERHEAD * len(self.entries)

    def encoded(self, form: Format) -> bytes:
        if (known := self.shared.get(form)) is None:
            parts = [part.encoded(form) for part in self.parts]
            known = self.shared[form] = b"".join(parts) if parts else form.frames(self)
        return known


class Run:
    """Live pages that follow one another, joined once for all readers of the thread, or of one message."""

    def __init__(self, pages: Sequence[LivePage]) -> None:
        self.last_seq = pages[-1].last_seq
        self._pages: dict[str | None, list[LivePage]] = {None: [*pages]}  # by message, and of all messages
        for page in pages:
            self._pages.setdefault(page.entries[0].message_id, []).append(page)

    def page(self, message_id: str | None) -> LivePage | None:
        """Return the page for readers of this message (None: of the thread), or None if it has nothing new."""
        pages = self._pages.get(message_id, [])
        if len(pages) > 1:
            pages[:] = [LivePage.joined([*pages])]
        return pages[0] if pages else None


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


class LiveTail(Tail):
    """A tail that keeps the newest pages of its thread."""

    all: ClassVar[weakref.WeakSet[LiveTail]] = weakref.WeakSet()
    all_kept: ClassVar[int] = 0  # approximate bytes of the pages of all tails

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, LivePage] = {}  # by their first sequence number
        self._kept = 0  # approximate bytes of these
        self._runs: dict[int, Run] = {}  # up to the newest page, by the sequence number before their first
        self._loads: dict[tuple[int, int, str | None], asyncio.Task[tuple[State, Page]]] = {}
        self._woken: deque[Callable[[], None]] = deque()
        self._to_send = 0  # approximate bytes that came since all readers were called
        self.all.add(self)

    async def load(self, store: Store, place: Place, seq: int) -> tuple[State, Page]:
        """Let all readers at the same place share one read of the store, and one encoding of its page."""
        key = (place.generation, seq, place.message_id)
        if (loading := self._loads.get(key)) is None:
            loading = self._loads[key] = asyncio.create_task(self._load(store, place, seq))
            loading.add_done_callback(partial(self._loaded, key))
        return await asyncio.shield(loading)

    def _loaded(self, key: tuple[int, int, str | None], loading: asyncio.Task[tuple[State, Page]]) -> None:
        if self._loads.get(key) is loading:
            del self._loads[key]
        if not loading.cancelled():
            loading.exception()  # looked at, even if all its readers have left

    async def _load(self, store: Store, place: Place, seq: int) -> tuple[State, Page]:
        found, page = await super().load(store, place, seq)
        return found, LivePage(page.generation, page.last_seq, page.entries, page.size, None)

    def doubt(self) -> None:
        self._loads.clear()  # they may have begun before the change
        super().doubt()

    def keep(self, change: Change, asked: float | None) -> None:
        """Keep the new page, whatever its size: all readers are about to get it."""
        if not (entries := entries_of(change)):
            return
        page = LivePage(change.state.generation, change.state.last_seq, entries, change.size, asked)
        self._runs.clear()
        self._pages[entries[0].seq] = page
        self._to_send += page.cost
        self._weigh(page.cost)
        while self._kept > LIVE_BYTES and len(self._pages) > 1:
            self._weigh(-self._pages.pop(next(iter(self._pages))).cost)
        if LiveTail.all_kept > ALL_LIVE_BYTES:
            for tail in self.all:
                tail.forget()

    def after(self, seq: int, message_id: str | None) -> tuple[int, Page | None] | None:
        if (run := self._runs.get(seq)) is None:
            pages, last_seq = [], seq
            while page := self._pages.get(last_seq + 1):
                pages.append(page)
                last_seq = page.last_seq
            if not pages:
                return None
            if len(self._runs) >= RUNS:
                self._runs.clear()
            run = self._runs[seq] = Run(pages)
        return run.last_seq, run.page(message_id)

    def forget(self) -> None:
        self._pages.clear()
        self._runs.clear()
        self._weigh(-self._kept)

    def _weigh(self, cost: int) -> None:
        self._kept += cost
        LiveTail.all_kept += cost

    def wake(self) -> None:
        """Call all waiting readers, a few in each turn of the loop, so that they also get what arrives meanwhile."""
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
            self._runs.clear()
            self._to_send = 0
