"""Reading plain JSON: pages of chunks, long polls, the text so far, statuses, lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import Service, api_client, append, wait_until
from wire import generation, message_path, problem, serving, shared_service

service = shared_service()


def page_of(client: httpx.Client, thread: str, **query: Any) -> dict[str, Any]:
    answer = client.get(f"/threads/{thread}/chunks", params=query)
    assert answer.status_code == 200
    return answer.json()


def places(page: dict[str, Any]) -> tuple[list[int], list[int], str, str]:
    return (
        [chunk["seq"] for chunk in page["chunks"]],
        [end["seq"] for end in page["ends"]],
        page["cursor"].partition("-")[2],
        page["status"],
    )


def fill(client: httpx.Client, thread: str) -> str:
    """1 a (run), 2 x (aside), 3 b (run), 4 aside is completed, 5 c (run), 6 run is aborted."""
    append(client, thread, "run", "a")
    append(client, thread, "aside", "x")
    append(client, thread, "run", "b")
    client.post(message_path(thread, "aside", "complete"))
    client.post(message_path(thread, "run"), json={"content": "c", "event": "tool"})
    client.post(message_path(thread, "run", "abort"), json={"reason": "stop"})
    return generation(client, thread)


# Pages


def test_a_page_holds_chunks_and_ends(client: httpx.Client, thread: str) -> None:
    made = fill(client, thread)
    page = page_of(client, thread)
    for chunk in page["chunks"]:
        assert isinstance(chunk.pop("timestamp"), int)
    assert [{**chunk, "event": chunk.get("event")} for chunk in page["chunks"]] == [
        {"content": "a", "messageId": "run", "seq": 1, "event": None},
        {"content": "x", "messageId": "aside", "seq": 2, "event": None},
        {"content": "b", "messageId": "run", "seq": 3, "event": None},
        {"content": "c", "messageId": "run", "seq": 5, "event": "tool"},
    ]
    assert page["ends"] == [
        {"messageId": "aside", "status": "completed", "reason": None, "seq": 4},
        {"messageId": "run", "status": "aborted", "reason": "stop", "seq": 6},
    ]
    assert (page["cursor"], page["status"]) == (f"{made}-6", "aborted")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ([1, 2, 3, 5], [4, 6], "6", "aborted")),
        ({"limit": 6}, ([1, 2, 3, 5], [4, 6], "6", "aborted")),
        ({"limit": 5}, ([1, 2, 3, 5], [4], "5", "active")),
        ({"limit": 3}, ([1, 2, 3], [], "3", "active")),
        ({"after": "3"}, ([5], [4, 6], "6", "aborted")),
        ({"after": "5"}, ([], [6], "6", "aborted")),
        ({"after": "6"}, ([], [], "6", "aborted")),
        ({"message_id": "run"}, ([1, 3, 5], [6], "6", "aborted")),
        ({"message_id": "run", "limit": 3}, ([1, 3, 5], [], "5", "active")),
        ({"message_id": "aside", "limit": 1}, ([2], [], "2", "active")),
        ({"message_id": "aside", "limit": 2}, ([2], [4], "4", "completed")),
        ({"message_id": "aside", "after": "2"}, ([], [4], "6", "completed")),
    ],
)
def test_the_status_changes_only_with_the_page_that_holds_the_end(
    client: httpx.Client, thread: str, query: dict[str, Any], expected: tuple[list[int], list[int], str, str]
) -> None:
    fill(client, thread)
    assert places(page_of(client, thread, **query)) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("message", [None, "run", "aside"])
def test_pages_continue_from_their_cursor(client: httpx.Client, thread: str, limit: int, message: str | None) -> None:
    fill(client, thread)
    query = {"limit": limit, **({"message_id": message} if message else {})}
    read: list[int] = []
    page = page_of(client, thread, **query)
    while page["chunks"] or page["ends"]:
        seqs = sorted(entry["seq"] for entry in page["chunks"] + page["ends"])
        assert len(seqs) <= limit
        read += seqs
        page = page_of(client, thread, **query, after=page["cursor"])
    assert read == {None: [1, 2, 3, 4, 5, 6], "run": [1, 3, 5, 6], "aside": [2, 4]}[message]
    assert page["status"] != "active"


def test_pages_of_a_long_thread_continue_too(client: httpx.Client, thread: str) -> None:
    texts = [f"{number} " * (100 if number % 7 else 5000) for number in range(1500)]
    for start in range(0, len(texts), 250):
        append(client, thread, "run", *texts[start : start + 250])
    read: list[str] = []
    page = page_of(client, thread)
    while page["chunks"]:
        read += [chunk["content"] for chunk in page["chunks"]]
        page = page_of(client, thread, after=page["cursor"])
    assert read == texts


def test_a_thread_is_active_while_any_of_its_messages_is(client: httpx.Client, thread: str) -> None:
    append(client, thread, "one", "a", complete=True)
    append(client, thread, "two", "b")
    assert page_of(client, thread)["status"] == "active"
    assert page_of(client, thread, message_id="one")["status"] == "completed"
    client.post(message_path(thread, "two", "abort"))
    assert page_of(client, thread)["status"] == "aborted"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"limit": 0}, 400),
        ({"limit": 10_001}, 400),
        ({"limit": "x"}, 400),
        ({"wait": -1}, 400),
        ({"wait": "nan"}, 400),
        ({"after": "x"}, 400),
        ({"message_id": "nobody"}, 404),
        ({"after": "2"}, 410),
        ({"after": "1-1"}, 410),
        ({"after": "1-1", "message_id": "run"}, 410),
    ],
)
def test_a_bad_request_for_a_page_is_refused(
    client: httpx.Client, thread: str, query: dict[str, Any], expected: int
) -> None:
    append(client, thread, "run", "a")
    assert problem(client.get(f"/threads/{thread}/chunks", params=query))[0] == expected


def test_a_cursor_of_an_earlier_generation_is_gone(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    cursor = page_of(client, thread)["cursor"]
    client.delete(f"/threads/{thread}")
    append(client, thread, "run", "b")
    for wait in (0, 10):
        answer = client.get(f"/threads/{thread}/chunks", params={"after": cursor, "wait": wait})
        assert problem(answer)[0] == 410
    assert [chunk["content"] for chunk in page_of(client, thread)["chunks"]] == ["b"]


# Long polls


def wait_for_reader(client: httpx.Client, thread: str) -> None:
    """Wait until a long poll is counted as a reader."""
    wait_until(lambda: client.get(f"/threads/{thread}").json()["readers"] == 1, "the long poll")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("append", ([3], [], "3", "active")),
        ("complete", ([], [3], "3", "completed")),
        ("abort", ([], [3], "3", "aborted")),
    ],
)
def test_a_long_poll_is_answered_as_soon_as_something_happens(
    service: Service, client: httpx.Client, thread: str, call: str, expected: tuple[list[int], list[int], str, str]
) -> None:
    append(client, thread, "run", "a")
    with api_client(service) as waiting, ThreadPoolExecutor() as pool:
        query = {"after": "1", "message_id": "run", "wait": 300}  # far longer than the client waits
        answer = pool.submit(page_of, waiting, thread, **query)
        wait_for_reader(client, thread)
        append(client, thread, "other", "nothing to this reader")
        if call == "append":
            append(client, thread, "run", "b")
        else:
            client.post(message_path(thread, "run", call))
        assert places(answer.result()) == expected


def test_a_long_poll_is_answered_at_once_if_there_is_something(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    assert places(page_of(client, thread, wait=300)) == ([1], [], "1", "active")
    client.post(message_path(thread, "run", "complete"))
    assert places(page_of(client, thread, after=1, wait=300)) == ([], [2], "2", "completed")
    for query in ({}, {"message_id": "run"}):  # and if nothing more will come
        assert places(page_of(client, thread, after=2, wait=300, **query)) == ([], [], "2", "completed")


def test_a_long_poll_ends_with_an_empty_page(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    assert places(page_of(client, thread, after=1, wait=0.05)) == ([], [], "1", "active")
    assert problem(client.get("/threads/not-made/chunks", params={"wait": 300}))[0] == 404


def test_a_long_poll_is_told_that_its_thread_was_cleared(service: Service, client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    with api_client(service) as waiting, ThreadPoolExecutor() as pool:
        answer = pool.submit(waiting.get, f"/threads/{thread}/chunks", params={"after": "1", "wait": 300})
        wait_for_reader(client, thread)
        client.delete(f"/threads/{thread}")
        assert problem(answer.result())[0] == 404


# The text so far

TEXT = "a\r\n\0é👩\u200d🚀 \u2028"


@pytest.mark.parametrize(
    ("message", "content", "status"),
    [
        ("run", TEXT + "!", "active"),
        ("aside", "xy", "completed"),
        ("empty", "", "active"),
        (None, TEXT + "!xy", "active"),
    ],
)
def test_the_text_of_a_message_and_of_a_thread(
    client: httpx.Client, thread: str, message: str | None, content: str, status: str
) -> None:
    append(client, thread, "run", TEXT)
    append(client, thread, "aside", "x", "y", complete=True)
    client.put(f"/threads/{thread}/messages/empty")
    append(client, thread, "run", "!")
    query = {"message_id": message} if message else {}
    path = f"/threads/{thread}/content"
    answer = client.get(path, params=query)
    made = page_of(client, thread)["cursor"].partition("-")[0]
    assert answer.headers["content-type"].partition(";")[0] == "application/json"
    assert answer.json() == {"content": content, "cursor": f"{made}-5", "status": status}
    bare = client.get(path, params=query, headers={"Accept": "text/plain"})
    assert bare.headers["content-type"].lower() == "text/plain; charset=utf-8"
    assert bare.content == content.encode()


def test_the_cursor_of_a_text_leads_exactly_to_the_rest(client: httpx.Client, thread: str) -> None:
    append(client, thread, "run", "a")
    append(client, thread, "other", "x")
    content = client.get(f"/threads/{thread}/content", params={"message_id": "run"}).json()
    append(client, thread, "run", "b", "c", complete=True)
    rest = page_of(client, thread, message_id="run", after=content["cursor"])
    assert content["content"] + "".join(chunk["content"] for chunk in rest["chunks"]) == "abc"


# Statuses and lists


def test_the_status_of_a_thread(client: httpx.Client, thread: str) -> None:
    fill(client, thread)
    client.put(f"/threads/{thread}/messages/waiting")
    status = client.get(f"/threads/{thread}").json()
    known = {"threadId": thread, "exists": True, "status": "active", "chunkCount": 4}
    assert {key: status[key] for key in known} == known
    assert 0 <= status["updatedAt"] - status["createdAt"] < 60_000
    messages = [
        {key: message[key] for key in ("messageId", "status", "reason", "chunkCount", "firstSeq", "lastSeq")}
        for message in status["messages"]
    ]
    assert [list(message.values()) for message in messages] == [
        ["run", "aborted", "stop", 3, 1, 6],
        ["aside", "completed", None, 1, 2, 4],
        ["waiting", "active", None, 0, None, None],
    ]
    assert all(status["createdAt"] <= m["createdAt"] <= m["updatedAt"] for m in status["messages"])
    client.post(message_path(thread, "waiting", "complete"))
    assert client.get(f"/threads/{thread}").json()["status"] == "completed", "as the message that ended last"


def test_a_missing_thread_or_message_is_said_not_to_exist(client: httpx.Client, thread: str) -> None:
    path = f"/threads/{thread}"
    for answer in [client.get(path), client.delete(path), client.get(f"{path}/chunks"), client.get(f"{path}/content")]:
        status, document = problem(answer)
        assert (status, document["exists"]) == (404, False)
    append(client, thread, "run", "a")
    assert problem(client.get(f"{path}/content", params={"message_id": "nobody"}))[0] == 404


def test_a_cleared_thread_is_gone_and_can_be_made_again(client: httpx.Client, thread: str) -> None:
    fill(client, thread)
    cleared = client.delete(f"/threads/{thread}")
    assert (cleared.status_code, cleared.content) == (204, b"")
    assert client.get(f"/threads/{thread}").status_code == 404
    assert client.delete(f"/threads/{thread}").status_code == 404
    assert append(client, thread, "run", "a").json()["seq"] == 1
    assert len(client.get(f"/threads/{thread}").json()["messages"]) == 1


@pytest.mark.parametrize("status", [None, "active", "completed", "aborted"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 1000])
def test_threads_are_listed_by_status_and_by_pages(listed: httpx.Client, status: str | None, limit: int) -> None:
    query = {"limit": limit, **({"status": status} if status else {})}
    found: list[str] = []
    page: dict[str, Any] = {"cursor": None}
    while True:
        page = listed.get("/threads", params={**query, **({"cursor": page["cursor"]} if page["cursor"] else {})}).json()
        assert len(page["threads"]) <= limit
        assert status is None or {thread["status"] for thread in page["threads"]} <= {status}
        found += [thread["threadId"] for thread in page["threads"]]
        if page["cursor"] is None:
            break
        assert len(page["threads"]) == limit
    assert sorted(found) == sorted(name for name in LISTED if status in (None, LISTED[name]))


LISTED = {f"{status}-{number}": status for number in range(3) for status in ("active", "completed", "aborted")}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a service with the threads of LISTED, and no others."""
    with serving(tmp_path_factory.mktemp("listed")) as service, api_client(service) as client:
        for thread, status in LISTED.items():
            append(client, thread, "first", "a", complete=True)
            append(client, thread, "second", "b", complete=status == "completed")
            if status == "aborted":
                client.post(message_path(thread, "second", "abort"))
        yield client


def test_a_listed_thread_has_what_a_list_shows(listed: httpx.Client) -> None:
    thread = listed.get("/threads", params={"status": "active"}).json()["threads"][0]
    known = {"status": "active", "chunkCount": 2}
    assert {key: thread[key] for key in known} == known
    assert thread["createdAt"] <= thread["updatedAt"]


@pytest.mark.parametrize(
    "query", [{"status": "done"}, {"limit": 0}, {"limit": 1001}, {"cursor": "x"}, {"cursor": "-1"}]
)
def test_a_bad_request_for_a_list_is_refused(client: httpx.Client, query: dict[str, Any]) -> None:
    assert problem(client.get("/threads", params=query))[0] == 400


# A long text


@pytest.mark.parametrize("of", [{}, {"message_id": "m"}])
def test_a_long_text_comes_in_pieces(client: httpx.Client, thread: str, of: dict[str, str]) -> None:
    texts = [('é"\n\u2028' + str(number)) * 20_000 for number in range(12)]
    for number, text in enumerate(texts):
        append(client, thread, "m" if number % 4 else "n", text).raise_for_status()
    wanted = "".join([text for number, text in enumerate(texts) if number % 4 == 0] if not of else [])
    wanted += "".join(text for number, text in enumerate(texts) if number % 4)
    with client.stream("GET", f"/threads/{thread}/content", params=of) as answer:
        assert answer.headers["content-type"] == "application/json"
        assert "content-length" not in answer.headers
        document = json.loads(answer.read())
    assert document["content"] == wanted
    assert (document["cursor"].partition("-")[2], document["status"]) == ("12", "active")
    plain = client.get(f"/threads/{thread}/content", params=of, headers={"Accept": "text/plain"})
    assert (plain.text, plain.headers["vary"]) == (wanted, "Accept")
