"""Authorization: every route for every caller, minted tokens, expired tokens, the command line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import jwt
import pytest
from conftest import ROOT, TIMEOUT, Service, append, wait_until
from resume_stream.app import main
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect
from wire import (
    NDJSON,
    Connection,
    Stream,
    Upload,
    contents,
    data_of,
    message_path,
    problem,
    serving,
    websocket_address,
)

SECRET = "correct horse battery staple, 32+"
HOUR = 3600
EVERY_SCOPE = "read write abort admin"


def token(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a token that allows everything, unless the claims say otherwise. A claim of None is left out."""
    claims = {"exp": int(time.time()) + HOUR, "scope": EVERY_SCOPE, **claims}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, secret, algorithm)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("authorization"), "--secret", SECRET) as service:
        yield service


@pytest.fixture(scope="module")
def admin(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.api, timeout=TIMEOUT, headers=bearer(token())) as client:
        yield client


@pytest.fixture(scope="module")
def anyone(service: Service) -> Iterator[httpx.Client]:
    """A client without a token."""
    with httpx.Client(base_url=service.url, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def thread(admin: httpx.Client) -> str:
    """A thread with the completed message ``run`` and the active message ``open``."""
    return made_thread(admin)


def made_thread(admin: httpx.Client) -> str:
    thread = f"own-{uuid4()}"
    append(admin, thread, "run", "Hello", complete=True).raise_for_status()
    append(admin, thread, "open", "Hel").raise_for_status()
    return thread


def websocket(service: Service, query: str = "", **headers: str) -> ClientConnection:
    return connect(websocket_address(service, query), additional_headers=headers, open_timeout=TIMEOUT)


def ask(socket: ClientConnection, **frame: Any) -> dict[str, Any]:
    socket.send(json.dumps(frame))
    return json.loads(socket.recv(TIMEOUT))


# Every route and every caller

OPEN = frozenset({"read", "write", "abort", "admin", "nothing", "nobody"})
READ, WRITE = frozenset({"read", "admin"}), frozenset({"write", "admin"})
ABORT, ADMIN = frozenset({"abort", "write", "admin"}), frozenset({"admin"})


class Route(NamedTuple):
    """A call, who may make it by scope, and its status when it may be made."""

    method: str
    path: str
    allowed: frozenset[str]
    status: int = 200
    body: Any = None
    of_thread: bool = True
    token_in_query: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


QUICK = "?idle_timeout=0.01"
ROUTES = [
    Route("PUT", "/api/threads/{t}/messages/new", WRITE, 201),
    Route("POST", "/api/threads/{t}/messages/open/chunks", WRITE, 201, {"content": "lo"}),
    Route("POST", "/api/threads/{t}/messages/open/complete", WRITE),
    Route("POST", "/api/threads/{t}/messages/open/abort", ABORT, 200, {"reason": "stop"}),
    Route("GET", f"/api/threads/{{t}}/stream{QUICK}", READ, token_in_query=True),
    Route("GET", f"/api/threads/{{t}}/messages/open/stream{QUICK}", READ, token_in_query=True),
    Route("GET", f"/api/threads/{{t}}/live{QUICK}", READ, token_in_query=True),
    Route(
        "POST",
        "/api/resume-stream",
        READ,
        200,
        {"thread_id": "{t}", "message_id": "run", "known_content": "He"},
        token_in_query=True,
    ),
    Route("GET", "/api/threads/{t}/chunks", READ, token_in_query=True),
    Route("GET", "/api/threads/{t}/content", READ, token_in_query=True),
    Route("GET", "/api/threads/{t}", READ, token_in_query=True),
    Route("GET", "/api/threads", READ, of_thread=False, token_in_query=True),
    Route("DELETE", "/api/threads/{t}", ADMIN, 204),
    Route("POST", "/api/threads/{t}/tokens", WRITE, 201, {"scope": "write"}),
    Route("GET", "/metrics", ADMIN, of_thread=False),
    *(
        Route("GET", path, OPEN, of_thread=False)
        for path in (
            "/",
            "/static/resume-stream.js",
            "/schema",
            "/schema/swagger",
            "/schema/openapi.json",
            "/health/live",
            "/health/ready",
        )
    ),
]

NOBODY = {  # callers without a valid token
    "no token": {},
    "garbage": bearer("garbage"),
    "an empty token": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": token()},
    "another scheme": {"Authorization": f"Basic {token()}"},
    "wrong secret": bearer(token("another horse battery staple, 32+")),
    "empty secret": bearer(".".join([*token().split(".")[:2], ""])),
    "alg none": bearer(jwt.encode({"exp": time.time() + HOUR, "scope": EVERY_SCOPE}, None, "none")),
    "alg HS512": bearer(token(SECRET * 3, "HS512")),
    "expired": bearer(token(exp=int(time.time()) - 1)),
    "no exp": bearer(token(exp=None)),
    "exp that is no number": bearer(token(exp="never")),
    "exp as text": bearer(token(exp=str(int(time.time()) + HOUR))),
    "threads as text": bearer(token(threads="own-*")),
    "scope as a list": bearer(token(scope=["admin"])),
    "not valid yet": bearer(token(nbf=int(time.time()) + HOUR)),
}
SOMEBODY = {  # callers with a valid token: its scope and its threads
    "read": ("read", None),
    "write": ("write", None),
    "abort": ("abort", None),
    "admin": ("admin", None),
    "no scope": ("", None),
    "scope of another service": ("reader administrator ADMIN read,write", None),
    "this thread": (EVERY_SCOPE, ["other", "{t}"]),
    "prefix": (EVERY_SCOPE, ["other", "own-*"]),
    "any prefix": (EVERY_SCOPE, ["*"]),
    "other thread": (EVERY_SCOPE, ["other", "{t}x", "own-", "wn-*", "OWN-*"]),
    "no thread": (EVERY_SCOPE, []),
}


def call(client: httpx.Client, route: Route, thread: str, headers: dict[str, str], query: str = "") -> httpx.Response:
    path = route.path.replace("{t}", thread)
    path += ("&" if "?" in path else "?") + query if query else ""
    body = None if route.body is None else json.loads(json.dumps(route.body).replace("{t}", thread))
    return client.request(route.method, path, headers=headers, json=body)


def expected_status(route: Route, caller: str) -> int:
    scope, threads = SOMEBODY[caller]
    if route.allowed.isdisjoint(scope.split() or ["nothing"]) and route.allowed is not OPEN:
        return 403
    covers = threads is None or caller in ("this thread", "prefix", "any prefix")
    return route.status if covers or not route.of_thread else 403


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_who_may_make_a_call(anyone: httpx.Client, admin: httpx.Client, route: Route) -> None:
    """Each valid token gets a thread of its own, so that no call depends on another."""
    seen, expected = {}, {}
    thread = made_thread(admin)
    for caller, headers in NOBODY.items():
        answer = call(anyone, route, thread, headers)
        expected[caller] = route.status if route.allowed is OPEN else 401
        seen[caller] = answer.status_code
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")
            problem(answer)
    for caller, (scope, threads) in SOMEBODY.items():
        thread = made_thread(admin) if route.of_thread else thread
        covered = None if threads is None else [name.replace("{t}", thread) for name in threads]
        answer = call(anyone, route, thread, bearer(token(scope=scope, threads=covered)))
        expected[caller] = expected_status(route, caller)
        seen[caller] = answer.status_code
        if answer.status_code == 403:
            problem(answer)
    assert seen == expected


def test_the_table_has_every_route(anyone: httpx.Client) -> None:
    paths = anyone.get("/schema/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    pattern = {"{t}": "{thread_id}", "/new": "/{message_id}", "/open": "/{message_id}"}
    table = set()
    for route in ROUTES:
        path = route.path.partition("?")[0]
        for text, placeholder in pattern.items():
            path = path.replace(text, placeholder)
        table.add((route.method, path))
    assert described - table == set()


def test_a_refused_call_changes_nothing(anyone: httpx.Client, admin: httpx.Client, thread: str) -> None:
    before = admin.get(f"/threads/{thread}").json()
    for headers in ({}, bearer(token(scope="read")), bearer(token(threads=["other"]))):
        for route in ROUTES:
            if route.of_thread and route.allowed in (WRITE, ABORT, ADMIN):
                assert call(anyone, route, thread, headers).status_code in (401, 403), route
    assert admin.get(f"/threads/{thread}").json() == before


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.allowed is not OPEN], ids=lambda route: route.name
)
def test_only_reading_calls_take_a_token_in_the_query(
    anyone: httpx.Client, admin: httpx.Client, route: Route, thread: str
) -> None:
    good = call(anyone, route, thread, {}, f"access_token={token()}")
    assert good.status_code == (route.status if route.token_in_query else 401)
    assert call(anyone, route, thread, {}, "access_token=garbage").status_code == 401
    # A token in the query does not make up for a bad header.
    headers = bearer("garbage")
    assert call(anyone, route, thread, headers, f"access_token={token()}").status_code == 401


SOCKET_CALLERS: dict[str, tuple[dict[str, str], int]] = {
    **{caller: (headers, 0) for caller, headers in NOBODY.items()},
    "no scope": (bearer(token(scope="")), 0),
    "read": (bearer(token(scope="read")), 101),
    "write": (bearer(token(scope="write")), 101),
    "abort": (bearer(token(scope="abort")), 101),
    "admin": (bearer(token(scope="admin")), 101),
    "other thread": (bearer(token(threads=["other"])), 101),
}


def handshake(service: Service, query: str = "", **headers: str) -> int:
    try:
        with websocket(service, query, **headers):
            return 101
    except InvalidStatus as refusal:
        return 0 if refusal.response.status_code in (401, 403) else refusal.response.status_code


def test_who_may_open_a_websocket(service: Service) -> None:
    seen = {caller: handshake(service, **headers) for caller, (headers, _) in SOCKET_CALLERS.items()}
    assert seen == {caller: status for caller, (_, status) in SOCKET_CALLERS.items()}
    assert handshake(service, f"?access_token={token(scope='read')}") == 101
    assert handshake(service, "?access_token=garbage") == 0


@pytest.mark.parametrize(("headers", "status"), [({}, 401), (bearer("garbage"), 401), (bearer(token(scope="")), 403)])
def test_the_refusal_of_a_websocket_is_clear(service: Service, headers: dict[str, str], status: int) -> None:
    with pytest.raises(InvalidStatus) as refusal, websocket(service, **headers):
        pass
    response = refusal.value.response
    assert response.status_code == status
    assert json.loads(response.body)["status"] == status
    assert ("www-authenticate" in response.headers) == (status == 401)


FRAMES: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "subscribe": ({"message_id": "run"}, READ),
    "append": ({"message_id": "open", "chunks": [{"content": "lo"}]}, WRITE),
    "abort": ({"message_id": "open"}, ABORT),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_who_may_send_a_frame(service: Service, admin: httpx.Client, kind: str) -> None:
    members, allowed = FRAMES[kind]
    answered = {"subscribe": "chunk", "append": "appended", "abort": "aborted"}[kind]
    seen, expected = {}, {}
    for caller in ("read", "write", "abort", "admin", "this thread", "prefix", "other thread", "no thread"):
        scope, threads = SOMEBODY[caller]
        thread = made_thread(admin)
        covered = None if threads is None else [name.replace("{t}", thread) for name in threads]
        with websocket(service, **bearer(token(scope=scope, threads=covered))) as socket:
            answer = ask(socket, type=kind, id=caller, thread_id=thread, **members)
        seen[caller] = (answer["type"], answer["id"], answer.get("status") if answer["type"] == "error" else None)
        good = not allowed.isdisjoint(scope.split()) and caller not in ("other thread", "no thread")
        expected[caller] = (answered, caller, None) if good else ("error", caller, 403)
    assert seen == expected


# A forbidden thread is the same whether it exists or not


@pytest.mark.parametrize("route", [route for route in ROUTES if route.of_thread], ids=lambda route: route.name)
def test_a_forbidden_thread_does_not_show_whether_it_exists(
    anyone: httpx.Client, admin: httpx.Client, route: Route, thread: str
) -> None:
    missing = f"own-{uuid4()}"
    headers = bearer(token(threads=["other"]))
    answers = [call(anyone, route, name, headers) for name in (thread, missing)]
    shown = [
        (answer.status_code, sorted(set(answer.headers.items()) - {("date", answer.headers["date"])}), answer.content)
        for answer in answers
    ]
    assert shown[0] == (*shown[1][:2], shown[1][2].replace(missing.encode(), thread.encode()))
    assert shown[0][0] == 403


@pytest.mark.parametrize("kind", FRAMES)
def test_a_websocket_does_not_show_either_whether_a_forbidden_thread_exists(
    service: Service, thread: str, kind: str
) -> None:
    missing = f"own-{uuid4()}"
    with websocket(service, **bearer(token(threads=["other"]))) as socket:
        answers = [ask(socket, type=kind, id=1, thread_id=name, **FRAMES[kind][0]) for name in (thread, missing)]
    assert answers[0] == json.loads(json.dumps(answers[1]).replace(missing, thread))
    assert answers[0]["status"] == 403


def test_the_list_has_only_covered_threads(anyone: httpx.Client, admin: httpx.Client) -> None:
    stem = uuid4().hex
    names = [f"{stem}-{letter}-{number}" for number in range(3) for letter in "ab"]
    for name in names:
        append(admin, name, "run", "x", complete=True).raise_for_status()

    def listed(threads: list[str] | None, limit: int) -> list[str]:
        """Return the threads of all pages."""
        found: list[str] = []
        query: dict[str, Any] = {"limit": limit}
        while True:
            page = anyone.get("/api/threads", params=query, headers=bearer(token(threads=threads))).json()
            assert len(page["threads"]) <= limit
            found += [thread["threadId"] for thread in page["threads"]]
            if page["cursor"] is None:
                return found
            query["cursor"] = page["cursor"]

    newest_first = names[::-1]
    for limit in (1, 2, 3, 100):
        assert listed([f"{stem}-*"], limit) == newest_first
        assert listed([f"{stem}-a-*"], limit) == [name for name in newest_first if "-a-" in name]
        assert listed([names[0], names[5]], limit) == [names[5], names[0]]
        assert listed([f"{stem}-c-*"], limit) == []
        assert listed([], limit) == []
    assert newest_first == [name for name in listed(None, 7) if name.startswith(stem)]


# Minted tokens


def minted(anyone: httpx.Client, thread: str, own: dict[str, Any], body: Any = None) -> httpx.Response:
    return anyone.post(f"/api/threads/{thread}/tokens", headers=bearer(token(**own)), json=body)


@pytest.mark.parametrize(
    ("own", "wanted", "status"),
    [
        ("read write", "read", 201),
        ("read write", "read write", 201),
        ("read write", "write abort", 201),  # who may write may abort
        ("write", "abort", 201),
        ("write", "read", 403),
        ("write", "write read", 403),
        ("read write", "admin", 403),
        ("read write abort", "read admin", 403),
        ("admin", "admin", 201),
        ("admin", "read write abort", 201),
        ("read", "read", 403),
        ("abort", "abort", 403),
        ("write", "", 422),
        ("write", "everything", 422),
        ("write", "write *", 422),
    ],
)
def test_a_minted_token_has_no_wider_scope(
    anyone: httpx.Client, thread: str, own: str, wanted: str, status: int
) -> None:
    answer = minted(anyone, thread, {"scope": own}, {"scope": wanted})
    assert answer.status_code == status
    if status == 201:
        claims = jwt.decode(answer.json()["token"], SECRET, ["HS256"])
        assert claims["threads"] == [thread]
        assert sorted(claims["scope"].split()) == sorted(wanted.split()) == answer.json()["scope"].split()
        assert claims["exp"] * 1000 == answer.json()["expiresAt"]
    else:
        assert "token" not in problem(answer)[1]


def test_a_minted_token_is_for_one_thread_that_its_maker_has(
    anyone: httpx.Client, admin: httpx.Client, thread: str
) -> None:
    for threads, status in (([thread], 201), (["own-*"], 201), (None, 201), (["other"], 403), ([], 403)):
        assert minted(anyone, thread, {"threads": threads}).status_code == status
    for name in (f"{thread}*", "*", "own-*"):
        assert minted(anyone, name, {}).status_code == 400
        assert minted(anyone, name, {"threads": ["own-*", "*"]}).status_code == 400
    headers = bearer(minted(anyone, thread, {"scope": "read write"}).json()["token"])
    other = made_thread(admin)
    assert anyone.get(f"/api/threads/{thread}/content", headers=headers).json()["content"] == "HelloHel"
    assert anyone.get(f"/api/threads/{other}/content", headers=headers).status_code == 403
    assert anyone.get(f"/api/threads/{thread}x", headers=headers).status_code == 403
    assert anyone.put(f"/api/threads/{thread}/messages/new", headers=headers).status_code == 403
    assert [t["threadId"] for t in anyone.get("/api/threads", headers=headers).json()["threads"]] == [thread]
    query = f"?access_token={headers['Authorization'].split()[1]}&idle_timeout=0.01"
    assert '"content":"Hello"' in anyone.get(f"/api/threads/{thread}/stream{query}").text


@pytest.mark.parametrize(
    ("expires_in", "own", "expected"),
    [
        (None, HOUR, 900),
        (60, HOUR, 60),
        ("10m", HOUR, 600),
        ("2h", HOUR, HOUR),
        (86400, 60, 60),
        (None, 60, 60),
        (86401, HOUR, None),
        (-1, HOUR, None),
        ("soon", HOUR, None),
        (True, HOUR, None),
    ],
)
def test_a_minted_token_is_short_lived(
    anyone: httpx.Client, thread: str, expires_in: Any, own: int, expected: int | None
) -> None:
    body = {"scope": "read", **({} if expires_in is None else {"expires_in": expires_in})}
    began = time.time()
    answer = minted(anyone, thread, {"exp": int(began) + own}, body)
    if expected is None:
        assert answer.status_code in (400, 422)
    else:
        exp = jwt.decode(answer.json()["token"], SECRET, ["HS256"])["exp"]
        assert exp <= int(began) + own
        assert abs(exp - began - expected) < 3


def test_a_minted_token_cannot_outlive_its_maker_by_minting_again(anyone: httpx.Client, thread: str) -> None:
    exp = int(time.time()) + 30
    first = minted(anyone, thread, {"exp": exp}, {"scope": "write", "expires_in": "1h"}).json()["token"]
    again = anyone.post(f"/api/threads/{thread}/tokens", headers=bearer(first), json={"scope": "write"})
    assert jwt.decode(again.json()["token"], SECRET, ["HS256"])["exp"] <= exp


@pytest.mark.parametrize("body", [{"scope": 1}, {"threads": ["*"]}, {"thread_id": "x"}, [], {"scope": None}])
def test_a_bad_request_for_a_token_is_refused(anyone: httpx.Client, thread: str, body: Any) -> None:
    assert problem(minted(anyone, thread, {}, body))[0] == 422


# The end of a token


class Expiring(NamedTuple):
    """Calls that began with a token that has expired since."""

    thread: str
    expired: float
    stream: Stream
    socket: ClientConnection
    uploads: list[Upload]
    poll: Connection


@pytest.fixture(scope="module")
def expiring(service: Service, admin: httpx.Client) -> Iterator[Expiring]:
    thread = made_thread(admin)
    exp = math.ceil(time.time()) + 1
    short = token(exp=exp, scope="read write abort")
    headers = bearer(short)
    moments = [exp + number / 97 for number in range(8)]  # a timer may be a little early, so there is more than one
    with (
        contextlib.ExitStack() as exits,
        Stream(service, f"{message_path(thread, 'open', 'stream')}?idle_timeout=0&access_token={short}") as stream,
        websocket(service, **headers) as socket,
    ):
        assert b'"content":"Hel"' in stream.frame()
        subscription = {"thread_id": thread, "message_id": "open", "idle_timeout": 0}
        assert ask(socket, type="subscribe", id="open", **subscription)["content"] == "Hel"
        uploads = []
        for number, moment in enumerate(moments):
            kind = {**NDJSON, **bearer(token(exp=moment, scope="write"))}
            uploads.append(exits.enter_context(Upload(service, message_path(thread, f"upload-{number}"), kind)))
            uploads[-1].send(b'{"content": "before"}\n')
        wait_until(lambda: len(contents(admin, thread)) == 2 + len(uploads))
        seq = admin.get(f"/threads/{thread}/chunks").json()["cursor"]
        poll = Connection(service, "GET", f"/threads/{thread}/chunks?message_id=open&wait=15&after={seq}", headers)
        assert time.time() < exp, "this machine is too slow for this test"
        wait_until(lambda: time.time() >= moments[-1] + 0.1)
        append(admin, thread, "open", "a secret of later").raise_for_status()
        with poll:
            yield Expiring(thread, exp, stream, socket, uploads, poll)


def test_an_open_stream_ends_with_its_token(expiring: Expiring) -> None:
    (event, data, *rest) = expiring.stream.rest().split(b"\n")
    assert event == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["status"] == 401
    assert rest == [b"", b""]  # nothing after it: the end of the body


def test_an_open_subscription_ends_with_its_token(service: Service, expiring: Expiring) -> None:
    socket = expiring.socket
    error = json.loads(socket.recv(TIMEOUT))
    assert (error["type"], error["id"], error["status"]) == ("error", "open", 401)
    assert json.loads(socket.recv(TIMEOUT)) == {"type": "unsubscribed", "id": "open"}
    for kind, (members, _) in FRAMES.items():
        answer = ask(socket, type=kind, id=kind, thread_id=expiring.thread, **members)
        assert (answer["type"], answer["id"], answer["status"]) == ("error", kind, 401)


def test_an_upload_ends_with_its_token(admin: httpx.Client, expiring: Expiring) -> None:
    answers = [upload.answer() for upload in expiring.uploads]
    assert [status for status, _ in answers] == [401] * len(answers), answers
    assert {upload.response.headers["www-authenticate"] for upload in expiring.uploads} == {"Bearer"}
    stored = admin.get(f"/threads/{expiring.thread}/content?message_id=upload-0").json()
    assert (stored["content"], stored["status"]) == ("before", "active")


def test_a_long_poll_gives_nothing_from_after_its_token(expiring: Expiring) -> None:
    expiring.poll.begin_answer()
    assert b"a secret of later" not in expiring.poll.rest()
    assert time.time() - expiring.expired < 10


def test_a_stream_with_a_valid_token_goes_on(service: Service, admin: httpx.Client, thread: str) -> None:
    with Stream(service, f"{message_path(thread, 'open', 'stream')}?idle_timeout=0&access_token={token()}") as stream:
        stream.frame()
        append(admin, thread, "open", "lo", complete=True)
        assert data_of(stream.frame())["content"] == "lo"
        assert data_of(stream.frame())["status"] == "completed"
        assert stream.rest() == b""
    assert contents(admin, thread) == ["Hello", "Hel", "lo"]


# The command line


def test_the_token_command_makes_tokens(anyone: httpx.Client, thread: str) -> None:
    began = int(time.time())
    command = [sys.executable, str(ROOT / "app.py"), "token"]
    environment = {**os.environ, "RESUME_STREAM_SECRET": SECRET}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (made.returncode, made.stderr) == (0, "")
    claims = jwt.decode(made.stdout.strip(), SECRET, ["HS256"])
    assert (claims["scope"], claims.get("threads")) == ("read", None)
    assert abs(claims["exp"] - began - HOUR) < 10
    assert anyone.get(f"/api/threads/{thread}", headers=bearer(made.stdout.strip())).status_code == 200


def test_the_token_command_makes_narrower_tokens(
    anyone: httpx.Client, thread: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = int(time.time())
    flags = ["--scope", "write read", "--thread", "x*", "--thread", thread, "--expires-in", "5m", "--secret", SECRET]
    assert main(["token", *flags]) == 0
    made = capsys.readouterr().out.strip()
    claims = jwt.decode(made, SECRET, ["HS256"])
    assert (sorted(claims["scope"].split()), claims["threads"]) == (["read", "write"], ["x*", thread])
    assert abs(claims["exp"] - began - 300) < 10
    assert anyone.put(f"/api/threads/{thread}/messages/new", headers=bearer(made)).status_code == 201
    assert anyone.get("/api/threads/another", headers=bearer(made)).status_code == 403


@pytest.mark.parametrize(
    ("flags", "secret", "said"),
    [
        ([], None, "secret"),
        ([], "", "secret"),
        (["--scope", "everything"], SECRET, "--scope"),
        (["--scope", ""], SECRET, "--scope"),
        (["--expires-in", "soon"], SECRET, "--expires-in"),
    ],
)
def test_the_token_command_says_what_is_wrong(
    flags: list[str], secret: str | None, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RESUME_STREAM_SECRET", raising=False)
    if secret is not None:
        monkeypatch.setenv("RESUME_STREAM_SECRET", secret)
    assert main(["token", *flags]) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert said in error
