"""Server-sent events, byte for byte (HTML, 9.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import Service, api_client, append
from httpx_sse import EventSource
from wire import JSON, Stream, data_of, generation, message_path, problem, serving, shared_service

TIMEOUT_FRAME = b"event: timeout\ndata: {}\n\n"
RESET_FRAME = b"event: reset\ndata: {}\n\n"
GONE_FRAME = b"event: gone\ndata: {}\n\n"


STORES = ("sqlite", "redis")
service = shared_service()


Open = Callable[..., Stream]


@pytest.fixture
def read(service: Service) -> Iterator[Open]:
    """Return a function that opens a stream."""
    streams = []

    def open_stream(path: str, headers: dict[str, str] | None = None, body: Any = None) -> Stream:
        streams.append(Stream(service, path, headers, body))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def body_of(stream: Stream) -> bytes:
    """Return all of a stream, with times and generations masked."""
    body = re.sub(rb'"timestamp":\d{13},', b'"timestamp":T,', stream.rest())
    return re.sub(rb"^id: \d{13}-", b"id: G-", body, flags=re.MULTILINE)


def chunk(seq: int, content: str, message: str = "run", event: str | None = None) -> bytes:
    name = f"event: {event}\n" if event else ""
    return (
        f'id: G-{seq}\n{name}data: {{"content":"{content}","timestamp":T,"messageId":"{message}","seq":{seq}}}\n\n'
    ).encode()


def end(seq: int, message: str = "run", status: str = "completed", reason: str = "null") -> bytes:
    return (
        f'id: G-{seq}\nevent: complete\ndata: {{"messageId":"{message}","status":"{status}","reason":{reason},'
        f'"seq":{seq}}}\n\n'
    ).encode()


def whole(*frames: bytes) -> bytes:
    return b"retry: 1000\n" + b"".join(frames)


def fill(client: httpx.Client, thread: str) -> str:
    """Write two messages, one within the other, and return the generation."""
    append(client, thread, "run", "Hello")
    append(client, thread, "aside", "x")
    client.post(message_path(thread, "run"), json={"content": '{"tool":1}', "event": "tool"})
    append(client, thread, "aside", "y", complete=True)
    append(client, thread, "run", " world")
    client.post(message_path(thread, "run", "abort"), json={"reason": 'stop "now"'})
    return generation(client, thread)


RUN = {
    1: chunk(1, "Hello"),
    3: chunk(3, r"{\"tool\":1}", event="tool"),
    6: chunk(6, " world"),
    7: end(7, status="aborted", reason=r'"stop \"now\""'),
}
THREAD = {**RUN, 2: chunk(2, "x", "aside"), 4: chunk(4, "y", "aside"), 5: end(5, "aside")}


def after(frames: dict[int, bytes], seq: int) -> list[bytes]:
    return [frame for place, frame in sorted(frames.items()) if place > seq]


# Chunks from before the reader came


def test_headers_are_exactly_those_of_an_event_stream(client: httpx.Client, thread: str, read: Open) -> None:
    append(client, thread, "run", "a", complete=True)
    for stream in [
        read(f"/threads/{thread}/stream"),
        read(message_path(thread, "run", "stream")),
        read("/resume-stream", body={"thread_id": thread, "message_id": "run", "known_content": ""}),
        read("/resume-stream", body={"thread_id": "no such", "message_id": "run", "known_content": ""}),
    ]:
        assert stream.status == 200
        assert {name: value for name, value in stream.headers.items() if name not in ("date", "transfer-encoding")} == {
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }


def test_the_whole_of_a_message_and_of_a_thread(client: httpx.Client, thread: str, read: Open) -> None:
    made = fill(client, thread)
    assert body_of(read(message_path(thread, "run", "stream"))) == whole(*after(RUN, 0))
    assert body_of(read(f"/threads/{thread}/stream")) == whole(*after(THREAD, 0))
    raw = read(f"/threads/{thread}/stream").rest().decode()
    assert re.findall("^id: (.*)$", raw, re.MULTILINE) == [f"{made}-{seq}" for seq in range(1, 8)]
    times = [chunk["timestamp"] for chunk in client.get(f"/threads/{thread}/chunks").json()["chunks"]]
    assert [int(time) for time in re.findall(r'"timestamp":(\d+)', raw)] == times


@pytest.mark.parametrize("form", ["{generation}-{seq}", "{seq}"])
@pytest.mark.parametrize("where", ["header", "query", "both", "body"])
def test_a_reader_carries_on_right_after_its_cursor(
    client: httpx.Client, thread: str, read: Open, form: str, where: str
) -> None:
    made = fill(client, thread)
    for seq in range(7):
        cursor = form.format(generation=made, seq=seq)
        if where == "body":
            body = {"thread_id": thread, "message_id": "run", "after": cursor}
            assert body_of(read("/resume-stream", body=body)) == whole(*after(RUN, seq))
            continue
        query = {"header": "", "query": f"?after={cursor}", "both": "?after=6"}[where]  # the header wins
        headers = {} if where == "query" else {"Last-Event-ID": cursor}
        assert body_of(read(f"/threads/{thread}/stream{query}", headers)) == whole(*after(THREAD, seq))
        assert body_of(read(message_path(thread, "run", "stream") + query, headers)) == whole(*after(RUN, seq))


def test_a_body_may_have_a_bare_number_as_cursor(client: httpx.Client, thread: str, read: Open) -> None:
    fill(client, thread)
    body = {"thread_id": thread, "message_id": "run", "after": 3}
    assert body_of(read("/resume-stream", body=body)) == whole(*after(RUN, 3))


@pytest.mark.parametrize(("path", "seq"), [("stream", 7), ("messages/run/stream", 7), ("messages/aside/stream", 5)])
def test_204_is_the_answer_if_nothing_more_will_come(
    client: httpx.Client, thread: str, read: Open, path: str, seq: int
) -> None:
    made = fill(client, thread)
    for cursor in (f"{made}-{seq}", str(seq)):
        for stream in [
            read(f"/threads/{thread}/{path}", {"Last-Event-ID": cursor}),
            read(f"/threads/{thread}/{path}?after={cursor}"),
        ]:
            assert (stream.status, stream.rest()) == (204, b"")
    assert read(f"/threads/{thread}/{path}?after={seq - 1}").status == 200, "the end is yet to come"


@pytest.mark.parametrize("cursor", ["x", "-1", "1-", "-", "1-2-3", "1.5", "1 2", "٣", "9" * 19, "1-" + "9" * 19])
def test_a_bad_cursor_is_refused(client: httpx.Client, thread: str, cursor: str) -> None:
    append(client, thread, "run", "a")
    for path in (f"/threads/{thread}/stream", message_path(thread, "run", "stream")):
        assert problem(client.get(path, params={"after": cursor}))[0] == 400
        if cursor.isascii():
            assert problem(client.get(path, headers={"Last-Event-ID": cursor}))[0] == 400
    body = {"thread_id": thread, "message_id": "run", "after": cursor}
    assert problem(client.post("/resume-stream", json=body))[0] == 400


@pytest.mark.parametrize("query", ["idle_timeout=soon", "poll_interval=-1", "idle_timeout=-1s", "follow=perhaps"])
def test_a_bad_query_is_refused(client: httpx.Client, thread: str, query: str) -> None:
    append(client, thread, "run", "a")
    assert problem(client.get(f"/threads/{thread}/stream?{query}"))[0] == 400


def test_a_missing_thread_or_message_has_no_stream(client: httpx.Client, thread: str) -> None:
    for path in (f"/threads/{thread}/stream", message_path(thread, "run", "stream")):
        status, document = problem(client.get(path))
        assert (status, document["exists"]) == (404, False)
    append(client, thread, "other", "a")
    assert problem(client.get(message_path(thread, "run", "stream")))[0] == 404


@pytest.mark.parametrize("path", ["stream", "messages/run/stream", "body"])
def test_a_stale_cursor_is_answered_with_reset_and_everything(
    client: httpx.Client, thread: str, read: Open, path: str
) -> None:
    append(client, thread, "run", "of an earlier generation", "x", complete=True)
    older = generation(client, thread)
    client.delete(f"/threads/{thread}")
    append(client, thread, "run", "a", "b", complete=True)
    made = generation(client, thread)
    assert int(made) > int(older)
    for cursor in (f"{older}-1", f"{int(made) + 1}-1", f"{older}-0", f"{made}-4", "4", f"{older}-3"):
        if path == "body":
            stream = read("/resume-stream", body={"thread_id": thread, "message_id": "run", "after": cursor})
        else:
            stream = read(f"/threads/{thread}/{path}", {"Last-Event-ID": cursor})
        assert body_of(stream) == whole(RESET_FRAME, chunk(1, "a"), chunk(2, "b"), end(3)), cursor


NASTY = 'a\r\nb\rc\n\nd\0e\u2028f\u2029g\u0085h\x0b\x0c\x1c\x1d\x1ei\ufeff\U0001f469\u200d\U0001f680 "\\ data: x'


def test_no_text_breaks_a_frame(client: httpx.Client, thread: str, read: Open) -> None:
    texts = [NASTY, "", "\n", "\ufeff", "id: 9", ": hb\n\n"]
    assert append(client, thread, "run", *texts, complete=True).status_code == 201
    body = read(message_path(thread, "run", "stream")).rest()
    assert b"\r" not in body
    assert b"\0" not in body
    frames = body.removeprefix(b"retry: 1000\n").split(b"\n\n")
    assert [frame.count(b"\n") for frame in frames] == [1] * len(texts) + [2, 0]
    assert [data_of(frame)["content"] for frame in frames[: len(texts)]] == texts
    with httpx.stream("GET", f"{client.base_url}threads/{thread}/stream") as response:
        events = list(EventSource(response).iter_sse())
    assert [event.json().get("content") for event in events] == [*texts, None]


@pytest.mark.parametrize("event", ["tool", "message", "text delta", "ünï", "data: x", "x" * 200])
def test_an_event_has_the_name_its_producer_gave_it(client: httpx.Client, thread: str, read: Open, event: str) -> None:
    client.post(message_path(thread, "run"), json={"content": "a", "event": event}, params={"complete": True})
    assert body_of(read(f"/threads/{thread}/stream")) == whole(chunk(1, "a", event=event), end(2))


# Chunks that come while the reader is there


def test_bytes_flow_before_the_first_chunk(client: httpx.Client, thread: str, read: Open) -> None:
    client.put(f"/threads/{thread}/messages/run")
    stream = read(message_path(thread, "run", "stream"))
    assert (stream.status, stream.line()) == (200, b"retry: 1000\n")
    append(client, thread, "run", "a")
    assert data_of(stream.frame())["content"] == "a"
    append(client, thread, "run", "b", complete=True)
    assert data_of(stream.frame())["content"] == "b"
    assert body_of(stream) == end(3)


def test_a_reader_of_a_message_gets_only_its_chunks_and_ends_with_it(
    client: httpx.Client, thread: str, read: Open
) -> None:
    append(client, thread, "run", "a")
    append(client, thread, "other", "x")
    stream = read(message_path(thread, "run", "stream"))
    assert stream.line() == b"retry: 1000\n"
    assert data_of(stream.frame())["content"] == "a"
    append(client, thread, "other", "y", complete=True)
    append(client, thread, "run", "b", complete=True)
    append(client, thread, "third", "z")
    assert body_of(stream) == chunk(5, "b") + end(6)


def test_a_reader_of_a_thread_ends_when_its_last_active_message_ends(
    client: httpx.Client, thread: str, read: Open
) -> None:
    append(client, thread, "one", "a")
    stream = read(f"/threads/{thread}/stream")
    assert stream.line() == b"retry: 1000\n"
    assert data_of(stream.frame())["seq"] == 1
    for message, text, is_last in [("two", "b", False), ("one", "c", True), ("two", "d", False)]:
        append(client, thread, message, text, complete=is_last)
    assert [data_of(stream.frame())["seq"] for _ in range(4)] == [2, 3, 4, 5]
    client.post(message_path(thread, "two", "abort"))
    assert body_of(stream) == end(6, "two", "aborted")


def test_follow_waits_for_a_thread_and_stays_for_the_next_message(
    client: httpx.Client, thread: str, read: Open
) -> None:
    stream = read(f"/threads/{thread}/stream?follow=true&idle_timeout=0")
    assert (stream.status, stream.line()) == (200, b"retry: 1000\n")
    for message in ("one", "two"):
        append(client, thread, message, "a", complete=True)
    frames = [stream.frame() for _ in range(4)]
    assert [data_of(frame)["messageId"] for frame in frames] == ["one", "one", "two", "two"]
    later = read(f"/threads/{thread}/stream?follow=true", {"Last-Event-ID": f"{generation(client, thread)}-4"})
    assert (later.status, later.line()) == (200, b"retry: 1000\n"), "no 204 for a follower"
    append(client, thread, "three", "b")
    assert [data_of(one.frame())["seq"] for one in (stream, later)] == [5, 5]
    client.delete(f"/threads/{thread}")
    assert [one.rest() for one in (stream, later)] == [GONE_FRAME] * 2


def test_follow_with_the_cursor_of_a_thread_that_is_gone_begins_with_reset(
    client: httpx.Client, thread: str, read: Open
) -> None:
    append(client, thread, "run", "a", complete=True)
    cursor = f"{generation(client, thread)}-1"
    client.delete(f"/threads/{thread}")
    stream = read(f"/threads/{thread}/stream?follow=true", {"Last-Event-ID": cursor})
    assert stream.line() == b"retry: 1000\n"
    assert stream.frame() == RESET_FRAME
    append(client, thread, "run", "b")
    assert data_of(stream.frame())["seq"] == 1


@pytest.mark.parametrize("path", ["stream", "stream?follow=true", "messages/run/stream", "body"])
def test_a_reader_is_told_that_its_thread_was_cleared(client: httpx.Client, thread: str, read: Open, path: str) -> None:
    append(client, thread, "run", "a")
    if path == "body":
        stream = read("/resume-stream", body={"thread_id": thread, "message_id": "run", "known_content": ""})
    else:
        stream = read(f"/threads/{thread}/{path}")
    assert stream.line() == b"retry: 1000\n"
    assert data_of(stream.frame())["content"] == "a"
    client.delete(f"/threads/{thread}")
    append(client, thread, "run", "of the next generation")
    assert stream.rest() == GONE_FRAME


def test_a_quiet_stream_ends_with_timeout(client: httpx.Client, thread: str, read: Open) -> None:
    append(client, thread, "run", "a")
    after_a = {"thread_id": thread, "message_id": "run", "after": 1, "idle_timeout": "50ms"}
    for stream, frames in [
        (read(message_path(thread, "run", "stream") + "?idle_timeout=50ms"), [chunk(1, "a")]),
        (read(f"/threads/{thread}/stream?idle_timeout=0.05&after=1"), []),
        (read("/threads/not-made/stream?idle_timeout=50ms&follow=true"), []),
        (read("/resume-stream", body=after_a), []),
    ]:
        assert body_of(stream) == whole(*frames, TIMEOUT_FRAME)
    assert client.get(f"/threads/{thread}").json()["status"] == "active"


def test_a_heartbeat_is_a_comment_and_no_event(tmp_path_factory: pytest.TempPathFactory) -> None:
    flags = ("--heartbeat", "20ms", "--idle-timeout", "150ms")
    with serving(tmp_path_factory.mktemp("heartbeat"), *flags) as service, api_client(service) as client:
        client.put("/threads/t/messages/run")
        with Stream(service, "/threads/t/stream") as stream:
            assert [stream.line() for _ in range(3)] == [b"retry: 1000\n", b": hb\n", b": hb\n"]
            append(client, "t", "run", "a")
            rest = body_of(stream)
        assert re.fullmatch(rb"(: hb\n)*" + re.escape(chunk(1, "a")) + rb"(: hb\n)+" + TIMEOUT_FRAME, rest)
        with httpx.stream("GET", f"{service.api}/threads/t/stream") as response:
            events = [(event.event, event.data != "") for event in EventSource(response).iter_sse()]
        assert events == [("message", True), ("timeout", True)]


# Resuming by text


def test_resume_by_text_begins_right_after_it(client: httpx.Client, thread: str, read: Open) -> None:
    fill(client, thread)
    text = 'Hello{"tool":1} world'
    ending = RUN[7]
    for known, frames in {
        "": after(RUN, 0),
        "Hel": [chunk(1, "lo"), *after(RUN, 1)],
        "Hello": after(RUN, 1),
        'Hello{"tool"': [chunk(3, ":1}", event="tool"), *after(RUN, 3)],
        "1} wor": [chunk(6, "ld"), ending],
        text: [ending],
        text + "!": [RESET_FRAME, *after(RUN, 0)],
        "l": [RESET_FRAME, *after(RUN, 0)],
        "x": [RESET_FRAME, *after(RUN, 0)],
    }.items():
        body = {"thread_id": thread, "message_id": "run", "known_content": known}
        assert body_of(read("/resume-stream", body=body)) == whole(*frames), known


def test_resume_goes_on_with_later_chunks(client: httpx.Client, thread: str, read: Open) -> None:
    append(client, thread, "run", "Hello")
    body = {"thread_id": thread, "message_id": "run", "known_content": "He", "poll_interval": 0.05}
    stream = read("/resume-stream", body=body)
    assert stream.line() == b"retry: 1000\n"
    assert data_of(stream.frame())["content"] == "llo"
    append(client, thread, "run", " world", complete=True)
    assert body_of(stream) == chunk(2, " world") + end(3)


@pytest.mark.parametrize("rest", [{"known_content": "x"}, {"after": "1-1"}, {}])
def test_resuming_a_missing_message_ends_at_once(thread: str, read: Open, rest: dict[str, str]) -> None:
    stream = read("/resume-stream", body={"thread_id": thread, "message_id": "run", **rest})
    assert stream.rest() == b'retry: 1000\nevent: complete\ndata: {"exists":false}\n\n'


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"known_content": "a", "after": "1"}, 400),
        ({"known_content": "a", "poll_interval": "soon"}, 400),
        ({"known_content": "a", "poll_interval": -1}, 400),
        ({"known_content": 1}, 422),
        ({"known_contents": "a"}, 422),
        ({"message_id": None}, 422),
        (b'{"thread_id":"t"}', 422),
        (b'{"thread_id":"t","message_id":"m","known_content":"\\ud83d"}', 422),
        (b"", 422),
        (b"hello", 422),
    ],
)
def test_a_bad_resume_is_refused(client: httpx.Client, thread: str, body: Any, expected: int) -> None:
    append(client, thread, "run", "a")
    if isinstance(body, dict):
        body = json.dumps({"thread_id": thread, "message_id": "run", **body}).encode()
    assert problem(client.post("/resume-stream", content=body, headers=JSON))[0] == expected
