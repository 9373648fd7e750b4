"""The command line: settings, start-up line, and refusals."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, Service, run_command
from resume_stream import app
from resume_stream.app import Settings, _parse_size, parse_duration

SETTINGS: dict[str, tuple[str, Any, str, Any]] = {
    # a text and its value, twice
    "host": ("::1", "::1", "localhost", "localhost"),
    "port": ("0", 0, "8123", 8123),
    "uds": ("/tmp/a.sock", "/tmp/a.sock", "b.sock", "b.sock"),
    "db": ("/srv/a.db", "/srv/a.db", "b.db", "b.db"),
    "store": ("redis://a/0", "redis://a/0", "unix:///b.sock", "unix:///b.sock"),
    "ttl": ("2h", 7200, "90s", 90),
    "cleanup_interval": ("10s", 10, "1m", 60),
    "idle_timeout": ("1m", 60, "0", 0),
    "heartbeat": ("500ms", 0.5, "20s", 20),
    "poll_interval": ("50ms", 0.05, "1s", 1),
    "producer_timeout": ("0", 0, "2m", 120),
    "packing": ("false", False, "true", True),
    "synchronous": ("NORMAL", "NORMAL", "FULL", "FULL"),
    "max_chunk": ("64KiB", 65536, "1000", 1000),
    "max_body": ("2MiB", 2 * 1024**2, "1GiB", 1024**3),
    "max_message": ("10MiB", 10 * 1024**2, "512B", 512),
    "max_db": ("1GiB", 1024**3, "5MiB", 5 * 1024**2),
    "max_readers": ("5", 5, "6", 6),
    "upstream": ("a=http://a/", ("a=http://a",), "a=https://a/v1,b=http://b:1", ("a=https://a/v1", "b=http://b:1")),
    "max_relays": ("7", 7, "8", 8),
    "secret": ("s" * 32, "s" * 32, "t" * 40, "t" * 40),
    "cors_origins": ("https://a.example", ("https://a.example",), "http://b:1,https://c/", ("http://b:1", "https://c")),
    "log_format": ("json", "json", "console", "console"),
}
DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "uds": "",
    "db": "resume-stream.db",
    "store": "",
    "ttl": 3600,
    "cleanup_interval": 300,
    "idle_timeout": 30,
    "heartbeat": 15,
    "poll_interval": 0.1,
    "producer_timeout": 300,
    "synchronous": "FULL",
    "max_chunk": 1024**2,
    "max_body": 10 * 1024**2,
    "max_message": 64 * 1024**2,
    "max_db": 0,
    "max_readers": 10_000,
    "upstream": (),
    "max_relays": 1_000,
    "secret": "",
    "cors_origins": (),
}


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Return a function that returns the settings with which ``resume-stream serve`` would run."""
    taken: list[Settings] = []

    async def serve(settings: Settings) -> None:
        taken.append(settings)

    monkeypatch.setattr(app, "_serve", serve)
    monkeypatch.setattr("resume_stream.extras.logs.set_up", lambda settings: None)

    def run(*flags: str, **environment: str) -> Settings:
        with monkeypatch.context() as context:
            for name, value in environment.items():
                context.setenv(name, value)
            assert app.main(["serve", *flags]) == 0
        return taken.pop()

    return run


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("100ms", 0.1),
        ("30s", 30),
        ("5m", 300),
        ("1h", 3600),
        ("1.5h", 5400),
        ("0", 0),
        ("0s", 0),
        ("2", 2),
        ("0.25", 0.25),
        (" 7s ", 7),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64KiB", 65536),
        ("10MiB", 10_485_760),
        ("2GiB", 2_147_483_648),
        ("17B", 17),
        ("17", 17),
        ("0", 0),
        (" 1KiB ", 1024),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert _parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "1 s", "1S", "1sec", "1e3", "nan", "inf", "1.s", "٣s", "1h30m", "1" * 400]
)
def test_a_bad_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration; write it like 100ms"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "KiB", "-1", "1.5MiB", "10MB", "10mib", "1 MiB", "0x10", "٣", "1" * 400])
def test_a_bad_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="not a size; write it like 64KiB"):
        _parse_size(text)


def test_every_setting_has_its_default(settings_of: Callable[..., Settings]) -> None:
    settings = settings_of()
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS


def test_every_setting_is_in_this_table() -> None:
    assert set(Settings.__struct_fields__) - {"allow_anonymous"} == SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_a_variable_and_a_flag_and_the_flag_wins(settings_of: Callable[..., Settings], name: str) -> None:
    one, value, other, other_value = SETTINGS[name]
    flag, variable = f"--{name.replace('_', '-')}", f"RESUME_STREAM_{name.upper()}"
    assert getattr(settings_of(**{variable: one}), name) == value
    assert getattr(settings_of(flag, other), name) == other_value
    assert getattr(settings_of(f"{flag}={other}", **{variable: one}), name) == other_value


def test_a_flag_for_a_list_may_come_more_than_once(settings_of: Callable[..., Settings]) -> None:
    flags = ("--upstream", "a=http://a", "--upstream", "b=http://b")
    assert settings_of(*flags).upstream == ("a=http://a", "b=http://b")


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        (["--ttl", "soon"], {}, "--ttl: 'soon' is not a duration"),
        ([], {"RESUME_STREAM_TTL": "soon"}, "RESUME_STREAM_TTL: 'soon' is not a duration"),
        (["--max-chunk", "10MB"], {}, "--max-chunk: '10MB' is not a size"),
        (["--port", "http"], {}, "--port: port='http' cannot be; it is NUMBER"),
        ([], {"RESUME_STREAM_PORT": ""}, "RESUME_STREAM_PORT: port is empty; give it a value, or leave it out"),
        (["--max-readers", "1.5"], {}, "--max-readers: max_readers='1.5' cannot be"),
        (["--synchronous", "OFF"], {}, "--synchronous: synchronous='OFF' cannot be; it is FULL|NORMAL"),
        (["--log-format", "xml"], {}, "--log-format: log_format='xml' cannot be"),
        (["--upstream", "https://a"], {}, "--upstream: 'https://a' is not an upstream; write it like openai=https://"),
        (["--upstream", "a=ftp://a"], {}, "--upstream: 'a=ftp://a' is not an upstream"),
        (["--upstream", "a=https://u:key@a"], {}, "--upstream: 'a=https://…@a' is not an upstream"),
        (["--upstream", "a=https://a?key=b"], {}, "--upstream: 'a=https://a?…' is not an upstream"),
        (["--upstream", "a=http://a:99999"], {}, "--upstream: 'a=http://a:99999' has no host, or a port that is not"),
        (["--upstream", "a=http://a:http/v1"], {}, "--upstream: 'a=http://a:http/v1' has no host, or a port that"),
        (["--upstream", "a=http://a:0"], {}, "--upstream: 'a=http://a:0' has no host, or a port that is not one"),
        (["--upstream", "a=http://:80"], {}, "--upstream: 'a=http://:80' has no host, or a port that is not one"),
        (["--upstream", "a=http://[::1"], {}, "--upstream: 'a=http://[::1' has no host, or a port that is not one"),
        (["--upstream", "a=http://a", "--upstream", "a=http://b"], {}, "--upstream: there are two upstreams a"),
        (["--secret", "s" * 31], {}, "--secret: the secret has 31 bytes, and HS256 asks for 32 or more"),
        ([], {"RESUME_STREAM_SECRET": "short"}, "RESUME_STREAM_SECRET: the secret has 5 bytes"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_flag_or_variable(
    flags: list[str],
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("resume_stream.extras.logs.set_up", lambda settings: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert app.main(["serve", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"resume-stream: {says}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("RESUME_STREAM_IDLETIMEOUT", "RESUME_STREAM_IDLE_TIMEOUT"),
        ("RESUME_STREAM_MAX_CHUNKS", "RESUME_STREAM_MAX_CHUNK"),
        ("RESUME_STREAM_X", "--help"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_setting_named(
    variable: str, near: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resume_stream.extras.logs.set_up", lambda settings: None)
    monkeypatch.setenv(variable, "1")
    assert app.main(["serve"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"resume-stream: {variable} is no setting; ")
    assert near in error


def test_variables_of_the_client_are_not_taken_for_settings(settings_of: Callable[..., Settings]) -> None:
    others = {"RESUME_STREAM_URL": "x", "RESUME_STREAM_TOKEN": "x"}
    assert settings_of(**others) == Settings()


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"ttl": "1s"}, 1),
        ({"ttl": 1}, 1),
        ({"max_chunk": "64KiB"}, 65536),
        ({"cors_origins": ["https://a"]}, ("https://a",)),
    ],
    ids=str,
)
def test_settings_of_a_library_read_as_those_of_the_command_line(settings: dict[str, Any], value: Any) -> None:
    ((name, _),) = settings.items()
    assert getattr(Settings(**settings), name) == value
    assert type(getattr(Settings(**settings), name)) is type(getattr(Settings(), name))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ttl": "soon"}, "'soon' is not a duration"),
        ({"ttl": -1}, "ttl=-1.0 cannot be; it is 0 or more"),
        ({"heartbeat": float("nan")}, "heartbeat=nan cannot be"),
        ({"idle_timeout": None}, "idle_timeout=None cannot be"),
        ({"max_message": 1.5}, "max_message=1.5 cannot be"),
        ({"max_readers": "5"}, "max_readers='5' cannot be"),
        ({"synchronous": "OFF"}, "synchronous='OFF' cannot be"),
        ({"db": 5}, "db=5 cannot be"),
        ({"secret": "too short"}, "the secret has 9 bytes, and HS256 asks for 32 or more"),
        ({"secret": "é" * 15}, "the secret has 30 bytes"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_where_they_are_made(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Settings(**settings)


def refusal(*arguments: Any) -> str:
    done = run_command(*arguments)
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_the_version_is_that_of_the_module() -> None:
    done = run_command("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{app.__version__}\n", "")
    done = subprocess.run([sys.executable, ROOT / "app.py", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"resume-stream {app.__version__}\n", "")


def test_help_shows_values_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app.main(["serve", "--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("1h", "5m", "30s", "100ms", "1MiB", "64MiB", "10000", "none", "false", "true", "FULL"):
        assert f"(default: {default})" in shown
    for flag in ("--ttl DURATION", "--max-chunk SIZE", "--synchronous FULL|NORMAL", "--log-format auto|console|json"):
        assert f"[{flag}]" in shown
    values = re.findall(r"--([a-z-]+) (?:DURATION|SIZE) .*?\(default: (\w+)\)", shown.partition("options:")[2])
    assert len(values) == 10
    for name, text in values:
        setting = name.replace("-", "_")
        assert getattr(Settings(**{setting: text}), setting) == getattr(Settings(), setting)


@pytest.mark.parametrize("command", ["serve", "check", "tail"])
def test_an_unknown_flag_exits_with_2_and_the_usage_of_its_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, *(["thread"] if command == "tail" else []), "--bogus", "1"]
    with pytest.raises(SystemExit) as left:
        app.main(arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: resume-stream {command} ")
    assert error.endswith(f"resume-stream {command}: error: unrecognized arguments: --bogus 1\n")


def test_a_bad_value_ends_the_real_process_too(tmp_path: Path) -> None:
    db = tmp_path / "chunks.db"
    assert "--heartbeat: 'never' is not a duration" in refusal("serve", "--db", db, "--heartbeat", "never")
    assert not list(tmp_path.iterdir())


def test_a_port_out_of_range_is_refused(tmp_path: Path) -> None:
    assert "70000" in refusal("serve", "--db", tmp_path / "chunks.db", "--port=70000")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uds", ["missing/a.sock", "x" * 120])
def test_a_bad_path_of_a_unix_socket_is_refused(tmp_path: Path, uds: str) -> None:
    assert uds in refusal("serve", "--db", tmp_path / "chunks.db", "--uds", tmp_path / uds)
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("serve", "--db", tmp_path / "chunks.db", "--port", port)
    assert str(port) in line
    assert "in use" in line
    assert not list(tmp_path.iterdir())


def test_port_0_picks_a_free_port_and_prints_it(service: Service) -> None:
    assert service.port > 0
    assert httpx.get(f"{service.url}/health/live").status_code == 200


def test_a_unix_socket_takes_the_place_of_a_port(tmp_path: Path) -> None:
    uds = tmp_path / "resume.sock"
    service = Service(tmp_path / "chunks.db", "--uds", str(uds))
    line = service.spawn().stdout.readline()
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://localhost") as client:
        assert client.put("/api/threads/t/messages/m").status_code == 201
    assert service.end() == 0
    assert str(uds) in line
    assert not re.search(r"http://\S+:\d", line)


def test_the_environment_of_a_real_process_is_read(tmp_path: Path, start_service: Callable[..., Service]) -> None:
    environment = {"RESUME_STREAM_MAX_CHUNK": "10B", "RESUME_STREAM_MAX_MESSAGE": "5B"}
    service = start_service("--max-message", "1KiB", environment=environment)
    url = f"{service.api}/threads/t/messages/m/chunks"
    assert httpx.post(url, json={"content": "x" * 10}).status_code == 201
    assert httpx.post(url, json={"content": "x" * 11}).status_code == 413


def test_a_clean_up_that_would_never_pause_is_refused() -> None:
    with pytest.raises(ValueError, match="never pause"):
        Settings(cleanup_interval=app.Duration(0))
