"""The connections of a process to Redis, and the problems that their failures become."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar, cast

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff

from ...app import DatabaseFull, Problem, StartupError, Stopping, Unavailable
from .scripts import CLEAR, PREFIX, WRITE, Script

T = TypeVar("T")

ANSWER_TIMEOUT = 5.0  # seconds; a write without an answer may have happened or not
CONNECT_TIMEOUT = 2.0
RETRY_PAUSE = 0.2

FAILURES = (exceptions.RedisError, OSError)


class OutcomeUnknown(Unavailable, status=503, kind="Unavailable", headers={"Retry-After": "1"}):
    """Redis was asked to write and did not answer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"Redis did not answer ({error}), so nobody knows whether this was stored; send it again, with its index,"
            " to have it stored once."
        )


def redis_problem(error: Exception) -> Problem:
    """Return the problem for a command that failed and changed nothing."""
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


@contextlib.contextmanager
def redis_problems() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise redis_problem(error) from error


class WriteConnection:
    """One connection, opened when it is needed. It sends no command twice, and answers come in order."""

    def __init__(self, connect: Callable[[], AbstractConnection]) -> None:
        self._connect = connect
        self._connection: AbstractConnection | None = None

    async def load_scripts(self) -> None:
        """Load both scripts for writes in one transaction, so that a later one finds both of them or none."""
        await self.transaction([("SCRIPT", "LOAD", script.source) for script in (WRITE, CLEAR)])

    async def transaction(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run the commands with nothing in between, and return an answer or an error for each.

        Raise OutcomeUnknown if they may have run, and one of FAILURES if they have not.
        """
        answers = await self._pipeline([("MULTI",), *commands, ("EXEC",)])
        if not isinstance(answers[-1], Exception):
            return cast(list[Any], answers[-1])
        error = next(answer for answer in answers if isinstance(answer, Exception))
        if isinstance(error, exceptions.OutOfMemoryError):
            # While memory is full Redis takes no transaction, but it takes a script that frees some.
            return await self._pipeline(commands)
        raise error

    async def _pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._connection is None:
            self._connection = self._connect()
        connection = self._connection
        answers: list[Any] = []
        is_sent = False
        try:
            await cast(Any, connection).connect()
            packed = connection.pack_commands(commands)
            is_sent = True
            await connection.send_packed_command(packed, check_health=False)
            for _ in commands:
                try:
                    answers.append(await connection.read_response(disconnect_on_error=False))
                except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
                    answers.append(error)
        except (*FAILURES, asyncio.CancelledError) as error:
            await self.close()
            if is_sent and not isinstance(error, asyncio.CancelledError):
                raise OutcomeUnknown(error) from error
            raise
        return answers

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class Connections:
    """A pool for reads, one connection for writes, and others on demand."""

    def __init__(self, address: str) -> None:
        retry = Retry(ExponentialBackoff(cap=RETRY_PAUSE, base=RETRY_PAUSE / 8), 3, (exceptions.ConnectionError,))
        timeouts = {"socket_timeout": ANSWER_TIMEOUT, "socket_connect_timeout": CONNECT_TIMEOUT}
        try:
            self._pool = ConnectionPool.from_url(address, protocol=2, retry=retry, **timeouts)
        except ValueError as error:
            raise StartupError(f"--store is no address of a Redis ({error})") from error
        self.client: Any = Redis(connection_pool=self._pool)
        self.writes = WriteConnection(self.connection)
        # All databases of a Redis share its channels, so the prefix has the number of the database.
        self.channels = f"{PREFIX}{self._pool.connection_kwargs.get('db') or 0}:"
        self.is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def connection(self) -> AbstractConnection:
        """Return a connection outside the pool, which tries nothing a second time."""
        connection: AbstractConnection = cast(Any, self._pool).make_connection()
        connection.retry = Retry(NoBackoff(), 0)
        return connection

    async def close(self) -> None:
        self.is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.writes.close()
        await self.client.aclose()
        await self._pool.disconnect()

    async def ask(self, *command: Any) -> Any:
        return await self.client.execute_command(*command)

    async def run(self, script: Script, thread_id: str, arguments: Any, *more_keys: str) -> Any:
        command = script.command(self.channels, thread_id, arguments, *more_keys)
        try:
            return await self.ask(*command)
        except exceptions.NoScriptError:
            return await self.ask("EVAL", script.source, *command[2:])

    async def apart(self, work: Coroutine[Any, Any, T], done: Callable[[Any], None] = lambda task: None) -> T:
        """Do the work in a task of its own, which goes on if the caller is cancelled.

        A cancelled call of redis-py may lose its connection, or swallow the cancellation. Raise Stopping if ``close``
        cancels the task.
        """
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the caller may be gone
        task.add_done_callback(done)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not cast("asyncio.Task[Any]", asyncio.current_task()).cancelling():
                raise Stopping from None
            raise
