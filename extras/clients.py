"""The commands ``publish`` and ``tail``: a producer and a reader for the shell, built on the Python client.

They are there if the folder client is.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def add_commands(commands: Any) -> None:
    if find_spec("..client", __package__) is None:
        return
    from ..client import command_line

    command_line.add_commands(commands.subparsers)
