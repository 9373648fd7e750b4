"""The connections to Redis: one that asks nothing twice, and one on which a process hears others; what may go wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, cast

from redis import exceptions
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection

from ..app import DatabaseFull, Problem, Unavailable

SILENT_FOR = 2.0  # seconds after which a connection that has to say something is taken for lost

Apart = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]


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
