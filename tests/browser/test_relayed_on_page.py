"""A relayed message on the page: whence it comes, its words and not its JSON, and its events one click away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser_kit import Browser, Page, browser, client, new_page, sync_api
from conftest import Service
from relayed import Relay
from upstream import (
    AG_UI,
    AI_SDK,
    ANTHROPIC,
    CHAT,
    LANGGRAPH,
    OTHER,
    RESPONSES,
    Recording,
    Upstream,
    frames,
    relaying,
    shared_upstream,
)

__all__ = ["browser", "client"]  # fixtures
expect = sync_api.expect

upstream, service = shared_upstream(), relaying()

SAID = {
    "up · Chat Completions": (CHAT, "Hél\nlo"),
    "up · Responses": (RESPONSES, "Hello"),
    "up · Messages": (ANTHROPIC, "Hello"),
    "up · AI SDK": (AI_SDK, "Hello"),
    "up · AG-UI": (AG_UI, "Hello"),
    "up · LangGraph": (LANGGRAPH, "Hello"),
    "up · server-sent events": (OTHER, "one\ntwo\nlines\n{}\n"),
}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with new_page(browser) as page:
        yield page


@pytest.fixture
def relay(service: Service) -> Iterator[Relay]:
    with Relay(service) as relay:
        yield relay


def is_shown(page: Page, words: str) -> None:
    expect(page.locator(".text")).to_have_js_property("textContent", words)


@pytest.mark.parametrize("origin", SAID)
def test_words_are_shown_and_events_are_one_click_away(
    page: Page, relay: Relay, upstream: Upstream, origin: str
) -> None:
    recording, words = SAID[origin]
    upstream.answer(recording)
    thread = f"t{list(SAID).index(origin)}"
    relay.ask(recording, Resume_Thread=thread, Resume_Message="run")
    page.goto(f"{relay.service.url}/#/{thread}")
    expect(page.locator(".origin")).to_have_text(origin)
    is_shown(page, words)
    page.get_by_role("tab", name="Events").click()
    expect(page.locator("#events")).to_contain_text("relayed:up:")
    expect(page.locator("#events .content")).to_have_count(len(page.locator("#events li").all()))


def test_words_come_as_they_are_relayed_and_stay_over_a_reload(page: Page, relay: Relay, upstream: Upstream) -> None:
    held = AI_SDK.held(4)
    upstream.answer(held)
    with relay.reading(held, Resume_Thread="live", Resume_Message="run"):
        page.goto(f"{relay.service.url}/#/live")
        is_shown(page, "Hel")
        page.reload()
        is_shown(page, "Hel")
        upstream.go_on()
        expect(page.locator("#messages .status")).to_have_text("completed")
        is_shown(page, "Hello")
        expect(page.locator(".origin")).to_have_text("up · AI SDK")


def test_why_an_answer_broke_off_is_shown(page: Page, relay: Relay, upstream: Upstream) -> None:
    broken: Recording = CHAT.broken(2)
    upstream.answer(broken)
    relay.ask(broken, Resume_Thread="broken", Resume_Message="run")
    page.goto(f"{relay.service.url}/#/broken")
    expect(page.locator("#messages .reason")).to_have_text("upstream_lost")
    is_shown(page, "Hé")


def test_a_call_of_a_tool_and_an_error_are_told_in_words(page: Page, relay: Relay, upstream: Upstream) -> None:
    call = {"delta": {"tool_calls": [{"index": 0, "function": {"name": "look_up", "arguments": ""}}]}}
    pieces = (CHAT.pieces[1], *frames({"choices": [call]}, {"error": {"message": "Overloaded."}}))
    answer = Recording(pieces, CHAT.path, body=CHAT.body)
    upstream.answer(answer)
    relay.ask(answer, Resume_Thread="tools", Resume_Message="run")
    page.goto(f"{relay.service.url}/#/tools")
    expect(page.locator(".text .event")).to_contain_text("calls look_up")
    expect(page.locator("#messages .reason")).to_have_text("Overloaded.")


def test_what_is_copied_are_the_words(page: Page, relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    relay.ask(CHAT, Resume_Thread="copied", Resume_Message="run")
    page.add_init_script("navigator.clipboard.writeText = async (text) => void (window.copied = text)")
    page.goto(f"{relay.service.url}/#/copied")
    is_shown(page, "Hél\nlo")
    page.get_by_role("button", name="Copy text of run").click()
    page.wait_for_function("window.copied !== undefined")
    assert page.evaluate("copied") == "Hél\nlo"


def test_the_list_shows_words_and_no_json(page: Page, relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    relay.ask(CHAT, Resume_Thread="listed", Resume_Message="run")
    page.goto(relay.service.url)
    expect(page.locator("#threads a", has_text="listed")).to_contain_text("Hél lo")
    expect(page.locator("#threads a", has_text="listed")).not_to_contain_text("choices")
