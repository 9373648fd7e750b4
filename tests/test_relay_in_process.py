"""The relay in the process of the test, which can hold back its steps and count what it holds."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import until
from resume_stream.app import ChunkBuffer, NotFound, Settings, Unavailable, create_app
from resume_stream.extras.producing import holding
from upstream import CHAT as KEPT
from upstream import Recording, Upstream, shared_upstream

pytestmark = pytest.mark.anyio
upstream = shared_upstream()
MIB = 1024**2
CHAT = dataclasses.replace(KEPT, headers={**KEPT.headers, "Connection": "close"})  # as a loop ends with its test


@pytest.fixture(autouse=True)
def fresh(upstream: Upstream) -> None:
    upstream.forget()


@asynccontextmanager
async def relaying(db: Path, upstream: Upstream) -> AsyncIterator[tuple[ChunkBuffer, Callable[..., Any]]]:
    """Return a buffer, and a function that sends a request through its relay."""
    settings = Settings(db=str(db), upstream=(f"up={upstream.url}",))
    async with ChunkBuffer(settings) as buffer:
        transport = httpx.ASGITransport(create_app(buffer=buffer))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/relay/up") as client:

            def ask(recording: Recording, body: bytes = b"{}", **headers: str) -> asyncio.Task[httpx.Response]:
                said = {name.replace("_", "-"): text for name, text in headers.items()}
                return asyncio.create_task(client.post(recording.path, content=body, headers=said))

            yield buffer, ask


def room(buffer: ChunkBuffer) -> int:
    """Return how many MiB of bodies may still come in."""
    with holding(buffer) as hold, suppress(Unavailable):
        for size in range(1, 34):
            hold(size * MIB)
    return size - 1


async def test_a_body_counts_only_until_it_is_sent_to_the_upstream(tmp_path: Path, upstream: Upstream) -> None:
    async with relaying(tmp_path / "chunks.db", upstream) as (buffer, ask):
        upstream.answer(CHAT.held(0))
        first = ask(CHAT, bytes(9 * MIB), Resume_Message="m")
        await until(lambda: upstream.paused)
        assert room(buffer) == 32
        joined = [ask(CHAT, bytes(9 * MIB), Resume_Message="m") for _ in range(3)]
        await until(lambda: room(buffer) == 5)
        assert (await ask(CHAT, bytes(9 * MIB), Resume_Message="m")).status_code == 503
        upstream.go_on()
        assert len({(await answer).content for answer in (first, *joined)}) == 1
        assert room(buffer) == 32
        assert [len(asked.body) for asked in upstream.asked] == [9 * MIB]


async def test_a_retry_ends_the_answer_of_a_dead_process_if_it_is_first_to_find_it(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = tmp_path / "chunks.db"
    upstream.answer(CHAT.held(3))
    async with relaying(db, upstream) as (buffer, ask):
        cut = ask(CHAT, Resume_Message="m")
        await until(lambda: upstream.paused)
        await until(functools.partial(has_chunks, buffer, 4), despite=(NotFound,))
    with pytest.raises(AssertionError):  # so says this transport that a body was broken off
        await cut
    async with relaying(db, upstream) as (buffer, ask):
        found, is_over = asyncio.Event(), asyncio.Event()
        page, get_active_threads = buffer.store.page, buffer.get_active_threads

        async def held_page(*place: Any, **limits: Any) -> Any:
            if not found.is_set():  # it is the retry that looks first
                found.set()
                await is_over.wait()
            return await page(*place, **limits)

        async def later(*place: Any) -> Any:
            await found.wait()
            return await get_active_threads(*place)

        monkeypatch.setattr(buffer.store, "page", held_page)
        monkeypatch.setattr(buffer, "get_active_threads", later)
        retry = ask(CHAT, Resume_Message="m")
        await until(functools.partial(is_ended, buffer), "the start's look has ended it")
        is_over.set()
        assert b"service_restarted" in (await retry).content
        assert len(upstream.asked) == 1


async def has_chunks(buffer: ChunkBuffer, count: int) -> bool:
    return (await buffer.get_thread_status("m")).messages[0].chunk_count == count


async def is_ended(buffer: ChunkBuffer) -> bool:
    return (await buffer.get_thread_status("m")).messages[0].status == "aborted"
