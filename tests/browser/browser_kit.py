"""Helpers for tests in a real browser: Chromium, a page that keeps notes, a proxy that cuts connections."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx
import pytest
from conftest import TIMEOUT, Service, api_client

CHROMIUM = shutil.which("chromium-headless-shell")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

if CHROMIUM is None:
    pytest.skip("no Chromium is installed (apt install chromium-headless-shell)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
Browser, Page = sync_api.Browser, sync_api.Page


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """Return a client of the module's service, without the threads of earlier tests."""
    with api_client(service) as client:
        for thread in client.get("/threads").json()["threads"]:
            client.delete(f"/threads/{thread['threadId']}")
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[Page]:
    with new_tab(browser) as page:
        yield page


@contextlib.contextmanager
def new_page(browser: Browser, **options: Any) -> Iterator[Page]:
    """Open a page in a profile of its own. An error that nothing catches in it fails the test."""
    with new_tab(browser, **options) as page, no_errors(page):
        yield page


@contextlib.contextmanager
def new_tab(browser: Browser, **options: Any) -> Iterator[Page]:
    """Open a page in a profile of its own, for all tests of a file: a new profile costs more than most tests."""
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT * 1000)
    try:
        yield context.new_page()
    finally:
        context.close()


@contextlib.contextmanager
def lent(page: Page) -> Iterator[Page]:
    """Lend a shared page to one test, and leave it blank."""
    with no_errors(page):
        yield page
        page.unroute_all()
        page.emulate_media(color_scheme="null", reduced_motion="null")
        page.goto("about:blank")


@contextlib.contextmanager
def emptied(page: Page, url: str) -> Iterator[Page]:
    """Lend a shared page to one test, without what an earlier one stored at ``url``."""
    page.goto(f"{url}/health/live")
    page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
    with lent(page):
        yield page


@contextlib.contextmanager
def no_errors(page: Page) -> Iterator[None]:
    """Fail where the page has an error that nothing catches."""
    errors: list[str] = []

    def note(error: Any) -> None:
        errors.append(str(error))

    page.on("pageerror", note)
    yield
    page.remove_listener("pageerror", note)
    assert not errors


def opened_sockets(page: Page) -> tuple[list[Any], list[str]]:
    """Return two lists: the WebSockets that a page opens from now on, and the frames that it sends."""
    sockets: list[Any] = []
    frames: list[str] = []

    def opened(socket: Any) -> None:
        sockets.append(socket)
        socket.on("framesent", lambda frame: frames.append(frame))

    page.on("websocket", opened)
    return sockets, frames


def restart(service: Service) -> None:
    """Kill the service and start it again on the same port."""
    service.restart()


class Origin:
    """A web server with one blank page: an origin that is not the service's."""

    def __enter__(self) -> Self:
        class Blank(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b"<!doctype html><title>blank</title>"
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Blank)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Proxy:
    """A TCP proxy in front of the service. A test can cut its connections and take it down."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._dead: set[socket.socket] = set()
        self.is_down = False

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection, as a lost network does."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                reset(end)

    def go_silent(self) -> None:
        """Drop what the service sends on the open connections, and reset each one when its client sends.

        A router that restarts while the laptop sleeps does this.
        """
        with self._lock:
            self._dead.update(end for pair in self._pairs for end in pair)

    def down(self) -> None:
        self.is_down = True
        self.cut()

    def up(self) -> None:
        self.is_down = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    if self.is_down:
                        raise ConnectionRefusedError
                    far = socket.create_connection(self._to)
                except OSError:
                    reset(near)
                    continue
                with self._lock:
                    self._pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink, source is near), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if source not in self._dead:
                    sink.sendall(piece)
                elif is_request:
                    reset(source)
            if source not in self._dead:
                sink.shutdown(socket.SHUT_WR)


def reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    with Proxy(service.port) as proxy:
        yield proxy


# A page that keeps notes which a test can look at. `read` notes every item of one reading, and keeps its
# text in sessionStorage, as a page does that survives a reload. `readStub` reads from answers that the
# test makes up. Each wait before a reconnect is a hundredth of its maximum.
NOTES = """
Math.random = () => 0.01;
window.notes = {};
window.read = async (name, options, {over = "fetch", until = null} = {}) => {
  const client = await import("/static/resume-stream.js");
  const note = window.notes[name] = {items: [], text: "", down: [], error: null, ended: false};
  const onConnection = (event) => event.connected || note.down.push(event.delay);
  window.socket ??= client.connect({token: options.token});
  try {
    const items = over === "fetch" ? client.resumeStream({...options, onConnection}) : window.socket.resumeStream(options);
    for await (const item of items) {
      note.items.push(item);
      if (item.type === "reset") note.text = "";
      if (item.type === "chunk") note.text += item.content;
      sessionStorage.setItem(name, note.text);
      if (note.items.length === until) break;
    }
  } catch (error) {
    note.error = {name: error.name, message: error.message, status: error.status};
  }
  note.ended = true;
};

window.stub = (...answers) => {
  window.asked = [];
  return async (url, options) => {
    asked.push({url: String(url), method: options.method, authorization: options.headers.Authorization ?? null});
    options.signal?.throwIfAborted();
    const {status = 200, headers = {"Content-Type": "text/event-stream"}, body = "", pieces = null} = answers.shift();
    if (pieces === null) return new Response(status === 204 ? null : body, {status, headers});
    const queue = pieces.map(piece => Uint8Array.from(piece));
    return new Response(new ReadableStream({pull: (c) => queue.length ? c.enqueue(queue.shift()) : c.close()}), {headers});
  };
};
window.readStub = async (answers, options = {}) => {
  const {resumeStream} = await import("/static/resume-stream.js");
  const [items, delays] = [[], []];
  const onConnection = (event) => event.connected || delays.push(event.delay);
  const fetch = stub(...answers);
  try {
    const all = resumeStream({threadId: "t", messageId: "m", ...options, fetch, onConnection});
    for await (const item of all) items.push(item.content ?? item.type);
    return {items, delays, asked};
  } catch (error) {
    return {items, delays, asked, error: error.name, status: error.status, message: error.message};
  }
};
"""


class Reader:
    """One reading of the page, under its name in the page's notes."""

    def __init__(self, page: Page, name: str = "reader") -> None:
        self.page = page
        self.name = name

    def begin(self, over: str = "fetch", until: int | None = None, **options: Any) -> Self:
        how = {"over": over, "until": until}
        self.page.evaluate(f"() => void read({json.dumps(self.name)}, {json.dumps(options)}, {json.dumps(how)})")
        return self

    def wait(self, condition: str) -> Self:
        """Wait until a JavaScript expression of ``note`` is true."""
        self.page.wait_for_function(
            f"() => {{ const note = window.notes[{json.dumps(self.name)}]; return note && ({condition}) }}", polling=10
        )
        return self

    def wait_for_text(self, text: str) -> Self:
        return self.wait(f"note.text.length >= {len(text)}")

    def wait_for_end(self) -> Self:
        return self.wait("note.ended")

    @property
    def note(self) -> dict[str, Any]:
        return self.page.evaluate("name => window.notes[name]", self.name)

    @property
    def items(self) -> list[dict[str, Any]]:
        return self.note["items"]

    @property
    def text(self) -> str:
        return self.note["text"]

    @property
    def types(self) -> list[str]:
        """Return the types of its items, with each run of chunks as one."""
        types = [item["type"] for item in self.items]
        return [
            kind for index, kind in enumerate(types) if index == 0 or kind != "chunk" or types[index - 1] != "chunk"
        ]

    @property
    def seqs(self) -> list[int]:
        return [item["seq"] for item in self.items if "seq" in item]


@pytest.fixture(scope="module")
def notebook(browser: Browser) -> Iterator[Page]:
    """A page that keeps notes, for all tests of a file."""
    with new_tab(browser) as page:
        page.add_init_script(NOTES)
        yield page


@pytest.fixture
def page(notebook: Page) -> Iterator[Page]:
    with lent(notebook):
        yield notebook


def open_notebook(page: Page, url: str) -> Reader:
    """Go to a page of the service's own origin, and return its reader."""
    page.goto(f"{url}/health/live")
    page.evaluate("sessionStorage.clear()")
    return Reader(page)
