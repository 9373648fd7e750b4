"""No one can leave the upstream's path, see a key, read the answers of others, or hang the relay."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import TIMEOUT, Service, wait_until
from relayed import RETRY, Relay, bare_events, framed, relay
from resume_stream.extras.tokens import TokenGrant, token_for
from upstream import AG_UI, AI_SDK, CHAT, EVENTS, OTHER, Recording, Upstream, relaying, shared_upstream
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from wire import problem

__all__ = ["relay"]  # fixtures

SECRET = "s" * 32
KEY = "sk-nobody-may-see-this"
SETTING = "RESUME_STREAM_UPSTREAM_UP_HEADERS"
OTHER_SETTING = "RESUME_STREAM_UPSTREAM_OTHER_HEADERS"
flags = ("--secret", SECRET, "--max-chunk", "1KiB", "--max-message", "64KiB")
upstream = shared_upstream()
service = relaying(*flags, base="/base", environment={SETTING: f"Authorization: Bearer {KEY}\nX-Org:  ours \n"})


@pytest.fixture(autouse=True)
def fresh(upstream: Upstream) -> None:
    upstream.forget()
    upstream.answer(CHAT)


def bearer(*scope: str, threads: tuple[str, ...] | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(*scope, threads=threads)}"}


def token_of(*scope: str, threads: tuple[str, ...] | None = None) -> str:
    return token_for(SECRET, TokenGrant(threads, 4_000_000_000, frozenset(scope)))


def raw(service: Service, line: str, *headers: str) -> bytes:
    """Send a request that no client would send, with a good token, and return the answer."""
    mine = ("Host: localhost", f"Authorization: Bearer {token_of('write')}", "Connection: close")
    with socket.create_connection(("127.0.0.1", service.port), timeout=TIMEOUT) as connection:
        connection.sendall("\r\n".join([f"{line} HTTP/1.1", *headers, *mine, "", ""]).encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


# Where it goes


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/a/../../secret",
        "/%2e%2e/secret",
        "/%2E%2e%2fsecret",
        "/%252e%252e/secret",
        "/a/.%2e/secret",
        "/..\\secret",
        "/..%5csecret",
        "/a/..",
        "/./a",
        "//evil.example/a",
        "/..;a=b/secret",
        "/%25252525252e%2e/secret",
    ],
)
def test_no_path_leads_out_of_the_base(service: Service, upstream: Upstream, path: str) -> None:
    answer = raw(service, f"GET /relay/up{path}")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"write it without" in answer
    assert not upstream.asked


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://evil.example/relay/up/v1/x", 200),  # only its path counts, and the host is ours (RFC 9112, 3.2.2)
        ("/relay/up/http://evil.example/x", 200),
        ("/relay/evil.example/x", 404),
        ("/relay/up%2fx", 404),
        ("/relay/up@evil.example/x", 404),
        ("/%72elay/up/x", 404),
        ("/relay//up/x", 404),
        ("/relay", 404),
        ("/relay/", 404),
    ],
)
def test_only_a_named_upstream_is_asked(service: Service, upstream: Upstream, target: str, status: int) -> None:
    answer = raw(service, f"GET {target}")
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert all(asked.target.startswith("/base/") for asked in upstream.asked)
    assert len(upstream.asked) == (status == 200)


@pytest.mark.parametrize(
    ("lines", "is_refused"),
    [
        ("X-A: a\rX-Evil: 1", True),
        ("X-A: a\r\n X-Evil: folded", True),
        ("X-A: a\0b", True),
        ("Resume-Thread: a%0d%0aX-Evil: 1", True),
        ("Resume-Message: a%0aX-Evil: 1", True),
        ("X-A: a%0d%0aX-Evil: 1", False),
    ],
)
def test_no_header_smuggles_another_one(service: Service, upstream: Upstream, lines: str, is_refused: bool) -> None:
    answer = raw(service, "GET /relay/up/x", lines)
    assert answer.startswith(b"HTTP/1.1 400 " if is_refused else b"HTTP/1.1 200 ")
    assert b"\nX-Evil" not in answer
    assert [line for asked in upstream.asked for line in asked.lines if line.startswith(b"x-a")] == (
        [] if is_refused else [b"x-a: a%0d%0aX-Evil: 1"]
    )


def test_a_path_with_an_encoded_line_end_stays_encoded(relay: Relay, upstream: Upstream) -> None:
    assert relay.ask(CHAT.at("/a%0d%0aX-Evil:%201"), **bearer("write")).status_code == 200
    assert upstream.asked[0].target == "/base/a%0d%0aX-Evil:%201"


def test_pages_of_other_origins_are_refused(upstream: Upstream, tmp_path: Path) -> None:
    with (
        Service(tmp_path / "chunks.db", "--upstream", f"up={upstream.url}") as open_service,
        Relay(open_service) as relay,
    ):
        assert problem(relay.ask(CHAT, Origin="https://evil.example"))[0] == 403
        assert problem(relay.ask(CHAT, Host="evil.example"))[0] == 403
        image = Recording((), "/v1/paid", "GET", b"")
        assert problem(relay.ask(image, Sec_Fetch_Site="cross-site"))[0] == 403
        assert not upstream.asked


# Keys


def test_the_relay_sets_the_key_of_the_upstream_and_keeps_the_token_of_the_caller(
    relay: Relay, upstream: Upstream
) -> None:
    token = token_of("write")
    assert relay.ask(CHAT, Authorization=f"Bearer {token}", X_Org="theirs").status_code == 200
    assert relay.ask(CHAT, X_Api_Key=token).status_code == 200
    for name in ("access_token", "access%5ftoken", "%61ccess_token"):
        assert relay.ask(CHAT.at(f"/v1/x?a=1&{name}={token}&b=2")).status_code == 200
    for asked in upstream.asked:
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert asked.headers["x-org"] == "ours"
        assert token not in b"\n".join(asked.lines).decode()
    assert upstream.asked[-1].target == "/base/v1/x?a=1&b=2"


def test_without_a_secret_the_key_of_the_caller_reaches_the_upstream(upstream: Upstream, tmp_path: Path) -> None:
    with (
        Service(tmp_path / "chunks.db", "--upstream", f"up={upstream.url}") as open_service,
        Relay(open_service) as relay,
    ):
        relay.ask(CHAT, Authorization="Bearer theirs", X_Api_Key="theirs too")
    assert upstream.asked[0].headers["authorization"] == "Bearer theirs"
    assert upstream.asked[0].headers["x-api-key"] == "theirs too"


def test_no_key_and_no_body_is_stored_or_logged(relay: Relay, upstream: Upstream) -> None:
    token, said = token_of("write"), "what-the-caller-asked"
    body = json.dumps({"stream": True, "input": said}).encode()
    asked = Recording(CHAT.pieces, CHAT.path, body=body)
    relay.ask(asked, Authorization=f"Bearer {token}", Cookie="session=their-cookie").raise_for_status()
    upstream.answer(Recording((), has_head=False, is_broken=True))
    answer = relay.ask(asked, Authorization=f"Bearer {token}", Cookie="session=their-cookie")
    assert answer.status_code == 502
    folder = relay.service.db.parent
    kept = b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())
    for secret in (KEY, token, said, "their-cookie"):
        assert secret not in answer.text
        assert secret.encode() not in kept
    assert relay.service.tracebacks() == 0


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (SETTING, f"Authorization {KEY}", f"{SETTING}: line 1 is not a header"),
        (SETTING, f"X-A: 1\nX-B: {KEY}é", f"{SETTING}: line 2 is not a header"),
        (
            "RESUME_STREAM_UPSTREAM_OTHER_HEADERS",
            f"X-A: {KEY}",
            "RESUME_STREAM_UPSTREAM_OTHER_HEADERS is of no upstream",
        ),
    ],
)
def test_a_bad_header_setting_is_refused_at_the_start_and_not_shown(
    tmp_path: Path, variable: str, value: str, says: str
) -> None:
    refused = Service(tmp_path / "chunks.db", "--upstream", "up=http://127.0.0.1:1", environment={variable: value})
    process = refused.spawn()
    assert process.wait(TIMEOUT) == 1
    refused.end()
    log = refused.log.read_text()
    assert says in log
    assert KEY not in log


# Who may do what


def test_asking_takes_write_and_resuming_takes_read(relay: Relay, upstream: Upstream) -> None:
    assert problem(relay.ask(CHAT))[0] == 401
    assert problem(relay.ask(CHAT, X_Api_Key="sk-ant-of-elsewhere"))[0] == 401
    assert problem(relay.ask(CHAT, **bearer("read")))[0] == 403
    assert problem(relay.ask(CHAT, **bearer("abort")))[0] == 403
    assert not upstream.asked
    answer = relay.ask(CHAT, **bearer("write"))
    of = generation_of(answer.headers, relay.service)
    assert problem(relay.ask(CHAT, Last_Event_ID=f"{of}-2", **bearer("write")))[0] == 403
    rest = relay.ask(CHAT, Last_Event_ID=f"{of}-2", **bearer("read"))
    assert rest.content == RETRY + framed(bare_events(CHAT)[1:], of, 3)


def generation_of(headers: httpx.Headers, service: Service) -> str:
    url = f"{service.api}/threads/{headers['resume-thread']}"
    return str(httpx.get(url, headers=bearer("admin")).json()["cursor"].partition("-")[0])


def test_a_cursor_of_a_thread_that_the_token_does_not_cover_is_unknown(relay: Relay, upstream: Upstream) -> None:
    answer = relay.ask(CHAT, Resume_Thread="user-7-a", **bearer("write", threads=("user-7-*",)))
    of = generation_of(answer.headers, relay.service)
    theirs = relay.ask(CHAT, Last_Event_ID=f"{of}-2", **bearer("read", threads=("user-7-*",)))
    assert theirs.status_code == 200
    foreign = relay.ask(CHAT, Last_Event_ID=f"{of}-2", **bearer("read", threads=("user-8-*",)))
    unknown = relay.ask(CHAT, Last_Event_ID="17-2", **bearer("read", threads=("user-8-*",)))
    assert (foreign.status_code, foreign.content) == (unknown.status_code, unknown.content)
    assert problem(foreign)[0] == 410


def test_a_token_for_some_threads_asks_for_one_of_them(relay: Relay, upstream: Upstream) -> None:
    some = bearer("write", threads=("user-7-*",))
    assert problem(relay.ask(CHAT, Resume_Thread="user-8-a", **some))[0] == 403
    assert problem(relay.ask(CHAT, Idempotency_Key="user-8-a", **some))[0] == 403
    assert not upstream.asked
    status, document = problem(relay.ask(CHAT, **some))
    assert (status, "Resume-Thread" in document["detail"]) == (403, True)
    assert relay.ask(CHAT, Resume_Thread="user-7-b", **some).status_code == 200


def test_joining_shows_no_thread_that_the_token_does_not_cover(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(AI_SDK.held(1))
    with relay.reading(AI_SDK, Idempotency_Key="user-7-x", **bearer("write")) as reading:
        reading.events(1)
        assert reading.ids == ("chat-1", "user-7-x")
        some = bearer("write", threads=("user-7-*",))
        with relay.reading(AI_SDK, Idempotency_Key="user-7-x", **some) as theirs:
            assert theirs.status == 403
        upstream.go_on()
        reading.rest()


def test_a_message_of_one_upstream_is_not_joined_at_another(upstream: Upstream, tmp_path: Path) -> None:
    named = [flag for name in ("up", "other") for flag in ("--upstream", f"{name}={upstream.url}")]
    upstream.answer(CHAT.held(1))
    with Service(tmp_path / "chunks.db", *named) as two, Relay(two) as relay, Relay(two, "other") as other:
        with relay.reading(CHAT, Resume_Message="m") as reading:
            reading.events(1)
            with other.reading(CHAT, Resume_Message="m") as theirs:
                assert theirs.status == 409
            upstream.go_on()
            reading.rest()
        assert problem(other.ask(CHAT, Resume_Message="m"))[0] == 409


# What an upstream may send


def ended(relay: Relay, answer: httpx.Response) -> tuple[str, str | None]:
    url = f"{relay.service.api}/threads/{answer.headers['resume-thread']}"

    def last() -> dict[str, str] | None:
        message = httpx.get(url, headers=bearer("admin")).json()["messages"][-1]
        return message if message["status"] != "active" else None

    found = wait_until(last)
    return found["status"], found["reason"]


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (b"data: %s\n\n" % (b"x" * 1025), "event_too_large"),
        (b"data: %s" % (b"x" * 10_000), "event_too_large"),
        (b":%s" % (b"x" * 10_000), "event_too_large"),
        (b"event: %s\ndata: x\n\n" % (b"x" * 1025), "event_too_large"),
        (b"data: \xff\xfe\n\n", "not_utf8"),
        (b"data: \xed\xa0\x80\n\n", "not_utf8"),  # half of a surrogate pair
    ],
)
def test_an_event_that_cannot_be_recorded_ends_the_answer_with_a_clear_error(
    relay: Relay, upstream: Upstream, piece: bytes, reason: str
) -> None:
    upstream.answer(CHAT.ended(2, piece, *CHAT.pieces[2:]))
    answer = relay.ask(CHAT, **bearer("write"))
    *events, last = answer.content.removeprefix(RETRY).split(b"\n\n")[:-1]
    assert [event.partition(b"\n")[2] + b"\n\n" for event in events] == bare_events(CHAT)[:2]
    assert json.loads(last.partition(b"data: ")[2])["error"]["code"] == reason
    assert ended(relay, answer) == ("aborted", reason)


def test_good_events_in_one_piece_with_a_bad_one_are_kept(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT.ended(0, b"".join(CHAT.pieces[:3]) + b"data: \xff\n\n"))
    answer = relay.ask(CHAT, **bearer("write"))
    assert answer.content.count(b"data: ") == 4
    assert ended(relay, answer) == ("aborted", "not_utf8")


def test_an_event_of_max_chunk_is_recorded_whole_however_it_is_cut(relay: Relay, upstream: Upstream) -> None:
    content = "é" * 512
    event = f"data: {content}\n\n".encode()
    upstream.answer(OTHER.ended(0, *(event[at : at + 7] for at in range(0, len(event), 7))))
    answer = relay.ask(OTHER, **bearer("write"))
    assert answer.text.endswith(f"-2\ndata: {content}\n\n")


def test_an_endless_upstream_ends_at_max_message(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(CHAT.ended(0, *[b"data: %s\n\n" % (b"x" * 1000)] * 200).held(200))
    answer = relay.ask(CHAT, **bearer("write"))
    assert ended(relay, answer) == ("aborted", "message_too_large")
    assert b'"code":"message_too_large"' in answer.content
    kept = answer.content.count(b"data: x")
    assert kept == 64
    wait_until(lambda: upstream.left, "the upstream's connection is closed")


@pytest.mark.parametrize("recording", [CHAT, AG_UI], ids=["its last event", "an end that others may follow"])
def test_an_end_that_cannot_be_recorded_does_not_complete_the_message(
    relay: Relay, upstream: Upstream, recording: Recording
) -> None:
    large = b'data: {"text":"%s"}\n\n' % (b"x" * 900)
    filling, rest = large * 60, large * 20 + recording.pieces[-1]
    upstream.answer(recording.ended(1, filling, rest).held(2))
    with relay.reading(recording, **bearer("write")) as reading:
        reading.events(61)
        upstream.go_on()
        *_, last = reading.rest().split(b"\n\n")[:-1]
        assert b"message_too_large" in last
        assert ended(relay, reading.response) == ("aborted", "message_too_large")


def test_a_compressed_stream_is_502(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(Recording((b"\x1f\x8b...",), headers={**EVENTS, "Content-Encoding": "gzip"}))
    answer = relay.ask(CHAT, **bearer("write"))
    assert problem(answer)[0] == 502
    assert "compressed" in answer.text


def test_a_request_body_over_max_body_is_413(
    tmp_path: Path, upstream: Upstream, start_service: Callable[..., Service]
) -> None:
    small = start_service("--upstream", f"up={upstream.url}", "--max-body", "1KiB")
    with Relay(small) as relay:
        assert problem(relay.ask(Recording((), body=b"x" * 1025)))[0] == 413
    assert not upstream.asked


def test_a_websocket_is_not_relayed(service: Service, upstream: Upstream) -> None:
    url = f"ws://127.0.0.1:{service.port}/relay/up/x"
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=bearer("write"), proxy=None):
        pass
    assert refused.value.response.status_code == 403
    assert not upstream.asked


def test_a_slow_reader_does_not_hold_up_the_recording(relay: Relay, upstream: Upstream) -> None:
    pieces = [b"data: %s\n\n" % (b"x" * 900)] * 60
    upstream.answer(OTHER.ended(0, *pieces))
    with relay.reading(OTHER, **bearer("write")) as reading:
        thread, _ = reading.ids
        url = f"{relay.service.api}/threads/{thread}"
        wait_until(lambda: httpx.get(url, headers=bearer("admin")).json()["status"] == "completed")
        assert reading.rest().count(b"data: ") == len(pieces)


def test_relays_are_counted_by_upstream_and_outcome(relay: Relay, upstream: Upstream) -> None:
    relay.ask(CHAT, **bearer("write"))
    metrics = httpx.get(f"{relay.service.url}/metrics", headers=bearer("admin")).text
    assert 'resume_stream_relays_total{outcome="completed",upstream="up"}' in metrics


def test_an_error_does_not_show_the_address_of_the_upstream(relay: Relay, upstream: Upstream) -> None:
    upstream.answer(Recording((), has_head=False, is_broken=True))
    answer = relay.ask(CHAT, **bearer("write"))
    assert problem(answer)[0] == 502
    assert str(upstream.port) not in answer.text
