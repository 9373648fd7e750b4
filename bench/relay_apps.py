"""An upstream, or a relay that stores nothing: ``python -m bench.relay_apps PORT [UPSTREAM_PORT]``.

Without UPSTREAM_PORT this is an upstream. ``GET /COUNT`` streams so many events as fast as it can;
``GET /COUNT/MS/LATER`` waits LATER ms and then streams an event every MS ms. Events are as large as a
provider's and carry the time at which they were written (the machine has one clock). With UPSTREAM_PORT
this is a Litestar handler that passes the upstream's answers on with httpx.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import uvloop
from litestar import Litestar, Request, get
from litestar.response import Stream

from .peer_apps import serve

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
AT_ONCE = 16  # events that a fast upstream writes before it waits for its connection


def event(number: int) -> bytes:
    """Return an event about as long as those of recorded answers (240 bytes)."""
    choice = {"index": 0, "delta": {"content": " tok"}, "logprobs": None, "finish_reason": None}
    data = {
        "id": "chatcmpl-D8Z5oo6uDh67AD85p73ksdT1KxhE0",
        "object": "chat.completion.chunk",
        "created": 1770933892,
        "model": f"bench-{number:06d}",
        "choices": [choice],
        "at": f"{time.monotonic():.6f}",
    }
    text = b"data: %s\n\n" % json.dumps(data, separators=(",", ":")).encode()
    return b"%x\r\n%s\r\n" % (len(text), text)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            count, pause, later = (*head.split(b" ")[1].strip(b"/").split(b"/"), b"", b"0")[:3]
            writer.write(HEAD)
            began = time.monotonic() + float(later or 0) / 1000
            for number in range(int(count)):
                if pause:
                    await asyncio.sleep(max(0.0, began + number * int(pause) / 1000 - time.monotonic()))
                writer.write(event(number))
                if number % AT_ONCE == 0:
                    await writer.drain()
            done = b"data: [DONE]\n\n"
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # its client has gone
    finally:
        writer.close()


async def stream_events(port: int) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def passing_on(port: int) -> Litestar:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits)

    async def passed(path: str) -> AsyncGenerator[bytes, None]:
        async with client.stream("GET", path) as response:
            async for piece in response.aiter_raw():
                yield piece

    @get("/relay/bench/{path:path}")
    async def relay(request: Request[Any, Any, Any], path: str) -> Stream:
        return Stream(passed(path), headers={"Content-Type": "text/event-stream"})

    return Litestar([relay], openapi_config=None)


def main(port: int, upstream: int | None = None) -> None:
    if upstream is None:
        uvloop.run(stream_events(port))
    else:
        serve(passing_on(upstream), port, backlog=2048)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
