"""The keys in Redis, and the Lua scripts that read and write them."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from ...app import CHUNK_WEIGHT

PREFIX = "rs:"
COPIED = f"{PREFIX}copied"
MARK_EVERY = 64  # chunks of a message
SCANNED = 2048  # entries that one run of READ looks at
PUBLISHED_BYTES = 256 * 1024  # a larger append is published without its text, and listeners read it

SHARED_KEYS = tuple(PREFIX + name for name in ("clock", "threads", "expiries", "active"))
_, THREADS, _, ACTIVE = SHARED_KEYS

encode = msgspec.msgpack.Encoder().encode


def thread_keys(thread_id: str, kind: str = "") -> list[str]:
    return [f"{PREFIX}{{{thread_id}}}:{kind}{name}" for name in ("state", "entries", "messages", "marks")]


# A script takes its arguments as one MessagePack map, and then the prefix of the channels.
COMMON = (
    f"""
local MARK_EVERY, SCANNED, PUBLISHED_BYTES, CHUNK_WEIGHT = {MARK_EVERY}, {SCANNED}, {PUBLISHED_BYTES}, {CHUNK_WEIGHT}
local PREFIX = '{PREFIX}'
"""
    + r"""
local STATE, ENTRIES, MESSAGES, MARKS, CLOCK, THREADS, EXPIRIES, ACTIVE = unpack(KEYS)
local op = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local thread, message

local function record(field)
    local text = redis.call('HGET', STATE, field)
    return text and cjson.decode(text) or nil
end

local function id(seq)
    return string.format('%.0f-%.0f', thread.generation, seq)
end

local function seq_of(entry)
    return tonumber(string.match(entry[1], '-(%d+)$'))
end

-- Publish an array of an answer and the packed operation that it answers.
local function publish(thread_id, answer, operation)
    redis.call('PUBLISH', ARGV[2] .. thread_id, '\146' .. cmsgpack.pack(answer) .. operation)
end

local function publish_gone(thread_id, generation)
    local answer = {'forgotten', cjson.encode({generation = generation}), '', now, 0}
    publish(thread_id, answer, cmsgpack.pack({kind = 'clear', threadId = thread_id, source = ''}))
end

local function delete_thread()
    for _, name in ipairs(thread.active > 0 and redis.call('HKEYS', STATE) or {}) do
        redis.call('ZREM', ACTIVE, op.threadId .. '/' .. name)
    end
    redis.call('UNLINK', STATE, ENTRIES, MESSAGES, MARKS)
end
"""
)


class Script:
    def __init__(self, text: str) -> None:
        first_line, _, body = text.partition("\n")
        self.source = f"{first_line}\n{COMMON}{body}".encode()
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()

    def command(self, channels: str, thread_id: str, arguments: Any, *more_keys: str) -> tuple[Any, ...]:
        """Return the command that runs this script on a thread."""
        keys = (*thread_keys(thread_id), *SHARED_KEYS, *more_keys)
        return ("EVALSHA", self.sha, len(keys), *keys, encode(arguments), channels)


_WRITE = r"""#!lua
local member = op.threadId .. '/' .. op.messageId

-- An answer is the outcome, the records of the thread and the message, the time, and a number.
local function answer(outcome, number)
    return {outcome, thread and cjson.encode(thread) or '', message and cjson.encode(message) or '', now, number or 0}
end

local function published(answered)
    local operation = ARGV[1]
    if #operation > PUBLISHED_BYTES then
        op.chunks = nil
        operation = cmsgpack.pack(op)
    end
    publish(op.threadId, answered, operation)
    return answered
end

local function saved(outcome, number)
    thread.updatedAt, thread.version = now, thread.version + 1
    local answered = answer(outcome, number)
    redis.call('HSET', STATE, '', answered[2], op.messageId, answered[3])
    for _, key in ipairs({STATE, ENTRIES, MESSAGES, MARKS}) do
        redis.call('PEXPIREAT', key, now + op.ttl)
    end
    redis.call('ZADD', EXPIRIES, now + op.ttl, op.threadId)
    if message.status == 'active' then
        redis.call('ZADD', ACTIVE, message.updatedAt, member)
    else
        redis.call('ZREM', ACTIVE, member)
    end
    return published(answered)
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

-- Return the places of the chunks that are stored already, and the index of the first that differs from the stored one.
local function compare()
    local places, wanted = {}, math.min(#op.chunks, message.chunkCount - op.index)
    local block = math.floor(op.index / MARK_EVERY)
    local index, at = block * MARK_EVERY, tonumber(redis.call('HGET', MARKS, message.number .. ':' .. block))
    while #places < wanted do
        local entries = redis.call('XRANGE', ENTRIES, id(at), id(message.lastSeq), 'COUNT', MARK_EVERY)
        for _, entry in ipairs(entries) do
            local fields = entry[2]
            at = seq_of(entry) + 1
            if fields[2] == op.messageId and fields[5] == 'c' and #places < wanted then
                if index >= op.index then
                    local chunk = op.chunks[#places + 1]
                    if fields[6] ~= chunk.content or fields[8] ~= chunk.event then return places, index end
                    places[#places + 1] = at - 1
                end
                index = index + 1
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
    if #places > 0 and #places == #op.chunks and not op.complete then
        message.lastSeq, message.chunkCount = places[#places], count -- as the first answer said
        return answer('same')
    end
    if ended then
        local is_retry = op.complete and (op.index or #op.chunks == 0)
        local is_same = is_retry and message.status == 'completed' and message.chunkCount == count
        return answer(is_same and 'same' or 'ended')
    end
    if op.complete and count < had then return answer('goes on') end
    local size = message and message.size or 0
    for number = #places + 1, #op.chunks do size = size + op.sizes[number] end
    local weight = size + CHUNK_WEIGHT * (had + #op.chunks - #places)
    if weight > op.maxMessage then return answer('too large', weight) end
    make()
    for number = #places + 1, #op.chunks do
        local chunk = op.chunks[number]
        if chunk.event then add('c', chunk.content, 'e', chunk.event) else add('c', chunk.content) end
        if message.chunkCount % MARK_EVERY == 0 then
            redis.call('HSET', MARKS, message.number .. ':' .. message.chunkCount / MARK_EVERY, thread.lastSeq)
        end
        message.chunkCount, thread.chunkCount = message.chunkCount + 1, thread.chunkCount + 1
    end
    thread.size, message.size, message.updatedAt = thread.size + size - message.size, size, now
    if op.complete then finish('completed') end
    return saved('appended', #places)
end

function kinds.finish()
    if not message then
        redis.call('ZREM', ACTIVE, member) -- its thread may have expired while it was active
        return answer(thread and 'no message' or 'no thread')
    end
    if message.status == op.status then return answer('same') end
    if message.status ~= 'active' then return answer('ended') end
    if op.idle and message.updatedAt > now - op.idle then return answer('touched') end
    finish(op.status, op.reason)
    return saved('finished')
end

function kinds.clear()
    if not thread or (op.idle and thread.updatedAt > now - op.idle) then return answer('no thread') end
    delete_thread()
    redis.call('ZREM', THREADS, op.threadId)
    redis.call('ZREM', EXPIRIES, op.threadId)
    return published(answer('forgotten'))
end

thread = record('')
if op.messageId ~= '' then message = record(op.messageId) end
return kinds[op.kind]()
"""

WRITE = Script(_WRITE)
CLEAR = Script(_WRITE.replace("#!lua", "#!lua flags=allow-oom"))  # it frees memory, and so runs while that is full

# Return the records of the thread and the message, the place that was reached, and the entries (or only their text).
READ = Script(r"""#!lua flags=no-writes
local texts = redis.call('HMGET', STATE, '', op.messageId or '')
if not texts[1] then return {'', '', 0, {}} end
thread = cjson.decode(texts[1])
local last = thread.lastSeq
if op.messageId then last = texts[2] and cjson.decode(texts[2]).lastSeq or 0 end
local at, found, size, scanned = op.after, {}, 0, 0
local step = math.max(math.min(math.floor(op.bytes / (thread.size / math.max(thread.lastSeq, 1) + 1)), 512), 1)
while at < last and #found < op.limit and size < op.bytes and scanned < SCANNED do
    local entries = redis.call('XRANGE', ENTRIES, id(at + 1), id(last), 'COUNT', step)
    if #entries == 0 then break end
    for _, entry in ipairs(entries) do
        local fields = entry[2]
        at, scanned = seq_of(entry), scanned + 1
        local is_chunk = fields[5] == 'c'
        if (not op.messageId or fields[2] == op.messageId) and (is_chunk or not op.textOnly) then
            found[#found + 1] = op.textOnly and fields[6] or entry
            if is_chunk then size = size + #fields[6] end
        end
        if #found >= op.limit or size >= op.bytes then break end
    end
end
return {texts[1], op.messageId and texts[2] or '', at, op.textOnly and table.concat(found) or found}
""")

LIST = Script(r"""#!lua flags=no-writes
local names = redis.call('LRANGE', MESSAGES, op.first, op.last)
return {redis.call('HGET', STATE, '') or '', names, #names > 0 and redis.call('HMGET', STATE, unpack(names)) or {}}
""")

IDLE = Script(r"""#!lua flags=no-writes
return redis.call('ZRANGEBYSCORE', ACTIVE, '-inf', now - op.idle, 'LIMIT', 0, 1000)
""")

# Remove expired threads from the shared keys, tell their readers, and return the number of threads. A message stays
# in rs:active if its thread expires while it is active. That is rare, so a few random looks find it in time.
REAP = Script(r"""#!lua flags=allow-oom
local count = 0
for _, thread_id in ipairs(redis.call('ZRANGEBYSCORE', EXPIRIES, '-inf', now, 'LIMIT', 0, 100)) do
    local expires = redis.call('PEXPIRETIME', PREFIX .. '{' .. thread_id .. '}:state')
    if expires == -2 then
        local generation = redis.call('ZSCORE', THREADS, thread_id)
        redis.call('ZREM', THREADS, thread_id)
        redis.call('ZREM', EXPIRIES, thread_id)
        if generation then
            publish_gone(thread_id, tonumber(generation))
            count = count + 1
        end
    elseif expires > now then
        redis.call('ZADD', EXPIRIES, expires, thread_id)
    end
end
for _, member in ipairs(redis.call('ZRANDMEMBER', ACTIVE, 10)) do
    local slash = string.find(member, '/', 1, true)
    local state = PREFIX .. '{' .. string.sub(member, 1, slash - 1) .. '}:state'
    if redis.call('HEXISTS', state, string.sub(member, slash + 1)) == 0 then redis.call('ZREM', ACTIVE, member) end
end
return count
""")

# Rename the staged keys of a copied thread to the keys of a thread. Return 0 if the thread here is a later one, or
# has gone on since it was copied.
ADOPT = Script(r"""#!lua
local staged, COPIED = {KEYS[9], KEYS[10], KEYS[11], KEYS[12]}, KEYS[13]
thread = record('')
if thread then
    local has_gone_on = thread.generation == op.generation and thread.lastSeq > op.lastSeq
    if has_gone_on or thread.generation > op.generation then
        redis.call('UNLINK', unpack(staged))
        return 0
    end
    delete_thread()
    if thread.generation < op.generation then publish_gone(op.threadId, thread.generation) end
end
for number, key in ipairs({STATE, ENTRIES, MESSAGES, MARKS}) do
    if redis.call('EXISTS', staged[number]) == 1 then
        redis.call('RENAME', staged[number], key)
        redis.call('PEXPIREAT', key, op.expires)
    end
end
redis.call('SET', CLOCK, math.max(tonumber(redis.call('GET', CLOCK) or 0), op.generation))
redis.call('ZADD', THREADS, op.generation, op.threadId)
redis.call('ZADD', EXPIRIES, op.expires, op.threadId)
for name, updated_at in pairs(op.active) do
    redis.call('ZADD', ACTIVE, updated_at, op.threadId .. '/' .. name)
end
redis.call('HSET', COPIED, op.threadId, op.generation)
redis.call('PEXPIRE', COPIED, op.ttl)
return 1
""")
