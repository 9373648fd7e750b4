"""Access tokens (RFC 7519, 8693): with a secret, each call takes a token that allows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
    """What a token allows. ``scope`` has words of read, write, abort, and admin (RFC 8693, 4.2)."""

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
    """The claims of a token that this service uses."""

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
    """Return what a token allows. Raise Unauthorized if it is not valid. (PyJWT compares in constant time.)"""
    import jwt  # takes 10 ms, which a service without a secret saves

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
    """A guard: store the caller's grant in the scope. Raise Unauthorized or Forbidden if it does not cover the call."""
    scope = handler.opt.get("scope")  # none: open to everybody, as are Litestar's own answers to OPTIONS
    if scope is None:
        return
    try:
        grant = grant_of(token_of(connection, handler.opt), secret)
        grant.require(scope, connection.path_params.get("thread_id"))
    except Problem as problem:
        connection.scope["refusal"] = problem  # type: ignore[typeddict-unknown-key]
        raise
    connection.scope["auth"] = grant


def token_of(connection: ASGIConnection[Any, Any, Any, Any], options: Mapping[str, Any]) -> str:
    """Return the caller's token. Raise Unauthorized if there is none.

    An EventSource and a browser's WebSocket cannot send headers, so their handlers take it in the query too. The
    option ``token_header`` names another header for it.
    """
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = connection.headers.get(options.get("token_header", ""), "")
    if not token and options.get("token_in_query"):
        token = connection.query_params.get("access_token", "")
    if not token:
        raise Unauthorized("This takes a token; send it as 'Authorization: Bearer …'.")
    return token.strip()


class TokenBody(Record, frozen=True, rename=None, forbid_unknown_fields=True):
    """``scope`` has words of read, write, and abort. ``expires_in`` is in seconds, or like ``10m``."""

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
    """The token covers this thread alone, allows no more than the caller's own, and lasts for up to a day."""
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
    """Print a token. Raise StartupError if a flag is wrong."""
    scope = frozenset(flags["scope"].split())
    if not settings.secret:
        raise StartupError("a token is made with a secret; set RESUME_STREAM_SECRET, or say --secret")
    if not scope or not scope <= set(SCOPES):
        raise StartupError(f"--scope: {flags['scope']!r} is not a scope; use words of {', '.join(SCOPES)}")
    try:
        expires = time.time() + parse_duration(flags["expires_in"])
    except ValueError as error:
        raise StartupError(f"--expires-in: {error}") from error
    print(token_for(settings.secret, TokenGrant(tuple(flags["thread"]) or None, expires, scope)))
