"""Hypothesis drives a buffer and a plain Python model of it, and compares what both say.

``TESTS_LONGER=100 pytest tests/test_model.py`` compares them a hundred times as long, on other examples each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
from buffers import follow, locate_text, pack
from conftest import generated
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from resume_stream import app
from resume_stream.app import Appended, Chunk, ChunkBuffer, MessageEnd, Problem, Settings, Signal, StoredChunk
from resume_stream.extras import packs

THREADS = st.sampled_from(["t", "ü"])
MESSAGES = st.sampled_from(["m", "n"])
TEXTS = st.text(alphabet=["a", "b", "\0", "\r", "\n", "é", "\u0301", "🌊"], max_size=4)
CHUNKS = st.lists(st.builds(Chunk, TEXTS, st.sampled_from([None, None, None, "tool"])), max_size=4)
WAIT = 3.0  # seconds after which something is missing
until = partial(conftest.until, seconds=WAIT)


# The model


class Refused(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class Message:
    def __init__(self) -> None:
        self.chunks: list[tuple[int, Chunk]] = []
        self.status, self.reason, self.end = "active", None, 0


class Thread:
    """``entries`` in sequence: (message_id, Chunk), or (message_id, (status, reason))."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any]] = []
        self.messages: dict[str, Message] = {}
        self.generation: int | None = None

    def take_place(self, message_id: str, entry: Any) -> int:
        self.entries.append((message_id, entry))
        return len(self.entries)

    def end(self, message_id: str, status: str, reason: str | None) -> int:
        message = self.messages[message_id]
        message.status, message.reason = status, reason
        message.end = self.take_place(message_id, (status, reason))
        return message.end

    def seen_by(self, message_id: str | None) -> list[tuple[int, str, Any]]:
        return [(seq, m, entry) for seq, (m, entry) in enumerate(self.entries, 1) if message_id in (None, m)]


class Model:
    def __init__(self) -> None:
        self.threads: dict[str, Thread] = {}

    def find(self, thread_id: str, message_id: str) -> tuple[Thread, Message]:
        thread = self.threads.get(thread_id)
        if thread is None or message_id not in thread.messages:
            raise Refused(404)
        return thread, thread.messages[message_id]

    def make(self, thread_id: str, message_id: str) -> tuple[Thread, Message]:
        thread = self.threads.setdefault(thread_id, Thread())
        return thread, thread.messages.setdefault(message_id, Message())

    def append(
        self, thread_id: str, message_id: str, chunks: list[Chunk], index: int | None, complete: bool
    ) -> tuple[int, int, str]:
        """Return (seq, chunk_count, status) of the expected answer. Raise Refused if it is an error."""
        try:
            _, message = self.find(thread_id, message_id)
        except Refused:
            message = Message()
        known = [chunk for _, chunk in message.chunks]
        skip = 0
        if index is not None:
            skip = min(len(chunks), len(known) - index)
            if index > len(known) or known[index : index + skip] != chunks[:skip]:
                raise Refused(409)
            if skip == len(chunks) > 0 and not complete:
                return message.chunks[index + skip - 1][0], index + skip, message.status
        if message.status != "active":
            is_its_end = index is not None and index + len(chunks) == len(known)
            if complete and message.status == "completed" and (is_its_end or not (chunks or index)):
                return message.end, len(known), "completed"
            raise Refused(409)
        thread, message = self.make(thread_id, message_id)
        for chunk in chunks[skip:]:
            message.chunks.append((thread.take_place(message_id, chunk), chunk))
        seq = message.chunks[-1][0] if message.chunks else 0
        if complete:
            seq = thread.end(message_id, "completed", None)
        return seq, len(message.chunks), message.status

    def end(self, thread_id: str, message_id: str, status: str, reason: str | None) -> tuple[int, int, str]:
        thread, message = self.find(thread_id, message_id)
        if message.status == "active":
            thread.end(message_id, status, reason)
        elif message.status != status:
            raise Refused(409)
        return message.end, len(message.chunks), status


# A reader that drops off, and comes back with what it has


class Reader:
    def __init__(self, thread_id: str, message_id: str | None) -> None:
        self.thread_id, self.message_id = thread_id, message_id
        self.got: list[tuple[int, str, Any]] = []
        self.cursor: str | None = None
        self.gone = self.missing = False
        self.task: asyncio.Task[None] | None = None

    async def follow(self, buffer: ChunkBuffer) -> None:
        self.gone = self.missing = False
        wait = self.message_id is None
        items = follow(
            buffer, self.thread_id, self.message_id, after=self.cursor, follow=wait, idle_timeout=0, heartbeat=0
        )
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    self.take(item)
        except app.NotFound:
            self.missing = True

    def take(self, item: Any) -> None:
        if item is Signal.RESET:
            self.got = []
        elif item is Signal.GONE:
            self.gone = True
        else:
            assert not isinstance(item, Signal)
            self.got += map(plain, item.entries)
            self.cursor = f"{item.generation}-{item.entries[-1].seq}"

    @property
    def told(self) -> bool:
        """True if the reader was told that its thread or message is gone."""
        return self.gone or self.missing

    @property
    def has_left(self) -> bool:
        """True if the reader left as it should: it was told to, or its message ended. A follower of a thread stays."""
        return self.told or (self.message_id is not None and self.task.done())

    async def drop(self) -> None:
        if self.task:
            self.task.cancel()
            (error,) = await asyncio.gather(self.task, return_exceptions=True)
            self.task = None
            if isinstance(error, Exception):
                raise error


def plain(entry: StoredChunk | MessageEnd) -> tuple[int, str, Any]:
    if isinstance(entry, MessageEnd):
        return entry.seq, entry.message_id, (entry.status, entry.reason)
    return entry.seq, entry.message_id, Chunk(entry.content, entry.event)


class BufferIsLikeItsModel(RuleBasedStateMachine):
    address = staticmethod(str)  # of an empty store: a SQLite file

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        db = str(Path(self.folder.name) / "chunks.db")
        self.settings = Settings(db=db, store=self.address(), synchronous="NORMAL")
        self.runner = asyncio.Runner()
        self.model = Model()
        self.generation = 0
        self.readers: list[Reader] = []

    @initialize()
    def begin(self) -> None:
        self.buffer = ChunkBuffer(self.settings)
        self.runner.run(self.buffer.__aenter__())
        for message_id in (None, "m", "n"):
            self.come("t", message_id)

    def teardown(self) -> None:
        try:
            self.everyone_has_everything()
            self.what_is_stored_is_what_was_said()
        finally:
            self.runner.run(self.close())
            self.runner.close()
            self.folder.cleanup()

    async def close(self) -> None:
        tasks = [reader.task for reader in self.readers if reader.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.buffer.__aexit__(None, None, None)

    def same(self, call: Any, expected: Any) -> None:
        """Check that the call is answered or refused as the model says."""
        try:
            wants = expected()
        except Refused as refused:
            wants = refused.status
        self.same_as(self.runner.run(outcome(call)), wants)

    @staticmethod
    def same_as(got: Any, wants: Any) -> None:
        if isinstance(got, Problem):
            got = got.status_code
        elif isinstance(got, Appended):
            got = got.seq, got.chunk_count, got.status
        assert got == wants, (got, wants)

    # Producers

    @rule(thread_id=THREADS, message_id=MESSAGES)
    def open_message(self, thread_id: str, message_id: str) -> None:
        def expected() -> Any:
            _, message = self.model.make(thread_id, message_id)
            seq = message.end or (message.chunks[-1][0] if message.chunks else 0)
            return seq, len(message.chunks), message.status

        self.same(first(self.buffer.open_message(thread_id, message_id)), expected)

    @rule(thread_id=THREADS, message_id=MESSAGES, chunks=CHUNKS, complete=st.sampled_from([False, False, True]))
    def append(self, thread_id: str, message_id: str, chunks: list[Chunk], complete: bool) -> None:
        self.same(
            self.buffer.add_chunks(thread_id, message_id, chunks, complete=complete),
            lambda: self.model.append(thread_id, message_id, chunks, None, complete),
        )

    @rule(
        thread_id=THREADS,
        message_id=MESSAGES,
        again=st.integers(0, 3),
        chunks=CHUNKS,
        gap=st.sampled_from([0, 0, 0, 1]),
        spoil=st.sampled_from([False, False, False, True]),
        complete=st.booleans(),
    )
    def retry(
        self, thread_id: str, message_id: str, again: int, chunks: list[Chunk], gap: int, spoil: bool, complete: bool
    ) -> None:
        """Send the last chunks again, and more after them, or others, or with a gap."""
        thread = self.model.threads.get(thread_id, Thread())
        known = [chunk for _, chunk in thread.messages.get(message_id, Message()).chunks]
        again = min(again, len(known))
        index = len(known) - again + gap
        sent = [*known[len(known) - again :], *chunks][gap:]
        if spoil and sent:
            sent[0] = Chunk(sent[0].content + "!", sent[0].event)
        self.same(
            self.buffer.add_chunks(thread_id, message_id, sent, index=index, complete=complete),
            lambda: self.model.append(thread_id, message_id, sent, index, complete),
        )

    @rule(thread_id=THREADS, appends=st.lists(st.tuples(MESSAGES, CHUNKS), min_size=2, max_size=6))
    def append_at_the_same_time(self, thread_id: str, appends: list[tuple[str, list[Chunk]]]) -> None:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(
                *(outcome(self.buffer.add_chunks(thread_id, m, chunks)) for m, chunks in appends)
            )

        for got, (message_id, chunks) in zip(self.runner.run(all_of_them()), appends, strict=True):
            try:
                wants: Any = self.model.append(thread_id, message_id, chunks, None, False)
            except Refused as refused:
                wants = refused.status
            self.same_as(got, wants)

    @rule(thread_id=THREADS, message_id=MESSAGES, reason=st.sampled_from([False, None, "stop"]))
    def end(self, thread_id: str, message_id: str, reason: Any) -> None:
        if reason is False:
            call = self.buffer.complete_message(thread_id, message_id)
            self.same(call, lambda: self.model.end(thread_id, message_id, "completed", None))
        else:
            call = self.buffer.abort_message(thread_id, message_id, reason)
            self.same(call, lambda: self.model.end(thread_id, message_id, "aborted", reason))

    @rule(thread_id=THREADS)
    def clear(self, thread_id: str) -> None:
        is_there = self.model.threads.pop(thread_id, None) is not None
        self.same(self.buffer.clear_thread_buffer(thread_id), lambda: None if is_there else 404)

    # Readers

    @rule(thread_id=THREADS, message_id=st.one_of(st.none(), MESSAGES))
    def come(self, thread_id: str, message_id: str | None) -> None:
        if len(self.readers) < 6:
            self.readers.append(reader := Reader(thread_id, message_id))
            self.runner.run(self.connect(reader))

    async def connect(self, reader: Reader) -> None:
        reader.task = asyncio.create_task(reader.follow(self.buffer))
        await asyncio.sleep(0)

    @precondition(lambda self: self.readers)
    @rule(number=st.integers(0, 5), moments=st.integers(0, 6))
    def drop_off_and_come_back(self, number: int, moments: int) -> None:
        async def drop_and_connect() -> None:
            for _ in range(moments):
                await asyncio.sleep(0)
            await reader.drop()
            await self.connect(reader)

        reader = self.readers[number % len(self.readers)]
        self.runner.run(drop_and_connect())

    @rule()
    def everyone_has_everything(self) -> None:
        """Check every reader. Those whose thread was cleared come back with their old cursor."""

        async def settle(reader: Reader) -> None:
            thread = self.model.threads.get(reader.thread_id)
            is_there = thread is not None and reader.message_id in (None, *thread.messages)
            if not is_there:
                # A follower of a thread that does not exist yet waits, and has nothing.
                await until(lambda: reader.has_left or (reader.message_id is None and reader.got == []))
                return
            await until(lambda: reader.has_left or reader.got == thread.seen_by(reader.message_id))
            if reader.told or reader.got != thread.seen_by(reader.message_id):
                await reader.drop()
                await self.connect(reader)
                await until(lambda: not reader.told and reader.got == thread.seen_by(reader.message_id))

        for reader in self.readers:
            try:
                self.runner.run(settle(reader))
            except TimeoutError:
                thread = self.model.threads.get(reader.thread_id)
                raise AssertionError((reader.got, thread and thread.seen_by(reader.message_id))) from None

    @rule(
        thread_id=THREADS,
        message_id=MESSAGES,
        start=st.integers(0, 12),
        length=st.integers(0, 12),
        other=st.sampled_from(["", "", "?"]),
    )
    def resume_by_content(self, thread_id: str, message_id: str, start: int, length: int, other: str) -> None:
        thread = self.model.threads.get(thread_id, Thread())
        message = thread.messages.get(message_id, Message())
        text = "".join(chunk.content for _, chunk in message.chunks)
        start = start % (len(text) + 1) if start > 6 else 0  # more often a prefix
        known = text[start : start + length] + other
        got = self.runner.run(outcome(self.all_after(thread_id, message_id, known, message)))
        if message_id not in thread.messages:
            self.same_as(got, 404)
            return
        occurrences = sum(text.startswith(known, place) for place in range(len(text) + 1))
        has_place = text.startswith(known) or occurrences == 1
        place = (0 if text.startswith(known) else text.index(known)) + len(known) if has_place else 0
        assert (got[:1] == [Signal.RESET]) == (not has_place)
        entries = [plain(item) for item in got if not isinstance(item, Signal)]
        assert "".join(entry.content for _, _, entry in entries if isinstance(entry, Chunk)) == text[place:]
        assert [seq for seq, _, _ in entries] == [seq for seq, _, _ in thread.seen_by(message_id)][
            -len(entries) or 999 :
        ]
        if message.end:
            assert entries[-1] == (message.end, message_id, (message.status, message.reason))

    async def all_after(self, thread_id: str, message_id: str, known: str, message: Message) -> list[Any]:
        """Read to the end, or to the last chunk of an active message."""
        last = message.end or (message.chunks[-1][0] if message.chunks else 0)
        got: list[Any] = []
        position = await locate_text(self.buffer, thread_id, message_id, known)
        if position.reset:
            got.append(Signal.RESET)
        if position.after >= last:
            return got
        items = self.buffer.resume_stream(thread_id, message_id, known, idle_timeout=WAIT)
        async with contextlib.aclosing(items):
            async for item in items:
                assert item is not Signal.TIMEOUT
                if isinstance(item, Signal):
                    assert got == [item]
                    continue
                got.append(item)
                if item.seq == last:
                    break
        return got

    # The service

    @rule()
    def pack(self) -> None:
        """Pack everything that has ended, in packs of up to three chunks."""
        with pytest.MonkeyPatch.context() as context:
            context.setattr(packs, "LEAST_PACKED", 1)
            context.setattr(packs, "PACK_ROWS", 3)
            self.runner.run(pack(self.buffer))

    @rule()
    def restart(self) -> None:
        """Restart the buffer. Readers lose their connections without an end, and come back."""

        async def again() -> None:
            tasks = [reader.task for reader in self.readers if reader.task]
            await self.buffer.__aexit__(None, None, None)
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                if error and not isinstance(error, app.Unavailable):  # the reader came during the stop
                    raise error
            self.buffer = ChunkBuffer(self.settings)
            await self.buffer.__aenter__()
            for reader in self.readers:
                await self.connect(reader)

        self.runner.run(again())

    @rule()
    def what_is_stored_is_what_was_said(self) -> None:
        page = self.runner.run(self.buffer.get_threads())
        assert {thread.thread_id for thread in page.threads} == self.model.threads.keys()
        for thread_id, thread in self.model.threads.items():
            found = self.runner.run(self.buffer.get_chunks(thread_id, limit=10_000))
            assert sorted(map(plain, [*found.chunks, *found.ends]), key=lambda entry: entry[0]) == thread.seen_by(None)
            generation = int(found.cursor.split("-")[0])
            if thread.generation is None:
                assert generation > self.generation
                thread.generation = generation
            self.generation = max(generation, self.generation)
            assert found.cursor == f"{thread.generation}-{len(thread.entries)}"
            status = self.runner.run(self.buffer.get_thread_status(thread_id))
            assert {m.message_id: (m.status, m.reason, m.chunk_count) for m in status.messages} == {
                message_id: (message.status, message.reason, len(message.chunks))
                for message_id, message in thread.messages.items()
            }
            ended_last = max(thread.messages.values(), key=lambda message: message.end)
            is_active = any(message.status == "active" for message in thread.messages.values())
            assert status.status == ("active" if is_active else ended_last.status)
            content = self.runner.run(self.buffer.get_accumulated_content(thread_id)).content
            said = [chunk.content for message in thread.messages.values() for _, chunk in message.chunks]
            assert content == "".join(said)


async def outcome(call: Any) -> Any:
    try:
        return await call
    except Problem as problem:
        return problem


async def first(call: Any) -> Any:
    return (await call)[0]


STORES = ("sqlite", "sqlite-in-thread", "redis")


def test_the_buffer_is_like_its_model(store: Callable[[], str]) -> None:
    class OnThisStore(BufferIsLikeItsModel):
        address = staticmethod(store)

    run_state_machine_as_test(
        OnThisStore,
        settings=generated(
            25 if store is str else 10,
            stateful_step_count=30,
            phases=[Phase.generate],  # to shrink a case that waits in vain would take minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
