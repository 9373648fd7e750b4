"""The command line: commands of the extras, and a flag for each setting."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..app import SETTINGS, Duration, Settings, Size, __version__, serve, settings_from

SAYS = {
    "host": "address to listen on",
    "port": "port to listen on; 0 picks a free one and prints it",
    "uds": "Unix socket to listen on, in place of host and port",
    "db": "the SQLite file",
    "store": "Redis in place of the SQLite file: redis://host:6379/0, rediss://… or unix:///path",
    "ttl": "a thread that nobody touches for so long is erased",
    "cleanup_interval": "time between two looks for expired threads",
    "idle_timeout": "a stream ends after so long without a chunk; 0: never",
    "heartbeat": "a quiet stream sends a comment this often",
    "poll_interval": "the longest that a change by another process (the sqlite3 shell) goes unnoticed",
    "producer_timeout": "a message is aborted after so long without an append; 0: never",
    "packing": "the clean-up compresses messages that have ended",
    "synchronous": "FULL: an acknowledged chunk survives a power cut; NORMAL: a crash",
    "max_chunk": "largest chunk",
    "max_body": "largest JSON body",
    "max_message": "largest message: its text, and 16 bytes a chunk",
    "max_db": "largest database file; 0: as large as the disk",
    "max_readers": "most readers at a time",
    "secret": "turns authentication on: the key of HS256 tokens, 32 bytes or more",
    "upstream": "what to relay, like openai=https://api.openai.com, with commas or more than once",
    "max_relays": "most answers of upstreams at a time",
    "cors_origins": "other origins whose pages may connect, like https://chat.example, with commas",
    "allow_anonymous": "serve other machines without a secret",
    "log_format": "auto: console on a terminal, else json",
}
UNITS: dict[Any, dict[str, float]] = {
    Duration: {"d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001},
    Size: {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024, "B": 1},
}

Command = Callable[[Settings, dict[str, Any]], int | None]


class Commands:
    """What each extra's ``add_commands(commands)`` adds to."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(
            "resume-stream",
            description="Keeps what an agent streams, so that a reader can resume from where it stopped.",
        )
        self.parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        self.subparsers = self.parser.add_subparsers(dest="command", required=True)

    def add(self, name: str, summary: str, run: Command, *settings: str) -> argparse.ArgumentParser:
        """Add a command with a flag for each of these settings; ``run`` may raise StartupError."""
        added = self.subparsers.add_parser(name, help=summary, description=summary, argument_default=argparse.SUPPRESS)
        added.set_defaults(run=lambda flags: run(settings_from(os.environ, flags), flags))
        for setting in settings:
            kind, called = SETTINGS[setting]
            options: dict[str, Any] = {"help": f"{SAYS[setting]} (default: {default_text(setting)})", "metavar": called}
            if kind is bool:
                options |= {"nargs": "?", "const": "true"}
            if kind == tuple[str, ...]:
                options |= {"action": "append"}
            added.add_argument(f"--{setting.replace('_', '-')}", **options)
        return added

    def run(self, arguments: Sequence[str]) -> int:
        parsed, unknown = self.parser.parse_known_args(arguments)
        flags = {
            name: ",".join(value) if name in SETTINGS and isinstance(value, list) else value
            for name, value in vars(parsed).items()
        }
        if unknown:
            self.subparsers.choices[flags["command"]].error(f"unrecognized arguments: {' '.join(unknown)}")
        return int(parsed.run(flags) or 0)


def run(arguments: Sequence[str], extras: Sequence[Callable[[Commands], None]]) -> int:
    """Run a command and return its exit status. Raise StartupError."""
    commands = Commands()
    commands.add("serve", "run the service", lambda settings, flags: serve(settings), *SETTINGS)
    for add_commands in extras:
        add_commands(commands)
    return commands.run(arguments)


def default_text(name: str) -> str:
    """Return the default of a setting as a person would write it."""
    kind, value = SETTINGS[name][0], getattr(Settings(), name)
    if kind in UNITS and value:
        units = UNITS[kind].items()
        unit, factor = next((unit, factor) for unit, factor in units if round(value / factor, 9) >= 1)
        return f"{value / factor:g}{unit}"
    return "none" if value in ("", ()) else str(value).lower() if kind is bool else str(value)
