"""The client module and EventSource in Chromium, over cut connections, restarts, reloads, and refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jwt
import pytest
from browser_kit import (
    Origin,
    Page,
    Proxy,
    Reader,
    browser,
    client,
    notebook,
    open_notebook,
    opened_sockets,
    page,
    proxy,
    restart,
)
from conftest import ROOT, TIMEOUT, Service, api_client, append, wait_until
from wire import serving

__all__ = ["browser", "client", "notebook", "page", "proxy"]  # fixtures

STATIC_MODULE = ROOT / "static" / "resume-stream.js"
SECRET = "correct horse battery staple, 32+"


def make_token(scope: str) -> str:
    """Return a token like those of ``resume-stream token``."""
    return jwt.encode({"scope": scope, "exp": int(time.time()) + 3600}, SECRET, "HS256")


over_both = pytest.mark.parametrize("over", ["fetch", "websocket"])


@pytest.fixture(scope="module")
def allowed() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


@pytest.fixture(scope="module")
def service(allowed: Origin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service"), "--cors-origins", allowed.url) as service:
        yield service


@pytest.fixture
def reader(page: Page, service: Service) -> Reader:
    return open_notebook(page, service.url)


def readers(client: httpx.Client, thread: str = "t") -> int:
    return client.get(f"/threads/{thread}").json()["readers"]


# Another origin


def test_event_source_of_an_allowed_origin_resumes_over_a_restart_and_stops_on_the_204(
    page: Page, service: Service, client: httpx.Client, allowed: Origin
) -> None:
    append(client, "t", "m", "one ", "two ")
    page.goto(allowed.url)
    page.evaluate(
        """url => {
            window.seen = [];
            window.source = new EventSource(url);
            source.onmessage = ({data}) => seen.push(JSON.parse(data).content);
            source.addEventListener("complete", ({data}) => seen.push(JSON.parse(data).status));
        }""",
        f"{service.api}/threads/t/messages/m/stream",
    )
    page.wait_for_function("() => seen.length === 2")
    restart(service)
    append(client, "t", "m", "three ", "four", complete=True)
    page.wait_for_function("() => source.readyState === EventSource.CLOSED")
    assert page.evaluate("seen") == ["one ", "two ", "three ", "four", "completed"]


def test_client_module_works_from_an_allowed_origin(
    page: Page, service: Service, client: httpx.Client, allowed: Origin
) -> None:
    append(client, "t", "m", "Hello", complete=True)
    # A page of another origin serves its own copy of the module.
    page.route("**/copy.js", lambda route: route.fulfill(path=STATIC_MODULE, content_type="text/javascript"))
    page.goto(allowed.url)
    read = """async ([baseUrl, options]) => {
        const client = await import("/copy.js");
        const items = [];
        for (const source of [client, client.connect({baseUrl})]) {
            const all = source.resumeStream({baseUrl, threadId: "t", messageId: "m", ...options});
            for await (const item of all) items.push(item.content ?? item.status);
        }
        return items;
    }"""
    assert page.evaluate(read, [service.url, {}]) == ["Hello", "completed"] * 2
    assert page.evaluate(read, [service.url, {"knownContent": "Hel"}]) == ["lo", "completed"] * 2
    page.unroute("**/copy.js")


def test_page_of_a_foreign_origin_gets_nothing(page: Page, service: Service, client: httpx.Client) -> None:
    append(client, "secret", "m", "not for you")
    with Origin() as origin:
        page.goto(origin.url)
        got = page.evaluate(
            """async api => {
                const path = `${api}/threads/secret`;
                const outcome = (promise) => promise.then(async r => [r.type, r.status, await r.text()], () => "refused");
                const post = (mode) => fetch(`${api}/threads/evil/messages/m/chunks`, {method: "POST", mode, body: "evil"});
                const form = document.createElement("form");
                const frame = document.createElement("iframe");
                frame.name = "target";
                const answered = new Promise(resolve => frame.onload = resolve);
                document.body.append(frame, form);
                Object.assign(form, {action: `${api}/threads/evil/messages/m/chunks`, method: "post", enctype: "text/plain", target: "target"});
                form.innerHTML = '<input name="evil" value="text">';
                form.submit();
                await answered;
                return {
                    fetch: await outcome(fetch(path)),
                    opaque: await outcome(fetch(path, {mode: "no-cors"})),
                    post: await outcome(post("cors")),
                    opaquePost: await outcome(post("no-cors")),
                    clear: await outcome(fetch(path, {method: "DELETE"})),
                    eventSource: await new Promise(resolve => {
                        const source = new EventSource(`${path}/stream`);
                        source.onopen = source.onmessage = () => resolve("open");
                        source.onerror = () => resolve(source.readyState === EventSource.CLOSED ? "refused" : "retrying");
                    }),
                    webSocket: await new Promise(resolve => {
                        const socket = new WebSocket(`${api.replace("http", "ws")}/ws`);
                        socket.onopen = () => resolve("open");
                        socket.onclose = () => resolve("refused");
                    }),
                };
            }""",
            service.api,
        )
    refused = dict.fromkeys(["fetch", "post", "clear", "eventSource", "webSocket"], "refused")
    assert got == refused | {"opaque": ["opaque", 0, ""], "opaquePost": ["opaque", 0, ""]}
    assert [thread["threadId"] for thread in client.get("/threads").json()["threads"]] == ["secret"]


# Each chunk once, in order, to the end


@over_both
def test_resumes_over_cut_connections(page: Page, client: httpx.Client, proxy: Proxy, over: str) -> None:
    append(client, "t", "m", "one ")
    reader = open_notebook(page, proxy.url).begin(over, threadId="t", messageId="m").wait_for_text("one ")
    proxy.cut()
    append(client, "t", "m", "two ", "three ")
    reader.wait_for_text("one two three ")
    proxy.cut()
    append(client, "t", "m", "four", complete=True)
    reader.wait_for_end()
    assert reader.text == "one two three four"
    assert reader.seqs == [1, 2, 3, 4, 5]
    assert reader.items[-1]["status"] == "completed"


def test_resumes_over_a_restart(reader: Reader, service: Service, client: httpx.Client) -> None:
    append(client, "t", "m", "one ", "two ")
    readings = [Reader(reader.page, over).begin(over, threadId="t", messageId="m") for over in ("fetch", "websocket")]
    for reading in readings:
        reading.wait_for_text("one two ")
    restart(service)
    append(client, "t", "m", "three", complete=True)
    for reading in readings:
        reading.wait_for_end()
        assert reading.text == "one two three"
        assert reading.seqs == [1, 2, 3, 4]


@over_both
def test_resumes_over_a_reload_from_the_text_kept(reader: Reader, client: httpx.Client, over: str) -> None:
    append(client, "t", "m", "Grüße, ", "\N{WAVING HAND SIGN}\r\n", "dear ")
    reader.begin(over, threadId="t", messageId="m").wait_for_text("Grüße, ..\r\ndear ")
    append(client, "t", "m", "rea")
    reader.page.reload()
    append(client, "t", "m", "der")
    known = reader.page.evaluate("sessionStorage.getItem('reader')")
    assert known.startswith("Grüße, \N{WAVING HAND SIGN}\r\ndear ")
    reader.begin(over, threadId="t", messageId="m", knownContent=known[:-2]).wait("note.text.endsWith('der')")
    append(client, "t", "m", ".", complete=True)
    reader.wait_for_end()
    assert known[:-2] + reader.text == "Grüße, \N{WAVING HAND SIGN}\r\ndear reader."
    assert reader.types == ["chunk", "complete"]


@over_both
def test_cut_before_its_first_chunk_it_still_knows_the_text(
    page: Page, client: httpx.Client, proxy: Proxy, over: str
) -> None:
    append(client, "t", "m", "one ")
    reader = open_notebook(page, proxy.url).begin(over, threadId="t", messageId="m", knownContent="one ")
    wait_until(lambda: readers(client) == 1, "the reader")
    proxy.cut()
    append(client, "t", "m", "two", complete=True)
    reader.wait_for_end()
    assert reader.text == "two"


@over_both
def test_reset_when_the_thread_was_made_again(page: Page, client: httpx.Client, proxy: Proxy, over: str) -> None:
    append(client, "t", "m", "the old text")
    reader = open_notebook(page, proxy.url).begin(over, threadId="t", messageId="m").wait_for_text("the old text")
    proxy.down()
    client.delete("/threads/t")
    append(client, "t", "m", "new", complete=True)
    proxy.up()
    reader.wait_for_end()
    assert reader.types == ["chunk", "reset", "chunk", "complete"]
    assert reader.text == "new"


@over_both
def test_reset_when_the_text_is_another(reader: Reader, client: httpx.Client, over: str) -> None:
    append(client, "t", "m", "Hello", complete=True)
    reader.begin(over, threadId="t", messageId="m", knownContent="Good bye").wait_for_end()
    assert (reader.types, reader.text) == (["reset", "chunk", "complete"], "Hello")


@over_both
def test_gone_when_the_thread_is_cleared(reader: Reader, client: httpx.Client, over: str) -> None:
    append(client, "t", "m", "Hello")
    reader.begin(over, threadId="t", messageId="m").wait_for_text("Hello")
    client.delete("/threads/t")
    assert reader.wait_for_end().types == ["chunk", "gone"]
    reader.begin(over, threadId="t", messageId="m", knownContent="Hello").wait("note.items.length").wait_for_end()
    assert reader.types == ["gone"]


@over_both
def test_thread_ends_with_its_last_message(reader: Reader, client: httpx.Client, over: str) -> None:
    append(client, "t", "a", "1")
    append(client, "t", "b", "2", complete=True)
    reader.begin(over, threadId="t").wait("note.items.length === 3")
    client.post("/threads/t/messages/a/abort", json={"reason": "enough"})
    reader.wait_for_end()
    assert [(item["messageId"], item.get("status")) for item in reader.items] == [
        ("a", None),
        ("b", None),
        ("b", "completed"),
        ("a", "aborted"),
    ]
    assert reader.items[-1]["reason"] == "enough"
    after = reader.items[-1]["cursor"]
    Reader(reader.page, "late").begin(over, threadId="t", after=after).wait_for_end()
    assert Reader(reader.page, "late").items == []


@over_both
def test_follow_waits_for_a_thread_and_goes_on_when_it_is_cleared(
    reader: Reader, client: httpx.Client, over: str
) -> None:
    reader.begin(over, threadId="t", follow=True)
    append(client, "t", "a", "one", complete=True)
    reader.wait("note.items.length === 2")
    client.delete("/threads/t")
    reader.wait("note.items.length === 3")
    append(client, "t", "b", "two")
    reader.wait("note.text === 'two'")
    assert reader.types == ["chunk", "complete", "reset", "chunk"]


@over_both
def test_waits_for_a_message_not_made_yet(reader: Reader, client: httpx.Client, over: str) -> None:
    reader.begin(over, threadId="t", messageId="m", knownContent="", wait=True)
    append(client, "t", "other", "not this")
    append(client, "t", "m", "Hello", complete=True)
    reader.wait_for_end()
    assert (reader.types, reader.text) == (["chunk", "complete"], "Hello")
    assert reader.note["down"] == [], "nothing was lost"


def test_waits_past_the_idle_timeout_of_the_service_unless_asked_not_to(
    page: Page, start_service: Callable[..., Service]
) -> None:
    service = start_service("--idle-timeout", "50ms")
    with api_client(service) as client:
        append(client, "t", "m", "one ")
        patient = open_notebook(page, service.url).begin("fetch", threadId="t", messageId="m")
        socket = Reader(page, "socket").begin("websocket", threadId="t", messageId="m")
        for over in ("fetch", "websocket"):
            hasty = Reader(page, f"hasty {over}").begin(over, threadId="t", messageId="m", idleTimeout=100)
            assert hasty.wait_for_end().types == ["chunk", "timeout"]
        append(client, "t", "m", "two", complete=True)
    for reader in (patient, socket):
        assert reader.wait_for_end().text == "one two"
        assert reader.seqs == [1, 2, 3]


@over_both
def test_mounted_twice_as_strict_mode_does(reader: Reader, client: httpx.Client, over: str) -> None:
    append(client, "t", "m", "one ")
    outcome = reader.page.evaluate(
        """async ([over]) => {
            const client = await import("/static/resume-stream.js");
            const source = over === "fetch" ? client : client.connect();
            let text = "";
            const mount = () => {
                const controller = new AbortController();
                const done = (async () => {
                    const {signal} = controller;
                    for await (const item of source.resumeStream({threadId: "t", messageId: "m", signal})) text += item.content;
                })();
                return {done, unmount: () => controller.abort()};
            };
            const first = mount();
            first.unmount();
            const second = mount();
            const error = await first.done.catch(error => error.name);
            while (text === "") await new Promise(requestAnimationFrame);
            window.unmount = second.unmount;
            window.done = second.done.catch(error => error.name);
            return [error, text];
        }""",
        [over],
    )
    assert outcome == ["AbortError", "one "]
    assert readers(client) == 1
    reader.page.evaluate("unmount()")
    assert reader.page.evaluate("done") == "AbortError"
    wait_until(lambda: readers(client) == 0, "the end of the reader")


@over_both
def test_leaving_the_loop_ends_the_reading(reader: Reader, client: httpx.Client, over: str) -> None:
    append(client, "t", "m", "one ", "two ")
    reader.begin(over, until=1, threadId="t", messageId="m").wait_for_end()
    assert (reader.text, reader.note["error"]) == ("one ", None)
    wait_until(lambda: readers(client) == 0, "the end of the reader")


# Waiting


@over_both
def test_network_that_comes_back_is_tried_at_once(page: Page, client: httpx.Client, proxy: Proxy, over: str) -> None:
    append(client, "t", "m", "one ")
    reader = open_notebook(page, proxy.url)
    page.evaluate("Math.random = () => 100")  # the first wait is 100 s long
    reader.begin(over, threadId="t", messageId="m").wait_for_text("one ")
    proxy.down()
    append(client, "t", "m", "two", complete=True)
    wait_until(lambda: readers(client) == 0, "the end of the reader")
    proxy.up()
    # A test cannot see when a socket waits, so it announces the network until the reader ends.
    wait_until(
        lambda: page.evaluate("() => { dispatchEvent(new Event('online')); return notes.reader.ended }"), "the end"
    )
    assert reader.text == "one two"


@over_both
def test_connection_that_died_in_silence_is_left_when_the_network_is_back(
    page: Page, client: httpx.Client, proxy: Proxy, over: str
) -> None:
    append(client, "t", "m", "one ")
    reader = open_notebook(page, proxy.url).begin(over, threadId="t", messageId="m").wait_for_text("one ")
    proxy.go_silent()
    append(client, "t", "m", "two", complete=True)
    wait_until(lambda: readers(client) == 0, "the end of the message, sent into the void")
    assert reader.text == "one "
    page.evaluate("() => void dispatchEvent(new Event('online'))")
    reader.wait_for_end()
    assert (reader.text, reader.seqs) == ("one two", [1, 2, 3])


COMPLETE = 'id: 7-9\nevent: complete\ndata: {"messageId":"m","status":"completed","reason":null,"seq":9}\n\n'


def chunk(seq: int, content: str, generation: int = 7) -> str:
    data = json.dumps({"content": content, "timestamp": 1, "messageId": "m", "seq": seq}, ensure_ascii=False)
    return f"id: {generation}-{seq}\ndata: {data}\n\n"


@pytest.fixture
def stubbed(page: Page, service: Service) -> Callable[..., dict[str, Any]]:
    """Return a function that reads from made-up answers."""
    open_notebook(page, service.url)

    def read(*answers: dict[str, Any], **options: Any) -> dict[str, Any]:
        return page.evaluate("([answers, options]) => readStub(answers, options)", [answers, options])

    return read


def test_waits_longer_each_time_and_as_long_as_it_is_told(stubbed: Callable[..., dict[str, Any]]) -> None:
    busy = {"status": 503, "headers": {"Retry-After": "0"}}
    told = {"status": 429, "headers": {"Retry-After": "1"}}
    got = stubbed(busy, busy, told, {"body": "retry: 3000\n" + chunk(1, "one")}, {"body": COMPLETE})
    assert got["items"] == ["one", "complete"]
    assert got["delays"] == [10, 20, 1040, 30]
    assert [request["url"].partition("/api")[2] for request in got["asked"]] == [
        "/threads/t/messages/m/stream",
        "/threads/t/messages/m/stream",
        "/threads/t/messages/m/stream",
        "/threads/t/messages/m/stream",
        "/threads/t/messages/m/stream?after=7-1",
    ]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 422])
def test_gives_up_on_what_a_retry_cannot_mend(stubbed: Callable[..., dict[str, Any]], status: int) -> None:
    problem = {"status": status, "title": "No", "detail": "It cannot be."}
    got = stubbed({"status": status, "body": json.dumps(problem)})
    assert (got["error"], got["status"], got["message"]) == ("ResumeStreamError", status, "It cannot be.")
    assert len(got["asked"]) == 1


def test_gives_up_on_what_is_not_a_stream(stubbed: Callable[..., dict[str, Any]]) -> None:
    got = stubbed({"headers": {"Content-Type": "text/html"}, "body": "<p>Hello"})
    assert got["error"] == "ResumeStreamError"
    assert "text/html" in got["message"]


def test_error_event_is_retried_or_thrown(stubbed: Callable[..., dict[str, Any]]) -> None:
    busy = {"body": 'event: error\ndata: {"status":503,"title":"Busy","detail":"Busy."}\n\n'}
    got = stubbed({"body": chunk(1, "one")}, busy, {"body": COMPLETE})
    assert got["items"] == ["one", "complete"]
    refused = {"body": 'event: error\ndata: {"status":403,"title":"No","detail":"No."}\n\n'}
    assert stubbed(refused)["status"] == 403


def test_never_yields_a_chunk_twice_even_if_it_is_sent_twice(stubbed: Callable[..., dict[str, Any]]) -> None:
    twice = chunk(1, "one ") + chunk(2, "two ")
    got = stubbed({"body": twice}, {"body": twice + chunk(3, "three")}, {"body": twice + COMPLETE})
    assert got["items"] == ["one ", "two ", "three", "complete"]
    other = stubbed({"body": twice}, {"body": chunk(1, "new", generation=8)}, {"status": 204})
    assert other["items"] == ["one ", "two ", "reset", "new"]


def test_text_that_was_reset_is_not_asked_for_again(stubbed: Callable[..., dict[str, Any]]) -> None:
    got = stubbed({"body": "event: reset\ndata: {}\n\n"}, {"body": chunk(1, "one") + COMPLETE}, knownContent="other")
    assert got["items"] == ["reset", "one", "complete"]
    assert [request["method"] for request in got["asked"]] == ["POST", "GET"]


def test_half_an_event_at_the_end_of_a_connection_does_not_count(stubbed: Callable[..., dict[str, Any]]) -> None:
    got = stubbed({"body": chunk(1, "one ") + chunk(2, "two")[:-1]}, {"body": chunk(2, "two") + COMPLETE})
    assert got["items"] == ["one ", "two", "complete"]


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
def test_stream_cut_into_single_bytes(stubbed: Callable[..., dict[str, Any]], line_end: str) -> None:
    text = (
        "\ufeffretry: 1000\n: hb\n"
        + chunk(1, "Grüße \N{WAVING HAND SIGN}")
        + ": hb\n"
        + 'id:7-2\nevent:tool\nignored: x\ndata: {"content":\ndata:"a b",\ndata: "timestamp":1,"messageId":"m","seq":2}\n\n'
        + "event: nothing\n\n"
        + "id: 7-3\0\n"
        + COMPLETE
    )
    pieces = [[byte] for byte in text.replace("\n", line_end).encode()]
    assert stubbed({"pieces": pieces})["items"] == ["Grüße \N{WAVING HAND SIGN}", "a b", "complete"]


# Bad use, and tokens


def test_bad_use_is_a_type_error_at_once(reader: Reader) -> None:
    messages = reader.page.evaluate(
        """async () => {
            const {connect, resumeStream} = await import("/static/resume-stream.js");
            const [socket, messages] = [connect(), []];
            for (const options of [
                {},
                {threadId: ""},
                {threadId: "t", messageId: 3},
                {threadId: "t", knownContent: "x"},
                {threadId: "t", messageId: "m", knownContent: "x", after: "1"},
                {threadId: "t", after: "yesterday"},
                {threadId: "t", messageId: "m", follow: true},
                {threadId: "t", wait: true},
                {threadId: "t", idleTimeout: -1},
                {threadId: "t", signal: "stop"},
            ]) for (const read of [resumeStream, (options) => socket.resumeStream(options)]) {
                try { read(options); messages.push("accepted"); }
                catch (error) { messages.push(error instanceof TypeError ? "TypeError" : String(error)); }
            }
            for (const options of [{baseUrl: "ftp://x"}, {baseUrl: "http://["}, {token: 3}]) {
                try { resumeStream({threadId: "t", ...options}); messages.push("accepted"); }
                catch (error) { messages.push(error instanceof TypeError ? "TypeError" : String(error)); }
            }
            return messages;
        }"""
    )
    assert messages == ["TypeError"] * 23


@over_both
def test_missing_thread_is_an_error_with_its_status(reader: Reader, client: httpx.Client, over: str) -> None:
    for name, options in {"thread": {"threadId": "none", "messageId": "m"}, "all": {"threadId": "none"}}.items():
        note = Reader(reader.page, name).begin(over, **options).wait_for_end().note
        assert (note["error"]["name"], note["error"]["status"], note["items"]) == ("ResumeStreamError", 404, [])


def test_tokens(page: Page, start_service: Callable[..., Service]) -> None:
    service = start_service("--secret", SECRET)
    admin, read = make_token("read write abort admin"), make_token("read")
    with httpx.Client(base_url=service.api, timeout=TIMEOUT, headers={"Authorization": f"Bearer {admin}"}) as client:
        append(client, "t", "m", "Hello", complete=True)
        reader = open_notebook(page, service.url)
        for over in ("fetch", "websocket"):
            for name, token, status in (("good", read, None), ("none", None, 401), ("wrong", "x.y.z", 401)):
                page.evaluate("() => { window.socket = undefined }")
                reader = Reader(page, f"{over} {name}").begin(over, threadId="t", messageId="m", token=token)
                note = reader.wait_for_end().note
                assert (note["error"] and note["error"]["status"]) == status
                assert note["text"] == ("" if status else "Hello")
        renewed = """async ([over, tokens]) => {
            const client = await import("/static/resume-stream.js");
            const token = async () => tokens.shift();
            const options = {threadId: "t", messageId: "m"};
            const items = over === "fetch" ? client.resumeStream({token, ...options}) : client.connect({token}).resumeStream(options);
            let text = "";
            for await (const item of items) text += item.content ?? "";
            return text;
        }"""
        assert page.evaluate(renewed, ["fetch", ["old", read]]) == "Hello"
        assert page.evaluate(renewed, ["websocket", ["old", read, read]]) == "Hello"


# The other calls


def test_status_content_list_append_abort_clear(reader: Reader, client: httpx.Client) -> None:
    answers = reader.page.evaluate(
        """async () => {
            const client = await import("/static/resume-stream.js");
            const message = {threadId: "t", messageId: "m"};
            const missing = await client.getThreadStatus({threadId: "t"});
            const appended = await client.appendChunks({...message, chunks: [{content: "Hi", event: "greeting"}], index: 0});
            const again = await client.appendChunks({...message, chunks: [{content: "Hi", event: "greeting"}], index: 0});
            const gap = await client.appendChunks({...message, chunks: [{content: "?"}], index: 5}).catch(error => error);
            const content = await client.getAccumulatedContent(message);
            const aborted = await client.abortMessage({...message, reason: "enough"});
            const status = await client.getThreadStatus({threadId: "t"});
            const list = await client.listThreads({status: "aborted"});
            const cleared = [await client.clearThread({threadId: "t"}), await client.clearThread({threadId: "t"})];
            return {missing, appended, again, gap: [gap.status, gap.problem.expectedIndex], content, aborted, status, list, cleared};
        }"""
    )
    assert answers["missing"] == {"exists": False}
    assert answers["appended"] == answers["again"]
    assert answers["appended"]["chunkCount"] == 1
    assert answers["gap"] == [409, 1]
    assert (answers["content"]["content"], answers["content"]["status"]) == ("Hi", "active")
    assert answers["aborted"]["status"] == "aborted"
    assert answers["status"]["messages"][0]["reason"] == "enough"
    assert [thread["threadId"] for thread in answers["list"]["threads"]] == ["t"]
    assert answers["cleared"] == [True, False]


def test_append_with_an_index_is_retried_over_a_lost_network(page: Page, client: httpx.Client, proxy: Proxy) -> None:
    open_notebook(page, proxy.url)
    page.evaluate("async () => { window.client = await import('/static/resume-stream.js') }")
    proxy.down()
    page.evaluate("""() => {
        window.failures = 0;
        const onConnection = (event) => event.connected || failures++;
        const message = {threadId: "t", messageId: "m", chunks: [{content: "Hello"}]};
        window.appended = client.appendChunks({...message, index: 0, complete: true, onConnection});
        window.unsafe = client.appendChunks(message).catch(error => error.status);
    }""")
    assert page.evaluate("unsafe") == 0
    page.wait_for_function("() => failures > 0", polling=10)
    proxy.up()
    assert page.evaluate("appended")["status"] == "completed"
    assert client.get("/threads/t/content").json()["content"] == "Hello"


def test_page_stores_over_a_lost_network_and_stops_for_the_stop_button(
    page: Page, client: httpx.Client, proxy: Proxy
) -> None:
    open_notebook(page, proxy.url)
    page.evaluate("""async () => {
        const {store} = await import("/static/resume-stream.js");
        window.failures = 0;
        const onConnection = (event) => event.connected || failures++;
        const cancel = () => window.cancelled = true;
        const source = new ReadableStream({start: (controller) => void (window.controller = controller), cancel});
        controller.enqueue("one ");
        window.stored = store({threadId: "t", messageId: "m", source, onConnection}).catch(error => error.problem.reason);
    }""")
    wait_until(lambda: client.get("/threads/t").json().get("chunkCount"), "the first chunk")
    proxy.down()
    page.evaluate("() => controller.enqueue('two')")
    page.wait_for_function("() => failures > 0", polling=10)
    proxy.up()
    wait_until(lambda: client.get("/threads/t/content").json()["content"] == "one two", "the second chunk")
    client.post("/threads/t/messages/m/abort", json={"reason": "enough"})
    assert page.evaluate("stored") == "enough"
    assert page.evaluate("cancelled")


# The socket


def test_socket_carries_many_threads_over_one_connection(page: Page, client: httpx.Client, proxy: Proxy) -> None:
    sockets, _ = opened_sockets(page)
    reader = open_notebook(page, proxy.url)
    threads = [f"t{number}" for number in range(20)]
    for thread in threads:
        append(client, thread, "m", f"{thread} one ")
        Reader(page, thread).begin("websocket", threadId=thread, messageId="m")
    for thread in threads:
        Reader(page, thread).wait_for_text(f"{thread} one ")
    assert len(sockets) == 1
    proxy.cut()
    for thread in threads:
        append(client, thread, "m", "two", complete=True)
    for thread in threads:
        reader = Reader(page, thread).wait_for_end()
        assert (reader.text, reader.seqs) == (f"{thread} one two", [1, 2, 3])
    assert len(sockets) <= 3


def test_socket_appends_and_aborts_over_a_lost_network(page: Page, client: httpx.Client, proxy: Proxy) -> None:
    reader = open_notebook(page, proxy.url)
    append(client, "t", "m", "zero ")
    reader.begin("websocket", threadId="t", messageId="m").wait_for_text("zero ")
    message = {"threadId": "t", "messageId": "m"}
    first = page.evaluate("m => socket.append({...m, chunks: [{content: 'one '}], index: 1})", message)
    assert (first["seq"], first["chunkCount"], first["status"]) == (2, 2, "active")
    proxy.cut()
    again = page.evaluate(
        "m => socket.append({...m, chunks: [{content: 'one '}, {content: 'two'}], index: 1})", message
    )
    assert again["chunkCount"] == 3
    problem = page.evaluate(
        "m => socket.append({...m, chunks: [{content: '?'}], index: 9}).catch(e => e.status)", message
    )
    assert problem == 409
    assert page.evaluate("m => socket.abort({...m, reason: 'enough'})", message)["status"] == "aborted"
    reader.wait_for_end()
    assert (reader.text, reader.items[-1]["reason"]) == ("zero one two", "enough")


def test_slow_consumer_of_a_socket_loses_nothing_and_holds_up_nobody(reader: Reader, client: httpx.Client) -> None:
    texts = [f"{number} " for number in range(1500)]  # more than the client queues for a slow consumer
    append(client, "t", "m", *texts, complete=True)
    _, frames = opened_sockets(reader.page)
    reader.page.evaluate("""async () => {
        const {connect} = await import("/static/resume-stream.js");
        const socket = connect();
        const released = new Promise(resolve => window.release = resolve);
        window.readAll = async (isSlow) => {
            let text = "", seqs = [];
            for await (const item of socket.resumeStream({threadId: "t", messageId: "m"})) {
                seqs.push(item.seq);
                text += item.content ?? "";
                if (isSlow && seqs.length === 1) await released;
            }
            return {text, seqs};
        };
        window.slow = readAll(true);
    }""")
    # Playwright reports frames only while a test calls it.
    wait_until(lambda: reader.page.evaluate("0") or any('"unsubscribe"' in frame for frame in frames), "the pause")
    assert reader.page.evaluate("readAll(false).then(({text}) => text)") == "".join(texts)
    reader.page.evaluate("release()")
    got = reader.page.evaluate("slow")
    assert got["text"] == "".join(texts)
    assert got["seqs"] == list(range(1, 1502))


def test_closed_socket_ends_everything_on_it(reader: Reader, client: httpx.Client) -> None:
    append(client, "t", "m", "Hello")
    reader.begin("websocket", threadId="t", messageId="m").wait_for_text("Hello")
    reader.page.evaluate("socket.close()")
    assert reader.wait_for_end().note["error"]["name"] == "AbortError"
    wait_until(lambda: readers(client) == 0, "the end of the reader")
    late = reader.page.evaluate("socket.abort({threadId: 't', messageId: 'm'}).catch(error => error.name)")
    assert late == "AbortError"
