"""The client that sends requests to upstreams, and the headers that pass in each direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import httpx

from ...app import PRODUCER_TIMEOUT, BrokenOff, Problem, Settings, Unavailable
from .calls import Call, Headers, Pieces
from .dialects import FAILURES

SENT_AT_ONCE = 64 * 1024  # bytes of a request's body

# Headers that describe one connection (RFC 9110, 7.6.1), are made anew, or belong to this service.
OF_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    b" upgrade".split()
)
NOT_SENT = OF_CONNECTION | frozenset(b"host accept-encoding content-length expect resume-thread resume-message".split())
NOT_PASSED_ON = OF_CONNECTION | frozenset(b"date alt-svc strict-transport-security".split())
NOT_OF_A_STREAM = NOT_PASSED_ON | frozenset(
    b"content-length content-type cache-control x-accel-buffering resume-thread resume-message".split()
)


class BadGateway(Problem, status=502, kind="Bad gateway"): ...


class GatewayTimeout(Problem, status=504, kind="Gateway timeout"): ...


def nothing_recorded(upstream: str, reason: str) -> Problem:
    kind = GatewayTimeout if reason == PRODUCER_TIMEOUT else BadGateway
    return kind(f"The upstream {upstream!r} gave nothing to record. {FAILURES[reason]}")


class Client:
    """The connections to all upstreams. At most ``max_relays`` responses are open at a time."""

    def __init__(self, settings: Settings) -> None:
        # A bare transport adds nothing: no cookies, no redirects, no headers of its own. It keeps few idle connections,
        # as it looks at all of them for each request.
        limits = httpx.Limits(max_keepalive_connections=10, keepalive_expiry=5.0)
        self._transport = httpx.AsyncHTTPTransport(limits=limits)
        self.close = self._transport.aclose
        self._max_open, self._silence = settings.max_relays, settings.producer_timeout or None
        self._open = 0

    async def send(self, call: Call, body: bytearray, hold: Callable[[int], None]) -> httpx.Response:
        """Return the response, which the caller has to release. ``hold`` gets the size of the rest of the body.

        Raise Unavailable, BadGateway and GatewayTimeout.
        """
        if self._open >= self._max_open:
            raise Unavailable("As many answers are being relayed as max_relays allows; try again later.")
        upstream, silence = call.upstream, self._silence
        path = upstream.path + call.path.encode("latin-1") or b"/"
        request = httpx.Request(
            call.method,
            upstream.origin,
            headers=sent_headers(call, len(body)),
            content=in_pieces(body, hold) if body else None,
            extensions={
                "target": path + b"?" + call.query if call.query else path,
                "timeout": {"connect": 10.0, "read": silence, "write": silence, "pool": silence},
            },
        )
        response = None
        self._open += 1
        try:
            response = await self._transport.handle_async_request(request)
            return response
        except httpx.TimeoutException as error:
            raise GatewayTimeout(f"The upstream {upstream.name!r} does not answer; try again later.") from error
        except httpx.TransportError as error:
            kind = type(error).__name__
            raise BadGateway(f"The upstream {upstream.name!r} cannot be reached ({kind}); try again later.") from error
        finally:
            body.clear()
            if response is None:
                self._open -= 1

    async def release(self, response: httpx.Response) -> None:
        self._open -= 1
        await response.aclose()


async def in_pieces(body: bytearray, hold: Callable[[int], None]) -> Pieces:
    while body:
        piece = bytes(body[:SENT_AT_ONCE])
        del body[:SENT_AT_ONCE]
        hold(len(body))
        yield piece


async def body_of(response: httpx.Response) -> Pieces:
    try:
        async for piece in cast(httpx.AsyncByteStream, response.stream):
            yield piece
    except httpx.TransportError as error:
        raise BrokenOff from error


def sent_headers(call: Call, size: int) -> Headers:
    of_connection = (value for name, value in call.headers if name == b"connection")
    listed = {word.strip().lower() for value in of_connection for word in value.split(b",")}
    left_out = NOT_SENT | listed | {name.lower() for name, _ in call.upstream.headers}
    kept = [(name, value) for name, value in call.headers if name not in left_out]
    length = [(b"Content-Length", str(size).encode())] if size else []
    return [(b"Host", call.upstream.host), *kept, (b"Accept-Encoding", b"identity"), *length, *call.upstream.headers]


def passed_headers(response: httpx.Response, left_out: frozenset[bytes], url: bytes = b"") -> Headers:
    """Return the headers of a response without CORS, which is set here. A location at the URL then leads here."""
    headers: Headers = []
    for name, value in response.headers.raw:
        key = name.lower()
        if key not in left_out and not key.startswith(b"access-control-"):
            headers.append((name, value.removeprefix(url) if key in (b"location", b"content-location") else value))
    return headers
