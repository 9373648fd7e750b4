"""The OpenAPI document: valid, true, and enough to generate a client from."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import httpx
import pytest
from conftest import TIMEOUT, Service, append
from wire import problem, shared_service

service = shared_service("--idle-timeout", "200ms")

METHODS = {"get", "put", "post", "delete"}


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return httpx.get(f"{service.url}/schema/openapi.json").json()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {call["operationId"]: call for path in document["paths"].values() for call in path.values()}


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from nodes(child)


def resolved(document: dict[str, Any], reference: str) -> Any:
    node: Any = document
    for key in reference.removeprefix("#/").split("/"):
        node = node[key]
    return node


def test_every_reference_is_there(document: dict[str, Any]) -> None:
    references = {node["$ref"] for node in nodes(document) if "$ref" in node}
    assert {resolved(document, reference) is not None for reference in references} == {True}
    named = {
        f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in document["components"][kind]
    }
    assert {"Chunk", "AbortBody", "ResumeBody", "TokenBody", "Problem"} <= document["components"]["schemas"].keys()
    assert named - references == set(), "nothing refers to it"


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    validator.validate(document)


def test_every_call_says_who_it_is_for_and_what_it_may_answer(document: dict[str, Any]) -> None:
    calls = operations(document)
    assert {"openMessage", "appendChunks", "streamMessage", "resumeStream", "clearThreadBuffer"} <= calls.keys()
    for name, call in calls.items():
        assert re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", name)
        assert call["summary"]
        assert call["tags"][0] in [tag["name"] for tag in document["tags"]]
        assert [status for status in call["responses"] if status < "300"], name
        for status, answer in call["responses"].items():
            whole = resolved(document, answer["$ref"]) if "$ref" in answer else answer
            assert whole["description"]
            kinds = list(whole.get("content", {}))
            assert kinds == ["application/problem+json"] if status >= "400" else "application/problem+json" not in kinds


def test_the_streams_say_what_they_send(document: dict[str, Any]) -> None:
    for name in ("streamThread", "streamMessage", "streamActiveMessage", "resumeStream"):
        call = operations(document)[name]
        (content,) = call["responses"]["200"]["content"].items()
        assert content[0] == "text/event-stream"
        assert {"complete", "reset", "timeout", "gone", "error"} <= set(
            re.findall(r"^\| `(\w+)`", call["responses"]["200"]["description"], re.MULTILINE)
        )
        assert "content" not in call["responses"]["204"]
        headers = [parameter["name"] for parameter in call.get("parameters", []) if parameter["in"] == "header"]
        assert headers == ([] if name == "resumeStream" else ["Last-Event-ID"])


def test_the_examples_of_bodies_work(document: dict[str, Any], client: httpx.Client) -> None:
    """*Try it out* fills them in."""
    tried = 0
    for path, methods in document["paths"].items():
        for kind, content in methods.get("post", {}).get("requestBody", {}).get("content", {}).items():
            examples = [example["value"] for example in content.get("examples", {}).values()]
            for example in examples or [content["example"]]:
                body = example if isinstance(example, str) else json.dumps(example)
                url = path.removeprefix("/api").format(thread_id="thread-1", message_id=f"try-{tried}")
                client.put(f"/threads/thread-1/messages/try-{tried}")
                answer = client.post(url, content=body, headers={"Content-Type": kind})
                if path.endswith("/tokens"):  # there is no secret here
                    assert "secret" in problem(answer)[1]["detail"]
                else:
                    assert answer.status_code in (200, 201), answer.text
                tried += 1
    assert tried >= 8


@pytest.mark.parametrize("body", [{"data": {"content": "x"}}, {"content": b'{"reason": "x"}'}], ids=["form", "no type"])
@pytest.mark.parametrize(
    "path", ["/threads/t/messages/m/chunks", "/threads/t/messages/m/abort", "/threads/t/tokens", "/resume-stream"]
)
def test_the_content_type_of_curl_is_refused_alike_by_every_call_with_a_body(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    status, document = problem(client.post(path, **body))
    assert status == 415
    assert re.search(r"is not what this call takes; send Content-Type: application/json", document["detail"])


def test_a_missing_page_says_which_pages_there_are(service: Service) -> None:
    status, document = problem(httpx.get(f"{service.url}/schema/redoc"))
    assert status == 404
    for path in re.findall(r"/schema/[a-z.]+[a-z]", document["detail"]):
        assert httpx.get(f"{service.url}{path}").status_code == 200


def test_with_a_secret_the_document_asks_for_a_token(start_service: Any) -> None:
    service = start_service("--secret", "s" * 32)
    document = httpx.get(f"{service.url}/schema/openapi.json").json()
    assert document["security"] == [{"bearerAuth": []}]
    calls = operations(document)
    assert calls["live"]["security"] == []
    assert calls["streamMessage"]["security"] == [{"bearerAuth": []}, {"tokenInQuery": []}]
    assert "security" not in calls["appendChunks"]


@pytest.fixture(scope="module")
def generated(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A client that openapi-python-client generated. It cannot send streamed bodies."""
    pytest.importorskip("openapi_python_client", reason="openapi-python-client is not installed")
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps({"post_hooks": []}))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command += ["--path", "openapi.json", "--config", "config.json", "--output-path", "made_client"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    unsupported = re.findall(r"Unsupported content type (\S+)", said)
    assert sorted(unsupported) == ["application/x-ndjson", "text/plain"]
    assert len(re.findall("WARNING|ERROR", said)) == len(unsupported), said
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("made_client")


def test_a_generated_client_appends_reads_resumes_and_gets_problems(
    generated: ModuleType, service: Service, client: httpx.Client
) -> None:
    def call(name: str, *arguments: Any, **options: Any) -> Any:
        module = importlib.import_module(f"made_client.api.{name}")
        with generated.Client(service.url, raise_on_unexpected_status=True) as made:
            return module.sync_detailed(*arguments, client=made, **options)

    models = importlib.import_module("made_client.models")
    assert call("producers.open_message", "made", "run").parsed.status == "active"
    chunks = [models.Chunk("Hello"), models.Chunk(", wor", event="tool")]
    appended = call("producers.append_chunks", "made", "run", body=chunks, index=0)
    assert (appended.status_code, appended.parsed.seq, appended.parsed.chunk_count) == (201, 2, 2)
    assert call("producers.append_chunks", "made", "run", body=chunks, index=0).status_code == 200
    assert call("producers.append_chunks", "made", "run", body=models.Chunk("ld"), complete=True).parsed.seq == 4

    page = call("readers.get_chunks", "made").parsed
    assert [(chunk.content, chunk.event) for chunk in page.chunks] == [("Hello", None), (", wor", "tool"), ("ld", None)]
    assert [(end.status, end.reason) for end in page.ends] == [("completed", None)]
    frames = call("readers.stream_message", "made", "run", last_event_id=page.cursor.replace("-4", "-2"))
    assert re.findall(r"^id: \d+-(\d)$", frames.parsed, re.MULTILINE) == ["3", "4"]
    assert call("readers.stream_thread", "made", after=page.cursor).status_code == 204
    known = models.ResumeBody("made", "run", known_content="Hello, w")
    assert '"content":"or"' in call("readers.resume_stream", body=known).parsed
    assert call("readers.get_accumulated_content", "made").parsed.content == "Hello, world"
    status = call("threads.get_thread_status", "made").parsed
    assert [(message.message_id, message.status) for message in status.messages] == [("run", "completed")]
    assert "made" in [thread.thread_id for thread in call("threads.get_threads").parsed.threads]

    refused = call("producers.append_chunks", "made", "run", body=models.Chunk("late"))
    assert (refused.status_code, refused.parsed.message_status) == (409, "completed")
    assert call("threads.get_thread_status", "never").parsed.exists is False
    append(client, "made", "other", "x")
    aborted = call("producers.abort_message", "made", "other", body=models.AbortBody("enough"))
    assert aborted.parsed.status == "aborted"
    assert call("threads.clear_thread_buffer", "made").status_code == 204
    assert client.get("/threads/made").status_code == 404
