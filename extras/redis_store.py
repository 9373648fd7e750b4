"""Threads in Redis Streams (``--store redis://…``), for any number of processes, none of which owns anything.

What is there, and what it does with that, is in ``redis_scripts.py``, the connections are in ``redis_wire.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections import Counter as Multiset
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar, cast

import msgspec
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff

from ..app import (
    Change,
    Clear,
    Cursor,
    Entry,
    GroupCommit,
    MessageStatus,
    NotFound,
    Page,
    Place,
    Problem,
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
    bytes_known,
    check_exists,
    now_ms,
)
from .redis_scripts import (
    ADOPT,
    IDLE,
    LIST,
    MARK_EVERY,
    READ,
    REAP,
    WRITE,
    Adoption,
    Listing,
    MessageRecord,
    Operation,
    Reading,
    Script,
    ThreadRecord,
    change_of,
    decode_message,
    decode_publication,
    decode_thread,
    encode,
    entry_of,
    is_covered,
    operation_of,
    records_of,
    refusal_of,
    state_from,
    state_of,
)
from .redis_wire import (
    FAILURES,
    Ears,
    Line,
    OutcomeUnknown,
    broken_promises,
    redis_problem,
    redis_problems,
    unknown_outcome,
)

T = TypeVar("T")
log = logging.getLogger("resume_stream")

REDIS_VERSION = 7  # the first whose scripts are all or nothing where memory is full
ANSWERS_WITHIN = 5.0  # seconds, after which what was asked for may have happened or not
CONNECTS_WITHIN = 2.0
CONNECTIONS = 16  # for what is soon read
HEAVY_CONNECTIONS = 4  # for what may take long
LISTENS_EVERY = 0.4  # seconds between signs of life, and looks for what has expired
RETRY_PAUSE = 0.2
TEXT_BYTES = 1024**2  # what one run of a script returns of a message's text
THREADS_AT_ONCE = 500
STAGED_FOR = 3600  # seconds that a half copied thread is kept
PARTS = ("state", "entries", "messages", "marks")
MESSAGES_AT_ONCE = 1_000

PageKey = tuple[str, str | None, int, int]


def store_for(settings: Settings) -> Store:
    """Raises StartupError."""
    return RedisStore(settings)


class RedisStore(GroupCommit):
    """Threads in Redis (see Store)."""

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
        common: dict[str, Any] = {"source": self._source, "ttl": self._ttl, "max_message": self._settings.max_message}
        works = [operation_of(write, **common) for write in writes]
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
            raise NotFound.thread(thread_id)
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
                raise NotFound.thread(begin.thread_id)  # cleared in the meantime
            reading = msgspec.structs.replace(reading, after=after)

    async def _texts(self, thread_id: str, message_id: str, found: State) -> AsyncGenerator[tuple[int, bytes], None]:
        """The message's text as it was found, in pieces, each with the place after which it begins."""
        at, last, skip = found.before, found.last or 0, 0
        while at < last:
            if self._stopped:
                raise Stopping
            reading = Reading(message_id, found.generation, at, last, bytes=TEXT_BYTES, text_only=True, skip=skip)
            _, _, reached, text, skip = await self._run(self._read, thread_id, encode(reading))
            if reached <= at:
                raise NotFound.thread(thread_id)  # cleared in the meantime
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
        if untouched_since < self.refused_ms:
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
