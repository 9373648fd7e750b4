"""How much to measure in this run, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .results import Figure, Missing, Unavailable
from .servers import Server


@dataclass(frozen=True)
class Plan:
    """``folder`` is the run's own, on a real disk."""

    rounds: int
    quick: bool
    folder: Path

    def place(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def scaled(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def seconds(self, number: int, full: float) -> float:
        """How long to measure in this round; the warm-up round is short."""
        return 1.0 if self.quick or number == 0 else full


def figure(figures: Mapping[str, Figure], name: str, server: Server | Unavailable) -> Figure:
    return Missing(str(server)) if isinstance(server, Unavailable) else figures[name]
