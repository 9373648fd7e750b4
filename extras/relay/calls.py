"""What comes in: the upstreams of the settings, and a request to one of them, checked."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from litestar import Request
from litestar.types import Receive, Scope

from ...app import BadRequest, Forbidden, Grant, NotFound, Problem, Settings, StartupError, checked_id
from .dialects import ids_in

Headers = list[tuple[bytes, bytes]]
Pieces = AsyncGenerator[bytes, None]
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)")  # RFC 9110, 5


class Upstream:
    """A server, and the headers that every request to it gets. Raise ValueError for a URL without an address."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url.rstrip("/")
        parts = urlsplit(self.url)
        if not parts.hostname or parts.port == 0:
            raise ValueError(url)
        self.origin, self.host = f"{parts.scheme}://{parts.netloc}", parts.netloc.encode()
        self.path = parts.path.encode()
        self.headers: Headers = []


def upstreams_of(settings: Settings, environment: Mapping[str, str]) -> dict[str, Upstream]:
    """Return the upstreams by name. Raise StartupError, but never with a key in its text."""
    found: dict[str, Upstream] = {}
    for text in settings.upstream:
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(https?://[^/?#@\s]+(?:/[^?#@\s]*)?)", text, re.ASCII)
        if match is None:
            shown = re.sub(r"\?.*", "?…", re.sub("//.*@", "//…@", text))  # either part may hold a key
            raise StartupError(f"--upstream: {shown!r} is not an upstream; write it like openai=https://api.openai.com")
        name, url = match.groups()
        if name in found:
            raise StartupError(f"--upstream: there are two upstreams {name}; give each a name of its own")
        try:
            found[name] = Upstream(name, url)
        except ValueError as error:
            says = f"--upstream: {text!r} has no host, or a port that is not one of 1 to 65535"
            raise StartupError(says) from error
    by_variable = {f"RESUME_STREAM_UPSTREAM_{name.upper().replace('-', '_')}_HEADERS": name for name in found}
    for variable, text in environment.items():
        if re.fullmatch("RESUME_STREAM_UPSTREAM_[A-Z0-9_]+_HEADERS", variable):
            if variable not in by_variable:
                raise StartupError(f"{variable} is of no upstream; name one with --upstream")
            found[by_variable[variable]].headers = headers_in(variable, text)
    return found


def headers_in(variable: str, text: str) -> Headers:
    """Return the headers in a variable, one from each line. Raise StartupError."""
    headers: Headers = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        if (match := HEADER.fullmatch(line)) is None:
            raise StartupError(f"{variable}: line {number} is not a header; write it like Authorization: Bearer …")
        headers.append((match[1].encode(), match[2].encode()))
    return headers


class Call:
    """A request to one upstream. Raise NotFound, Forbidden, and BadRequest if its path could leave the upstream's."""

    def __init__(self, scope: Scope, receive: Receive, upstreams: Mapping[str, Upstream], has_secret: bool) -> None:
        self.request: Request[Any, Any, Any] = Request(scope, receive)
        self.method: str = cast(Any, scope)["method"]
        self.grant: Grant = Grant.of(self.request)
        self.headers: Headers = list(scope["headers"])
        self.query: bytes = scope["query_string"]
        if has_secret:  # then the caller's token is for this service, and the upstream must not see it
            self.headers = [pair for pair in self.headers if pair[0] not in (b"authorization", b"x-api-key")]
            pairs = [(unquote_to_bytes(pair.partition(b"=")[0]), pair) for pair in self.query.split(b"&")]
            self.query = b"&".join(pair for name, pair in pairs if name != b"access_token")
        name, slash, path = scope["raw_path"].partition(b"/relay/")[2].partition(b"/")
        upstream = upstreams.get(name.decode("latin-1"))
        if upstream is None:
            raise NotFound(f"There is no upstream {name.decode('latin-1')!r:.80}; there are {', '.join(upstreams)}.")
        if self.header(b"sec-fetch-site") in ("cross-site", "same-site") and not self.header(b"origin"):
            raise Forbidden("A page of another site may not send this request without an Origin, as a link does.")
        check_path(slash + path)
        self.upstream = upstream
        self.path = (slash + path).decode("latin-1")
        self.thread_id = self.id_in(b"resume-thread", "thread_id")

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    def id_in(self, name: bytes, kind: str) -> str | None:
        """Return the id in a header, percent-encoded or not. Raise BadRequest."""
        text = self.header(name)
        return checked_id(kind, unquote(text)) if text else None

    def matches(self, call: Sequence[Any] | None) -> dict[str, str] | None:
        """Return the ids in the request if it is this call of a dialect (see ``Dialect.resume``)."""
        if call is None or self.method != call[0]:
            return None
        text = "?" + self.query.decode("latin-1") if call[1].startswith("[?") else self.path
        match = re.search(rf"{call[1]}\Z", text)
        return ids_in(match) if match else None

    def thread_in(self, ids: dict[str, str], scope: str) -> str | None:
        """Return the thread that a dialect's call is about, if the caller may do this with it."""
        thread_id = self.thread_id or valid_id(ids.get("thread", ids.get("message")))
        is_allowed = thread_id is not None and self.grant.allows(scope, thread_id)
        return thread_id if is_allowed else None


def check_path(path: bytes) -> None:
    """Raise BadRequest if the path could lead out of the upstream's base path."""
    decoded = path
    for _ in range(3):  # as servers on the way may decode it too
        decoded = unquote_to_bytes(decoded)
    segments = {segment.partition(b";")[0] for segment in re.split(rb"[/\\]", decoded)}
    leads_out = segments & {b".", b".."} or path.startswith(b"//") or unquote_to_bytes(decoded) != decoded
    if leads_out or re.search(rb"[\x00-\x20\x7f]", path):
        raise BadRequest("The path could lead out of the upstream's base path; write it without '.', '..' and '//'.")


def valid_id(value: Any) -> str | None:
    """Return the value, or None if it cannot be an id."""
    with suppress(Problem):
        return checked_id("id", value) if isinstance(value, str) else None
    return None
