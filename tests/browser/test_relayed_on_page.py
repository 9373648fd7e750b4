"""Relayed messages on the page, in Chromium: their upstream, and their words in place of the upstream's JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser_kit import Page, browser, client, emptied
from conftest import TIMEOUT, Service, append
from playwright.sync_api import expect
from relayed import Relay, bare_events
from test_page import AXE, check_with_axe, copied, tab
from upstream import (
    CHAT,
    DONE,
    LANGGRAPH,
    RECORDINGS,
    Recording,
    Upstream,
    chat_chunk,
    frames,
    relaying,
    shared_upstream,
)

__all__ = ["browser", "client", "tab"]  # fixtures

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
def page(tab: Page, service: Service) -> Iterator[Page]:
    with emptied(tab, service.url) as page:
        yield page


@pytest.fixture
def relay(service: Service, upstream: Upstream, client: httpx.Client) -> Iterator[Relay]:
    upstream.forget()
    with Relay(service) as relay:
        yield relay


def record(relay: Relay, upstream: Upstream, recording: Recording, thread: str, message: str = "m") -> None:
    """Have the relay record the whole answer as a message of this thread."""
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
    events = page.locator("#events li")
    expect(events.first.locator(".kind")).to_have_text(f"relayed:up:{dialect}")
    raw = [
        event.decode().removesuffix("\n\n").partition("data: ")[2].replace("\ndata: ", "\n")
        for event in bare_events(RECORDINGS[dialect])
    ]
    shown = events.locator(".content").all_text_contents()[1:-1]  # between the mark and the end
    assert [meaning(text) for text in shown] == [meaning(text) for text in raw]


def meaning(text: str) -> Any:
    """Return the value of JSON, as the page may indent it; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_words_come_live_and_go_on_after_a_reload(
    page: Page, service: Service, relay: Relay, upstream: Upstream
) -> None:
    upstream.answer(LANGGRAPH.held(4).held(2))
    with relay.reading(LANGGRAPH, resume_thread="t", resume_message="m"):
        page.goto(f"{service.url}/#/t")
        expect(page.locator(".text")).to_have_text("Hel")
        page.get_by_role("tab", name="Events").click()
        expect(page.locator("#events li")).to_have_count(3)
        page.get_by_role("tab", name="Text").click()
        page.reload()
        expect(page.locator(".text")).to_have_text("Hel")
        expect(page.locator(".source")).to_have_text("up · LangGraph")
        upstream.go_on()
        expect(page.locator(".text")).to_have_text("Hello")  # this event repeats the whole text
        expect(page.locator(".carried")).to_be_visible()
        upstream.go_on()
        expect(page.locator("#messages .status")).to_have_text("completed")
    assert written(page) == "Hello"
    page.reload()
    expect(page.locator("#messages .status")).to_have_text("completed")
    assert written(page) == "Hello"


def test_reader_is_told_what_is_no_word_and_why_it_ended(
    page: Page, service: Service, relay: Relay, upstream: Upstream, client: httpx.Client
) -> None:
    def call(**function: str) -> dict[str, Any]:
        return chat_chunk(tool_calls=[{"index": 0, "function": function}])

    said = frames(
        chat_chunk(reasoning_content="Where "),
        chat_chunk(reasoning_content="is it?"),
        chat_chunk(content="I look."),
        call(name="weather", arguments=""),
        call(arguments='{"city":'),
        call(arguments='"Bern"}'),
        call(name="time", arguments="{}"),
        {"choices": "of another shape"},
        chat_chunk(content="It is "),
    )
    answer = dataclasses.replace(CHAT, pieces=(*said[:-1], b"data: {no JSON\n\n", said[-1]), is_broken=True)
    append(client, "t", "before", "plain words", complete=True)
    record(relay, upstream, answer, "t")
    page.goto(f"{service.url}/#/t")
    message = page.locator("#messages article").last
    expect(message.locator(".reason")).to_have_text("upstream_lost")
    assert remarks(page) == [
        ["reasoning", "Where is it?"],
        ["tool call", 'weather {"city":"Bern"}\ntime {}'],
        ["data", '{"choices": "of another shape"}\n{no JSON'],
    ]
    page.get_by_role("button", name="Copy text of m").click()
    expect(page.locator("#announce")).to_have_text("Copied text of m")
    assert copied(page) == "I look.\n\nIt is "
    before = remarks(page)
    page.reload()
    expect(message.locator(".status")).to_have_text("aborted")
    assert remarks(page) == before
    row = page.locator("#threads li")
    expect(row.locator(".words")).to_have_text("upstream_lost")
    expect(page.locator(".source")).to_have_text(["", "up · Chat Completions"])
    if AXE.exists():
        check_with_axe(page)


def test_list_has_the_last_words_of_a_long_answer(
    page: Page, service: Service, relay: Relay, upstream: Upstream, client: httpx.Client
) -> None:
    append(client, "t", "before", "plain words", complete=True)
    words = [chat_chunk(content=f"word-{number} ") for number in range(300)]
    closing = chat_chunk(content="", padding="x" * 2000)  # some upstreams repeat the whole response at the end
    record(relay, upstream, dataclasses.replace(CHAT, pieces=(*frames(*words, closing, chat_chunk()), DONE)), "t")
    page.goto(service.url)
    row = page.locator("#threads li")
    expect(row.locator(".words")).to_have_text(re.compile(r"^….*word-298 word-299$"))
    expect(row.locator(".facts")).to_contain_text("up · Chat Completions")
    append(client, "t", "after", "plain again")
    expect(row.locator(".words")).to_have_text("plain again")
    expect(row.locator(".facts")).not_to_contain_text("up · ")
    append(client, "u", "m", '{"of": "a producer"}')
    expect(row.first.locator(".words")).to_have_text('{"of": "a producer"}')


READ = """async ([mark, events]) => {
    const { Relayed } = await import("/static/page/dialects.js");
    let relayed = new Relayed(mark);
    return events.flatMap(([event, content]) => {
        relayed = Relayed.from(JSON.parse(JSON.stringify(relayed.kept)));  // as over a reload at any place
        return relayed.read({ event, content }).map((said) => [said.event, said.content]);
    });
}"""
AI = {"type": "ai", "id": "a", "tool_calls": []}
CALLING = {
    **AI,
    "content": [{"type": "text", "text": "Hello"}],
    "tool_calls": [{"id": "c", "name": "f", "args": {"x": 1}}],
}
PIECE = {"type": "AIMessageChunk", "id": "a", "content": ""}
SAID: dict[str, tuple[list[tuple[str | None, Any]], list[list[str | None]]]] = {
    "openai-chat": (
        [(None, {"choices": [{"index": 1, "text": "other"}, {"index": 0, "text": "old", "finish_reason": "length"}]})],
        [[None, "old"], ["stopped early", "length"]],
    ),
    "openai-responses": (
        [
            ("response.reasoning_summary_part.added", {}),
            ("response.reasoning_summary_text.delta", {"delta": "Hm"}),
            ("response.content_part.added", {"part": {"type": "output_text"}}),
            ("response.output_text.delta", {"delta": "A"}),
            ("response.content_part.added", {"part": {"type": "output_text"}}),
            ("response.output_text.delta", {"delta": "B"}),
            ("response.output_item.done", {"item": {"type": "message"}}),
            ("response.output_item.done", {"item": {"type": "function_call", "name": "f", "arguments": "{}"}}),
            ("response.output_item.done", {"item": {"type": "web_search_call", "action": {"query": "q"}}}),
            ("response.incomplete", {"response": {"incomplete_details": {"reason": "max_output_tokens"}}}),
        ],
        [
            ["reasoning", "Hm"],
            [None, "A"],
            [None, "\n\nB"],
            ["tool call", "f {}"],
            ["tool call", '\nweb_search_call {"query":"q"}'],
            ["stopped early", "max_output_tokens"],
        ],
    ),
    "anthropic-messages": (
        [
            ("content_block_start", {"content_block": {"type": "thinking", "thinking": ""}}),
            ("content_block_delta", {"delta": {"type": "signature_delta", "signature": "s"}}),
            ("content_block_start", {"content_block": {"type": "tool_use", "name": "f", "input": {}}}),
            ("content_block_delta", {"delta": {"type": "input_json_delta", "partial_json": "{}"}}),
            ("message_delta", {"delta": {"stop_reason": "tool_use"}}),
            ("message_delta", {"delta": {"stop_reason": "max_tokens"}}),
        ],
        [["tool call", "f "], ["tool call", "{}"], ["stopped early", "max_tokens"]],
    ),
    "ai-sdk": (
        [
            (None, {"type": "reasoning-delta", "delta": "Hm"}),
            (None, {"type": "tool-input-available", "toolName": "f", "input": {"x": 1}}),
            (None, {"type": "tool-output-error", "errorText": "no"}),
        ],
        [["reasoning", "Hm"], ["tool call", 'f {"x":1}'], ["tool error", "no"]],
    ),
    "ag-ui": (
        [
            (None, {"type": "TOOL_CALL_START", "toolCallName": "f"}),
            (None, {"type": "TOOL_CALL_ARGS", "delta": "{}"}),
            (None, {"type": "REASONING_MESSAGE_CONTENT", "delta": "Hm"}),
        ],
        [["tool call", "f "], ["tool call", "{}"], ["reasoning", "Hm"]],
    ),
    "langgraph": (  # with all stream modes
        [
            ("values", {"messages": [{**AI, "id": "0", "content": "of before"}, {"type": "human", "content": "Hi"}]}),
            ("messages", [{**PIECE, "content": "Hel"}, {}]),
            ("messages|sub:1", [{**PIECE, "content": "lo"}, {}]),
            ("messages", [{**PIECE, "tool_call_chunks": [{"id": "c", "name": "f", "args": '{"x":'}]}, {}]),
            ("messages", [{**PIECE, "tool_call_chunks": [{"id": None, "name": None, "args": "1}"}]}, {}]),
            ("messages/partial", [CALLING]),
            ("updates", {"agent": {"messages": [CALLING]}, "other": None}),
            ("values", {"messages": [CALLING]}),
            ("updates", {"tools": {"messages": [{"type": "tool", "content": "42"}]}}),
            ("updates", {"agent": {"messages": {**AI, "id": "b", "content": "Done."}}}),
            ("values", {"messages": [CALLING, {**AI, "id": None, "content": "Done."}]}),
        ],
        [[None, "Hel"], [None, "lo"], ["tool call", 'f {"x":'], ["tool call", "1}"], [None, "Done."]],
    ),
    "of-tomorrow": ([("named", {"x": 1}), (None, "two\nlines")], [[None, '{"x": 1}\n'], [None, '"two\\nlines"\n']]),
}


def test_each_dialect_has_its_words_and_remarks(page: Page, service: Service) -> None:
    page.goto(f"{service.url}/health/live")
    for dialect, (events, said) in SAID.items():
        given = [[event, json.dumps(data)] for event, data in events]
        assert page.evaluate(READ, [f"relayed:up:{dialect}", given]) == said, dialect
