"""The README's snippets for the browser, in Chromium."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from browser_kit import Page, browser, client, emptied, tab
from conftest import ROOT, Service, append, wait_until
from wire import shared_service

__all__ = ["browser", "client", "tab"]  # fixtures

service = shared_service()
README = (ROOT / "README.md").read_text()
ESBUILD = ROOT / "node_modules" / ".bin" / "esbuild"
MOUNT = """
import { createElement } from "react";
import { createRoot } from "react-dom/client";
createRoot(document.body.appendChild(document.createElement("div")))
  .render(createElement(Answer, { threadId: "thread-1", messageId: "run-8" }));
"""


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def page(tab: Page, service: Service) -> Iterator[Page]:
    with emptied(tab, service.url) as page:
        yield page


def show(page: Page, service: Service, html: str) -> None:
    """Show this HTML as a page of the service's own origin."""
    here = html.replace("http://127.0.0.1:8000", service.url)
    page.route("**/my-page", lambda route: route.fulfill(body=f"<!doctype html>{here}", content_type="text/html"))
    page.goto(f"{service.url}/my-page")


def wait_for_text(page: Page, element: str, text: str) -> None:
    page.wait_for_function(
        "([element, text]) => document.querySelector(element)?.textContent === text", arg=[element, text], polling=20
    )


def readers(client: httpx.Client, thread: str = "thread-1") -> int:
    answer = client.get(f"/threads/{thread}")
    return answer.json()["readers"] if answer.status_code == 200 else 0


def test_an_event_source_that_comes_first_waits_and_goes_on_over_a_restart(
    page: Page, service: Service, client: httpx.Client
) -> None:
    with page.expect_response("**/stream?follow=true") as first:
        show(page, service, snippets("html")[0])
    assert first.value.status == 200
    append(client, "thread-1", "run-4", "Hello", index=0)
    wait_for_text(page, "#answer", "Hello")
    service.restart()
    append(client, "thread-1", "run-4", ", world", index=1, complete=True)
    wait_for_text(page, "#answer", "Hello, world")


def test_the_client_waits_keeps_the_text_over_a_reload_and_stops(
    page: Page, service: Service, client: httpx.Client
) -> None:
    show(page, service, snippets("html")[1])
    append(client, "thread-1", "run-5", "Hello", index=0)
    wait_for_text(page, "#text", "Hello")
    page.reload()
    append(client, "thread-1", "run-5", ", world", index=1)
    wait_for_text(page, "#text", "Hello, world")
    page.click("#stop")
    wait_for_text(page, "#text", "Hello, world (stopped: enough)")
    page.reload()
    wait_for_text(page, "#text", "Hello, world (stopped: enough)")


@pytest.mark.skipif(not ESBUILD.exists(), reason="the packages of package.json are not installed (npm install)")
def test_the_component_shows_the_answer_and_stops_it(page: Page, service: Service, client: httpx.Client) -> None:
    (source,) = snippets("jsx")
    command = [ESBUILD, "--bundle", "--format=esm", "--loader=jsx", "--jsx=automatic"]
    done = subprocess.run(command, cwd=ROOT, input=source + MOUNT, capture_output=True, text=True, check=True)
    show(page, service, "<title>mine</title>")
    page.add_script_tag(content=done.stdout, type="module")
    append(client, "thread-1", "run-8", "Hello")
    wait_for_text(page, "article", "HelloStop")
    page.click("button")
    wait_until(lambda: client.get("/threads/thread-1").json()["messages"][-1]["status"] == "aborted")
    wait_for_text(page, "article", "Hello")
