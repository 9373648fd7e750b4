"""The commands ``publish`` and ``tail``: a producer and a reader for the shell, built on the Python client."""

from __future__ import annotations

from typing import Any

from ..client import command_line


def add_commands(commands: Any) -> None:
    command_line.add_commands(commands.subparsers)
