"""Instances of the service on one Redis. Instances are killed, and Redis is killed, cut off, stopped, and full."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from conftest import RedisServer, Service

from .base import TIMEOUT, Verdict, call, eventually, thread_path
from .kill import Broken, World

PATIENCE = 1.0  # seconds that an instance waits for Redis
KEEPS = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")
ALL_PER_SET = 8  # faults, before everything is finished and compared


class Instances:
    """The instances on one Redis. ``port`` is that of any of them, even of a dead one."""

    is_running = True

    def __init__(self, folder: Path, redis: RedisServer, count: int, rng: random.Random) -> None:
        self.redis, self.rng = redis, rng
        self.address = f"{redis.address()}&socket_timeout={PATIENCE:g}"
        flags = ("--idle-timeout", "1s")
        self.all = [Service(folder / f"{number}.db", *flags, store=self.address) for number in range(count)]

    @property
    def port(self) -> int:
        return self.rng.choice(self.all).port

    def __enter__(self) -> Instances:
        for service in self.all:
            service.start()
        return self

    def __exit__(self, *error: object) -> None:
        for service in self.all:
            if service.process is not None:
                service.kill()

    async def are_ready(self) -> None:
        for service in self.all:

            async def is_ready(port: int = service.port) -> bool:
                return (await call(port, "GET", "/health/ready")).status == 200

            await eventually(is_ready, "an instance takes writes again")


class SharedWorld(World):
    """A world that is compared through the instances, and at the end in Redis itself."""

    def __init__(self, verdict: Verdict, instances: Instances, name: str, **size: int) -> None:
        super().__init__(verdict, instances, name, **size)
        for producer in self.producers:
            producer.for_now = (503, 507)
        self.redis = importlib.import_module("redis").Redis.from_url(instances.address)

    async def compare(self, acknowledged: dict[str, int]) -> None:
        for producer in self.producers:
            path = thread_path(producer.thread, f"/content?message_id={producer.message}")
            found = await call(self.service.port, "GET", path, headers={"Accept": "text/plain"})
            self.verdict.expect(found.status == 200, f"{producer.message} was answered {found.status}")
            self.verdict.compare(producer.message, found.body.decode(), producer.pieces, acknowledged[producer.message])

    async def compare_end(self) -> None:
        for producer in self.producers:
            self.verdict.expect(producer.acknowledged == len(producer.pieces), f"{producer.message} was not finished")
        await self.compare({producer.message: producer.acknowledged for producer in self.producers})
        for thread in {producer.thread for producer in self.producers}:
            entries = await asyncio.to_thread(self.redis.xrange, f"rs:{{{thread}}}:entries")
            places = [int(identity.partition(b"-")[2]) for identity, _ in entries]
            self.verdict.expect(places == list(range(1, len(places) + 1)), f"{thread}: there are holes in its sequence")


async def kill_an_instance(instances: Instances) -> None:
    service = instances.rng.choice(instances.all)
    service.kill()
    await asyncio.sleep(instances.rng.uniform(0, 0.3))
    await asyncio.to_thread(service.start)


async def kill_redis(instances: Instances) -> None:
    instances.redis.end(signal.SIGKILL)
    await asyncio.sleep(instances.rng.uniform(0, 0.5))
    await asyncio.to_thread(instances.redis.start)


async def cut_connections(instances: Instances) -> None:
    for kind in ("normal", "pubsub"):
        instances.redis.says("CLIENT", "KILL", "TYPE", kind)


async def pause_redis(instances: Instances) -> None:
    """Pause Redis for longer than the instances wait."""
    instances.redis.says("CLIENT", "PAUSE", str(round(1.5 * PATIENCE * 1000)), "ALL")
    await asyncio.sleep(1.5 * PATIENCE)


async def stop_redis(instances: Instances) -> None:
    instances.redis.send(signal.SIGSTOP)
    await asyncio.sleep(1.5 * PATIENCE)
    instances.redis.send(signal.SIGCONT)


async def fill_redis(instances: Instances) -> None:
    instances.redis.says("CONFIG", "SET", "maxmemory", "1")
    await asyncio.sleep(0.3)
    instances.redis.says("CONFIG", "SET", "maxmemory", "0")


Fault = Callable[[Instances], Awaitable[Any]]


@contextlib.asynccontextmanager
async def under_load(world: SharedWorld, seconds: float) -> AsyncIterator[None]:
    """Run producers and readers during the block, and give them this many seconds to finish after it."""
    await world.open()
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one.run()) for one in [*world.producers, *world.readers]]
            yield
            for producer in world.producers:
                producer.finishing = True
            _, late = await asyncio.wait(running, timeout=seconds)
            if late:
                world.verdict.fail(f"{len(late)} of those who write and read hang")
                raise Broken
    except* Broken:
        pass  # the verdict says why


async def survive_on_redis(
    folder: Path,
    *,
    faults: list[tuple[Fault, int]],
    instances: int = 3,
    producers: int = 16,
    readers: int = 32,
    longest: float = 2,
    seed: int = 1,
) -> Verdict:
    """Cause the faults in random order, under producers that retry and readers that resume."""
    verdict = Verdict(f"{instances} instances on one Redis")
    rng = random.Random(seed)
    plan = [fault for fault, times in faults for _ in range(times)]
    rng.shuffle(plan)
    redis = RedisServer(folder, *KEEPS).start()
    refusals: Counter[int] = Counter()
    try:
        with Instances(folder, redis, instances, rng) as crowd:
            for number in range(0, len(plan), ALL_PER_SET):
                name, size = f"world{number}", {"producers": producers, "readers": readers, "seed": seed + number}
                world = SharedWorld(verdict, crowd, name, **size)
                async with under_load(world, 2 * TIMEOUT):
                    for fault in plan[number : number + ALL_PER_SET]:
                        await asyncio.sleep(rng.uniform(0.05, longest))
                        with verdict.trial(fault.__name__):
                            acknowledged = {producer.message: producer.acknowledged for producer in world.producers}
                            await fault(crowd)
                            await crowd.are_ready()
                            await world.compare(acknowledged)
                with verdict.trial(f"everything of {name}"):
                    await world.compare_end()
                for producer in world.producers:
                    refusals += producer.refusals
            for service in crowd.all:
                verdict.expect(service.end(signal.SIGTERM) == 0, "it did not end with 0")
                verdict.expect(not service.tracebacks(), "there is a traceback in the log")
        verdict.notes.append(", ".join(f"{status} {times} times" for status, times in sorted(refusals.items())))
        if fill_redis in plan:
            verdict.expect(refusals[507], "nobody was told that the memory is full")
    finally:
        redis.end()
    return verdict
