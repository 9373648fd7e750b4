"""Streamed uploads: readable at once, answered early, and cut anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from conftest import Service, append, wait_until
from wire import NDJSON, TEXT, Stream, Upload, contents, message_path, shared_service

service = shared_service("--max-chunk", "1KiB", "--max-message", "12KiB")


@pytest.fixture
def upload(service: Service, thread: str) -> Iterator[Callable[..., Upload]]:
    """Begin an upload to the message "run" of the test's thread."""
    begun = []

    def begin(kind: dict[str, str], query: str = "") -> Upload:
        begun.append(Upload(service, message_path(thread, "run") + query, kind))
        return begun[-1]

    yield begin
    for one in begun:
        one.close()


def wait_for_contents(client: httpx.Client, thread: str, *expected: str) -> None:
    wait_until(lambda: contents(client, thread) == [*expected], lambda: f"{expected} (not {contents(client, thread)})")


def test_a_line_is_readable_long_before_the_upload_ends(
    service: Service, client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(NDJSON, "?complete=true")
    running.send('{"content":"é'.encode()[:-1])  # cut inside a character
    running.send("é".encode()[1:] + b'"}\n{"con')
    wait_for_contents(client, thread, "é")
    with Stream(service, f"/threads/{thread}/stream") as stream:
        assert stream.line() == b"retry: 1000\n"
        assert b'{"content":"\xc3\xa9",' in stream.frame()
        running.send(b'tent":"b"}\n\n{"content":"c"}\n')
        assert b'{"content":"b",' in stream.frame()
        assert b'{"content":"c",' in stream.frame()
        assert client.get(f"/threads/{thread}").json()["status"] == "active"
        assert running.finish() == (
            201,
            {"threadId": thread, "messageId": "run", "seq": 4, "chunkCount": 3, "status": "completed"},
        )
        assert b"event: complete\n" in stream.frame()
        assert stream.rest() == b""


def test_a_last_line_needs_no_line_end_even_if_the_end_of_the_body_comes_later(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(NDJSON, "?complete=true")
    running.send(b'{"content":"a"}\n{"content":"b"}')
    wait_for_contents(client, thread, "a")  # so the other line has arrived too
    assert running.finish()[0] == 201
    assert contents(client, thread) == ["a", "b"]


def test_half_a_last_line_is_refused_even_if_the_end_of_the_body_comes_later(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(NDJSON, "?complete=true")
    running.send(b'{"content":"a"}\n{"content":"b')
    wait_for_contents(client, thread, "a")
    assert running.finish()[0] == 422
    assert client.get(f"/threads/{thread}").json()["status"] == "active"


def test_text_is_readable_long_before_the_upload_ends(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(TEXT)
    expected = ""
    for piece in ["naïve ", "caf", "é 👩", "\u200d🚀", "\r\n"]:
        head, tail = (expected + piece).encode()[len(expected.encode()) :], b""
        if len(head) > len(piece):  # it ends with, or has, a character of several bytes: cut the last one
            head, tail = head[:-1], head[-1:]
        running.send(head)
        if tail:
            running.send(tail)
        expected += piece
        wait_until(lambda so_far=expected: "".join(contents(client, thread)) == so_far, expected)
    assert running.finish()[0] == 201
    assert client.get(f"/threads/{thread}").json()["status"] == "active"


def test_a_character_waits_for_its_last_byte(client: httpx.Client, thread: str, upload: Callable[..., Upload]) -> None:
    running = upload(TEXT)
    running.send(b"a\xf0\x9f")
    wait_for_contents(client, thread, "a")
    running.send(b"\x98\x80b")
    wait_for_contents(client, thread, "a", "😀b")
    running.send(b"\xe2\x82")
    status, document = running.finish()
    assert (status, document["status"]) == (422, 422)
    assert contents(client, thread) == ["a", "😀b"]


@pytest.mark.parametrize(("kind", "first"), [(NDJSON, b'{"content":"a"}\n{"cont'), (TEXT, b"a")])
@pytest.mark.parametrize(
    ("call", "body", "expected"),
    [
        ("abort", {"reason": "stop button"}, {"messageStatus": "aborted", "reason": "stop button", "chunkCount": 1}),
        ("complete", None, {"messageStatus": "completed", "reason": None, "chunkCount": 1}),
    ],
)
def test_an_upload_is_answered_as_soon_as_somebody_else_ends_its_message(
    client: httpx.Client,
    thread: str,
    upload: Callable[..., Upload],
    kind: dict[str, str],
    first: bytes,
    call: str,
    body: dict[str, str] | None,
    expected: dict[str, object],
) -> None:
    running = upload(kind)
    running.send(first)
    wait_for_contents(client, thread, "a")
    assert client.post(message_path(thread, "run", call), json=body).status_code == 200
    status, document = running.answer()  # and the upload is still open
    assert (status, {key: document[key] for key in expected}) == (409, expected)
    assert running.response.getheader("Content-Type") == "application/problem+json"
    assert contents(client, thread) == ["a"]


def test_an_upload_without_a_first_byte_is_answered_too(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(NDJSON)
    running.send(b"\n")
    append(client, thread, "run", "by another")
    # The abort may come before the upload has begun on the service's side; it is answered either way.
    client.post(message_path(thread, "run", "abort"), json={"reason": "stop"})
    running.send(b'{"content":"a"}\n')
    assert running.answer()[0] == 409
    assert contents(client, thread) == ["by another"]


@pytest.mark.parametrize(("kind", "first"), [(NDJSON, b'{"content":"a"}\n{"cont'), (TEXT, b"a")])
def test_an_upload_is_answered_as_soon_as_its_thread_is_cleared(
    client: httpx.Client, thread: str, upload: Callable[..., Upload], kind: dict[str, str], first: bytes
) -> None:
    running = upload(kind)
    running.send(first)
    wait_for_contents(client, thread, "a")
    assert client.delete(f"/threads/{thread}").status_code == 204
    status, document = running.answer()
    assert (status, document["status"]) == (409, 409)
    assert client.get(f"/threads/{thread}").status_code == 404, "the upload does not make the thread again"


def test_another_message_of_the_thread_may_end_without_harm(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(NDJSON)
    running.send(b'{"content":"a"}\n')
    wait_for_contents(client, thread, "a")
    append(client, thread, "other", "x", complete=True)
    running.send(b'{"content":"b"}\n')
    status, document = running.finish()
    assert (status, document["seq"], document["status"]) == (201, 4, "active")


@pytest.mark.parametrize(
    ("kind", "sent", "stored"),
    [
        (NDJSON, b'{"content":"a"}\n{"content":"b', ["a"]),
        (NDJSON, b'{"content":"a"}\n{"content":"b"}', ["a"]),  # whole, but the service cannot know
        (TEXT, "aé".encode()[:-1], ["a"]),
    ],
)
def test_a_producer_that_hangs_up_leaves_whole_lines_and_characters_and_goes_on_with_an_index(
    client: httpx.Client,
    thread: str,
    upload: Callable[..., Upload],
    kind: dict[str, str],
    sent: bytes,
    stored: list[str],
) -> None:
    running = upload(kind, "?complete=true")
    running.send(sent)
    wait_for_contents(client, thread, *stored)
    running.hang_up()
    again = upload(NDJSON, "?index=0&complete=true")
    again.send(b'{"content":"a"}\n')
    again.send(b'{"content":"b"}\n')
    status, document = again.finish()
    assert (status, document["chunkCount"], document["status"]) == (201, 2, "completed")
    assert contents(client, thread) == ["a", "b"]


def test_a_streamed_retry_is_stored_once(client: httpx.Client, thread: str, upload: Callable[..., Upload]) -> None:
    answers = []
    for _ in range(2):
        running = upload(NDJSON, "?index=0&complete=true")
        for text in "abc":
            running.send(b'{"content":"%s"}\n' % text.encode())
        answers.append(running.finish())
    assert [status for status, _ in answers] == [201, 200]
    assert answers[0][1] == answers[1][1]
    assert contents(client, thread) == ["a", "b", "c"]


BAD_LINES = {
    "not JSON": (b"hello", 422),
    "not a chunk": (b"[]", 422),
    "unknown field": (b'{"content":"x","seq":1}', 422),
    "lone surrogate": (b'{"content":"\\ud83d"}', 422),
    "invalid UTF-8": (b'{"content":"\xff"}', 422),
    "reserved event": (b'{"content":"x","event":"complete"}', 422),
    "too long": (b'{"content":"%s"}' % (b"x" * 1025), 413),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("in_one_piece", [True, False], ids=["in one piece", "in pieces"])
def test_a_bad_line_is_named_and_what_came_before_it_stays(
    client: httpx.Client, thread: str, upload: Callable[..., Upload], line: bytes, expected: int, in_one_piece: bool
) -> None:
    running = upload(NDJSON, "?complete=true")
    before, after = b'{"content":"a"}\n{"content":"b"}\n', line + b'\n{"content":"c"}\n'
    if in_one_piece:
        running.send(before + after)
    else:
        running.send(before)
        wait_for_contents(client, thread, "a", "b")
        running.send(after)
    status, document = running.answer()  # without waiting for the end
    assert status == expected
    assert contents(client, thread) == ["a", "b"]
    assert client.get(f"/threads/{thread}").json()["status"] == "active"
    assert document["detail"].startswith("Line 3 "), document["detail"]


def test_a_bad_line_is_counted_as_an_editor_counts_it(upload: Callable[..., Upload]) -> None:
    running = upload(NDJSON)
    running.send(b'{"content":"a"}\n\n\r\n{"content":"b"}\nhello\n')
    assert running.answer()[1]["detail"].startswith("Line 5 ")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(NDJSON)
    running.send(b'{"content":"a"}\n{"content":"')
    wait_for_contents(client, thread, "a")
    running.send(b"x" * 10_000)
    status, document = running.answer()
    assert (status, document["detail"][:7]) == (413, "Line 2 ")
    assert contents(client, thread) == ["a"]


def test_an_upload_is_answered_when_the_message_is_full(
    client: httpx.Client, thread: str, upload: Callable[..., Upload]
) -> None:
    running = upload(TEXT)
    running.send(b"x" * 8192)
    wait_until(lambda: len("".join(contents(client, thread))) == 8192)
    running.send(b"y" * 8192)
    assert running.answer()[0] == 413
    assert "".join(contents(client, thread)) == "x" * 8192


@pytest.mark.parametrize("query", ["?index=-1", "?index=x", "?complete=x"])
def test_a_bad_query_is_answered_before_the_body(upload: Callable[..., Upload], query: str) -> None:
    assert upload(NDJSON, query).answer()[0] == 400
