"""What is known of other people's streams: a table, of which each row is one dialect.

What differs between them stands here and nowhere else. A kind of event, in what follows, is its SSE
name, or else the ``type`` in its JSON; ``[DONE]`` where that is its data, and ``error`` where its JSON
has such a member and nothing else says more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from ..app import UNDECODABLE, Chunk, Parts

Said = tuple[str | None, dict[str, Any]]  # an event's name, and its data
DONE = "[DONE]"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one kind of server streams, and how its clients want to be told of an end.

    Known by the ``path`` of the request (a pattern for its end), by a ``header`` of the answer (its
    name, and a pattern), or by the kind of the first event: where there are ``openings``, a stream
    that begins with none of them is of another dialect, whatever its path. The groups ``thread`` and
    ``message`` of a pattern are ids.
    """

    name: str
    path: str | None = None
    header: tuple[str, str] | None = None
    openings: frozenset[str] = frozenset()
    completes: frozenset[str] = frozenset()  # kinds of events; none: the end of the body does
    aborts: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()  # nothing comes after these, though the body may stay open
    words: tuple[tuple[str, ...], ...] = ()  # where an event that aborts says why
    thread_in_body: str | None = None  # the member of the request's JSON that is the thread's id
    message_in_event: tuple[str, ...] | None = None  # where the first event has the message's id
    message_in_header: bytes = b""  # of the request, where it is named nowhere else
    headers: Mapping[str, str] = field(default_factory=dict)  # of every answer
    error: Callable[[str, str, Mapping[str, Any]], Said] | None = None  # from a code, words, the last event's JSON
    stop: Callable[[str], Said] | None = None  # from the reason; without it a stop is an error

    # How its clients ask for a message again: method, and path (or query, where that begins with ``[?&]``).
    # Without a message in it, it is the thread's active one.
    resume: tuple[str, str] | None = None
    from_start: str | None = None  # the Last-Event-ID that is no id
    if_stream: str | None = None  # the query's flag without which not the stream is meant but the object
    position: tuple[str, str] | None = None  # the query's parameter, and the events' member that is to be higher
    thing: str | None = None  # the events' member that is the object
    unfinished: Callable[[dict[str, Any], str, str, bool], dict[str, Any]] | None = None  # of what was aborted
    cancel: tuple[str, str, int] | None = None  # method, path, and the status of the answer
    absent_is_204: bool = False  # its clients take any other answer for an error

    @cached_property
    def _telling(self) -> re.Pattern[str]:
        kinds = sorted(self.completes | self.aborts | self.last)
        return re.compile("|".join(map(re.escape, kinds)) or "(?!)")

    def kind_of(self, event: Chunk) -> str | None:
        if event.event not in (None, "message"):
            return event.event
        if event.content == DONE:
            return DONE
        said = self.json_of(event)
        kind = said.get("type")
        return kind if isinstance(kind, str) else "error" if said.get("error") else None

    def end_of(self, event: Chunk) -> str | None:
        """The kind, if it is one that completes, aborts, or is the last. Only few are looked at closely."""
        if event.event in (None, "message") and not self._telling.search(event.content):
            return None
        kind = self.kind_of(event)
        return kind if kind in self.completes or kind in self.aborts or kind in self.last else None

    def reason_of(self, event: Chunk) -> str:
        """What an event that aborts says of it."""
        said = self.json_of(event)
        words = (member(said, place) for place in self.words)
        return next((word for word in words if isinstance(word, str) and word), event.content)

    def begins_with(self, event: Chunk) -> bool:
        return self.kind_of(event) in self.openings

    def message_in(self, event: Chunk) -> Any:
        """What the first event calls the message; None where it has no name."""
        return member(self.json_of(event), self.message_in_event) if self.message_in_event else None

    @staticmethod
    def json_of(event: Chunk) -> dict[str, Any]:
        """The event's JSON; empty, if it is none, or no object."""
        try:
            said = msgspec.json.decode(event.content)
        except UNDECODABLE:
            return {}
        return said if isinstance(said, dict) else {}


def member(said: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        said = said.get(name) if isinstance(said, dict) else None
    return said


def openai_error(code: str, words: str, last: Mapping[str, Any]) -> Said:
    return None, {"error": {"message": words, "type": code, "param": None, "code": code}}


def responses_error(code: str, words: str, last: Mapping[str, Any]) -> Said:
    number = last.get("sequence_number", -1) + 1
    return "error", {"type": "error", "code": code, "message": words, "param": None, "sequence_number": number}


def responses_unfinished(response: dict[str, Any], code: str, words: str, failed: bool) -> dict[str, Any]:
    if not failed:
        return {**response, "status": "cancelled"}
    return {**response, "status": "failed", "error": {"code": code, "message": words}}


DIALECTS = (
    Dialect(
        name="openai-chat",
        path=r"/completions",
        completes=frozenset({DONE}),
        aborts=frozenset({"error"}),
        last=frozenset({DONE}),
        words=(("error", "message"),),
        error=openai_error,
    ),
    Dialect(
        name="openai-responses",
        path=r"/responses(?:/[^/]+)?",
        openings=frozenset({"response.created", "response.queued", "response.in_progress"}),
        completes=frozenset({"response.completed", "response.incomplete"}),
        aborts=frozenset({"response.failed", "error"}),
        last=frozenset({"response.completed", "response.incomplete", "response.failed", "error"}),
        words=(("message",), ("error", "message"), ("response", "error", "message")),
        message_in_event=("response", "id"),
        error=responses_error,
        resume=("GET", r"/responses/(?P<message>[^/]+)"),
        if_stream="stream",
        position=("starting_after", "sequence_number"),
        thing="response",
        unfinished=responses_unfinished,
        cancel=("POST", r"/responses/(?P<message>[^/]+)/cancel", 200),
    ),
    Dialect(
        name="anthropic-messages",
        path=r"/messages",
        openings=frozenset({"message_start"}),
        completes=frozenset({"message_stop"}),
        aborts=frozenset({"error"}),
        last=frozenset({"message_stop", "error"}),
        words=(("error", "message"),),
        error=lambda code, words, last: ("error", {"type": "error", "error": {"type": code, "message": words}}),
    ),
    Dialect(
        name="langgraph",
        header=("content-location", r"(?:/threads/(?P<thread>[^/?]+))?/runs/(?P<message>[^/?]+)"),
        completes=frozenset({"end"}),
        aborts=frozenset({"error"}),
        last=frozenset({"end"}),
        words=(("message",), ("error",)),
        error=lambda code, words, last: ("error", {"error": code, "message": words}),
        resume=("GET", r"/threads/(?P<thread>[^/]+)/runs/(?P<message>[^/]+)/stream"),
        from_start="-1",
        cancel=("POST", r"/threads/(?P<thread>[^/]+)/runs/(?P<message>[^/]+)/cancel", 202),
    ),
    Dialect(
        name="ai-sdk",
        header=("x-vercel-ai-ui-message-stream", r""),
        completes=frozenset({"finish", DONE}),
        aborts=frozenset({"error", "abort"}),
        last=frozenset({DONE}),
        words=(("errorText",), ("reason",)),
        thread_in_body="id",
        headers={"x-vercel-ai-ui-message-stream": "v1"},
        error=lambda code, words, last: (None, {"type": "error", "errorText": words}),
        stop=lambda reason: (None, {"type": "abort", "reason": reason}),
        resume=("GET", r"(?<!/runs)/(?P<thread>[^/]+)/stream"),
        cancel=("POST", r"/(?P<thread>[^/]+)/stop", 200),
        absent_is_204=True,
    ),
    Dialect(
        name="ag-ui",
        openings=frozenset({"RUN_STARTED", "RUN_ERROR"}),  # a stream may have one run after the other
        completes=frozenset({"RUN_FINISHED"}),
        aborts=frozenset({"RUN_ERROR"}),
        last=frozenset({DONE}),
        words=(("message",),),
        message_in_header=b"x-run-id",  # of TanStack's, whose clients join a run by it
        error=lambda code, words, last: (None, {"type": "RUN_ERROR", "message": words, "code": code}),
        resume=("GET", r"[?&]offset=-1&runId=(?P<message>[^&]+)"),
    ),
    Dialect(name="sse"),  # any other, whose clients have no word for an error
)


def mount(parts: Parts) -> None:
    parts.dialects += DIALECTS
