"""The recipes of docs/library.md, in a Litestar, FastAPI, or Starlette app."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import ROOT, TIMEOUT
from resume_stream.app import Settings, create_app

pytestmark = pytest.mark.anyio

RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)


def recipe(framework: str) -> str:
    (found,) = [text for text in RECIPES if re.search(rf"^from {framework} import", text, re.MULTILINE)]
    return found


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve an app by uvicorn, as its users do, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


@pytest.mark.parametrize(("framework", "path"), [("litestar", "/buffer/api"), ("fastapi", "/buffer/api")])
async def test_a_recipe_serves_the_buffer_beside_other_routes(
    framework: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"my_{framework}_app.py").write_text(recipe(framework))
    async with served(importlib.import_module(f"my_{framework}_app").app) as client:
        started = await client.post("/ask", params={"thread": "t", "message": "m"})
        assert started.status_code < 300, started.text
        frames = (await client.get(f"{path}/threads/t/messages/m/stream", params={"follow": "true"})).text
        assert frames.count("\ndata: ") >= 3
        assert '"status":"completed"' in frames
        again = await client.post(f"{path}/threads/t/messages/m/chunks", json={"content": "more"})
        assert again.status_code == 409
        assert again.headers["content-type"] == "application/problem+json"
    assert "answers.db" in os.listdir(tmp_path)


async def test_the_buffer_alone_stores_and_is_read_behind_the_known_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_agent.py").write_text(RECIPES[0])
    await importlib.import_module("my_agent").main()
    told, _, items = capsys.readouterr().out.partition("StoredChunk(")
    assert told == "Once upon a time."
    assert "content=' a'" in items
    assert "status='completed'" in items


async def test_a_mounted_app_whose_lifespan_does_not_run_says_so(tmp_path: Path) -> None:
    starlette = pytest.importorskip("starlette.applications", reason="starlette is not installed")
    app = starlette.Starlette()
    app.mount("/buffer", create_app(Settings(db=str(tmp_path / "chunks.db"))))
    async with served(app) as client:
        answer = await client.put("/buffer/api/threads/t/messages/m")
        assert answer.status_code == 500
        assert "lifespan" in answer.json()["detail"]
    assert not os.listdir(tmp_path)
