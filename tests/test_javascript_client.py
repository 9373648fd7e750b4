"""The JavaScript client in Node: storing over crashes and stops, errors, retries, waiting."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import jwt
import pytest
from conftest import ROOT, Service, append, wait_until
from wire import api_client, message_path, serving

NODE = shutil.which("node")
if NODE is None:
    pytest.skip("Node is not installed (apt install nodejs)", allow_module_level=True)

SECRET = "correct horse battery staple, 32+"

# Each wait before a retry is a hundredth of its maximum.
IMPORTS = f"""
import {{ createInterface }} from "node:readline";
import {{ setTimeout as after }} from "node:timers/promises";
import {{ abortMessage, appendChunks, getAccumulatedContent, resumeStream, store }}
  from {json.dumps((ROOT / "static" / "resume-stream.js").as_uri())};
Math.random = () => 0.01;
"""

# What every script can use, besides `say`, which passes a value to the test.
HELPERS = """
const message = { baseUrl: given.url, threadId: "t", messageId: "m", ...given.options };
const told = (error) => ({
  name: error.name, status: error.status, message: error.message, problem: error.problem,
  errors: error.errors?.map(told),
});
const never = new Promise(() => {});

// Yields its pieces, then waits for `then`, and notes when it was returned.
class Source {
  constructor(pieces, then = () => never) {
    this.pieces = [...pieces];
    this.then = then;
    this.returned = new Promise((resolve) => { this.return = async () => { resolve(Date.now()); return {}; }; });
  }
  [Symbol.asyncIterator]() { return this; }
  async next() { return this.pieces.length ? { done: false, value: this.pieces.shift() } : this.then(); }
}
const outcome = (options) => store({ ...message, ...options }).then((appended) => ({ appended }), told);

// Return a fetch that gives these answers, one after the other.
const asked = [];
const stub = (...answers) => async (url, { method, body }) => {
  asked.push([method, new URL(url).search, body === undefined ? null : JSON.parse(body).length]);
  const answer = answers.shift() ?? [418];
  if (answer === "lost") throw new TypeError("fetch failed");
  const [status, members = {}, headers = {}] = answer;
  const appended = { threadId: "t", messageId: "m", seq: 0, chunkCount: 0, status: "active" };
  return new Response(JSON.stringify({ ...appended, ...members }), { status, headers });
};
"""

SCRIPT = """
const given = JSON.parse(process.argv[1]);
const say = (value) => console.log(JSON.stringify(value));
"""

# Runs scripts, each a line of JSON, and answers what each said and which timers it left behind.
HOST = """
for await (const line of createInterface({ input: process.stdin })) {
  const { code, given } = JSON.parse(line);
  const said = [];
  const say = (value) => said.push(value);
  const error = await eval(`(async () => {${code}})()`).catch((error) => error.stack);
  const timers = process.getActiveResourcesInfo().filter((name) => name === "Timeout");
  console.log(JSON.stringify({ said, error, timers }));
}
"""


def given_to(url: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"url": url, "options": given.pop("options", {}), **given}


class Script:
    """A script in its own Node process, for a test that acts while the script runs."""

    def __init__(self, code: str, url: str, **given: Any) -> None:
        program = IMPORTS + SCRIPT + HELPERS + code
        command = [NODE, "--input-type=module", "--eval", program, "--", json.dumps(given_to(url, given))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def hear(self) -> Any:
        """Return the next value that it says."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else pytest.fail(self.process.stderr.read())

    def end(self) -> list[Any]:
        """Wait until it ends by itself, and return what it said."""
        out, errors = self.process.communicate(timeout=60)
        assert (self.process.returncode, errors) == (0, "")
        return [json.loads(line) for line in out.split("\n") if line]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Return a function that runs a script and returns the one value that it says. One process runs all scripts."""
    command = [NODE, "--input-type=module", "--eval", IMPORTS + HOST]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as host:

        def run(code: str, url: str, **given: Any) -> Any:
            host.stdin.write(json.dumps({"code": HELPERS + code, "given": given_to(url, given)}) + "\n")
            answer = json.loads(host.stdout.readline())
            assert answer.get("error") is None, answer["error"]
            assert answer["timers"] == [], "it would keep its process alive"
            (said,) = answer["said"]
            return said

        yield run
        host.kill()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("node"), "--max-chunk", "1KiB") as service:
        yield service


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("secured"), "--secret", SECRET) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with api_client(service) as client:
        yield client
        for thread in client.get("/threads").json()["threads"]:
            client.delete(f"/threads/{thread['threadId']}")


def message_of(client: httpx.Client) -> dict[str, Any]:
    return client.get("/threads/t").json()["messages"][0]


def chunks_of(client: httpx.Client) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    query: dict[str, str] = {}
    while chunks := (page := client.get("/threads/t/chunks", params=query).json())["chunks"]:
        found += [(chunk["content"], chunk.get("event")) for chunk in chunks]
        query = {"after": page["cursor"]}
    return found


# Crashes and stops


def recorded_answer(count: int) -> list[str | dict[str, str]]:
    """Return pieces like those of a model: of any script, parts of graphemes, and empty ones."""
    dice = random.Random(5)
    kinds = [
        "",
        "\n",
        "\r\n",
        " the",
        "ünï",
        "太陽",
        "👩\u200d🚀",
        "🇪🇺",
        "e\u0301",
        "\u05e9\u05dc",
        '"\\',
        "\u2028",
        "\0",
    ]
    pieces: list[str | dict[str, str]] = [f"{dice.choice(kinds)}{dice.choice(kinds)}" for _ in range(count)]
    for place in range(0, count, 97):
        pieces[place] = {"content": f'{{"call":{place}}}', "event": "tool_call"}
    return pieces


STORE = """
import { readFileSync } from "node:fs";
const pieces = JSON.parse(readFileSync(given.file, "utf8"));
let failures = 0;
const onConnection = ({ connected }) => connected || failures++;
async function* source() {
  for (const [place, piece] of pieces.entries()) {
    if (place % 4 === 0) await after(1);
    yield piece;
  }
}
const appended = await store({ ...message, source: source(), onConnection, maxPending: 100 });
say({ appended, failures });
"""

READ = """
let text = "", chunks = 0, failures = 0, resets = 0, last;
const onConnection = ({ connected }) => connected || failures++;
for await (const item of resumeStream({ ...message, wait: true, onConnection })) {
  last = item;
  if (item.type === "chunk") { text += item.content; chunks++; }
  if (item.type === "reset") resets++;
}
say({ text, chunks, failures, resets, last });
"""


DEATHS = int(os.environ.get("DEATHS", "3"))  # of the service, each third one a clean stop; DEATHS=15 tries it at length


def test_nothing_is_lost_or_doubled_while_the_service_dies(tmp_path: Path) -> None:
    count = 250 * (DEATHS + 1)
    pieces = recorded_answer(count)
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(pieces))
    with serving(tmp_path) as service, Script(READ, service.url) as reader:
        with Script(STORE, service.url, file=str(file)) as producer:
            for number in range(1, DEATHS + 1):
                with api_client(service) as client:
                    wait_until(lambda: client.get("/threads/t").json().get("chunkCount", 0) >= 250 * number)  # noqa: B023
                if number % 3:
                    service.kill()
                else:
                    service.end()
                service.start()
            (stored,) = producer.end()
        (read,) = reader.end()
        with api_client(service) as client:
            held = chunks_of(client)
            content = client.get("/threads/t/content").json()
    wanted = [(piece, None) if isinstance(piece, str) else (piece["content"], piece["event"]) for piece in pieces]
    text = "".join(content for content, _ in wanted)
    assert held == wanted
    assert (content["content"], content["status"]) == (text, "completed")
    assert (stored["appended"]["status"], stored["appended"]["chunkCount"]) == ("completed", count)
    assert read["text"] == text
    assert (read["chunks"], read["resets"], read["last"]["status"]) == (count, 0, "completed")
    assert stored["failures"] >= DEATHS, "each death of the service came while something was to be stored"
    assert read["failures"] >= DEATHS // 2


# What ends it


def test_source_of_any_kind_is_stored_and_completed(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    code = """
    const answers = [];
    async function* generated() { yield "a"; yield { content: "b", event: "tool" }; yield ""; }
    const sources = [["a", { content: "b", event: "tool" }, ""], generated(), () => generated(), new Set(["a"]), []];
    for (const [number, source] of sources.entries()) {
      const messageId = `m${number}`;
      const { status, chunkCount } = await store({ ...message, messageId, source });
      const { content } = await getAccumulatedContent({ ...message, messageId });
      answers.push([status, chunkCount, content]);
    }
    say(answers);
    """
    assert run(code, service.url) == [
        ["completed", 3, "ab"],
        ["completed", 3, "ab"],
        ["completed", 3, "ab"],
        ["completed", 1, "a"],
        ["completed", 0, ""],
    ]
    assert chunks_of(client)[:3] == [("a", None), ("b", "tool"), ("", None)]


def test_source_that_throws_aborts_and_is_thrown_on(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    code = """
    class ModelError extends Error { name = "ModelError"; }
    async function* source() { yield "one "; yield "two"; throw new ModelError("secret"); }
    say(told(await store({ ...message, source: source() }).catch((error) => error)));
    """
    error = run(code, service.url)
    assert (error["name"], error["message"]) == ("ModelError", "secret")
    assert (message_of(client)["status"], message_of(client)["reason"]) == ("aborted", "ModelError")
    assert chunks_of(client) == [("one ", None), ("two", None)], "what it gave before is stored"


def test_source_that_gives_no_text_aborts_and_is_returned(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    code = """
    const source = new Source(["one", 2]);
    const error = await outcome({ source });
    say({ error, returned: await source.returned > 0 });
    """
    said = run(code, service.url)
    assert (said["error"]["name"], said["returned"]) == ("TypeError", True)
    assert message_of(client)["reason"] == "TypeError"


@pytest.mark.parametrize("scope", ["read write", "write"])
def test_outside_abort_stops_an_idle_source_within_a_second(
    run: Callable[..., Any], secured: Service, thread: str, scope: str
) -> None:
    code = """
    const source = new Source(["one "]);
    const telling = outcome({ source });
    for await (const item of resumeStream({ ...message, token: given.admin, wait: true })) if (item.content) break;
    await after(given.quiet); // the source is idle for longer than it takes to begin to watch
    const stopped = Date.now();
    await abortMessage({ ...message, token: given.admin, reason: "enough" });
    const took = (await source.returned) - stopped;
    say({ took, error: await telling });
    """
    admin = make_token("read abort")
    options = {"threadId": thread, "token": make_token(scope)}
    said = run(code, secured.url, options=options, admin=admin, quiet=400)
    assert said["took"] < 1000
    error = said["error"]
    assert (error["name"], error["status"]) == ("ResumeStreamError", 409)
    assert (error["problem"]["messageStatus"], error["problem"]["reason"]) == ("aborted", "enough")
    assert "aborted (enough)" in error["message"]


def test_function_that_gives_the_source_is_told_to_stop(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    code = """
    let stopped;
    async function* source(signal) {
      yield "one";
      await new Promise((resolve, reject) => signal.addEventListener("abort", () => reject(stopped = signal.reason)));
    }
    const telling = store({ ...message, source }).catch(told);
    for await (const item of resumeStream({ ...message, wait: true })) if (item.content) break;
    await abortMessage({ ...message, reason: "enough" });
    say([await telling, told(stopped)]);
    """
    error, stopped = run(code, service.url)
    assert error == stopped
    assert error["status"] == 409


def test_signal_ends_it_at_once_and_aborts_the_message(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    code = """
    const controller = new AbortController();
    const source = new Source(["one"]);
    const telling = outcome({ source, signal: controller.signal });
    for await (const item of resumeStream({ ...message, wait: true })) if (item.content) break;
    controller.abort();
    await source.returned;
    const late = new Source(["one"]);
    const before = await outcome({ source: late, messageId: "late", signal: controller.signal });
    await late.returned;
    say([await telling, before]);
    """
    assert [error["name"] for error in run(code, service.url)] == ["AbortError", "AbortError"]
    assert [(message["messageId"], message["reason"]) for message in client.get("/threads/t").json()["messages"]] == [
        ("m", "AbortError")
    ]


def test_signal_ends_it_while_the_service_is_down(run: Callable[..., Any]) -> None:
    code = """
    const controller = new AbortController();
    const source = new Source(["one"]);
    const onConnection = ({ connected }) => connected || controller.abort(new RangeError("enough"));
    const error = await outcome({ source, signal: controller.signal, onConnection });
    say({ error, returned: await source.returned > 0 });
    """
    said = run(code, "http://127.0.0.1:9")
    assert (said["error"]["name"], said["returned"]) == ("RangeError", True)


def test_source_that_fails_where_aborting_is_refused_has_both_errors(run: Callable[..., Any], service: Service) -> None:
    code = """
    async function* source() { throw new RangeError("no"); }
    const storing = store({ ...message, source: source(), fetch: stub([201], [503], [403, { detail: "Not you." }]) });
    say(told(await storing.catch((error) => error)));
    """
    error = run(code, service.url)
    assert (error["name"], error["message"]) == (
        "AggregateError",
        "RangeError: no; and then: ResumeStreamError: Not you.",
    )
    assert [(inner["name"], inner.get("status")) for inner in error["errors"]] == [
        ("RangeError", None),
        ("ResumeStreamError", 403),
    ]


# Two producers, and messages that exist


def test_second_producer_is_told_and_does_no_harm(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "one ", "two ")
    code = """
    const source = new Source(["uno "]);
    const error = await outcome({ source });
    const failing = new Source([], async () => { throw new RangeError("no"); });
    say({ error, returned: await source.returned > 0, failing: await outcome({ source: failing }) });
    """
    said = run(code, service.url)
    assert (said["error"]["status"], said["returned"]) == (409, True)
    assert "another producer" in said["error"]["message"]
    assert said["failing"]["name"] == "RangeError"
    assert message_of(client)["status"] == "active"
    assert append(client, "t", "m", "three", index=2, complete=True).status_code == 201


def test_producer_that_was_started_again_goes_on_after_what_it_stored(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "one ", "two ")
    said = run('say(await store({ ...message, source: ["one ", "two ", "three"] }));', service.url)
    assert (said["status"], said["chunkCount"]) == ("completed", 3)
    assert [content for content, _ in chunks_of(client)] == ["one ", "two ", "three"]


@pytest.mark.parametrize("source", [["one"], []], ids=["same", "empty"])
@pytest.mark.parametrize("end", ["complete", "abort"])
def test_message_that_has_ended_is_an_error(
    run: Callable[..., Any], service: Service, client: httpx.Client, source: list[str], end: str
) -> None:
    append(client, "t", "m", *source)
    client.put("/threads/t/messages/m")
    client.post(message_path("t", "m", end))
    code = "say(await store({ ...message, source: given.source }).catch(told));"
    error = run(code, service.url, source=source)
    status = {"complete": "completed", "abort": "aborted"}[end]
    assert (error["name"], error["status"], error["problem"]["messageStatus"]) == ("ResumeStreamError", 409, status)


def test_source_shorter_than_what_is_there_does_not_complete_it(
    run: Callable[..., Any], service: Service, client: httpx.Client
) -> None:
    append(client, "t", "m", "one ", "two ")
    error = run('say(await store({ ...message, source: ["one "] }).catch(told));', service.url)
    assert error["status"] == 409
    assert message_of(client)["status"] == "active"


def test_message_that_is_cleared_meanwhile_is_an_error(service: Service, client: httpx.Client) -> None:
    code = """
    const source = new Source(["one"]);
    const telling = outcome({ source });
    for await (const item of resumeStream({ ...message, wait: true })) if (item.content) break;
    say("stored");
    say(await telling);
    """
    with Script(code, service.url) as script:
        assert script.hear() == "stored"
        client.delete("/threads/t")
        error = script.hear()
    assert error["status"] == 409
    assert "cleared" in error["message"]
    assert client.get("/threads/t").status_code == 404, "and is not made again"


# What is refused, and what is retried


def make_token(scope: str) -> str:
    """Return a token like those of ``resume-stream token``."""
    return jwt.encode({"scope": scope, "exp": int(time.time()) + 3600}, SECRET, "HS256")


def test_token_that_is_refused_is_an_error_at_once(run: Callable[..., Any], secured: Service) -> None:
    code = """
    const tokens = ["old", given.writer];
    const token = async () => tokens.shift() ?? given.writer;
    const renewed = await outcome({ messageId: "renewed", source: ["one"], token });
    const refused = [];
    for (const token of [undefined, "x.y.z", () => "x.y.z", given.reader]) {
      refused.push((await outcome({ source: new Source(["one"]), token })).status);
    }
    say({ renewed, refused });
    """
    said = run(code, secured.url, writer=make_token("write"), reader=make_token("read"))
    assert said["renewed"]["appended"]["status"] == "completed"
    assert said["refused"] == [401, 401, 401, 403]


@pytest.mark.parametrize(
    ("piece", "status", "reason"),
    [
        ("x" * 2000, 413, "Over a limit"),
        ("\ud83d", 422, "Invalid content"),
        ({"content": "", "event": "gone"}, 422, None),
    ],
    ids=["too large", "half a pair", "reserved event"],
)
def test_chunk_that_cannot_be_stored_is_an_error_at_once_and_aborts(
    run: Callable[..., Any], service: Service, client: httpx.Client, piece: Any, status: int, reason: str | None
) -> None:
    code = "say(await outcome({ source: new Source(['one', ...given.pieces]) }));"
    assert run(code, service.url, pieces=[piece])["status"] == status
    assert message_of(client)["status"] == "aborted"
    assert message_of(client)["reason"] == (reason or "Invalid content")


def test_wrong_address_is_an_error_at_once(run: Callable[..., Any], service: Service, client: httpx.Client) -> None:
    code = "say(await outcome({ source: ['one'], baseUrl: `${given.url}/nowhere` }));"
    assert run(code, service.url)["status"] == 404


def test_bad_use_is_a_type_error(run: Callable[..., Any], service: Service) -> None:
    code = """
    const bad = [
      { threadId: "" }, { messageId: 3 }, { source: undefined }, { source: null }, { source: "text" }, { source: {} },
      { signal: "stop" }, { maxPending: 0 }, { maxPendingBytes: NaN }, { keepAlive: -1 }, { baseUrl: "ftp://x" },
    ];
    const names = [];
    for (const options of bad) names.push((await outcome({ source: ["one"], ...options })).name);
    say(names);
    """
    assert run(code, service.url) == ["TypeError"] * 11


def test_retries_what_was_lost_and_what_was_busy_as_long_as_it_is_told(
    run: Callable[..., Any], service: Service
) -> None:
    code = """
    const delays = [];
    const onConnection = (event) => delays.push(event.connected || Math.round(event.delay));
    const fetch = stub("lost", [503], [201], "lost", [500], [503, {}, { "Retry-After": "1" }], [201], [201]);
    await store({ ...message, source: ["one", "two"], fetch, onConnection });
    say({ asked, delays });
    """
    said = run(code, service.url)
    assert said["delays"] == [10, 20, True, 10, 20, 1040, True]
    assert said["asked"] == [
        *[["PUT", "", None]] * 3,
        *[["POST", "?index=0", 1]] * 4,
        ["POST", "?index=1&complete=true", 1],
    ]


def test_batches_what_waits_and_pulls_no_more_than_fits(run: Callable[..., Any], service: Service) -> None:
    code = """
    let release, pulled = 0;
    const bodies = [];
    const held = new Promise((resolve) => { release = resolve; });
    const fetch = async (url, { method, body }) => {
      if (method === "POST") bodies.push(JSON.parse(body).map(({ content }) => content).join(""));
      if (bodies.length === 1) await held;
      return new Response(JSON.stringify({ seq: 1, chunkCount: 0, status: "active" }), { status: 201 });
    };
    function* source() { for (const piece of given.pieces) { pulled++; yield piece; } }
    const storing = store({ ...message, source: source(), fetch, ...given.window });
    while (bodies.length === 0 || pulled < given.most) await after(1);
    for (let turn = 0; turn < 100; turn++) await null;
    const most = pulled;
    release();
    await storing;
    say({ most, bodies: bodies.filter((body) => body !== "") });
    """
    by_count = run(code, service.url, pieces=list("abcdefg"), window={"maxPending": 3}, most=3)
    assert by_count["most"] == 3
    assert "".join(by_count["bodies"]) == "abcdefg"
    assert by_count["bodies"][:2] == ["a", "bc"], "what waited while one append was under way went into the next"
    assert max(map(len, by_count["bodies"])) <= 3
    by_bytes = run(code, service.url, pieces=["é" * 5] * 6, window={"maxPendingBytes": 15}, most=2)
    assert by_bytes["most"] == 2
    assert "".join(by_bytes["bodies"]) == "é" * 30


def test_quiet_source_gives_signs_of_life(service: Service, client: httpx.Client) -> None:
    code = "await store({ ...message, source: new Source(['one']), keepAlive: 100 });"
    with Script(code, service.url):
        wait_until(lambda: client.get("/threads/t").json().get("chunkCount"), "the chunk")
        for _ in range(2):
            seen = message_of(client)["updatedAt"]
            wait_until(lambda: message_of(client)["updatedAt"] > seen, "a sign of life")  # noqa: B023
        assert chunks_of(client) == [("one", None)]


# Waiting


@pytest.mark.parametrize("known", [None, ""])
def test_reader_waits_for_a_message_not_made_yet(service: Service, client: httpx.Client, known: str | None) -> None:
    code = """
    let text = "";
    const fetch = async (url, options) => {
      const response = await globalThis.fetch(url, options);
      if (text === "") say([new URL(url).search, response.status]);
      return response;
    };
    const knownContent = given.known ?? undefined;
    const items = resumeStream({ ...message, knownContent, wait: true, fetch });
    for await (const item of items) text += item.content ?? item.status;
    say(text);
    """
    with Script(code, service.url, known=known) as reader:
        assert reader.hear()[0] == "?follow=true"
        append(client, "t", "other", "not this", complete=True)
        append(client, "t", "m", "this", complete=True)
        *_, text = reader.end()
    assert text == "thiscompleted"


@pytest.mark.parametrize("address", ["", "/nowhere"], ids=["no waiting", "wrong address"])
def test_reader_that_has_nothing_to_wait_for_is_told_at_once(
    run: Callable[..., Any], service: Service, client: httpx.Client, address: str
) -> None:
    options = {"baseUrl": service.url + address, "wait": address != ""}
    code = "try { for await (const item of resumeStream(message)) say(item); } catch (error) { say(told(error)); }"
    assert run(code, service.url, options=options)["status"] == 404
