"""The relay: other people's SSE endpoints, made resumable. It records what they stream, and then passes it on.

A request below ``/relay/NAME/`` goes on to the upstream of that name. If the response is a stream of events, an
exchange commits each event as a chunk of a message. The caller is a reader of that message, like everybody who
comes back for it. Each room of this package knows only those before it: dialects, calls, events, client, messages,
replies, recording, exchanges, answering.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, cast

from litestar import asgi
from litestar.enums import ScopeType
from litestar.types import Receive, Scope, Send

from ...app import Forbidden, Parts, Settings, StartupError, Streamed
from .calls import upstreams_of


def set_up(settings: Settings) -> None:
    """Raise StartupError."""
    upstreams_of(settings, os.environ)


def mount(parts: Parts) -> None:
    upstreams = upstreams_of(parts.buffer.settings, os.environ)
    if not upstreams:
        return
    if not (parts.producing and "raw" in parts.formats):
        raise StartupError("upstream is set, which needs extras/producing.py and extras/raw.py; put them in place")

    @cache
    def relay() -> Any:
        from .answering import Relay  # once the service listens, as httpx takes a while to import

        return Relay(parts, upstreams)

    @asgi("/relay", is_mount=True, copy_scope=False, scope="any", token_in_query=True, token_header="x-api-key")
    async def relayed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            cast(Any, scope)["refusal"] = refusal = Forbidden("Only HTTP is relayed; ask without an Upgrade.")
            raise refusal
        answer = await relay().answer(scope, receive)
        pieces = () if scope["method"] == "HEAD" else answer.pieces
        try:
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await Streamed(pieces, {}).send_body(send, receive)
        finally:
            if answer.close is not None:
                await answer.close()

    parts.root.append(relayed)
    parts.on_start.append(relay)
    parts.on_stop.append(lambda: relay().stop())
