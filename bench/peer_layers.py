"""Servers that use only the lower layers of the stack: ``python -m bench.peer_layers PORT LAYER``.

Each answers an append with as many bytes as the service, sends every waiting reader a frame of the
service's size, and stores nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import httptools
import uvloop
from litestar import Litestar, Request, Response, get, post
from litestar.params import FromPath
from litestar.response import Stream

from .peer_apps import CHUNKS, Appended, decode, serve
from .rows_fan_out import DATA, FRAME

ANSWER = b'{"threadId":"thread-1","messageId":"run","seq":1234,"chunkCount":1234,"status":"active"}'
FRAME_BYTES = FRAME % DATA
IN_A_CHUNK = b"%x\r\n%s\r\n" % (len(FRAME_BYTES), FRAME_BYTES)
CREATED = b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(ANSWER),
    ANSWER,
)
STREAMING = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Crowd:
    """Waiting readers, each with a future."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def publish(self) -> None:
        woken, self._waiting = self._waiting, []
        for waiting in woken:
            if not waiting.done():
                waiting.set_result(None)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        while True:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
            yield FRAME_BYTES


CROWD = Crowd()


class Sockets(asyncio.Protocol):
    """Read and write, and take every read for a request."""

    readers: set[asyncio.WriteTransport] = set()  # noqa: RUF012

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.readers.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.answer(data.startswith(b"GET"))

    def answer(self, reads: bool) -> None:
        if reads:
            self.transport.write(STREAMING)
            self.readers.add(self.transport)
        else:
            for reader in self.readers:
                reader.write(IN_A_CHUNK)
            self.transport.write(CREATED)


class Parsed(Sockets):
    """Parse each request as uvicorn does, and ignore the result."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.header = (name.lower(), value)

    def on_body(self, body: bytes) -> None:
        self.body = body

    def on_message_complete(self) -> None:
        self.answer(self.parser.get_method() == b"GET")


async def asgi(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """An app on uvicorn without a framework."""
    if scope["method"] == "GET":
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sending = asyncio.ensure_future(send_frames(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        sending.cancel()
        return
    while (await receive())["more_body"]:
        pass
    CROWD.publish()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


async def send_frames(send: Callable[[Any], Any]) -> None:
    async for frame in CROWD.frames():
        await send({"type": "http.response.body", "body": frame, "more_body": True})


@post(CHUNKS)
async def append(
    request: Request[Any, Any, Any], thread_id: FromPath[str], message_id: FromPath[str]
) -> Response[Appended]:
    decode(await request.body())
    CROWD.publish()
    return Response(Appended(thread_id, message_id, 1234, 1234, "active"), status_code=201)


@get("/api/threads/{thread_id:str}/stream")
async def stream(thread_id: FromPath[str]) -> Stream:
    return Stream(CROWD.frames(), media_type="text/event-stream")


async def accept(protocol: Callable[[], asyncio.Protocol], port: int) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


def main(port: int, layer: str) -> None:
    if layer in ("sockets", "parsed"):
        uvloop.run(accept(Sockets if layer == "sockets" else Parsed, port))
    else:
        app = asgi if layer == "asgi" else Litestar([append, stream], openapi_config=None)
        serve(app, port, timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
