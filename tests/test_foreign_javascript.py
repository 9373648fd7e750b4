"""Other people's JavaScript clients, unchanged, in Node, through the relay (in the browser: ``browser/``).

Each client gets what the upstream sent, or is told the truth in its own form.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import httpx
import pytest
from conftest import ROOT, TIMEOUT, Service, wait_until
from cutter import Cutter, cutter
from upstream import (
    AG_UI,
    AI_SDK,
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

NODE = shutil.which("node")
if NODE is None:
    pytest.skip("Node is not installed (apt install nodejs)", allow_module_level=True)
for package in ("openai", "ai", "@langchain/langgraph-sdk", "@tanstack/ai-client"):
    if not (ROOT / "node_modules" / package).exists():
        pytest.skip(f"{package} is not installed (npm install)", allow_module_level=True)

upstream, service = shared_upstream(), relaying()
NOTHING = "nothing is active"
TERMINATED = "terminated"  # Node's error for a lost connection


class Call:
    """What one client receives, as it reports it."""

    def __init__(self) -> None:
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()

    def hear(self, count: int) -> list[Any]:
        """Return the next ``count`` things that it received."""
        return [self._line()["said"] for _ in range(count)]

    def rest(self) -> list[Any]:
        """Return all that it receives up to an end without an error, and what the end says if it says more."""
        said, line = self._rest()
        assert "ended" in line, line
        return said if line["ended"] is None else [*said, line["ended"]]

    def error(self) -> str:
        """Return the error with which it ends. Nothing else may be left."""
        said, line = self._rest()
        if "failed" not in line:  # LangGraph's client has no error besides the event
            assert said[-1]["event"] == "error", (said, line)
            return str(said.pop()["data"]["message"])
        assert said == []
        return str(line["failed"]["message"])

    def _rest(self) -> tuple[list[Any], dict[str, Any]]:
        said = []
        while "said" in (line := self._line()):
            said.append(line["said"])
        return said, line

    def _line(self) -> dict[str, Any]:
        return self.lines.get(timeout=TIMEOUT)


class Clients:
    """All clients, in one Node process."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}

    def __enter__(self) -> Self:
        command = [NODE, str(ROOT / "tests" / "foreign" / "clients.mjs")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._hearing = threading.Thread(target=self._hear)
        self._hearing.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._hearing.join()
        self._process.stdin.close()
        self._process.stdout.close()

    def __call__(self, client: str, url: str, **given: Any) -> Call:
        number = len(self._calls)
        call = self._calls[number] = Call()
        self._process.stdin.write(json.dumps({"call": number, "client": client, "url": url, **given}) + "\n")
        self._process.stdin.flush()
        return call

    def _hear(self) -> None:
        for line in self._process.stdout:
            said = json.loads(line)
            self._calls[said["call"]].lines.put(said)


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Clients() as clients:
        yield clients


NAMES = (f"n{number}" for number in itertools.count())


@dataclass(frozen=True)
class Client:
    """A client, the recording that it is sent, and what it receives of each piece (None: nothing)."""

    name: str
    dialect: str
    recording: Recording
    has: tuple[Any, ...]

    def of(self, name: str, recording: Recording | None = None) -> Recording:
        """Return the recording with its own ids."""
        recording = recording or self.recording
        run = f"/threads/t-1/runs/{name}"
        said = {"Location": f"{run}/stream", "Content-Location": run} if self.dialect == "langgraph" else {}
        pieces = tuple(piece.replace(b"resp_1", name.encode()) for piece in recording.pieces)
        return dataclasses.replace(recording, pieces=pieces, headers={**recording.headers, **said})

    def had(self, after: int, name: str = "resp_1") -> list[Any]:
        """Return what it has received after this many pieces."""
        has = [piece for piece in self.has[:after] if piece is not None]
        return json.loads(json.dumps(has).replace("resp_1", name))


CHAT_CLIENT = Client("openai chat", "openai-chat", CHAT, ("", "Hé", "l\n", "lo", "", None))
RESPONSES_CLIENT = Client(
    "openai responses", "openai-responses", RESPONSES, tuple(json.loads(data) for data in RESPONSES.data)
)
LANGGRAPH_CLIENT = Client(
    "langgraph",
    "langgraph",
    LANGGRAPH,
    (
        {"event": "metadata", "data": {"run_id": "run-1", "attempt": 1}},
        {"event": "messages/partial", "data": [{"type": "ai", "content": "Hel"}]},
        None,  # a comment
        {"event": "messages/partial", "data": [{"type": "ai", "content": "Hello"}]},
        {"event": "values", "data": {"messages": ["Hello"]}},
        {"event": "end", "data": None},
    ),
)
TANSTACK = Client("tanstack", "ag-ui", AG_UI, (None, None, "Hel", "Hello", None, None))
AI = Client("ai sdk", "ai-sdk", AI_SDK, ("", None, "", "Hel", "Hello", "Hello", None, None, None))
CLIENTS = (CHAT_CLIENT, RESPONSES_CLIENT, LANGGRAPH_CLIENT, TANSTACK, AI)
EACH = pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])


@dataclass(frozen=True)
class Asking:
    """The clients, with the service and its upstream."""

    clients: Clients
    upstream: Upstream
    url: str

    def __call__(self, client: Client, recording: Recording | None = None, **given: Any) -> tuple[str, Call]:
        """Return the name of this answer, and the call of a client that reads it."""
        name = next(NAMES)
        self.upstream.answer(client.of(name, recording), at=client.recording.path)
        return name, self.go(client.name, name, **given)

    def go(self, call: str, name: str, **given: Any) -> Call:
        return self.clients(call, **{"url": self.url, "thread": "t-1", "chat": name, "run": name, "id": name, **given})


@pytest.fixture
def ask(clients: Clients, upstream: Upstream, service: Service) -> Asking:
    return Asking(clients, upstream, relay_url(service))


# All of them


@EACH
def test_what_a_client_has_is_what_its_upstream_sent(ask: Asking, client: Client) -> None:
    name, call = ask(client)
    assert call.rest() == client.had(len(client.has), name)
    assert [(asked.method, asked.target) for asked in ask.upstream.asked] == [("POST", client.recording.path)]


@EACH
@pytest.mark.parametrize("how", ["broken", "in a frame", "ended", "its own error"])
def test_an_answer_that_failed_is_an_error_in_its_clients_own_form(ask: Asking, client: Client, how: str) -> None:
    whole = client.recording
    failed = {
        "broken": whole.broken(4),
        "in a frame": whole.broken(4, 9),
        "ended": whole.ended(4),
        "its own error": whole.ended(4, ERRORS[client.dialect]),
    }[how]
    name, call = ask(client, failed.held(4))
    had = client.had(4, name)
    assert call.hear(len(had)) == had
    ask.upstream.go_on()
    assert call.error() == ("overloaded" if how == "its own error" else "The upstream broke the answer off.")


@EACH
def test_refusals_are_what_the_upstream_says(ask: Asking, client: Client) -> None:
    for status in (401, 429):
        _, call = ask(client, plain(status, {"error": {"message": f"not you: {status}", "type": "t"}}), retries=0)
        assert str(status) in call.error()


def test_where_the_service_is_killed_its_clients_are_told(ask: Asking, service: Service, client: httpx.Client) -> None:
    calls = {reader.name: ask(reader, reader.recording.held(4)) for reader in CLIENTS}
    for reader in CLIENTS:
        name, call = calls[reader.name]
        had = reader.had(4, name)
        assert call.hear(len(had)) == had
    service.restart()
    restarted = "The service that recorded this answer was restarted in its middle."
    for reader in (LANGGRAPH_CLIENT, TANSTACK):  # which reconnect by themselves
        assert calls[reader.name][1].error() == restarted
    for reader in (CHAT_CLIENT, RESPONSES_CLIENT, AI):
        assert calls[reader.name][1].error() == TERMINATED
    name = calls[RESPONSES_CLIENT.name][0]
    rest = ask.go("openai retrieve", name, query={"starting_after": 1})
    assert rest.hear(2) == RESPONSES_CLIENT.had(4, name)[2:]
    assert rest.error() == restarted
    (response,) = ask.go("openai response", name).rest()
    assert (response["status"], response["error"]["message"]) == ("failed", restarted)
    name = calls[AI.name][0]
    wait_until(lambda: client.get(f"/threads/{name}").json()["messages"][0]["status"] == "aborted")
    assert ask.go("ai sdk resumed", name).error() == restarted
    assert len(ask.upstream.asked) == len(CLIENTS)


# OpenAI


def test_openai_chat_asked_again_under_its_name_is_the_same_answer(ask: Asking, cutter: Cutter) -> None:
    lossy = f"{cutter.url}/relay/up"
    for name, how in {"left": {"take": 3}, "cut": {"url": lossy}, "retried": {"url": lossy, "retries": 1}}.items():
        ask.upstream.forget()
        ask.upstream.answer(CHAT.held(4))
        named = {"headers": {"Resume-Message": name}}
        if "url" in how:
            cutter.cut(*((0, 0) if "retries" in how else (3, 9)))
        call = ask.go(CHAT_CLIENT.name, name, **named, **how)
        if name != "retried":
            assert call.hear(3) == CHAT_CLIENT.had(3)
            assert call.rest() == [] if name == "left" else call.error() == TERMINATED
            call = ask.go(CHAT_CLIENT.name, name, **named)
        assert call.hear(4) == CHAT_CLIENT.had(4)
        ask.upstream.go_on()
        assert call.rest() == CHAT_CLIENT.had(6)[4:]
        assert len(ask.upstream.asked) == 1


@pytest.mark.parametrize("how", ["left", "cut"])
def test_openai_responses_go_on_after_every_event(ask: Asking, cutter: Cutter, how: str) -> None:
    for after in range(1, len(RESPONSES.pieces)):
        if how == "cut":
            cutter.cut(after, 9)
        held = RESPONSES.held(after if how == "left" else after + 1)
        given = {"take": after} if how == "left" else {"url": f"{cutter.url}/relay/up"}
        name, call = ask(RESPONSES_CLIENT, held, **given)
        events = call.hear(after)
        assert call.rest() == [] if how == "left" else call.error() == TERMINATED
        rest = ask.go("openai retrieve", name, query={"starting_after": events[-1]["sequence_number"]})
        ask.upstream.go_on()
        assert events + rest.rest() == RESPONSES_CLIENT.had(10, name)
    assert len(ask.upstream.asked) == len(RESPONSES.pieces) - 1


def test_openais_stream_helper_begins_in_the_middle(ask: Asking) -> None:
    name, call = ask(RESPONSES_CLIENT, RESPONSES.held(5), take=5)
    assert len(call.rest()) == 5
    helper = ask.go("openai helper", name, query={"starting_after": 4})
    ask.upstream.go_on()
    *events, response = helper.rest()
    assert [event["sequence_number"] for event in events] == [5, 6, 7, 8, 9]
    assert (response["id"], response["output_text"]) == (name, "Hello")
    assert len(ask.upstream.asked) == 1


def test_openais_cancel_ends_the_answer_for_all(ask: Asking) -> None:
    name, call = ask(RESPONSES_CLIENT, RESPONSES.held(5))
    ask.upstream.answer(plain(404, {"error": {"message": "unknown"}}), at=f"{RESPONSES.path}/")
    assert call.hear(5) == RESPONSES_CLIENT.had(5, name)
    (response,) = ask.go("openai cancel", name).rest()
    assert (response["id"], response["status"]) == (name, "cancelled")
    wait_until(lambda: ask.upstream.left == 1, "the upstream's connection is closed")
    assert call.error() == "The answer was stopped: cancelled."


# LangGraph


def test_langgraph_goes_on_by_itself_wherever_it_is_cut(ask: Asking, service: Service) -> None:
    with ExitStack() as stack:
        cutters, calls = [], []
        for after, more in itertools.product(range(1, 5), (0, 9)):
            cutters.append(stack.enter_context(Cutter(service.port)))
            cutters[-1].cut(after, more)
            name = next(NAMES)
            ask.upstream.answer(LANGGRAPH_CLIENT.of(name), at=f"/threads/{name}/runs/stream")
            calls.append(ask.go("langgraph", name, url=f"{cutters[-1].url}/relay/up", thread=name))
        for call in calls:
            assert call.rest() == LANGGRAPH_CLIENT.had(6)
        assert all(cutter.connections >= 2 for cutter in cutters)
    assert [asked.method for asked in ask.upstream.asked] == ["POST"] * len(calls)


def test_langgraph_joins_a_run_from_its_start_and_cancels_it(ask: Asking) -> None:
    name, call = ask(LANGGRAPH_CLIENT, LANGGRAPH.held(4))
    had = LANGGRAPH_CLIENT.had(4)
    assert call.hear(3) == had
    joined = ask.go("langgraph join", name, after="-1")
    assert joined.hear(3) == had
    ask.upstream.answer(plain(202, {}), at=f"/threads/t-1/runs/{name}/cancel")
    assert ask.go("langgraph cancel", name).rest() == []
    for reader in (call, joined):
        assert reader.error() == "The answer was stopped: cancelled."
    wait_until(lambda: ask.upstream.left == 1, "the upstream's connection is closed")
    assert ask.upstream.asked[-1].target.startswith(f"/threads/t-1/runs/{name}/cancel?")


# TanStack AI


def test_tanstack_goes_on_by_itself_wherever_it_is_cut(ask: Asking, service: Service) -> None:
    ask.upstream.answer(AG_UI)
    with ExitStack() as stack:
        cutters, calls = [], []
        for after, more in itertools.product(range(1, 6), (0, 9)):
            cutters.append(stack.enter_context(Cutter(service.port)))
            cutters[-1].cut(after, more)
            calls.append(ask.go("tanstack", "", url=f"{cutters[-1].url}/relay/up"))
        for call in calls:
            assert call.rest() == ["Hel", "Hello"]
        assert all(cutter.connections >= 2 for cutter in cutters)
    assert len(ask.upstream.asked) == len(calls)


def test_tanstack_joins_a_run_from_its_start(ask: Asking) -> None:
    _, call = ask(TANSTACK, AG_UI.held(3))
    assert call.hear(1) == ["Hel"]
    joined = ask.go("tanstack joined", ask.upstream.asked[0].headers["x-run-id"])
    assert joined.hear(3) == ["", "", "Hel"]
    ask.upstream.go_on()
    assert call.rest() == ["Hello"]
    assert joined.rest() == ["lo", "", ""]
    assert len(ask.upstream.asked) == 1


def test_where_a_reader_stops_reading_its_answer_is_recorded_to_its_end(ask: Asking, client: httpx.Client) -> None:
    name = next(NAMES)
    _, call = ask(TANSTACK, AG_UI.held(3), headers={"Resume-Message": name}, take=3)
    assert call.rest() == ["Hel"]
    assert client.get(f"/threads/{name}").json()["messages"][0]["status"] == "active"
    ask.upstream.go_on()
    wait_until(lambda: client.get(f"/threads/{name}").json()["messages"][0]["status"] == "completed")
    assert ask.upstream.left == 0


# The AI SDK


@pytest.mark.parametrize("how", ["left", "cut"])
def test_ai_sdk_resumes_from_the_start(ask: Asking, cutter: Cutter, how: str) -> None:
    for after in (1, 4, 6):
        had = AI.had(after)
        if how == "cut":
            cutter.cut(after, 9)
        given = {"take": len(had)} if how == "left" else {"url": f"{cutter.url}/relay/up"}
        name, call = ask(AI, AI_SDK.held(after + 1), **given)
        assert call.hear(len(had)) == had
        assert call.rest() == [] if how == "left" else call.error() == TERMINATED
        resumed = ask.go("ai sdk resumed", name)
        assert resumed.hear(len(had)) == had
        ask.upstream.go_on()
        assert had + resumed.rest() == AI.had(len(AI.has))
        assert ask.go("ai sdk resumed", name).rest() == [NOTHING]
    assert len(ask.upstream.asked) == 3


def test_ai_sdk_is_not_troubled_by_a_chat_that_nobody_knows(ask: Asking) -> None:
    assert ask.go("ai sdk resumed", "never-heard-of").rest() == [NOTHING]
