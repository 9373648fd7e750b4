"""Relayed messages on the page, in Chromium: whose they are, and their words in place of the upstream's JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser_kit import Browser, Page, browser, client, new_page
from conftest import TIMEOUT, Service, append, wait_until
from playwright.sync_api import expect
from relayed import Relay
from test_page import AXE, FAST, check_with_axe, copied
from upstream import (
    AG_UI,
    AI_SDK,
    ANTHROPIC,
    CHAT,
    DONE,
    LANGGRAPH,
    OTHER,
    RECORDINGS,
    RESPONSES,
    Recording,
    Upstream,
    chat_chunk,
    frames,
    relaying,
    response_events,
    shared_upstream,
)

__all__ = ["browser", "client"]  # fixtures

upstream, service = shared_upstream(), relaying()
expect.set_options(timeout=TIMEOUT * 1000)
LABELS = {
    "openai-chat": "up · Chat Completions",
    "openai-responses": "up · Responses",
    "anthropic-messages": "up · Messages",
    "ai-sdk": "up · AI SDK",
    "ag-ui": "up · AG-UI",
    "langgraph": "up · LangGraph",
    "sse": "up · SSE",
}
WORDS = {"openai-chat": "Hél\nlo", "sse": "one\ntwo\nlines\n{}\n"}


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    with new_page(browser, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.add_init_script(FAST)
        yield page


@pytest.fixture
def relay(service: Service, upstream: Upstream, client: httpx.Client) -> Iterator[Relay]:
    upstream.forget()
    with Relay(service) as relay:
        yield relay


def record(relay: Relay, upstream: Upstream, recording: Recording, thread: str, message: str = "m") -> None:
    """Have the whole answer recorded; a thread in which it is ended before."""
    upstream.answer(recording)
    with relay.reading(recording, resume_thread=thread, resume_message=message) as reading:
        assert reading.status == 200
    relay.ended(thread, message)


def written(page: Page) -> str:
    return page.locator(".text").evaluate("text => text.textContent")


def remarks(page: Page) -> list[list[str]]:
    return page.locator(".event").evaluate_all("all => all.map(one => [one.dataset.event, one.textContent])")


@pytest.mark.parametrize("dialect", RECORDINGS)
def test_shows_the_words_and_whose_they_are(
    dialect: str, page: Page, service: Service, relay: Relay, upstream: Upstream
) -> None:
    record(relay, upstream, RECORDINGS[dialect], "t")
    page.goto(f"{service.url}/#/t")
    expect(page.locator("#messages .status")).to_have_text("completed")
    expect(page.locator(".source")).to_have_text(LABELS[dialect])
    words = WORDS.get(dialect, "Hello")
    assert written(page) == words
    page.get_by_role("button", name="Copy text of m").click()
    expect(page.locator("#announce")).to_have_text("Copied text of m")
    assert copied(page) == words
    row = page.locator("#threads li")
    expect(row.locator(".words")).to_have_text(" ".join(words.split()))
    expect(row.locator(".facts")).to_contain_text(LABELS[dialect])
    page.get_by_role("tab", name="Events").click()
    data = [*RECORDINGS[dialect].data]
    events = page.locator("#events li")
    expect(events.nth(0).locator(".kind")).to_have_text(f"relayed:up:{dialect}")
    if dialect == "openai-chat":
        assert events.locator(".content").all_text_contents()[1:-1] == data


def test_words_come_live_and_go_on_after_a_reload(page: Page, service: Service, relay: Relay, upstream: Upstream) -> None:
    upstream.answer(LANGGRAPH.held(4).held(2))
    sent: list[str] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(str(frame))))
    with relay.reading(LANGGRAPH, resume_thread="t", resume_message="m"):
        page.goto(f"{service.url}/#/t")
        expect(page.locator(".text")).to_have_text("Hel")
        page.get_by_role("tab", name="Events").click()
        expect(page.locator("#events li")).to_have_count(3)
        page.get_by_role("tab", name="Text").click()
        page.reload()
        expect(page.locator(".text")).to_have_text("Hel")
        expect(page.locator(".source")).to_have_text("up · LangGraph")
        wait_until(lambda: page.evaluate("1") and len(sent) > 2, "it reads on")
        upstream.go_on()
        expect(page.locator(".text")).to_have_text("Hello")  # of "Hello", which came whole
        expect(page.locator(".carried")).to_be_visible()
        upstream.go_on()
        expect(page.locator("#messages .status")).to_have_text("completed")
    assert written(page) == "Hello"
    page.reload()
    expect(page.locator("#messages .status")).to_have_text("completed")
    assert written(page) == "Hello"
    assert not any("messages/partial" in frame or "AI" in frame for frame in sent)
