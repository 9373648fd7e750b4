"""Swagger UI in Chromium: what *Try it out* fills in is what the service takes."""

from __future__ import annotations

import json

import httpx
from browser_kit import Browser, browser, client, new_page
from conftest import Service
from wire import contents, shared_service

__all__ = ["browser", "client"]  # fixtures

service = shared_service()


def test_an_append_is_tried_out_as_it_is_filled_in(browser: Browser, service: Service, client: httpx.Client) -> None:
    with new_page(browser) as page:
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
