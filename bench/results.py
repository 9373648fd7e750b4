"""Results: samples of rounds, lines and rows of the table, and aims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

OLD = "version 0.1"
LOAD = "the load's own"  # begins the names of the load generator's own figures
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class BenchError(Exception):
    """A row is not credible: a wrong answer, a lost chunk, a dead server."""


class Unavailable(Exception):
    """A tool or a peer is missing. The message names it."""


@dataclass(frozen=True)
class Samples:
    """One value a round, in the unit of its line."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return shown(self.median)
        return f"{shown(self.median)} ({shown(min(self.values))} to {shown(max(self.values))})"


@dataclass(frozen=True)
class Missing:
    """A figure that this machine cannot measure."""

    why: str

    def __str__(self) -> str:
        return f"not measured: {self.why}"


Figure = Samples | Missing


@dataclass(frozen=True)
class Aim:
    """An aim, its outcome, and whether it is reached (None: unknown)."""

    text: str
    outcome: str
    reached: bool | None


@dataclass(frozen=True)
class Line:
    """A line of the table: this service's figure and the figures beside it, in one unit."""

    title: str
    unit: str
    ours: Figure
    beside: dict[str, Figure] = field(default_factory=dict)
    aims: Sequence[Aim] = ()
    charted: bool = False


@dataclass(frozen=True)
class Stack:
    """A cost by layer: the layers' parts of each bar, in one unit."""

    title: str
    unit: str
    bars: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A row of the benchmark: its lines, how they are measured, a sentence for the summary, and its stacks."""

    title: str
    how: str
    lines: Sequence[Line] = ()
    summary: str = ""
    failure: str = ""
    stacks: Sequence[Stack] = ()


def shown(value: float) -> str:
    """Return the value with three significant digits and commas in thousands."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def ratio(ours: Samples, other: Samples) -> float:
    """Return the median of each round's ratio: what slows a whole round cancels out."""
    return statistics.median(a / b for a, b in zip(ours.values, other.values, strict=True))


def measured_share(ours: Figure, other: Figure) -> str:
    """Return the ratio in per cent, for a sentence."""
    if isinstance(ours, Missing) or isinstance(other, Missing):
        return "an unknown share"
    return f"{ratio(ours, other):.0%}"


def at_least(share: float, ours: Figure, limit: Figure, name: str) -> Aim:
    text = f"at least {share:.0%} of {name}"
    if isinstance(ours, Missing) or isinstance(limit, Missing):
        return Aim(text, f"{name} was not measured", None)
    measured = ratio(ours, limit)
    return Aim(text, f"{measured:.0%} of {name}", measured >= share)


def at_most_times(factor: float, ours: Figure, limit: Figure, name: str) -> Aim:
    text = f"at most {factor:g} times {name}"
    if isinstance(ours, Missing) or isinstance(limit, Missing):
        return Aim(text, f"{name} was not measured", None)
    measured = ratio(ours, limit)
    return Aim(text, f"{measured:.2f} times {name}", measured <= factor)


def under(bound: float, unit: str, ours: Figure) -> Aim:
    text = f"under {shown(bound)} {unit}"
    if isinstance(ours, Missing):
        return Aim(text, "it was not measured", None)
    return Aim(text, f"{shown(ours.median)} {unit}, {ours.median / bound:.2f} times the aim", ours.median < bound)


def no_less_than_before(ours: Figure, old: Figure) -> Aim:
    return at_least(0.95, ours, old, OLD)


def no_more_than_before(ours: Figure, old: Figure) -> Aim:
    return at_most_times(1.05, ours, old, OLD)


def one_after_another(first: Figure, second: Figure) -> Figure:
    """Return the rate of doing both in turn, from the rate of each."""
    if isinstance(first, Missing) or isinstance(second, Missing):
        return Missing("one of the two was not measured")
    return Samples(tuple(1 / (1 / a + 1 / b) for a, b in zip(first.values, second.values, strict=True)))


def interleave(rounds: int, measures: Mapping[K, Callable[[int], T]]) -> dict[K, list[T]]:
    """Take every measure in turn, round after round, so that the machine's moods affect all alike.

    Each round begins with another measure. Round 0 warms up and is discarded. Raise BenchError.
    """
    names = list(measures)
    taken: dict[K, list[T]] = {name: [] for name in names}
    for number in range(rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            try:
                value = measures[name](number)
            except BenchError as error:
                raise BenchError(f"{name}, round {number}: {error}") from error
            if number:
                taken[name].append(value)
    return taken


def sampled(rounds: int, measures: Mapping[K, Callable[[int], float]]) -> dict[K, Figure]:
    """Do the same for measures of one value."""
    return {name: Samples(tuple(values)) for name, values in interleave(rounds, measures).items()}
