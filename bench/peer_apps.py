"""Litestar handlers to compare with the service: ``python -m bench.peer_apps PORT [REDIS_PORT]``.

They have the service's route, body, answer size, and uvicorn settings. Without REDIS_PORT the handler
stores nothing; with it, the handler appends to a Redis stream.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar, Request, Response, post
from litestar.params import FromPath

CHUNKS = "/api/threads/{thread_id:str}/messages/{message_id:str}/chunks"


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    content: str
    event: str | None = None


class Appended(msgspec.Struct, frozen=True, rename="camel"):
    thread_id: str
    message_id: str
    seq: int
    chunk_count: int
    status: str


decode = msgspec.json.Decoder(Chunk).decode


@post(CHUNKS)
async def store_nothing(
    request: Request[Any, Any, Any], thread_id: FromPath[str], message_id: FromPath[str]
) -> Response[Appended]:
    decode(await request.body())
    return Response(Appended(thread_id, message_id, 1234, 1234, "active"), status_code=201)


def storing_in_redis(port: int) -> Any:
    import redis.asyncio as redis

    client = redis.Redis(host="127.0.0.1", port=port)

    @post(CHUNKS)
    async def append(
        request: Request[Any, Any, Any], thread_id: FromPath[str], message_id: FromPath[str]
    ) -> Response[Appended]:
        chunk = decode(await request.body())
        await client.xadd(thread_id, {"message": message_id, "content": chunk.content})
        return Response(Appended(thread_id, message_id, 1234, 1234, "active"), status_code=201)

    return append


def serve(app: Any, port: int, **settings: Any) -> None:
    """Serve the app with the service's uvicorn settings."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
        **settings,
    )


def main(port: int, redis_port: int | None = None) -> None:
    handler = store_nothing if redis_port is None else storing_in_redis(redis_port)
    serve(Litestar([handler], openapi_config=None), port)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
