"""Known answers: the constants were computed with scipy.stats (binomtest; bootstrap with 200,000 resamples)."""

from __future__ import annotations

import numpy as np
import pytest

from mpa_edge.stats import mcnemar, mean_interval, paired_difference, percentile


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [
        (0, 5, 0.0625),
        (5, 10, 0.30175781249999994),
        (12, 28, 0.01658900337497471),
        (28, 12, 0.01658900337497471),
        (30, 70, 7.85013964559367e-05),
        (400, 600, 2.728464156065947e-10),
        (3, 0, 0.25),
        (0, 0, 1.0),
        (7, 7, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, expected: float) -> None:
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * 9 + [0.0] * 4
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * 9 + [0.0] * 4
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_questions_does_not_underflow() -> None:
    a, b = [1.0] * 1500 + [0.0] * 1500, [0.0] * 1500 + [1.0] * 1500
    assert mcnemar(a, b) == 1.0
    assert 0 < mcnemar([1.0] * 1000, [0.0] * 1000) < 1e-300


def test_partial_scores_count_as_right_from_a_half() -> None:
    assert mcnemar([0.5] * 6, [0.49] * 6) == mcnemar([1.0] * 6, [0.0] * 6)


def test_interval_of_right_and_wrong() -> None:
    estimate = mean_interval([1.0] * 61 + [0.0] * 39)
    assert estimate is not None
    assert (estimate.value, estimate.n) == (pytest.approx(0.61), 100)
    assert (estimate.low, estimate.high) == (pytest.approx(0.51, abs=0.011), pytest.approx(0.70, abs=0.011))


def test_interval_of_graded_scores() -> None:
    estimate = mean_interval([0.0] * 20 + [0.3] * 10 + [0.6] * 30 + [1.0] * 40)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.61)
    assert (estimate.low, estimate.high) == (pytest.approx(0.534, abs=0.005), pytest.approx(0.684, abs=0.005))


def test_interval_of_a_constant_has_no_width() -> None:
    estimate = mean_interval([1.0] * 8)
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_the_seed_fixes_the_interval() -> None:
    scores = np.linspace(0, 1, 50).tolist()
    assert mean_interval(scores, seed=3) == mean_interval(scores, seed=3)
    assert mean_interval(scores, seed=3) != mean_interval(scores, seed=4)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        estimate = mean_interval((rng.random(200) < 0.6).astype(float).tolist(), resamples=1000)
        assert estimate is not None
        hits += estimate.low <= 0.6 <= estimate.high
    assert 0.91 <= hits / 300 <= 0.98


def test_paired_difference() -> None:
    a = [1.0] * 77 + [0.0] * 123
    b = [1.0] * 74 + [0.0] * 3 + [1.0] * 21 + [0.0] * 102
    difference = paired_difference(a, b)
    assert difference is not None
    assert (difference.value, difference.n) == (pytest.approx(0.09), 200)
    assert (difference.low, difference.high) == (pytest.approx(0.045, abs=0.006), pytest.approx(0.135, abs=0.006))
    assert difference.p == mcnemar(a, b) < 0.001


def test_a_paired_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    """b mends 30% of what a has wrong and breaks 5% of what a has right: 0.4 * 0.3 - 0.6 * 0.05 = 0.09."""
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(100):
        a = rng.random(250) < 0.6
        changed = rng.random(250) < np.where(a, 0.05, 0.3)
        difference = paired_difference(a.astype(float).tolist(), (a ^ changed).astype(float).tolist(), seed=trial)
        assert difference is not None
        hits += difference.low <= 0.09 <= difference.high
    assert 0.89 <= hits / 100 <= 0.99


def test_a_paired_interval_is_narrower_than_two_separate_ones() -> None:
    rng = np.random.default_rng(1)
    a = (rng.random(500) < 0.5).astype(float)
    b = a.copy()
    b[:20] = 1.0
    difference, alone = paired_difference(a.tolist(), b.tolist()), mean_interval(a.tolist())
    assert difference is not None
    assert alone is not None
    assert difference.high - difference.low < (alone.high - alone.low) / 2


def test_nothing_to_estimate() -> None:
    assert mean_interval([]) is None
    assert paired_difference([], []) is None
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1.0], [])


def test_percentile_skips_the_unknown() -> None:
    assert percentile([None, 1.0, 3.0], 50) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 95) == pytest.approx(3.85)
    assert percentile([None], 50) is None
    assert percentile([], 50) is None
