"""What the scripts take and return, and its translation to states, entries, changes and problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ...app import (
    Append,
    Change,
    Chunk,
    Clear,
    Conflict,
    End,
    Entry,
    MessageEnd,
    MessageStatus,
    NotFound,
    Open,
    Problem,
    Record,
    State,
    Status,
    StoredChunk,
    ThreadSummary,
    TooLarge,
    Write,
    now_ms,
)


class ThreadRecord(Record, frozen=True):
    """A thread in its hash. ``ended`` is the status of the message that ended last.

    A thread that is gone may have nothing but its generation.
    """

    generation: int
    last_seq: int = 0
    version: int = 0
    active: int = 0  # messages
    message_count: int = 0
    chunk_count: int = 0
    size: int = 0
    created_at: int = 0
    updated_at: int = 0
    ended: Status = "completed"

    @property
    def status(self) -> Status:
        return "active" if self.active else self.ended

    def summary(self, thread_id: str) -> ThreadSummary:
        return ThreadSummary(
            thread_id, self.status, self.message_count, self.chunk_count, self.size, self.created_at, self.updated_at
        )


class MessageRecord(Record, frozen=True, omit_defaults=True):
    """A message in its thread's hash. ``number`` counts the thread's messages from 1.

    The hash leaves out what is None, as Lua takes a JSON null for true.
    """

    number: int
    status: Status
    chunk_count: int
    size: int
    created_at: int
    updated_at: int
    reason: str | None = None
    first_seq: int | None = None
    last_seq: int | None = None

    def summary(self, message_id: str) -> MessageStatus:
        fields = msgspec.structs.asdict(self)
        del fields["number"], fields["size"]
        return MessageStatus(message_id, **fields)


class Operation(Record, frozen=True):
    """A write. ``idle`` is for how many ms nobody may have touched its thread or message."""

    kind: str
    thread_id: str
    message_id: str = ""
    source: str = ""  # names the process that writes
    ttl: int = 0  # ms
    max_message: int = 0
    chunks: Sequence[Chunk] = ()
    sizes: Sequence[int] = ()
    index: int | None = None
    complete: bool = False
    generation: int | None = None
    status: Status | None = None
    reason: str | None = None
    idle: int | None = None


Answer = tuple[str, str, str, int, int]  # the outcome, the two records, the time, and a number

decode_publication = msgspec.msgpack.Decoder(tuple[Answer, Operation]).decode
decode_thread = msgspec.json.Decoder(ThreadRecord).decode
decode_message = msgspec.json.Decoder(MessageRecord).decode


def state_of(thread: bytes | str | None, message: bytes | str | None) -> State:
    """Return the state that two records show. An empty one does not exist."""
    if not thread:
        return State()
    of_thread = decode_thread(thread)
    known = (of_thread.generation, of_thread.last_seq, of_thread.active > 0)
    if not message:
        return State(*known, version=of_thread.version)
    of_message = decode_message(message)
    return State(
        *known,
        of_message.status,
        of_message.reason,
        of_message.chunk_count,
        of_message.size,
        of_message.first_seq,
        of_message.last_seq,
        of_message.updated_at,
        of_thread.version,
    )


def entry_of(raw: Any) -> Entry:
    """Decode an entry of a stream. Its fields always come in the same order."""
    identity, fields = raw
    seq, message_id = int(identity.partition(b"-")[2]), fields[1].decode()
    extra = fields[7].decode() if len(fields) > 6 else None
    if fields[4] == b"c":
        return StoredChunk(fields[5].decode(), int(fields[3]), message_id, seq, event=extra)
    return MessageEnd(message_id, fields[5].decode(), reason=extra, seq=seq)


KINDS = {Append: "append", Open: "open", End: "finish", Clear: "clear"}


def operation_of(write: Write, **common: Any) -> Operation:
    fields = msgspec.structs.asdict(write)
    untouched_since = fields.pop("untouched_since", None)
    # An age instead of a time, so that only Redis' clock counts.
    idle = None if untouched_since is None else now_ms() - untouched_since
    return Operation(KINDS[type(write)], **fields, idle=idle, **common)


REFUSALS: dict[str, Callable[[Operation, State, int], Problem]] = {
    "cleared": lambda asked, state, number: Conflict.cleared(),
    "no thread": lambda asked, state, number: NotFound.thread(asked.thread_id),
    "no message": lambda asked, state, number: NotFound.message(asked.thread_id, asked.message_id),
    "ended": lambda asked, state, number: Conflict.ended(asked.message_id, state),
    "gap": lambda asked, state, number: Conflict.gap(
        Append(asked.thread_id, asked.message_id, (), (), asked.index), state
    ),
    "differs": lambda asked, state, number: Conflict.other_chunk(asked.message_id, number, state),
    "goes on": lambda asked, state, number: Conflict.other_producer(asked.message_id, state),
    "too large": lambda asked, state, number: TooLarge.message(number, asked.max_message),
    "touched": lambda asked, state, number: Conflict(
        f"The message {asked.message_id!r} was appended to in the meantime."
    ),
}


def outcome_of(operation: Operation, answer: Answer) -> Change | Problem:
    """Return what an operation changed, or why it was refused."""
    outcome, thread, message, now, number = answer
    state, names = state_of(thread, message), (operation.thread_id, operation.message_id)
    if outcome in REFUSALS:
        return REFUSALS[outcome](operation, state, number)
    if outcome == "appended":
        size = sum(operation.sizes[number:])
        return Change(*names, state, now, operation.chunks[number:], size, ended=operation.complete)
    if outcome == "forgotten":
        return Change(operation.thread_id, "", state, now, cleared=True)
    return Change(*names, state, now, ended=outcome == "finished", made=outcome == "made")
