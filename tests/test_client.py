"""The Python client, against real service processes that are killed, stopped, busy, and slow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import resume_stream.client.client
from conftest import TIMEOUT, Service
from resume_stream.client import (
    Appended,
    Chunk,
    Client,
    ClientError,
    Conflict,
    Forbidden,
    Gone,
    InvalidContent,
    MessageEnd,
    MessageEnded,
    NotFound,
    Problem,
    Reset,
    StoredChunk,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unreachable,
    connection,
)
from resume_stream.client.connection import Backoff
from resume_stream.client.reading import Event, EventParser
from resume_stream.extras import tokens
from wire import serving

pytestmark = pytest.mark.anyio

SECRET = "a secret of at least thirty-two bytes"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("client"), "--max-chunk", "64KiB", "--idle-timeout", "300ms") as service:
        yield service


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("secured"), "--secret", SECRET) as service:
        yield service


@pytest.fixture(scope="module")
def mortal_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("mortal"), "--max-readers", "1") as service:
        yield service


@pytest.fixture
def mortal(mortal_service: Service) -> Service:
    """Return a service that a test may kill. It has room for one reader."""
    return mortal_service if mortal_service.is_running else mortal_service.start()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with Client(service.url) as client:
        yield client


def token(scope: str, expires: float = 4e9) -> str:
    return tokens.token_for(SECRET, tokens.TokenGrant(None, expires, frozenset(scope.split())))


class Wire(httpx.AsyncHTTPTransport):
    """A network that a test can disturb: ``before`` sees each request, ``after`` each answer."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[httpx.Request] = []
        self.before: Callable[[httpx.Request], Any] = lambda request: None
        self.after: Callable[[httpx.Request, httpx.Response], Any] = lambda request, response: None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        early = self.before(request)
        if isinstance(early, httpx.Response):
            return early
        if early is not None:
            await early
        response = await super().handle_async_request(request)
        return self.after(request, response) or response

    def appends(self) -> list[list[str]]:
        """Return the texts of each append."""
        sent = [request for request in self.requests if request.url.path.endswith("/chunks")]
        return [[chunk["content"] for chunk in json.loads(request.content)] for request in sent]


@contextlib.asynccontextmanager
async def on_wire(service: Service, **options: Any) -> AsyncIterator[tuple[Client, Wire]]:
    wire = Wire()
    async with httpx.AsyncClient(transport=wire) as http:
        yield Client(service.url, http=http, **options), wire


class Source:
    """Yields what a test gives it, and notes whether it was closed."""

    def __init__(self, *pieces: str | Chunk | BaseException) -> None:
        self.queue: asyncio.Queue[str | Chunk | BaseException | None] = asyncio.Queue()
        self.pulled = 0
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self.give(*pieces)

    def give(self, *pieces: str | Chunk | BaseException | None) -> None:
        for piece in pieces:
            self.queue.put_nowait(piece)

    async def __aiter__(self) -> AsyncIterator[str | Chunk]:
        self.asked.set()
        try:
            while (piece := await self.queue.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                self.pulled += 1
                yield piece
        finally:
            self.closed.set()


async def come_true(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait until a condition is true that this event loop makes true, and return its value."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            found = condition()
            if value := (await found if asyncio.iscoroutine(found) else found):
                return value
            await asyncio.sleep(0.002)


async def stored(client: Client, thread: str, text: str) -> bool:
    try:
        return (await client.content(thread)).content == text
    except NotFound:
        return False


async def texts(items: AsyncIterator[Any]) -> list[str]:
    return [item.content async for item in items if isinstance(item, StoredChunk)]


async def ending(client: Client, thread: str, message: str = "run") -> tuple[str, str | None]:
    (found,) = (m for m in (await client.status(thread)).messages if m.message_id == message)
    return found.status, found.reason


# Server-sent events

SENT = (
    "\ufeffretry: 1000\nid: 7-1\ndata: {é😀}\n\n: hb\nevent:a\rdata:1\rdata: 2\r\r"
    "id: 7-\0\r\ndata\r\n\r\nevent: not dispatched\nid: 7-3\n\ndata:  3\nunknown: x\nretry: soon\n\ndata: cut off"
).encode()
EVENTS = [Event("", "{é😀}", "7-1"), Event("a", "1\n2", "7-1"), Event("", "", "7-1"), Event("", " 3", "7-3")]


def test_events_are_the_same_wherever_the_bytes_are_cut() -> None:
    for cut in range(len(SENT) + 1):
        for second in {cut, min(cut + 1, len(SENT)), min(cut + 2, len(SENT))}:
            parser = EventParser()
            pieces = SENT[:cut], SENT[cut:second], SENT[second:]
            assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS, (cut, second)
            assert parser.retry == 1000


def test_events_come_as_soon_as_their_last_byte() -> None:
    parser = EventParser()
    assert parser.feed(b"data: 1\r\n\r") == [Event("", "1", "")]
    assert parser.feed(b"\ndata: 2\r\r") == [Event("", "2", "")]
    assert parser.feed(b"data: \xff\n\n") == [Event("", "\ufffd", "")]


# Storing and reading


async def test_what_is_stored_is_read(client: Client, thread: str) -> None:
    pieces = ["Hello", "", Chunk('{"name": "s"}', event="tool_call"), "é😀\r\n\0"]
    source = Source(*pieces, None)
    assert await client.store(thread, "run", source) == Appended(thread, "run", 5, 4, "completed")
    assert source.closed.is_set()
    *chunks, end = [item async for item in client.read(thread, "run")]
    assert [(chunk.content, chunk.event) for chunk in chunks] == [
        (piece.content, piece.event) if isinstance(piece, Chunk) else (piece, None) for piece in pieces
    ]
    assert [chunk.seq for chunk in chunks] == [1, 2, 3, 4]
    generation = end.cursor.partition("-")[0]
    assert end == MessageEnd("run", "completed", None, 5, f"{generation}-5")
    assert [chunk.cursor for chunk in chunks] == [f"{generation}-{seq}" for seq in (1, 2, 3, 4)]
    assert [item async for item in client.read(thread, "run", after=chunks[1].cursor)] == [*chunks[2:], end]
    assert [item async for item in client.read(thread, "run", after=end.cursor)] == []


async def test_a_list_is_a_source_and_a_text_is_none(client: Client, thread: str) -> None:
    assert (await client.store(thread, "run", ["a", "b"])).chunk_count == 2
    assert (await client.store(thread, "empty", [])).status == "completed"
    with pytest.raises(TypeError, match="a chunk each"):
        await client.store(thread, "text", "ab")
    with pytest.raises(TypeError, match="int"):
        await client.store(thread, "number", [1])  # type: ignore[list-item]
    assert await ending(client, thread, "number") == ("aborted", "TypeError")


async def test_ids_are_any_text(client: Client) -> None:
    for thread, message in (("..", "."), ("a b?#%2F&=+", "é😀"), ("%", "..")):
        await client.store(thread, message, ["text"])
        assert await texts(client.read(thread, message)) == ["text"]
        assert (await client.status(thread)).thread_id == thread
        await client.clear(thread)
    for wrong in ("", "a/b"):
        with pytest.raises(ValueError, match="cannot be an id"):
            await client.open(wrong, "run")
    with pytest.raises(Problem, match="control"):
        await client.open("a\nb", "run")


async def test_the_module_snippet_runs(service: Service) -> None:
    snippet = resume_stream.client.__doc__.partition("::\n")[2].partition('\n    if __name__ == "__main__"')[0]
    names: dict[str, Any] = {}
    exec("\n".join(line.removeprefix("    ") for line in snippet.splitlines()), names)
    assert await names["main"](service.url) == "Hello, world"


async def test_every_public_name_is_there_and_no_other_is() -> None:
    names = {name: getattr(resume_stream.client, name) for name in resume_stream.client.__all__}
    assert names["Client"] is resume_stream.client.client.Client
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        resume_stream.client.nothing_of_the_kind  # noqa: B018


# A service that dies

DEATHS = int(os.environ.get("DEATHS", "3"))  # of the service, each third one a clean stop; DEATHS=15 tries it at length
ALPHABET = ["a", "word ", "é", "ß\n", "漢字", "😀", "👩‍👩‍👧", "", "\r\n", '"\\', "\u2028", "\t", "e\u0301"]


async def test_no_character_is_lost_or_doubled_while_the_service_dies(
    start_service: Callable[..., Service], thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high / 8)
    service = start_service("--idle-timeout", "1s")
    draw = random.Random(15)
    count = 150 * (DEATHS + 1)
    pieces = ["".join(draw.choices(ALPHABET, k=draw.randrange(3))) + str(n % 10) * (n % 3) for n in range(count)]
    deaths = [service.end if number % 3 == 2 else service.kill for number in range(DEATHS)]
    draw.shuffle(deaths)

    def die(death: Callable[[], Any]) -> None:
        death()
        service.start()

    async def source() -> AsyncIterator[str]:
        dying = asyncio.create_task(asyncio.sleep(0))
        for number, piece in enumerate(pieces):
            if number % 150 == 100 and deaths:
                await dying
                dying = asyncio.create_task(asyncio.to_thread(die, deaths.pop()))
            await asyncio.sleep(0)
            yield piece
        await dying

    async def follow(message: str | None) -> list[str]:
        async with Client(service.url) as reader:
            items = reader.read(thread, message, wait=True)
            found = []
            async for item in items:
                assert not isinstance(item, Reset)
                if isinstance(item, MessageEnd):
                    break
                found.append(item.content)
            await items.aclose()
            return found

    async with Client(service.url, window_chunks=100) as client, asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(follow(message)) for message in ("run", "run", None)]
        appended = await client.store(thread, "run", source())
    assert not deaths
    assert appended == Appended(thread, "run", count + 1, count, "completed")
    for reader in readers:
        assert reader.result() == pieces
    async with Client(service.url) as client:
        assert (await client.content(thread, "run")).content == "".join(pieces)


async def test_an_append_whose_answer_was_lost_is_stored_once(service: Service, thread: str) -> None:
    async with on_wire(service) as (client, wire):
        answered: list[tuple[str, bytes]] = []

        def lose_the_first(request: httpx.Request, response: httpx.Response) -> None:
            answered.append((str(request.url), request.content))
            if answered.count(answered[-1]) == 1:
                raise httpx.ReadError("cut")

        wire.after = lose_the_first
        source = Source("a")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: len(wire.appends()) == 2)
        source.give("b", None)
        assert (await storing).chunk_count == 2
        assert wire.appends() == [["a"], ["a"], ["b"], ["b"]]
    async with Client(service.url) as client:
        assert await texts(client.read(thread, "run")) == ["a", "b"]


async def test_a_service_that_is_busy_is_asked_again_when_it_says(service: Service, thread: str) -> None:
    async with on_wire(service) as (client, wire):
        answers = [httpx.Response(503, headers={"Retry-After": "1"}), httpx.Response(502, text="<html>")]
        times: list[float] = []

        def busy(request: httpx.Request) -> httpx.Response | None:
            times.append(time.monotonic())
            return answers.pop(0) if answers else None

        wire.before = busy
        await client.store(thread, "run", ["text"])
        assert len(times) == 4
        assert times[1] - times[0] >= 1
        assert times[2] - times[1] < 1
        assert (await client.content(thread)).content == "text"


async def test_patience_ends(service: Service, thread: str) -> None:
    async with on_wire(service, patience=0.2) as (client, wire):
        wire.before = lambda request: httpx.Response(
            507, json={"title": "Database full", "detail": "Full; free space."}
        )
        with pytest.raises(Unavailable, match="free space") as caught:
            await client.store(thread, "run", ["text"])
        assert (caught.value.status, caught.value.title) == (507, "Database full")
        with pytest.raises(Unavailable):
            await texts(client.read(thread, "run"))
    async with Client("http://127.0.0.1:9", patience=0) as client:
        with pytest.raises(Unreachable, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError") as lost:
            await client.store(thread, "run", ["text"])
        assert isinstance(lost.value.__cause__, httpx.ConnectError)


async def test_delays_grow_to_a_cap_with_jitter_and_start_over_after_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def sleep(delay: float) -> None:
        delays.append(delay)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff(patience=1000)
    for _ in range(8):
        await backoff.wait(Unreachable("away"))
    backoff.progressed()
    await backoff.wait(Unreachable("away"))
    assert delays == [0.25, 0.5, 1, 2, 4, 8, 10, 10, 0.25]
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    await backoff.wait(Problem.of({"status": 503, "title": "Busy"}, retry_after=7))
    assert delays[-1] == 7
    with pytest.raises(NotFound):
        await backoff.wait(Problem.of({"status": 404, "title": "Not found"}))


# The window


async def test_what_waits_goes_in_one_append_and_a_full_window_holds_the_source(service: Service, thread: str) -> None:
    async with on_wire(service, window_chunks=10) as (client, wire):
        gate = asyncio.Event()
        wire.before = lambda request: gate.wait() if request.url.path.endswith("/chunks") else None
        source = Source("first")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: len(wire.appends()) == 1)
        source.give(*map(str, range(50)), None)
        await come_true(lambda: source.pulled == 10)
        for _ in range(20):
            await asyncio.sleep(0)
        assert source.pulled == 10
        gate.set()
        assert (await storing).chunk_count == 51
        assert wire.appends()[:2] == [["first"], [str(n) for n in range(9)]]
        assert max(map(len, wire.appends())) <= 10
        assert await texts(client.read(thread, "run")) == ["first", *map(str, range(50))]


async def test_the_window_is_limited_in_bytes_too(service: Service, thread: str) -> None:
    async with on_wire(service, window_bytes=10) as (client, wire):
        gate = asyncio.Event()
        wire.before = lambda request: gate.wait() if request.url.path.endswith("/chunks") else None
        source = Source("é" * 4, "é", "é", "é", None)
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: source.pulled == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert source.pulled == 2
        gate.set()
        assert (await storing).chunk_count == 4
    with pytest.raises(ValueError, match="no room"):
        Client(service.url, window_chunks=0)


# Others that end the message, or write to it


@pytest.mark.parametrize("scope", ["read write", "write"])
async def test_an_abort_stops_a_silent_source_within_a_second(secured: Service, thread: str, scope: str) -> None:
    async with Client(secured.url, token(scope)) as client, Client(secured.url, token("admin")) as admin:
        source = Source("text")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: stored(admin, thread, "text"))
        await admin.abort(thread, "run", "enough")
        async with asyncio.timeout(1):
            with pytest.raises(MessageEnded, match=r"'run' was aborted \(enough\)") as caught:
                await storing
        assert (caught.value.message_status, caught.value.reason) == ("aborted", "enough")
        assert source.closed.is_set()
        assert await ending(admin, thread) == ("aborted", "enough")


async def test_an_abort_stops_a_watched_source_at_once(service: Service, thread: str) -> None:
    async with on_wire(service) as (client, wire):
        source = Source("text")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: any(request.url.path.endswith("/stream") for request in wire.requests))
        await client.abort(thread, "run")
        async with asyncio.timeout(0.5):
            with pytest.raises(MessageEnded, match="'run' was aborted by somebody else"):
                await storing
        assert source.closed.is_set()


@pytest.mark.parametrize("hindrance", ["restart", "no room"])
async def test_an_abort_stops_a_silent_source_that_cannot_be_watched(
    mortal: Service, thread: str, hindrance: str
) -> None:
    async with on_wire(mortal) as (client, wire), Client(mortal.url) as another:
        await client.append(thread, "other", ["text"])
        reader = another.read(thread, "other")
        if hindrance == "no room":
            await anext(reader)
        source = Source("text")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: any(request.url.path.endswith("/stream") for request in wire.requests))
        if hindrance == "restart":
            await asyncio.to_thread(mortal.restart)
        signs_of_life: list[bytes] = []
        wire.after = lambda request, response: signs_of_life.append(request.content)
        await come_true(lambda: b"[]" in signs_of_life)
        await client.abort(thread, "run", "enough")
        async with asyncio.timeout(1):
            with pytest.raises(MessageEnded, match="enough"):
                await storing
        await reader.aclose()


async def test_an_abort_stops_a_source_that_never_pauses(client: Client, thread: str) -> None:
    closed = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield "text"
        finally:
            closed.set()

    storing = asyncio.create_task(client.store(thread, "run", source()))
    await come_true(lambda: began(client, thread))
    await client.abort(thread, "run", "enough")
    async with asyncio.timeout(1):
        with pytest.raises(MessageEnded) as caught:
            await storing
    assert caught.value.reason == "enough"
    assert closed.is_set()


async def began(client: Client, thread: str) -> bool:
    try:
        return (await client.status(thread)).chunk_count > 0
    except NotFound:
        return False


@pytest.mark.parametrize("text", ["another", "text"])
async def test_a_second_producer_is_told_and_the_first_goes_on(client: Client, thread: str, text: str) -> None:
    first, second = Source("text"), Source(text)
    storing = asyncio.create_task(client.store(thread, "run", first))
    await come_true(lambda: stored(client, thread, "text"))
    with pytest.raises(Conflict, match="another producer"):
        await client.store(thread, "run", second)
    assert second.pulled == 0
    first.give(" and more", None)
    await storing
    assert (await client.content(thread)).content == "text and more"


async def test_of_two_producers_that_begin_together_one_is_told(client: Client, thread: str) -> None:
    await client.open(thread, "run")
    sources = Source(), Source()
    storing = [asyncio.create_task(client.store(thread, "run", source)) for source in sources]
    for source in sources:
        await source.asked.wait()
    for source in sources:
        source.give("the same")
    done, rest = await asyncio.wait(storing, return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT)
    (loser,), (winner,) = done, rest
    with pytest.raises(Conflict, match="another producer"):
        loser.result()
    sources[storing.index(winner)].give(None)
    assert (await winner).chunk_count == 1
    assert await ending(client, thread) == ("completed", None)


@pytest.mark.parametrize("scope", ["read write", "write"])
async def test_another_that_appends_meanwhile_is_a_conflict(secured: Service, thread: str, scope: str) -> None:
    async with Client(secured.url, token(scope)) as client, Client(secured.url, token("admin")) as admin:
        source = Source("mine")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: stored(admin, thread, "mine"))
        await admin.append(thread, "run", ["other"])
        async with asyncio.timeout(2):
            with pytest.raises(Conflict, match="another producer"):
                await storing
        assert source.closed.is_set()
        assert await ending(admin, thread) == ("active", None)


async def test_a_source_that_fails_does_not_abort_the_message_of_another(client: Client, thread: str) -> None:
    source = Source()
    storing = asyncio.create_task(client.store(thread, "run", source))
    await source.asked.wait()
    await client.append(thread, "run", ["other"])
    source.give("mine", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError) as caught:
        await storing
    assert "another producer" in caught.value.__notes__[0]
    assert await ending(client, thread) == ("active", None)


async def test_a_message_that_has_ended_is_an_error_and_nothing_is_pulled(client: Client, thread: str) -> None:
    await client.append(thread, "run", ["text"], index=0, complete=True)
    source = Source("text", None)
    with pytest.raises(MessageEnded, match="'run' was completed") as caught:
        await client.store(thread, "run", source)
    assert caught.value.message_status == "completed"
    assert caught.value.problem["chunkCount"] == 1
    assert source.pulled == 0
    await client.open(thread, "stopped")
    await client.abort(thread, "stopped", "enough")
    with pytest.raises(MessageEnded, match=r"aborted \(enough\)"):
        await client.store(thread, "stopped", ["text"])


@pytest.mark.parametrize("more", [(), ("more", None)])
async def test_a_thread_that_is_cleared_meanwhile_is_gone(client: Client, thread: str, more: tuple[str, ...]) -> None:
    source = Source("text")
    storing = asyncio.create_task(client.store(thread, "run", source))
    await come_true(lambda: stored(client, thread, "text"))
    await client.clear(thread)
    source.give(*more)
    async with asyncio.timeout(2):
        with pytest.raises(Gone, match="cleared or has expired"):
            await storing
    assert source.closed.is_set()
    with pytest.raises(NotFound):
        await client.status(thread)


async def test_a_silent_producer_gives_a_sign_of_life(
    start_service: Callable[..., Service], thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_stream.client.storing, "SIGN_OF_LIFE", 0.1)
    async with Client(start_service("--producer-timeout", "500ms").url) as client:
        source = Source("text")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: stored(client, thread, "text"))
        await client.open(thread, "silent")
        (end,) = [item async for item in client.read(thread, "silent")]
        assert end.reason == "producer_timeout"
        source.give(" and more", None)
        await storing
        assert (await client.content(thread, "run")).content == "text and more"


# A source that fails


async def test_a_source_that_fails_aborts_the_message_behind_what_it_gave(client: Client, thread: str) -> None:
    failure = ZeroDivisionError("by zero")
    with pytest.raises(ZeroDivisionError) as caught:
        await client.store(thread, "run", Source("a", "b", failure))
    assert caught.value is failure
    *chunks, end = [item async for item in client.read(thread, "run")]
    assert [chunk.content for chunk in chunks] == ["a", "b"]
    assert (end.status, end.reason) == ("aborted", "ZeroDivisionError")
    with pytest.raises(NotFound):
        await client.store(thread, "relayed", client.read(f"not-{thread}"))  # type: ignore[arg-type]
    assert await ending(client, thread, "relayed") == ("aborted", "NotFound")


async def test_a_source_that_fails_while_the_service_is_away_is_heard_when_it_is_back(
    mortal: Service, thread: str
) -> None:
    async with on_wire(mortal) as (client, wire):
        source = Source("text")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: stored(client, thread, "text"))
        mortal.kill()
        source.give(" and more", ZeroDivisionError())
        await come_true(lambda: wire.appends()[-1] == [" and more"])
        await asyncio.to_thread(mortal.start)
        with pytest.raises(ZeroDivisionError):
            await storing
        assert await ending(client, thread) == ("aborted", "ZeroDivisionError")
        assert (await client.content(thread)).content == "text and more"


async def test_a_service_that_stays_away_is_told_of_a_failed_source_for_a_bounded_time(
    mortal: Service, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_stream.client.storing, "ABORT_PATIENCE", 0.3)
    async with Client(mortal.url) as client:
        source = Source("text")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: stored(client, thread, "text"))
        mortal.kill()
        source.give("unsent", ZeroDivisionError())
        async with asyncio.timeout(3):
            with pytest.raises(ZeroDivisionError) as caught:
                await storing
        notes = caught.value.__notes__
        assert "could not all be stored" in notes[0]
        assert "could not be aborted" in notes[1]


async def test_storing_that_is_cancelled_aborts_the_message(client: Client, thread: str) -> None:
    source = Source("text")
    storing = asyncio.create_task(client.store(thread, "run", source))
    await come_true(lambda: stored(client, thread, "text"))
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    assert source.closed.is_set()
    assert await ending(client, thread) == ("aborted", "CancelledError")


async def test_storing_that_is_cancelled_does_not_wait_for_a_service_that_hangs(
    service: Service, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_stream.client.storing, "CANCEL_PATIENCE", 0.2)
    async with on_wire(service) as (client, wire):
        storing = asyncio.create_task(client.store(thread, "run", Source("text")))
        await come_true(lambda: stored(client, thread, "text"))
        wire.before = lambda request: asyncio.Event().wait()
        storing.cancel()
        async with asyncio.timeout(2):
            with pytest.raises(asyncio.CancelledError) as caught:
                await storing
        assert "does not answer" in caught.value.__notes__[0]


# What is refused


@pytest.mark.parametrize(
    ("piece", "error", "reason"),
    [
        ("x" * 70_000, TooLarge, "TooLarge"),
        (Chunk("text", event="complete"), InvalidContent, "InvalidContent"),
        ("\ud83d", UnicodeEncodeError, "UnicodeEncodeError"),
    ],
)
async def test_a_chunk_that_is_refused_is_an_error_at_once(
    service: Service, thread: str, piece: Any, error: type[Exception], reason: str
) -> None:
    async with on_wire(service) as (client, wire):
        source = Source("before")
        storing = asyncio.create_task(client.store(thread, "run", source))
        await come_true(lambda: stored(client, thread, "before"))
        source.give(piece)
        with pytest.raises(error) as caught:
            await storing
        assert source.closed.is_set()
        assert sum(bool(sent) for sent in wire.appends()) <= 2
        assert await ending(client, thread) == ("aborted", reason)
        if isinstance(caught.value, Problem):
            assert caught.value.problem["status"] == caught.value.status
            assert str(caught.value) == caught.value.detail == caught.value.problem["detail"]


async def test_a_token_that_does_not_do_is_an_error_at_once(secured: Service, thread: str) -> None:
    source = Source("text")
    async with Client(secured.url, token("read"), patience=1e9) as reader:
        with pytest.raises(Forbidden, match="scope"):
            await reader.store(thread, "run", source)
    async with Client(secured.url, patience=1e9) as stranger:
        with pytest.raises(Unauthorized, match="token"):
            await stranger.store(thread, "run", source)
        with pytest.raises(Unauthorized, match="token"):
            await anext(stranger.read(thread))
    assert source.pulled == 0
    for wrong in ("", "a b", "é"):
        with pytest.raises(ValueError, match="token"):
            Client(secured.url, wrong)
    with pytest.raises(ValueError, match="not the URL"):
        Client("localhost:8000")


async def test_a_token_that_expires_meanwhile_ends_reading(secured: Service, thread: str) -> None:
    async with Client(secured.url, token("write")) as producer:
        await producer.append(thread, "run", ["text"])
    async with Client(secured.url, token("read", time.time() + 2)) as client:
        items = client.read(thread, "run")
        assert (await anext(items)).content == "text"
        with pytest.raises(Unauthorized, match="carry on from the cursor"):
            await anext(items)


# Reading


async def test_a_reader_goes_on_from_the_text_it_has(client: Client, thread: str) -> None:
    await client.store(thread, "run", ["Hello", ", world", "!"])
    assert await texts(client.read(thread, "run", known_content="Hello, w")) == ["orld", "!"]
    assert await texts(client.read(thread, "run", known_content="")) == ["Hello", ", world", "!"]
    first, *rest = [item async for item in client.read(thread, "run", known_content="Goodbye")]
    assert first == Reset()
    assert rest == [item async for item in client.read(thread, "run")]
    with pytest.raises(NotFound):
        await anext(client.read(thread, "none", known_content="x"))
    for wrong in ({"known_content": "x"}, {"message": "run", "known_content": "x", "after": 1}, {"after": "1\n"}):
        with pytest.raises(ValueError, match="cursor"):
            client.read(thread, **wrong)


async def test_a_reader_can_wait_for_a_message_not_made_yet(client: Client, thread: str) -> None:
    reading = asyncio.create_task(texts(client.read(thread, "run", wait=True)))
    knowing = asyncio.create_task(texts(client.read(thread, "run", known_content="a", wait=True)))
    with pytest.raises(NotFound, match="no thread"):
        await anext(client.read(thread, "run"))
    await client.open(thread, "other")
    with pytest.raises(NotFound, match="no message"):
        await anext(client.read(thread, "run"))
    # In one append: a message that is shorter than the known text is another message.
    await client.append(thread, "run", ["a", "b"], complete=True)
    assert await reading == ["a", "b"]
    assert await knowing == ["b"]


async def test_a_reader_of_a_thread_is_given_all_of_its_messages(client: Client, thread: str) -> None:
    following = client.read(thread, wait=True)
    first = asyncio.create_task(anext(following))
    await client.store(thread, "one", ["a"])
    await client.store(thread, "two", ["b"])
    items = [item async for item in client.read(thread)]
    assert [(item.message_id, item.seq) for item in items] == [("one", 1), ("one", 2), ("two", 3), ("two", 4)]
    assert [await first, *[await anext(following) for _ in range(3)]] == items
    await client.clear(thread)
    assert await anext(following) == Reset()
    await client.store(thread, "three", ["c"])
    assert (await anext(following)).content == "c"
    await following.aclose()


async def test_a_reader_of_a_quiet_message_reconnects(service: Service, thread: str) -> None:
    async with on_wire(service) as (client, wire):
        await client.append(thread, "run", ["a"])
        items = client.read(thread, "run")
        first = await anext(items)
        rest = asyncio.create_task(texts(items))
        streams = lambda: [request for request in wire.requests if request.url.path.endswith("/stream")]  # noqa: E731
        await come_true(lambda: len(streams()) == 3)
        assert [request.headers.get("last-event-id") for request in streams()] == [None, first.cursor, first.cursor]
        await client.append(thread, "run", ["b"], complete=True)
        assert await rest == ["b"]


async def test_a_connection_on_which_nothing_comes_is_given_up(
    start_service: Callable[..., Service], thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "TIMEOUTS", httpx.Timeout(10, read=0.3))
    monkeypatch.setattr(random, "uniform", lambda low, high: 0)
    async with on_wire(start_service("--heartbeat", "0", "--idle-timeout", "0")) as (client, wire):
        await client.append(thread, "run", ["a"])
        reading = asyncio.create_task(texts(client.read(thread, "run")))
        await come_true(lambda: len(wire.requests) == 4)
        await client.append(thread, "run", ["b"], complete=True)
        assert await reading == ["a", "b"]


class CutOff(httpx.AsyncByteStream):
    """A body that breaks after ``size`` bytes."""

    def __init__(self, stream: Any, size: int) -> None:
        self.stream, self.size = stream, size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.size
        async for piece in self.stream:
            yield piece[:left]
            left -= len(piece)
            if left < 0:
                raise httpx.ReadError("cut")

    async def aclose(self) -> None:
        await self.stream.aclose()


class Recorded(httpx.AsyncHTTPTransport):
    """Repeats what the service answered to the same request. ``cut`` breaks the next body after so many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[Any, tuple[httpx.Response, bytes]] = {}
        self.cut: int | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        key = request.url, request.headers.get("last-event-id"), request.content
        if key not in self.answers:
            response = await super().handle_async_request(request)
            self.answers[key] = response, await response.aread()
        response, body = self.answers[key]
        stream: httpx.AsyncByteStream = httpx.ByteStream(body)
        if self.cut is not None:
            stream, self.cut = CutOff(stream, self.cut), None
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)


@pytest.mark.parametrize("query", [{}, {"known_content": ""}])
async def test_a_body_that_breaks_anywhere_loses_and_doubles_nothing(
    service: Service, client: Client, thread: str, query: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 0)
    await client.store(thread, "run", ["aé", "", "😀"])
    wire = Recorded()
    async with httpx.AsyncClient(transport=wire) as http:
        reader = Client(service.url, http=http)
        whole = [item async for item in reader.read(thread, "run", **query)]
        ((_, body),) = wire.answers.values()
        for wire.cut in range(len(body)):
            assert [item async for item in reader.read(thread, "run", **query)] == whole, wire.cut


async def test_a_cursor_of_a_cleared_thread_gives_reset_and_everything(client: Client, thread: str) -> None:
    await client.store(thread, "run", ["old", "older"])
    *_, end = [item async for item in client.read(thread, "run")]
    await client.clear(thread)
    await client.store(thread, "run", ["new"])
    first, *rest = [item async for item in client.read(thread, "run", after=end.cursor)]
    assert first == Reset()
    assert [item.content for item in rest[:-1]] == ["new"]


@pytest.mark.parametrize("connected", [True, False])
async def test_a_thread_that_is_cleared_while_it_is_read_is_gone(
    service: Service, thread: str, connected: bool
) -> None:
    async with on_wire(service) as (client, wire):
        await client.append(thread, "run", ["text"])
        cleared = asyncio.Event()
        if not connected:
            frame = f'retry: 1000\nid: {(await client.status(thread)).cursor}\ndata: {{"content":"text",'.encode()
            wire.after = lambda request, response: setattr(response, "stream", CutOff(response.stream, 2 * len(frame)))
        items = client.read(thread, "run")
        assert (await anext(items)).content == "text"
        wire.before = lambda request: cleared.wait() if request.url.path.endswith("/stream") else None
        wire.after = lambda request, response: None
        rest = asyncio.create_task(anext(items))
        await client.clear(thread)
        cleared.set()
        with pytest.raises(Gone, match="cleared or has expired"):
            await rest


async def test_what_is_not_the_service_is_said_not_to_be(service: Service, thread: str) -> None:
    async with on_wire(service) as (client, wire):
        wire.before = lambda request: httpx.Response(200, html="<p>Log in")
        with pytest.raises(ClientError, match="text/html"):
            await anext(client.read(thread))
        for call in (client.status(thread), client.open(thread, "run"), client.store(thread, "run", ["text"])):
            with pytest.raises(ClientError, match="is it the service's URL"):
                await call


# The other calls


async def test_the_other_calls_do_what_the_service_does(client: Client, thread: str) -> None:
    assert await client.open(thread, "run") == Appended(thread, "run", 0, 0, "active")
    first = await client.append(thread, "run", ["a", Chunk("b", "tool")], index=0)
    assert first == await client.append(thread, "run", ["a", Chunk("b", "tool")], index=0)
    assert first == Appended(thread, "run", 2, 2, "active")
    with pytest.raises(Conflict) as caught:
        await client.append(thread, "run", ["d"], index=3)
    assert caught.value.problem["expectedIndex"] == 2
    assert thread in [found.thread_id async for found in client.active_threads()]
    assert await client.complete(thread, "run") == await client.complete(thread, "run")
    with pytest.raises(MessageEnded, match="completed"):
        await client.abort(thread, "run")
    assert thread not in [found.thread_id async for found in client.active_threads()]
    content = await client.content(thread)
    assert (content.content, content.status) == ("ab", "completed")
    status = await client.status(thread)
    assert (status.chunk_count, status.size, status.cursor) == (2, 2, content.cursor)
    (message,) = status.messages
    assert (message.message_id, message.first_seq, message.last_seq) == ("run", 1, 3)
    await client.clear(thread)
    for call in (client.status(thread), client.content(thread), client.clear(thread), client.abort(thread, "run")):
        with pytest.raises(NotFound, match="no thread") as missing:
            await call
        assert missing.value.problem["exists"] is False
    with pytest.raises(TypeError, match="a chunk each"):
        await client.append(thread, "run", "text")


async def test_all_threads_are_listed_over_as_many_pages_as_it_takes(client: Client, thread: str) -> None:
    names = [f"{thread}-{number}" for number in range(130)]
    async with asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(client.open(name, "run"))
    listed = [found.thread_id async for found in client.threads() if found.thread_id.startswith(thread)]
    assert sorted(listed) == sorted(names)


async def test_an_append_without_an_index_is_sent_once(service: Service, thread: str) -> None:
    async with on_wire(service) as (client, wire):
        wire.before = lambda request: httpx.Response(503)
        with pytest.raises(Unavailable, match="answered 503"):
            await client.append(thread, "run", ["text"])
        assert len(wire.requests) == 1
        busy = [httpx.Response(503)]
        wire.before = lambda request: busy.pop() if busy else None
        assert (await client.append(thread, "run", ["text"], index=0)).seq == 1
