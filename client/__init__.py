"""The Python client of resume-stream: for producers and readers in another process than the service.

It needs httpx and nothing of the service. A producer stores an answer as it comes, a reader
follows it, and neither notices that the service was restarted in between::

    import asyncio
    from collections.abc import AsyncIterator
    from uuid import uuid4

    from resume_stream.client import Client, MessageEnd, Reset, StoredChunk


    async def answer() -> AsyncIterator[str]:
        for word in ("Hello", ", ", "world"):
            yield word


    async def main(url: str = "http://127.0.0.1:8000") -> str:
        thread, text = f"thread-{uuid4()}", ""
        async with Client(url) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(client.store(thread, "run-1", answer()))
            async for item in client.read(thread, "run-1", wait=True):
                match item:
                    case StoredChunk():
                        text += item.content
                    case Reset():  # forget it all; everything follows
                        text = ""
                    case MessageEnd():
                        print(item.status, text)
        return text


    if __name__ == "__main__":
        asyncio.run(main())

What is wrong is raised as a ``ClientError``: a ``Problem`` where the service says no, with its
problem document (RFC 9457), ``Unreachable`` where nobody answers, ``Gone`` where a thread is
there no more. Times are ms since 1970, delays are seconds, sizes are bytes of UTF-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from .connection import Client

__all__ = [
    "AccumulatedContent",
    "Appended",
    "Chunk",
    "Client",
    "ClientError",
    "Conflict",
    "Forbidden",
    "Gone",
    "InvalidContent",
    "Item",
    "MessageEnd",
    "MessageEnded",
    "MessageStatus",
    "NotFound",
    "Problem",
    "Reset",
    "Status",
    "StoredChunk",
    "ThreadStatus",
    "ThreadSummary",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    """Import httpx only for those who connect: the command line names its commands without it."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .connection import Client

    return Client


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

Status = Literal["active", "completed", "aborted"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a message, as a producer gives it.

    ``content`` is text, ``event`` a name of up to 200 characters for the SSE ``event`` field; the
    service refuses control characters in it, and its own names (``complete``, ``error`` …).
    """

    content: str
    event: str | None = None


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk in its place. ``cursor`` is what ``read(after=…)`` takes to go on behind it."""

    content: str
    timestamp: int
    message_id: str
    seq: int
    cursor: str
    event: str | None = None


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """The end of a message, which has a place in the sequence as a chunk has.

    ``status`` is ``completed`` or ``aborted``, the latter perhaps with a ``reason``.
    """

    message_id: str
    status: Status
    reason: str | None
    seq: int
    cursor: str


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget what you have: the thread was made again, or does not have the known text. All of it follows."""


Item = StoredChunk | MessageEnd | Reset


@dataclass(frozen=True, slots=True)
class Appended:
    """What a producer is told: ``seq`` is the place of the last thing that it asked for.

    ``chunk_count`` counts this message's chunks up to there, so it is the ``index`` of the next.
    """

    thread_id: str
    message_id: str
    seq: int
    chunk_count: int
    status: Status


@dataclass(frozen=True, slots=True)
class MessageStatus:
    """One message of a thread. ``last_seq`` is the place of its end once it has ended."""

    message_id: str
    status: Status
    reason: str | None
    chunk_count: int
    first_seq: int | None
    last_seq: int | None
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class ThreadSummary:
    """One thread, as lists have it; ``size`` is bytes of text, ``readers`` follow it now."""

    thread_id: str
    status: Status
    message_count: int
    chunk_count: int
    size: int
    created_at: int
    updated_at: int
    readers: int


@dataclass(frozen=True, slots=True)
class ThreadStatus(ThreadSummary):
    """One thread with its messages, in the order they began."""

    cursor: str
    messages: tuple[MessageStatus, ...]


@dataclass(frozen=True, slots=True)
class AccumulatedContent:
    """The text so far; ``read(after=cursor)`` gives exactly what comes after it."""

    content: str
    cursor: str
    status: Status


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class ClientError(Exception):
    """What went wrong, in one sentence. ``retryable``: the same call may well succeed later."""

    retryable: bool = False
    retry_after: float = 0.0  # seconds, as the service asked for


class Unreachable(ClientError):
    """Nobody answered, or the connection was lost in the middle; ``__cause__`` is httpx's error."""

    retryable = True


class Gone(ClientError):
    """The thread was cleared or has expired while it was read or written; what was in it is erased."""


class Problem(ClientError):
    """The service said no. ``problem`` is its problem document (RFC 9457).

    ``status`` is HTTP's; ``title`` and ``detail`` are for people; further members, like
    ``expectedIndex`` of a Conflict, are in ``problem``.
    """

    kinds: ClassVar[dict[int, type[Problem]]] = {}

    def __init__(self, problem: Mapping[str, Any], retry_after: float = 0.0) -> None:
        self.problem = dict(problem)
        self.status: int = problem["status"]
        self.title: str = problem["title"]
        self.detail: str = problem.get("detail") or f"The service answered {self.status} ({self.title})."
        self.retry_after = retry_after
        self.retryable = self.status >= 500 or self.status in (408, 425, 429)
        super().__init__(self.detail)

    def __init_subclass__(cls, status: int | None = None) -> None:
        if status is not None:
            Problem.kinds[status] = cls

    def __reduce__(self) -> tuple[type[Problem], tuple[dict[str, Any], float]]:
        return type(self), (self.problem, self.retry_after)

    @staticmethod
    def of(problem: Mapping[str, Any], retry_after: float = 0.0) -> Problem:
        """The error that stands for a problem document with at least ``status`` and ``title``."""
        status = problem["status"]
        kind = Problem.kinds.get(status, Unavailable if status >= 500 else Problem)
        return (MessageEnded if "messageStatus" in problem else kind)(problem, retry_after)


class Unauthorized(Problem, status=401):
    """The token is missing, wrong, or has expired; go on from the cursor with a new one."""


class Forbidden(Problem, status=403):
    """The token does not allow this, or the service does not let this machine or page connect."""


class NotFound(Problem, status=404):
    """There is no such thread or message."""


class Conflict(Problem, status=409):
    """Another producer writes to the message, or an ``index`` leaves a gap."""


class MessageEnded(Conflict):
    """The message has ended, and an end is final.

    ``message_status`` is ``completed`` or ``aborted``, the latter perhaps with a ``reason``.
    """

    @property
    def message_status(self) -> Status:
        status: Status = self.problem["messageStatus"]
        return status

    @property
    def reason(self) -> str | None:
        reason: str | None = self.problem.get("reason")
        return reason


class TooLarge(Problem, status=413):
    """A chunk, a body, a message or a reason is over a limit of the service."""


class InvalidContent(Problem, status=422):
    """Text that is not valid Unicode, or an event name that cannot be."""


class Unavailable(Problem):
    """The service cannot do it now (5xx): it is stopping, its database is locked, its disk is full."""
