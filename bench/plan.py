"""The extent and the folder of a run, and the servers of a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .results import Figure, Missing, Unavailable, sampled
from .servers import Server

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Plan:
    """The extent of a run. ``folder`` belongs to the run and is on a real disk."""

    rounds: int
    quick: bool
    folder: Path

    def place(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def scaled(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def seconds(self, number: int) -> float:
        """Return how long this round measures a rate. The warm-up round is short."""
        return 1.0 if self.quick or number == 0 else 2.0


class Stage(contextlib.ExitStack):
    """The servers of a row by their names in the table, and those that could not start."""

    def __init__(self, plan: Plan, row: str) -> None:
        super().__init__()
        self.plan = plan
        self.folder = plan.place(row)
        self.servers: dict[str, Server] = {}
        self.missing: dict[str, Missing] = {}

    def start(self, name: str, server: Callable[[Path], contextlib.AbstractContextManager[Server]]) -> None:
        try:
            self.servers[name] = self.enter_context(server(self.folder / f"server-{len(self.servers)}"))
        except Unavailable as unavailable:
            self.missing[name] = Missing(str(unavailable))

    def sample(self, measures: dict[str, Callable[[int], float]]) -> dict[str, Figure]:
        """Take the measures in rounds, and return their figures and the missing ones by name."""
        return {**self.missing, **sampled(self.plan.rounds, measures)}
