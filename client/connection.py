"""Requests to the service: headers, errors, retries, and the records that answers hold."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from . import Chunk, ClientError, Problem, Unreachable

T = TypeVar("T")
Query = Mapping[str, str | int | None]

TIMEOUTS = httpx.Timeout(connect=10, read=45, write=45, pool=None)  # three heartbeats without a byte: the line is dead
# The service closes a connection that has been idle for 5 s. A shorter expiry here avoids a request into that moment.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=2)

log = logging.getLogger("resume_stream.client")


class Backoff:
    """Exponential delays with full jitter, until the service has not answered for ``patience`` seconds."""

    def __init__(self, patience: float, base: float = 0.25, cap: float = 10.0) -> None:
        self.base = base
        self._patience = patience
        self._cap = cap
        self._failures = 0
        self._deadline: float | None = None

    def answered(self) -> None:
        """Note that the service answers: the patience begins anew, the delays go on growing."""
        self._deadline = None

    def progressed(self) -> None:
        """Note that a call succeeded: begin with the shortest delay again."""
        self._failures, self._deadline = 0, None

    def hurry(self, patience: float) -> None:
        """Lower the patience to this, from now on."""
        self._patience = min(self._patience, patience)
        if self._deadline is not None:
            self._deadline = min(self._deadline, time.monotonic() + patience)

    async def wait(self, error: ClientError) -> None:
        """Sleep until the next try. Raise the error if it is not retryable, or if the patience is over."""
        if not error.retryable:
            raise error
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience
        delay = error.retry_after + self._draw()
        if now + delay > self._deadline:
            raise error
        log.warning("%s Trying again in %.1f s.", error, delay)
        await asyncio.sleep(delay)

    async def pause(self) -> None:
        """Sleep until the next try, without an error and without end."""
        await asyncio.sleep(self._draw())

    def _draw(self) -> float:
        longest = min(self._cap, self.base * 2 ** min(self._failures, 32))
        self._failures += 1
        return random.uniform(0, longest)


class Service:
    """The service at a URL, with the token and the HTTP client for it."""

    def __init__(self, url: str, token: str | None, http: httpx.AsyncClient | None, patience: float) -> None:
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"{url!r} is not the URL of a service; give one like http://127.0.0.1:8000.")
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ValueError("The token is empty, or has a character that no token can have.")
        self.url = url.rstrip("/")
        self.patience = patience
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient(limits=LIMITS)

    async def close(self) -> None:
        if self._owns_http:
            await self._http.aclose()

    async def ask(self, method: str, path: str, query: Query | None = None, body: Any = None) -> dict[str, Any]:
        """Send a request once and return the JSON of its answer. Raise as ``request`` does."""
        return answer_of(await self.request(method, path, query, body))

    async def request(self, method: str, path: str, query: Query | None = None, body: Any = None) -> httpx.Response:
        """Send a request once. Raise Problem if the answer is an error, Unreachable if there is none."""
        async with self.stream(method, path, query, body) as response:
            await response.aread()
            return response

    async def request_until_answered(
        self, backoff: Backoff, method: str, path: str, query: Query | None = None, body: Any = None
    ) -> tuple[httpx.Response, bool]:
        """Send a request until it succeeds. Return the response, and whether it was sent more than once."""
        is_retry = False
        while True:
            try:
                response = await self.request(method, path, query, body)
            except ClientError as error:
                await backoff.wait(error)
                is_retry = True
            else:
                backoff.progressed()
                return response, is_retry

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Send a request and yield the response before its body. Raise as ``request`` does."""
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._http.stream(
                method,
                f"{self.url}/api{path}",
                params={name: value for name, value in (query or {}).items() if value is not None},
                content=content,
                headers={**kind, **self._headers, **(headers or {})},
                timeout=TIMEOUTS,
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise problem_of(response)
                yield response
        except httpx.RequestError as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Unreachable(f"The service at {self.url} cannot be reached ({why}).") from error


def problem_of(response: httpx.Response) -> Problem:
    """Return the error for a response. A proxy may have answered without a problem document."""
    try:
        document = response.json()
    except ValueError:
        document = None
    members = document if isinstance(document, dict) else {}
    title = response.reason_phrase or "Error"
    return Problem.of({"title": title, **members, "status": response.status_code}, retry_after(response))


def retry_after(response: httpx.Response) -> float:
    """Return the seconds of the Retry-After header, which may be a number or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in a response. Raise ClientError if there is none."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ClientError(f"{response.url.host} did not answer with a JSON object; is it the service's URL?")
    return answer


def record(kind: type[T], data: Mapping[str, Any], **more: Any) -> T:
    """Return a record from the JSON of an answer. Ignore members that only a newer service knows."""
    wire = {field.name: re.sub("_(.)", lambda found: found[1].upper(), field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**({name: data[key] for name, key in wire.items() if key in data} | more))


def chunk_of(piece: object) -> Chunk:
    if isinstance(piece, Chunk):
        return piece
    if not isinstance(piece, str):
        raise TypeError(f"A piece is {type(piece).__name__}; give str, or Chunk.")
    return Chunk(piece)


def on_wire(chunks: Iterable[Chunk]) -> list[dict[str, str]]:
    return [
        {"content": chunk.content} if chunk.event is None else {"content": chunk.content, "event": chunk.event}
        for chunk in chunks
    ]


def thread_path(thread: str) -> str:
    return f"/threads/{quoted(thread)}"


def message_path(thread: str, message: str, call: str = "") -> str:
    return f"/threads/{quoted(thread)}/messages/{quoted(message)}{call}"


def quoted(name: str) -> str:
    """Percent-encode an id as a part of a path. URL libraries would remove a bare ``.`` or ``..``."""
    if not name or "/" in name:
        raise ValueError(f"{name!r} cannot be an id; use 1 to 200 characters, no '/' and no control characters.")
    return name.replace(".", "%2E") if name in (".", "..") else quote(name, safe="")
