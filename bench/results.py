"""What was measured: samples of rounds, the lines and rows of the table, and the aims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

OLD = "version 0.1"
LOAD = "the load's own"  # how names of what the load generator itself can do begin
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class BenchError(Exception):
    """A row cannot be believed: a wrong answer, a lost chunk, a server that died."""


class Unavailable(Exception):
    """Something to measure with, or a peer, is not there; the message says what."""


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
    """A figure that this machine cannot give."""

    why: str

    def __str__(self) -> str:
        return f"not measured: {self.why}"


Figure = Samples | Missing


@dataclass(frozen=True)
class Aim:
    """What was aimed at, what came of it, and whether that is reached; None: it cannot be told."""

    text: str
    outcome: str
    reached: bool | None


@dataclass(frozen=True)
class Line:
    """One line of the table: this service's figure, and what stands beside it, in one unit."""

    title: str
    unit: str
    ours: Figure
    beside: dict[str, Figure] = field(default_factory=dict)
    aims: Sequence[Aim] = ()
    charted: bool = False


@dataclass(frozen=True)
class Stack:
    """What something costs by layer: for each of its bars the layers' own parts, in one unit."""

    title: str
    unit: str
    bars: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A row of the benchmark: its lines, how they were measured, a sentence for the summary, and its layers."""

    title: str
    how: str
    lines: Sequence[Line] = ()
    summary: str = ""
    failure: str = ""
    stacks: Sequence[Stack] = ()


def shown(value: float) -> str:
    """Three significant digits, with commas in thousands."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def ratio(ours: Samples, other: Samples) -> float:
    """The median of the ratios of each round, so that what slows a whole round cancels out."""
    return statistics.median(a / b for a, b in zip(ours.values, other.values, strict=True))


def measured_share(ours: Figure, other: Figure) -> str:
    """In per cent, for a sentence."""
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
    """The rate of doing both in turn, from the rates of each."""
    if isinstance(first, Missing) or isinstance(second, Missing):
        return Missing("one of the two was not measured")
    return Samples(tuple(1 / (1 / a + 1 / b) for a, b in zip(first.values, second.values, strict=True)))


def interleave(rounds: int, measures: Mapping[K, Callable[[int], T]]) -> dict[K, list[T]]:
    """Measure each in turn, round after round, so that the machine's moods meet all alike.

    Each round begins with another one. Round 0 warms up and is discarded. Raises BenchError.
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
    """``interleave`` for measures of one value."""
    return {name: Samples(tuple(values)) for name, values in interleave(rounds, measures).items()}
