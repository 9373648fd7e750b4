"""The relay: what goes to the upstream, what comes back, and what remains after every kind of cut."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import pytest
from conftest import Service, append, wait_until
from relayed import RETRY, Relay, bare_events, framed, generation_of, relay
from upstream import (
    AI_SDK,
    CHAT,
    ERRORS,
    EVENTS,
    OTHER,
    PAUSE,
    RECORDINGS,
    RESPONSES,
    Recording,
    Upstream,
    fresh,
    plain,
    relay_url,
    relaying,
    shared_upstream,
)
from wire import problem

__all__ = ["fresh", "relay"]  # fixtures

upstream, service = shared_upstream(), relaying(base="/base")
ALL = pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)
WITH_ERRORS = pytest.mark.parametrize("dialect", ERRORS)


def raw(service: Service, request: bytes) -> bytes:
    """Send a request that no client would send, and return the answer."""
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(request)
        connection.settimeout(20)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


# What goes on, and what comes back


def test_the_upstream_gets_the_request_byte_for_byte_without_hop_headers_and_our_own(
    service: Service, upstream: Upstream
) -> None:
    upstream.answer(plain(200, {}))
    target = b"/v1/%7Eodd//path;a=b%20c?q=1&&r=%2F+%e9&s"
    body = b'\x00\xff {"stream":\r\n true}'
    raw(
        service,
        b"PATCH /relay/up%s HTTP/1.1\r\nHost: localhost\r\nX-Own: kept,  as it is\r\nAccept-Encoding: gzip\r\n"
        b"Connection: close, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\nKeep-Alive: 5\r\nResume-Thread: t\r\n"
        b"Authorization: Bearer key\r\nIdempotency-Key: k-1\r\nX-Twice: a\r\nX-Twice: b\r\nContent-Length: %d\r\n\r\n%s"
        % (target, len(body), body),
    )
    (asked,) = upstream.asked
    assert [line.lower() if index else line for index, line in enumerate(asked.lines)] == [
        b"PATCH /base%s HTTP/1.1" % target,
        b"host: %s" % upstream.url.partition("//")[2].encode(),
        b"x-own: kept,  as it is",
        b"authorization: bearer key",
        b"idempotency-key: k-1",
        b"x-twice: a",
        b"x-twice: b",
        b"accept-encoding: identity",
        b"content-length: %d" % len(body),
    ]
    assert asked.body == body


def test_an_answer_that_is_not_a_stream_passes_unchanged_and_is_not_stored(
    relay: Relay, upstream: Upstream, client: httpx.Client
) -> None:
    before = client.get("/threads").json()
    for status, headers in ((200, {}), (401, {"WWW_Authenticate": "Bearer"}), (429, {"Retry_After": "7"}), (500, {})):
        upstream.answer(plain(status, {"said": "ü"}, X_Request_Id="r-1", **headers))
        answer = relay.ask(CHAT)
        assert (answer.status_code, answer.json()) == (status, {"said": "ü"})
        assert answer.headers["x-request-id"] == "r-1"
        for name, text in headers.items():
            assert answer.headers[name.replace("_", "-")] == text
        assert "resume-thread" not in answer.headers
    assert client.get("/threads").json() == before


def test_a_stream_with_an_error_status_passes_unchanged(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(Recording((b"data: no\n\n",), status=503, headers=dict(EVENTS)))
    answer = relay.ask(CHAT)
    assert (answer.status_code, answer.content) == (503, b"data: no\n\n")
    assert "resume-message" not in answer.headers


def test_a_redirect_is_passed_on_and_not_followed(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(plain(307, {}, Location=f"{upstream.url}/elsewhere"))
    answer = relay.ask(CHAT)
    assert (answer.status_code, answer.headers["location"]) == (307, f"{upstream.url}/elsewhere")
    assert len(upstream.asked) == 1


def test_the_answer_to_head_has_no_body_and_no_message(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    answer = relay.http.head(f"{relay_url(relay.service)}/v1/x")
    assert (answer.status_code, answer.content) == (200, b"")
    assert "resume-message" not in answer.headers


def test_an_answer_that_the_upstream_breaks_off_is_broken_off(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(Recording((b"[1,", b"2"), headers={"Content-Type": "application/json"}, is_broken=True))
    with relay.reading(CHAT) as reading:
        assert reading.broken_rest() == b"[1,2"


@ALL
def test_every_event_comes_unchanged_with_our_id(relay: Relay, upstream: Upstream, recording: Recording) -> None:
    upstream.answer(recording)
    answer = relay.ask(recording)
    events = bare_events(recording)
    of = generation_of(answer.headers, relay.service)
    first = json.loads(relay.http.get(f"{relay.service.api}/threads/{answer.headers['resume-thread']}").text)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    (message,) = [m for m in first["messages"] if m["messageId"] == answer.headers["resume-message"]]
    assert answer.content == RETRY + framed(events, of, message["firstSeq"] + 1)
    assert (message["status"], message["chunkCount"]) == ("completed", len(events) + 1)


def test_other_headers_of_the_upstream_come_with_its_first_answer(relay: Relay, upstream: Upstream) -> None:
    said = {
        **EVENTS,
        "X-Request-Id": "r-1",
        "Access-Control-Allow-Origin": "*",
        "Alt-Svc": "h3",
        "Cache-Control": "public",
        "Resume-Thread": "its own",
        "Resume-Message": "its own",
    }
    upstream.answer(Recording(OTHER.pieces, headers=said))
    answer = relay.ask(OTHER)
    assert answer.headers["x-request-id"] == "r-1"
    assert answer.headers["cache-control"] == "no-cache"
    assert not {"access-control-allow-origin", "alt-svc"} & answer.headers.keys()
    assert "its own" not in answer.headers["resume-thread"] + answer.headers["resume-message"]


def test_an_upstream_without_a_path_is_asked_for_its_root(upstream: Upstream, tmp_path: Path) -> None:
    upstream.answer(OTHER)
    with Service(tmp_path / "chunks.db", "--upstream", f"up={upstream.url}") as service, Relay(service) as relay:
        assert relay.ask(OTHER.at("")).status_code == 200
        assert relay.ask(OTHER.at("?a=1")).status_code == 200
    assert [asked.target for asked in upstream.asked] == ["/", "/?a=1"]


def test_an_event_is_committed_before_it_is_passed_on(relay: Relay, upstream: Upstream, client: httpx.Client) -> None:
    upstream.answer(CHAT.held_everywhere())
    with ThreadPoolExecutor() as pool:
        upstream.go_on()
        with relay.reading(CHAT) as reading:
            for count in range(1, len(CHAT.pieces) + 1):
                reading.events(1)
                page = pool.submit(client.get, f"/threads/{reading.ids[0]}/chunks").result().json()
                assert [chunk["content"] for chunk in page["chunks"]][1:] == CHAT.data[:count]
                upstream.go_on()


def test_the_first_chunk_of_a_relayed_message_says_where_it_comes_from_and_has_no_text(
    relay: Relay, upstream: Upstream, client: httpx.Client
) -> None:
    upstream.answer(CHAT)
    thread, message = relay.ask(CHAT).headers["resume-thread"], ""
    chunks = client.get(f"/threads/{thread}/chunks").json()["chunks"]
    assert (chunks[0]["content"], chunks[0]["event"]) == ("", "relayed:up:openai-chat")
    assert client.get(f"/threads/{thread}/content").json()["content"] == message.join(CHAT.data)


def test_a_producer_cannot_mark_its_message_as_relayed(client: httpx.Client, thread: str) -> None:
    answer = client.post(
        f"/threads/{thread}/messages/m/chunks", json={"content": "", "event": "relayed:up:openai-chat"}
    )
    assert problem(answer)[0] == 422


def test_events_with_our_names_are_not_taken_for_ours(relay: Relay, upstream: Upstream, client: httpx.Client) -> None:
    upstream.answer(Recording((b"event: complete\ndata: {}\n\n", b"event: error\ndata: x\n\n")))
    answer = relay.ask(OTHER)
    assert [line for line in answer.text.split("\n") if line.startswith("event")] == ["event: complete", "event: error"]
    ours = client.get(f"/threads/{answer.headers['resume-thread']}/stream").text
    assert [line for line in ours.split("\n") if line.startswith("event")] == [
        "event: relayed:up:sse",
        "event: complete",
    ]


# Ids


def test_the_caller_may_name_the_ids(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    answer = relay.ask(CHAT, Resume_Thread="thread%20%C3%BC", Resume_Message="m-named")
    assert (answer.headers["resume-thread"], answer.headers["resume-message"]) == ("thread%20%C3%BC", "m-named")
    assert relay.ended("thread%20%C3%BC", "m-named") == ("completed", None)
    assert "resume-thread" not in upstream.asked[0].headers


@pytest.mark.parametrize(
    ("dialect", "thread", "message"),
    [
        ("openai-responses", "resp_1", "resp_1"),
        ("langgraph", "t-1", "run-1"),
        ("ai-sdk", "chat-1", "up-"),
        ("openai-chat", "up-", "up-"),
    ],
)
def test_other_ids_are_those_of_the_dialect_or_random(
    relay: Relay, upstream: Upstream, dialect: str, thread: str, message: str
) -> None:
    upstream.answer(RECORDINGS[dialect])
    answer = relay.ask(RECORDINGS[dialect])
    assert answer.headers["resume-thread"].startswith(thread)
    assert answer.headers["resume-message"].startswith(message)


def test_a_bad_id_is_refused_before_the_upstream_is_asked(relay: Relay, upstream: Upstream) -> None:
    assert problem(relay.ask(CHAT, Resume_Thread="a%2Fb"))[0] == 400
    assert problem(relay.ask(CHAT, Resume_Message="x" * 201))[0] == 400
    assert not upstream.asked


# Going on


@ALL
def test_the_id_of_any_event_gets_the_rest_without_asking_the_upstream_again(
    relay: Relay, upstream: Upstream, recording: Recording
) -> None:
    upstream.answer(recording)
    answer = relay.ask(recording, Resume_Thread=f"cut-{recording.path.replace('/', '-')}")
    blocks = answer.content.removeprefix(RETRY).split(b"\n\n")[:-1]
    ids = [block.partition(b"\n")[0].removeprefix(b"id: ").decode() for block in blocks]
    for index, last in enumerate(ids[:-1]):
        again = relay.ask(recording, Last_Event_ID=last)
        assert again.content == RETRY + b"".join(block + b"\n\n" for block in blocks[index + 1 :])
        assert again.headers["resume-message"] == answer.headers["resume-message"]
    for method in ("GET", "POST", "DELETE"):
        url = f"{relay_url(relay.service)}/any/path"
        assert relay.http.request(method, url, headers={"Last-Event-ID": ids[-1]}).status_code == 204
    assert len(upstream.asked) == 1


@ALL
def test_a_reader_who_drops_off_in_the_middle_gets_the_rest_while_the_answer_goes_on(
    relay: Relay, upstream: Upstream, recording: Recording
) -> None:
    events = bare_events(recording)
    upstream.answer(recording.held(2))
    with relay.reading(recording, Resume_Thread=f"drop-{recording.path.replace('/', '-')}") as reading:
        had = reading.events(2)
    last = had[-1].split(b"id: ")[1].partition(b"\n")[0].decode()
    with relay.reading(recording, Last_Event_ID=last) as reading:
        upstream.go_on()
        rest = reading.rest()
    of, _, seq = last.partition("-")
    assert rest == RETRY + framed(events[2:], of, int(seq) + 1)
    assert (len(upstream.asked), upstream.left) == (1, 0)


def test_the_answer_is_recorded_though_its_reader_left_before_the_first_byte(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT.held(0))
    with socket.create_connection(("127.0.0.1", relay.service.port)) as connection:
        head = "POST /relay/up/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nResume-Message: nobody\r\n"
        connection.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        wait_until(lambda: upstream.paused)
    upstream.go_on()
    assert relay.ended("nobody", "nobody") == ("completed", None)


def test_a_foreign_cursor_is_unknown(relay: Relay, upstream: Upstream, client: httpx.Client, thread: str) -> None:
    append(client, thread, "m", "ours, and not relayed", complete=True)
    of = client.get(f"/threads/{thread}").json()["cursor"].partition("-")[0]
    upstream.answer(CHAT)
    relayed = generation_of(relay.ask(CHAT).headers, relay.service)
    for cursor in ("17-1", f"{of}-1", f"{relayed}-99", f"{relayed}-0", "7", "abc", "-1x"):
        answer = relay.ask(CHAT, Last_Event_ID=cursor)
        assert problem(answer)[0] == 410, cursor
    assert len(upstream.asked) == 1


def test_a_cleared_answer_is_gone(relay: Relay, upstream: Upstream, client: httpx.Client) -> None:
    upstream.answer(CHAT)
    answer = relay.ask(CHAT)
    of = generation_of(answer.headers, relay.service)
    client.delete(f"/threads/{answer.headers['resume-thread']}").raise_for_status()
    assert problem(relay.ask(CHAT, Last_Event_ID=f"{of}-2"))[0] == 410


def test_two_answers_in_one_thread_are_resumed_apart(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT.held(2), at="/base/v1/chat")
    upstream.answer(AI_SDK.held(3), at="/base/api/chat")
    with relay.reading(CHAT, Resume_Thread="two") as chat, relay.reading(AI_SDK, Resume_Thread="two") as sdk:
        had = chat.events(2)[-1], sdk.events(3)[-1]
        upstream.go_on(2)
        rests = chat.rest(), sdk.rest()
    for last, rest in zip(had, rests, strict=True):
        cursor = last.partition(b"id: ")[2].partition(b"\n")[0].decode()
        assert rest.count(b"id: ") == 4 + (last is had[1]) * 2
        assert relay.ask(CHAT, Last_Event_ID=cursor).content == RETRY + rest


def test_large_events_and_many_at_once_come_whole(relay: Relay, upstream: Upstream) -> None:
    events = [b"data: %d\n\n" % number for number in range(20_000)]
    large = b"data: %s\n\n" % (b"x" * (1024**2))
    upstream.answer(OTHER.ended(0, b"".join(events), large[:1000], large[1000:], events[0]))
    answer = relay.ask(OTHER)
    found = answer.content.removeprefix(RETRY).split(b"\n\n")[:-1]
    assert [event.partition(b"\n")[2] + b"\n\n" for event in found] == [*events, large, events[0]]


# Joining


@pytest.mark.parametrize("header", ["Resume_Message", "Idempotency_Key"])
def test_a_retry_joins_the_answer_and_the_upstream_is_asked_once(relay: Relay, upstream: Upstream, header: str) -> None:
    upstream.answer(CHAT.held(0).held(3))
    named = {header: f"m-{header}"}
    with ThreadPoolExecutor() as pool:
        early = [pool.submit(relay.ask, CHAT, **named) for _ in range(3)]
        wait_until(lambda: upstream.paused)
        upstream.go_on()
        with relay.reading(CHAT, **named) as late:
            late.events(2)
            upstream.go_on()
            late.rest()
        answers = [answer.result().content for answer in early]
    assert {late.seen, relay.ask(CHAT, **named).content} == set(answers)
    assert late.seen.count(b"\ndata: ") == len(CHAT.pieces)
    assert len(upstream.asked) == 1


def test_a_retry_after_the_end_joins_though_the_body_names_the_thread(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(AI_SDK)
    first, again = (relay.ask(AI_SDK, Resume_Message="in-a-chat") for _ in range(2))
    assert (first.headers["resume-thread"], first.content) == (again.headers["resume-thread"], again.content)
    assert first.headers["resume-thread"] == "chat-1"
    assert len(upstream.asked) == 1


def test_a_retry_after_an_answer_that_was_not_a_stream_asks_again(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(plain(429, {}))
    assert relay.ask(CHAT, Resume_Message="again").status_code == 429
    upstream.answer(CHAT)
    assert relay.ask(CHAT, Resume_Message="again").content.endswith(b"data: [DONE]\n\n")
    assert len(upstream.asked) == 2


def test_a_message_that_is_not_relayed_is_not_joined(
    relay: Relay, upstream: Upstream, client: httpx.Client, thread: str
) -> None:
    append(client, thread, "m", "ours")
    assert problem(relay.ask(CHAT, Resume_Thread=thread, Resume_Message="m"))[0] == 409
    assert not upstream.asked


# The truth about the end


@WITH_ERRORS
@pytest.mark.parametrize("how", ["broken", "in a frame", "ended"])
def test_the_reader_is_told_in_the_form_of_the_dialect_that_the_upstream_is_lost(
    relay: Relay, upstream: Upstream, dialect: str, how: str
) -> None:
    recording = RECORDINGS[dialect]
    cuts = {"broken": recording.broken(2), "in a frame": recording.broken(2, 9), "ended": recording.ended(2)}
    upstream.answer(cuts[how])
    answer = relay.ask(recording, Resume_Thread=f"lost-{dialect}-{how[:2]}", Resume_Message="m")
    *events, last = answer.content.removeprefix(RETRY).split(b"\n\n")[:-1]
    assert [event.partition(b"\n")[2] + b"\n\n" for event in events] == bare_events(recording)[:2]
    assert b"The upstream broke the answer off." in last
    assert (b"event: error\n" in last) == (b"event: error\n" in ERRORS[dialect])
    data, form = (json.loads(text.partition(b"data: ")[2]) for text in (last, ERRORS[dialect]))
    assert data.keys() - {"param", "code"} == form.keys() - {"param", "code"}
    assert relay.ended(f"lost-{dialect}-{how[:2]}", "m") == ("aborted", "upstream_lost")
    ids = [event.partition(b"\n")[0].removeprefix(b"id: ").decode() for event in (*events, last)]
    assert relay.ask(recording, Last_Event_ID=ids[-2]).content == RETRY + last + b"\n\n"
    assert relay.ask(recording, Last_Event_ID=ids[-1]).status_code == 204


def test_the_body_is_broken_off_if_the_dialect_has_no_error_event(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(OTHER.broken(2))
    with relay.reading(OTHER) as reading:
        assert reading.broken_rest().endswith(b"data: two\ndata: lines\n\n")
    assert relay.ended(*reading.ids) == ("aborted", "upstream_lost")
    last = f"{generation_of(reading.headers, relay.service)}-3"
    assert relay.ask(OTHER, Last_Event_ID=last).status_code == 204


def test_a_good_end_in_the_middle_of_an_event_is_a_cut(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(OTHER.ended(1, b"data: tw"))
    with relay.reading(OTHER) as reading:
        assert reading.broken_rest().endswith(b"data: one\n\n")
    assert relay.ended(*reading.ids) == ("aborted", "upstream_lost")


def test_a_comment_at_the_end_is_no_event(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(OTHER.ended(1, b": goodbye"))
    assert relay.ask(OTHER).content.endswith(b"data: one\n\n")


@WITH_ERRORS
def test_the_upstreams_own_error_ends_the_message_with_its_words(
    relay: Relay, upstream: Upstream, dialect: str
) -> None:
    recording = RECORDINGS[dialect]
    upstream.answer(recording.ended(2, ERRORS[dialect]))
    answer = relay.ask(recording, Resume_Thread=f"error-{dialect}", Resume_Message="m")
    assert answer.content.endswith(b"\n" + ERRORS[dialect])
    assert answer.content.count(b"id: ") == 3
    assert relay.ended(f"error-{dialect}", "m") == ("aborted", "overloaded")
    last = answer.content.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
    assert relay.ask(recording, Last_Event_ID=last).status_code == 204


@WITH_ERRORS
def test_an_error_as_the_first_event_ends_the_message_too(relay: Relay, upstream: Upstream, dialect: str) -> None:
    recording = RECORDINGS[dialect]
    upstream.answer(recording.ended(0, ERRORS[dialect]))
    relay.ask(recording, Resume_Thread=f"first-{dialect}", Resume_Message="m")
    assert relay.ended(f"first-{dialect}", "m") == ("aborted", "overloaded")


@pytest.mark.parametrize(
    "nothing",
    [Recording((), has_head=False, is_broken=True), Recording((), is_broken=True), CHAT.ended(0)],
    ids=["nothing", "a head", "an empty body"],
)
def test_an_empty_answer_is_502_and_a_retry_asks_again(relay: Relay, upstream: Upstream, nothing: Recording) -> None:
    named = {"Resume_Message": f"nothing-{nothing.has_head}-{nothing.is_broken}"}
    upstream.answer(nothing)
    assert problem(relay.ask(CHAT, **named))[0] == 502
    upstream.answer(CHAT)
    assert relay.ask(CHAT, **named).status_code == 200


def test_an_abort_reaches_the_upstream_and_every_reader(relay: Relay, upstream: Upstream, client: httpx.Client) -> None:
    for recording, said in (
        (AI_SDK, b'data: {"type":"abort","reason":"enough"}\n\n'),
        (CHAT, b'data: {"error":{"message":"The answer was stopped: enough.","type":"cancelled","param":null'),
    ):
        upstream.forget()
        upstream.answer(recording.held(3))
        with relay.reading(recording, Resume_Thread=f"stop{recording.path.replace('/', '-')}") as reading:
            reading.events(3)
            thread, message = reading.ids
            client.post(f"/threads/{thread}/messages/{message}/abort", json={"reason": "enough"}).raise_for_status()
            assert said in reading.rest()
        wait_until(lambda upstream=upstream: upstream.left == 1, "the upstream's connection is closed")


def test_clearing_a_thread_closes_the_upstream(relay: Relay, upstream: Upstream, client: httpx.Client) -> None:
    upstream.answer(CHAT.held(3))
    with relay.reading(CHAT) as reading:
        reading.events(3)
        client.delete(f"/threads/{reading.ids[0]}").raise_for_status()
        reading.broken_rest()
    wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")


# Death and silence


def test_the_recording_of_a_killed_service_is_there_and_said_to_be_cut(tmp_path: Path, upstream: Upstream) -> None:
    upstream.answer(CHAT.held(3))
    flags = ("--upstream", f"up={upstream.url}")
    with Service(tmp_path / "chunks.db", *flags) as service, Relay(service) as relay:
        with relay.reading(CHAT) as reading:
            had = reading.events(3)
            service.kill()
            reading.broken_rest()
        service.start()
        assert relay.ended(*reading.ids) == ("aborted", "service_restarted")
        last = had[-1].partition(b"id: ")[2].partition(b"\n")[0].decode()
        rest = relay.ask(CHAT, Last_Event_ID=last)
        assert b'data: {"error":{"message":"The service that recorded this answer was restarted' in rest.content
        assert rest.content.count(b"id: ") == 1
        of = last.partition("-")[0]
        whole = relay.ask(CHAT, Last_Event_ID=f"{of}-1").content
        assert whole.startswith(RETRY + framed(bare_events(CHAT)[:3], of))


def test_a_stopped_service_breaks_the_body_off_and_closes_the_upstream(tmp_path: Path, upstream: Upstream) -> None:
    upstream.answer(CHAT.held(3))
    with Service(tmp_path / "chunks.db", "--upstream", f"up={upstream.url}") as service, Relay(service) as relay:
        with relay.reading(CHAT) as reading:
            reading.events(3)
            with ThreadPoolExecutor() as pool:
                upstream.answer(CHAT.held(0), at="/silent")
                waiting = pool.submit(relay.ask, CHAT.at("/silent"))
                wait_until(lambda: upstream.paused == 2)
                assert service.end() == 0
                reading.broken_rest()
                assert waiting.exception() or waiting.result().status_code == 503
        wait_until(lambda: upstream.left == 2, "the upstream's connection is closed")
        service.start()
        assert relay.ended(*reading.ids) == ("aborted", "service_restarted")
        assert service.tracebacks() == 0


def test_a_missing_upstream_is_502(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Service(tmp_path / "chunks.db", "--upstream", f"up=http://127.0.0.1:{port}") as service:
        with Relay(service) as relay:
            status, document = problem(relay.ask(CHAT))
        assert (status, str(port) in document["detail"]) == (502, False)


def test_silence_and_the_number_of_relays_have_limits(tmp_path: Path, upstream: Upstream) -> None:
    flags = ("--producer-timeout", "1s", "--heartbeat", "100ms", "--max-relays", "1")
    with (
        Service(tmp_path / "chunks.db", "--upstream", f"up={upstream.url}", *flags) as service,
        Relay(service) as relay,
    ):
        upstream.answer(CHAT.held(2))
        with relay.reading(CHAT) as reading:
            reading.events(2)
            answer = relay.ask(CHAT)
            assert (problem(answer)[0], answer.headers["retry-after"]) == (503, "1")
            assert len(upstream.asked) == 1
            assert b'"code":"producer_timeout"' in reading.rest()
        assert relay.ended(*reading.ids) == ("aborted", "producer_timeout")
        wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")
        # A stream that begins with silence has its headers, and signs of life, before its first event.
        upstream.answer(CHAT.held(0))
        with relay.reading(CHAT) as reading:
            while b": hb\n" not in reading.seen:
                reading.more()
            upstream.go_on()
            assert reading.rest().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("comes", [b": thinking\n\n", PAUSE], ids=["comments", "nothing"])
def test_waiting_for_the_event_with_the_id_has_a_limit(tmp_path: Path, upstream: Upstream, comes: bytes) -> None:
    upstream.answer(RESPONSES.ended(0, *[comes, PAUSE] * 1_000))
    flags = ("--producer-timeout", "1s", "--heartbeat", "100ms")
    with (
        Service(tmp_path / "chunks.db", "--upstream", f"up={upstream.url}", *flags) as service,
        Relay(service) as relay,
        ThreadPoolExecutor() as pool,
    ):
        asked = pool.submit(relay.ask, RESPONSES, Resume_Message="m")
        while not wait([asked], timeout=0.1).done and comes is not PAUSE:
            upstream.go_on()
        status, document = problem(asked.result())
        assert (status, "fell silent" in document["detail"]) == (504, True)
        wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")
        assert relay.message("m", "m") == {}
        upstream.answer(RESPONSES)
        assert relay.ask(RESPONSES, Resume_Message="m").status_code == 200


def test_only_the_first_request_for_an_answer_counts_towards_max_relays(tmp_path: Path, upstream: Upstream) -> None:
    flags = ("--upstream", f"up={upstream.url}", "--max-relays", "2")
    with ThreadPoolExecutor() as pool, Service(tmp_path / "chunks.db", *flags) as service, Relay(service) as relay:
        upstream.answer(CHAT.held(0), at=CHAT.path)
        joined = [pool.submit(relay.ask, CHAT, Resume_Message="m") for _ in range(3)]
        wait_until(lambda: "resume_stream_readers 3.0" in httpx.get(f"{service.url}/metrics").text)
        upstream.answer(OTHER.held(1), at=OTHER.path)
        with relay.reading(OTHER) as reading:
            assert reading.status == 200
            assert problem(relay.ask(CHAT))[0] == 503
            upstream.go_on(2)
            reading.rest()
        assert len({answer.result().content for answer in joined}) == 1
        upstream.answer(plain(200, {}), at=CHAT.path)
        for _ in range(3):  # answers that are over take no place, recorded or not
            assert relay.ask(CHAT).status_code == 200
