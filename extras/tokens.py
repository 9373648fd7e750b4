"""Tokens (RFC 7519, 8693), where there is a secret: who may do what, and how one is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import msgspec
from litestar import Request, post
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from ..app import (
    THREAD,
    BadRequest,
    Buffer,
    Forbidden,
    Grant,
    InvalidContent,
    Parts,
    Problem,
    Record,
    Settings,
    StartupError,
    ThreadId,
    Unauthorized,
    checked_id,
    json_body,
    parse_duration,
    seconds,
)

SCOPES = ("read", "write", "abort", "admin")
ENOUGH = {"abort": {"abort", "write"}, "any": set(SCOPES)}  # the words that are each enough for a call


def mount(parts: Parts) -> None:
    parts.api.append(mint_token)
    if secret := parts.buffer.settings.secret:
        parts.guards.append(partial(authorize, secret))
        parts.grant_of = partial(grant_of, secret=secret)


def add_commands(commands: Any) -> None:
    token = commands.add("token", "make a token", make_token, "secret")
    token.add_argument("--scope", default="read", help="words of read, write, abort, admin (default: read)")
    token.add_argument("--thread", action="append", default=[], help="an id, or prefix*, more than once (default: all)")
    token.add_argument("--expires-in", default="1h", help="how long it is good for (default: 1h)")


class TokenGrant(Grant, frozen=True):
    """What a token allows. ``scope`` is words of read, write, abort and admin (RFC 8693, 4.2)."""

    scope: frozenset[str] = frozenset()

    def allows(self, scope: str, thread_id: str | None) -> bool:
        return self.has(scope) and (thread_id is None or self.covers(thread_id))

    def covers(self, thread_id: str) -> bool:
        return self.threads is None or any(
            thread_id.startswith(pattern[:-1]) if pattern.endswith("*") else thread_id == pattern
            for pattern in self.threads
        )

    def has(self, scope: str) -> bool:
        return "admin" in self.scope or not self.scope.isdisjoint(ENOUGH.get(scope, {scope}))

    def require(self, scope: str, thread_id: str | None) -> None:
        if time.time() >= self.expires:
            raise Unauthorized.expired()
        if not self.has(scope):
            enough = " or ".join(sorted(ENOUGH.get(scope, {scope})))
            raise Forbidden(f"The token's scope is {' '.join(sorted(self.scope))!r}; this takes {enough}.")
        if thread_id is not None and not self.covers(thread_id):
            raise Forbidden(f"The token does not cover the thread {thread_id!r}; get one that names it.")


class Claims(msgspec.Struct, frozen=True):
    """Those of a token (RFC 7519) that count here."""

    exp: float
    scope: str = ""
    threads: tuple[str, ...] | None = None


def token_for(secret: str, grant: TokenGrant) -> str:
    import jwt

    claims: dict[str, Any] = {"exp": int(grant.expires), "scope": " ".join(sorted(grant.scope))}
    if grant.threads is not None:
        claims["threads"] = list(grant.threads)
    return jwt.encode(claims, secret, algorithm="HS256")


def grant_of(token: str, secret: str) -> TokenGrant:
    """What a token allows; its signature is compared in constant time. Raises Unauthorized."""
    import jwt  # of no use, and 10 ms, where there is no secret

    try:
        claims = msgspec.convert(jwt.decode(token, secret, algorithms=["HS256"], options={"require": ["exp"]}), Claims)
    except jwt.ExpiredSignatureError as error:
        raise Unauthorized.expired() from error
    except (jwt.InvalidTokenError, msgspec.ValidationError) as error:
        raise Unauthorized(
            f"The token is not valid here ({error}); get one made with this service's secret."
        ) from error
    return TokenGrant(claims.threads, claims.exp, frozenset(claims.scope.split()))


async def authorize(secret: str, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard: find out what the caller may do, and whether this call is among it.

    An EventSource and a browser's WebSocket cannot send headers, so for what only reads, and for
    a WebSocket, the token may be in the query too, and in a header that the handler names. Raises
    Unauthorized or Forbidden.
    """
    scope = handler.opt.get("scope")  # none for what is open to all, and for Litestar's own answers to OPTIONS
    if scope is None:
        return
    try:
        in_query, header = bool(handler.opt.get("token_in_query")), handler.opt.get("token_header")
        connection.scope["auth"] = grant_for(connection, secret, scope, in_query, header)
    except Problem as problem:
        connection.scope["refusal"] = problem  # type: ignore[typeddict-unknown-key]
        raise


def grant_for(
    connection: ASGIConnection[Any, Any, Any, Any],
    secret: str,
    scope: str,
    token_in_query: bool,
    token_header: str | None,
) -> Grant:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = connection.headers.get(token_header, "") if token_header else ""
    if not token and token_in_query:
        token = connection.query_params.get("access_token", "")
    if not token:
        raise Unauthorized("This takes a token; send it as 'Authorization: Bearer …'.")
    grant = grant_of(token.strip(), secret)
    grant.require(scope, connection.path_params.get("thread_id"))
    return grant


class TokenBody(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    """``scope`` is words of read, write and abort; ``expires_in`` is seconds, or like ``10m``."""

    scope: str = "read"
    expires_in: float | str = 900


class Token(Record, frozen=True):
    """``expires_at`` is ms since 1970."""

    token: str
    scope: str
    thread_id: str
    expires_at: int


@post(THREAD + "/tokens", summary="Mint a short-lived token for a browser", scope="write", body=TokenBody | None)
async def mint_token(request: Request[Any, Any, Any], buffer: Buffer, thread_id: ThreadId) -> Token:
    """For this thread alone, and no wider than one's own; for up to a day."""
    wanted = await json_body(request, buffer, TokenBody, TokenBody())
    own = Grant.of(request)
    if not buffer.settings.secret:
        raise BadRequest("Authentication is off, so there are no tokens; start the service with a secret.")
    if checked_id("thread_id", thread_id).endswith("*"):
        raise BadRequest("A thread whose id ends in '*' cannot have a token of its own, as that would be a pattern.")
    scope = frozenset(wanted.scope.split())
    if not scope or not scope <= set(SCOPES):
        raise InvalidContent(f"{wanted.scope!r:.80} is not a scope; use words of {', '.join(SCOPES)}.")
    if not all(own.allows(word, None) for word in scope):
        raise Forbidden("A token cannot allow more than the one it is made with; ask for less.")
    lifetime = cast(float, seconds("expires_in", wanted.expires_in))
    grant = TokenGrant((thread_id,), min(time.time() + lifetime, own.expires), scope)
    token = token_for(buffer.settings.secret, grant)
    return Token(token, " ".join(sorted(scope)), thread_id, int(grant.expires) * 1000)


def make_token(settings: Settings, flags: dict[str, Any]) -> None:
    """Print a token. Raises StartupError."""
    words = frozenset(flags["scope"].split())
    threads: Sequence[str] = flags["thread"]
    if not settings.secret:
        raise StartupError("a token is made with a secret; set RESUME_STREAM_SECRET, or say --secret")
    if not words or not words <= set(SCOPES):
        raise StartupError(f"--scope: {flags['scope']!r} is not a scope; use words of {', '.join(SCOPES)}")
    try:
        expires = time.time() + parse_duration(flags["expires_in"])
    except ValueError as error:
        raise StartupError(f"--expires-in: {error}") from error
    print(token_for(settings.secret, TokenGrant(tuple(threads) or None, expires, words)))
