"""The front: what nothing beats by more than can be measured."""

from __future__ import annotations

import random
from typing import Any

from mpa_edge.benchmarks.pareto import pareto


def entry(
    accuracy: float | None, p50: float | None = 10, size: float | None = 5, memory: float = 100
) -> dict[str, Any]:
    return {
        "accuracy": {"value": accuracy},
        "latency_ms": {"total": {"p50": p50}},
        "size_mb": size,
        "peak_memory_mb": memory,
    }


def test_the_front_holds_what_nothing_beats_in_everything() -> None:
    best, quick, small = entry(0.9, 100, 50), entry(0.5, 10, 50), entry(0.4, 200, 5)
    beaten, broken = entry(0.5, 20, 50), entry(None, 1, 1)
    assert pareto([best, quick, beaten, small, broken]) == [True, True, False, True, False]
    assert pareto([entry(0.5), entry(0.5)]) == [True, True]


def test_what_cannot_be_measured_is_no_advantage() -> None:
    heavier = entry(0.773, 19.4, 3.1, 99.3)
    assert pareto([heavier, entry(0.773, 40, 3.1, 99.2)]) == [True, False]  # 0.1 MB less does not make up for that
    assert pareto([heavier, entry(0.774, 40, 3.1, 99.3)]) == [True, False]  # nor does a tenth of a point
    assert pareto([heavier, entry(0.773, 40, 3.1, 80)]) == [True, True]  # a fifth of the memory does
    assert pareto([heavier, entry(0.79, 40, 3.1, 99.3)]) == [True, True]
    assert pareto([heavier, entry(0.773, 19.0, 3.1, 99.3)]) == [True, True]  # neither is measurably faster


def test_an_unknown_figure_is_the_worst() -> None:
    assert pareto([entry(0.5, 10, 5), entry(0.5, None, 5), entry(0.5, 10, None)]) == [True, False, False]
    assert pareto([entry(0.5, 10, 5), entry(0.7, None, 5)]) == [True, True]


def test_a_circle_of_small_advantages_leaves_somebody_on_the_front() -> None:
    """Each is measurably better than the next in one figure, and worse by less than can be measured in the others."""
    unit = [0.95, 1.1, 1.01, 1.1]
    circle = [(2.0, 0.0, 1.3, 0.0), (0.5, 0.8, 2.5, 0.0), (1.2, 1.5, 1.2, 0.0)]
    entries = [
        entry(0.5 + 0.01 * a, 10 * unit[1] ** -b, 5 * unit[2] ** -c, 100 * unit[3] ** -d) for a, b, c, d in circle
    ]
    assert any(pareto(entries))
    rng = random.Random(0)
    for _ in range(500):
        crowd = [
            entry(
                0.5 + 0.01 * rng.uniform(0, 3),
                rng.choice([None, 10 * 1.1 ** rng.uniform(0, 3)]),
                5 * 1.01 ** rng.uniform(0, 3),
                100 * 1.1 ** rng.uniform(0, 3),
            )
            for _ in range(6)
        ]
        assert any(pareto(crowd))
