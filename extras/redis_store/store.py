"""The store: the check of Redis at the start, writes, and upkeep."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

from redis import exceptions

from ...app import (
    Change,
    Clear,
    Entry,
    GroupCommit,
    NotFound,
    Problem,
    Settings,
    StartupError,
    Stopping,
    ThreadStatus,
    Told,
    Write,
    now_ms,
)
from . import copying
from .connections import Connections, OutcomeUnknown, redis_problem, redis_problems
from .listening import Listener
from .reading import ThreadReads
from .records import Operation, operation_of, outcome_of
from .scripts import ACTIVE, CLEAR, COPIED, IDLE, PREFIX, WRITE

log = logging.getLogger("resume_stream")

REDIS_VERSION = 7  # the first whose scripts do all or nothing when memory is full


class RedisStore(ThreadReads, GroupCommit):
    """Threads in Redis (see Store)."""

    def __init__(self, settings: Settings) -> None:
        ThreadReads.__init__(self, Connections(settings.store))
        GroupCommit.__init__(self)
        self._settings = settings
        self._ttl = max(round(settings.ttl * 1000), 1)  # ms
        self._listener = Listener(self.redis, lambda changes: self._told([(change, None) for change in changes], None))

    async def open(self, told: Told) -> None:
        async with contextlib.AsyncExitStack() as exits:
            exits.push_async_callback(self.redis.close)
            try:
                with redis_problems():
                    await self._check()
                    await self.redis.writes.load_scripts()
            except Problem as problem:
                address = self._settings.store.rpartition("@")[2]
                raise StartupError(f"{problem.detail} ({address})") from problem
            exits.pop_all()
        self._told = told
        self._listener.connected_since = now_ms()

    async def close(self) -> None:
        await self.all_committed()
        await self.redis.close()

    async def _check(self) -> None:
        """Check that this Redis can be used, and log the promises that it cannot keep. Raise StartupError."""
        redis = self.redis.client
        info = await redis.info()
        version = str(info["redis_version"])
        if int(version.partition(".")[0]) < REDIS_VERSION:
            raise StartupError(f"this is Redis {version}; --store takes Redis {REDIS_VERSION}, Valkey 8, or later")
        if info.get("redis_mode") == "cluster":
            raise StartupError("this Redis is a cluster; --store takes one that stands alone")
        try:
            found: dict[Any, Any] = await redis.config_get("maxmemory-policy", "appendonly", "appendfsync")
        except exceptions.ResponseError as error:
            log.warning("Redis does not tell its settings (%s), so its promises are unknown", error)
            found = {}
        replicas = int(info.get("connected_slaves", 0))
        for what in broken_promises(found, replicas, self._settings.synchronous):
            log.warning("Redis: %s", what)

    # Writing

    async def commit(self, writes: Sequence[Write], size: int) -> list[Change | Problem]:
        if self.redis.is_closed:
            raise Stopping
        common = {"source": self._listener.source, "ttl": self._ttl, "max_message": self._settings.max_message}
        operations = [operation_of(write, **common) for write in writes]
        try:
            with redis_problems():
                answers = await self._run(operations)
        except OutcomeUnknown:
            self._listener.doubt({operation.thread_id for operation in operations})
            raise
        return [self._outcome(operation, answer) for operation, answer in zip(operations, answers, strict=True)]

    async def _run(self, operations: Sequence[Operation]) -> list[Any]:
        commands = [
            (CLEAR if operation.kind == "clear" else WRITE).command(self.redis.channels, operation.thread_id, operation)
            for operation in operations
        ]
        answers = await self.redis.writes.transaction(commands)
        if any(isinstance(answer, exceptions.NoScriptError) for answer in answers):  # then no script has run
            await self.redis.writes.load_scripts()
            answers = await self.redis.writes.transaction(commands)
        return answers

    def _outcome(self, operation: Operation, answer: Any) -> Change | Problem:
        if isinstance(answer, Exception):
            return self.refused(redis_problem(answer))
        outcome = outcome_of(operation, (answer[0].decode(), *answer[1:]))
        if isinstance(outcome, Change) and outcome.cleared:
            self._listener.note_gone(outcome)
        return outcome

    # Copying

    async def copied(self) -> dict[str, tuple[int, int, int, int]]:
        with redis_problems():
            return await copying.copied(self.redis)

    async def put(self, thread: ThreadStatus, pages: AsyncIterator[list[Entry]]) -> bool:
        with redis_problems():
            return await copying.put(self.redis, thread, pages, self._ttl)

    async def drop(self, thread_id: str, generation: int) -> None:
        """Clear a copied thread, unless a later one has its name."""
        if (await self.find(thread_id)).generation == generation:
            with contextlib.suppress(NotFound):
                await self.write(Clear(thread_id))
        with redis_problems():
            await self.redis.ask("HDEL", COPIED, thread_id)

    # Upkeep

    async def probe(self) -> None:
        await self.read(lambda: self.redis.ask("SET", f"{PREFIX}probe", now_ms(), "PX", 60_000))

    async def idle_messages(self, untouched_since: int) -> list[tuple[str, str]]:
        """Return none if appends were refused in that time, or Redis was away: the producers may be alive."""
        idle = now_ms() - untouched_since
        if untouched_since < self.refused_ms or now_ms() - self._listener.connected_since < idle:
            return []
        found = await self.read(lambda: self.redis.run(IDLE, "", {"idle": idle}))
        return [cast(tuple[str, str], tuple(member.decode().split("/", 1))) for member in found]

    async def expire(self, untouched_since: int) -> int:
        """Return how many threads Redis has let expire since the last call."""
        expired, self._listener.expired = self._listener.expired, 0
        return expired

    async def upkeep(self) -> None:
        """Do nothing: Redis packs the entries of a stream itself."""

    async def erase(self) -> bool:
        """Do nothing: a deleted thread leaves Redis' memory at once."""
        return True

    async def measure(self) -> tuple[int, int, int]:
        info = await self.read(lambda: self.redis.ask("INFO"))
        active = await self.read(lambda: self.redis.ask("ZCARD", ACTIVE))
        return int(info["used_memory"]), int(info.get("aof_current_size", 0)), int(active)

    # Other processes

    def watch(self, thread_ids: AbstractSet[str]) -> None:
        self._listener.watch(thread_ids)

    def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]:
        return self._listener.changed_elsewhere()


def broken_promises(settings: dict[Any, Any], replicas: int, synchronous: str) -> Iterator[str]:
    """Yield a sentence for each promise that these settings of Redis break."""
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
