"""Threads in Redis Streams (``--store redis://…``), for any number of processes, none of which owns anything.

A thread is four keys that expire together: ``rs:{thread}:entries`` is a stream whose ids are our cursors,
``rs:{thread}:state`` a hash of JSON (the thread's own under the empty name, each message under its id),
``rs:{thread}:messages`` a list of these ids in the order they began, and ``rs:{thread}:marks`` says where every
64th chunk of a message is. Four keys belong to all threads: ``rs:clock``,
the latest generation; ``rs:threads``, their ids by generation; ``rs:expiries``, their ids by when they expire;
``rs:active``, the active messages by when somebody appended to them. Each write is one run of a script, which
also publishes it on the channel of its thread. One Redis, or a primary with its replicas; no cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import secrets
from collections import Counter as Multiset
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from resume_stream import (
    CHUNK_WEIGHT,
    PAGE_BYTES,
    Append,
    Change,
    Chunk,
    Clear,
    Conflict,
    Cursor,
    DatabaseFull,
    Entry,
    GroupCommit,
    MessageEnd,
    MessageStatus,
    NotFound,
    Open,
    Page,
    Place,
    Problem,
    Record,
    Settings,
    StartupError,
    State,
    Status,
    Stopping,
    Store,
    StoredChunk,
    ThreadPage,
    ThreadStatus,
    ThreadSummary,
    Told,
    Unavailable,
    Write,
    another_goes_on,
    another_is_stored,
    bytes_known,
    check_exists,
    message_ended,
    message_too_large,
    no_message,
    no_thread,
    now_ms,
    thread_cleared,
    would_leave_a_gap,
)

T = TypeVar("T")
log = logging.getLogger("resume_stream")

REDIS_VERSION = 7  # the first whose scripts are all or nothing where memory is full
ANSWERS_WITHIN = 5.0  # seconds, after which what was asked for may have happened or not
CONNECTS_WITHIN = 2.0
CONNECTIONS = 16  # for what is soon read
HEAVY_CONNECTIONS = 4  # for what may take long
LISTENS_EVERY = 0.4  # seconds between signs of life, and looks for what has expired
SILENT_FOR = 2.0  # seconds after which a connection that has to say something is taken for lost
RETRY_PAUSE = 0.2
MARK_EVERY = 64  # chunks of a message
SCANNED = 2048  # entries that one run of a script looks at
TEXT_BYTES = 1024**2  # what one run of a script returns of a message's text
PUBLISHED_BYTES = 256 * 1024  # past this the text itself is left to be read
THREADS_AT_ONCE = 500
STAGED_FOR = 3600  # seconds that a half copied thread is kept
PARTS = ("state", "entries", "messages", "marks")
MESSAGES_AT_ONCE = 1_000

TIME = "redis.call('TIME')"

COMMON = """
local op = cmsgpack.unpack(ARGV[1])
local STATE, ENTRIES, MESSAGES, MARKS, CLOCK, THREADS, EXPIRIES, ACTIVE = unpack(KEYS)
local time = {TIME}
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local thread, message

local function id(seq)
    return string.format('%.0f-%.0f', thread.generation, seq)
end

local function seq_of(entry)
    return tonumber(string.match(entry[1], '-(%d+)$'))
end
"""

WRITE = """
local member = op.threadId .. '/' .. op.messageId

local function record(field)
    local text = redis.call('HGET', STATE, field)
    return text and cjson.decode(text) or nil
end

local function answer(outcome, number)
    return {outcome, thread and cjson.encode(thread) or '', message and cjson.encode(message) or '', now, number or 0}
end

local function published(said)
    local asked = ARGV[1]
    if #asked > op.publishedBytes then
        op.chunks = nil
        asked = cmsgpack.pack(op)
    end
    redis.call('PUBLISH', ARGV[2], '\\146' .. cmsgpack.pack(said) .. asked) -- an array of these two
    return said
end

local function saved(outcome, number)
    thread.updatedAt, thread.version = now, thread.version + 1
    local said = answer(outcome, number)
    redis.call('HSET', STATE, '', said[2], op.messageId, said[3])
    for _, key in ipairs({STATE, ENTRIES, MESSAGES, MARKS}) do
        redis.call('PEXPIREAT', key, now + op.ttl)
    end
    redis.call('ZADD', EXPIRIES, now + op.ttl, op.threadId)
    if message.status == 'active' then
        redis.call('ZADD', ACTIVE, message.updatedAt, member)
    else
        redis.call('ZREM', ACTIVE, member)
    end
    return published(said)
end

local function make()
    if message then return end
    if not thread then
        local generation = math.max((tonumber(redis.call('GET', CLOCK) or 0)) + 1, now)
        redis.call('SET', CLOCK, generation)
        redis.call('ZADD', THREADS, generation, op.threadId)
        thread = {generation = generation, lastSeq = 0, version = 0, active = 0, messageCount = 0, chunkCount = 0,
                  size = 0, createdAt = now}
    end
    thread.active, thread.messageCount = thread.active + 1, thread.messageCount + 1
    redis.call('RPUSH', MESSAGES, op.messageId)
    message = {number = thread.messageCount, status = 'active', chunkCount = 0, size = 0, createdAt = now,
               updatedAt = now}
end

local function add(...)
    thread.lastSeq = thread.lastSeq + 1
    redis.call('XADD', ENTRIES, id(thread.lastSeq), 'm', op.messageId, 't', now, ...)
    message.firstSeq, message.lastSeq, message.updatedAt = message.firstSeq or thread.lastSeq, thread.lastSeq, now
end

local function finish(status, reason)
    message.status, message.reason = status, reason
    if reason then add('s', status, 'r', reason) else add('s', status) end
    thread.active, thread.ended = thread.active - 1, status
end

-- The places of those of the chunks that are stored already, and the number of one that is stored otherwise.
local function compare()
    local places, wanted = {}, math.min(#op.chunks, message.chunkCount - op.index)
    local block = math.floor(op.index / op.markEvery)
    local number, at = block * op.markEvery, tonumber(redis.call('HGET', MARKS, message.number .. ':' .. block))
    while #places < wanted do
        local entries = redis.call('XRANGE', ENTRIES, id(at), id(message.lastSeq), 'COUNT', op.markEvery)
        for _, entry in ipairs(entries) do
            local fields = entry[2]
            at = seq_of(entry) + 1
            if fields[2] == op.messageId and fields[5] == 'c' and #places < wanted then
                if number >= op.index then
                    local chunk = op.chunks[#places + 1]
                    if fields[6] ~= chunk.content or fields[8] ~= chunk.event then return places, number end
                    places[#places + 1] = at - 1
                end
                number = number + 1
            end
        end
        if #entries == 0 then error('entries are missing') end
    end
    return places
end

local kinds = {}

function kinds.open()
    if message then
        if message.status == 'active' then message.updatedAt = now end
        return saved('open')
    end
    make()
    return saved('made')
end

function kinds.append()
    if op.generation and op.generation ~= (thread and thread.generation or 0) then return answer('cleared') end
    local had, ended = message and message.chunkCount or 0, message and message.status ~= 'active'
    local places, differs = {}, nil
    if op.index and op.index > had then return answer(ended and 'ended' or 'gap') end
    if op.index and op.index < had then places, differs = compare() end
    if differs then return answer('differs', differs) end
    local count = op.index and op.index + #op.chunks or had
    if #places > 0 and #places == #op.chunks and not op.complete then return answer('again', places[#places]) end
    if ended then
        local is_retry = op.complete and (op.index or #op.chunks == 0)
        local is_same = is_retry and message.status == 'completed' and message.chunkCount == count
        return answer(is_same and 'same' or 'ended')
    end
    if op.complete and count < had then return answer('goes on') end
    local size = message and message.size or 0
    for number = #places + 1, #op.chunks do size = size + op.sizes[number] end
    local weight = size + op.chunkWeight * (had + #op.chunks - #places)
    if weight > op.maxMessage then return answer('too large', weight) end
    make()
    for number = #places + 1, #op.chunks do
        local chunk = op.chunks[number]
        if chunk.event then add('c', chunk.content, 'e', chunk.event) else add('c', chunk.content) end
        if message.chunkCount % op.markEvery == 0 then
            redis.call('HSET', MARKS, message.number .. ':' .. message.chunkCount / op.markEvery, thread.lastSeq)
        end
        message.chunkCount, thread.chunkCount = message.chunkCount + 1, thread.chunkCount + 1
    end
    thread.size, message.size, message.updatedAt = thread.size + size - message.size, size, now
    if op.complete then finish('completed') end
    return saved('appended', #places)
end

function kinds.finish()
    if not thread then return answer('no thread') end
    if not message then
        redis.call('ZREM', ACTIVE, member)
        return answer('no message')
    end
    if message.status == op.status then return answer('same') end
    if message.status ~= 'active' then return answer('ended') end
    if op.idle and message.updatedAt > now - op.idle then return answer('touched') end
    finish(op.status, op.reason)
    return saved('finished')
end

function kinds.clear()
    if not thread or (op.idle and thread.updatedAt > now - op.idle) then return answer('no thread') end
    for _, name in ipairs(thread.active > 0 and redis.call('HKEYS', STATE) or {}) do
        redis.call('ZREM', ACTIVE, op.threadId .. '/' .. name)
    end
    redis.call('UNLINK', STATE, ENTRIES, MESSAGES, MARKS)
    redis.call('ZREM', THREADS, op.threadId)
    redis.call('ZREM', EXPIRIES, op.threadId)
    message = nil
    return published(answer('forgotten'))
end

thread = record('')
if op.messageId ~= '' then message = record(op.messageId) end
return kinds[op.kind]()
"""

READ = """
local texts = redis.call('HMGET', STATE, '', op.messageId or '')
if not texts[1] or (op.generation and cjson.decode(texts[1]).generation ~= op.generation) then
    return {'', '', 0, {}, 0}
end
thread = cjson.decode(texts[1])
local last = thread.lastSeq
if op.messageId then last = texts[2] and cjson.decode(texts[2]).lastSeq or 0 end
local at, last, found, size, scanned, skip = op.after, math.min(last, op.upTo or last), {}, 0, 0, op.skip or 0
local step = math.max(math.min(math.floor(op.bytes / (thread.size / math.max(thread.lastSeq, 1) + 1)), 512), 1)
while at < last and #found < op.limit and size < op.bytes and scanned < op.scanned do
    local entries = redis.call('XRANGE', ENTRIES, id(at + 1), id(last), 'COUNT', step)
    if #entries == 0 then break end
    for _, entry in ipairs(entries) do
        local fields = entry[2]
        at, scanned = seq_of(entry), scanned + 1
        local is_chunk = fields[5] == 'c'
        if (not op.messageId or fields[2] == op.messageId) and (is_chunk or not op.textOnly) then
            if skip > 0 then
                skip = skip - 1
            else
                found[#found + 1] = op.textOnly and fields[6] or entry
                if is_chunk then size = size + #fields[6] end
            end
        end
        if #found >= op.limit or size >= op.bytes then break end
    end
end
return {texts[1], op.messageId and texts[2] or '', at, op.textOnly and table.concat(found) or found, skip}
"""

LIST = """
local names = redis.call('LRANGE', MESSAGES, op.first, op.last)
return {redis.call('HGET', STATE, '') or '', names, #names > 0 and redis.call('HMGET', STATE, unpack(names)) or {}}
"""

IDLE = """
return redis.call('ZRANGEBYSCORE', ACTIVE, '-inf', now - op.idle, 'LIMIT', 0, 1000)
"""

# What was found expired, each with the generation that it had. Of the active messages only some are
# looked at, as those whose thread has expired are rare: few are left over, and none for long.
REAP = """
local gone = {}
for _, expired in ipairs(redis.call('ZRANGEBYSCORE', EXPIRIES, '-inf', now, 'LIMIT', 0, 100)) do
    local expires = redis.call('PEXPIRETIME', ARGV[2] .. '{' .. expired .. '}:state')
    if expires == -2 then
        local generation = redis.call('ZSCORE', THREADS, expired)
        redis.call('ZREM', THREADS, expired)
        redis.call('ZREM', EXPIRIES, expired)
        if generation then
            local forgotten = {'forgotten', cjson.encode({generation = tonumber(generation)}), '', now, 0}
            local asked = {kind = 'expire', threadId = expired, source = ''}
            redis.call('PUBLISH', ARGV[3] .. expired, '\\146' .. cmsgpack.pack(forgotten) .. cmsgpack.pack(asked))
            gone[#gone + 1] = expired
        end
    elseif expires > now then
        redis.call('ZADD', EXPIRIES, expires, expired)
    end
end
for _, member in ipairs(redis.call('ZRANDMEMBER', ACTIVE, 10)) do
    local place = string.find(member, '/', 1, true)
    local state = ARGV[2] .. '{' .. string.sub(member, 1, place - 1) .. '}:state'
    if redis.call('HEXISTS', state, string.sub(member, place + 1)) == 0 then redis.call('ZREM', ACTIVE, member) end
end
return #gone
"""


# What was put beside a thread's keys becomes the thread, unless it is there and has gone on.
ADOPT = """
local text = redis.call('HGET', STATE, '')
local there = text and cjson.decode(text)
local staged = {KEYS[9], KEYS[10], KEYS[11], KEYS[12]}
if there then
    local is_later = there.generation == op.generation and there.lastSeq > op.lastSeq
    if is_later or there.generation > op.generation then
        redis.call('UNLINK', unpack(staged))
        return 0
    end
    for _, name in ipairs(there.active > 0 and redis.call('HKEYS', STATE) or {}) do
        redis.call('ZREM', ACTIVE, op.threadId .. '/' .. name)
    end
    redis.call('UNLINK', STATE, ENTRIES, MESSAGES, MARKS)
    if there.generation < op.generation then
        local forgotten = {'forgotten', cjson.encode({generation = there.generation}), '', now, 0}
        local asked = {kind = 'clear', threadId = op.threadId, source = ''}
        redis.call('PUBLISH', ARGV[2], '\\146' .. cmsgpack.pack(forgotten) .. cmsgpack.pack(asked))
    end
end
for place, key in ipairs({STATE, ENTRIES, MESSAGES, MARKS}) do
    if redis.call('EXISTS', staged[place]) == 1 then
        redis.call('RENAME', staged[place], key)
        redis.call('PEXPIREAT', key, op.expires)
    end
end
redis.call('SET', CLOCK, math.max(tonumber(redis.call('GET', CLOCK) or 0), op.generation))
redis.call('ZADD', THREADS, op.generation, op.threadId)
redis.call('ZADD', EXPIRIES, op.expires, op.threadId)
for name, updated_at in pairs(op.active) do
    redis.call('ZADD', ACTIVE, updated_at, op.threadId .. '/' .. name)
end
redis.call('HSET', KEYS[13], op.threadId, op.generation)
redis.call('PEXPIRE', KEYS[13], op.ttl)
return 1
"""


class Script(NamedTuple):
    source: bytes
    sha: str

    @classmethod
    def of(cls, flags: str, body: str) -> Script:
        source = f"#!lua{flags}{COMMON.replace('{TIME}', TIME)}{body}".encode()
        return cls(source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


class ThreadRecord(Record, frozen=True):
    """A thread as its hash has it, under the empty name."""

    generation: int = 0
    last_seq: int = 0
    version: int = 0
    active: int = 0  # messages
    message_count: int = 0
    chunk_count: int = 0
    size: int = 0
    created_at: int = 0
    updated_at: int = 0
    ended: Status = "completed"  # how the message ended that did so last

    @property
    def status(self) -> Status:
        return "active" if self.active else self.ended

    def summary(self, thread_id: str) -> ThreadSummary:
        return ThreadSummary(
            thread_id, self.status, self.message_count, self.chunk_count, self.size, self.created_at, self.updated_at
        )


class MessageRecord(Record, frozen=True):
    """A message as its thread's hash has it; ``number`` counts the thread's messages from 1."""

    number: int
    status: Status
    chunk_count: int
    size: int
    created_at: int
    updated_at: int
    reason: str | None = None
    first_seq: int | None = None
    last_seq: int | None = None


class Operation(Record, frozen=True):
    """What a script is asked to do. Times are ms; ``idle`` is how long nobody may have touched it."""

    kind: str
    thread_id: str = ""
    message_id: str = ""
    source: str = ""
    ttl: int = 0
    max_message: int = 0
    chunk_weight: int = CHUNK_WEIGHT
    mark_every: int = MARK_EVERY
    published_bytes: int = PUBLISHED_BYTES
    chunks: Sequence[Chunk] = ()
    sizes: Sequence[int] = ()
    index: int | None = None
    complete: bool = False
    generation: int | None = None
    status: Status | None = None
    reason: str | None = None
    idle: int | None = None


class Adoption(Record, frozen=True):
    """A thread that was put beside its keys; ``active`` are its active messages, by when they were appended to."""

    thread_id: str
    generation: int
    last_seq: int
    expires: int
    ttl: int
    active: dict[str, int]


class Listing(Record, frozen=True):
    """Which messages a script is asked for."""

    first: int
    last: int


class Reading(Record, frozen=True):
    """Which entries a script is asked for: of one message or all, after ``after``, up to ``up_to``."""

    message_id: str | None = None
    generation: int | None = None
    after: int = 0
    up_to: int | None = None
    limit: int = SCANNED
    bytes: int = PAGE_BYTES
    scanned: int = SCANNED
    text_only: bool = False
    skip: int = 0  # of those found


PageKey = tuple[str, str | None, int, int]
Apart = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
Answer = tuple[str, str, str, int, int]  # the outcome, the two records, the time, and a number

encode = msgspec.msgpack.Encoder().encode
decode_publication = msgspec.msgpack.Decoder(tuple[Answer, Operation]).decode
decode_thread = msgspec.json.Decoder(ThreadRecord).decode
decode_message = msgspec.json.Decoder(MessageRecord).decode


def store_for(settings: Settings) -> Store:
    """Raises StartupError."""
    return RedisStore(settings)


def state_of(thread: ThreadRecord, message: MessageRecord | None) -> State:
    """The two records as everybody else knows them."""
    known = (thread.generation, thread.last_seq, thread.active > 0)
    if message is None:
        return State(*known, version=thread.version)
    return State(
        *known,
        message.status,
        message.reason,
        message.chunk_count,
        message.size,
        message.first_seq,
        message.last_seq,
        message.updated_at,
        thread.version,
    )


def state_from(thread: bytes | str | None, message: bytes | str | None) -> State:
    """From JSON; empty or None is not there."""
    if not thread:
        return State()
    return state_of(decode_thread(thread), decode_message(message) if message else None)


def records_of(thread: ThreadStatus, sizes: Multiset[str]) -> tuple[bytes, dict[str, bytes]]:
    """A thread and its messages as their hash has them; what is None is left out, as Lua takes null for true."""

    def encoded(record: Record) -> bytes:
        members = msgspec.to_builtins(record)
        return msgspec.json.encode({name: value for name, value in members.items() if value is not None})

    cursor = Cursor.parse(thread.cursor)
    ended = [message for message in thread.messages if message.status != "active"]
    record = ThreadRecord(
        cast(int, cursor.generation),
        cursor.seq,
        1,
        len(thread.messages) - len(ended),
        len(thread.messages),
        sum(message.chunk_count for message in thread.messages),
        sum(sizes.values()),
        thread.created_at,
        thread.updated_at,
        max(ended, key=lambda message: message.last_seq or 0).status if ended else "completed",
    )
    messages = {
        m.message_id: MessageRecord(
            number,
            m.status,
            m.chunk_count,
            sizes[m.message_id],
            m.created_at,
            m.updated_at,
            m.reason,
            m.first_seq,
            m.last_seq,
        )
        for number, m in enumerate(thread.messages, 1)
    }
    return encoded(record), {name: encoded(message) for name, message in messages.items()}


def change_of(operation: Operation, answer: Answer) -> Change:
    """What an operation did that was not refused."""
    outcome, thread, message, now, number = answer
    state, names = state_from(thread, message), (operation.thread_id, operation.message_id)
    if outcome == "again":
        count = cast(int, operation.index) + len(operation.chunks)
        return Change(*names, msgspec.structs.replace(state, last=number, chunk_count=count), now)
    if outcome == "appended":
        size = sum(operation.sizes[number:])
        return Change(*names, state, now, operation.chunks[number:], size, ended=operation.complete)
    if outcome == "forgotten":
        return Change(operation.thread_id, "", state, now, cleared=True)
    return Change(*names, state, now, ended=outcome == "finished", made=outcome == "made")


def refusal_of(operation: Operation, answer: Answer) -> Problem | None:
    """Why an operation did nothing."""
    outcome, thread, message, _, number = answer
    state, thread_id, message_id = state_from(thread, message), operation.thread_id, operation.message_id
    refusals: dict[str, Callable[[], Problem]] = {
        "cleared": thread_cleared,
        "no thread": lambda: no_thread(thread_id),
        "no message": lambda: no_message(thread_id, message_id),
        "ended": lambda: message_ended(message_id, state),
        "gap": lambda: would_leave_a_gap(Append(thread_id, message_id, (), (), operation.index), state),
        "differs": lambda: another_is_stored(message_id, number, state),
        "goes on": lambda: another_goes_on(message_id, state),
        "too large": lambda: message_too_large(number, operation.max_message),
        "touched": lambda: Conflict(f"The message {message_id!r} was appended to in the meantime."),
    }
    return refusals[outcome]() if outcome in refusals else None


def entry_of(raw: Any) -> Entry:
    """An entry of a stream, whose fields are always in the same order."""
    identity, fields = raw
    seq, message_id = int(identity.partition(b"-")[2]), fields[1].decode()
    if fields[4] == b"c":
        event = fields[7].decode() if len(fields) > 6 else None
        return StoredChunk(fields[5].decode(), int(fields[3]), message_id, seq, event)
    return MessageEnd(message_id, fields[5].decode(), fields[7].decode() if len(fields) > 6 else None, seq)


def redis_problem(error: Exception) -> Problem:
    """What went wrong, for the one who asked for what did not happen."""
    if isinstance(error, exceptions.OutOfMemoryError):
        return DatabaseFull("Redis' memory is full (maxmemory); free some and retry.")
    if isinstance(error, exceptions.ReadOnlyError):
        return Unavailable("This Redis is a replica, which takes no writes; retry once the service has its primary.")
    if isinstance(error, exceptions.BusyLoadingError):
        return Unavailable("Redis is loading its data; retry once it has.")
    if isinstance(error, exceptions.TimeoutError):
        return Unavailable("Redis does not answer; retry once it does.")
    if isinstance(error, (exceptions.ConnectionError, OSError)):
        return Unavailable(f"Redis cannot be reached ({error}); retry once it is back.")
    return Unavailable(f"Redis cannot be used ({error}); mend the cause and retry.")


class OutcomeUnknown(Exception):
    """The connection was lost, or Redis fell silent, after it was asked to write."""


def unknown_outcome(error: Exception) -> Unavailable:
    return Unavailable(
        f"Redis did not answer ({error}), so nobody knows whether this was stored; send it again, with its index, to"
        " have it stored once."
    )


FAILURES = (exceptions.RedisError, OSError)


@contextlib.contextmanager
def redis_problems() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise redis_problem(error) from error


class Line:
    """One connection, made when it is needed: what is asked on it is answered in order, and never asked twice."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._connection: AbstractConnection | None = None

    async def transaction(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What each of the commands answered, all run with nothing in between; an error is an answer.

        Raises OutcomeUnknown where they may have been run, FAILURES where they have not.
        """
        answers = await self.ask([("MULTI",), *commands, ("EXEC",)])
        if isinstance(answers[-1], Exception):
            raise next(answer for answer in answers if isinstance(answer, Exception))
        return cast(list[Any], answers[-1])

    async def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """As ``transaction``, but one command after the other, as they are."""
        if self._connection is None:
            self._connection = cast(Any, self._pool).make_connection()
        connection: AbstractConnection = self._connection
        answers: list[Any] = []
        asked = False
        try:
            await cast(Any, connection).connect()
            packed = connection.pack_commands(commands)
            asked = True
            await connection.send_packed_command(packed, check_health=False)
            for _ in commands:
                try:
                    answers.append(await connection.read_response(disconnect_on_error=False))
                except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
                    answers.append(error)
        except (*FAILURES, asyncio.CancelledError) as error:
            await self.close()
            if asked and isinstance(error, FAILURES):
                raise OutcomeUnknown(str(error)) from error
            raise
        return answers

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class RedisStore(GroupCommit):
    """Threads in Redis (see Store)."""

    is_shared = True

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._ttl = max(round(settings.ttl * 1000), 1)  # ms
        again = Retry(ExponentialBackoff(cap=RETRY_PAUSE, base=RETRY_PAUSE / 8), 3, (exceptions.ConnectionError,))
        options: dict[str, Any] = {
            "protocol": 2,
            "socket_timeout": ANSWERS_WITHIN,
            "socket_connect_timeout": CONNECTS_WITHIN,
        }
        try:
            self._pool = ConnectionPool.from_url(settings.store, **options, retry=again)
        except ValueError as error:
            raise StartupError(f"--store is no address of a Redis ({error})") from error
        self._lines = ConnectionPool.from_url(settings.store, **options, retry=Retry(NoBackoff(), 0))
        self._redis = Redis(connection_pool=self._pool)
        self._soon_read = asyncio.Semaphore(CONNECTIONS)
        self._heavy = asyncio.Semaphore(HEAVY_CONNECTIONS)
        self._stopped = False
        self._writing = Line(self._lines)
        self._source = secrets.token_hex(8)
        self._prefix = "rs:"
        self._channel = f"rs:{self._pool.connection_kwargs.get('db') or 0}:"
        self._write = Script.of("", WRITE)
        self._clear = Script.of(" flags=allow-oom", WRITE)
        self._read = Script.of(" flags=no-writes", READ)
        self._list = Script.of(" flags=no-writes", LIST)
        self._adopt = Script.of("", ADOPT)
        self._idle = Script.of(" flags=no-writes", IDLE)
        self._reap = Script.of(" flags=allow-oom", REAP)
        self._pages: dict[PageKey, asyncio.Future[tuple[State, Page] | None]] = {}
        self._watched: AbstractSet[str] = frozenset()
        self._gone: dict[str, int] = {}  # of what is watched, the latest generation known to be gone
        self._unsure: set[str] = set()
        self._stirred = asyncio.Event()  # there is something to hear, to subscribe to, or to be unsure of
        self._expired = 0
        self._answers_since: float = math.inf  # ms
        self._is_closed = False
        self._apart_tasks: set[asyncio.Task[Any]] = set()

    async def open(self, told: Told) -> None:
        try:
            await self._check()
            await self._load_scripts()
        except (*FAILURES, OutcomeUnknown) as error:
            await self._disconnect()
            raise StartupError(f"{redis_problem(error).detail} ({self._settings.store.rpartition('@')[2]})") from error
        except StartupError:
            await self._disconnect()
            raise
        self._told = told
        self._answers_since = now_ms()

    def stop(self) -> None:
        self._stopped = True

    async def close(self) -> None:
        await self.all_committed()
        self._is_closed = True
        await self._disconnect()

    async def _disconnect(self) -> None:
        for task in self._apart_tasks:
            task.cancel()
        await asyncio.gather(*self._apart_tasks, return_exceptions=True)
        await self._writing.close()
        await self._redis.aclose()
        await self._pool.disconnect()

    async def _check(self) -> None:
        """Say what this Redis cannot promise. Raises StartupError where it will not do at all."""
        info = await self._redis.info("server")
        version = str(info["redis_version"])
        if int(version.partition(".")[0]) < REDIS_VERSION:
            raise StartupError(f"this is Redis {version}; it takes Redis {REDIS_VERSION}, Valkey 8, or later")
        if info.get("redis_mode") == "cluster":
            raise StartupError("this Redis is a cluster, which --store does not take; name one that stands alone")
        try:
            found: dict[Any, Any] = await self._redis.config_get("maxmemory-policy", "appendonly", "appendfsync")
        except exceptions.ResponseError as error:
            log.warning("Redis does not tell its settings (%s), so nobody knows what it promises", error)
            found = {}
        replicas = (await self._redis.info("replication")).get("connected_slaves", 0)
        for what in broken_promises(found, int(replicas), self._settings.synchronous):
            log.warning("Redis: %s", what)

    async def _load_scripts(self) -> None:
        """All or none of them, so that no transaction finds only some."""
        scripts = (self._write, self._clear, self._read, self._list, self._adopt, self._idle, self._reap)
        await self._writing.transaction([("SCRIPT", "LOAD", script.source) for script in scripts])

    # Writing

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        if self._is_closed:
            raise Stopping
        works = [self._operation(write) for write in writes]
        commands = [self._command(work) for work in works]
        try:
            with redis_problems():
                answers = await self._transaction(commands)
                if any(isinstance(answer, exceptions.NoScriptError) for answer in answers):  # then of all of them
                    await self._load_scripts()
                    answers = await self._transaction(commands)
        except OutcomeUnknown as error:
            # What is done of it in spite of that is published, and has to be heard as if it were another's.
            self._source = secrets.token_hex(8)
            self._unsure |= {work.thread_id for work in works}
            self._stirred.set()
            raise unknown_outcome(error) from error
        return [self._outcome(work, answer) for work, answer in zip(works, answers, strict=True)]

    def _operation(self, write: Write) -> Operation:
        common: dict[str, Any] = {"source": self._source, "ttl": self._ttl, "max_message": self._settings.max_message}
        if isinstance(write, Append):
            return Operation("append", **msgspec.structs.asdict(write), **common)
        if isinstance(write, Open):
            return Operation("open", write.thread_id, write.message_id, **common)
        # As ms before now, so that Redis' own clock is the only one that counts.
        idle = None if write.untouched_since is None else now_ms() - write.untouched_since
        if isinstance(write, Clear):
            return Operation("clear", write.thread_id, idle=idle, **common)
        names = write.thread_id, write.message_id
        return Operation("finish", *names, status=write.status, reason=write.reason, idle=idle, **common)

    async def _transaction(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Where memory is full, Redis refuses transactions, but not what frees some of it."""
        try:
            return await self._writing.transaction(commands)
        except exceptions.OutOfMemoryError:
            return await self._writing.ask(commands)

    def _command(self, work: Operation) -> tuple[Any, ...]:
        script = self._clear if work.kind == "clear" else self._write
        channel = f"{self._channel}{work.thread_id}"
        keys = self._keys(work.thread_id)
        return ("EVALSHA", script.sha, len(keys), *keys, encode(work), channel)

    def _outcome(self, work: Operation, raw: Any) -> Change | Problem:
        if isinstance(raw, Exception):
            return self.refused(redis_problem(raw))
        outcome, thread, message, now, number = raw
        answer = (outcome.decode(), thread.decode(), message.decode(), now, number)
        refusal = refusal_of(work, answer)
        if refusal is not None:
            return refusal
        change = change_of(work, answer)
        if change.cleared:
            self._note_gone(change)
        return change

    def _keys(self, thread_id: str) -> tuple[str, ...]:
        thread = (f"{self._prefix}{{{thread_id}}}:{name}" for name in PARTS)
        return (*thread, *(f"{self._prefix}{name}" for name in ("clock", "threads", "expiries", "active")))

    # Reading

    async def read(self, work: Callable[[], Awaitable[T]], heavy: bool = False) -> T:
        """What it finds; what is ``heavy`` does not hold up what is not. Raises Problem."""
        is_abandoned = False

        async def in_turn() -> T:
            async with self._heavy if heavy else self._soon_read:
                if is_abandoned or self._is_closed or (heavy and self._stopped):
                    raise Stopping
                return await work()

        if self._is_closed:
            raise Stopping
        try:
            with redis_problems():
                return await self._apart(in_turn())
        finally:
            is_abandoned = True

    async def _apart(self, work: Coroutine[Any, Any, T]) -> T:
        """In a task of its own, as redis-py's client may lose its connection, or the cancellation, when cancelled."""
        task = asyncio.create_task(work)
        self._apart_tasks.add(task)
        task.add_done_callback(self._done_apart)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not cast("asyncio.Task[Any]", asyncio.current_task()).cancelling():
                raise Stopping from None  # it was, and not the one who waits
            raise

    def _done_apart(self, task: asyncio.Task[Any]) -> None:
        self._apart_tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, whether or not anybody is there to be told

    async def _ask(self, *command: Any) -> Any:
        return await cast(Any, self._redis).execute_command(*command)

    async def _run(self, script: Script, thread_id: str, *arguments: Any, beside: Sequence[str] = ()) -> Any:
        keys = (*self._keys(thread_id), *beside)
        try:
            return await self._ask("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except exceptions.NoScriptError:
            await self._ask("SCRIPT", "LOAD", script.source)
            return await self._ask("EVALSHA", script.sha, len(keys), *keys, *arguments)

    async def _records(self, thread_id: str, message_id: str | None) -> tuple[ThreadRecord, MessageRecord | None]:
        state, *_ = self._keys(thread_id)
        thread, message = await self._ask("HMGET", state, "", message_id or "")
        if not thread:
            return ThreadRecord(), None
        return decode_thread(thread), decode_message(message) if message and message_id else None

    async def _messages(self, thread_id: str, first: int, last: int) -> tuple[ThreadRecord, dict[str, MessageRecord]]:
        """Those from the first to the last, as a list of Redis counts them, in the order they began.

        Raises NotFound.
        """
        thread, names, texts = await self._run(self._list, thread_id, encode(Listing(first, last)))
        if not thread:
            raise no_thread(thread_id)
        messages = zip(names, texts, strict=True)
        return decode_thread(thread), {name.decode(): decode_message(text) for name, text in messages}

    async def find(self, thread_id: str, message_id: str | None = None) -> State:
        return await self.read(lambda: self._find(thread_id, message_id))

    async def _find(self, thread_id: str, message_id: str | None) -> State:
        return state_of(*await self._records(thread_id, message_id))

    async def match(self, thread_id: str, message_id: str, known_content: str) -> Place:
        return await self.read(lambda: self._match(thread_id, message_id, known_content.encode()), heavy=True)

    async def _match(self, thread_id: str, message_id: str, known: bytes) -> Place:
        found = await self._find(thread_id, message_id)
        check_exists(found, thread_id, message_id)
        pieces = [piece async for piece in self._texts(thread_id, message_id, found)]
        offset = bytes_known(known, b"".join(text for _, text in pieces))
        begin = Place(thread_id, message_id, found.generation, found.before, reset=offset is None)
        if not offset:
            return begin
        before = 0
        for after, text in pieces:
            if before + len(text) >= offset:
                return await self._after_bytes(begin, after, offset - before)
            before += len(text)
        return begin

    async def _after_bytes(self, begin: Place, after: int, offset: int) -> Place:
        """Right after so many of the message's bytes that come after a place."""
        reading = Reading(begin.message_id, begin.generation, after)
        while True:
            _, _, after, entries, _ = await self._run(self._read, begin.thread_id, encode(reading))
            for entry in map(entry_of, entries):
                size = len(entry.content.encode()) if isinstance(entry, StoredChunk) else 0
                if offset == size:
                    return msgspec.structs.replace(begin, after=entry.seq)
                if offset < size:
                    return msgspec.structs.replace(begin, after=entry.seq - 1, skip=offset)
                offset -= size
            if not entries and after == reading.after:
                raise no_thread(begin.thread_id)  # cleared in the meantime
            reading = msgspec.structs.replace(reading, after=after)

    async def _texts(
        self,
        thread_id: str,
        message_id: str,
        found: State,
        after: int | None = None,
        skip: int = 0,
        up_to: float = math.inf,
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """The message's text as it was found, in pieces, each with the place after which it begins."""
        at, last = found.before if after is None else after, int(min(found.last or 0, up_to))
        while at < last:
            if self._stopped:
                raise Stopping
            reading = Reading(message_id, found.generation, at, last, bytes=TEXT_BYTES, text_only=True, skip=skip)
            _, _, reached, text, skip = await self._run(self._read, thread_id, encode(reading))
            if reached <= at:
                raise no_thread(thread_id)  # cleared in the meantime
            yield at, text
            at = reached

    async def page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]:
        """Those who ask for the same one before Redis is asked share it, and so what is encoded of it."""
        key = (thread_id, message_id, after, limit)
        while (asked := self._pages.get(key)) is not None:
            if (shared := await asyncio.shield(asked)) is not None:
                return shared
        asked = self._pages[key] = asyncio.get_running_loop().create_future()
        asked.add_done_callback(asyncio.Future.exception)  # which nobody else may be there to look at
        answer: tuple[State, Page] | None = None  # where whoever asked is cancelled
        try:
            answer = await self.read(lambda: self._shared_page(key))
        except Exception as error:
            asked.set_exception(error)
            raise
        finally:
            if not asked.done():
                asked.set_result(answer)
            if self._pages.get(key) is asked:
                del self._pages[key]
        return answer

    async def _shared_page(self, key: PageKey) -> tuple[State, Page]:
        del self._pages[key]  # who asks from now on may know of more than this will find
        return await self._page(*key)

    async def _page(self, thread_id: str, message_id: str | None, after: int, limit: int) -> tuple[State, Page]:
        """Where a message's entries are far apart, one reading may find none of them."""
        while True:
            reading = Reading(message_id, after=after, limit=limit)
            thread, message, at, raw, _ = await self._run(self._read, thread_id, encode(reading))
            found, entries = state_from(thread, message), [entry_of(entry) for entry in raw]
            last_seq = found.last_seq if message_id is None else found.last or 0
            if entries or at >= last_seq:
                size = sum(len(entry.content) for entry in entries if isinstance(entry, StoredChunk))
                return found, Page(found.generation, at if at < last_seq else found.last_seq, entries, size)
            if at == after:
                raise Unavailable(
                    "Entries of this thread are missing in Redis; it has evicted them, or was tampered with."
                )
            after = at

    async def text(self, thread_id: str, message_id: str | None, index: int = 0) -> tuple[State, str]:
        found, pieces = await self.read(lambda: self._text(thread_id, message_id, index), heavy=True)
        return found, b"".join(pieces).decode()

    async def _text(self, thread_id: str, message_id: str | None, index: int) -> tuple[State, list[bytes]]:
        if message_id is not None:
            return await self._text_from(thread_id, message_id, index)
        whole, messages = await self._messages(thread_id, 0, MESSAGES_AT_ONCE - 1)
        pieces, seen = list[bytes](), 0
        while messages:
            for name, message in messages.items():
                found = state_of(whole, message)
                pieces += [text async for _, text in self._texts(thread_id, name, found, up_to=whole.last_seq)]
            seen += len(messages)
            if seen >= whole.message_count:
                break
            _, messages = await self._messages(thread_id, seen, min(seen + MESSAGES_AT_ONCE, whole.message_count) - 1)
        return state_of(whole, None), pieces

    async def _text_from(self, thread_id: str, message_id: str, index: int) -> tuple[State, list[bytes]]:
        thread, message = await self._records(thread_id, message_id)
        found = state_of(thread, message)
        check_exists(found, thread_id, message_id)
        if message is None or index >= message.chunk_count:
            return found, []
        _, _, _, marks, *_ = self._keys(thread_id)
        block = index // MARK_EVERY
        mark = await self._ask("HGET", marks, f"{message.number}:{block}")
        if mark is None:
            raise no_thread(thread_id)  # cleared in the meantime
        texts = self._texts(thread_id, message_id, found, int(mark) - 1, index - block * MARK_EVERY)
        return found, [text async for _, text in texts]

    async def status(self, thread_id: str, limit: int, after: int) -> ThreadStatus:
        thread, messages = await self.read(lambda: self._messages(thread_id, after, after + limit - 1))
        return ThreadStatus(
            **msgspec.structs.asdict(thread.summary(thread_id)),
            cursor=state_of(thread, None).cursor,
            messages=[
                MessageStatus(
                    name,
                    message.status,
                    message.reason,
                    message.chunk_count,
                    message.first_seq,
                    message.last_seq,
                    message.created_at,
                    message.updated_at,
                )
                for name, message in messages.items()
            ],
            messages_cursor=str(after + limit) if thread.message_count > after + limit else None,
        )

    async def threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage:
        return await self.read(lambda: self._threads(status, limit, before, covered), heavy=True)

    async def _threads(
        self, status: Status | None, limit: int, before: int | None, covered: Sequence[str] | None
    ) -> ThreadPage:
        found: list[tuple[int, ThreadSummary]] = []
        highest = "+inf" if before is None else f"({before}"
        while len(found) <= limit:
            listed: list[tuple[bytes, float]] = await cast(Any, self._redis).zrevrangebyscore(
                f"{self._prefix}threads", highest, "-inf", 0, THREADS_AT_ONCE, withscores=True
            )
            ids = [(name.decode(), int(score)) for name, score in listed]
            async with self._redis.pipeline(transaction=False) as pipeline:
                for thread_id, _ in ids:
                    cast(Any, pipeline).execute_command("HGET", self._keys(thread_id)[0], "")
                texts = await pipeline.execute()
            for (thread_id, generation), text in zip(ids, texts, strict=True):
                if text and is_covered(thread_id, covered):  # else it has expired, and will be dropped
                    summary = decode_thread(text).summary(thread_id)
                    if status in (None, summary.status):
                        found.append((generation, summary))
            if len(ids) < THREADS_AT_ONCE:
                break
            highest = f"({ids[-1][1]}"
        cursor = str(found[limit - 1][0]) if len(found) > limit else None
        return ThreadPage([summary for _, summary in found[:limit]], cursor)

    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]:
        """None, while Redis itself has not been there for so long: nobody could append."""
        if untouched_since < self._refused_ms:
            return []  # their producers may be alive, and were refused
        idle = now_ms() - untouched_since
        if now_ms() - self._answers_since < idle:
            return []
        found = await self.read(lambda: self._run(self._idle, "", encode(Operation("idle", idle=idle))))
        return [cast(tuple[str, str], tuple(member.decode().split("/", 1))) for member in found]

    async def measure(self) -> tuple[int, int, int]:
        async def measured() -> tuple[int, int, int]:
            memory, log_file = await self._redis.info("memory"), await self._redis.info("persistence")
            active = await self._ask("ZCARD", f"{self._prefix}active")
            return int(memory["used_memory"]), int(log_file.get("aof_current_size", 0)), int(active)

        return await self.read(measured)

    # Copying

    async def copied(self) -> dict[str, tuple[int, int, int, int]]:
        """What was copied to here and is still there: generation, last place, number of messages, time (ms)."""
        listed: dict[bytes, bytes] = await cast(Any, self._redis).hgetall(f"{self._prefix}copied")
        found = {}
        for name, generation in listed.items():
            thread, _ = await self._records(name.decode(), None)
            if thread.generation == int(generation):
                version = (thread.generation, thread.last_seq, thread.message_count, thread.updated_at)
                found[name.decode()] = version
        return found

    async def put(self, thread: ThreadStatus, pages: AsyncIterator[list[Entry]]) -> bool:
        """Have a thread as it was elsewhere. False where it has expired by now, or there is a later one, or it
        has gone on here. Raises Problem."""
        expires = thread.updated_at + self._ttl
        if expires <= now_ms():
            return False
        with redis_problems():
            staged = [f"{self._prefix}{{{thread.thread_id}}}:copy:{name}" for name in PARTS]
            sizes = await self._put_entries(staged, thread, pages)
            record, messages = records_of(thread, sizes)
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hset(staged[0], "", record)
                for name, message in messages.items():
                    pipeline.hset(staged[0], name, message)
                    pipeline.rpush(staged[2], name)
                for key in staged:
                    pipeline.expire(key, STAGED_FOR)
                await pipeline.execute()
            cursor = Cursor.parse(thread.cursor)
            active = {m.message_id: m.updated_at for m in thread.messages if m.status == "active"}
            adoption = Adoption(thread.thread_id, cast(int, cursor.generation), cursor.seq, expires, self._ttl, active)
            beside = (*staged, f"{self._prefix}copied")
            channel = f"{self._channel}{thread.thread_id}"
            return bool(await self._run(self._adopt, thread.thread_id, encode(adoption), channel, beside=beside))

    async def _put_entries(
        self, staged: Sequence[str], thread: ThreadStatus, pages: AsyncIterator[list[Entry]]
    ) -> Multiset[str]:
        """The bytes of each message's text."""
        _, stream, _, marks = staged
        generation = Cursor.parse(thread.cursor).generation
        messages = {message.message_id: (number, message) for number, message in enumerate(thread.messages, 1)}
        sizes, counts = Multiset[str](), Multiset[str]()
        await self._ask("UNLINK", *staged)
        async for entries in pages:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for entry in entries:
                    number, message = messages[entry.message_id]
                    fields: list[Any] = ["m", entry.message_id, "t"]
                    if isinstance(entry, StoredChunk):
                        fields += [entry.timestamp, "c", entry.content, *(("e", entry.event) if entry.event else ())]
                        block, rest = divmod(counts[entry.message_id], MARK_EVERY)
                        if not rest:
                            pipeline.hset(marks, f"{number}:{block}", str(entry.seq))
                        counts[entry.message_id] += 1
                        sizes[entry.message_id] += len(entry.content.encode())
                    else:
                        fields += [message.updated_at, "s", entry.status]
                        fields += () if entry.reason is None else ("r", entry.reason)
                    cast(Any, pipeline).execute_command("XADD", stream, f"{generation}-{entry.seq}", *fields)
                for key in (stream, marks):
                    pipeline.expire(key, STAGED_FOR)
                await pipeline.execute()
        return sizes

    async def drop(self, thread_id: str, generation: int) -> None:
        """Forget a thread that was copied, if it is still that one."""
        if (await self.find(thread_id)).generation == generation:
            with contextlib.suppress(NotFound):
                await self.write(Clear(thread_id))
        with redis_problems():
            await self._ask("HDEL", f"{self._prefix}copied", thread_id)

    # Upkeep

    async def probe(self) -> None:
        if self._is_closed:
            raise Stopping
        with redis_problems():
            await self._apart(self._ask("SET", f"{self._prefix}probe", now_ms(), "PX", 60_000))

    async def expire(self, untouched_since: int) -> int:
        """Redis does that by itself; how many were found expired since the last call."""
        expired, self._expired = self._expired, 0
        return expired

    async def upkeep(self) -> None:
        """Redis packs a stream's entries by itself."""

    async def erase(self) -> bool:
        """What is forgotten is out of Redis' memory at once."""
        return True

    # Other processes

    def watch(self, thread_ids: AbstractSet[str]) -> None:
        self._watched = thread_ids
        self._stirred.set()

    async def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]:
        """Heard on one connection, which is subscribed to the channels of what is watched.

        What was said before a subscription began, or while there was none, nobody knows.
        """
        while True:
            if self._unsure:  # still, as something went wrong
                await asyncio.sleep(RETRY_PAUSE)
            ears = Ears(self._lines, self._channel, self._stirred, self._apart)
            try:
                async with contextlib.aclosing(self._heard(ears)) as heard:
                    async for unsure in heard:
                        yield unsure
            except FAILURES as error:
                log.warning("Redis is not heard (%s); trying again", error)
                self._answers_since = math.inf
                self._unsure |= self._watched
            finally:
                await ears.close()

    async def _heard(self, ears: Ears) -> AsyncGenerator[AbstractSet[str], None]:
        loop = asyncio.get_running_loop()
        await self._apart(ears.open())
        self._answers_since = min(self._answers_since, now_ms())
        look_at = loop.time()
        while True:
            self._stirred.clear()
            await ears.subscribe(self._watched)
            for thread_id in self._gone.keys() - self._watched:
                del self._gone[thread_id]
            if loop.time() >= look_at:
                await ears.ping()
                await self._look_for_expired()
                look_at = loop.time() + LISTENS_EVERY
            publications, begun = ears.taken()
            self._told([(change, None) for change in map(self._news, publications) if change is not None], None)
            unsure, self._unsure = self._unsure | begun, set()
            if unsure:
                try:
                    yield unsure
                except GeneratorExit:
                    self._unsure |= unsure  # which was not taken in
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._stirred.wait()

    def _news(self, publication: bytes) -> Change | None:
        """The change that another process has made, unless its thread is known to be gone."""
        answer, operation = decode_publication(publication)
        if operation.source == self._source:
            return None
        change = change_of(operation, answer)
        thread_id = change.thread_id
        if thread_id not in self._watched or change.state.generation <= self._gone.get(thread_id, 0):
            return None
        if change.cleared:
            self._note_gone(change)
        return change

    def _note_gone(self, change: Change) -> None:
        """Publications of it may come later, on the other connection."""
        if change.thread_id in self._watched:
            self._gone[change.thread_id] = max(self._gone.get(change.thread_id, 0), change.state.generation)

    async def _look_for_expired(self) -> None:
        reaping = self._run(self._reap, "", encode(Operation("reap")), self._prefix, self._channel)
        self._expired += await self._apart(reaping)


def broken_promises(settings: dict[Any, Any], replicas: int, synchronous: str) -> Iterator[str]:
    """What cannot be relied on with these settings of Redis, a line for each."""
    policy, is_logged = settings.get("maxmemory-policy"), settings.get("appendonly")
    if policy not in (None, "noeviction"):
        yield f"maxmemory-policy is {policy}, so that what was acknowledged may vanish; set it to noeviction"
    if is_logged == "no":
        yield "appendonly is no, so that what was acknowledged dies with Redis; set it to yes"
    elif synchronous == "FULL" and settings.get("appendfsync") not in (None, "always"):
        yield (
            f"appendfsync is {settings['appendfsync']}, so that what was acknowledged may not survive a power cut;"
            " set it to always, or say --synchronous NORMAL"
        )
    if is_logged == "yes":
        yield "what is cleared or expires stays in the append-only file until Redis rewrites that (BGREWRITEAOF)"
    if replicas:
        yield f"it has {replicas} replicas, which are not waited for: a failover may lose what was acknowledged last"


def is_covered(thread_id: str, covered: Sequence[str] | None) -> bool:
    return covered is None or any(
        thread_id.startswith(pattern[:-1]) if pattern.endswith("*") else thread_id == pattern for pattern in covered
    )


class Ears:
    """The connection on which a process hears what the others do."""

    def __init__(self, pool: ConnectionPool, channel: str, stirred: asyncio.Event, apart: Apart) -> None:
        self._pool = pool
        self._channel = channel
        self._apart = apart
        self._stirred = stirred  # set where something is heard
        self._connection: AbstractConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._subscribed: set[str] = set()  # or asked for
        self._changes: list[bytes] = []
        self._begun: set[str] = set()
        self._is_closed = False

    async def open(self) -> None:
        """May go on where nobody waits for it any more."""
        connection: AbstractConnection = cast(Any, self._pool).make_connection()
        await cast(Any, connection).connect()
        if self._is_closed:
            await connection.disconnect(nowait=True)
            return
        self._connection = connection
        self._reading = asyncio.create_task(self._read(connection))

    async def close(self) -> None:
        """What its reading raises by then, ``taken`` has told."""
        self._is_closed = True
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
        if self._reading is not None:
            self._reading.cancel()
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _read(self, connection: AbstractConnection) -> None:
        """Raises where nothing is heard any more."""
        try:
            while not self._is_closed:
                said = await connection.read_response(timeout=SILENT_FOR, disconnect_on_error=False)
                if said is None:
                    raise exceptions.TimeoutError(f"nothing for {SILENT_FOR:g} s")
                if said[0] == b"message":
                    self._changes.append(said[2])
                elif said[0] == b"subscribe":
                    self._begun.add(said[1].decode().removeprefix(self._channel))
                self._stirred.set()
        finally:
            self._stirred.set()

    async def ping(self) -> None:
        await self._send("PING")

    async def subscribe(self, wanted: Any) -> None:
        """To the channels of these threads, and of no others."""
        begin, end = wanted - self._subscribed, self._subscribed - wanted
        if begin:
            await self._send("SUBSCRIBE", *(f"{self._channel}{thread_id}" for thread_id in begin))
        if end:
            await self._send("UNSUBSCRIBE", *(f"{self._channel}{thread_id}" for thread_id in end))
        self._subscribed = set(wanted)

    async def _send(self, *command: Any) -> None:
        assert self._connection is not None
        await self._apart(self._connection.send_command(*command, check_health=False))

    def taken(self) -> tuple[list[bytes], set[str]]:
        """The publications heard since, and the threads whose subscription has begun. Raises FAILURES."""
        if self._reading is not None and self._reading.done():
            self._reading.result()
        changes, begun = self._changes, self._begun
        self._changes, self._begun = [], set()
        return changes, begun
