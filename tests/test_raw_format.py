"""``format=raw``: the bytes for a client that knows only its producer, and how it learns of an end."""

from __future__ import annotations

from http.client import IncompleteRead

import httpx
import pytest
from conftest import Service, append
from wire import JSON, Stream, generation, message_path, problem, shared_service

service = shared_service()


def raw_path(thread: str, message: str = "m", query: str = "") -> str:
    return message_path(thread, message, f"stream?format=raw{query}")


def test_a_chunk_is_its_content_under_its_own_event_name_with_our_cursor(
    service: Service, client: httpx.Client, thread: str
) -> None:
    chunks = [{"content": '{"delta":"é"}'}, {"content": "two\nlines\r\nand a third", "event": "delta"}, {"content": ""}]
    client.post(message_path(thread, "m"), params={"complete": True}, json=chunks).raise_for_status()
    of = generation(client, thread)
    with Stream(service, raw_path(thread)) as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.rest().decode() == (
            "retry: 1000\n"
            f'id: {of}-1\ndata: {{"delta":"é"}}\n\n'
            f"id: {of}-2\nevent: delta\ndata: two\ndata: lines\ndata: and a third\n\n"
            f"id: {of}-3\ndata: \n\n"
        )


def test_a_reader_carries_on_from_the_id_it_saw(service: Service, client: httpx.Client, thread: str) -> None:
    append(client, thread, "m", "a", "b", complete=True)
    of = generation(client, thread)
    with Stream(service, raw_path(thread), {"Last-Event-ID": f"{of}-1"}) as stream:
        assert stream.rest().decode() == f"retry: 1000\nid: {of}-2\ndata: b\n\n"


def test_204_is_the_answer_if_only_the_end_is_left_as_it_has_no_frame(client: httpx.Client, thread: str) -> None:
    append(client, thread, "m", "a", complete=True)
    for path in (f"/threads/{thread}/messages/m/stream", f"/threads/{thread}/stream"):
        assert client.get(path, params={"format": "raw", "after": 1}).status_code == 204
        assert client.get(path, params={"after": 1}).status_code == 200


def test_a_cursor_of_another_generation_is_410_as_a_reset_has_no_frame(client: httpx.Client, thread: str) -> None:
    append(client, thread, "m", "a")
    answer = client.get(f"/threads/{thread}/messages/m/stream", params={"format": "raw", "after": "17-1"})
    assert problem(answer)[0] == 410


@pytest.mark.parametrize("how", ["aborted", "idle", "cleared"])
def test_an_abort_breaks_the_body_off(service: Service, client: httpx.Client, thread: str, how: str) -> None:
    append(client, thread, "m", "a")
    of = generation(client, thread)
    with Stream(service, raw_path(thread, query="&idle_timeout=0.2" if how == "idle" else "")) as stream:
        assert b"".join(stream.line() for _ in range(4)).decode() == f"retry: 1000\nid: {of}-1\ndata: a\n\n"
        if how == "aborted":
            client.post(message_path(thread, "m", "abort"), json={"reason": "stop"}).raise_for_status()
        if how == "cleared":
            client.delete(f"/threads/{thread}").raise_for_status()
        with pytest.raises(IncompleteRead) as broken:
            stream.rest()
        assert broken.value.partial == b""


def test_another_format_is_refused(client: httpx.Client, thread: str) -> None:
    append(client, thread, "m", "a")
    assert problem(client.get(f"/threads/{thread}/stream", params={"format": "xml"}))[0] == 400


# GET …/live


def test_live_is_the_active_message_from_its_start(service: Service, client: httpx.Client, thread: str) -> None:
    append(client, thread, "old", "no", complete=True)
    append(client, thread, "new", "yes")
    of = generation(client, thread)
    with Stream(service, f"/threads/{thread}/live?format=raw") as stream:
        assert b"".join(stream.line() for _ in range(4)).decode() == f"retry: 1000\nid: {of}-3\ndata: yes\n\n"
        append(client, thread, "new", "more", complete=True)
        assert stream.rest().decode() == f"id: {of}-4\ndata: more\n\n"


@pytest.mark.parametrize("form", ["", "?format=raw"])
def test_a_reader_who_comes_back_to_live_gets_the_rest_of_its_message(
    service: Service, client: httpx.Client, thread: str, form: str
) -> None:
    append(client, thread, "m", "a")
    of = generation(client, thread)
    append(client, thread, "m", "b", complete=True)
    append(client, thread, "next", "c")
    path = f"/threads/{thread}/live{form}"
    with Stream(service, path, {"Last-Event-ID": f"{of}-1"}) as stream:
        rest = stream.rest()
        assert (b"data: b" in rest or b'"content":"b"' in rest, f"id: {of}-4\n".encode() in rest) == (True, False)
    with Stream(service, path, {"Last-Event-ID": f"{of}-3"}) as stream:  # of which that cursor is the end
        assert [stream.line(), stream.line()] == [b"retry: 1000\n", f"id: {of}-4\n".encode()]
    client.post(message_path(thread, "next", "abort")).raise_for_status()
    assert client.get(path, headers={"Last-Event-ID": f"{of}-3"}).status_code == 204
    assert client.get(path, headers={"Last-Event-ID": f"{of}-4"}).status_code == (204 if form else 200)


def test_live_has_our_own_events_without_the_format(service: Service, client: httpx.Client, thread: str) -> None:
    append(client, thread, "m", "a")
    with Stream(service, f"/threads/{thread}/live") as stream:
        client.post(message_path(thread, "m", "complete"), headers=JSON)
        assert b"event: complete\n" in stream.rest()


def test_live_is_204_without_an_active_message_or_a_thread(client: httpx.Client, thread: str) -> None:
    assert client.get(f"/threads/{thread}/live").status_code == 204
    append(client, thread, "m", "a", complete=True)
    assert client.get(f"/threads/{thread}/live").status_code == 204


def test_a_following_stream_waits_for_its_message(service: Service, client: httpx.Client, thread: str) -> None:
    with Stream(service, message_path(thread, "m", "stream?follow=true")) as stream:
        assert stream.line() == b"retry: 1000\n"
        append(client, thread, "other", "no", complete=True)
        append(client, thread, "m", "yes", complete=True)
        assert b"".join(stream.rest().split(b"\n\n")).count(b"data: ") == 2
