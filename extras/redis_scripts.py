"""What is in Redis of threads, the scripts that write and read it, and how what they answer is understood.

A thread is four keys that expire together: ``rs:{thread}:entries`` is a stream whose ids are our cursors,
``rs:{thread}:state`` a hash of JSON (the thread's own under the empty name, each message under its id),
``rs:{thread}:messages`` a list of these ids in the order they began, and ``rs:{thread}:marks`` says where every
64th chunk of a message is. Four keys belong to all threads: ``rs:clock``,
the latest generation; ``rs:threads``, their ids by generation; ``rs:expiries``, their ids by when they expire;
``rs:active``, the active messages by when somebody appended to them. Each write is one run of a script, which
also publishes it on the channel of its thread. One Redis, or a primary with its replicas; no cluster.
"""

from __future__ import annotations

import hashlib
from collections import Counter as Multiset
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from ..app import (
    CHUNK_WEIGHT,
    PAGE_BYTES,
    Append,
    Change,
    Chunk,
    Clear,
    Conflict,
    Cursor,
    Entry,
    MessageEnd,
    NotFound,
    Open,
    Problem,
    Record,
    State,
    Status,
    StoredChunk,
    ThreadStatus,
    ThreadSummary,
    TooLarge,
    Write,
    now_ms,
)

MARK_EVERY = 64  # chunks of a message
SCANNED = 2048  # entries that one run of a script looks at
PUBLISHED_BYTES = 256 * 1024  # past this the text itself is left to be read

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


Answer = tuple[str, str, str, int, int]  # the outcome, the two records, the time, and a number

encode = msgspec.msgpack.Encoder().encode
decode_publication = msgspec.msgpack.Decoder(tuple[Answer, Operation]).decode
decode_thread = msgspec.json.Decoder(ThreadRecord).decode
decode_message = msgspec.json.Decoder(MessageRecord).decode


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


def operation_of(write: Write, **common: Any) -> Operation:
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
        "cleared": Conflict.cleared,
        "no thread": lambda: NotFound.thread(thread_id),
        "no message": lambda: NotFound.message(thread_id, message_id),
        "ended": lambda: Conflict.ended(message_id, state),
        "gap": lambda: Conflict.gap(Append(thread_id, message_id, (), (), operation.index), state),
        "differs": lambda: Conflict.other_chunk(message_id, number, state),
        "goes on": lambda: Conflict.other_producer(message_id, state),
        "too large": lambda: TooLarge.message(number, operation.max_message),
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


def is_covered(thread_id: str, covered: Sequence[str] | None) -> bool:
    return covered is None or any(
        thread_id.startswith(pattern[:-1]) if pattern.endswith("*") else thread_id == pattern for pattern in covered
    )
