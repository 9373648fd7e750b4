"""The React hook in Chromium, in React 19's StrictMode, which mounts every component twice."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser_kit import Page, Proxy, browser, client, lent, proxy, tab
from conftest import ROOT, append, wait_until
from wire import shared_service

__all__ = ["browser", "client", "proxy", "tab"]  # fixtures

ESBUILD = ROOT / "node_modules" / ".bin" / "esbuild"
if not ESBUILD.exists():
    pytest.skip("the packages of package.json are not installed (npm install)", allow_module_level=True)

service = shared_service()

# `render` shows a message in place of the last one. Every render passes a new token function.
APP = """
import { StrictMode, createElement, useEffect, version } from "react";
import { createRoot } from "react-dom/client";
import { useResumeStream } from "resume-stream/react";

function Answer({ options }) {
  const { text, status, reason, error, stop } = useResumeStream({ ...options, token: () => null });
  useEffect(() => { window.mounts++; }, []);
  window.renders.push({ text, status });
  return createElement("main", null,
    createElement("p", null, text),
    createElement("output", null, [status, reason, error?.status].filter(Boolean).join(" ")),
    createElement("button", { onClick: stop }, "Stop"));
}

Object.assign(window, { version, mounts: 0, renders: [] });
const root = createRoot(document.body.appendChild(document.createElement("div")));
window.render = (options) => root.render(createElement(StrictMode, null, createElement(Answer, { options })));
window.unmount = () => root.unmount();
"""


@pytest.fixture(scope="module")
def bundle() -> str:
    """Return the app as a bundler makes it for development, where StrictMode mounts twice."""
    command = [ESBUILD, "--bundle", "--format=esm", '--define:process.env.NODE_ENV="development"']
    return subprocess.run(command, cwd=ROOT, input=APP, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def app(tab: Page, bundle: str, proxy: Proxy) -> Iterator[Page]:
    with lent(tab) as page:
        page.goto(f"{proxy.url}/health/live")
        page.evaluate("Math.random = () => 0.01")
        page.add_script_tag(content=bundle, type="module")
        page.wait_for_function("() => window.render")
        yield page


def render(app: Page, message: str | None = "m", **options: Any) -> None:
    app.evaluate("options => render(options)", {"threadId": "t", "messageId": message, **options})


def wait_for(app: Page, text: str, status: str) -> None:
    """Wait until the page shows exactly this text and this status."""
    shown = "[document.querySelector('p')?.textContent, document.querySelector('output')?.textContent]"
    app.wait_for_function(
        f"wanted => JSON.stringify({shown}) === JSON.stringify(wanted)", arg=[text, status], polling=10
    )


def readers(client: httpx.Client) -> int:
    return client.get("/threads/t").json()["readers"]


def test_message_is_shown_once_over_lost_connections_though_it_is_mounted_twice(
    app: Page, client: httpx.Client, proxy: Proxy
) -> None:
    append(client, "t", "m", "one ", "")
    render(app)
    wait_for(app, "one ", "active")
    assert app.evaluate("version").startswith("19.")
    assert app.evaluate("mounts") == 2
    wait_until(lambda: readers(client) == 1, "the end of the first mount's reading")
    proxy.cut()
    append(client, "t", "m", "two ")
    wait_for(app, "one two ", "active")
    render(app)  # another token function does not begin a new reading
    append(client, "t", "m", "three", complete=True)
    wait_for(app, "one two three", "completed")
    texts = [render["text"] for render in app.evaluate("renders")]
    assert texts == sorted(texts, key=len), "it only ever grew"


def test_stop_aborts_the_message(app: Page, client: httpx.Client) -> None:
    append(client, "t", "m", "one ")
    render(app, stopReason="enough")
    wait_for(app, "one ", "active")
    app.click("button")
    wait_for(app, "one ", "aborted enough")
    assert client.get("/threads/t").json()["messages"][0]["reason"] == "enough"
    app.click("button")  # a second click changes nothing
    append(client, "t", "done", "all", complete=True)
    render(app, "done")
    wait_for(app, "all", "completed")
    with app.expect_response("**/abort") as refused:
        app.click("button")
    assert refused.value.status == 409
    wait_for(app, "all", "completed")


def test_stop_that_is_refused_says_so(app: Page, client: httpx.Client) -> None:
    append(client, "t", "m", "one ")
    render(app, stopReason="x" * 2000)
    wait_for(app, "one ", "active")
    app.click("button")
    wait_for(app, "one ", "active 413")


def test_another_message_begins_from_nothing(app: Page, client: httpx.Client) -> None:
    append(client, "t", "m", "one ")
    append(client, "t", "n", "two", complete=True)
    render(app)
    wait_for(app, "one ", "active")
    app.evaluate("() => { renders.length = 0 }")
    render(app, "n")
    wait_for(app, "two", "completed")
    assert "one " not in [render["text"] for render in app.evaluate("renders")]
    wait_until(lambda: readers(client) == 0, "the end of the reading of the first")
    render(app, None)
    wait_for(app, "", "idle")


def test_unmounting_ends_the_reading(app: Page, client: httpx.Client) -> None:
    append(client, "t", "m", "one ")
    render(app)
    wait_for(app, "one ", "active")
    app.evaluate("unmount()")
    wait_until(lambda: readers(client) == 0, "the end of the reader")


def test_message_that_is_missing_fails_or_is_waited_for(app: Page, client: httpx.Client) -> None:
    render(app)
    wait_for(app, "", "failed 404")
    render(app, "later", wait=True)
    wait_for(app, "", "waiting")
    append(client, "t", "later", "here")
    wait_for(app, "here", "active")
    client.delete("/threads/t")
    wait_for(app, "here", "gone")
