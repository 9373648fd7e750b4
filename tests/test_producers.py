"""Producers: opening, appending, retrying, ending, and bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import api_client, append
from wire import JSON, NDJSON, TEXT, contents, message_path, problem, serving, shared_service

STORES = ("sqlite", "redis")

service = shared_service()


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a service with small limits."""
    limits = ("--max-chunk", "64B", "--max-body", "1KiB", "--max-message", "320B")
    with serving(tmp_path_factory.mktemp("limited"), *limits) as service, api_client(service) as client:
        yield client


def post(client: httpx.Client, thread: str, kind: dict[str, str], body: Any, **query: Any) -> httpx.Response:
    return client.post(message_path(thread, "run"), content=body, headers=kind, params=query)


def appended(thread: str, seq: int, chunk_count: int, status: str = "active", message: str = "run") -> dict[str, Any]:
    return {"threadId": thread, "messageId": message, "seq": seq, "chunkCount": chunk_count, "status": status}


def complete(client: httpx.Client, thread: str, message: str = "run") -> httpx.Response:
    return client.post(message_path(thread, message, "complete"))


def abort(client: httpx.Client, thread: str, reason: str | None = None) -> httpx.Response:
    return client.post(message_path(thread, "run", "abort"), json={"reason": reason})


# Opening


def test_a_message_is_opened_once(client: httpx.Client, thread: str) -> None:
    path = f"/threads/{thread}/messages/run"
    answers = [client.put(path), client.put(path)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert [answer.json() for answer in answers] == [appended(thread, 0, 0)] * 2
    complete(client, thread)
    again = client.put(path)
    assert (again.status_code, again.json()["status"]) == (200, "completed")


@pytest.mark.parametrize(
    "name", ["100%", "%41", "ü", "u\u0308", "a b", "x?y", "x#y", "a+b&c=d;e", "..", ".", "😀" * 200]
)
def test_any_name_without_slashes_and_control_characters_can_be_an_id(client: httpx.Client, name: str) -> None:
    encoded = quote(name, safe="").replace(".", "%2E")
    answer = client.post(message_path(encoded, encoded), json={"content": name}, params={"complete": True})
    assert (answer.status_code, answer.json()) == (201, appended(name, 2, 1, "completed", name))
    status = client.get(f"/threads/{encoded}").json()
    assert (status["threadId"], status["messages"][0]["messageId"]) == (name, name)
    assert client.get(f"/threads/{encoded}/content", params={"message_id": name}).json()["content"] == name
    stream = client.get(message_path(encoded, encoded, "stream")).text
    assert f'"messageId":{json.dumps(name, ensure_ascii=False)},"seq":1' in stream
    assert client.delete(f"/threads/{encoded}").status_code == 204


@pytest.mark.parametrize("name", ["x" * 201, "a\nb", "a\x00b", "\x1f", "\x7f", "\x85"])
def test_a_name_that_cannot_be_an_id_is_refused(client: httpx.Client, thread: str, name: str) -> None:
    encoded = quote(name, safe="")
    for bad_thread, bad_message in [(encoded, "run"), (thread, encoded)]:
        for answer in [
            client.put(f"/threads/{bad_thread}/messages/{bad_message}"),
            *(
                client.post(message_path(bad_thread, bad_message), content=body, headers=kind)
                for kind, body in [(JSON, b"[]"), (NDJSON, b""), (TEXT, b"")]
            ),
        ]:
            assert problem(answer)[0] == 400
    assert client.get(f"/threads/{thread}").status_code == 404


# Appending


def test_json_appends_one_chunk_or_several(client: httpx.Client, thread: str) -> None:
    answers = [
        post(client, thread, JSON, b'{"content": "a"}'),
        post(client, thread, JSON, b'[{"content": "b"}, {"content": "", "event": "tool"}]'),
        append(client, thread, "other", "x"),
        post(client, thread, {"Content-Type": "application/json; charset=utf-8"}, '{"content": "ü"}'.encode()),
    ]
    assert [(answer.status_code, answer.json()) for answer in answers] == [
        (201, appended(thread, 1, 1)),
        (201, appended(thread, 3, 3)),
        (201, appended(thread, 4, 1, message="other")),
        (201, appended(thread, 5, 4)),
    ]
    chunks = client.get(f"/threads/{thread}/chunks").json()["chunks"]
    assert [(chunk["seq"], chunk["messageId"], chunk.get("event"), chunk["content"]) for chunk in chunks] == [
        (1, "run", None, "a"),
        (2, "run", None, "b"),
        (3, "run", "tool", ""),
        (4, "other", None, "x"),
        (5, "run", None, "ü"),
    ]


LONG = "ü" * (450 * 1024)  # 900 KiB


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"content":"a"}\n{"content":"b"}\n', ["a", "b"]),
        (b'{"content":"a"}\n{"content":"b"}', ["a", "b"]),
        (b'\n{"content":"a"}\n\n\n{"content":"b"}\n\n', ["a", "b"]),
        (b'{"content":"a"}\r\n\r\n{"content":"b"}\r\n', ["a", "b"]),
        (b' {"content" : "a" } \n  \n\t{"content":"b"}\t\n \n', ["a", "b"]),
        (b'{"content":"a\\nb\\r\\u0000\\ud83d\\ude00"}\n', ["a\nb\r\0😀"]),
        ('{"content":"a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"]),
        (json.dumps({"content": LONG}, ensure_ascii=False).encode() + b'\n{"content":"b"}\n', [LONG, "b"]),
        (json.dumps({"content": LONG}).encode(), [LONG]),
    ],
    ids=["lines", "no end", "blank", "CRLF", "spaces", "escapes", "no line ends", "long", "long escaped"],
)
def test_ndjson_appends_a_chunk_a_line(client: httpx.Client, thread: str, body: bytes, expected: list[str]) -> None:
    answer = post(client, thread, NDJSON, body)
    assert (answer.status_code, answer.json()) == (201, appended(thread, len(expected), len(expected)))
    assert contents(client, thread) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_bytes_may_be_split_anywhere(client: httpx.Client, thread: str, size: int) -> None:
    text = "naïve café 👩‍🚀 \r\n 漢字 e\u0301 🇪🇺"
    lines = [text, "", "\0", text[::-1]]
    ndjson = b"".join(json.dumps({"content": line}, ensure_ascii=False).encode() + b"\n" for line in lines)
    for message, kind, body in [("lines", NDJSON, ndjson), ("text", TEXT, text.encode())]:
        pieces = (body[start : start + size] for start in range(0, len(body), size))
        assert client.post(message_path(thread, message), content=pieces, headers=kind).status_code == 201
    chunks = client.get(f"/threads/{thread}/chunks").json()["chunks"]
    assert [chunk["content"] for chunk in chunks if chunk["messageId"] == "lines"] == lines
    assert "".join(chunk["content"] for chunk in chunks if chunk["messageId"] == "text") == text


def test_plain_text_longer_than_a_chunk_may_be_is_cut_between_characters(limited: httpx.Client, thread: str) -> None:
    text = "a€😀" * 20
    assert post(limited, thread, {"Content-Type": "text/plain; charset=UTF-8"}, text.encode()).status_code == 201
    pieces = contents(limited, thread)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 64


@pytest.mark.parametrize(("kind", "body"), [(JSON, b"[]"), (NDJSON, b""), (NDJSON, b"\n"), (TEXT, b"")])
def test_an_append_of_nothing_is_a_sign_of_life(
    client: httpx.Client, thread: str, kind: dict[str, str], body: bytes
) -> None:
    append(client, thread, "run", "a")
    before = client.get(f"/threads/{thread}").json()
    answer = post(client, thread, kind, body)
    assert (answer.status_code, answer.json()) == (200, appended(thread, 1, 1))
    after = client.get(f"/threads/{thread}").json()
    assert after["messages"][0]["updatedAt"] > before["messages"][0]["updatedAt"]
    assert contents(client, thread) == ["a"]


# Retrying


def lines(*texts: str) -> bytes:
    return b"".join(b'{"content":"%s"}\n' % text.encode() for text in texts)


def array(*texts: str) -> bytes:
    return json.dumps([{"content": text} for text in texts]).encode()


@pytest.mark.parametrize(("kind", "body"), [(JSON, array), (NDJSON, lines)])
def test_an_indexed_append_is_stored_once(client: httpx.Client, thread: str, kind: dict[str, str], body: Any) -> None:
    append(client, thread, "other", "x")  # so that seq and index differ

    def send(*texts: str, **query: Any) -> tuple[int, int, int, str]:
        answer = post(client, thread, kind, body(*texts), **query)
        document = answer.json()
        return answer.status_code, document["seq"], document["chunkCount"], document["status"]

    assert send("a", "b", index=0) == (201, 3, 2, "active")
    append(client, thread, "other", "y")
    assert send("a", "b", index=0) == (200, 3, 2, "active"), "a retry is answered as the first was"
    assert send("b", "c", index=1) == (201, 5, 3, "active"), "only what is new is stored"
    assert send("a", index=0) == (200, 2, 1, "active")
    assert send("d", index=3, complete=True) == (201, 7, 4, "completed")
    append(client, thread, "other", "z")
    assert send("d", index=3, complete=True) == (200, 7, 4, "completed"), "the closing append again"
    assert send("c", "d", index=2, complete=True) == (200, 7, 4, "completed")
    assert send("a", "b", index=0)[:3] == (200, 3, 2)
    assert contents(client, thread) == ["x", "a", "b", "y", "c", "d", "z"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [(JSON, array("a")), (JSON, b'{"content":"a"}'), (JSON, b"[]"), (NDJSON, lines("a")), (TEXT, b"a"), (TEXT, b"")],
)
def test_a_closing_append_with_an_index_can_be_sent_again(
    client: httpx.Client, thread: str, kind: dict[str, str], body: bytes
) -> None:
    answers = [post(client, thread, kind, body, index=0, complete=True) for _ in range(3)]
    count = 0 if body in (b"", b"[]") else 1
    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert [answer.json() for answer in answers] == [appended(thread, count + 1, count, "completed")] * 3


@pytest.mark.parametrize(
    ("kind", "body", "query"),
    [
        (JSON, b'{"content":"B"}', {"index": 1}),
        (JSON, b'[{"content":"a"},{"content":"B"},{"content":"c"}]', {"index": 0}),
        (JSON, b'{"content":"b","event":"tool"}', {"index": 1}),
        (JSON, b'{"content":"B"}', {"index": 1, "complete": True}),
        (JSON, b'{"content":"a"}', {"index": 0, "complete": True}),  # "b" came after the chunk that it calls the last
        (NDJSON, b'{"content":"a"}\n{"content":"B"}\n', {"index": 0}),
        (TEXT, b"aB", {"index": 0}),
        (TEXT, b"a", {"index": 0, "complete": True}),
        (JSON, b'{"content":"d"}', {"index": 3}),
        (NDJSON, b'{"content":"d"}', {"index": 3}),
        (TEXT, b"d", {"index": 3}),
        (JSON, b"[]", {"index": 3}),
    ],
)
def test_a_second_producer_is_told_that_it_lost(
    client: httpx.Client, thread: str, kind: dict[str, str], body: bytes, query: dict[str, Any]
) -> None:
    append(client, thread, "run", "a", "b")
    before = client.get(f"/threads/{thread}").json()
    status, document = problem(post(client, thread, kind, body, **query))
    assert status == 409
    if query["index"] == 3:
        assert document["expectedIndex"] == 2
    assert client.get(f"/threads/{thread}").json() == before


def test_a_gap_makes_no_message(client: httpx.Client, thread: str) -> None:
    status, document = problem(post(client, thread, JSON, array("b"), index=1))
    assert (status, document["expectedIndex"]) == (409, 0)
    assert client.get(f"/threads/{thread}").status_code == 404


def test_plain_text_is_compared_as_text_however_it_is_cut(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "zero", "Hel", "lo 😀 w")
    post_text = [post(client, thread, TEXT, "Hello 😀 world".encode(), index=1) for _ in range(2)]
    assert [answer.status_code for answer in post_text] == [201, 200]
    assert [answer.json()["chunkCount"] for answer in post_text] == [4, 4]
    assert contents(client, thread) == ["zero", "Hel", "lo 😀 w", "orld"]


# Ending


def test_a_message_is_completed_in_the_transaction_of_its_last_chunk(client: httpx.Client, thread: str) -> None:
    answer = append(client, thread, "run", "a", "b", complete=True)
    assert (answer.status_code, answer.json()) == (201, appended(thread, 3, 2, "completed"))
    page = client.get(f"/threads/{thread}/chunks").json()
    assert page["ends"] == [{"messageId": "run", "status": "completed", "reason": None, "seq": 3}]


def test_ending_again_is_answered_the_same(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    first = complete(client, thread)
    assert (first.status_code, first.json()) == (200, appended(thread, 2, 1, "completed"))
    append(client, thread, "other", "x")
    again = complete(client, thread)
    assert (again.status_code, again.json()) == (200, first.json())
    status, document = problem(abort(client, thread, "too late"))
    assert (status, document["messageStatus"]) == (409, "completed")


def test_aborting_again_is_answered_the_same_and_keeps_the_first_reason(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    answers = [abort(client, thread, "stop button"), abort(client, thread, "another")]
    assert [(a.status_code, a.json()) for a in answers] == [(200, appended(thread, 2, 1, "aborted"))] * 2
    message = client.get(f"/threads/{thread}").json()["messages"][0]
    assert (message["status"], message["reason"], message["lastSeq"]) == ("aborted", "stop button", 2)
    assert problem(complete(client, thread))[0] == 409


def test_a_reason_is_short(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    assert problem(abort(client, thread, "r" * 1001))[0] == 413
    assert client.get(f"/threads/{thread}").json()["status"] == "active"
    assert abort(client, thread, "r" * 1000).status_code == 200


def test_ids_that_are_not_utf_8_are_refused(client: httpx.Client, thread: str) -> None:
    assert problem(client.put(f"/threads/{thread}%E9/messages/run"))[0] == 400
    assert client.get(f"/threads/{thread}\ufffd").status_code == 404
    assert client.put(f"/threads/{thread}\ufffd/messages/run").json()["threadId"] == f"{thread}\ufffd"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"reason":null}'])
def test_an_abort_needs_no_reason(client: httpx.Client, thread: str, body: bytes) -> None:
    append(client, thread, "run", "a")
    answer = client.post(message_path(thread, "run", "abort"), content=body, headers=JSON if body else {})
    assert (answer.status_code, answer.json()) == (200, appended(thread, 2, 1, "aborted"))
    assert client.get(f"/threads/{thread}").json()["messages"][0]["reason"] is None


@pytest.mark.parametrize(
    ("kind", "body", "query"),
    [
        (JSON, b'{"content":"b"}', {}),
        (JSON, b"[]", {}),
        (JSON, b'{"content":"b"}', {"index": 1}),
        (JSON, b'{"content":"b"}', {"index": 1, "complete": True}),
        (JSON, b'{"content":"a"}', {"complete": True}),
        (NDJSON, b'{"content":"b"}\n', {}),
        (NDJSON, b"", {}),
        (TEXT, b"b", {}),
        (TEXT, b"b", {"index": 1}),
    ],
)
@pytest.mark.parametrize("reason", [None, "stop button"])
def test_nothing_is_appended_after_the_end(
    client: httpx.Client, thread: str, kind: dict[str, str], body: bytes, query: dict[str, Any], reason: str | None
) -> None:
    append(client, thread, "run", "a")
    if reason:
        abort(client, thread, reason)
    else:
        complete(client, thread)
    before = client.get(f"/threads/{thread}").json()
    status, document = problem(post(client, thread, kind, body, **query))
    ended = {"messageStatus": "aborted" if reason else "completed", "reason": reason, "chunkCount": 1}
    assert (status, {key: document[key] for key in ended}) == (409, ended)
    assert client.get(f"/threads/{thread}").json() == before


def test_ending_a_missing_message_is_refused(client: httpx.Client, thread: str) -> None:
    assert [problem(answer)[0] for answer in (complete(client, thread), abort(client, thread))] == [404, 404]
    assert client.get(f"/threads/{thread}").status_code == 404
    append(client, thread, "other", "x")
    assert [problem(answer)[0] for answer in (complete(client, thread), abort(client, thread))] == [404, 404]
    assert [message["messageId"] for message in client.get(f"/threads/{thread}").json()["messages"]] == ["other"]


# Bad input changes nothing

REFUSED = {
    "not JSON": (JSON, b"hello", {}, 422),
    "cut short": (JSON, b'{"content":"b', {}, 422),
    "two values": (JSON, b'{"content":"b"}{"content":"c"}', {}, 422),
    "no body": (JSON, b"", {}, 422),
    "not a chunk": (JSON, b'"b"', {}, 422),
    "not a text": (JSON, b'{"content":1}', {}, 422),
    "no content": (JSON, b'{"event":"tool"}', {}, 422),
    "unknown field": (JSON, b'{"content":"b","evnt":"tool"}', {}, 422),
    "bad one last": (JSON, b'[{"content":"b"},{"content":"c"},{"content":null}]', {}, 422),
    "lone surrogate": (JSON, b'[{"content":"b"},{"content":"\\ud83d"}]', {}, 422),
    "lone low surrogate": (JSON, b'{"content":"\\ude00\\ud83d"}', {}, 422),
    "surrogate in event": (JSON, b'{"content":"b","event":"\\ud83d"}', {}, 422),
    "invalid UTF-8": (JSON, b'{"content":"\xff"}', {}, 422),
    "surrogate in UTF-8": (JSON, b'{"content":"\xed\xa0\xbd"}', {}, 422),
    "not NDJSON": (NDJSON, b"hello\n", {}, 422),
    "array in NDJSON": (NDJSON, b'[{"content":"b"}]\n', {}, 422),
    "surrogate in NDJSON": (NDJSON, b'{"content":"\\ud83d"}\n', {}, 422),
    "invalid UTF-8 in NDJSON": (NDJSON, b'{"content":"\xc3"}\n', {}, 422),
    "NDJSON cut short": (NDJSON, b'{"content":"b', {"complete": True}, 422),
    "unknown field in NDJSON": (NDJSON, b'{"content":"b","seq":1}\n', {"complete": True}, 422),
    "invalid text": (TEXT, b"\xff", {"complete": True}, 422),
    "text cut inside a character": (TEXT, b"\xf0\x9f\x98", {"complete": True}, 422),
    "XML": ({"Content-Type": "application/xml"}, b"<a/>", {}, 415),
    "no content type": ({}, b'{"content":"b"}', {}, 415),
    "form": ({"Content-Type": "application/x-www-form-urlencoded"}, b"content=b", {}, 415),
    "Latin-1": ({"Content-Type": "text/plain; charset=iso-8859-1"}, b"b", {}, 415),
    "gzipped JSON": ({**JSON, "Content-Encoding": "gzip"}, b'{"content":"b"}', {}, 415),
    "arrays in arrays": (JSON, b'{"x":' + b"[" * 100_000, {}, 422),
    "arrays in arrays on a line": (NDJSON, b'{"x":' + b"[" * 5000 + b"\n", {}, 422),
    "gzipped NDJSON": ({**NDJSON, "Content-Encoding": "gzip"}, b'{"content":"b"}', {}, 415),
    "negative index": (JSON, b'{"content":"b"}', {"index": -1}, 400),
    "index not a number": (JSON, b'{"content":"b"}', {"index": "one"}, 400),
    "complete not a truth": (JSON, b'{"content":"b"}', {"complete": "perhaps"}, 400),
    **{
        f"event {event!r:.10}": (kind, json.dumps({"content": "b", "event": event}).encode(), {}, 422)
        for event in ["complete", "timeout", "reset", "gone", "error", "", "a\nb", "a\rb", "a\0b", "x" * 201]
        for kind in (JSON, NDJSON)
    },
}


@pytest.mark.parametrize(("kind", "body", "query", "expected"), REFUSED.values(), ids=REFUSED)
def test_bad_input_changes_nothing(
    client: httpx.Client, thread: str, kind: dict[str, str], body: bytes, query: dict[str, Any], expected: int
) -> None:
    assert problem(post(client, thread, kind, body, **query))[0] == expected
    assert client.get(f"/threads/{thread}").status_code == 404, "not even a thread is made"
    append(client, thread, "run", "a")
    before = client.get(f"/threads/{thread}").json()
    assert problem(post(client, thread, kind, body, **query))[0] == expected
    assert client.get(f"/threads/{thread}").json() == before


@pytest.mark.parametrize("body", [b"stop", b'{"why":"x"}', b'{"reason":1}', b'{"reason":"\\ud83d"}', b"[]"])
def test_a_bad_abort_changes_nothing(client: httpx.Client, thread: str, body: bytes) -> None:
    append(client, thread, "run", "a")
    before = client.get(f"/threads/{thread}").json()
    assert problem(client.post(message_path(thread, "run", "abort"), content=body, headers=JSON))[0] == 422
    assert client.get(f"/threads/{thread}").json() == before


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, array("b", "x" * 65)),
        (JSON, array("é" * 33)),  # 66 bytes
        (NDJSON, lines("x" * 65)),
        (JSON, array(*["x" * 60] * 5)),  # 300 bytes of text
        (JSON, b'{"content":"b"' + b" " * 1024 + b"}"),
        (TEXT, b"x" * 257),
    ],
    ids=["chunk", "bytes, not characters", "line", "message", "body", "text"],
)
def test_an_append_over_a_limit_changes_nothing(
    limited: httpx.Client, thread: str, kind: dict[str, str], body: bytes
) -> None:
    append(limited, thread, "run", "a")
    before = limited.get(f"/threads/{thread}").json()
    assert problem(post(limited, thread, kind, body, complete=True))[0] == 413
    assert limited.get(f"/threads/{thread}").json() == before


def test_an_append_just_within_the_limits_is_stored(limited: httpx.Client, thread: str) -> None:
    assert append(limited, thread, "run", *["é" * 32] * 4).status_code == 201  # 64 bytes each, and 16
    assert problem(append(limited, thread, "run", "x"))[0] == 413
    assert append(limited, thread, "other", "x" * 64).status_code == 201
    body = b'{"content":"b"}'.ljust(1024)
    assert post(limited, f"{thread}-body", JSON, body).status_code == 201


def test_a_full_database_loses_nothing_and_takes_appends_again_once_there_is_room(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    text = "x" * 32_000
    with serving(tmp_path_factory.mktemp("full"), "--max-db", "256KiB") as service, api_client(service) as client:
        append(client, "keep", "run", "kept")
        stored = 0
        while (answer := append(client, "big", "run", text)).status_code == 201:
            stored += 1
            assert stored < 8
        before = client.get("/threads/big").json()
        assert problem(answer)[0] == 507
        assert problem(append(client, "big", "run", text, complete=True))[0] == 507
        assert stored >= 4
        assert client.get("/threads/big").json() == before
        assert contents(client, "big") == [text] * stored
        assert client.delete("/threads/big").status_code == 204
        assert append(client, "keep", "run", text).status_code == 201
        assert contents(client, "keep") == ["kept", text]
