"""Bad input of every kind: it causes no 500 and no hang, and a refusal changes no state."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
from conftest import Service
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from .base import BROKEN_LINK, Answer, Link, Verdict, append, call, message_path, thread_path

FLAGS = ("--idle-timeout", "50ms", "--max-chunk", "200", "--max-body", "4KiB", "--max-message", "20KiB")
REFUSALS = {400, 404, 405, 409, 410, 413, 415, 422}
QUICK = 5.0  # seconds within which every request is answered

text = st.text(st.characters(), max_size=30)
numbers = st.one_of(st.integers(-3, 3), st.integers(), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
contents = st.one_of(text, st.text(min_size=150, max_size=250), st.just("\x00"), st.just("\ud800"))
chunks = st.one_of(
    st.fixed_dictionaries({"content": contents}),
    st.fixed_dictionaries({"content": contents}, optional={"event": st.one_of(text, st.just("complete"), st.none())}),
    st.dictionaries(st.sampled_from(["content", "event", "other"]), values, max_size=3),
    values,
)
json_bytes = st.builds(
    lambda value, plain: json.dumps(value, ensure_ascii=plain).encode("utf-8", "surrogatepass"), chunks, st.booleans()
)
lines = st.lists(st.one_of(json_bytes, json_bytes, st.binary(max_size=20), st.just(b"")), max_size=6)
cursors = st.one_of(
    st.from_regex(r"[0-9]{0,22}-?[0-9]{0,22}", fullmatch=True),
    text,
    st.sampled_from(["0", "-1", "1-1", "\uff19", "+1", "1e3"]),
)
durations = st.one_of(st.from_regex(r"[0-9.]{1,5}(ms|s|m|h|d)?", fullmatch=True), text, st.just("nan"), st.just("inf"))
names = st.one_of(
    st.binary(min_size=1, max_size=20), st.text(min_size=1, max_size=220).map(lambda t: t.encode(errors="replace"))
)
ids = st.one_of(st.integers(), text, values)


def queries(*parameters: str) -> st.SearchStrategy[str]:
    """Return queries with some of the parameters, perhaps twice, and likely and unlikely values."""
    value = st.one_of(numbers.map(str), cursors, durations, st.sampled_from(["true", "active", "False", ""]))
    pairs = st.lists(st.tuples(st.sampled_from(parameters), value), max_size=4)
    return pairs.map(lambda pairs: "&".join(f"{n}={quote_from_bytes(v.encode(errors='replace'))}" for n, v in pairs))


class Fuzzer:
    """A service with a canary: a thread that nothing may change."""

    def __init__(self, verdict: Verdict, service: Service, examples: int) -> None:
        self.verdict, self.service, self.examples = verdict, service, examples
        self.runner = asyncio.Runner()
        self.thread = "canary"
        self.state = b""
        self.number = 0

    async def canary(self) -> bytes:
        return (await call(self.service.port, "GET", "/api/threads/canary/chunks")).body

    def try_all(self, attack: Callable[..., Awaitable[None]], **strategies: st.SearchStrategy[Any]) -> None:
        """Run one kind of attack, and report the smallest input that breaks something."""

        async def one(arguments: dict[str, Any]) -> None:
            async with asyncio.timeout(QUICK):
                await attack(self, **arguments)
            assert await self.canary() == self.state, "the canary has changed"

        @settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            derandomize=self.examples < 100,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        def attempt(**arguments: Any) -> None:
            self.verdict.tried += 1
            self.number += 1
            self.thread = f"t{self.number}"
            self.runner.run(one(arguments))
            self.verdict.survived += 1

        try:
            attempt()
        except BaseExceptionGroup as group:
            for error in group.exceptions:
                self.told(attack, error)
        except Exception as error:
            self.told(attack, error)

    def told(self, attack: Callable[..., Awaitable[None]], error: BaseException) -> None:
        example = " ".join(getattr(error, "__notes__", []))[:300]
        self.verdict.fail(f"{attack.__name__}: {type(error).__name__} {str(error)[:300]} {example}")

    async def stored(self) -> list[str]:
        answer = await call(self.service.port, "GET", thread_path(self.thread, "/chunks?limit=10000"))
        return [chunk["content"] for chunk in answer.json["chunks"]] if answer.status == 200 else []


UNREAD = Answer(400, {"content-type": "application/problem+json"}, b'{"detail": "not read"}')


def expect_clear(answer: Answer) -> None:
    """Check that the answer is no server error, and that a refusal says what is wrong."""
    refused = answer.status in REFUSALS and (answer.is_problem or b'"detail"' in answer.body)
    assert answer.status in (200, 201, 204) or refused, (answer.status, answer.body[:300])


async def upload(fuzzer: Fuzzer, kind: str, body: bytes, cut: int, query: str = "") -> Answer:
    path = message_path(fuzzer.thread, "m", f"chunks?{query}")
    async with Link.to(fuzzer.service.port) as link:
        link.send_head("POST", path, {"Content-Type": kind, "Transfer-Encoding": "chunked"})
        with contextlib.suppress(OSError):  # it may answer and close before the end
            for start in range(0, len(body), cut):
                await link.send_piece(body[start : start + cut])
            await link.send_piece(b"")
        try:
            return await link.answer()
        except BROKEN_LINK:  # TCP may drop the answer to a client that still sends
            return UNREAD


async def bad_json(fuzzer: Fuzzer, body: bytes, query: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await call(fuzzer.service.port, "POST", message_path(fuzzer.thread, "m", f"chunks?{query}"), body, headers)
    expect_clear(answer)
    if answer.status >= 400:
        status = await call(fuzzer.service.port, "GET", thread_path(fuzzer.thread))
        assert status.status == 404, "a refused body made a thread"


async def bad_ndjson(fuzzer: Fuzzer, rows: list[bytes], cut: int) -> None:
    answer = await upload(fuzzer, "application/x-ndjson", b"\n".join(rows), cut)
    expect_clear(answer)
    stored, sent = await fuzzer.stored(), []
    for row in b"\n".join(rows).split(b"\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            sent.append(json.loads(row)["content"])
    assert stored == sent[: len(stored)], f"stored {stored}"
    assert answer.status >= 400 or stored == sent, f"answered {answer.status}, and stored {stored}"


async def bad_text(fuzzer: Fuzzer, body: bytes, cut: int) -> None:
    answer = await upload(fuzzer, "text/plain", body, cut)
    expect_clear(answer)
    stored = "".join(await fuzzer.stored())
    assert body.startswith(stored.encode()), f"stored {stored!r}"
    assert answer.status >= 400 or body == stored.encode(), f"answered {answer.status}, and stored {stored!r}"


async def bad_type(fuzzer: Fuzzer, kind: str, body: bytes) -> None:
    headers = {"Content-Type": kind} if kind.isprintable() and kind.isascii() else {}
    expect_clear(await call(fuzzer.service.port, "POST", message_path(fuzzer.thread, "m"), body, headers))


async def bad_read(fuzzer: Fuzzer, path: str, query: str, last_event_id: bytes) -> None:
    async with Link.to(fuzzer.service.port) as link:
        head = f"GET /api/threads{path}?{query} HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: "
        link.writer.write(head.encode() + last_event_id + b"\r\n\r\n")
        status = await link.read_head()
        if "/stream" not in path and "wait=" not in query:
            expect_clear(Answer(status, link.headers, b"".join([piece async for piece in link.pieces()])))
        assert status < 500, status


async def bad_name(fuzzer: Fuzzer, method: str, name: bytes, path: str) -> None:
    target = path.replace("NAME", quote_from_bytes(name, safe=""))
    answer = await call(fuzzer.service.port, method, target)
    assert answer.status < 500, (answer.status, answer.body[:200])


async def bad_call(fuzzer: Fuzzer, path: str, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await call(fuzzer.service.port, "POST", f"/api/{path}", data)
    assert answer.status in (200, 204) or (answer.status in REFUSALS and answer.is_problem), (
        answer.status,
        answer.body,
    )


async def bad_request(fuzzer: Fuzzer, data: bytes) -> None:
    async with Link.to(fuzzer.service.port) as link:
        with contextlib.suppress(*BROKEN_LINK):
            link.writer.write(data)
            link.writer.write_eof()
            answer = await link.reader.read()
            assert not answer.startswith(b"HTTP/1.1 5"), answer[:200]


async def bad_frames(fuzzer: Fuzzer, frames: list[Any]) -> None:
    """Check that each frame is answered. A binary frame may close the connection, with a code that says why."""
    async with connect(f"ws://127.0.0.1:{fuzzer.service.port}/api/ws", close_timeout=0) as ws:
        try:
            for content in frames:
                await ws.send(content if isinstance(content, bytes) else json.dumps(content))
                told = json.loads(await ws.recv())
                assert told["type"] != "error" or (told["status"] in REFUSALS and told["detail"]), told
            await ws.send('{"type": "unsubscribe", "id": "the last"}')
            while (told := json.loads(await ws.recv())).get("id") != "the last":
                assert told["type"] != "error" or told["status"] in REFUSALS, told
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else None
            assert code in (1000, 1003, 1007, 1009), f"closed with {code}"


READS = ("/canary/stream", "/canary/messages/m/stream", "/canary/chunks", "/canary/content", "/canary", "", "/x/stream")
PARAMETERS = ("after", "limit", "wait", "message_id", "idle_timeout", "poll_interval", "follow", "status", "cursor")
NAMED = ("/api/threads/NAME", "/api/threads/NAME/content", "/api/threads/x/messages/NAME", "/NAME", "/static/NAME")
own_frames = st.fixed_dictionaries(
    {"type": st.sampled_from(["subscribe", "unsubscribe", "append", "abort", "other"]), "id": ids},
    optional={
        "thread_id": st.one_of(st.sampled_from(["canary", "x"]), values),
        "message_id": st.one_of(st.sampled_from(["no such", "y"]), values),
        "chunks": st.one_of(st.lists(chunks, max_size=2), values),
        "after": st.one_of(cursors, values),
        "known_content": st.one_of(text, values),
        "index": numbers,
        "idle_timeout": st.one_of(durations, values),
        "poll_interval": st.one_of(durations, values),
        "reason": values,
        "follow": values,
        "complete": values,
    },
)
bodies = {
    name: st.one_of(st.fixed_dictionaries({}, optional=fields), values, st.binary(max_size=30))
    for name, fields in {
        "resume-stream": {
            "thread_id": st.one_of(st.sampled_from(["canary", "x"]), values),
            "message_id": st.one_of(st.just("m"), values),
            "known_content": contents,
            "after": st.one_of(cursors, numbers),
            "poll_interval": st.one_of(durations, numbers),
            "idle_timeout": st.sampled_from([0.1, "10ms", "x", -1]),
        },
        "threads/canary/messages/none/abort": {"reason": st.one_of(contents, values)},
        "threads/canary/tokens": {"scope": st.one_of(text, values), "expires_in": st.one_of(durations, numbers)},
    }.items()
}


def survive_fuzzing(folder: Path, *, examples: int) -> Verdict:
    verdict = Verdict("bad input (Hypothesis)")
    with Service(folder / "fuzz.db", *FLAGS) as service:
        fuzzer = Fuzzer(verdict, service, examples)
        with fuzzer.runner:
            fuzzer.runner.run(append(service.port, "canary", "m", "0~ the canary", "1~ sings"))
            fuzzer.state = fuzzer.runner.run(fuzzer.canary())
            cuts = st.sampled_from([1, 2, 3, 7, 1000])
            upload_query = queries("index", "complete", "other")
            fuzzer.try_all(bad_json, body=st.one_of(json_bytes, st.binary(max_size=40)), query=upload_query)
            fuzzer.try_all(bad_ndjson, rows=lines, cut=cuts)
            fuzzer.try_all(
                bad_text,
                body=st.one_of(st.binary(max_size=60), text.map(lambda t: t.encode(errors="replace"))),
                cut=cuts,
            )
            kinds = st.one_of(
                text, st.from_regex(r"[a-z/;=\-\" ]{0,40}", fullmatch=True), st.just("text/plain; charset=x")
            )
            fuzzer.try_all(bad_type, kind=kinds, body=st.binary(max_size=20))
            header = st.one_of(cursors.map(lambda t: re.sub(rb"[\x00-\x1f\x7f]", b"", t.encode(errors="replace"))))
            fuzzer.try_all(bad_read, path=st.sampled_from(READS), query=queries(*PARAMETERS), last_event_id=header)
            methods = st.sampled_from(["GET", "PUT", "DELETE", "POST", "OPTIONS", "PATCH"])
            names_but_canary = names.filter(lambda name: name != b"canary")
            fuzzer.try_all(bad_name, method=methods, name=names_but_canary, path=st.sampled_from(NAMED))
            for path, body in bodies.items():
                fuzzer.try_all(bad_call, path=st.just(path), body=body)
            fuzzer.try_all(
                bad_request,
                data=st.one_of(
                    st.binary(max_size=200), st.binary(max_size=60).map(b"GET /api/threads HTTP/1.1\r\n".__add__)
                ),
            )
            frame = st.one_of(own_frames, own_frames, values, st.binary(max_size=20))
            no_canary = frame.filter(
                lambda f: (
                    not (
                        isinstance(f, dict) and f.get("type") in ("append", "abort") and f.get("thread_id") == "canary"
                    )
                )
            )
            fuzzer.try_all(bad_frames, frames=st.lists(no_canary, max_size=4))
        verdict.expect(service.is_running, "the service died")
        verdict.expect(not service.tracebacks(), f"{service.tracebacks()} tracebacks in the log")
        verdict.expect(service.end() == 0, "it did not end with 0")
    return verdict


def why_no_schemathesis() -> str:
    return "" if importlib.util.find_spec("schemathesis") else "schemathesis is not installed"


def as_schemathesis_can(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the document without what Schemathesis cannot make or would misunderstand."""
    for methods in schema["paths"].values():
        for operation in methods.values():
            # The raw format's bodies are broken off on purpose, and Schemathesis would wait for the end of a stream
            # for as long an idle_timeout as it made up.
            operation["parameters"] = [
                p for p in operation.get("parameters", []) if p["name"] not in ("format", "idle_timeout")
            ]
            bodies = operation.get("requestBody", {}).get("content", {})
            for kind in bodies.keys() - {"application/json"}:
                del bodies[kind]
            for answer in operation["responses"].values():
                # This schema is of the whole stream, and Schemathesis would apply it to each event.
                answer.get("content", {}).get("text/event-stream", {}).pop("schema", None)
    return schema


def survive_schemathesis(folder: Path, *, examples: int, phases: str = "examples,coverage,fuzzing") -> Verdict:
    """Try Schemathesis with the service's OpenAPI document: every answer is one that the document describes."""
    verdict = Verdict("bad input (Schemathesis)")
    conformance = ",".join(f"{kind}_conformance" for kind in ("status_code", "content_type", "response_schema"))
    checks = f"not_a_server_error,{conformance},response_headers_conformance"
    with Service(folder / "schema.db", *FLAGS) as service:
        base = f"http://127.0.0.1:{service.port}"
        document = folder / "openapi.json"
        document.write_text(json.dumps(as_schemathesis_can(httpx.get(f"{base}/schema/openapi.json").json())))
        options = ["--max-examples", str(examples), "--checks", checks, "--phases", phases]
        options += ["--request-timeout", "10"]
        options += ["--url", base, "--seed", "1", "--no-color"]
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(document), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        report = done.stdout + done.stderr
        if found := re.search(r"(\d+) generated", report):
            verdict.tried = int(found[1])
        failed = re.search(r"(\d+) found (\d+) unique failures", report)
        verdict.survived = verdict.tried - (int(failed[1]) if failed else 0)
        verdict.expect(done.returncode == 0 and verdict.tried, report[-3000:])
        verdict.expect(service.is_running and not service.tracebacks(), f"{service.tracebacks()} tracebacks in the log")
    return verdict
