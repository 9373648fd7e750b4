"""Other people's Python clients, unchanged, through the relay.

Each client gets what the upstream sent, or is told the truth in its own form. The tests of a package that
is not installed are skipped.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from conftest import Service, wait_until
from cutter import Cutter, cutter
from upstream import (
    ANTHROPIC,
    CHAT,
    ERRORS,
    LANGGRAPH,
    RESPONSES,
    Recording,
    Upstream,
    fresh,
    plain,
    relay_url,
    relaying,
    shared_upstream,
)

__all__ = ["cutter", "fresh"]  # fixtures

upstream, service = shared_upstream(), relaying()
TEXT = "Hello"
CHAT_TEXT = "Hél\nlo"
CUTS = ["broken", "in a frame", "ended"]


def lost(recording: Recording, how: str, after: int = 3) -> Recording:
    return {
        "broken": recording.broken(after),
        "in a frame": recording.broken(after, 9),
        "ended": recording.ended(after),
    }[how]


# OpenAI


def openai_client(url: str, **options: Any) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/relay/up/v1", api_key="key", **options)


@pytest.fixture
def openai(service: Service) -> Iterator[Any]:
    with openai_client(service.url, max_retries=0) as client:
        yield client


def chat(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(model="m", stream=True, messages=[{"role": "user", "content": "Hi"}], **more)


def chat_text(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def response(client: Any, **more: Any) -> Any:
    return client.responses.create(model="m", stream=True, input="Hi", **more)


def own(name: str, recording: Recording = RESPONSES) -> Recording:
    """Return the recording with its own id."""
    pieces = tuple(piece.replace(b"resp_1", name.encode()) for piece in recording.pieces)
    return dataclasses.replace(recording, pieces=pieces)


def test_openai_chat_completions(openai: Any, upstream: Upstream) -> None:
    upstream.answer(CHAT)
    assert chat_text(chat(openai)) == CHAT_TEXT
    assert upstream.asked[0].target == "/v1/chat/completions"
    assert upstream.asked[0].headers["authorization"] == "Bearer key"
    assert upstream.asked[0].json["stream"] is True


def test_openai_answers_that_are_no_streams(openai: Any, upstream: Upstream) -> None:
    import openai as package

    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": []}
    upstream.answer(plain(200, whole))
    answer = openai.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert answer.id == "c"
    for status, error in ((401, package.AuthenticationError), (429, package.RateLimitError)):
        upstream.answer(plain(status, {"error": {"message": "no", "type": "t", "code": None, "param": None}}))
        with pytest.raises(error, match="no"):
            chat(openai)


@pytest.mark.parametrize("how", CUTS)
def test_openai_chat_is_told_that_its_upstream_was_lost(openai: Any, upstream: Upstream, how: str) -> None:
    import openai as package

    upstream.answer(lost(CHAT, how))
    stream = chat(openai)
    assert "".join(next(stream).choices[0].delta.content for _ in range(3)) == "Hél\n"
    with pytest.raises(package.APIError, match="broke the answer off"):
        next(stream)


def test_openai_chat_is_told_of_its_upstreams_own_error(openai: Any, upstream: Upstream) -> None:
    import openai as package

    upstream.answer(CHAT.ended(2, ERRORS["openai-chat"]))
    with pytest.raises(package.APIError, match="overloaded"):
        chat_text(chat(openai))


def test_openai_chat_asked_again_is_the_same_answer(openai: Any, upstream: Upstream) -> None:
    upstream.answer(CHAT.held(3))
    named = {"Resume-Thread": "chat-7", "Resume-Message": "answer-1"}
    dropped = chat(openai, extra_headers=named)
    assert [next(dropped).choices[0].delta.content for _ in range(3)] == ["", "Hé", "l\n"]
    dropped.close()
    again = chat(openai, extra_headers=named)
    upstream.go_on()
    assert chat_text(again) == CHAT_TEXT
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("more", [0, 30])
def test_openais_own_retry_joins_the_first(cutter: Cutter, upstream: Upstream, more: int) -> None:
    """It retries if the connection is lost before the answer begins."""
    upstream.answer(CHAT)
    cutter.cut(0, more)
    with openai_client(cutter.url, max_retries=1) as client:
        assert chat_text(chat(client, extra_headers={"Resume-Message": f"retried-{more}"})) == CHAT_TEXT
    assert (len(upstream.asked), cutter.connections) == (1, 2)


def test_openai_responses_go_on_after_every_event(openai: Any, upstream: Upstream) -> None:
    for cut in range(1, len(RESPONSES.pieces)):
        name = f"resp_cut_{cut}"
        upstream.answer(own(name).held(cut))
        stream = response(openai)
        events = [next(stream) for _ in range(cut)]
        stream.close()
        assert events[0].response.id == name
        rest = openai.responses.retrieve(name, stream=True, starting_after=events[-1].sequence_number)
        upstream.go_on()
        events += rest
        assert [event.type for event in events] == [
            piece.partition(b"\n")[0].removeprefix(b"event: ").decode() for piece in RESPONSES.pieces
        ]
        assert events[-1].response.output_text == TEXT
        assert openai.responses.retrieve(name).output_text == TEXT
    assert len(upstream.asked) == len(RESPONSES.pieces) - 1


@pytest.mark.parametrize("more", [0, 40])
def test_openai_responses_go_on_after_a_lost_connection(
    openai: Any, cutter: Cutter, upstream: Upstream, more: int
) -> None:
    import openai as package

    for cut in range(1, len(RESPONSES.pieces)):
        name = f"resp_lost_{more}_{cut}"
        upstream.answer(own(name).held(cut + 1) if cut + 1 < len(RESPONSES.pieces) else own(name))
        cutter.cut(cut, more)
        with openai_client(cutter.url, max_retries=0) as lossy:
            stream = response(lossy)
            events = [next(stream) for _ in range(cut)]
            with pytest.raises(package.APIConnectionError):
                next(stream)
        upstream.go_on()
        last = events[-1].sequence_number
        events += openai.responses.retrieve(name, stream=True, starting_after=last)
        assert [event.sequence_number for event in events] == list(range(len(RESPONSES.pieces)))
        assert events[-1].response.output_text == TEXT


def test_openais_stream_helper(openai: Any, upstream: Upstream) -> None:
    upstream.answer(own("resp_helper").held(5))
    with openai.responses.stream(model="m", input="Hi") as stream:
        first = [event for _, event in zip(range(5), stream, strict=False)]
    assert first[-1].type == "response.output_text.delta"
    with openai.responses.stream(response_id="resp_helper", starting_after=4) as stream:
        upstream.go_on()
        rest = list(stream)
        assert stream.get_final_response().output_text == TEXT
    assert rest[0].sequence_number == 5
    assert len(upstream.asked) == 1


def test_openais_cancel(openai: Any, upstream: Upstream) -> None:
    upstream.answer(own("resp_cancel").held(5), at="/v1/responses")
    upstream.answer(plain(404, {"error": {"message": "unknown"}}), at="/v1/responses/")
    stream = response(openai)
    for _ in range(5):
        next(stream)
    assert openai.responses.cancel("resp_cancel").status == "cancelled"
    wait_until(lambda: upstream.left == 1, "the upstream's connection is closed")
    last = next(stream)
    assert (last.type, last.code) == ("error", "cancelled")
    assert openai.responses.retrieve("resp_cancel").status == "cancelled"


def test_openai_after_the_service_was_killed(openai: Any, service: Service, upstream: Upstream) -> None:
    import openai as package

    upstream.answer(own("resp_killed").held(5))
    stream = response(openai)
    events = [next(stream) for _ in range(5)]
    service.kill()
    with pytest.raises(package.APIConnectionError):
        next(stream)
    service.start()
    wait_until(lambda: openai.responses.retrieve("resp_killed").status == "failed")
    rest = list(openai.responses.retrieve("resp_killed", stream=True, starting_after=2))
    assert [event.type for event in rest] == [events[3].type, events[4].type, "error"]
    assert rest[-1].code == "service_restarted"


# Anthropic


@pytest.fixture
def anthropic(service: Service) -> Iterator[Any]:
    package = pytest.importorskip("anthropic")
    with package.Anthropic(base_url=relay_url(service), api_key="key", max_retries=0) as client:
        yield client


def message(client: Any, **more: Any) -> Any:
    return client.messages.create(
        model="m", max_tokens=9, stream=True, messages=[{"role": "user", "content": "Hi"}], **more
    )


def test_anthropic_messages(anthropic: Any, upstream: Upstream) -> None:
    upstream.answer(ANTHROPIC)
    sent = [piece.partition(b"\n")[0].removeprefix(b"event: ").decode() for piece in ANTHROPIC.pieces]
    assert [event.type for event in message(anthropic)] == [name for name in sent if name != "ping"]
    with anthropic.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]) as stream:
        assert stream.get_final_text() == TEXT
    assert upstream.asked[0].target.startswith("/v1/messages")
    keys = (upstream.asked[0].headers.get("x-api-key"), upstream.asked[0].headers.get("authorization"))
    assert "key" in keys or "Bearer key" in keys  # it depends on the version of the SDK
    assert upstream.asked[0].headers["anthropic-version"]


def test_anthropic_asked_again_is_the_same_answer(anthropic: Any, upstream: Upstream) -> None:
    upstream.answer(ANTHROPIC.held(4))
    named = {"Resume-Message": "message-1"}
    dropped = message(anthropic, extra_headers=named)
    for _ in range(3):
        next(dropped)
    dropped.close()
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    with anthropic.messages.stream(**asked, extra_headers=named) as stream:
        upstream.go_on()
        assert stream.get_final_text() == TEXT
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("how", CUTS)
def test_anthropic_is_told_that_its_upstream_was_lost(anthropic: Any, upstream: Upstream, how: str) -> None:
    import anthropic as package

    upstream.answer(lost(ANTHROPIC, how, 4))
    with pytest.raises(package.APIStatusError, match="upstream_lost"):
        list(message(anthropic))


def test_anthropic_is_told_of_its_upstreams_own_error_and_refusals(anthropic: Any, upstream: Upstream) -> None:
    import anthropic as package

    upstream.answer(ANTHROPIC.ended(2, ERRORS["anthropic-messages"]))
    with pytest.raises(package.APIStatusError, match="overloaded"):
        list(message(anthropic))
    for status, error in ((401, package.AuthenticationError), (429, package.RateLimitError)):
        upstream.answer(plain(status, {"type": "error", "error": {"type": "t", "message": "no"}}))
        with pytest.raises(error, match="no"):
            message(anthropic)


# LangGraph


def run(name: str, recording: Recording = LANGGRAPH) -> Recording:
    said = {"Location": f"/threads/t/runs/{name}/stream", "Content-Location": f"/threads/t/runs/{name}"}
    return dataclasses.replace(recording, headers={**recording.headers, **said})


def langgraph_client(url: str) -> Any:
    return pytest.importorskip("langgraph_sdk").get_client(url=f"{url}/relay/up", api_key=None)


EXPECTED = [
    ("metadata", {"run_id": "run-1", "attempt": 1}),
    ("messages/partial", [{"type": "ai", "content": "Hel"}]),
    ("messages/partial", [{"type": "ai", "content": "Hello"}]),
    ("values", {"messages": ["Hello"]}),
    ("end", None),
]


async def streamed(client: Any, thread: str) -> list[tuple[str, Any]]:
    parts = client.runs.stream(thread, "agent", input={}, stream_mode=["values"])
    return [(part.event, part.data) async for part in parts]


@pytest.mark.anyio
async def test_langgraph_reconnects_by_itself_wherever_it_is_cut(service: Service, upstream: Upstream) -> None:
    async def cut(thread: str, events: int, more: int) -> list[tuple[str, Any]]:
        upstream.answer(run(f"run-{thread}"), at=f"/threads/{thread}/runs/stream")
        with Cutter(service.port) as cutter:
            cutter.cut(events, more)
            async with langgraph_client(cutter.url) as client:
                found = await streamed(client, thread)
            assert cutter.connections >= 2
            return found

    places = [(events, more) for events in range(len(EXPECTED)) for more in (3, 40) if (events, more) != (4, 40)]
    cuts = [cut(f"cut-{events}-{more}", events, more) for events, more in places if events]
    for found in await asyncio.gather(*cuts):
        assert found == EXPECTED
    assert all(asked.method == "POST" for asked in upstream.asked)
    assert len(upstream.asked) == len(cuts)


@pytest.fixture
async def langgraph(service: Service) -> AsyncIterator[Any]:
    async with langgraph_client(service.url) as client:
        yield client


@pytest.mark.anyio
async def test_langgraph_joins_a_run_and_cancels_it(langgraph: Any, upstream: Upstream) -> None:
    upstream.answer(run("run-join").held(3))
    parts = langgraph.runs.stream("t", "agent", input={})
    assert [(await anext(parts)).event for _ in range(2)] == ["metadata", "messages/partial"]
    joined = langgraph.runs.join_stream("t", "run-join", last_event_id="-1")
    assert (await anext(joined)).event == "metadata"
    upstream.answer(plain(202, {}), at="/threads/t/runs/run-join/cancel")
    await langgraph.runs.cancel("t", "run-join")
    rest = [(part.event, part.data) async for part in joined]
    assert rest[-1][0] == "error"
    assert rest[-1][1]["error"] == "cancelled"
    await parts.aclose()
    await asyncio.to_thread(wait_until, lambda: upstream.left == 1, "the upstream's connection is closed")


@pytest.mark.anyio
@pytest.mark.parametrize("how", CUTS)
async def test_langgraph_is_told_that_its_upstream_was_lost(langgraph: Any, upstream: Upstream, how: str) -> None:
    upstream.answer(run(f"run-lost-{how[:2]}", lost(LANGGRAPH, how, 2)))
    parts = await streamed(langgraph, "t-lost")
    assert parts[:2] == EXPECTED[:2]
    assert parts[2] == ("error", {"error": "upstream_lost", "message": "The upstream broke the answer off."})


@pytest.mark.anyio
async def test_langgraph_after_the_service_was_killed(langgraph: Any, service: Service, upstream: Upstream) -> None:
    upstream.answer(run("run-killed").held(2))
    parts = langgraph.runs.stream("t-killed", "agent", input={})
    seen = [await anext(parts), await anext(parts)]
    await asyncio.to_thread(service.restart)
    seen += [part async for part in parts]
    assert [(part.event, part.data) for part in seen[:2]] == EXPECTED[:2]
    assert [(part.event, part.data["error"]) for part in seen[2:]] == [("error", "service_restarted")]


@pytest.mark.anyio
async def test_langgraph_is_told_of_refusals(langgraph: Any, upstream: Upstream) -> None:
    for status in (401, 422):
        upstream.answer(plain(status, {"detail": "no"}))
        with pytest.raises(Exception, match="no"):
            await streamed(langgraph, "t")
