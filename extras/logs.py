"""Logs: a line for each request, as text on a terminal, and as JSON for machines."""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
import time
from contextvars import ContextVar
from typing import Any, cast
from urllib.parse import quote

import msgspec
from litestar.enums import ScopeType
from litestar.middleware import DefineMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from ..app import Parts, Settings

log = logging.getLogger("resume_stream")

request_id: ContextVar[str] = ContextVar("request_id", default="-")
RUN = secrets.token_hex(4)  # of this process
REQUESTS = itertools.count(1)


def mount(parts: Parts) -> None:
    parts.middleware.insert(0, DefineMiddleware(Logged))


def set_up(settings: Settings) -> None:
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s") if console else JSONFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class Logged:
    """Middleware that gives each request an id (its own X-Request-ID, or a new one) and logs its answer.

    It does not log successful appends, because they are too many, nor the query, which may hold a token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = "".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id")
        request_id.set(given[:64] or f"{RUN}-{next(REQUESTS):x}")
        await self._app(scope, receive, logged(scope, send) if scope["type"] == ScopeType.HTTP else send)


def logged(scope: Scope, send: Send) -> Send:
    began = time.perf_counter()
    # A mounted app sees only a part of scope["path"].
    path = quote(scope.get("raw_path") or scope["path"].encode(), safe="/%")

    async def send_logged(message: Message) -> None:
        try:
            await send(message)
        except RuntimeError as error:
            if "closed" not in str(error):
                raise
            log.debug("the client is gone: %s", error)  # uvloop raises this
        if message["type"] == "http.response.start":
            status = message["status"]
            if status >= 400 or not path.endswith("/chunks"):
                took = round((time.perf_counter() - began) * 1000, 1)
                log.info("%s %s %d %s ms", cast(Any, scope)["method"], path, status, took)

    return send_logged


class JSONFormatter(logging.Formatter):
    """Writes each record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": int(record.created * 1000),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "request": request_id.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
