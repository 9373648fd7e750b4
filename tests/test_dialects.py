"""The dialects of the relay: how streams are cut into events, how they end, and how clients ask for them again."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import wait_until
from relayed import RETRY, Relay, bare_events, relay
from resume_stream.app import Chunk
from resume_stream.extras.relay.dialects import DIALECTS
from resume_stream.extras.relay.events import Events, Failed
from upstream import (
    AG_UI,
    AI_SDK,
    CHAT,
    ERRORS,
    LANGGRAPH,
    RECORDINGS,
    RESPONSE,
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

upstream, service = shared_upstream(), relaying()
BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


# Events


STREAM = (
    "\ufeffdata: one\n\n"
    ": a comment\n\n"
    "event: named\ndata:two\ndata:  lines\n\n\n"
    "id: 7\nretry: 5\n\n"
    "data\n\n"
    "data: é\nevent: last\nevent: latest\nother: x\n\n"
    "event: without data\n\n"
    "data: never ended\n"
)
EVENTS = [Chunk("one"), Chunk("two\n lines", "named"), Chunk(""), Chunk("é", "latest"), Chunk("", "without data")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stream_is_the_same_events_wherever_it_is_cut(end: str) -> None:
    stream = STREAM.replace("\n", end).encode()
    for size in (*range(1, 40), len(stream)):
        events = Events(max_chunk=100)
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [event for piece in pieces for event in events.feed(piece)] == EVENTS, size


def test_events_before_one_over_the_limit_are_kept() -> None:
    events = Events(max_chunk=10)
    assert list(events.feed(b"data: %s\n\n" % (b"x" * 10))) == [Chunk("x" * 10)]
    rest = events.feed(b"data: a\n\ndata: %s\n\n" % (b"x" * 11))
    assert next(rest) == Chunk("a")
    with pytest.raises(Failed, match="event_too_large"):
        next(rest)


def test_an_endless_line_is_not_kept() -> None:
    events = Events(max_chunk=10)
    for _ in range(100):
        assert list(events.feed(b"x" * 10)) == []
    with pytest.raises(Failed, match="event_too_large"):
        list(events.feed(b"x" * 100))


# Ends


def chunks_of(recording: Recording) -> list[Chunk]:
    return [event for piece in recording.pieces for event in Events(10_000).feed(piece)]


@pytest.mark.parametrize("name", RECORDINGS)
def test_only_the_last_events_of_a_recording_end_it(name: str) -> None:
    ends = [BY_NAME[name].end_of(chunk) for chunk in chunks_of(RECORDINGS[name])]
    expected = {"ai-sdk": ["finish", "[DONE]"], "sse": []}.get(name, [None])
    found = [end for end in ends if end]
    assert found == (expected if expected != [None] else found[:1])
    assert not found or ends[-1] in BY_NAME[name].completes


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_event_is_known_and_its_words_are_the_reason(name: str) -> None:
    (chunk,) = Events(10_000).feed(ERRORS[name])
    assert BY_NAME[name].end_of(chunk) in BY_NAME[name].aborts
    assert BY_NAME[name].reason_of(chunk) == "overloaded"


@pytest.mark.parametrize("name", [name for name in ERRORS if BY_NAME[name].error])
def test_our_own_error_event_is_known_as_an_error(name: str) -> None:
    event, data = BY_NAME[name].error("upstream_lost", "It is lost.", {"sequence_number": 4})
    chunk = Chunk(json.dumps(data), event)
    assert BY_NAME[name].end_of(chunk) in BY_NAME[name].aborts
    assert BY_NAME[name].reason_of(chunk) == "It is lost."


def test_text_with_the_words_of_an_end_does_not_end_the_stream() -> None:
    chat, sdk = BY_NAME["openai-chat"], BY_NAME["ai-sdk"]
    assert chat.end_of(Chunk('{"choices":[{"delta":{"content":"an error: [DONE]"}}]}')) is None
    assert chat.end_of(Chunk('{"error":null,"choices":[]}')) is None
    assert sdk.end_of(Chunk('{"type":"text-delta","delta":"finish error abort"}')) is None
    assert chat.end_of(Chunk("error, and no JSON")) is None


def test_every_dialect_has_a_name_of_its_own_and_the_last_one_takes_all_other_streams() -> None:
    assert len(BY_NAME) == len(DIALECTS)
    assert DIALECTS[-1].name == "sse"


def test_a_path_does_not_make_the_dialect_if_the_stream_is_of_another_one(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(Recording((b'data: {"hello":1}\n\n',), "/v1/responses"))
    answer = relay.ask(RESPONSES)
    assert relay.ended(answer.headers["resume-thread"], answer.headers["resume-message"]) == ("completed", None)


# OpenAI responses


def of_response(name: str) -> Recording:
    """Return a recording with an id of its own, so that tests share no message."""
    pieces = tuple(piece.replace(b"resp_1", name.encode()) for piece in RESPONSES.pieces)
    return dataclasses.replace(RESPONSES, pieces=pieces)


def retrieve(relay: Relay, name: str, **query: Any) -> httpx.Response:
    return relay.http.get(f"{relay_url(relay.service)}/v1/responses/{name}", params=query)


def test_a_response_goes_on_after_each_of_its_numbers(relay: Relay, upstream: Upstream) -> None:
    recording = of_response("resp_numbers")
    upstream.answer(recording)
    whole = relay.ask(recording).content.removeprefix(RETRY).split(b"\n\n")[:-1]
    for number in range(len(whole)):
        rest = retrieve(relay, "resp_numbers", stream="true", starting_after=number)
        assert rest.content == RETRY + b"".join(event + b"\n\n" for event in whole[number + 1 :])
    assert retrieve(relay, "resp_numbers", stream="true").content == RETRY + b"\n\n".join(whole) + b"\n\n"
    assert problem(retrieve(relay, "resp_numbers", stream="true", starting_after="x"))[0] == 400
    assert len(upstream.asked) == 1


def test_a_response_goes_on_while_it_is_being_made(relay: Relay, upstream: Upstream) -> None:
    recording = of_response("resp_live")
    upstream.answer(recording.held(4))
    with relay.reading(recording) as reading, ThreadPoolExecutor() as pool:
        reading.events(4)
        rest = pool.submit(retrieve, relay, "resp_live", stream="true", starting_after=2)
        later = pool.submit(retrieve, relay, "resp_live", stream="true", starting_after=5)
        assert retrieve(relay, "resp_live").json() == {**RESPONSE, "id": "resp_live"}
        upstream.go_on()
        reading.rest()
        assert rest.result().content.count(b"event: response.") == len(RESPONSES.pieces) - 3
        assert later.result().content.count(b"event: response.") >= len(RESPONSES.pieces) - 6
    assert retrieve(relay, "resp_live").json()["status"] == "completed"
    assert len(upstream.asked) == 1


def test_a_cancelled_response_says_so_and_the_upstream_is_closed(relay: Relay, upstream: Upstream) -> None:
    recording = of_response("resp_cancelled")
    upstream.answer(recording.held(3), at="/v1/responses")
    upstream.answer(plain(404, {"error": {"message": "unknown"}}), at="/v1/responses/")
    with relay.reading(recording) as reading:
        reading.events(3)
        answer = relay.http.post(f"{relay_url(relay.service)}/v1/responses/resp_cancelled/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert b'event: error\ndata: {"type":"error","code":"cancelled"' in reading.rest()
        assert b'"sequence_number":3}' in reading.seen
    wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")
    assert [asked.target for asked in upstream.asked] == ["/v1/responses", "/v1/responses/resp_cancelled/cancel"]
    assert retrieve(relay, "resp_cancelled").json()["status"] == "cancelled"


def test_an_upstream_that_can_cancel_answers_the_cancel_call(relay: Relay, upstream: Upstream) -> None:
    recording = of_response("resp_known")
    upstream.answer(recording.held(3), at="/v1/responses")
    upstream.answer(plain(200, {"id": "resp_known", "status": "cancelled", "by": "it"}), at="/v1/responses/")
    with relay.reading(recording) as reading:
        reading.events(3)
        answer = relay.http.post(f"{relay_url(relay.service)}/v1/responses/resp_known/cancel")
    assert answer.json()["by"] == "it"
    assert relay.ended("resp_known", "resp_known") == ("aborted", "cancelled")


def test_a_lost_response_has_failed(relay: Relay, upstream: Upstream) -> None:
    recording = of_response("resp_lost")
    upstream.answer(recording.broken(3))
    relay.ask(recording)
    lost = retrieve(relay, "resp_lost").json()
    assert (lost["status"], lost["error"]["code"]) == ("failed", "upstream_lost")


def test_a_response_that_is_not_recorded_is_asked_for(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(plain(200, {"id": "resp_theirs"}))
    assert retrieve(relay, "resp_theirs").json() == {"id": "resp_theirs"}
    upstream.answer(RESPONSES)
    assert retrieve(relay, "resp_1/input_items", stream="true").status_code == 200
    assert len(upstream.asked) == 2


# AI SDK


def of_chat(name: str) -> Recording:
    return dataclasses.replace(AI_SDK, body=AI_SDK.body.replace(b"chat-1", name.encode()))


def live(relay: Relay, name: str) -> httpx.Response:
    return relay.http.get(f"{relay_url(relay.service)}/api/chat/{name}/stream")


def test_a_chat_is_replayed_while_it_is_active_and_else_answered_with_204(relay: Relay, upstream: Upstream) -> None:
    recording = of_chat("chat-live")
    upstream.answer(recording.held(5), at="/api/chat")
    upstream.answer(plain(404, {}), at="/api/chat/")
    assert live(relay, "chat-live").status_code == 204
    with relay.reading(recording) as reading:
        reading.events(5)
    with ThreadPoolExecutor() as pool:
        resumed = pool.submit(live, relay, "chat-live")
        with relay.reading(Recording((), "/api/chat/chat-live/stream", "GET", b"")) as second:
            assert second.headers["x-vercel-ai-ui-message-stream"] == "v1"
            second.events(5)
            upstream.go_on()
            second.rest()
        assert second.seen.count(b"id: ") == len(bare_events(recording))
        if resumed.result().status_code == 200:  # it came before the end
            assert resumed.result().content == second.seen
    assert live(relay, "chat-live").status_code == 204
    assert len([asked for asked in upstream.asked if asked.method == "POST"]) == 1


def test_a_resume_waits_for_the_first_event_of_a_chat(relay: Relay, upstream: Upstream) -> None:
    recording = of_chat("chat-early")
    upstream.answer(recording.held(0), at="/api/chat")
    upstream.answer(plain(404, {}), at="/api/chat/")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(relay.ask, recording)
        wait_until(lambda: upstream.paused)
        resumed = pool.submit(live, relay, "chat-early")
        assert not resumed.done()
        upstream.go_on()
        assert asked.result().status_code == 200
        assert resumed.result().content in (asked.result().content, b"")
    assert len(upstream.asked) == 1


def test_a_stop_reaches_the_producer(relay: Relay, upstream: Upstream) -> None:
    recording = of_chat("chat-stop")
    upstream.answer(recording.held(5), at="/api/chat")
    upstream.answer(plain(404, {}), at="/api/chat/")
    with relay.reading(recording) as reading:
        reading.events(5)
        answer = relay.http.post(f"{relay_url(relay.service)}/api/chat/chat-stop/stop", json={})
        assert (answer.status_code, answer.json()) == (200, {})
        assert reading.rest().endswith(b'data: {"type":"abort","reason":"cancelled"}\n\n')
    wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")


def test_a_chat_is_told_why_its_last_answer_failed_without_the_text(relay: Relay, upstream: Upstream) -> None:
    recording = of_chat("chat-failed")
    upstream.answer(recording.broken(5), at="/api/chat")
    assert relay.ask(recording).content.count(b"text-delta") == 2
    for _ in range(2):
        told = live(relay, "chat-failed")
        assert (told.status_code, told.headers["x-vercel-ai-ui-message-stream"]) == (200, "v1")
        assert told.content == b'data: {"type":"error","errorText":"The upstream broke the answer off."}\n\n'
    for ended in (recording, recording.ended(5, ERRORS["ai-sdk"])):  # an upstream knows of its own error
        upstream.answer(ended, at="/api/chat")
        relay.ask(recording)
        assert live(relay, "chat-failed").status_code == 204


def test_an_endpoint_whose_path_only_looks_like_a_chat_is_asked(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(plain(200, {"theirs": 1}))
    assert live(relay, "no-chat").json() == {"theirs": 1}


# AG-UI


def test_of_several_runs_in_one_stream_the_last_one_has_to_end(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(AG_UI.ended(6, *AG_UI.pieces[:3]))
    answer = relay.ask(AG_UI)
    assert b'"type":"RUN_ERROR"' in answer.content.split(b"\n\n")[-2]
    assert relay.ended(*(answer.headers[f"resume-{name}"] for name in ("thread", "message"))) == (
        "aborted",
        "upstream_lost",
    )
    upstream.answer(AG_UI.ended(6, *AG_UI.pieces))
    assert relay.ask(AG_UI).content.count(b"RUN_FINISHED") == 2


def test_a_run_is_joined_by_the_name_that_its_client_gave_it(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(AG_UI.held(3))
    join = Recording((), "/agent?user=7&offset=-1&runId=run%3A1", "GET", b"")
    with relay.reading(AG_UI, X_Run_Id="run:1") as first:
        first.events(3)
        with relay.reading(join) as second:
            assert second.ids == first.ids == ("run:1", "run:1")
            second.events(3)
            upstream.go_on()
            assert second.rest() == first.rest()
    assert relay.ask(join).content == first.seen
    assert [(asked.method, asked.headers["x-run-id"]) for asked in upstream.asked] == [("POST", "run:1")]


def test_a_run_that_is_not_recorded_is_joined_at_the_upstream(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(plain(404, {"error": "no such run"}))
    answer = relay.ask(Recording((), "/agent?offset=-1&runId=theirs", "GET", b""))
    assert (answer.status_code, answer.json()) == (404, {"error": "no such run"})
    assert upstream.asked[0].target == "/agent?offset=-1&runId=theirs"


def test_the_name_of_a_run_does_not_name_answers_of_other_dialects(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    for _ in range(2):  # for a trace, several calls of one run may have it
        relay.ask(CHAT, X_Run_Id="traced")
    assert len(upstream.asked) == 2


# LangGraph


def of_run(name: str, origin: str = "") -> Recording:
    said = {"Location": f"{origin}/threads/t/runs/{name}/stream", "Content-Location": f"{origin}/threads/t/runs/{name}"}
    return dataclasses.replace(LANGGRAPH, headers={**LANGGRAPH.headers, **said})


def test_a_run_is_joined_from_its_start_or_from_an_id(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(of_run("run-join"))
    whole = relay.ask(LANGGRAPH).content
    join = Recording((), "/threads/t/runs/run-join/stream", "GET", b"")
    assert relay.ask(join).content == whole
    assert relay.ask(join, Last_Event_ID="-1").content == whole
    *_, last, _ = whole.split(b"id: ")
    had = last.partition(b"\n")[0].decode()
    assert relay.ask(join, Last_Event_ID=had).content == RETRY + b"id: " + whole.rpartition(b"id: ")[2]
    assert len(upstream.asked) == 1


def test_a_run_that_is_not_recorded_is_joined_at_the_upstream_and_recorded(relay: Relay, upstream: Upstream) -> None:
    join = dataclasses.replace(of_run("run-theirs"), path="/threads/t/runs/run-theirs/stream", method="GET", body=b"")
    upstream.answer(join)
    assert relay.ask(join, Last_Event_ID="-1").content == relay.ask(join).content
    assert len(upstream.asked) == 1
    assert upstream.asked[0].headers["last-event-id"] == "-1"  # without it, LangGraph would send only new events


def test_a_location_at_the_upstream_becomes_one_of_the_relay(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(of_run("run-absolute", upstream.url))
    answer = relay.ask(LANGGRAPH)
    assert answer.headers["location"] == "/threads/t/runs/run-absolute/stream"
    assert answer.headers["resume-message"] == "run-absolute"


def test_a_cancelled_run_ends_in_the_relay_and_at_the_upstream(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(of_run("run-cancel").held(2))
    upstream.answer(plain(202, {}), at="/threads/t/runs/run-cancel/cancel")
    with relay.reading(LANGGRAPH) as reading:
        reading.events(2)
        url = f"{relay_url(relay.service)}/threads/t/runs/run-cancel/cancel?wait=0&action=interrupt"
        assert relay.http.post(url).status_code == 202
        assert b'event: error\ndata: {"error":"cancelled"' in reading.rest()
    assert upstream.asked[-1].target == "/threads/t/runs/run-cancel/cancel?wait=0&action=interrupt"
    wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")


def test_an_unknown_run_is_404(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(plain(404, {"detail": "no"}))
    assert relay.ask(Recording((), "/threads/t/runs/nobodys/stream", "GET", b"")).status_code == 404


def test_other_calls_of_a_run_go_to_the_upstream(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(of_run("run-status"), at="/threads/t-1/runs/stream")
    upstream.answer(plain(200, {"status": "success"}), at="/threads/t/runs/run-status")
    relay.ask(LANGGRAPH)
    assert relay.http.get(f"{relay_url(relay.service)}/threads/t/runs/run-status").json() == {"status": "success"}


# Without the relay


def test_a_client_of_the_dialect_reads_chunks_that_a_producer_appended(
    relay: Relay, client: httpx.Client, thread: str
) -> None:
    chunks = [{"content": data} for data in AI_SDK.data]
    client.post(f"/threads/{thread}/messages/m/chunks", json=chunks[:5]).raise_for_status()
    with ThreadPoolExecutor() as pool, client.stream("GET", f"/threads/{thread}/live?format=raw") as response:
        pool.submit(client.post, f"/threads/{thread}/messages/m/chunks?complete=true", json=chunks[5:])
        text = response.read().decode()
    assert [line[6:] for line in text.split("\n") if line.startswith("data: ")] == AI_SDK.data
    assert client.get(f"/threads/{thread}/live?format=raw").status_code == 204
