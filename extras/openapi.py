"""The OpenAPI document at ``/schema/openapi.json``: Litestar's description of the calls, with our answers and errors.

``CALLS`` has the answers and errors of each call. Its key is the operation id, which is the name of the handler
in camelCase. If a handler reads its body by itself, its option ``body`` is the type of the body, with ``None`` if
the body may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, Union, get_args

import msgspec
from litestar import Response, Router
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, OpenAPI, SecurityScheme, Tag
from litestar.types import Method
from litestar.types.internal_types import PathParameterDefinition

from ..app import (
    AccumulatedContent,
    Appended,
    Chunk,
    ChunkPage,
    MessageEnd,
    NotFound,
    Parts,
    StoredChunk,
    ThreadPage,
    ThreadStatus,
    __version__,
)

COMPONENTS = "#/components/schemas/{name}"
MODELS = (Appended, AccumulatedContent, Chunk, ChunkPage, MessageEnd, StoredChunk, ThreadPage, ThreadStatus)

GENERATION, SEQ = 1763829000123, 42
CURSOR = f"{GENERATION}-{SEQ}"
CHUNK = {"content": "Hello", "timestamp": 1763829000456, "messageId": "run-1", "seq": SEQ}
END = {"messageId": "run-1", "status": "completed", "reason": None, "seq": SEQ + 1}
APPENDED = {"threadId": "thread-1", "messageId": "run-1", "seq": SEQ, "chunkCount": 17, "status": "active"}
STATE = {"messageId": "run-1", "status": "active", "reason": None, "chunkCount": 17, "firstSeq": 26, "lastSeq": SEQ}
TIMES = {"createdAt": 1763829000123, "updatedAt": 1763829000456}
SUMMARY = {"threadId": "thread-1", "status": "active", "messageCount": 2, "chunkCount": 41, "size": 193, "readers": 1}

PROBLEM = {
    "title": "Problem",
    "description": "A problem document (RFC 9457): what is wrong, and what to do instead.",
    "type": "object",
    "properties": {
        "status": {"type": "integer", "description": "the status code of the answer"},
        "title": {"type": "string"},
        "detail": {"type": "string", "description": "what is wrong, and what to do instead"},
        "exists": {"type": "boolean", "description": "false: there is no such thread or message (404)"},
        "expectedIndex": {"type": "integer", "description": "the index to continue with (409)"},
        "messageStatus": {"type": "string", "description": "how the message ended (409)"},
        "reason": {"type": ["string", "null"], "description": "why the message was aborted (409)"},
        "chunkCount": {"type": "integer", "description": "the number of chunks of the message (409)"},
    },
    "required": ["status", "title", "detail"],
}
ERRORS: dict[int, str] = {
    400: "An id, a cursor, or a parameter is not valid.",
    401: "The token is missing, wrong, or has expired.",
    403: "The token does not allow this call, or this page or host may not connect.",
    404: "There is no such thread or message.",
    409: "The message has ended, another producer writes to it, or `index` leaves a gap; nothing was stored.",
    410: "The cursor is of a thread that was cleared or expired, or lies beyond its end; read from the start.",
    413: "Over a limit; nothing was stored.",
    415: "This call does not take a body of this type.",
    422: "The body does not have the form that this call takes, or its text is not valid Unicode; nothing was stored.",
    503: "Not now: the service is stopping, its database cannot be used, or there are too many readers.",
    507: "The disk or the size limit is full; nothing was stored.",
}
ERROR_HEADERS = {401: ("WWW-Authenticate", "Bearer"), 503: ("Retry-After", "1")}

STREAM = """Server-sent events, each with its data on one line of JSON.

| event | id | data |
| --- | --- | --- |
| (none), or the chunk's own | `<generation>-<seq>` | a `StoredChunk` |
| `complete` | `<generation>-<seq>` | a `MessageEnd`: completed or aborted |
| `reset` | | `{}`: forget what you have; all of it follows |
| `timeout` | | `{}`: nothing new for `idle_timeout`; the message is still active |
| `gone` | | `{}`: the thread was cleared or expired while you read |
| `error` | | a `Problem` |

A quiet stream sends the comment `: hb`. An id is a cursor: send the last one as `Last-Event-ID` or `after`."""
FRAMES = (
    f"retry: 1000\nid: {GENERATION}-{SEQ}\ndata: {msgspec.json.encode(CHUNK).decode()}\n\n"
    f"id: {GENERATION}-{SEQ + 1}\nevent: complete\ndata: {msgspec.json.encode(END).decode()}\n\n"
)
EVENTS = {"message": "StoredChunk", "complete": "MessageEnd", "error": "Problem"}


class Answer(NamedTuple):
    """A successful answer. ``model`` is the type of its JSON; ``content`` has other content by its type."""

    description: str
    model: str = ""
    example: Any = None
    content: Mapping[str, Any] = MappingProxyType({})


class Call(NamedTuple):
    tag: str
    answers: dict[int, Answer]
    errors: tuple[int, ...] = ()


def appended(description: str) -> Answer:
    return Answer(description, "Appended", APPENDED)


def text(example: str) -> dict[str, Any]:
    return {"text/plain": {"schema": {"type": "string"}, "example": example}}


EVENT_STREAM = Answer(
    STREAM,
    content={
        "text/event-stream": {
            "schema": {
                "type": "string",
                "x-event-data": {event: {"$ref": COMPONENTS.format(name=name)} for event, name in EVENTS.items()},
            },
            "example": FRAMES,
        }
    },
)
NOTHING_MORE = Answer("Nothing more will come, which tells an `EventSource` to stop reconnecting.")
FOLLOWED = {200: EVENT_STREAM, 204: NOTHING_MORE}
HEALTHY = Answer("Yes.", content={"application/json": {"schema": {"type": "object"}, "example": {"status": "ok"}}})

ANYWHERE = (400, 401, 403, 503)
BODY = (413, 415, 422)
CALLS: dict[str, Call] = {
    "openMessage": Call(
        "Producers", {201: appended("Opened."), 200: appended("The message exists.")}, (*ANYWHERE, 507)
    ),
    "appendChunks": Call(
        "Producers",
        {201: appended("Committed."), 200: appended("Everything was stored before: this was a retry.")},
        (*ANYWHERE, 409, *BODY, 507),
    ),
    "completeMessage": Call("Producers", {200: appended("Completed, now or before.")}, (*ANYWHERE, 404, 409, 507)),
    "abortMessage": Call("Producers", {200: appended("Aborted, now or before.")}, (*ANYWHERE, 404, 409, *BODY, 507)),
    "streamThread": Call("Readers", FOLLOWED, (*ANYWHERE, 404, 410)),
    "streamMessage": Call("Readers", FOLLOWED, (*ANYWHERE, 404, 410)),
    "streamActiveMessage": Call("Readers", FOLLOWED, (*ANYWHERE, 404, 410)),
    "resumeStream": Call("Readers", FOLLOWED, (*ANYWHERE, *BODY)),
    "getChunks": Call(
        "Readers",
        {
            200: Answer(
                "The chunks and ends after the cursor, and the cursor of the next page.",
                "ChunkPage",
                {"chunks": [CHUNK], "ends": [END], "cursor": f"{GENERATION}-{SEQ + 1}", "status": "completed"},
            )
        },
        (*ANYWHERE, 404, 410),
    ),
    "getAccumulatedContent": Call(
        "Readers",
        {
            200: Answer(
                "The text; without JSON for `Accept: text/plain`.",
                "AccumulatedContent",
                {"content": "Hello", "cursor": CURSOR, "status": "active"},
                text("Hello"),
            )
        },
        (*ANYWHERE, 404),
    ),
    "getThreadStatus": Call(
        "Threads",
        {
            200: Answer(
                "The thread, with its messages in the order they began.",
                "ThreadStatus",
                {**SUMMARY, **TIMES, "cursor": CURSOR, "messages": [{**STATE, **TIMES}], "exists": True},
            )
        },
        (*ANYWHERE, 404),
    ),
    "getThreads": Call(
        "Threads",
        {200: Answer("The newest first.", "ThreadPage", {"threads": [{**SUMMARY, **TIMES}], "cursor": None})},
        ANYWHERE,
    ),
    "clearThreadBuffer": Call(
        "Threads", {204: Answer("Its text is in neither the database nor the WAL.")}, (*ANYWHERE, 404, 507)
    ),
    "mintToken": Call(
        "Tokens",
        {
            201: Answer(
                "For this thread alone.",
                "Token",
                {"token": "eyJhbGciOi…", "scope": "read", "threadId": "thread-1", "expiresAt": 1763829900000},
            )
        },
        (400, 401, 403, *BODY),
    ),
    "live": Call("Operation", {200: HEALTHY}, (403,)),
    "ready": Call("Operation", {200: HEALTHY}, (403, 503, 507)),
    "metrics": Call(
        "Operation",
        {200: Answer("In Prometheus' text format.", content=text("resume_stream_chunks_in_total 17.0\n"))},
        (401, 403, 503),
    ),
}
TAGS = {
    "Producers": "Store an answer.",
    "Readers": "Follow an answer, from any place in it.",
    "Threads": "List, inspect, and clear threads.",
    "Tokens": "Make tokens, if the service has a secret.",
    "Operation": "Run the service.",
}
STREAMED = {"application/x-ndjson": '{"content":"Hello"}\n{"content":", world"}\n', "text/plain": "Hello"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "appendChunks": {
        "a chunk": {"content": "Hello"},
        "chunks": [{"content": "Hello"}, {"content": "get_weather", "event": "tool_call"}],
    },
    "abortMessage": {"with a reason": {"reason": "enough"}},
    "resumeStream": {
        "by known text": {"thread_id": "thread-1", "message_id": "run-1", "known_content": "Hello, w"},
        "by a cursor": {"thread_id": "thread-1", "message_id": "run-1", "after": CURSOR},
    },
    "mintToken": {"to read and to stop": {"scope": "read abort", "expires_in": "10m"}},
}

PARAMETERS: dict[str, dict[str, Any]] = {
    "thread_id": {"example": "thread-1"},
    "message_id": {"example": "run-1"},
    "index": {"description": "the number of the body's first chunk in its message, from 0; makes a retry safe"},
    "complete": {"description": "complete the message in the transaction of its last chunk"},
    "after": {"example": CURSOR},
    "follow": {"description": "wait for a thread or message that does not exist yet, and for a thread's next message"},
    "idle_timeout": {"description": "end the stream after this long without news; 0: never", "example": "1m"},
    "poll_interval": {"description": "has no effect: readers do not poll", "example": "100ms"},
    "limit": {"description": "the longest list in the answer: 1 to 10,000 chunks, 1 to 1,000 threads or messages"},
    "wait": {"description": "seconds to wait for the first chunk"},
    "status": {"description": "only threads of this status"},
}
LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "the id of the last event, which browsers send by themselves; it wins over `after`",
    "required": False,
    "schema": {"type": "string"},
    "example": CURSOR,
}
TOKEN_IN_QUERY = {
    "type": "apiKey",
    "in": "query",
    "name": "access_token",
    "description": "for readers that cannot send headers, such as an `EventSource`",
}
DESCRIPTION = """Keeps what an agent is streaming, so that a reader carries on from the exact place where it stopped.

A **thread** holds **messages**, and a message holds **chunks**. Each chunk and each end of a message has a sequence \
number in its thread. A **cursor** is `<generation>-<seq>`. The WebSocket `/api/ws` offers the same over one \
connection."""


def mount(parts: Parts) -> None:
    parts.openapi = Document(parts)


class Document(OpenAPIConfig):
    """Litestar's document of the routes, completed from the tables above."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(
            title="resume-stream",
            version=__version__,
            components=Components(
                security_schemes={"bearerAuth": SecurityScheme(type="http", scheme="bearer", bearer_format="JWT")}
            ),
            security=[{"bearerAuth": []}],
            render_plugins=parts.openapi_pages or [JsonRenderPlugin()],
            description=DESCRIPTION,
            tags=[Tag(name, description) for name, description in TAGS.items()],
            use_handler_docstrings=True,
            operation_id_creator=self._name,
            openapi_router=Router(
                "/schema", route_handlers=[], include_in_schema=False, after_request=explain_not_found
            ),
        )
        self._parts = parts
        self._handlers: dict[str, HTTPRouteHandler] = {}

    def _name(self, handler: HTTPRouteHandler, method: Method, path: list[str | PathParameterDefinition]) -> str:
        first, *others = handler.handler_name.strip("_").split("_")
        name = first + "".join(map(str.title, others))
        self._handlers[name] = handler
        return name

    def to_openapi_schema(self) -> OpenAPI:
        made = Finished(**vars(super().to_openapi_schema()))
        made.finish = self._finish
        return made

    def _finish(self, document: dict[str, Any]) -> dict[str, Any]:
        schemas, responses = document["components"]["schemas"], document["components"].setdefault("responses", {})
        schemas.update(schemas_of(*MODELS)[1], Problem=PROBLEM)
        responses.update(error_answers())
        document["components"]["securitySchemes"]["tokenInQuery"] = TOKEN_IN_QUERY
        is_open = not self._parts.buffer.settings.secret
        document["security"] = [{"bearerAuth": []}, *([{}] if is_open else [])]
        for path in document["paths"].values():
            for operation in path.values():
                self._finish_call(operation, schemas, is_open)
        return document

    def _finish_call(self, operation: dict[str, Any], schemas: dict[str, Any], is_open: bool) -> None:
        name = operation["operationId"]
        options = self._handlers[name].opt
        if call := CALLS.get(name):
            operation["tags"] = [call.tag]
            operation["responses"] = {
                **{str(status): answer_of(answer) for status, answer in sorted(call.answers.items())},
                **{str(status): {"$ref": f"#/components/responses/{key_of(status)}"} for status in sorted(call.errors)},
            }
        for parameter in operation.get("parameters", []):
            finish_parameter(parameter)
        if EVENT_STREAM in (call.answers.values() if call else ()) and not options.get("body"):
            operation["parameters"].append(LAST_EVENT_ID)
        if body := options.get("body"):
            operation["requestBody"] = self._body(name, body, schemas)
        if not options.get("scope"):
            operation["security"] = []
        elif options.get("token_in_query"):
            operation["security"] = [{"bearerAuth": []}, {"tokenInQuery": []}, *([{}] if is_open else [])]

    def _body(self, name: str, body: Any, schemas: dict[str, Any]) -> dict[str, Any]:
        kinds = [kind for kind in get_args(body) or (body,) if kind is not NoneType]
        schema, components = schemas_of(Union[*kinds])
        schemas.update(components)
        examples = {title: {"value": value} for title, value in EXAMPLES.get(name, {}).items()}
        content: dict[str, Any] = {"application/json": {"schema": schema[0], "examples": examples}}
        if Chunk in kinds:
            streamed = [kind for kind in self._parts.bodies if kind not in content]
            content |= {kind: {"schema": {"type": "string"}, "example": STREAMED[kind]} for kind in streamed}
        return {"content": content, "required": NoneType not in get_args(body)}


class Finished(OpenAPI):
    """A document that ``finish`` completes. It is no dataclass, as ``finish`` would become a part of the document."""

    finish: Callable[[dict[str, Any]], dict[str, Any]]

    def to_schema(self) -> dict[str, Any]:
        return self.finish(super().to_schema())


def schemas_of(*types: Any) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    return msgspec.json.schema_components(types, ref_template=COMPONENTS)


def key_of(status: int) -> str:
    return HTTPStatus(status).phrase.title().replace(" ", "")


def error_answers() -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": COMPONENTS.format(name="Problem")}}}
    answers: dict[str, Any] = {
        key_of(status): {"description": description, "content": content} for status, description in ERRORS.items()
    }
    for status, (name, value) in ERROR_HEADERS.items():
        answers[key_of(status)]["headers"] = {name: {"schema": {"type": "string"}, "example": value}}
    return answers


def answer_of(answer: Answer) -> dict[str, Any]:
    content = dict(answer.content)
    if answer.model:
        schema = {"$ref": COMPONENTS.format(name=answer.model)}
        content = {"application/json": {"schema": schema, "example": answer.example}, **content}
    return {"description": answer.description, **({"content": content} if content else {})}


def finish_parameter(parameter: dict[str, Any]) -> None:
    """Remove null from the types of a parameter: it may be missing, but it is never null."""
    schema = parameter["schema"]
    choices = [choice for choice in schema.pop("oneOf", []) if choice.get("type") != "null"]
    schema.update(*choices)
    if isinstance(schema.get("type"), list):
        (schema["type"],) = [kind for kind in schema["type"] if kind != "null"]
    if "enum" in schema:
        schema["enum"] = [value for value in schema["enum"] if value is not None]
    schema.pop("description", None)
    parameter.update(PARAMETERS.get(parameter["name"], {}))


def explain_not_found(response: Response[Any]) -> Response[Any]:
    """Litestar's own 404 has no body."""
    if response.status_code != HTTPStatus.NOT_FOUND:
        return response
    problem = NotFound("There is no such page; the document of the API is /schema/openapi.json.")
    return Response(problem.document, media_type="application/problem+json", status_code=problem.status_code)
