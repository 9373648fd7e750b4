"""The Python client of resume-stream, for producers and readers outside the service's process.

It needs only httpx, and imports nothing of the service. A producer stores an answer while it is
generated, and a reader follows it. Neither notices a restart of the service::

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
                    case Reset():  # forget the text; all of it follows
                        text = ""
                    case MessageEnd():
                        print(item.status, text)
        return text


    if __name__ == "__main__":
        asyncio.run(main())

Every error is a ``ClientError``: a ``Problem`` if the service refuses, with its problem document
(RFC 9457); ``Unreachable`` if the service does not answer; ``Gone`` if the thread was cleared or
has expired. Times are ms since 1970, delays are seconds, sizes are bytes of UTF-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from .client import Client

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
    """Import ``Client`` on first use, so that the command line can list its commands without httpx."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .client import Client

    return Client


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

Status = Literal["active", "completed", "aborted"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a message that a producer sends.

    ``content`` is text. ``event`` is a name for the SSE ``event`` field: up to 200 characters, no
    control characters, and none of the service's own names (``complete``, ``error`` …).
    """

    content: str
    event: str | None = None


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A committed chunk. ``read(after=cursor)`` continues after it."""

    content: str
    timestamp: int
    message_id: str
    seq: int
    cursor: str
    event: str | None = None


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """The end of a message. It has a sequence number, as a chunk does.

    ``status`` is ``completed`` or ``aborted``. An aborted message may have a ``reason``.
    """

    message_id: str
    status: Status
    reason: str | None
    seq: int
    cursor: str


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget the text that you have. All of it follows.

    The thread was created again, or it does not contain the known content.
    """


Item = StoredChunk | MessageEnd | Reset


@dataclass(frozen=True, slots=True)
class Appended:
    """The answer to a producer. ``seq`` is the sequence number of the last chunk or end that it sent.

    ``chunk_count`` is the number of the message's chunks up to there: the ``index`` of the next one.
    """

    thread_id: str
    message_id: str
    seq: int
    chunk_count: int
    status: Status


@dataclass(frozen=True, slots=True)
class MessageStatus:
    """One message of a thread. Once it has ended, ``last_seq`` is the sequence number of its end."""

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
    """One thread of a list. ``size`` is bytes of text, ``readers`` the number of its readers now."""

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
    """One thread with its messages, in the order in which they began."""

    cursor: str
    messages: tuple[MessageStatus, ...]


@dataclass(frozen=True, slots=True)
class AccumulatedContent:
    """The text so far. ``read(after=cursor)`` continues exactly after it."""

    content: str
    cursor: str
    status: Status


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class ClientError(Exception):
    """The base of all errors here; its text is one sentence. ``retryable``: the same call may succeed later."""

    retryable: bool = False
    retry_after: float = 0.0  # seconds that the service asks to wait


class Unreachable(ClientError):
    """The service did not answer, or the connection was lost. ``__cause__`` is httpx's error."""

    retryable = True


class Gone(ClientError):
    """The thread was cleared or expired while it was being read or written. Its text is erased."""


class Problem(ClientError):
    """A refusal by the service. ``problem`` is its problem document (RFC 9457).

    ``status`` is the HTTP status. ``title`` and ``detail`` are for people. Other members, like
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
        """Return the error for a problem document, which has at least ``status`` and ``title``."""
        status = problem["status"]
        kind = Problem.kinds.get(status, Unavailable if status >= 500 else Problem)
        return (MessageEnded if "messageStatus" in problem else kind)(problem, retry_after)


class Unauthorized(Problem, status=401):
    """The token is missing, wrong, or expired. Continue from the cursor with a new one."""


class Forbidden(Problem, status=403):
    """The token does not allow this call, or the service does not accept this host or origin."""


class NotFound(Problem, status=404):
    """The thread or message does not exist."""


class Conflict(Problem, status=409):
    """Another producer writes to the message, or an ``index`` leaves a gap."""


class MessageEnded(Conflict):
    """The message has ended, and an end is final.

    ``message_status`` is ``completed`` or ``aborted``. An aborted message may have a ``reason``.
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
    """A chunk, a body, a message, or a reason exceeds a limit of the service."""


class InvalidContent(Problem, status=422):
    """The text is not valid Unicode, or the event name is not allowed."""


class Unavailable(Problem):
    """The service cannot do this now (5xx): it is stopping, or its database is locked, or its disk is full."""
