"""Which variants are beaten by none, where what a measurement cannot resolve is no difference."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

# Clocks and memory differ a little from run to run; more than this is a change. A file's size is exact, and a hundredth
# of it decides nothing.
SLOWER_FROM, LARGER_FROM, HEAVIER_FROM = 1.1, 1.01, 1.1
# Questions are noisy, too: bundles this close in accuracy are as good as each other.
TOLERANCE = 0.01

Entry = dict[str, Any]


def pareto(entries: Sequence[Entry]) -> list[bool]:
    """Whether no other variant beats it in accuracy, median time, size and memory together.

    One beats another where it is measurably better in one of the four, measurably worse in none, and ahead on balance:
    what lies below the resolution counts for nothing alone, but for so much that no circle of variants can form, each
    a little better than the next. An unknown figure is the worst; where nobody
    was asked for accuracy, the costs decide alone.
    """
    measured = [place(entry) for entry in entries]
    asked = any(own[0] is not None for own in measured)
    return [
        own[0 if asked else 1] is not None and not any(beats(other, own) for other in measured if other is not own)
        for own in measured
    ]


def unbeaten(entries: Sequence[Entry]) -> list[bool]:
    """The same of accuracy and median time alone, which a plot shows."""
    measured = [place(entry)[:2] for entry in entries]
    return [not any(beats(other, own) for other in measured if other is not own) for own in measured]


def place(entry: Entry) -> tuple[float | None, ...]:
    """A variant's four figures, more is better, in units of what can be resolved; None where unknown."""
    accuracy = entry["accuracy"]["value"]
    costs = (
        (entry["latency_ms"]["total"]["p50"], SLOWER_FROM),
        (entry["size_mb"], LARGER_FROM),
        (entry["peak_memory_mb"], HEAVIER_FROM),
    )
    return (
        None if accuracy is None else accuracy / TOLERANCE,
        *(-log(cost) / log(resolution) if cost else None for cost, resolution in costs),
    )


def beats(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """Whether `a` is better in one figure by more than its unit, worse in none, and better in sum."""
    if any(own is None and other is not None for own, other in zip(a, b, strict=True)):
        return False
    both = [own - other for own, other in zip(a, b, strict=True) if own is not None and other is not None]
    more_known = sum(own is not None for own in a) > len(both)
    return min(both, default=0) >= -1 and (more_known or (max(both, default=0) > 1 and sum(both) > 0))
