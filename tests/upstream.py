"""An upstream for the relay: a real server that streams a recorded answer, and can cut it anywhere.

It runs in a thread of the test's process, so that clients in other processes (Node, a browser) can reach it::

    with Upstream() as upstream:
        upstream.answer(CHAT)                      # answers every request from now on
        upstream.answer(CHAT.held(2), at="/v1/x")  # answers requests there; it waits after two events …
        upstream.go_on()                           # … until this call, one for each pause
        upstream.asked, upstream.left              # its requests, and how many clients left early

A recording has its own path (``CHAT.path``), so that one test can go through all recordings. A test file has
``upstream, service = shared_upstream(), relaying()``, which all of its tests share. The URL of the relay is
``relay_url(service)``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from conftest import Service

PAUSE = b""  # a piece that waits for go_on()
EVENTS = {"Content-Type": "text/event-stream; charset=utf-8"}


@dataclass(frozen=True)
class Recording:
    """An answer. The upstream sends its pieces one by one, and ends its body well or breaks it off."""

    pieces: tuple[bytes, ...]
    path: str = "/events"
    method: str = "POST"
    body: bytes = b"{}"  # of the request
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: dict(EVENTS))
    is_broken: bool = False
    has_head: bool = True  # without a head, the upstream closes the connection at once

    def held(self, after: int) -> Recording:
        """Return the recording with a pause after so many pieces."""
        return dataclasses.replace(self, pieces=(*self.pieces[:after], PAUSE, *self.pieces[after:]))

    def held_everywhere(self) -> Recording:
        return dataclasses.replace(self, pieces=tuple(piece for event in self.pieces for piece in (PAUSE, event)))

    def broken(self, after: int, more: int = 0) -> Recording:
        """Return the recording broken off after so many pieces, and so many bytes of the next."""
        rest = self.pieces[after][:more] if more else b""
        return dataclasses.replace(self, pieces=(*self.pieces[:after], *filter(None, [rest])), is_broken=True)

    def ended(self, after: int, *more: bytes) -> Recording:
        """Return the recording with a good end after so many pieces, and then these others."""
        return dataclasses.replace(self, pieces=(*self.pieces[:after], *more))

    def at(self, path: str) -> Recording:
        return dataclasses.replace(self, path=path)

    @property
    def data(self) -> list[str]:
        """The data of its events."""
        return [line[6:].decode() for piece in self.pieces for line in piece.splitlines() if line.startswith(b"data: ")]


def plain(status: int, document: Any, **headers: str) -> Recording:
    """Return an answer that is not a stream."""
    said = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return Recording((json.dumps(document).encode(),), status=status, headers=said)


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]  # by name in lower case
    body: bytes
    lines: tuple[bytes, ...]  # the raw head

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Upstream:
    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.left = 0
        self.paused = 0  # answers in a pause
        self._answers: dict[str, Recording] = {}
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[started], daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def answer(self, recording: Recording, at: str = "") -> None:
        """Answer every request so, or those whose target begins with ``at``."""
        self._answers[at] = recording

    def forget(self) -> None:
        """Forget all requests and answers."""
        self._answers.clear()
        self.asked.clear()
        self.left = 0
        self._going_on = asyncio.Semaphore(0)

    def go_on(self, times: int = 1) -> None:
        for _ in range(times):
            self._loop.call_soon_threadsafe(self._going_on.release)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(started))
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._stopped, self._going_on = asyncio.Event(), asyncio.Semaphore(0)
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        started.set()
        await self._stopped.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # its client has left
        finally:
            self._connections.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer a request. Return True if another one may follow."""
        lines = tuple((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2])
        method, target, _ = lines[0].decode("latin-1").split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.decode("latin-1").partition(":") for line in lines[1:])
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.asked.append(Request(method, target, headers, body, lines))
        begins = max((at for at in self._answers if target.startswith(at)), key=len, default=None)
        answer = plain(404, {"error": "nothing is here"}) if begins is None else self._answers[begins]
        return await self._answered(answer, method, reader, writer)

    async def _answered(
        self, answer: Recording, method: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if answer.has_head:
            names = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            writer.write(f"HTTP/1.1 {answer.status} OK\r\n{names}Transfer-Encoding: chunked\r\n\r\n".encode())
        for piece in answer.pieces if method != "HEAD" else ():
            if piece is PAUSE:
                if not await self._released(reader):
                    self.left += 1
                    return False
            else:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                try:
                    await writer.drain()
                except ConnectionError:
                    self.left += 1
                    return False
        if answer.is_broken:
            return False
        if method != "HEAD":
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _released(self, reader: asyncio.StreamReader) -> bool:
        """Wait for go_on(). Return False if the client has left meanwhile."""
        released, gone = asyncio.create_task(self._going_on.acquire()), asyncio.create_task(reader.read(1))
        self.paused += 1
        try:
            await asyncio.wait([released, gone], return_when=asyncio.FIRST_COMPLETED)
            return released.done()
        finally:
            self.paused -= 1
            released.cancel()
            gone.cancel()
            await asyncio.wait([released, gone])


def frames(*events: Any, named: bool = False) -> tuple[bytes, ...]:
    """Return events with JSON data. With ``named``, the type of the data names the event."""
    return tuple(
        (f"event: {event['type']}\n" if named else "").encode() + b"data: %s\n\n" % json.dumps(event).encode()
        for event in events
    )


DONE = b"data: [DONE]\n\n"


def chat_chunk(**delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


CHAT = Recording(
    (
        *frames(chat_chunk(role="assistant", content=""), *(chat_chunk(content=text) for text in ("Hé", "l\n", "lo"))),
        *frames(chat_chunk()),
        DONE,
    ),
    "/v1/chat/completions",
    body=b'{"model":"m","stream":true,"messages":[{"role":"user","content":"Hi"}]}',
)

RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "in_progress",
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "model": "m",
    "output": [],
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
}
PART: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
ITEM: dict[str, Any] = {"id": "msg_1", "type": "message", "status": "in_progress", "role": "assistant", "content": []}
WHOLE_ITEM = {**ITEM, "status": "completed", "content": [{**PART, "text": "Hello"}]}
OF_ITEM = {"item_id": "msg_1", "output_index": 0}
OF_PART = {**OF_ITEM, "content_index": 0}


def response_events(*events: dict[str, Any]) -> tuple[bytes, ...]:
    return frames(*({**event, "sequence_number": number} for number, event in enumerate(events)), named=True)


RESPONSES = Recording(
    response_events(
        {"type": "response.created", "response": RESPONSE},
        {"type": "response.in_progress", "response": RESPONSE},
        {"type": "response.output_item.added", "output_index": 0, "item": ITEM},
        {"type": "response.content_part.added", **OF_PART, "part": PART},
        {"type": "response.output_text.delta", **OF_PART, "delta": "Hel", "logprobs": []},
        {"type": "response.output_text.delta", **OF_PART, "delta": "lo", "logprobs": []},
        {"type": "response.output_text.done", **OF_PART, "text": "Hello", "logprobs": []},
        {"type": "response.content_part.done", **OF_PART, "part": {**PART, "text": "Hello"}},
        {"type": "response.output_item.done", "output_index": 0, "item": WHOLE_ITEM},
        {"type": "response.completed", "response": {**RESPONSE, "status": "completed", "output": [WHOLE_ITEM]}},
    ),
    "/v1/responses",
    body=b'{"model":"m","stream":true,"input":"Hi"}',
)

ANTHROPIC = Recording(
    frames(
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 1, "output_tokens": 1},
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 2},
        },
        {"type": "message_stop"},
        named=True,
    ),
    "/v1/messages",
    body=b'{"model":"m","max_tokens":9,"stream":true,"messages":[{"role":"user","content":"Hi"}]}',
)

AI_SDK = Recording(
    (
        *frames(
            {"type": "start", "messageId": "a1"},
            {"type": "start-step"},
            {"type": "text-start", "id": "t1"},
            {"type": "text-delta", "id": "t1", "delta": "Hel"},
            {"type": "text-delta", "id": "t1", "delta": "lo"},
            {"type": "text-end", "id": "t1"},
            {"type": "finish-step"},
            {"type": "finish"},
        ),
        DONE,
    ),
    "/api/chat",
    body=b'{"id":"chat-1","messages":[],"trigger":"submit-message"}',
    headers={**EVENTS, "x-vercel-ai-ui-message-stream": "v1"},
)

AG_UI = Recording(
    frames(
        {"type": "RUN_STARTED", "threadId": "t1", "runId": "r1"},
        {"type": "TEXT_MESSAGE_START", "messageId": "m1", "role": "assistant"},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m1", "delta": "Hel"},
        {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m1", "delta": "lo"},
        {"type": "TEXT_MESSAGE_END", "messageId": "m1"},
        {"type": "RUN_FINISHED", "threadId": "t1", "runId": "r1"},
    ),
    "/agent",
)

LANGGRAPH = Recording(
    (
        b'id: 9-0\nevent: metadata\ndata: {"run_id":"run-1","attempt":1}\n\n',
        b'id: 10-0\nevent: messages/partial\ndata: [{"type":"ai","content":"Hel"}]\n\n',
        b": heartbeat\n\n",
        b'id: 11-0\nevent: messages/partial\ndata: [{"type":"ai","content":"Hello"}]\n\n',
        b'id: 12-0\nevent: values\ndata: {"messages":["Hello"]}\n\n',
        b"event: end\ndata: null\n\n",
    ),
    "/threads/t-1/runs/stream",
    body=b'{"assistant_id":"agent","input":{},"stream_mode":["values"]}',
    headers={**EVENTS, "Location": "/threads/t-1/runs/run-1/stream", "Content-Location": "/threads/t-1/runs/run-1"},
)

OTHER = Recording(
    (b"data: one\n\n", b"event: named\ndata: two\ndata: lines\n\n", b": a comment\n\nid: 7\nretry: 5\ndata: {}\n\n"),
    "/events",
    "GET",
    b"",
)

RECORDINGS: dict[str, Recording] = {
    "openai-chat": CHAT,
    "openai-responses": RESPONSES,
    "anthropic-messages": ANTHROPIC,
    "ai-sdk": AI_SDK,
    "ag-ui": AG_UI,
    "langgraph": LANGGRAPH,
    "sse": OTHER,
}


# How each upstream says that its answer failed.
ERRORS = {
    "openai-chat": frames({"error": {"message": "overloaded", "type": "server_error", "code": None}})[0],
    "openai-responses": frames(
        {"type": "error", "code": "server_error", "message": "overloaded", "param": None, "sequence_number": 3},
        named=True,
    )[0],
    "anthropic-messages": frames(
        {"type": "error", "error": {"type": "overloaded_error", "message": "overloaded"}}, named=True
    )[0],
    "ai-sdk": frames({"type": "error", "errorText": "overloaded"})[0],
    "ag-ui": frames({"type": "RUN_ERROR", "message": "overloaded"})[0],
    "langgraph": b'event: error\ndata: {"error":"ValueError","message":"overloaded"}\n\n',
}


def shared_upstream() -> Any:
    """Return the fixture ``upstream`` of a file."""

    @pytest.fixture(scope="module")
    def upstream() -> Iterator[Upstream]:
        with Upstream() as upstream:
            yield upstream

    return upstream


@pytest.fixture(autouse=True)
def fresh(upstream: Upstream) -> None:
    """Let the upstream forget the answers of an earlier test."""
    upstream.forget()


def relaying(*flags: str, environment: dict[str, str] | None = None, base: str = "") -> Any:
    """Return the fixture ``service`` of a file, which relays to ``upstream`` under the name ``up``."""

    @pytest.fixture(scope="module")
    def service(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Service]:
        folder: Path = tmp_path_factory.mktemp("relaying")
        named = ("--upstream", f"up={upstream.url}{base}")
        with Service(folder / "chunks.db", *named, *flags, environment=environment) as service:
            yield service

    return service


def relay_url(service: Service, name: str = "up") -> str:
    return f"{service.url}/relay/{name}"
