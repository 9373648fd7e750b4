"""The limits: each one is allowed exactly, one more is refused and changes nothing, and freed room can be used."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import TIMEOUT, Service, api_client, append, wait_until
from resume_stream.app import ChunkBuffer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from wire import JSON, NDJSON, TEXT, Stream, contents, message_path, problem, serving, shared_service, websocket_address

CHUNK, BODY, MESSAGE = 100, 1024, 500
WEIGHT = 16  # of a chunk, besides its text


STORES = ("sqlite", "redis")
service = shared_service("--max-chunk", f"{CHUNK}B", "--max-body", "1KiB", "--max-message", str(MESSAGE))


Answer = tuple[int, str]  # a status, and the detail of what is wrong
Send = Callable[[httpx.Client, str, list[str]], Answer]


def answer_of(response: httpx.Response) -> Answer:
    if response.status_code == 201:
        return 201, ""
    status, document = problem(response)
    return status, document["detail"]


def by_json(client: httpx.Client, thread: str, texts: list[str]) -> Answer:
    return answer_of(append(client, thread, "run", *texts))


def by_ndjson(client: httpx.Client, thread: str, texts: list[str]) -> Answer:
    lines = "".join(json.dumps({"content": text}, ensure_ascii=False) + "\n" for text in texts)
    return answer_of(client.post(message_path(thread, "run"), content=lines.encode(), headers=NDJSON))


def by_text(client: httpx.Client, thread: str, texts: list[str]) -> Answer:
    return answer_of(client.post(message_path(thread, "run"), content="".join(texts).encode(), headers=TEXT))


def ask(client: httpx.Client, *frames: Any) -> list[dict[str, Any]]:
    with connect(str(client.base_url).replace("http", "ws", 1) + "ws", open_timeout=TIMEOUT) as connection:
        for frame in frames:
            connection.send(frame if isinstance(frame, str) else json.dumps(frame))
        return [json.loads(connection.recv(TIMEOUT)) for _ in frames]


def append_frame(thread: str, texts: list[str]) -> dict[str, Any]:
    chunks = [{"content": text} for text in texts]
    return {"type": "append", "id": 1, "thread_id": thread, "message_id": "run", "chunks": chunks}


def by_websocket(client: httpx.Client, thread: str, texts: list[str]) -> Answer:
    (answer,) = ask(client, append_frame(thread, texts))
    return (201, "") if answer["type"] == "appended" else (answer["status"], answer["detail"])


WAYS = [by_json, by_ndjson, by_text, by_websocket]


# A chunk, a message


@pytest.mark.parametrize("letter", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("send", [by_json, by_ndjson, by_websocket])
def test_a_chunk_may_have_max_chunk_and_no_more(client: httpx.Client, thread: str, send: Send, letter: str) -> None:
    """The limit counts bytes of UTF-8, not characters."""
    size = len(letter.encode())
    most = letter * (CHUNK // size) + "x" * (CHUNK % size)
    assert send(client, thread, [most]) == (201, "")
    status, detail = send(client, thread, [f"{most}x"])
    assert status == 413
    assert "max_chunk" in detail
    assert f"({CHUNK})" in detail
    assert contents(client, thread) == [most]


@pytest.mark.parametrize("send", [by_json, by_websocket])
def test_an_append_with_one_bad_chunk_stores_none(client: httpx.Client, thread: str, send: Send) -> None:
    assert send(client, thread, ["a", "x" * (CHUNK + 1), "b"])[0] == 413
    assert client.get(f"/threads/{thread}").status_code == 404


def test_plain_text_is_cut_into_chunks_that_fit(client: httpx.Client, thread: str) -> None:
    text = "😀x" * 25  # 125 bytes
    assert by_text(client, thread, [text]) == (201, "")
    stored = contents(client, thread)
    assert "".join(stored) == text
    assert max(len(chunk.encode()) for chunk in stored) <= CHUNK


def weight_of(client: httpx.Client, thread: str) -> int:
    status = client.get(f"/threads/{thread}").json()
    return status["size"] + WEIGHT * status["chunkCount"]


@pytest.mark.parametrize("send", WAYS)
def test_a_message_may_have_max_message_and_no_more(client: httpx.Client, thread: str, send: Send) -> None:
    most = ["é" * 50, "x" * 100, "y" * 50]
    assert send(client, thread, most) == (201, "")
    while (left := MESSAGE - weight_of(client, thread)) > WEIGHT:
        assert append(client, thread, "run", "z" * min(left - WEIGHT, CHUNK)).status_code == 201
    before = client.get(f"/threads/{thread}").json()
    status, detail = send(client, thread, ["z"])
    assert status == 413
    assert "max_message" in detail
    assert client.get(f"/threads/{thread}").json() == before
    # The message can still end, and another one can grow.
    assert client.post(message_path(thread, "run", "complete")).status_code == 200
    assert append(client, thread, "another", "z").status_code == 201


@pytest.mark.parametrize("send", [by_json, by_websocket])
def test_an_append_that_would_pass_max_message_stores_none_of_its_chunks(
    client: httpx.Client, thread: str, send: Send
) -> None:
    assert send(client, thread, ["x" * 100] * 4 + ["z" * 21])[0] == 413
    assert client.get(f"/threads/{thread}").status_code == 404


def test_a_message_opened_with_too_long_a_first_upload_is_not_made(client: httpx.Client, thread: str) -> None:
    assert by_ndjson(client, thread, ["x" * (CHUNK + 1)])[0] == 413
    assert client.get(f"/threads/{thread}").status_code == 404


# A body


@pytest.mark.parametrize("chunked", [False, True])
def test_a_json_body_may_have_max_body_and_no_more(client: httpx.Client, thread: str, chunked: bool) -> None:
    def send(size: int) -> httpx.Response:
        body = b'{"content": "x"}'.ljust(size)
        content = iter([body[:700], body[700:]]) if chunked else body
        return client.post(message_path(thread, "run"), content=content, headers=JSON)

    assert send(BODY).status_code == 201
    refused = send(BODY + 1)
    assert problem(refused)[0] == 413
    assert str(BODY) in refused.json()["detail"]
    assert contents(client, thread) == ["x"]


@pytest.mark.parametrize("call", ["messages/run/abort", "tokens"])
def test_every_json_body_has_the_limit(client: httpx.Client, thread: str, call: str) -> None:
    append(client, thread, "run", "x")
    refused = client.post(f"/threads/{thread}/{call}", content=b"{}".ljust(BODY + 1), headers=JSON)
    assert problem(refused)[0] == 413
    assert client.get(f"/threads/{thread}").json()["status"] == "active"


def test_a_streamed_body_is_limited_only_by_its_chunks_and_its_message(client: httpx.Client, thread: str) -> None:
    body = b'{"content": "x"}\n\n'.rjust(64 * BODY, b"\n")
    assert client.post(message_path(thread, "run"), content=body, headers=NDJSON).status_code == 201


def test_an_endless_line_is_refused(client: httpx.Client, thread: str) -> None:
    """The service does not keep all of the line."""
    pieces = iter([b'{"content": "', *([b"x" * 4096] * 2000)])
    with contextlib.suppress(httpx.WriteError):  # it is refused before it ends
        refused = client.post(message_path(thread, "run"), content=pieces, headers=NDJSON)
        assert problem(refused)[0] == 413
    assert client.get(f"/threads/{thread}").status_code == 404


def test_the_longest_line_that_a_chunk_can_take_is_accepted(client: httpx.Client, thread: str) -> None:
    """JSON takes up to six bytes for a byte of text."""
    line = b'{"content": "%s", "event": "%s"}\n' % (b"\\u0041" * CHUNK, b"\\u0042" * 170)
    assert client.post(message_path(thread, "run"), content=line, headers=NDJSON).status_code == 201
    assert contents(client, thread) == ["A" * CHUNK]


def test_a_frame_may_have_max_body_and_no_more(client: httpx.Client, thread: str) -> None:
    text = json.dumps(append_frame(thread, ["x"]))
    assert ask(client, text.ljust(BODY))[0]["type"] == "appended"
    with pytest.raises(ConnectionClosed) as closed:
        ask(client, text.ljust(BODY + 1))
    assert closed.value.rcvd.code == 1009  # message too big
    assert contents(client, thread) == ["x"]


# The database


def fill(client: httpx.Client, text: str = "x" * 20_000) -> tuple[int, httpx.Response]:
    """Append until an append is refused. Return how many were acknowledged, and the refusal."""
    for number in range(1000):
        answer = append(client, f"fill-{number % 3}", "run", text)
        if answer.status_code != 201:
            return number, answer
    raise AssertionError("max_db did nothing")


@pytest.mark.sqlite
@pytest.mark.parametrize("by_cleanup", [False, True], ids=["DELETE", "cleanup"])
def test_a_full_database_takes_appends_again_once_there_is_room(
    start_service: Callable[..., Service], by_cleanup: bool
) -> None:
    limit = 400 * 1024
    expiry = ("--ttl", "2500ms", "--cleanup-interval", "100ms") if by_cleanup else ()
    service = start_service("--max-db", "400KiB", *expiry)
    with api_client(service) as client:
        acknowledged, refusal = fill(client)
        assert 10 < acknowledged < 20  # what fits
        status, document = problem(refusal)
        assert status == 507
        assert "max_db" in document["detail"]
        # Every acknowledged append is there, and nothing of the refused one.
        assert sum(len(contents(client, f"fill-{number}")) for number in range(3)) == acknowledged
        # By every call, and on every try.
        large = "y" * 50_000
        for send in WAYS:
            assert send(client, "more", [large])[0] == 507
        assert client.get("/threads/more").status_code == 404
        assert service.db.stat().st_size <= limit
        if by_cleanup:
            wait_until(lambda: not client.get("/threads").json()["threads"])
        else:
            for number in range(3):
                assert client.delete(f"/threads/fill-{number}").status_code == 204
        wait_until(lambda: append(client, "after", "run", large).status_code == 201)
        assert httpx.get(f"{service.url}/health/ready").status_code == 200
        if not by_cleanup:
            for number, send in enumerate(WAYS):
                assert send(client, f"after-{number}", ["y" * 30_000]) == (201, "")
    assert service.end() == 0
    assert service.db.stat().st_size <= limit


@pytest.mark.sqlite
def test_a_stream_goes_on_over_a_full_database(start_service: Callable[..., Service]) -> None:
    service = start_service("--max-db", "400KiB")
    with api_client(service) as client, Stream(service, "/threads/t/stream?follow=true") as stream:
        append(client, "t", "run", "one").raise_for_status()
        assert fill(client)[1].status_code == 507
        assert append(client, "t", "run", "z" * 20_000, index=1).status_code == 507
        client.delete("/threads/fill-0").raise_for_status()
        assert append(client, "t", "run", "two", index=1, complete=True).status_code == 201
        assert [b"one" in stream.frame(), b"two" in stream.frame()] == [True, True]
        assert b"event: complete" in stream.frame()


@pytest.mark.sqlite
def test_a_max_db_that_holds_no_database_is_refused(start_service: Callable[..., Service]) -> None:
    """It does not count as "no limit"."""
    with pytest.raises(RuntimeError, match=r"max_db|max-db"):
        start_service("--max-db", "1KiB")


# Readers


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("few"), "--max-readers", "2") as service:
        with api_client(service) as client:
            append(client, "t", "run", "x").raise_for_status()
        yield service


def readers(service: Service) -> int:
    text = httpx.get(f"{service.url}/metrics").text
    (count,) = [line.split()[1] for line in text.splitlines() if line.startswith("resume_stream_readers ")]
    return int(float(count))


@pytest.fixture
def none_reading(few: Service) -> Service:
    wait_until(lambda: readers(few) == 0, "the readers of the test before to be gone")
    return few


RESUME = {"thread_id": "t", "message_id": "run", "known_content": "x"}
READINGS: dict[str, tuple[str, Any]] = {
    "a thread": ("/threads/t/stream", None),
    "a message": ("/threads/t/messages/run/stream", None),
    "to be made": ("/threads/later/stream?follow=true", None),
    "resume": ("/resume-stream", RESUME),
    "a long poll": ("/threads/t/chunks?after=1&wait=20", None),
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_reader_over_max_readers_is_told_to_come_back(none_reading: Service, reading: str) -> None:
    path, body = READINGS[reading]
    with Stream(none_reading, "/threads/t/stream") as first, Stream(none_reading, "/threads/t/stream") as second:
        assert [first.status, second.status] == [200, 200]
        assert [len(stream.frame()) > 0 for stream in (first, second)] == [True, True]
        with Stream(none_reading, path, body=body) as refused:
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert "max_readers" in json.loads(refused.rest())["detail"]
        assert readers(none_reading) == 2
        second.close()
        wait_until(lambda: readers(none_reading) == 1)
        if "wait=" not in path:  # which answers only once there is something new
            with Stream(none_reading, path, body=body) as third:
                assert third.status == 200
                assert third.line() == b"retry: 1000\n"


def test_a_subscription_is_a_reader(none_reading: Service) -> None:
    with connect(websocket_address(none_reading)) as connection, Stream(none_reading, "/threads/t/stream") as stream:
        stream.frame()

        def ask(kind: str, number: int) -> dict[str, Any]:
            frame = {"type": kind, "id": number, **({"thread_id": "t"} if kind == "subscribe" else {})}
            connection.send(json.dumps(frame))
            return json.loads(connection.recv(TIMEOUT))

        assert ask("subscribe", 1)["type"] == "chunk"
        refused = ask("subscribe", 2)
        assert (refused["type"], refused["id"], refused["status"]) == ("error", 2, 503)
        assert json.loads(connection.recv(TIMEOUT)) == {"type": "unsubscribed", "id": 2}
        assert ask("unsubscribe", 1)["type"] == "unsubscribed"
        assert ask("subscribe", 2)["type"] == "chunk"
    wait_until(lambda: readers(none_reading) == 0)


def test_readers_that_come_at_the_same_time_do_not_pass_the_limit(none_reading: Service) -> None:
    request = b"GET /api/threads/t/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as exits:
        connections = [
            exits.enter_context(socket.create_connection(("127.0.0.1", none_reading.port), TIMEOUT)) for _ in range(40)
        ]
        for connection in connections:
            connection.sendall(request)
        statuses = [connection.recv(12)[9:] for connection in connections]
    assert statuses.count(b"200") == 2
    assert statuses.count(b"503") == 38


def test_a_service_full_of_readers_serves_all_other_calls(none_reading: Service) -> None:
    """Readers hurt no producer, and no one who asks for a page."""
    with api_client(none_reading) as client, contextlib.ExitStack() as exits:
        for _ in range(2):
            exits.enter_context(Stream(none_reading, "/threads/t/stream")).frame()
        assert append(client, "other", "run", "x").status_code == 201
        assert by_ndjson(client, "other", ["x"]) == (201, "")
        assert by_text(client, "other", ["x"]) == (201, "")
        for path in ("/threads", "/threads/t", "/threads/t/content", "/threads/t/chunks"):
            assert client.get(path).status_code == 200, path
        assert httpx.get(f"{none_reading.url}/health/ready").status_code == 200
        assert client.delete("/threads/other").status_code == 204


@pytest.mark.anyio
async def test_readers_do_not_keep_an_agent_from_its_stream(make_buffer: Callable[..., ChunkBuffer]) -> None:
    async def source() -> AsyncIterator[str]:
        for text in ("a", "b"):
            yield text

    async with make_buffer(max_readers=1) as buffer:
        await buffer.add_chunks("t", "run", ["x"])
        reader = buffer.resume_stream("t", "run")
        async with contextlib.aclosing(reader):
            assert (await anext(reader)).content == "x"
            async with contextlib.aclosing(buffer.agent_stream("agent", "run", source())) as stream:
                assert [piece async for piece in stream] == ["a", "b"]
        assert (await buffer.get_accumulated_content("agent")).content == "ab"
