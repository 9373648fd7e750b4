"""The page at / in Chromium: the list, a thread, the plots, the demo, on a phone and with a token."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jwt
import pytest
from browser_kit import Browser, Page, browser, client, new_page, opened_sockets, restart
from conftest import TIMEOUT, Service, append, wait_until
from playwright.sync_api import expect
from wire import serving

__all__ = ["browser", "client"]  # fixtures

SECRET = "correct horse battery staple, 32+"
# Time goes ten times as fast.
FAST = """{
    const [began, now, timeout] = [Date.now(), Date.now, setTimeout];
    Date.now = () => began + 10 * (now() - began);
    window.setTimeout = (run, ms, ...rest) => timeout(run, ms / 10, ...rest);
}"""

expect.set_options(timeout=TIMEOUT * 1000)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    """A page whose every request goes to the service, and that has nothing to complain about."""
    with new_page(browser) as page:
        requests: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url.replace("ws:", "http:")))
        page.on("console", lambda message: complaints.append(message.text))
        page.add_init_script(FAST)
        yield page
        assert {re.match(r"\w+://[^/]+", url)[0] for url in requests} == {service.url}
        assert [text for text in complaints if "Content Security Policy" in text] == []


def test_lists_threads_with_what_is_to_be_known_of_them(page: Page, service: Service, client: httpx.Client) -> None:
    page.goto(service.url)
    expect(page.locator("#empty")).to_contain_text("curl")
    expect(page.locator("#service")).to_have_text("Connected")
    append(client, "first", "m", "x" * 1500, complete=True)
    append(client, "second", "a", "1")
    append(client, "second", "b", "2")
    append(client, "<i>third", "m", "3")
    client.post("/threads/<i>third/messages/m/abort")
    rows = page.locator("#threads li")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("<i>third")
    expect(rows.nth(0).locator(".status")).to_have_text("aborted")
    expect(rows.nth(1).locator(".status")).to_have_text("active")
    expect(rows.nth(1)).to_contain_text("2 messages")
    expect(rows.nth(1)).to_contain_text("0 readers")
    expect(rows.nth(2)).to_contain_text("1.5 kB")
    expect(rows.nth(2)).to_contain_text(re.compile(r"\d+ s old"))
    expect(rows.nth(2)).to_contain_text("last activity")
    page.get_by_label("Show").select_option("completed")
    expect(rows).to_have_count(1)


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
    expect(status).to_have_text("aborted: ran out of money")
    expect(text).to_have_attribute("aria-busy", "false")
    expect(page.locator("#announce")).to_have_text("run-2 aborted: ran out of money")


def test_stop_and_clear(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "run-1", "one ")
    page.goto(f"{service.url}/#/t")
    page.get_by_role("button", name="Stop run-1").click()
    expect(page.locator("#messages .status")).to_have_text("aborted: stopped on the page")
    answer = append(client, "t", "run-1", "two")
    assert (answer.status_code, answer.json()["reason"]) == (409, "stopped on the page")
    page.get_by_role("button", name="Clear…").click()
    page.keyboard.press("Escape")
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
    append(client, "t", "m", "new")
    expect(page.locator(".text")).to_have_text("new")
    expect(page.locator("#gone")).to_be_hidden()


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
    assert content == page.evaluate(
        "async () => (await (await fetch('/static/page.js')).text()).match(/DEMO = `([^`]*)`/)[1].replaceAll('\\\\\\n', '')"
    )
    expect(page.get_by_role("button", name="Play a demo answer")).to_be_enabled()


def test_demo_stops_when_it_is_stopped(page: Page, service: Service, client: httpx.Client) -> None:
    page.goto(service.url)
    page.get_by_role("button", name="Play a demo answer").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Play a demo answer")).to_be_enabled()
    expect(page.locator("#messages .status")).to_have_text("aborted: stopped on the page")
    expect(page.locator("#notice")).to_be_hidden()


def test_plots_what_happens(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one ")
    page.goto(f"{service.url}/#/t")
    expect(page.locator("#readers-now")).to_have_text("1")
    expect(page.locator("#chunks-now")).to_have_text("0")
    before = page.locator("#chunks-plot .plot-line").get_attribute("d")

    def is_plotted() -> bool:
        append(client, "t", "m", *["x"] * 50)
        return page.locator("#chunks-now").inner_text() not in ("0", "–")

    wait_until(is_plotted, "a rate of chunks")
    assert page.locator("#chunks-plot .plot-line").get_attribute("d") != before
    assert page.locator("#readers-plot .plot-line").get_attribute("d").startswith("M")


def test_fits_a_phone_and_what_its_owner_prefers(browser: Browser, service: Service, client: httpx.Client) -> None:
    append(client, "a-thread-whose-id-has-no-place-to-break-" + "x" * 100, "m" * 200, "word" * 200)
    with new_page(browser, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        page.goto(service.url)
        link = page.locator("#threads a")
        link.tap()
        expect(page.locator(".text")).to_contain_text("word")
        expect(page.locator("#overview")).to_be_hidden()
        expect(page.locator("#thread-name")).to_be_focused()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            ink, paper = page.evaluate(
                "(s => [s.color, s.backgroundColor])(getComputedStyle(document.documentElement))"
            )
            assert (luminance(ink) > luminance(paper)) == (scheme == "dark")
        assert page.evaluate("document.getAnimations().length") > 0
        page.emulate_media(reduced_motion="reduce")
        assert page.evaluate("document.getAnimations().length") == 0
        page.get_by_role("link", name="All threads").tap()
        expect(page.locator("#thread")).to_be_hidden()
        expect(link).to_be_focused()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def luminance(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3]))


def test_asks_for_a_token_and_keeps_it_in_the_tab(browser: Browser, start_service: Callable[..., Service]) -> None:
    service = start_service("--secret", SECRET)

    def make_token(**claims: Any) -> str:
        return jwt.encode({"exp": int(time.time()) + 3600, **claims}, SECRET, "HS256")

    writer = {"Authorization": f"Bearer {make_token(scope='write')}"}
    with httpx.Client(base_url=service.api, timeout=TIMEOUT, headers=writer) as client, new_page(browser) as page:
        append(client, "t", "m", "Hello")
        page.add_init_script(FAST)
        page.goto(f"{service.url}/#/t")
        dialog = page.get_by_role("dialog")
        for wrong in ("not.a.token", make_token(scope="read") + "x"):
            page.get_by_label("Token", exact=True).fill(wrong)
            page.get_by_role("button", name="Use it").click()
            expect(dialog).to_be_visible()
        page.get_by_label("Token", exact=True).fill(make_token(scope="read abort", threads=["t"]))
        page.keyboard.press("Enter")
        expect(page.locator(".text")).to_have_text("Hello")
        expect(page.locator("#readers-now")).to_have_text("1")
        expect(page.locator("#service")).to_have_text("Connected")
        page.reload()
        append(client, "t", "m", ", reader", complete=True)
        expect(page.locator(".text")).to_have_text("Hello, reader")
        expect(dialog).to_be_hidden()
        page.get_by_role("button", name="Clear…").click()
        page.get_by_role("button", name="Clear it").click()
        expect(page.locator("#notice")).to_contain_text("scope")
