"""The express paths answer exactly as the ordinary path does.

Most tests here send the same bytes to two services, one of which has no ``extras/express.py``, and compare all bytes of
the answers but times and generations.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import math
import re
import socket
import sqlite3
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jwt
import pytest
import uvicorn
from buffers import detach
from conftest import ROOT, TIMEOUT, Service, generated, until, wait_until
from hypothesis import given
from hypothesis import strategies as st
from resume_stream import app
from resume_stream.app import ChunkBuffer, Settings
from resume_stream.extras import express, limits

SECRET = "correct horse battery staple, 32+"
READERS = 12  # at a time
LIMITS = ("--max-chunk", "24KiB", "--max-body", "32KiB", "--max-message", "60KiB", "--max-readers", str(READERS))
FLAGS = (*LIMITS, "--heartbeat", "40ms", "--cors-origins", "https://chat.example", "--synchronous", "NORMAL")


class Ordinary(Service):
    """A service without express paths."""

    first = 'sys.modules["resume_stream.extras.express"] = None'


class Pair(NamedTuple):
    """Two services with the same settings."""

    express: Service
    ordinary: Service

    def both(self, ask: Callable[..., Any], *how: Any) -> Any:
        """Ask both, and return what both answered."""
        express, ordinary = (ask(service, *how) for service in self)
        assert express == ordinary, how
        return express


@contextlib.contextmanager
def pair_of(folder: Path, *flags: str) -> Iterator[Pair]:
    pair = Pair(Service(folder / "express.db", *flags), Ordinary(folder / "ordinary.db", *flags))
    with pair.express, pair.ordinary:
        yield pair
        assert [service.tracebacks() for service in pair] == [0, 0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Without a secret."""
    with pair_of(tmp_path_factory.mktemp("open"), *FLAGS) as pair:
        yield pair


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With a secret."""
    with pair_of(tmp_path_factory.mktemp("guarded"), *FLAGS, "--secret", SECRET) as pair:
        yield pair


# Connections


def masked(data: bytes) -> bytes:
    """The data without dates, times, generations, and the order of allowed methods."""
    data = re.sub(rb"(\r\ndate:)[^\r]*", rb"\1", data)
    data = re.sub(rb"(?<=\r\nallow: )[^\r]*", lambda allowed: b", ".join(sorted(allowed[0].split(b", "))), data)
    return re.sub(rb"\b1\d{12}\b", b"TIME", data)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answers are equal if all is equal but dates, times, and generations."""

    head: bytes
    body: bytes
    raw: bytes = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, head: bytes, body: bytes) -> Answer:
        return cls(masked(head), masked(body), body)

    @property
    def status(self) -> int:
        return int(self.head[9:12])


class Link:
    """A connection that sends bytes as they are, and reads answers one by one."""

    def __init__(self, service: Service, buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect(("127.0.0.1", service.port))
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes, cuts: Sequence[int] = ()) -> Self:
        """Send the data in pieces that end at these places."""
        with contextlib.suppress(ConnectionError):  # it may be closed after a bad request
            for start, end in itertools.pairwise([0, *sorted({cut % len(data) for cut in cuts}), len(data)]):
                if start < end:
                    self.socket.sendall(data[start:end])
        return self

    def more(self) -> bool:
        """Read what comes next. Return False at the end."""
        try:
            piece = self.socket.recv(65536)
        except ConnectionResetError:
            piece = b""
        self.received += piece
        return piece != b""

    def until(self, mark: bytes) -> bytes:
        """Read up to and with this mark. Raises EOFError if it does not come."""
        while mark not in self.received:
            if not self.more():
                raise EOFError(f"{mark!r} did not come after {self.received!r}")
        found, end, self.received = self.received.partition(mark)
        return found + end

    def read(self, size: int) -> bytes:
        while len(self.received) < size:
            if not self.more():
                raise EOFError(f"of {size} bytes came {self.received!r}")
        found, self.received = self.received[:size], self.received[size:]
        return found

    def chunk(self) -> bytes:
        """Read a chunk of a body (RFC 9112, 7.1)."""
        size = int(self.until(b"\r\n"), 16)
        return self.read(size + 2)[:-2]

    def answer(self) -> Answer:
        head = self.until(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 1"):
            following = self.answer()
            return Answer.of(head + following.head, following.raw)
        body = b""
        if b"\r\ntransfer-encoding: chunked\r\n" in head:
            while piece := self.chunk():
                body += piece
        elif sized := re.search(rb"\r\ncontent-length: (\d+)", head):
            body = self.read(int(sized[1]))
        return Answer.of(head, body)

    def answers(self, most: int) -> list[Answer | None]:
        """Read so many answers. None stands for the end of the connection."""
        found: list[Answer | None] = []
        with contextlib.suppress(EOFError):
            while len(found) < most:
                found.append(self.answer())
            return found
        return [*found, None]


def ask(service: Service, data: bytes, cuts: Sequence[int] = ()) -> Answer:
    with Link(service) as link:
        return link.send(data, cuts).answer()


# Requests


@dataclasses.dataclass(frozen=True)
class Request:
    """An append, if nothing is changed."""

    thread: str = "t"
    message: str = "run"
    query: str = ""
    method: str = "POST"
    version: str = "1.1"
    call: str = "/chunks"
    body: bytes = b'{"content":"text"}'
    headers: tuple[tuple[str, str], ...] = (("Host", "localhost"), ("Content-Type", "application/json"))
    framing: str = "length"

    def with_(self, **changes: Any) -> Request:
        return dataclasses.replace(self, **changes)

    def has(self, name: str, *values: str) -> Request:
        """The same request with these values of a header, and no others."""
        others = [header for header in self.headers if header[0] != name]
        return self.with_(headers=(*others, *((name, value) for value in values)))

    def __bytes__(self) -> bytes:
        target = f"/api/threads/{self.thread}/messages/{self.message}{self.call}{self.query}"
        lines = [f"{self.method} {target} HTTP/{self.version}", *(": ".join(header) for header in self.headers)]
        body = self.body
        if self.framing == "length":
            lines.append(f"Content-Length: {len(body)}")
        elif self.framing == "chunked":
            lines.append("Transfer-Encoding: chunked")
            half = len(body) // 2
            pieces = [*(piece for piece in (body[:half], body[half:]) if piece), b""]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def token(**claims: Any) -> str:
    claims = {"exp": int(time.time()) + 3600, "scope": "read write", **claims}
    return jwt.encode(claims, SECRET, "HS256")


def bearer(text: str) -> Request:
    return Request().has("Authorization", f"Bearer {text}")


def flipped(text: str) -> str:
    """The token with another signature."""
    head, claims, signature = text.split(".")
    raw = bytearray(base64.urlsafe_b64decode(signature + "="))
    raw[0] ^= 1
    return ".".join([head, claims, base64.urlsafe_b64encode(raw).decode().rstrip("=")])


Change = Callable[[Request], Request]


def set_(**changes: Any) -> Change:
    return lambda request: request.with_(**changes)


def header(name: str, *values: str) -> Change:
    return lambda request: request.has(name, *values)


def content(*chunks: Any) -> Change:
    return set_(body=json.dumps(chunks).encode())


BODIES = {
    "a chunk with an event": b'{"content":"b","event":"tool"}',
    "chunks": b'[{"content":"b"},{"content":""},{"content":"\\ud83d\\ude00","event":"tool"}]',
    "no chunks": b"[]",
    "spaces": b' \n{ "content" : "b" } ',
    "a key twice": b'{"content":"a","content":"b"}',
    "no event": b'{"content":"b","event":null}',
    "nothing": b"",
    "not JSON": b"nonsense",
    "cut short": b'{"content":"b',
    "two values": b'{"content":"b"}{"content":"c"}',
    "a text": b'"b"',
    "a number": b'{"content":1}',
    "no content": b'{"event":"tool"}',
    "an unknown field": b'{"content":"b","evnt":"tool"}',
    "a reserved event": b'{"content":"b","event":"complete"}',
    "an empty event": b'{"content":"b","event":""}',
    "a line end in an event": b'{"content":"b","event":"a\\nb"}',
    "a long event": b'{"content":"b","event":"%s"}' % (b"x" * 201),
    "a lone surrogate": b'{"content":"\\ud83d"}',
    "a lone surrogate in the second chunk": b'[{"content":"b"},{"content":"\\ude00"}]',
    "a lone surrogate in an event": b'{"content":"b","event":"\\ud83d"}',
    "bytes that are no UTF-8": b'{"content":"\xff"}',
    "arrays in arrays": b"[" * 3000,
    "chunks of max_chunk": b'{"content":"%s"}' % (b"x" * 24 * 1024),
    "a chunk over max_chunk": b'{"content":"%s"}' % (b"x" * (24 * 1024 + 1)),
    "a small body": b'{"content":"b"}'.ljust(16 * 1024),
    "a body that is not small": b'{"content":"b"}'.ljust(16 * 1024 + 1),
    "a body of max_body": b'{"content":"b"}'.ljust(32 * 1024),
    "a body over max_body": b'{"content":"b"}'.ljust(32 * 1024 + 1),
}
INDEXES = [
    "0",
    "1",
    "2",
    "00",
    "01",
    "7",
    "-1",
    "+1",
    "1.0",
    "one",
    "",
    "%31",
    "9" * 15,
    "9" * 16,
    "9" * 20,
    "0&index=1",
]
QUERIES = [f"?index={index}" for index in INDEXES]
QUERIES += [f"?complete={value}" for value in ("true", "false", "True", "1", "perhaps", "")]
QUERIES += ["?index=0&complete=true", "?index=1&complete=true", "?complete=true&index=1", "?index=1&complete=false"]
QUERIES += ["?index=0&other=1", "?other=1", "?"]
MESSAGES = [".", "..", ".run", "r.un", "r@u:n~-_", "r%75n", "r%20n", "%C3%BC", "%E9", "r%2Fn", "r%0An", "r/n", "", "%"]
MESSAGES += ["x" * 200, "x" * 201, "%78" * 200]
HOSTS = ["LOCALHOST:1", "127.0.0.1", "[::1]", "evil.example", "localhost.evil.example", "localhost@evil.example", ""]
HEADERS = {
    "Content-Type": [
        *("application/json; charset=utf-8", "application/json;charset=latin-1", "APPLICATION/JSON", "text/json", ""),
        *("application/jsonx", "application/x-ndjson", "text/plain", "text/plain; charset=utf-8", "application/xml"),
    ],
    "Origin": ["http://localhost", "https://chat.example", "https://evil.example", "null", ""],
    "X-Request-Id": ["mine"],
    "Content-Encoding": ["gzip", "identity"],
    "Expect": ["100-continue"],
    "Accept": ["text/plain"],
    "Connection": ["close", "Keep-Alive"],
    "Resume-Message": ["other"],
}
CHANGES: dict[str, Change] = {
    "nothing": lambda request: request,
    **{f"a body with {name}": set_(body=body) for name, body in BODIES.items()},
    **{f"the query {query}": set_(query=query) for query in QUERIES},
    **{f"the message {message:.10} ({len(message)})": set_(message=message) for message in MESSAGES},
    **{f"the host {host!r}": header("Host", host) for host in HOSTS},
    "no host": header("Host"),
    "two hosts": header("Host", "localhost", "evil.example"),
    **{f"{name}: {value}": header(name, value) for name, values in HEADERS.items() for value in values},
    "no content type": header("Content-Type"),
    "two content types": header("Content-Type", "text/plain", "application/json"),
    **{f"the method {method}": set_(method=method) for method in ("PUT", "GET", "DELETE", "PATCH", "OPTIONS")},
    "the version 1.0": set_(version="1.0"),
    "the version 1.0, kept alive": lambda request: request.with_(version="1.0").has("Connection", "keep-alive"),
    "a body in chunks": set_(framing="chunked"),
    **{f"the call {call}": set_(call=call) for call in ("/complete", "/abort", "/chunks/", "/Chunks", "", "/stream")},
}
TOKENS: dict[str, Change] = {
    "nothing": lambda request: request,
    "no token": header("Authorization"),
    **{
        f"the token {name}": header("Authorization", text)
        for name, text in {
            "of another scheme": f"Basic {token()}",
            "of no scheme": token(),
            "of a small scheme": f"bearer {token()}",
            "after two spaces": f"Bearer  {token()}",
            "with a wrong signature": f"Bearer {flipped(token())}",
            "that has expired": f"Bearer {token(exp=int(time.time()) - 5)}",
            "that does not expire": f"Bearer {jwt.encode({'scope': 'write'}, SECRET, 'HS256')}",
            "that may read": f"Bearer {token(scope='read')}",
            "that may abort": f"Bearer {token(scope='abort')}",
            "of an administrator": f"Bearer {token(scope='admin')}",
            "for other threads": f"Bearer {token(threads=['other', 'x-*'])}",
            "for these threads": f"Bearer {token(threads=['other', 't-*'])}",
            "that is none": "Bearer garbage",
            "that is empty": "Bearer ",
        }.items()
    },
    "two tokens": header("Authorization", f"Bearer {token()}", f"Bearer {token(scope='read')}"),
    "a token in the query": lambda request: request.has("Authorization").with_(query=f"?access_token={token()}"),
    "a foreign origin": header("Origin", "https://evil.example"),
    "another host": header("Host", "evil.example"),
    "a bad body": set_(body=b"nonsense"),
    "a body in chunks": set_(framing="chunked"),
}


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET /api/threads/{path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


NUMBERS = itertools.count()


def thread_name() -> str:
    return f"t-{next(NUMBERS)}"


def stored(service: Service, thread: str, token: str = "") -> Answer:
    return ask(service, get(f"{thread}/chunks?access_token={token}"))


def said(service: Service, requests: Sequence[Request], at_once: bool = False, cuts: Sequence[int] = ()) -> Any:
    """Send the requests on one connection, or on the next where it is closed, and return all answers."""
    found: list[Answer | None] = []
    if at_once:
        with Link(service) as link:
            return link.send(b"".join(map(bytes, requests)), cuts).answers(len(requests))
    with contextlib.ExitStack() as exits:
        link = exits.enter_context(Link(service))
        for request in requests:
            found += link.send(bytes(request), cuts).answers(1)
            if found[-1] is None or b"\r\nconnection: close\r\n" in found[-1].head:
                assert not link.more()
                link = exits.enter_context(Link(service))
    return found


FIRST = Request()
LAST = Request(query="?index=1&complete=true", body=b'{"content":"!"}')


@pytest.mark.parametrize("before", [[], [FIRST], [FIRST, LAST]], ids=["new message", "active message", "ended message"])
def test_an_append_that_differs_in_one_thing_is_answered_the_same(pair: Pair, before: list[Request]) -> None:
    for name, change in CHANGES.items():
        thread = thread_name()
        requests = [request.with_(thread=thread) for request in (*before, change(Request()), FIRST)]
        pair.both(lambda service, name, requests=requests: said(service, requests), name)
        pair.both(stored, thread)


def test_an_append_with_a_token_is_answered_the_same(guarded: Pair) -> None:
    for name, change in TOKENS.items():
        thread = thread_name()
        good = bearer(token()).with_(thread=thread)
        requests = [change(good), good]
        answers = guarded.both(lambda service, name, requests=requests: said(service, requests), name)
        assert answers[1].status == 201
        guarded.both(stored, thread, token())


# Of a text, each piece that arrives becomes a chunk, so where it is cut shows.
COMBINED = [name for name in CHANGES if "text/plain" not in name and name != "two content types"]


@generated(70)
@given(
    changes=st.lists(st.lists(st.sampled_from(COMBINED), max_size=2), min_size=1, max_size=7),
    same_message=st.booleans(),
    at_once=st.booleans(),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
)
def test_requests_are_answered_the_same_in_any_order_and_however_they_are_cut(
    pair: Pair, changes: list[list[str]], same_message: bool, at_once: bool, cuts: list[int]
) -> None:
    thread = thread_name()
    requests = []
    for number, names in enumerate(changes):
        request = Request(thread=thread, message="run" if same_message else f"run-{number % 2}")
        for name in names:
            request = CHANGES[name](request)
        requests.append(request)
    pair.both(said, requests, at_once, cuts)
    pair.both(stored, thread)


@generated(60)
@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    retries=st.lists(
        st.tuples(st.integers(-2, 2), st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=6
    ),
    at_once=st.booleans(),
)
def test_retried_appends_are_answered_the_same(
    pair: Pair, sizes: list[int], retries: list[tuple[int, int, bool, bool]], at_once: bool
) -> None:
    """Chunks that are there already, more after them, others in their place, gaps, and the end again."""
    thread, count, requests = thread_name(), sum(sizes), []

    def sent(start: int, size: int, spoilt: bool = False, complete: bool = False) -> Request:
        texts = [f"{number}{'!' * (spoilt and number == start)}" for number in range(start, start + size)]
        query = f"?index={start}{'&complete=true' * complete}"
        return Request(thread, query=query, body=json.dumps([{"content": text} for text in texts]).encode())

    start = 0
    for size in sizes:
        requests.append(sent(start, size))
        start += size
    requests += [sent(max(0, count + back), size, *rest) for back, size, *rest in retries]
    pair.both(said, requests, at_once)
    pair.both(stored, thread)


def test_requests_sent_at_once_are_answered_in_their_order(pair: Pair) -> None:
    """Those that only the ordinary path answers among them. A refused one closes nothing."""
    append = Request(thread_name())
    answers = pair.both(
        lambda service: said(
            service,
            [
                append,
                append.has("X-Request-Id", "mine"),
                append.with_(query="?index=5"),
                append.with_(body=b"nonsense"),
                append.with_(query="?index=2&complete=true"),
            ],
            at_once=True,
        )
    )
    assert [answer.status for answer in answers] == [201, 201, 409, 422, 201]
    assert [json.loads(answers[number].body)["seq"] for number in (0, 1, 4)] == [1, 2, 4]


def test_the_bytes_of_an_answer(pair: Pair) -> None:
    thread = thread_name()
    append = Request(thread)
    first, last = pair.both(said, [append, append.has("Connection", "close")])
    body = b'{"threadId":"%s","messageId":"run","seq":1,"chunkCount":1,"status":"active"}' % thread.encode()
    head = (
        b"HTTP/1.1 201 Created\r\ndate:\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"cache-control: no-store\r\nx-content-type-options: nosniff\r\n%s\r\n"
    )
    assert (first.head, first.body) == (head % (len(body), b""), body)
    assert last.head == head % (len(body), b"connection: close\r\n")


def test_a_body_that_comes_byte_by_byte_is_taken(pair: Pair) -> None:
    append = bytes(Request(thread_name()))
    assert pair.both(ask, append, range(len(append))).status == 201


def test_a_body_slower_than_the_express_way_waits_is_taken(pair: Pair) -> None:
    """The express path hands it on to the ordinary one."""
    append = bytes(Request(thread_name()))
    with contextlib.ExitStack() as exits:
        links = [exits.enter_context(Link(service)) for service in pair]
        for link in links:
            link.socket.sendall(append[:-5])
        patience = time.monotonic() + 1.2 * express.BODY_TIMEOUT
        wait_until(lambda: time.monotonic() > patience)
        assert [link.send(append[-5:]).answer().status for link in links] == [201, 201]


def test_a_producer_that_is_gone_before_its_answer_has_appended(pair: Pair) -> None:
    thread = thread_name()
    for service in pair:
        with Link(service) as link:
            link.send(bytes(Request(thread)))
        wait_until(lambda service=service: b'"chunks":[{' in stored(service, thread).body)
    assert b'"content":"text"' in pair.both(stored, thread).body


@pytest.mark.parametrize("rest", [b'ext"}', b"ext without end"])
def test_an_append_ends_with_its_token_whatever_the_rest_of_its_body_is(guarded: Pair, rest: bytes) -> None:
    """Also with a token that the service has seen while it was good."""
    thread, exp = thread_name(), math.ceil(time.time() + 0.1)
    begun = bearer(token(exp=exp)).with_(thread=thread, body=b'{"content":"t' + rest)
    assert guarded.both(ask, bytes(begun.with_(body=b"[]"))).status == 200
    wait_until(lambda: time.time() >= exp - 0.8 * express.BODY_TIMEOUT)
    with contextlib.ExitStack() as exits:
        links = [exits.enter_context(Link(service)) for service in guarded]
        for link in links:
            link.send(bytes(begun)[: -len(rest)])
        wait_until(lambda: time.time() >= exp)
        answers = [link.send(rest).answer() for link in links]
    assert answers[0] == answers[1]
    assert answers[0].status == 401
    assert b"\r\nwww-authenticate: Bearer\r\ncontent-type: application/problem+json\r\n" in answers[0].head
    assert answers[0].body == (
        b'{"status":401,"title":"Unauthorized",'
        b'"detail":"The token has expired; get a new one, and carry on from the cursor."}'
    )
    assert b'"chunks":[]' in guarded.both(stored, thread, token()).body


# Streams


def resume(**body: Any) -> bytes:
    request = bytes(Request(body=json.dumps(body).encode()))
    return request.replace(b"/api/threads/t/messages/run/chunks", b"/api/resume-stream")


class Reader:
    """A stream on a connection, and what has come of it."""

    def __init__(self, service: Service, request: bytes, buffer: int = 0) -> None:
        self.link = Link(service, buffer).send(request)
        self.head = self.link.until(b"\r\n\r\n")
        self.ended = b"\r\ntransfer-encoding: chunked\r\n" not in self.head
        if self.ended:
            sized = re.search(rb"\r\ncontent-length: (\d+)", self.head)
            self.body = self.link.read(int(sized[1])) if sized else b""
        else:
            self.body = self.link.chunk()

    def has(self, mark: bytes) -> bool:
        """Read on until this has come, or all has."""
        while not self.ended and mark not in self.body:
            piece = self.link.chunk()
            self.body += piece
            self.ended = not piece
        return mark in self.body

    def whole(self) -> Answer:
        """Read to the end, and leave out heartbeats, as they depend on time."""
        assert not self.has(b"what never comes")
        return Answer.of(self.head, self.body.replace(b": hb\n", b""))

    def and_after_it(self) -> list[Answer]:
        """The whole stream, and the answer to the next request on its connection."""
        with self.link:
            return [self.whole(), self.link.send(get("nowhere")).answer()]


def opened(exits: contextlib.ExitStack, service: Service, request: bytes) -> Reader:
    reader = Reader(service, request)
    exits.enter_context(reader.link)
    return reader


class Story:
    """What happens to one thread of one service, and what its readers get."""

    def __init__(self, service: Service, thread: str) -> None:
        self.service, self.thread = service, thread
        self.link = Link(service)
        self.answers: list[Answer] = []
        self.readers: list[tuple[Reader, str | None, int]] = []  # each with its message, and where it begins
        self.text, self.text_end = "", 0  # of the message a, and the sequence number of its last chunk
        self.last: dict[str | None, int] = {}  # sequence number of each message, and of the thread

    def append(self, message: str, count: int, complete: bool) -> None:
        texts = [f"{message}{number}" for number in range(count)]
        body = json.dumps([{"content": text} for text in texts]).encode()
        answer = self.asked(Request(self.thread, message, "?complete=true" * complete, body=body))
        if answer.status == 201 and message == "a" and texts:
            self.text += "".join(texts)
            self.text_end = json.loads(answer.body)["seq"] - complete

    def abort(self, message: str) -> None:
        self.asked(Request(self.thread, message, call="/abort", body=b'{"reason":"stop"}'))

    def asked(self, request: Request) -> Answer:
        answer = self.link.send(bytes(request)).answer()
        self.answers.append(answer)
        if answer.status in (200, 201) and (seq := json.loads(answer.body)["seq"]) > self.last.get(None, 0):
            self.last[request.message] = self.last[None] = seq
        self.tell()
        return answer

    def tell(self) -> None:
        """Wait until all readers have all there is, as the next change may hide it from those who are late."""
        for reader, message, begins in self.readers:
            if (seq := self.last.get(message, 0)) > begins:
                reader.has(b'"seq":%d}' % seq)

    def clear(self) -> None:
        answer = self.link.send(get(self.thread).replace(b"GET", b"DELETE")).answer()
        self.answers.append(answer)
        if answer.status == 204:
            self.text, self.text_end, self.last = "", 0, {}
            for reader, _, _ in self.readers:
                reader.whole()

    def read(self, reading: str, place: str) -> None:
        where, _, message = reading.partition(" ")
        found = re.search(rb'"cursor":"(\d+)-', self.link.send(get(f"{self.thread}/content")).answer().raw)
        now, last = int(found[1]) if found else 17, self.last.get(None, 0)
        begins = 0
        if where == "text":
            known = {"start": "", "0": self.text[:-1], "2": self.text[:3], "x": "nowhere"}.get(place, self.text)
            request = resume(thread_id=self.thread, message_id=message, known_content=known)
            begins = self.text_end if known == self.text else 0
        else:
            path = f"{self.thread}/messages/{message}" if message else self.thread
            name, _, cursor = place.format(now=now, old=now - 1).rpartition(" ")
            query = "" if name or place == "start" else f"after={cursor}&"
            query += "follow=true" * (where == "follow")
            request = get(f"{path}/stream?{query}", *([f"{name} {cursor}"] if name else []))
            number = cursor.rpartition("-")[2]
            begins = int(number) if number.isdigit() and int(number) <= last and "{old}" not in place else 0
        self.readers.append((Reader(self.service, request), message or None, begins))
        self.tell()

    def end(self) -> list[Any]:
        for message in "ab":
            self.append(message, 1, True)
        self.clear()
        self.link.socket.close()
        return [self.answers, [reader.and_after_it() for reader, _, _ in self.readers]]


READINGS = ["thread", "follow", "message a", "message b", "follow a", "text a"]
PLACES = ["start", "{now}-0", "{now}-2", "{now}-3", "{now}-99", "{old}-1", "0", "2", "99", "x"]
PLACES += ["Last-Event-ID: {now}-1", "Last-Event-ID: {now}-4", "Last-Event-ID: {old}-1", "Last-Event-ID: x"]
READ = st.tuples(st.just("read"), st.sampled_from(READINGS), st.sampled_from(PLACES))
APPEND = st.tuples(st.just("append"), st.sampled_from("ab"), st.integers(0, 3), st.sampled_from([False, False, True]))
STEPS = st.one_of(APPEND, APPEND, READ, READ, st.tuples(st.just("abort"), st.sampled_from("ab")), st.just(("clear",)))


@generated(30)
@given(steps=st.lists(STEPS, min_size=2, max_size=READERS))
def test_readers_are_told_the_same_whatever_happens_to_their_thread(pair: Pair, steps: list[tuple[Any, ...]]) -> None:
    thread = thread_name()

    def told(service: Service) -> list[Any]:
        story = Story(service, thread)
        for name, *arguments in steps:
            getattr(story, name)(*arguments)
        return story.end()

    pair.both(told)


def test_a_quiet_stream_has_heartbeats_and_a_timeout(pair: Pair) -> None:
    thread = thread_name()
    for path in (f"{thread}/stream?follow=true", f"{thread}/messages/run/stream"):

        def told(service: Service, path: str = path) -> list[Answer]:
            reader = Reader(service, get(f"{path}{'&' if '?' in path else '?'}idle_timeout=0.15"))
            assert reader.has(b"event: timeout")
            assert reader.body.startswith(b"retry: 1000\n: hb\n") or b"content" in reader.body
            assert b": hb\n: hb\n" in reader.body
            return reader.and_after_it()

        pair.both(told)
        pair.both(ask, bytes(Request(thread)))


def test_a_stream_ends_with_its_token(guarded: Pair) -> None:
    thread, exp = thread_name(), math.ceil(time.time() + 0.3)
    guarded.both(ask, bytes(bearer(token()).with_(thread=thread)))
    with contextlib.ExitStack() as exits:
        request = get(f"{thread}/stream?access_token={token(exp=exp, scope='read')}")
        readers = [opened(exits, service, request) for service in guarded]
        assert [reader.has(b'"content":"text"') for reader in readers] == [True, True]
        wait_until(lambda: time.time() >= exp + 0.1)
        late = bearer(token()).with_(thread=thread, body=b'{"content":"a secret of later"}')
        guarded.both(ask, bytes(late))
        first, other = (reader.and_after_it() for reader in readers)
    assert first == other
    assert b"a secret of later" not in first[0].body
    assert re.search(rb'\n\nevent: error\ndata: {"status":401,[^\n]*\n\n$', first[0].body)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_request_waits_for_the_end_of_the_stream_before_it(pair: Pair, at_once: bool) -> None:
    thread, other = thread_name(), thread_name()
    first = pair.both(ask, bytes(Request(thread)))
    assert first.status == 201

    def told(service: Service) -> list[Answer]:
        reader = Reader(service, get(f"{thread}/stream") + bytes(Request(other)) * at_once)
        with reader.link as link:
            assert reader.has(b'"content":"text"')
            link.send(bytes(Request(other)) * (2 - at_once))
            ended = ask(service, bytes(Request(thread, query="?complete=true")))
            return [ended, reader.whole(), link.answer(), link.answer()]

    *_, waited, last = pair.both(told)
    assert [json.loads(answer.body)["seq"] for answer in (waited, last)] == [1, 2]


@pytest.mark.parametrize("rest", [b"{}", b""])
def test_a_stream_whose_request_has_a_body_is_the_same(pair: Pair, rest: bytes) -> None:
    """Also if the body has not come by the end of the stream."""
    thread = thread_name()
    pair.both(ask, bytes(Request(thread)))

    def told(service: Service) -> list[Any]:
        reader = Reader(service, get(f"{thread}/stream", "Content-Length: 2"))
        with reader.link as link:
            assert reader.has(b'"content":"text"')
            link.send(rest)
            ask(service, bytes(Request(thread, query="?complete=true")))
            return [reader.whole(), *link.send(get(thread)).answers(1)]

    pair.both(told)


def readers_of(service: Service, thread: str) -> int:
    return json.loads(ask(service, get(thread)).raw)["readers"]


def test_readers_are_counted_refused_over_the_limit_and_gone_when_they_leave(pair: Pair) -> None:
    thread = thread_name()
    pair.both(ask, bytes(Request(thread)))

    def told(service: Service) -> list[Answer]:
        with contextlib.ExitStack() as exits:
            readers = [opened(exits, service, get(f"{thread}/stream")) for _ in range(READERS)]
            assert readers_of(service, thread) == READERS
            refused = opened(exits, service, get(f"{thread}/stream")).whole()
            for reader in readers[READERS // 2 :]:
                reader.link.socket.close()
            wait_until(lambda: readers_of(service, thread) == READERS // 2)
            ask(service, bytes(Request(thread, query="?complete=true")))
            return [refused, *(reader.whole() for reader in readers[: READERS // 2])]

    refused, *_ = pair.both(told)
    assert refused.status == 503
    assert b"max_readers" in refused.body


def test_a_slow_reader_gets_everything_once_it_reads(pair: Pair) -> None:
    texts = [f"{number:03d}".ljust(24_000, "x") for number in range(150)]  # more than is buffered for it

    def told(service: Service) -> Answer:
        thread = f"slow-{service.db.name}"
        ask(service, bytes(Request(thread)))
        slow = Reader(service, get(f"{thread}/stream"), buffer=4096)
        with Link(service) as producer, slow.link:
            for number, text in enumerate(texts):
                append = Request(thread, f"run-{number}", body=json.dumps({"content": text}).encode())
                assert producer.send(bytes(append.with_(query="?complete=true"))).answer().status == 201
            producer.send(bytes(Request(thread, query="?complete=true"))).answer()
            return slow.whole()

    seen = pair.both(told).body
    assert [int(number) for number in re.findall(rb'"content":"(\d{3})x', seen)] == list(range(len(texts)))


@pytest.mark.anyio
async def test_a_connection_that_takes_no_more_is_sent_nothing_until_it_does(buffer: ChunkBuffer) -> None:
    await buffer.add_chunks("t", "m", ["a"])
    wire = detach(buffer, await buffer.locate("t"))
    await until(lambda: wire.pieces)
    wire.write_paused = True
    sent = len(wire.pieces)
    await buffer.add_chunks("t", "m", ["b"])
    await buffer.add_chunks("t", "m", ["c"], complete=True)
    assert len(wire.pieces) == sent
    wire.write_paused = False
    wire.detached()
    assert await wire.lines() == [(1, "a"), (2, "b"), (3, "c"), (4, "completed")]


def test_a_thread_that_somebody_deletes_with_sqlite_is_gone_for_its_readers(pair: Pair) -> None:
    thread = thread_name()

    def told(service: Service) -> list[Answer]:
        ask(service, bytes(Request(thread)))
        with contextlib.closing(sqlite3.connect(service.db)) as shell, shell:
            reader = Reader(service, get(f"{thread}/stream?follow=true"))
            assert reader.has(b'"content":"text"')
            app.open_packs(shell)
            shell.execute("delete from threads where thread_id = ?", (thread,))
        return reader.and_after_it()

    assert pair.both(told)[0].body.endswith(b"event: gone\ndata: {}\n\n")


def test_readers_of_a_service_that_stops_are_told_no_end(tmp_path: Path) -> None:
    with pair_of(tmp_path) as pair:

        def told(service: Service) -> list[Answer]:
            ask(service, bytes(Request()))
            with contextlib.ExitStack() as exits:
                readers = [opened(exits, service, get(f"t/{path}")) for path in ("stream", "messages/run/stream")]
                assert [reader.has(b'"content":"text"') for reader in readers] == [True, True]
                assert service.end() == 0
                return [reader.whole() for reader in readers]

        assert b"event:" not in b"".join(answer.body for answer in pair.both(told))


# uvicorn


def test_with_another_uvicorn_the_ordinary_path_answers_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = ChunkBuffer(Settings(db=":unused:"))
    assert issubclass(app.Parts(buffer).connection[0], limits.Limited)
    assert issubclass(app.Parts(buffer).connection[1], express.Express)
    monkeypatch.setattr(uvicorn, "__version__", "99.1.0")
    assert app.Parts(buffer).connection == []
    assert [record.message for record in caplog.records] == [
        "uvicorn 99.1.0 was not tested, so connections are its own: without limits"
    ]


def test_the_tested_uvicorn_is_the_required_one_and_the_installed_one() -> None:
    (wanted,) = [
        name
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if name.startswith("uvicorn")
    ]
    first, end = (".".join(map(str, bound)) for bound in express.TESTED_UVICORN)
    assert wanted == f"uvicorn>={first},<{end}"
    assert uvicorn.__version__.startswith(f"{first}.")
