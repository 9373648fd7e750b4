"""Every snippet of the README, in its order, against a real service."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, TIMEOUT, Service, api_client, append
from resume_stream import app
from resume_stream.extras.command_line import default_text
from upstream import RESPONSES
from upstream import Upstream as RelayedUpstream

README = (ROOT / "README.md").read_text()
FAILED = "trap 'echo \"failed ($?): $BASH_COMMAND\" >&2' ERR\n"


class Snippet(NamedTuple):
    language: str
    text: str


SNIPPETS = [Snippet(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)]


def snippets(language: str) -> list[str]:
    return [snippet.text for snippet in SNIPPETS if snippet.language == language]


class Upstream(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible API does."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = self.headers["Authorization"] == "Bearer key" and asked["stream"] is True
        self.send_response(200 if good else 401)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        begins = "Another " if asked["model"] == "other" else "A "
        for text in [begins, "story", "."] if good else []:
            self.wfile.write(b"data: %s\n\n" % json.dumps({"choices": [{"delta": {"content": text}}]}).encode())
        if asked["model"] != "breaks":
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Reader:
    """Somebody with a service that runs in a folder, and with the command and the package."""

    def __init__(self, folder: Path, service: Service, upstream: str) -> None:
        self.folder, self.service = folder, service
        package, command = folder / "site" / "resume_stream", folder / "bin" / "resume-stream"
        for path in (package.parent, command.parent):
            path.mkdir()
        package.symlink_to(ROOT)
        command.write_text(f"#!{sys.executable}\nimport sys\nfrom resume_stream import app\nsys.exit(app.main())\n")
        command.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(package.parent),
            "RESUME_STREAM_URL": service.url,
            "OPENAI_BASE_URL": upstream,
            "OPENAI_API_KEY": "key",
            "MODEL": "m",
        }

    def here(self, text: str) -> str:
        """Return the text with the URL of this service in place of the default one."""
        return text.replace("http://127.0.0.1:8000", self.service.url)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def shell(self, text: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", "-uc", FAILED + self.here(text))

    def python(self, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-W", "error", "-c", self.here(text), **environment)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, upstream: str) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("readme")
    service = Service(folder / "resume-stream.db")
    with service:
        yield Reader(folder, service, upstream)


def shape(frames: str) -> str:
    """Return the frames with times masked."""
    return re.sub(r"\d{13}", "#", frames)


def frames_of(output: str) -> list[str]:
    return [frame for frame in re.split(r"\n\n|(?<=retry: 1000)\n|: hb\n", output) if frame.startswith("id: ")]


def text_of(reader: Reader, message: str) -> tuple[str, str]:
    with api_client(reader.service) as client:
        answer = client.get("/threads/thread-1/content", params={"message_id": message}).json()
    return answer["content"], answer["status"]


def test_the_test_command_is_where_ci_finds_it() -> None:
    section = re.search(r"^## Test it\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    assert [line for line in section.splitlines() if line.endswith("pytest")] == [snippets("sh")[1].strip()]


def test_every_link_has_a_target() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        assert anchor in [
            heading.lower().replace(" ", "-") for heading in re.findall("^#+ (.*)$", README, re.MULTILINE)
        ]


def test_the_reference_has_every_setting_with_its_default_and_every_call() -> None:
    settings = (ROOT / "docs" / "settings.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")] for row in settings.splitlines() if row.startswith("| `")]
    said = {
        name: default
        for row in rows
        for name, default in zip(re.findall(r"`(\w+)`", row[1]), row[2].split(", "), strict=True)
    }
    assert said | {"max_db": "0"} == {name: default_text(name) for name in app.SETTINGS}
    calls = (ROOT / "docs" / "calls.md").read_text()
    described = app.create_app().openapi_schema.to_schema()["paths"]
    for method, path in [(method, path) for path, methods in described.items() for method in methods]:
        short = re.sub(r"^/api/threads/{thread_id}/messages/{message_id}", "…", path).replace("{thread_id}", "{t}")
        call = short if path.startswith(("/health", "/metrics")) else f"{method.upper()} {short}"
        assert f"`{call}`" in calls


def test_every_kind_of_snippet_is_run_by_a_test() -> None:
    kinds = [snippet.language for snippet in SNIPPETS]
    assert {kind: kinds.count(kind) for kind in kinds if kind != "console"} == {
        "sh": 7,
        "": 1,
        "python": 3,
        "html": 2,
        "jsx": 1,
    }


def test_the_lines_do_what_they_say_one_after_the_other(reader: Reader) -> None:
    run_it, _, tour, by_text, _, pipe, look_inside = snippets("sh")
    assert run_it.strip().endswith("resume-stream serve")

    done = reader.shell(tour)
    assert done.stderr == "failed (124): timeout 1 curl -sSN $api/stream\n", done
    appended = [json.loads(line) for line in re.findall(r'\{"threadId".*?\}', done.stdout)]
    assert [(answer["seq"], answer["status"]) for answer in appended] == [(2, "active"), (4, "completed")]
    frames = frames_of(re.sub(r'\{"threadId".*?\}', "", done.stdout))
    assert [json.loads(frame.partition("data: ")[2]).get("content") for frame in frames] == [
        "Hello",
        ", wor",
        "ld",
        None,
    ]
    (shown,) = snippets("")
    assert [shape(frame) for frame in (frames[1], frames[3])] == shape(shown).strip().split("\n\n")

    done = reader.shell(by_text)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(frame.partition("data: ")[2]).get("content") for frame in frames_of(done.stdout)] == [
        "or",
        "ld",
        None,
    ]

    done = reader.shell(pipe)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Once\nupon\na\ntime.\n", "")

    _, from_provider, in_process = snippets("python")
    done = reader.python(from_provider)
    assert (done.returncode, done.stderr) == (0, "")
    assert text_of(reader, "run-3") == ("A story.", "completed")

    done = reader.python(in_process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time.StoredChunk(content=' a'")
    assert "MessageEnd(message_id='run-6', status='completed', reason=None, seq=5)" in done.stdout

    with api_client(reader.service) as client:
        append(client, "thread-1", "run-7", "still being written")
        append(client, "thread-2", "run-7", "somebody else's")
        done = reader.shell(look_inside.rpartition("sqlite3 ")[0])
        assert (done.returncode, done.stderr) == (0, "")
        assert "thread-1|run-2|completed||" in done.stdout
        states = {
            thread: client.get(f"/threads/{thread}").json()["messages"][-1]["status"]
            for thread in ("thread-1", "thread-2")
        }
        assert states == {"thread-1": "aborted", "thread-2": "active"}
        done = reader.shell("sqlite3 " + look_inside.rpartition("sqlite3 ")[2])
        assert (done.returncode, done.stderr) == (0, "")
        assert client.get("/threads/thread-1").status_code == 404


@pytest.mark.parametrize(
    ("environment", "says"), [({"OPENAI_API_KEY": "wrong"}, "401"), ({"MODEL": "breaks"}, "the answer broke off")]
)
def test_a_failing_provider_aborts_the_message(reader: Reader, environment: dict[str, str], says: str) -> None:
    message = f"failed-{says[:3]}"
    done = reader.python(snippets("python")[1].replace("run-3", message), **environment)
    assert done.returncode == 1
    assert says in done.stderr
    assert text_of(reader, message)[1] == "aborted"


def test_a_second_answer_into_the_same_message_is_refused_aloud(reader: Reader) -> None:
    once = snippets("python")[1].replace("run-3", "twice")
    assert reader.python(once).returncode == 0
    refused = reader.python(once, MODEL="other")
    assert (refused.returncode, text_of(reader, "twice")) == (1, ("A story.", "completed"))
    assert "resume_stream.client" in refused.stderr.splitlines()[-1]
    library = snippets("python")[2]
    refused = reader.python(library)
    assert refused.returncode == 1
    assert "an end is final" in refused.stderr


def test_the_relay_does_what_its_lines_say(tmp_path: Path, upstream: str) -> None:
    pytest.importorskip("openai")
    command, in_python = snippets("sh")[4].split(), snippets("python")[0]
    assert command == ["resume-stream", "serve", "--upstream", "openai=https://api.openai.com"]
    with (
        RelayedUpstream() as relayed,
        Service(tmp_path / "chunks.db", "--upstream", f"openai={relayed.url}") as service,
    ):
        relayed.answer(RESPONSES)
        done = Reader(tmp_path, service, upstream).python(in_python)
    assert (done.returncode, done.stderr) == (0, "")
    rest = [piece.partition(b"\n")[0].removeprefix(b"event: ").decode() for piece in RESPONSES.pieces[5:]]
    assert done.stdout.splitlines() == [f"{number} {name}" for number, name in enumerate(rest, 5)]
    assert len(relayed.asked) == 1
