"""Intervals and tests for scores on the same questions. Pure numpy; known answers are in the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, lgamma, log, sqrt

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
Z = 1.959964  # the standard normal distribution's 97.5% point: LEVEL lies between -Z and Z
RIGHT_FROM = 0.5  # a score counts as right from here on, where a test needs right or wrong


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of `b - a` over paired scores with its interval, and the p-value of McNemar's exact test."""

    value: float
    low: float
    high: float
    p: float
    n: int


def mean_interval(scores: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate | None:
    """Mean and percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13) of scores; None for no scores.

    Drawing n rows with replacement gives multinomial counts of the distinct values, so the counts are drawn, not the
    rows: the same distribution at a fraction of the work, since scores take few values. Where all scores are equal the
    interval has no width, which says more than so many questions can know.
    """
    if not len(scores):
        return None
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    low, high = np.percentile(drawn @ values / n, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(np.mean(scores)), float(low), float(high), n)


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Difference | None:
    """How much better `b` is than `a` on the same questions, in the same order; None for no questions.

    The interval resamples questions, so it is of the paired difference, not of two independent means.
    Raises `ValueError` for lists of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"paired scores need one length, not {len(a)} and {len(b)}")
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    estimate = mean_interval((second - first).tolist(), seed=seed)
    if estimate is None:
        return None
    return Difference(estimate.value, estimate.low, estimate.high, mcnemar(first, second), estimate.n)


def ratio_interval(
    above: Sequence[float], below: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate | None:
    """Ratio of two sums over the same rows with its percentile bootstrap interval, in which the rows are resampled.

    None where the lower sum is not measurably above 0 (more than 2.5% of the resamples have it at 0 or less): then no
    interval holds the ratio. Raises `ValueError` for lists of different lengths.
    """
    if len(above) != len(below):
        raise ValueError(f"paired values need one length, not {len(above)} and {len(below)}")
    if not len(above) or sum(below) <= 0:
        return None
    pairs = np.column_stack([np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)])
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    n = int(counts.sum())
    sums = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ pairs
    usable = sums[sums[:, 1] > 0]
    if len(usable) < 0.5 * (1 + LEVEL) * resamples:
        return None
    low, high = np.percentile(usable[:, 0] / usable[:, 1], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(sum(above) / sum(below), float(low), float(high), n)


def mcnemar(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test that a and b are right equally often (a score of 0.5 or more is right).

    Binomial test on the questions where only one is right: min(1, 2 P(X <= min(b01, b10))), X ~ B(b01 + b10, 1/2).
    Returns 1.0 where the two never differ.
    """
    right_a, right_b = np.asarray(a) >= RIGHT_FROM, np.asarray(b) >= RIGHT_FROM
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    differ = only_a + only_b
    ways = tail = 1  # C(differ, 0), in whole numbers: floats underflow from about a thousand differing questions on
    for k in range(1, min(only_a, only_b) + 1):
        ways = ways * (differ - k + 1) // k
        tail += ways
    return min(1.0, float(2 * tail / (1 << differ)))


def percentile(values: Sequence[float | None], q: float) -> float | None:
    """The q-th percentile (0 to 100, linear between neighbours) of the known values; None where none is known."""
    known = [value for value in values if value is not None]
    return float(np.percentile(known, q)) if known else None


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of n: it has a width where all n are alike, too."""
    middle, half = share + Z**2 / (2 * n), Z * sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))


def quantile_interval(values: Sequence[float], q: float) -> tuple[float, float]:
    """Distribution-free interval of the q-th quantile (0 to 1) between two of the values in order (Conover 1999, 3.2).

    How many of n values lie below the quantile is binomial. Few values do not bound an outer quantile: that end is then
    infinite (from 72 on the 95th percentile has an upper end, from 368 on the 99th). No values: both ends are.
    """
    ordered, n = sorted(values), len(values)
    below, ranks = 0.0, [0, n + 1]  # ordered[rank - 1]; 0 and n + 1 are no value's
    for k in range(n + 1):
        if below <= (1 - LEVEL) / 2:
            ranks[0] = k
        ways = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)  # as a logarithm: the number itself overflows
        below += exp(ways + k * log(q) + (n - k) * log(1 - q))
        if below >= (1 + LEVEL) / 2:
            ranks[1] = k + 1
            break
    low, high = ranks
    return ordered[low - 1] if low else -inf, ordered[high - 1] if high <= n else inf
