"""The dialects: how each kind of upstream streams its events, and how its clients resume and cancel.

Everything that differs between upstreams is in this table. The *kind* of an event is its SSE name, or else the
``type`` in its JSON. It is ``[DONE]`` if that is the data, and ``error`` if the JSON has such a member and no ``type``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import msgspec

from ...app import PRODUCER_TIMEOUT, UNDECODABLE, Chunk, MessageEnd, StoredChunk

Event = Chunk | StoredChunk
Said = tuple[str | None, dict[str, Any]]  # the name and the JSON of an event
DONE = "[DONE]"

LOST, RESTARTED, CANCELLED = "upstream_lost", "service_restarted", "cancelled"
FAILURES = {  # the reasons with which the relay itself aborts a message, and what clients are told
    LOST: "The upstream broke the answer off.",
    RESTARTED: "The service that recorded this answer was restarted in its middle.",
    PRODUCER_TIMEOUT: "The upstream fell silent.",
    "event_too_large": "The upstream sent an event over max_chunk.",
    "message_too_large": "The answer is over max_message.",
    "not_utf8": "The upstream sent text that is not UTF-8.",
    "compressed": "The upstream compressed its events, though it was asked not to.",
    "not_recorded": "The rest of the answer could not be recorded.",
}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one kind of upstream streams, and what its clients expect.

    A ``header`` of the response (name and pattern), the ``path`` of the request (a pattern for its end), or the kind
    of the first event tells the dialect. A stream that begins with none of the ``openings`` has another dialect,
    whatever its path. The groups ``thread`` and ``message`` of a pattern are ids.
    """

    name: str
    path: str | None = None
    header: tuple[str, str] | None = None
    openings: frozenset[str] = frozenset()
    completes: frozenset[str] = frozenset()  # kinds of events; if empty, the end of the body completes
    aborts: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()  # nothing follows these, though the body may stay open
    reasons: tuple[tuple[str, ...], ...] = ()  # where the JSON of an aborting event has the reason
    thread_in_body: str | None = None  # the member of the request's JSON that is the thread's id
    message_in_event: tuple[str, ...] | None = None  # where the JSON of the first event has the message's id
    message_in_header: bytes = b""  # the request's header with the message's id, if nothing else has one
    headers: Mapping[str, str] = field(default_factory=dict)  # set on every answer
    error: Callable[[str, str, Mapping[str, Any]], Said] | None = None  # from a code, a sentence, the last event's JSON
    stop: Callable[[str], Said] | None = None  # from the reason; if None, a stop is told as an error

    # The call that resumes a message: the method, and a pattern for the end of the path, or of the query if the pattern
    # begins with ``[?&]``. A call without a message is about the thread's active one.
    resume: tuple[str, str] | None = None
    from_start: str | None = None  # the Last-Event-ID that asks for the whole stream
    stream_flag: str | None = None  # the query parameter that asks for the stream, and not for the object
    position: tuple[str, str] | None = None  # the query parameter, and the member of an event that must be higher
    object_in: str | None = None  # the member of an event that is the object
    aborted_object: Callable[[dict[str, Any], str, str], dict[str, Any]] | None = None
    cancel: tuple[str, str, int] | None = None  # the method and path of the call, the status of the answer
    absent_is_204: bool = False  # its clients take any other answer to ``resume`` as an error

    def is_path(self, path: str) -> bool:
        return self.path is not None and re.search(rf"{self.path}\Z", path) is not None

    def begins_with(self, event: Event) -> bool:
        return self.kind_of(event) in self.openings

    def fits(self, path: str, first: Event | None) -> bool:
        """True if a stream with this path and this first event has this dialect."""
        if self.path is None:
            return first is not None and self.begins_with(first)
        can_begin = first is None or not self.openings or self.begins_with(first) or self.end_of(first) in self.aborts
        return can_begin and self.is_path(path)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        kinds = sorted(self.completes | self.aborts | self.last)
        return re.compile("|".join(map(re.escape, kinds)) or "(?!)")

    def kind_of(self, event: Event) -> str | None:
        if event.event not in (None, "message"):
            return event.event
        if event.content == DONE:
            return DONE
        said = json_of(event)
        kind = said.get("type")
        return kind if isinstance(kind, str) else "error" if said.get("error") else None

    def end_of(self, event: Event) -> str | None:
        """Return the kind if it completes, aborts, or is the last. Few events are decoded to find out."""
        if event.event in (None, "message") and not self._ends.search(event.content):
            return None
        kind = self.kind_of(event)
        return kind if kind in self.completes or kind in self.aborts or kind in self.last else None

    def reason_of(self, event: Event) -> str:
        """Return the reason in an event that aborts."""
        said = json_of(event)
        reasons = (member(said, place) for place in self.reasons)
        return next((reason for reason in reasons if isinstance(reason, str) and reason), event.content)

    def message_in(self, event: Event) -> Any:
        """Return the message's id from the first event. It may be anything."""
        return member(json_of(event), self.message_in_event) if self.message_in_event else None

    def last_words(self, end: MessageEnd, had: Event | None) -> bytes | None:
        """Return the event that tells a client of the end, without an id, or None if this dialect has none.

        It is empty if the upstream has told the client already. A terminal event is never made up.
        """
        if end.status == "completed" or (had is not None and self.end_of(had)):
            return b""
        if self.error is None:
            return None
        code, sentence = explained(end.reason)
        if code == CANCELLED and self.stop is not None:
            name, data = self.stop(end.reason or CANCELLED)
        else:
            name, data = self.error(code, sentence, json_of(had) if had else {})
        return b"%sdata: %s\n\n" % (f"event: {name}\n".encode() if name else b"", msgspec.json.encode(data))


def explained(reason: str | None) -> tuple[str, str]:
    """Return a code and a sentence for the reason of an abort. Every reason outside FAILURES is a stop."""
    if reason in FAILURES:
        return reason, FAILURES[reason]
    return CANCELLED, f"The answer was stopped: {reason}." if reason else "The answer was stopped."


def json_of(event: Event) -> dict[str, Any]:
    """Return the event's JSON, or an empty object if it is anything else."""
    try:
        said = msgspec.json.decode(event.content)
    except UNDECODABLE:
        return {}
    return said if isinstance(said, dict) else {}


def member(said: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        said = said.get(name) if isinstance(said, dict) else None
    return said


def ids_in(match: re.Match[str]) -> dict[str, str]:
    return {name: unquote(value) for name, value in match.groupdict().items() if value}


def dialect_of(path: str, headers: Mapping[str, str], first: Event | None) -> tuple[Dialect, dict[str, str]]:
    """Return the dialect of a response's stream, and the ids in its headers."""
    for dialect in DIALECTS:
        name, pattern = dialect.header or ("", "")
        value = headers.get(name)
        if value is not None and (match := re.search(pattern, value)):
            return dialect, ids_in(match)
    return next((dialect for dialect in DIALECTS if dialect.fits(path, first)), ANY), {}


def responses_error(code: str, text: str, last: Mapping[str, Any]) -> Said:
    number = last.get("sequence_number", -1) + 1
    return "error", {"type": "error", "code": code, "message": text, "param": None, "sequence_number": number}


def aborted_response(response: dict[str, Any], code: str, text: str) -> dict[str, Any]:
    if code == CANCELLED:
        return {**response, "status": "cancelled"}
    return {**response, "status": "failed", "error": {"code": code, "message": text}}


ANY = Dialect(name="sse")  # any other stream, whose clients know no event for an error
DIALECTS = (  # those with a path first, as they are more certain
    Dialect(
        name="openai-chat",
        path=r"/completions",
        completes=frozenset({DONE}),
        aborts=frozenset({"error"}),
        last=frozenset({DONE}),
        reasons=(("error", "message"),),
        error=lambda code, text, last: (None, {"error": {"message": text, "type": code, "param": None, "code": code}}),
    ),
    Dialect(
        name="openai-responses",
        path=r"/responses(?:/[^/]+)?",
        openings=frozenset({"response.created", "response.queued", "response.in_progress"}),
        completes=frozenset({"response.completed", "response.incomplete"}),
        aborts=frozenset({"response.failed", "error"}),
        last=frozenset({"response.completed", "response.incomplete", "response.failed", "error"}),
        reasons=(("message",), ("error", "message"), ("response", "error", "message")),
        message_in_event=("response", "id"),
        error=responses_error,
        resume=("GET", r"/responses/(?P<message>[^/]+)"),
        stream_flag="stream",
        position=("starting_after", "sequence_number"),
        object_in="response",
        aborted_object=aborted_response,
        cancel=("POST", r"/responses/(?P<message>[^/]+)/cancel", 200),
    ),
    Dialect(
        name="anthropic-messages",
        path=r"/messages",
        openings=frozenset({"message_start"}),
        completes=frozenset({"message_stop"}),
        aborts=frozenset({"error"}),
        last=frozenset({"message_stop", "error"}),
        reasons=(("error", "message"),),
        error=lambda code, text, last: ("error", {"type": "error", "error": {"type": code, "message": text}}),
    ),
    Dialect(
        name="langgraph",
        header=("content-location", r"(?:/threads/(?P<thread>[^/?]+))?/runs/(?P<message>[^/?]+)"),
        completes=frozenset({"end"}),
        aborts=frozenset({"error"}),
        last=frozenset({"end"}),
        reasons=(("message",), ("error",)),
        error=lambda code, text, last: ("error", {"error": code, "message": text}),
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
        reasons=(("errorText",), ("reason",)),
        thread_in_body="id",
        headers={"x-vercel-ai-ui-message-stream": "v1"},
        error=lambda code, text, last: (None, {"type": "error", "errorText": text}),
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
        reasons=(("message",),),
        message_in_header=b"x-run-id",  # of TanStack's, whose clients join a run by it
        error=lambda code, text, last: (None, {"type": "RUN_ERROR", "message": text, "code": code}),
        resume=("GET", r"[?&]offset=-1&runId=(?P<message>[^&]+)"),
    ),
    ANY,
)
