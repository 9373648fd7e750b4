"""The page at / in Chromium: list, search, keys, the two views of a thread, plots, demo, phone, offline."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from browser_kit import Browser, Page, browser, client, emptied, new_page, new_tab, opened_sockets, restart
from conftest import ROOT, TIMEOUT, Service, append, wait_until
from playwright.sync_api import expect
from resume_stream.app import ChunkBuffer, Settings
from wire import api_client, contents, shared_service

__all__ = ["browser", "client"]  # fixtures

service = shared_service()
SECRET = "correct horse battery staple, 32+"
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
# Makes time pass ten times as fast.
FAST = """{
    const [began, now, timeout] = [Date.now(), Date.now, setTimeout];
    Date.now = () => began + 10 * (now() - began);
    window.setTimeout = (run, ms, ...rest) => timeout(run, ms / 10, ...rest);
}"""
WORDS = [f"word-{number} " for number in range(600)]  # more than a screen

expect.set_options(timeout=TIMEOUT * 1000)


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[Page]:
    with new_tab(browser, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.add_init_script(FAST)
        yield page


@pytest.fixture(scope="module")
def phone_tab(browser: Browser) -> Iterator[Page]:
    with new_tab(browser, **PHONE) as page:
        page.add_init_script(FAST)
        yield page


@pytest.fixture
def page(tab: Page, service: Service) -> Iterator[Page]:
    """Return a page. The test fails if it asks another origin, or if its content security policy blocks something."""
    origins: set[str] = set()
    complaints: list[str] = []
    handlers: dict[str, Callable[[Any], None]] = {
        "request": lambda request: origins.add(origin_of(request.url)),
        "websocket": lambda socket: origins.add(origin_of(socket.url).replace("ws:", "http:")),
        "console": lambda message: complaints.append(message.text),
    }
    with emptied(tab, service.url) as page:
        for event, handler in handlers.items():
            page.on(event, handler)
        yield page
        for event, handler in handlers.items():
            page.remove_listener(event, handler)
    assert origins == {service.url}
    assert [text for text in complaints if "Content Security Policy" in text] == []


def origin_of(url: str) -> str:
    return re.match(r"\w+://[^/]+", url)[0]


@pytest.fixture
def phone(phone_tab: Page, service: Service) -> Iterator[Page]:
    with emptied(phone_tab, service.url) as page:
        yield page


def make_threads(db: Path, count: int) -> None:
    """Store finished threads, from chat-0000 on, in the database of a service that has not started."""

    async def make() -> None:
        async with ChunkBuffer(Settings(db=str(db))) as buffer:
            names = [f"chat-{number:04}" for number in range(count)]
            await asyncio.gather(*(buffer.add_chunks(name, "run-1", ["x"], complete=True) for name in names))

    with ThreadPoolExecutor(1) as pool:  # Playwright has its own loop in this thread
        pool.submit(asyncio.run, make()).result()


def copied(page: Page) -> str:
    return page.evaluate("navigator.clipboard.readText()")


def run(line: str) -> str:
    """Run a line in the shell, and return what it prints."""
    return subprocess.run(line, shell=True, capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout


def is_in_sight(page: Page, selector: str) -> bool:
    return page.evaluate(
        """selector => {
            const { top, bottom } = document.querySelector(selector).getBoundingClientRect();
            return top >= 0 && bottom <= innerHeight && bottom > top;
        }""",
        selector,
    )


def gap(page: Page) -> float:
    """Return the pixels between the bottom of the screen and the end of the thread."""
    return page.evaluate(
        """() => {
            const pane = document.querySelector("#thread");
            const s = getComputedStyle(pane).overflowY === "auto" ? pane : document.documentElement;
            return s.scrollHeight - s.scrollTop - s.clientHeight;
        }"""
    )


def scroll(page: Page, top: int) -> None:
    page.evaluate(
        """top => {
            const pane = document.querySelector("#thread");
            (getComputedStyle(pane).overflowY === "auto" ? pane : document.documentElement).scrollTop = top;
        }""",
        top,
    )


# The list


def test_lists_threads_with_their_state_and_last_words(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "first", "m", "x" * 1500, complete=True)
    append(client, "second", "a", *WORDS)
    append(client, "second", "b", "the very\n", "last words")
    append(client, "<i>third", "m", "3")
    client.post("/threads/<i>third/messages/m/abort", json={"reason": "out of money"})
    client.post("/threads/fourth/messages/n/chunks", json={"content": '{"city": "Bern"}', "event": "tool_call"})
    page.goto(service.url)
    rows = page.locator("#threads li")
    expect(rows).to_have_count(4)
    expect(rows.nth(0).locator(".words")).to_have_text('tool_call: {"city": "Bern"}')
    expect(rows.nth(1)).to_contain_text("<i>third")
    expect(rows.nth(1).locator(".status")).to_have_text("aborted")
    expect(rows.nth(1).locator(".words")).to_have_text("out of money")
    expect(rows.nth(2).locator(".status")).to_have_text("active")
    expect(rows.nth(2).locator(".words")).to_contain_text("the very last words")
    expect(rows.nth(2)).to_contain_text("2 messages")
    expect(rows.nth(3).locator(".words")).to_contain_text("…xxx")  # it has no space to cut at
    expect(rows.nth(3)).to_contain_text("1.5 kB")
    expect(rows.nth(3)).to_contain_text(re.compile(r"\d+ s ago"))
    append(client, "second", "b", ", and one more", complete=True)
    expect(rows.nth(2).locator(".words")).to_contain_text("words, and one more")
    page.get_by_label("Show").select_option("completed")
    expect(rows).to_have_count(1)
    page.get_by_label("Show").select_option("active")
    expect(rows).to_have_count(2)
    client.delete("/threads/second")
    expect(rows).to_have_count(1)


def test_first_run_says_how_to_begin(page: Page, service: Service, client: httpx.Client) -> None:
    page.goto(service.url)
    expect(page.locator("#start-heading")).to_contain_text("Nothing is in the buffer yet")
    expect(page.locator("#service-state")).to_have_text("Connected")
    expect(page.get_by_role("button", name="Play a demo answer")).to_be_visible()
    swagger = page.get_by_role("link", name="Swagger").get_attribute("href")
    assert httpx.get(f"{service.url}/{swagger}").status_code == 200
    page.get_by_role("button", name="Copy the line to append").click()
    expect(page.locator("#announce")).to_contain_text("Copied")
    run(copied(page))
    expect(page.locator("#threads li .words")).to_have_text("Hello, reader.")
    expect(page.get_by_role("button", name="Play a demo answer")).to_be_hidden()
    expect(page.locator("#start-heading")).to_contain_text("Choose a thread")
    page.get_by_role("button", name="Copy the line to resume").click()
    expect(page.locator("#announce")).to_have_text("Copied the line to resume")
    client.post("/threads/hello/messages/run-1/complete")
    assert '"status":"completed"' in run(copied(page))


def test_finds_every_thread_and_fetches_no_more_than_a_page_of_them(
    browser: Browser, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    make_threads(tmp_path / "chunks.db", 251)
    service = start_service()
    with api_client(service) as client, new_page(browser) as page:
        page.add_init_script(FAST)
        lists: list[dict[str, str]] = []
        page.on("request", lambda request: "/api/threads?" in request.url and lists.append(query_of(request.url)))
        # A search asks for 1,000 threads at a time, so these would all be on its first page.
        fewer = lambda route: route.continue_(url=route.request.url.replace("limit=1000", "limit=100"))  # noqa: E731
        page.route("**/api/threads?*limit=1000*", fewer)
        page.goto(service.url)
        rows = page.locator("#threads li")
        expect(rows).to_have_count(50)
        looks = len(lists)
        wait_until(lambda: page.evaluate("1") and len(lists) > looks + 4, "more looks")
        assert {query["limit"] for query in lists} == {"50", "200"}
        assert {query["status"] for query in lists if query["limit"] == "200"} == {"active"}
        # A thread is found by its id, wherever it is in the list.
        page.keyboard.press("/")
        expect(page.locator("#search")).to_be_focused()
        page.keyboard.type("T-0007")
        expect(rows).to_have_count(1)
        expect(page.locator("#found")).to_have_text("1 thread found")
        page.keyboard.press("Enter")
        expect(page.locator("#thread-name")).to_have_text("chat-0007")
        page.keyboard.press("/")
        page.keyboard.press("Escape")
        expect(rows).to_have_count(50)
        # The button leads to the last thread.
        for _ in range(3):
            count = rows.count()
            page.locator("#more").press("Enter")
            wait_until(lambda: rows.count() > count, "more rows")  # noqa: B023
        expect(rows).to_have_count(251)
        expect(page.locator("#more")).to_be_hidden()
        expect(rows.last.locator(".name")).to_have_text(re.compile(r"chat-00\d\d"))
        # A change far down in the list is shown.
        append(client, "chat-0007", "run-2", "again")
        row = rows.filter(has_text="chat-0007")
        expect(row.locator(".status")).to_have_text("active")
        client.post("/threads/chat-0007/messages/run-2/abort")
        expect(row.locator(".status")).to_have_text("aborted")


def query_of(url: str) -> dict[str, str]:
    return dict(httpx.URL(url).params)


def test_looks_less_often_when_nothing_changes_and_never_unseen(
    page: Page, service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "1", complete=True)
    looks: list[float] = []
    page.on("request", lambda request: "limit=50" in request.url and looks.append(time.monotonic()))
    page.goto(service.url)

    def waits() -> list[float]:
        page.evaluate("1")  # Playwright reports events during a call
        return [later - sooner for sooner, later in itertools.pairwise(looks)]

    wait_until(lambda: len(waits()) > 5 and waits()[-1] > 0.4, "a long wait")  # 5 s, ten times as fast
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true, configurable: true})")
    page.wait_for_timeout(600)
    count = len(looks)
    page.wait_for_timeout(1200)
    assert len(looks) == count
    append(client, "u", "m", "2")
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#threads li")).to_have_count(2)


def test_waits_for_a_thread_that_is_not_made_yet(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "chat-1", "m", "1")
    page.goto(service.url)
    page.keyboard.press("/")
    page.keyboard.type("chat")
    expect(page.locator("#found")).to_have_text("1 thread found")
    page.get_by_role("link", name="Open “chat” and wait for it").click()
    expect(page.locator("#gone")).to_be_visible()
    append(client, "chat", "m", "Here it is")
    expect(page.locator(".text")).to_have_text("Here it is")
    expect(page.locator("#gone")).to_be_hidden()


def test_keys_lead_through_the_page(page: Page, service: Service, client: httpx.Client) -> None:
    for name in ("a", "b", "c"):
        append(client, name, "m", name, complete=True)
    page.goto(service.url)
    links = page.locator("#threads a")
    expect(links).to_have_count(3)
    page.keyboard.press("ArrowDown")
    expect(links.nth(0)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.locator("#search")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    expect(links.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#thread-name")).to_be_focused()
    expect(links.nth(2)).to_have_attribute("aria-current", "true")
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Text")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#events li")).to_have_count(2)
    page.keyboard.press("p")
    expect(page.locator("#publish-content")).to_be_focused()
    page.keyboard.type("/p")  # a shortcut is text in here
    expect(page.locator("#publish-content")).to_have_value("/p")
    page.keyboard.press("Escape")
    expect(page.locator("#publish")).to_be_hidden()
    expect(page.get_by_role("tab", name="Events")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#thread")).to_be_hidden()
    expect(links.nth(2)).to_be_focused()


# A thread


def test_thread_shows_its_text_live_its_ends_and_reasons(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "run-1", "Hello,\n", "<img src=x onerror=alert(1)>", complete=True)
    page.goto(service.url)
    page.get_by_role("link", name=re.compile("^t ")).focus()
    page.keyboard.press("Enter")
    messages = page.locator("#messages article")
    expect(messages).to_have_count(1)
    expect(messages.nth(0).locator(".text")).to_have_text("Hello,\n<img src=x onerror=alert(1)>")
    expect(messages.nth(0).locator(".status")).to_have_text("completed")
    expect(messages.nth(0).get_by_role("button", name="Stop")).to_have_count(0)
    append(client, "t", "run-2", "one ")
    expect(messages).to_have_count(2)
    text, status = messages.nth(1).locator(".text"), messages.nth(1).locator(".status")
    expect(text).to_have_text("one ")
    expect(text).to_have_attribute("aria-busy", "true")
    append(client, "t", "run-2", "two")
    expect(text).to_have_text("one two")
    expect(page.locator("#thread-facts")).to_contain_text("1 reader")
    client.post("/threads/t/messages/run-2/abort", json={"reason": "ran out of money"})
    expect(status).to_have_text("aborted")
    expect(messages.nth(1).locator(".reason")).to_have_text("ran out of money")
    expect(text).to_have_attribute("aria-busy", "false")
    expect(page.locator("#announce")).to_have_text("run-2 aborted: ran out of money")


def test_text_is_as_it_was_written(page: Page, service: Service, client: httpx.Client) -> None:
    text = "# Title\n\n- a *b* `c`\n\n\tcode\n\nשלום, עולם\n"
    append(client, "t", "m", text)
    client.post("/threads/t/messages/m/chunks", json={"content": '{"city": ', "event": "tool_call"})
    client.post("/threads/t/messages/m/chunks", json={"content": '"Bern"}', "event": "tool_call"})
    append(client, "t", "m", "Done.", complete=True)
    page.goto(f"{service.url}/#/t")
    body = page.locator(".text")
    expect(body).to_have_attribute("dir", "auto")
    expect(body).to_contain_text("Done.")
    assert body.evaluate("body => body.textContent") == f'{text}{{"city": "Bern"}}Done.'
    block = body.locator(".event")
    expect(block).to_have_attribute("data-event", "tool_call")
    assert block.evaluate("block => getComputedStyle(block).display") == "block"
    family = "body => getComputedStyle(body).fontFamily"
    assert "mono" not in body.evaluate(family)
    page.get_by_role("button", name="Mono").click()
    assert "mono" in body.evaluate(family)
    page.reload()
    expect(page.get_by_role("button", name="Mono")).to_have_attribute("aria-pressed", "true")
    expect(body).to_contain_text("Done.")
    assert "mono" in body.evaluate(family)
    expect(block).to_have_text('{"city": "Bern"}')  # the kept text still has its event


def test_events_are_the_sequence_itself(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "run-1", "Hi", "\n\n")
    client.post("/threads/t/messages/run-1/chunks", json={"content": '{"a":{"b":1}}', "event": "tool_call"})
    append(client, "t", "run-2", "other")
    page.goto(f"{service.url}/#/t")
    expect(page.locator(".text").first).to_contain_text("Hi")
    page.get_by_role("tab", name="Events").click()
    events = page.locator("#events li")
    expect(events).to_have_count(4)
    expect(page.locator("#thread-facts")).to_contain_text("1 reader")
    chunks = client.get("/threads/t/chunks").json()["chunks"]
    generation = client.get("/threads/t").json()["cursor"].partition("-")[0]
    assert events.locator(".seq").all_text_contents() == [str(chunk["seq"]) for chunk in chunks]
    times = events.locator("time").evaluate_all("times => times.map(time => Date.parse(time.dateTime))")
    assert times == [chunk["timestamp"] for chunk in chunks]
    assert events.nth(2).locator(".kind").text_content() == "tool_call"
    assert events.nth(2).locator("pre").text_content() == '{\n  "a": {\n    "b": 1\n  }\n}'
    assert events.nth(1).locator(".content").text_content() == r'"\n\n"'
    expect(events.nth(3).get_by_role("button", name=f"Copy cursor {generation}-4")).to_be_visible()
    append(client, "t", "run-1", "live")
    expect(events.nth(4).locator(".content")).to_have_text("live")
    client.post("/threads/t/messages/run-1/abort", json={"reason": "enough"})
    expect(events.nth(5).locator(".kind")).to_have_text("aborted")
    expect(events.nth(5).locator(".content")).to_have_text("enough")
    page.reload()  # the address holds the view
    expect(events).to_have_count(6)
    page.get_by_role("tab", name="Text").click()
    expect(page.locator("#messages .reason").first).to_have_text("enough")
    client.delete("/threads/t")
    page.get_by_role("tab", name="Events").click()
    expect(page.locator("#gone")).to_be_visible()
    append(client, "t", "run-1", "made again")
    expect(events).to_have_count(1)


def test_events_of_a_long_thread_come_by_pages(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", *WORDS)
    page.goto(f"{service.url}/#/t?events")
    events = page.locator("#events li")
    expect(events).to_have_count(200)  # the last ones, as the message is active
    wait_until(lambda: gap(page) < 2, "the end")
    page.get_by_role("button", name="Show 200 earlier events").click()
    expect(events).to_have_count(400)
    assert events.first.locator(".seq").text_content() == "201"
    page.get_by_role("button", name="Show 200 earlier events").click()
    expect(events).to_have_count(600)
    expect(page.locator("#events-earlier")).to_be_hidden()
    append(client, "t", "m", "!", complete=True)
    expect(events).to_have_count(602)
    page.reload()
    expect(events).to_have_count(200)  # the first ones, as it is complete
    assert events.first.locator(".seq").text_content() == "1"
    page.get_by_role("button", name="Show 200 later events of 402").click()
    expect(events).to_have_count(400)
    assert [int(text) for text in events.locator(".seq").all_text_contents()] == list(range(1, 401))


def test_copies_text_cursor_and_a_curl_that_resumes_there(page: Page, service: Service, client: httpx.Client) -> None:
    thread = "it's (mine)"
    append(client, thread, "m", "Hello", ", ")
    page.goto(f"{service.url}/#/{thread}")
    expect(page.locator(".text")).to_have_text("Hello, ")
    page.get_by_role("button", name="Copy text of m").click()
    expect(page.locator("#announce")).to_have_text("Copied text of m")
    assert copied(page) == "Hello, "
    page.get_by_role("button", name="Copy cursor of m").click()
    expect(page.locator("#announce")).to_have_text("Copied cursor of m")
    cursor = copied(page)
    assert cursor == client.get(f"/threads/{thread}").json()["cursor"]
    page.get_by_role("button", name="Copy curl that resumes m here").click()
    expect(page.locator("#announce")).to_have_text("Copied curl that resumes m here")
    line = copied(page)
    append(client, thread, "m", "reader", complete=True)
    events = [json.loads(data) for data in re.findall("^data: (.*)$", run(line), re.M)]
    assert [event.get("content") or event["status"] for event in events] == ["reader", "completed"]
    page.reload()  # the kept text still has its cursor
    page.get_by_role("tab", name="Events").click()
    page.get_by_role("button", name=f"Copy cursor {cursor}").click()
    expect(page.locator("#announce")).to_have_text(f"Copied cursor {cursor}")
    assert copied(page) == cursor
    page.get_by_role("button", name="Copy curl that resumes after 2").click()
    expect(page.locator("#announce")).to_have_text("Copied curl that resumes after 2")
    assert '"reader"' in run(copied(page))
    # Over plain HTTP from another machine the clipboard API is missing.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {get: () => undefined})")
    page.get_by_role("button", name="Copy curl that resumes after 1").click()
    expect(page.locator("#announce")).to_have_text("Copied curl that resumes after 1")
    page.keyboard.press("p")
    page.keyboard.press("Control+v")
    expect(page.locator("#publish-content")).to_have_value(re.compile(r"^curl -sN 'http.*-1'$"))


def test_publishes_chunks_from_a_form(page: Page, service: Service, client: httpx.Client) -> None:
    page.goto(service.url)
    page.get_by_role("button", name="Publish a chunk").click()
    page.get_by_label("Thread", exact=True).fill("mine")
    page.get_by_label("Content").fill("One ")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#publish-result")).to_have_text("Committed, up to seq 1.")
    expect(page.locator(".text")).to_have_text("One ")
    expect(page.get_by_label("Content")).to_be_focused()
    page.keyboard.type("two")
    page.get_by_label("Event name").fill("tool_call")
    page.get_by_label("ends the message").check()
    page.get_by_role("button", name="Append").click()
    expect(page.locator("#publish-result")).to_have_text("Committed, up to seq 3.")
    expect(page.locator(".text .event")).to_have_text("two")
    expect(page.locator("#messages .status")).to_have_text("completed")
    page.get_by_label("Content").fill("three")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#publish-result")).to_contain_text("an end is final")
    expect(page.get_by_label("Content")).to_have_value("three")
    chunks = client.get("/threads/mine/chunks").json()["chunks"]
    assert [(chunk["content"], chunk["event"]) for chunk in chunks] == [("One ", None), ("two", "tool_call")]


def test_stop_and_clear(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "run-1", "one ")
    page.goto(f"{service.url}/#/t")
    page.get_by_role("button", name="Stop run-1").click()
    expect(page.locator("#messages .reason")).to_have_text("stopped on the page")
    answer = append(client, "t", "run-1", "two")
    assert (answer.status_code, answer.json()["reason"]) == (409, "stopped on the page")
    page.get_by_role("button", name="Clear…").click()
    page.keyboard.press("Escape")
    expect(page.locator("#thread")).to_be_visible()
    page.get_by_role("button", name="Clear…").click()
    page.get_by_role("button", name="Keep it").click()
    assert client.get("/threads/t").status_code == 200
    page.get_by_role("button", name="Clear…").click()
    page.get_by_role("button", name="Clear it").click()
    expect(page.locator("#threads li")).to_have_count(0)
    expect(page.locator("#thread")).to_be_hidden()
    assert client.get("/threads/t").status_code == 404


def test_thread_that_is_cleared_by_another_says_so_and_comes_back(
    page: Page, service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "old text")
    page.goto(f"{service.url}/#/t")
    expect(page.locator(".text")).to_have_text("old text")
    client.delete("/threads/t")
    expect(page.locator("#gone")).to_be_visible()
    assert page.evaluate("document.querySelector('.text').ariaBusy") == "false"
    append(client, "t", "m", "new")
    expect(page.locator(".text")).to_have_text("new")
    expect(page.locator("#gone")).to_be_hidden()


# Scrolling


@pytest.mark.parametrize("kind", ["page", "phone"])
def test_a_finished_thread_opens_at_its_top(
    kind: str, request: pytest.FixtureRequest, service: Service, client: httpx.Client
) -> None:
    page: Page = request.getfixturevalue(kind)
    append(client, "t", "m", *WORDS, complete=True)
    page.goto(service.url)
    page.locator("#threads a").click()
    expect(page.locator(".text")).to_contain_text("word-599")
    expect(page.locator("#messages .status")).to_have_text("completed")
    assert is_in_sight(page, "#thread-facts")
    assert gap(page) > 300
    expect(page.locator("#to-end")).to_be_hidden()


@pytest.mark.parametrize("kind", ["page", "phone"])
def test_follows_the_end_until_the_reader_scrolls(
    kind: str, request: pytest.FixtureRequest, service: Service, client: httpx.Client
) -> None:
    page: Page = request.getfixturevalue(kind)
    append(client, "t", "m", *WORDS)
    page.goto(f"{service.url}/#/t")
    text = page.locator(".text")
    expect(text).to_contain_text("word-599")
    wait_until(lambda: gap(page) < 2, "the end")
    append(client, "t", "m", "\n\n\nmore")
    expect(text).to_contain_text("more")
    wait_until(lambda: gap(page) < 2, "the end again")
    scroll(page, 50)
    expect(page.locator("#to-end")).to_be_visible()
    append(client, "t", "m", "\n\n\nand more")
    expect(text).to_contain_text("and more")
    assert gap(page) > 300
    page.get_by_role("button", name="Follow the end").click()
    wait_until(lambda: gap(page) < 2, "the end at last")
    expect(page.locator("#to-end")).to_be_hidden()
    append(client, "t", "m", "\n\n\nthe end", complete=True)
    expect(page.locator("#messages .status")).to_have_text("completed")
    wait_until(lambda: gap(page) < 2, "the very end")


def test_what_is_drawn_before_the_event_of_a_scroll_does_not_undo_the_scroll(
    page: Page, service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", *WORDS)
    page.goto(f"{service.url}/#/t")
    expect(page.locator(".text")).to_contain_text("word-599")
    wait_until(lambda: gap(page) < 2, "the end")
    page.evaluate("addEventListener('scroll', (event) => event.stopImmediatePropagation(), true)")
    scroll(page, 50)
    append(client, "t", "m", "\n\n\nmore")
    expect(page.locator(".text")).to_contain_text("more")
    expect(page.locator("#to-end")).to_be_visible()
    assert gap(page) > 300


def test_messages_that_are_not_shown_are_counted(page: Page, service: Service, client: httpx.Client) -> None:
    for number in range(1, 32):
        append(client, "t", f"run-{number}", f"text {number}", complete=number < 31)
    page.goto(f"{service.url}/#/t")
    names = page.locator("#messages h3")
    expect(names).to_have_count(20)
    assert names.last.inner_text() == "run-31"
    page.get_by_role("button", name="Show 11 earlier messages", exact=True).click()
    expect(names).to_have_count(31)
    expect(page.locator("#earlier")).to_be_hidden()
    client.post("/threads/t/messages/run-31/complete")
    expect(page.locator("#messages .status").last).to_have_text("completed")
    page.reload()
    expect(names).to_have_count(20)
    assert names.first.inner_text() == "run-1"
    page.get_by_role("button", name="Show 11 later messages", exact=True).click()
    expect(names).to_have_count(31)
    assert names.all_text_contents() == [f"run-{number}" for number in range(1, 32)]


# The connection


def test_nothing_looks_alive_while_the_service_is_away(phone: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", *WORDS)
    phone.goto(f"{service.url}/#/t")
    expect(phone.locator(".text")).to_contain_text("word-599")
    wait_until(lambda: gap(phone) < 2, "the end")  # the top is far above
    assert phone.evaluate("document.getAnimations().length") > 0
    service.kill()
    expect(phone.locator("#service-state")).to_have_text("Not reachable, trying again")
    expect(phone.locator("#service-age")).to_have_text(re.compile(r"as of \d+ s ago"))
    assert is_in_sight(phone, "#service-state")
    assert phone.evaluate("document.getAnimations().length") == 0
    expect(phone.locator("#thread-status")).to_have_text("was active")
    expect(phone.locator("#messages .status")).to_have_text("was active")
    service.start()
    expect(phone.locator("#service-state")).to_have_text("Connected")
    expect(phone.locator("#messages .status")).to_have_text("active")
    append(client, "t", "m", "and on")
    expect(phone.locator(".text")).to_contain_text("and on")


def test_a_thread_opened_offline_says_why_it_is_empty(phone: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "Hello")
    phone.goto(service.url)
    link = phone.locator("#threads a")
    expect(link).to_contain_text("Hello")
    phone.context.set_offline(True)
    expect(phone.locator("#service-state")).to_have_text("Not reachable, trying again")
    link.tap()
    expect(phone.locator("#waiting")).to_contain_text("as soon as the service answers")
    phone.context.set_offline(False)
    expect(phone.locator(".text")).to_have_text("Hello")
    expect(phone.locator("#waiting")).to_be_hidden()


def test_a_long_reason_stays_on_the_screen(phone: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "Hello")
    reason = "x" * 500 + " and more " * 40
    client.post("/threads/t/messages/m/abort", json={"reason": reason})
    phone.goto(service.url)
    expect(phone.locator(".words")).to_contain_text("xxx")
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    phone.locator("#threads a").tap()
    expect(phone.locator("#messages .reason")).to_have_text(reason)
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    phone.get_by_role("tab", name="Events").tap()
    expect(phone.locator("#events li")).to_have_count(2)
    assert phone.evaluate("document.documentElement.scrollWidth") == 360


# The demo and the plots


def test_demo_carries_on_over_a_reload_and_a_restart(page: Page, service: Service, client: httpx.Client) -> None:
    _, frames = opened_sockets(page)
    page.goto(service.url)
    page.get_by_role("button", name="Play a demo answer").click()
    text = page.locator(".text")
    expect(text).to_contain_text("SQLite")
    page.reload()
    expect(text).to_contain_text("holds a cursor")
    assert any("You are reading an answer" in frame for frame in frames), "it was not resumed from known text"
    expect(page.locator(".carried")).to_be_visible()
    restart(service)
    expect(page.locator(".status").first).to_have_text("completed")
    expect(page.locator("#messages .status")).to_have_text("completed")
    (thread,) = client.get("/threads").json()["threads"]
    content = client.get(f"/threads/{thread['threadId']}/content").json()["content"]
    assert text.evaluate("text => text.textContent") == content
    demo = (ROOT / "static" / "page" / "demo.js").read_text()
    assert content == re.search("DEMO = `([^`]*)`", demo)[1].replace("\\\n", "")
    expect(page.locator("#play")).to_be_enabled()


def test_demo_stops_when_it_is_stopped(page: Page, service: Service, client: httpx.Client) -> None:
    page.goto(service.url)
    page.get_by_role("button", name="Play a demo answer").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#play")).to_be_enabled()
    expect(page.locator("#messages .reason")).to_have_text("stopped on the page")
    expect(page.locator("#notice")).to_be_hidden()


def test_plots_what_happens_while_they_are_unfolded(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one ")
    scrapes: list[str] = []
    page.on("request", lambda request: request.url.endswith("/metrics") and scrapes.append(request.url))
    page.goto(f"{service.url}/#/t")
    expect(page.locator("#thread-facts")).to_contain_text("1 reader")
    assert scrapes == []
    page.get_by_text("Activity and demo").click()
    expect(page.locator("#readers-now")).to_have_text("1")
    expect(page.locator("#chunks-now")).to_have_text("0")
    before = page.locator("#chunks-plot .plot-line").get_attribute("d")

    def is_plotted() -> bool:
        append(client, "t", "m", *["x"] * 50)
        return page.locator("#chunks-now").inner_text() not in ("0", "–")

    wait_until(is_plotted, "a rate of chunks")
    assert page.locator("#chunks-plot .plot-line").get_attribute("d") != before
    assert page.locator("#readers-plot .plot-line").get_attribute("d").startswith("M")
    page.reload()
    expect(page.locator("#readers-now")).to_have_text("1")  # it stays unfolded


# Small screens, preferences, accessibility


def test_fits_a_phone_and_what_its_owner_prefers(phone: Page, service: Service, client: httpx.Client) -> None:
    append(client, "a-thread-whose-id-has-no-place-to-break-" + "x" * 100, "m" * 200, "word" * 200)
    phone.goto(service.url)
    link = phone.locator("#threads a")
    link.tap()
    expect(phone.locator(".text")).to_contain_text("word")
    expect(phone.locator("#overview")).to_be_hidden()
    expect(phone.locator("#thread-name")).to_be_focused()
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    for scheme in ("light", "dark"):
        phone.emulate_media(color_scheme=scheme)
        ink, paper = phone.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.documentElement))")
        assert (luminance(ink) > luminance(paper)) == (scheme == "dark")
    assert phone.evaluate("document.getAnimations().length") > 0
    phone.emulate_media(reduced_motion="reduce")
    assert phone.evaluate("document.getAnimations().length") == 0
    phone.get_by_role("link", name="All threads").tap()
    expect(phone.locator("#thread")).to_be_hidden()
    expect(link).to_be_focused()
    assert phone.evaluate("document.documentElement.scrollWidth") == 360


def test_back_on_a_phone_leads_to_where_one_was(phone: Page, service: Service, client: httpx.Client) -> None:
    for number in range(15):
        append(client, f"chat-{number}", "m", *WORDS[:200], complete=True)
    phone.goto(service.url)
    row = phone.get_by_role("link", name="chat-0 ")
    row.scroll_into_view_if_needed()
    before = phone.evaluate("scrollY")
    row.tap()
    expect(phone.locator(".text")).to_contain_text("word-199")
    assert phone.evaluate("scrollY") == 0
    phone.go_back()
    expect(row).to_be_focused()
    assert abs(phone.evaluate("scrollY") - before) < 50  # a row may have grown by a line
    assert before > 300


def luminance(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3]))


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed (npm install)")
@pytest.mark.parametrize("kind", ["page", "phone"])
def test_axe_finds_no_violation(
    kind: str, request: pytest.FixtureRequest, service: Service, client: httpx.Client
) -> None:
    page: Page = request.getfixturevalue(kind)
    page.emulate_media(reduced_motion="reduce")
    page.goto(service.url)
    expect(page.locator("#start")).to_be_visible()
    check_with_axe(page)
    append(client, "t", "run-1", *WORDS[:40])
    client.post("/threads/t/messages/run-1/chunks", json={"content": '{"a":1}', "event": "tool_call"})
    append(client, "u", "run-1", "Hello")
    client.post("/threads/u/messages/run-1/abort", json={"reason": "enough"})
    expect(page.locator("#threads .words").first).to_have_text("enough")
    check_with_axe(page)
    page.goto(f"{service.url}/#/t")
    expect(page.locator(".event")).to_have_text('{"a":1}')
    page.locator("#thread [data-publish]").click()
    check_with_axe(page)
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Events").click()
    expect(page.locator("#events pre")).to_be_visible()
    page.context.set_offline(True)
    expect(page.locator("#thread-status")).to_have_text("was active")
    check_with_axe(page)
    page.context.set_offline(False)


def check_with_axe(page: Page) -> None:
    """Check all rules in the light scheme, and the colours in the dark one."""
    if page.evaluate("() => !window.axe"):
        page.evaluate(AXE.read_text())
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        found = "({violations}) => violations.map(({id, nodes}) => [id, nodes[0].html])"
        options = {"resultTypes": ["violations"], **rules}
        assert page.evaluate(f"options => axe.run(options).then({found})", options) == [], scheme


def test_asks_for_a_token_and_keeps_it_in_the_tab(browser: Browser, start_service: Callable[..., Service]) -> None:
    service = start_service("--secret", SECRET)

    def make_token(**claims: Any) -> str:
        return jwt.encode({"exp": int(time.time()) + 3600, **claims}, SECRET, "HS256")

    writer = {"Authorization": f"Bearer {make_token(scope='write')}"}
    with httpx.Client(base_url=service.api, timeout=TIMEOUT, headers=writer) as client, new_page(browser) as page:
        append(client, "t", "m", "Hello")
        page.add_init_script(FAST)
        page.goto(f"{service.url}/#/t")
        dialog = page.locator("#token-dialog")
        for wrong in ("not.a.token", make_token(scope="read") + "x"):
            page.get_by_label("Token", exact=True).fill(wrong)
            page.get_by_role("button", name="Use it").click()
            expect(dialog).to_be_visible()
        page.get_by_label("Token", exact=True).fill(make_token(scope="read abort", threads=["t"]))
        page.keyboard.press("Enter")
        expect(page.locator(".text")).to_have_text("Hello")
        expect(page.locator("#service-state")).to_have_text("Connected")
        page.get_by_text("Activity and demo").click()
        expect(page.locator("#no-plots")).to_be_visible()
        expect(page.locator("#example-follow")).to_contain_text('curl -sN -H "Authorization: Bearer $TOKEN"')
        page.reload()
        append(client, "t", "m", ", reader", complete=True)
        expect(page.locator(".text")).to_have_text("Hello, reader")
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name="Clear…").click()
        page.get_by_role("button", name="Clear it").click()
        expect(page.locator("#notice")).to_contain_text("scope")


# Swagger UI


def test_an_append_is_tried_out_in_swagger_as_it_is_filled_in(
    page: Page, service: Service, client: httpx.Client
) -> None:
    page.goto(f"{service.url}/schema/swagger")
    call = page.locator("#operations-Producers-appendChunks")
    call.locator(".opblock-summary").click()
    call.get_by_role("button", name="Try it out").click()
    body = call.locator("textarea").first
    assert json.loads(body.input_value()) == {"content": "Hello"}
    call.get_by_role("button", name="Execute").click()
    answer = call.locator(".live-responses-table .response-col_status").last
    answer.wait_for()
    assert answer.inner_text().startswith("201")
    assert contents(client, "thread-1") == ["Hello"]
