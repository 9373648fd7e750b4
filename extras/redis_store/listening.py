"""Changes that other processes make: each process subscribes to the channels of the threads that it watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from ...app import Change, now_ms
from .connections import FAILURES, RETRY_PAUSE, Connections
from .records import decode_publication, outcome_of
from .scripts import REAP

log = logging.getLogger("resume_stream")

LOOK_EVERY = 0.4  # seconds between pings, and looks for expired threads
SILENT_FOR = 2.0  # seconds after which the connection counts as lost


class Subscription:
    """A connection that is subscribed to the channels of threads. It sets ``heard`` when there are replies."""

    def __init__(self, redis: Connections, heard: asyncio.Event) -> None:
        self._redis, self._heard = redis, heard
        self._connection: AbstractConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._subscribed: set[str] = set()
        self._replies: list[Any] = []
        self._is_closed = False

    async def open(self) -> None:
        connection = self._redis.connection()
        await cast(Any, connection).connect()
        if self._is_closed:  # the caller was cancelled
            await connection.disconnect(nowait=True)
            return
        self._connection = connection
        self._reading = asyncio.create_task(self._read(connection))

    async def close(self) -> None:
        self._is_closed = True
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
        if self._reading is not None:
            self._reading.cancel()
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _read(self, connection: AbstractConnection) -> None:
        try:
            while not self._is_closed:
                reply = await connection.read_response(timeout=SILENT_FOR, disconnect_on_error=False)
                if reply is None:
                    raise exceptions.TimeoutError(f"nothing for {SILENT_FOR:g} s")
                self._replies.append(reply)
                self._heard.set()
        finally:
            self._heard.set()

    def replies(self) -> list[Any]:
        """Return the replies since the last call. Raise one of FAILURES once the connection is lost."""
        if self._reading is not None and self._reading.done():
            self._reading.result()
        replies, self._replies = self._replies, []
        return replies

    async def subscribe(self, wanted: AbstractSet[str]) -> None:
        """Subscribe to the channels of these threads and of no others."""
        begin, end = wanted - self._subscribed, self._subscribed - wanted
        for command, thread_ids in (("SUBSCRIBE", begin), ("UNSUBSCRIBE", end)):
            if thread_ids:
                await self.send(command, *(f"{self._redis.channels}{thread_id}" for thread_id in thread_ids))
        self._subscribed = set(wanted)

    async def send(self, *command: str) -> None:
        assert self._connection is not None
        await self._redis.apart(self._connection.send_command(*command, check_health=False))


class Listener:
    """Tells of the changes that other processes make to the watched threads, and finds the expired ones.

    A process also hears its own publications, and ignores them by their source.
    """

    def __init__(self, redis: Connections, tell: Callable[[Sequence[Change]], None]) -> None:
        self._redis, self._tell = redis, tell
        self._watched: AbstractSet[str] = frozenset()
        self._unsure: set[str] = set()  # may have changed unheard
        self._gone: dict[str, int] = {}  # the latest generation of a watched thread that was cleared
        self._stirred = asyncio.Event()  # set when there is something to do
        self.source = secrets.token_hex(8)
        self.connected_since: float = math.inf  # ms
        self.expired = 0  # threads found expired

    def watch(self, thread_ids: AbstractSet[str]) -> None:
        self._watched = thread_ids
        self._stirred.set()

    def doubt(self, thread_ids: AbstractSet[str]) -> None:
        """Treat commits that had no answer as another process's: if they happen after all, they are heard."""
        self.source = secrets.token_hex(8)
        self._unsure |= thread_ids
        self._stirred.set()

    def note_gone(self, change: Change) -> None:
        """Ignore what is heard of this generation from now on: publications come late."""
        if change.thread_id in self._watched:
            self._gone[change.thread_id] = max(self._gone.get(change.thread_id, 0), change.state.generation)

    async def changed_elsewhere(self) -> AsyncGenerator[AbstractSet[str], None]:
        """Yield threads that may have changed unheard: before a subscription began, or while there was none."""
        while True:
            if self._unsure:  # after a failure
                await asyncio.sleep(RETRY_PAUSE)
            subscription = Subscription(self._redis, self._stirred)
            try:
                async with contextlib.aclosing(self._listen(subscription)) as unheard:
                    async for unsure in unheard:
                        yield unsure
            except FAILURES as error:
                log.warning("lost the connection on which Redis publishes changes (%s); trying again", error)
                self.connected_since = math.inf
                self._unsure |= self._watched
            finally:
                await subscription.close()

    async def _listen(self, subscription: Subscription) -> AsyncGenerator[AbstractSet[str], None]:
        loop = asyncio.get_running_loop()
        await self._redis.apart(subscription.open())
        self.connected_since = min(self.connected_since, now_ms())
        look_at = loop.time()
        while True:
            self._stirred.clear()
            await subscription.subscribe(self._watched)
            for thread_id in self._gone.keys() - self._watched:
                del self._gone[thread_id]
            if loop.time() >= look_at:
                await subscription.send("PING")
                self.expired += await self._redis.apart(self._redis.run(REAP, "", {}))
                look_at = loop.time() + LOOK_EVERY
            self._take(subscription.replies())
            unsure, self._unsure = self._unsure, set()
            if unsure:
                try:
                    yield unsure
                except GeneratorExit:  # the caller has not looked at them
                    self._unsure |= unsure
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._stirred.wait()

    def _take(self, replies: Sequence[Any]) -> None:
        changes: list[Change] = []
        for kind, *rest in replies:
            if kind == b"subscribe":
                self._unsure.add(rest[0].decode().removeprefix(self._redis.channels))
            elif kind == b"message" and (change := self._change(rest[1])) is not None:
                changes.append(change)
        self._tell(changes)

    def _change(self, publication: bytes) -> Change | None:
        """Return the change that another process has published, or None if its thread is known to be gone."""
        answer, operation = decode_publication(publication)
        if operation.source == self.source:
            return None
        change = cast(Change, outcome_of(operation, answer))  # only changes are published
        thread_id, generation = change.thread_id, change.state.generation
        if thread_id not in self._watched or generation <= self._gone.get(thread_id, 0):
            return None
        if change.cleared:
            self.note_gone(change)
        return change
