"""Other people's clients, unchanged, in Chromium: through the relay, and on what a producer appends."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser_kit import Page, Proxy, browser, client, lent, proxy, tab
from conftest import ROOT, Service, append, wait_until
from upstream import AG_UI, AI_SDK, ERRORS, OTHER, Upstream, plain, relaying, shared_upstream

__all__ = ["browser", "client", "proxy", "tab"]  # fixtures

MODULES = ROOT / "node_modules"
for package in ("esbuild", "@ai-sdk/react", "@microsoft/fetch-event-source"):
    if not (MODULES / package).exists():
        pytest.skip(f"{package} is not installed (npm install)", allow_module_level=True)

upstream, service = shared_upstream(), relaying()
LOST = "The upstream broke the answer off."
RESTARTED = "The service that recorded this answer was restarted in its middle."

# `chat` shows a chat, on a page that kept the user's message. Its Stop button follows the AI SDK's own guide.
# `listen` and `fetchEvents` note the events of an EventSource and of fetch-event-source.
APP = """
import { createElement } from "react";
import { createRoot } from "react-dom/client";
import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";
import { fetchEventSource } from "@microsoft/fetch-event-source";

const user = { id: "u1", role: "user", parts: [{ type: "text", text: "Hi" }] };

function Chat({ id, transport, api, kept }) {
  const { messages, status, error, sendMessage, resumeStream, stop } = useChat(
    { id, transport, resume: true, messages: kept ? [user] : [] });
  const answers = messages.filter(({ role }) => role === "assistant");
  const text = answers.map(({ parts }) => parts.map(({ text }) => text ?? "").join("")).join("|");
  const stopAll = () => {
    const body = JSON.stringify({ assistantMessage: answers.at(-1) });
    fetch(`${api}/${id}/stop`, { method: "POST", headers: { "content-type": "application/json" }, body });
    stop();
  };
  return createElement("main", null,
    createElement("p", null, text),
    createElement("output", null, [status, error?.message].filter(Boolean).join(": ")),
    createElement("button", { id: "send", onClick: () => sendMessage({ text: "Hi" }) }),
    createElement("button", { id: "resume", onClick: () => resumeStream() }),
    createElement("button", { id: "stop", onClick: stopAll }));
}

window.chat = ({ id, api, live, kept }) => {
  const prepareReconnectToStreamRequest = live && (() => ({ api: live }));
  const transport = new DefaultChatTransport({ api, prepareReconnectToStreamRequest });
  const root = createRoot(document.body.appendChild(document.createElement("div")));
  root.render(createElement(Chat, { id, transport, api, kept }));
};

window.events = {};
window.sources = {};

window.listen = (name, url) => {
  events[name] = [];
  sources[name] = new EventSource(url);
  for (const kind of ["message", "named"])
    sources[name].addEventListener(kind, ({ type, data }) => events[name].push([type, data]));
};

window.fetchEvents = async (url, errorsTaken) => {
  events.fetched = [];
  window.errors = [];
  const onerror = (error) => { if (errors.push(error.message) > errorsTaken) throw error; };
  window.ended = false;
  try {
    const headers = { "content-type": "application/json" };
    await fetchEventSource(url, { method: "POST", headers, body: "{}", openWhenHidden: true, onerror,
      onmessage: ({ event, data }) => events.fetched.push([event, data]) });
  } catch (error) {
    window.thrown = error.message;
  }
  window.ended = true;
};
"""


@pytest.fixture(scope="module")
def bundle() -> str:
    esbuild = MODULES / ".bin" / "esbuild"
    command = [esbuild, "--bundle", "--format=esm", "--minify", '--define:process.env.NODE_ENV="production"']
    return subprocess.run(command, cwd=ROOT, input=APP, capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def fresh(upstream: Upstream) -> None:
    upstream.forget()
    upstream.answer(plain(404, {}), at="/api/chat/")  # this upstream cannot resume


@pytest.fixture
def page(tab: Page, bundle: str, proxy: Proxy) -> Iterator[Page]:
    with lent(tab) as page:
        page.goto(f"{proxy.url}/health/live")
        page.add_script_tag(content=bundle, type="module")
        page.wait_for_function("() => window.chat")
        yield page


def reload(page: Page, bundle: str) -> None:
    page.reload()
    page.add_script_tag(content=bundle, type="module")
    page.wait_for_function("() => window.chat")


def show(page: Page, chat: str, **options: Any) -> None:
    page.evaluate("options => chat(options)", {"id": chat, "api": "/relay/up/api/chat", **options})
    page.wait_for_selector("main")


def wait_for(page: Page, text: str, status: str) -> None:
    """Wait until the page shows exactly this answer and this status."""
    shown = "[document.querySelector('p')?.textContent, document.querySelector('output')?.textContent]"
    try:
        page.wait_for_function(
            f"wanted => JSON.stringify({shown}) === JSON.stringify(wanted)", arg=[text, status], polling=10
        )
    except Exception as error:
        raise AssertionError(page.evaluate(shown)) from error


def ask(page: Page, chat: str, had: str = "Hel") -> None:
    """Send the user's message, and wait for this part of the answer."""
    show(page, chat)
    wait_for(page, "", "ready")
    page.click("#send")
    wait_for(page, had, "streaming")


def ended(client: httpx.Client, thread: str) -> tuple[str, str | None]:
    (message,) = wait_until(
        lambda: [found for found in client.get(f"/threads/{thread}").json()["messages"] if found["status"] != "active"]
    )
    return message["status"], message["reason"]


def asked(upstream: Upstream) -> list[tuple[str, str]]:
    return [(request.method, request.target) for request in upstream.asked]


# useChat


def test_chat_goes_on_after_a_reload_in_the_middle(page: Page, bundle: str, upstream: Upstream) -> None:
    upstream.answer(AI_SDK.held(4), at=AI_SDK.path)
    ask(page, "reloaded")
    reload(page, bundle)
    show(page, "reloaded", kept=True)
    wait_for(page, "Hel", "streaming")
    upstream.go_on()
    wait_for(page, "Hello", "ready")
    assert asked(upstream) == [("GET", "/api/chat/reloaded/stream"), ("POST", "/api/chat")]
    assert upstream.left == 0
    reload(page, bundle)
    show(page, "reloaded", kept=True)
    wait_for(page, "", "ready")  # nothing is active, and that is no error


def test_stop_after_a_reload_reaches_the_upstream(
    page: Page, bundle: str, upstream: Upstream, client: httpx.Client
) -> None:
    upstream.answer(AI_SDK.held(4), at=AI_SDK.path)
    ask(page, "stopped")
    reload(page, bundle)
    show(page, "stopped", kept=True)
    wait_for(page, "Hel", "streaming")
    page.click("#stop")
    wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")
    wait_for(page, "Hel", "ready")
    assert ended(client, "stopped") == ("aborted", "cancelled")
    assert asked(upstream)[-1] == ("POST", "/api/chat/stopped/stop")


def test_chat_resumes_on_the_same_page_after_a_lost_connection(page: Page, proxy: Proxy, upstream: Upstream) -> None:
    upstream.answer(AI_SDK.held(4), at=AI_SDK.path)
    ask(page, "cut")
    proxy.cut()
    wait_for(page, "Hel", "error: network error")
    page.click("#resume")
    wait_for(page, "Hel", "streaming")
    upstream.go_on()
    wait_for(page, "Hello", "ready")


def test_chat_is_told_of_an_answer_that_failed(page: Page, bundle: str, upstream: Upstream) -> None:
    failed = {"lost": (AI_SDK.broken(4, 9), LOST), "failed": (AI_SDK.ended(4, ERRORS["ai-sdk"]), "overloaded")}
    for chat, (recording, words) in failed.items():
        upstream.answer(recording.held(4), at=AI_SDK.path)
        ask(page, chat)
        upstream.go_on()
        wait_for(page, "Hel", f"error: {words}")
        reload(page, bundle)
    upstream.answer(plain(429, {"error": "too many"}), at=AI_SDK.path)
    show(page, "refused")
    page.click("#send")
    wait_for(page, "", 'error: {"error": "too many"}')


def test_chat_goes_on_with_what_a_producer_of_ones_own_appends(
    page: Page, bundle: str, proxy: Proxy, client: httpx.Client
) -> None:
    live = {"live": "/api/threads/own/live?format=raw", "kept": True}
    show(page, "own", **live)
    wait_for(page, "", "ready")
    append(client, "own", "m", *AI_SDK.data[:4])
    reload(page, bundle)
    show(page, "own", **live)
    wait_for(page, "Hel", "streaming")
    proxy.cut()
    wait_for(page, "Hel", "error: network error")
    page.click("#resume")
    wait_for(page, "Hel", "streaming")
    append(client, "own", "m", *AI_SDK.data[4:], complete=True)
    wait_for(page, "Hello", "ready")
    append(client, "own", "aborted", *AI_SDK.data[:4])
    reload(page, bundle)
    show(page, "own", **live)
    wait_for(page, "Hel", "streaming")
    client.post("/threads/own/messages/aborted/abort").raise_for_status()
    wait_for(page, "Hel", "error: network error")


# EventSource

CLOSED = 2


def wait_for_events(page: Page, name: str, *events: tuple[str, str]) -> None:
    """Wait until the client has exactly these events."""
    try:
        page.wait_for_function(
            "([name, wanted]) => JSON.stringify(events[name]) === JSON.stringify(wanted)",
            arg=[name, events],
            polling=10,
        )
    except Exception as error:
        raise AssertionError(page.evaluate(f"events.{name}")) from error


def wait_until_closed(page: Page, name: str) -> None:
    page.wait_for_function(f"sources.{name}.readyState === {CLOSED}", polling=10)


SENT = [("message", "one"), ("named", "two\nlines"), ("message", "{}")]


def test_event_source_goes_on_by_itself(page: Page, proxy: Proxy, upstream: Upstream) -> None:
    upstream.answer(OTHER.held(2))
    page.evaluate("listen('a', '/relay/up/events')")
    wait_for_events(page, "a", *SENT[:2])
    proxy.cut()
    upstream.go_on()
    wait_for_events(page, "a", *SENT)
    wait_until_closed(page, "a")
    assert asked(upstream) == [("GET", "/events")]


def test_event_source_ends_where_the_upstream_was_lost(page: Page, upstream: Upstream) -> None:
    upstream.answer(OTHER.broken(2).held(2))
    page.evaluate("listen('a', '/relay/up/events')")
    wait_for_events(page, "a", *SENT[:2])
    upstream.go_on()
    wait_until_closed(page, "a")
    wait_for_events(page, "a", *SENT[:2])
    assert len(upstream.asked) == 1


def test_event_source_goes_on_with_what_a_producer_of_ones_own_appends(
    page: Page, proxy: Proxy, client: httpx.Client
) -> None:
    one, two, three = (("message", text) for text in ("one", "two", "three"))
    for thread in ("active", "ended"):
        append(client, thread, "old", "no", complete=True)
        append(client, thread, "m", "one")
        page.evaluate("thread => listen(thread, `/api/threads/${thread}/live?format=raw`)", thread)
        wait_for_events(page, thread, one)
    proxy.down()
    append(client, "active", "m", "two")
    append(client, "ended", "m", "two", complete=True)
    append(client, "ended", "next", "three")
    proxy.up()
    wait_for_events(page, "active", one, two)
    wait_for_events(page, "ended", one, two, three)
    append(client, "active", "m", "three", complete=True)
    append(client, "ended", "next", complete=True)
    wait_until_closed(page, "active")
    wait_until_closed(page, "ended")
    wait_for_events(page, "active", one, two, three)


# fetch-event-source


def wait_for_end(page: Page) -> str | None:
    """Wait for its end, and return what it threw, or None."""
    page.wait_for_function("window.ended", polling=10)
    return page.evaluate("window.thrown")


RUN = [("", data) for data in AG_UI.data]


def test_fetch_event_source_goes_on_by_itself(page: Page, proxy: Proxy, upstream: Upstream) -> None:
    upstream.answer(AG_UI.held(4))
    page.evaluate("void fetchEvents('/relay/up/agent', 9)")
    wait_for_events(page, "fetched", *RUN[:4])
    proxy.cut()
    upstream.go_on()
    wait_for_events(page, "fetched", *RUN)
    assert wait_for_end(page) is None
    assert asked(upstream) == [("POST", "/agent")]


def test_fetch_event_source_is_told_of_an_answer_that_failed(page: Page, upstream: Upstream) -> None:
    for recording, words in ((AG_UI.broken(4, 9), LOST), (AG_UI.ended(4, ERRORS["ag-ui"]), "overloaded")):
        upstream.answer(recording)
        page.evaluate("fetchEvents('/relay/up/agent', 0)")
        assert wait_for_end(page) is None
        *events, (_, last) = page.evaluate("events.fetched")
        assert [tuple(event) for event in events] == RUN[:4]
        assert json.loads(last)["message"] == words
    for status in (401, 429):
        upstream.answer(plain(status, {}))
        page.evaluate("fetchEvents('/relay/up/agent', 0)")
        assert "application/json" in (wait_for_end(page) or "")
    upstream.answer(OTHER.broken(2))  # a format for which the relay knows no error event
    page.evaluate("fetchEvents('/relay/up/events', 0)")
    assert wait_for_end(page) == "network error"


# All of them


def test_clients_are_told_that_the_service_was_killed(
    page: Page, upstream: Upstream, service: Service, client: httpx.Client
) -> None:
    upstream.answer(AI_SDK.held(4), at=AI_SDK.path)
    upstream.answer(OTHER.held(2), at=OTHER.path)
    upstream.answer(AG_UI.held(4), at=AG_UI.path)
    ask(page, "killed")
    page.evaluate("listen('a', '/relay/up/events')")
    page.evaluate("void fetchEvents('/relay/up/agent', 9)")
    wait_for_events(page, "a", *SENT[:2])
    wait_for_events(page, "fetched", *RUN[:4])
    service.restart()
    wait_for(page, "Hel", "error: network error")
    assert ended(client, "killed") == ("aborted", "service_restarted")
    page.click("#resume")
    wait_for(page, "Hel", f"error: {RESTARTED}")
    wait_until_closed(page, "a")
    wait_for_events(page, "a", *SENT[:2])
    assert wait_for_end(page) is None
    *events, (_, last) = page.evaluate("events.fetched")
    assert [tuple(event) for event in events] == RUN[:4]
    assert json.loads(last) == {"type": "RUN_ERROR", "message": RESTARTED, "code": "service_restarted"}
    asked_once = {path for _, path in asked(upstream) if not path.startswith("/api/chat/")}
    assert asked_once == {AI_SDK.path, OTHER.path, AG_UI.path}
