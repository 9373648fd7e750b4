"""The main job with common clients: httpx, httpx-sse, and curl, through a SIGKILL."""

from __future__ import annotations

import json
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import TIMEOUT, Service, api_client, append, wait_until
from httpx_sse import ServerSentEvent, connect_sse
from wire import NDJSON, Stream, Upload, data_of, message_path, serving, shared_service

ANSWER = """# Why the sky is blue 🌌

Light from the sun is **white**; air scatters the *short* waves more:

| colour | λ in nm | scattered |
| --- | ---: | --- |
| blue | 450 | ████████ |
| red | 700 | █ |

```python
def scattered(λ: float) -> float:
\treturn 1 / λ**4  # "Rayleigh"\\n
```

1. 太陽の光は七色です。
2. Τὸ φῶς — naïve café, e\u0301, \u200f\u05e9\u05de\u05d9\u05dd, हिन्दी.
3. 👩\u200d🚀 sees it black; 🇪🇺 🏳️\u200d🌈 👍🏽.\r

> So: $I \\propto \\lambda^{-4}$ <br/> &amp; that's all.\u2028 Done\u0085
"""


def tokens(text: str, seed: int = 1) -> list[str]:
    """Cut a text as tokenizers do: words with the space before them, marks, and parts of graphemes."""
    dice = random.Random(seed)
    found: list[str] = []
    for word in re.findall(r"\s?\w+|\s+|.", text, re.DOTALL):
        cut = dice.randrange(1, len(word)) if len(word) > 4 and dice.random() < 0.5 else len(word)
        found += [word[:cut], *([word[cut:]] if cut < len(word) else [])]
    return found


TOKENS = tokens(ANSWER)


def ndjson(pieces: list[str]) -> bytes:
    return b"".join(json.dumps({"content": piece}).encode() + b"\n" for piece in pieces)


def test_the_answer_is_like_that_of_a_model() -> None:
    assert "".join(TOKENS) == ANSWER
    assert len(TOKENS) > 200


service = shared_service(fill=lambda client: append(client, "done", "run", *TOKENS, complete=True))


def events(client: httpx.Client, *request: str, **rest: Any) -> list[ServerSentEvent]:
    with connect_sse(client, *request, **rest) as source:
        return list(source.iter_sse())


def text_of(found: list[ServerSentEvent]) -> str:
    """Return the text of a whole stream that has nothing but chunks and an end."""
    *chunks, end = found
    assert (end.event, end.json()["status"]) == ("complete", "completed")
    assert {chunk.event for chunk in chunks} <= {"message"}
    return "".join(chunk.json()["content"] for chunk in chunks)


@pytest.mark.parametrize("killed", [False, True], ids=["dropped", "killed"])
@pytest.mark.parametrize("cut_after", [1, 97, len(TOKENS) // 2])
def test_a_reader_cut_mid_sentence_ends_up_with_what_the_producer_sent(
    tmp_path_factory: pytest.TempPathFactory, killed: bool, cut_after: int
) -> None:
    half = cut_after + 60
    with serving(tmp_path_factory.mktemp("cut")) as service, api_client(service) as client:
        with Upload(service, message_path("talk", "run"), NDJSON) as upload:
            upload.send(ndjson(TOKENS[:cut_after]))
            wait_until(lambda: client.get("/threads/talk").status_code == 200, "the first chunk")
            read: list[ServerSentEvent] = []
            with connect_sse(client, "GET", "/threads/talk/messages/run/stream") as source:
                for event in source.iter_sse():
                    read.append(event)
                    if len(read) == cut_after:
                        break  # the page is closed
            upload.send(ndjson(TOKENS[cut_after:half]))
            wait_until(lambda: client.get("/threads/talk").json()["chunkCount"] == half, "all that was sent")
            if killed:
                service.restart()
        known = "".join(event.json()["content"] for event in read)
        assert known == "".join(TOKENS[:cut_after])

        resume = {"thread_id": "talk", "message_id": "run", "known_content": known[:-1]}
        with ThreadPoolExecutor() as pool, api_client(service) as one, api_client(service) as two:
            by_cursor = pool.submit(events, one, "GET", "/threads/talk/stream", headers={"Last-Event-ID": read[-1].id})
            by_text = pool.submit(events, two, "POST", "/resume-stream", json=resume)
            wait_until(lambda: client.get("/threads/talk").json()["readers"] == 2, "both readers")
            # The producer does not know how much has arrived, and sends all of it again.
            path = message_path("talk", "run")
            query = {"index": 0, "complete": True}
            again = client.post(path, params=query, content=ndjson(TOKENS), headers=NDJSON)
            assert (again.status_code, again.json()["chunkCount"]) == (201, len(TOKENS))
            assert known + text_of(by_cursor.result()) == ANSWER
            assert known[:-1] + text_of(by_text.result()) == ANSWER
        assert client.get("/threads/talk/content").json()["content"] == ANSWER


def test_nothing_acknowledged_is_missing_after_a_kill(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("kill")) as service, api_client(service) as client:
        acknowledged = []
        for piece in TOKENS[:40]:
            assert append(client, "talk", "run", piece).status_code == 201
            acknowledged.append(piece)
        client.post(message_path("talk", "over", "chunks"), json=[{"content": "x"}], params={"complete": True})
        cursor = client.get("/threads/talk/content").json()["cursor"]
        service.restart()
        assert client.get("/threads/talk/content", params={"message_id": "run"}).json()["content"] == "".join(
            acknowledged
        )
        status = client.get("/threads/talk").json()
        assert [message["status"] for message in status["messages"]] == ["active", "completed"]
        assert append(client, "talk", "run", "more").json()["seq"] == 43
        with Stream(service, "/threads/talk/stream", {"Last-Event-ID": cursor}) as stream:
            assert stream.line() == b"retry: 1000\n"
            assert data_of(stream.frame())["content"] == "more", "the generation is the same as before"


def test_curl_reads_the_stream(service: Service, client: httpx.Client) -> None:
    client.put("/threads/curled/messages/run")
    command = ["curl", "-sSNi", f"{service.api}/threads/curled/stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        head = [line.rstrip().lower() for line in iter(curl.stdout.readline, b"\r\n")]
        assert b"content-type: text/event-stream" in head
        assert curl.stdout.readline() == b"retry: 1000\n"  # before there is any chunk
        for piece in TOKENS[:5]:
            append(client, "curled", "run", piece)
            frame = b"".join(iter(curl.stdout.readline, b"\n"))
            assert data_of(frame)["content"] == piece
        client.post(message_path("curled", "run", "complete"))
        assert b"event: complete\n" in curl.stdout.read()
        assert curl.wait(TIMEOUT) == 0


def test_curl_uploads_and_reads_text(service: Service) -> None:
    def curl(*arguments: str, body: str = "") -> bytes:
        command = ["curl", "-sS", "--fail", *arguments]
        return subprocess.run(command, input=body.encode(), stdout=subprocess.PIPE, check=True, timeout=TIMEOUT).stdout

    path = f"{service.api}/threads/text/messages/run/chunks?complete=true"
    curl("-T", "-", "-X", "POST", "-H", "Content-Type: text/plain", path, body=ANSWER)
    assert curl("-H", "Accept: text/plain", f"{service.api}/threads/text/content").decode() == ANSWER


def test_many_readers_at_once_get_the_same_text(service: Service, client: httpx.Client) -> None:
    count = 40
    client.put("/threads/many/messages/run")

    def read(place: int) -> str:
        with api_client(service) as own:
            return text_of(events(own, "GET", "/threads/many/messages/run/stream"))

    with ThreadPoolExecutor(count) as pool:
        answers = list(map(pool.submit, [read] * count, range(count)))
        wait_until(lambda: client.get("/threads/many").json()["readers"] >= count // 2, "half of the readers")
        for start in range(0, len(TOKENS), 10):
            append(client, "many", "run", *TOKENS[start : start + 10])
        client.post(message_path("many", "run", "complete"))
        assert {answer.result() for answer in answers} == {ANSWER}


def test_a_slow_reader_holds_no_one_up_and_misses_nothing(service: Service, client: httpx.Client) -> None:
    pieces = [f"{number:05}{'é' * 4000}" for number in range(1500)]  # 12 MB, far more than sockets hold
    client.put("/threads/slow/messages/run")
    with Stream(service, "/threads/slow/stream") as slow:
        assert slow.line() == b"retry: 1000\n"  # from now on it reads nothing
        with api_client(service) as own, ThreadPoolExecutor() as pool:
            quick = pool.submit(own.get, "/threads/slow/stream")
            for start in range(0, len(pieces), 250):
                append(client, "slow", "run", *pieces[start : start + 250])
            client.post(message_path("slow", "run", "complete"))
            body = quick.result().content.removeprefix(b"retry: 1000\n")
        assert slow.rest() == body
        frames = body.decode().split("\n\n")
        assert [json.loads(frame.rpartition("data: ")[2])["content"] for frame in frames[: len(pieces)]] == pieces
        assert "event: complete\n" in frames[len(pieces)]
        assert frames[len(pieces) + 1 :] == [""]


@pytest.mark.parametrize("seed", range(8))
def test_a_reader_dropped_again_and_again_gets_everything_once(client: httpx.Client, seed: int) -> None:
    dice = random.Random(seed)
    text, cursor = "", None
    while True:
        headers = {"Last-Event-ID": cursor} if cursor else {}
        patience = dice.randrange(1, 80)
        with connect_sse(client, "GET", "/threads/done/messages/run/stream", headers=headers) as source:
            if source.response.status_code == 204:
                break
            for event, _ in zip(source.iter_sse(), range(patience), strict=False):
                cursor = event.id
                text += event.json().get("content", "")
    assert text == ANSWER
