"""The commands ``publish`` and ``tail``, with pipes, files, and signals."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, TIMEOUT, Service, wait_until
from resume_stream.client import command_line
from wire import serving


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("commands"), "--max-chunk", "16KiB") as service:
        yield service


COMMAND = """
import argparse, sys
from client import command_line

parser = argparse.ArgumentParser()
command_line.add_commands(parser.add_subparsers(dest="command"))
flags = vars(parser.parse_args())
sys.exit(command_line.run(flags.pop("command"), flags))
"""


@pytest.fixture
def command(service: Service) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Return a function that runs ``publish`` or ``tail`` as a process."""
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "RESUME_STREAM_URL": service.url, "LC_ALL": "C"}

    def run(*arguments: str, stdin: Any = subprocess.PIPE) -> subprocess.Popen[bytes]:
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(
            subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, env=environment, **pipes)
        )
        return running[-1]

    yield run
    for process in running:
        with process:
            process.kill()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    command_line.add_commands(parser.add_subparsers(dest="command"))
    return parser


def accumulated(service: Service, thread: str) -> str | None:
    answer = httpx.get(f"{service.api}/threads/{thread}/content")
    return answer.json()["content"] if answer.is_success else None


def message_of(service: Service, thread: str) -> tuple[str, str | None]:
    (message,) = httpx.get(f"{service.api}/threads/{thread}").json()["messages"]
    return message["status"], message["reason"]


def test_publish_and_tail_pass_text_on_as_it_comes(service: Service, thread: str, command: Any) -> None:
    tail = command("tail", thread, "run", "--wait")
    publish = command("publish", thread, "run")
    for piece, whole in ((b"Hello \xf0\x9f", "Hello "), (b"\x98\x80\r\n", "Hello 😀\r\n"), (b"end", "Hello 😀\r\nend")):
        publish.stdin.write(piece)
        publish.stdin.flush()
        wait_until(lambda whole=whole: accumulated(service, thread) == whole)
    assert tail.stdout.read(len("Hello 😀\r\nend".encode())) == "Hello 😀\r\nend".encode()
    assert publish.communicate() == (b"", b"")
    assert tail.communicate() == (b"", b"")
    assert (publish.returncode, tail.returncode) == (0, 0)
    assert message_of(service, thread) == ("completed", None)
    rest = command("tail", thread, "--after", "1")
    assert rest.communicate() == ("😀\r\nend".encode(), b"")
    assert rest.returncode == 0


def test_publish_takes_a_file(service: Service, thread: str, command: Any, tmp_path: Path) -> None:
    text = "漢字😀\n" * 20_000
    (tmp_path / "text").write_text(text)
    with (tmp_path / "text").open("rb") as file:
        assert command("publish", thread, "run", stdin=file).wait(TIMEOUT) == 0
    assert accumulated(service, thread) == text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_publish_aborts_the_message_on_a_signal(service: Service, thread: str, command: Any, number: int) -> None:
    publish = command("publish", thread, "run")
    publish.stdin.write(b"text")
    publish.stdin.flush()
    wait_until(lambda: accumulated(service, thread) == "text")
    publish.send_signal(number)
    assert publish.wait(TIMEOUT) == 128 + number
    assert publish.stderr.read() == b""
    assert message_of(service, thread) == ("aborted", "CancelledError")


def test_publish_stops_when_the_message_is_aborted_and_tail_says_so(
    service: Service, thread: str, command: Any
) -> None:
    publish, tail = command("publish", thread, "run"), command("tail", thread, "--wait")
    publish.stdin.write(b"text")
    publish.stdin.flush()
    assert tail.stdout.read(4) == b"text"
    tail.send_signal(signal.SIGINT)
    assert (tail.wait(TIMEOUT), tail.stderr.read()) == (130, b"")
    tail = command("tail", thread, "run")
    httpx.post(f"{service.api}/threads/{thread}/messages/run/abort", json={"reason": "enough"})
    assert publish.wait(TIMEOUT) == 1
    assert publish.stderr.read().startswith(b"resume-stream: The message 'run' was aborted (enough) by somebody else")
    assert tail.communicate() == (b"text", b"resume-stream: The message 'run' was aborted (enough).\n")
    assert tail.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("publish", "{thread}", "run"), "can't decode"),
        (("publish", "a/b", "run"), "cannot be an id"),
        (("tail", "{thread}", "none"), "There is no"),
        (("tail", "{thread}", "--after", "x"), "not a cursor"),
        (("tail", "{thread}", "--url", "nowhere"), "not the URL"),
    ],
)
def test_errors_are_one_line(
    service: Service,
    thread: str,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_bytes(b"text\xf0\x9f")
    monkeypatch.setenv("RESUME_STREAM_URL", service.url)
    flags = vars(parser().parse_args([argument.format(thread=thread) for argument in arguments]))
    with (tmp_path / "text").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert command_line.run(flags["command"], flags) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("resume-stream: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_tail_ends_quietly_when_nobody_reads_on(service: Service, thread: str, command: Any) -> None:
    path = f"{service.api}/threads/{thread}/messages/run/chunks"
    httpx.post(path, json={"content": "text"})
    tail = command("tail", thread, "run")
    assert tail.stdout.read(4) == b"text"
    tail.stdout.close()
    httpx.post(path, json={"content": "more"})
    assert tail.wait(TIMEOUT) == 128 + signal.SIGPIPE
    assert tail.stderr.read() == b""


def test_the_commands_are_named_without_httpx() -> None:
    code = "import sys; import client.command_line; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert vars(parser().parse_args(["tail", "t"]))["message"] is None
