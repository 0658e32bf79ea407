"""The lines of --require: parsing, checks at known intervals, and the numbers of further samples."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import pytest

from mpa_edge.benchmarks.require import check, parse_line, parse_lines, requirements, together, two_figures
from mpa_edge.errors import InputError
from mpa_edge.stats import mean_interval, quantile_interval, wilson


def entry(**figures: Any) -> dict[str, Any]:
    latency = {"total": {"p50": 10.0, "p95": 100.0, "p99": 100.0}, "n": 100, "tokens_per_s": None}
    accuracy = {"value": 0.6, "ci95": [0.55, 0.65], "n": 400}
    known = {"name": "q8", "accuracy": accuracy, "latency_ms": latency, "size_mb": 500.0, "peak_memory_mb": 900.0}
    return {**known, "busy": 0.0, "failed": None, **figures}


def test_units_are_turned_into_the_reports() -> None:
    lines = parse_lines("accuracy>=60%, p95 <= 0.3s,memory<=1GiB, size≤500mb, energy<=20mJ, tokens_per_s>=5/s")
    assert [(line.name, line.value) for line in lines] == [
        ("accuracy", pytest.approx(0.6)),
        ("p95", pytest.approx(300)),
        ("memory", pytest.approx(1073.741824)),
        ("size", 500),
        ("energy", pytest.approx(0.02)),
        ("tokens_per_s", 5),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; known: accuracy, gap_closed"),
        ("speed>=3", "no such quantity; known: accuracy"),
        ("accuracy>=60", "accuracy is a share from 0 to 1, or a percentage such as 60%"),
        ("accuracy<=0.6", "write accuracy>=0.6"),
        ("p95<300ms", "write p95<=300ms"),
        ("p95<=300", "p95 needs one of the units ms, s"),
        ("size<=500", "size needs one of the units MB, GB, MiB, GiB"),
        ("p95", "not of the form QUANTITY>=VALUE"),
        ("accuracy>=0,60", "--require '60': not of the form"),
    ],
)
def test_a_wrong_line_is_told_with_its_cure(text: str, words: str) -> None:
    with pytest.raises(InputError, match="--require") as caught:
        parse_lines(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "status"), [("0.5", "pass"), ("0.55", "pass"), ("0.56", "undecided"), ("0.7", "fail")]
)
def test_an_interval_decides(line: str, status: str) -> None:
    found = check(parse_line(f"accuracy>={line}"), entry(), ())
    assert found.status == status
    assert found.margin == pytest.approx(0.6 - float(line))
    assert (found.more is None) == (status != "undecided")


def test_further_questions_follow_the_square_root_of_n() -> None:
    # At 0.58 the distance is 0.02 and the half width 0.05: (5/2)² = 6.25 times the 400 questions.
    assert check(parse_line("accuracy>=0.58"), entry(), ()).more == 2100
    assert check(parse_line("accuracy>=0.60"), entry(), ()).why == "right on the line"
    assert [two_figures(value) for value in (1, 7.2, 12, 123.4, 1201)] == [1, 8, 12, 130, 1300]


def test_the_estimate_of_further_questions_holds_in_a_simulation() -> None:
    drawn = np.random.default_rng(0)
    line, scores = parse_line("accuracy>=0.58"), (drawn.permutation(400) < 248).astype(float)
    found = mean_interval(scores.tolist())
    assert found is not None
    accuracy = {"value": found.value, "ci95": [found.low, found.high], "n": 400}
    first = check(line, entry(accuracy=accuracy), ())
    assert (first.status, first.more) == ("undecided", 170)
    # As many more questions of the same accuracy, and a few more or less than that.
    decided = []
    for extra in (0.8, 1.3):
        n = 400 + int(extra * 170)
        found = mean_interval([1.0] * round(0.62 * n) + [0.0] * (n - round(0.62 * n)))
        assert found is not None
        decided.append(found.low >= 0.58)
    assert decided == [False, True]


def test_all_right_on_few_questions_proves_little() -> None:
    perfect = {"value": 1.0, "ci95": [1.0, 1.0], "n": 10}
    assert check(parse_line("accuracy>=0.9"), entry(accuracy=perfect), ()).status == "undecided"
    assert wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)  # Brown, Cai and DasGupta 2001, table
    assert wilson(0.5, 40) == pytest.approx((0.3520, 0.6480), abs=1e-4)


def test_a_percentile_needs_enough_timings_to_pass() -> None:
    line, quick = parse_line("p95<=300ms"), [100.0]
    assert [check(line, entry(), quick * n).status for n in (50, 71, 72)] == ["undecided", "undecided", "pass"]
    assert check(line, entry(), quick * 50).more == 23  # z² q / (1 - q) = 73 in all
    assert check(line, entry(), quick * 50).ci95 == (100, None)
    slow = entry(latency_ms={"total": {"p95": 400.0}, "n": 100})
    assert check(line, slow, [400.0] * 100).status == "fail"


def test_a_disturbed_clock_fails_nobody() -> None:
    slow = entry(latency_ms={"total": {"p95": 400.0}, "n": 100}, busy=0.5)
    assert check(parse_line("p95<=300ms"), slow, [400.0] * 100).why == "other work disturbed the clock"
    assert check(parse_line("p95<=900ms"), slow, [400.0] * 100).status == "pass"


def test_the_quantiles_interval_covers_it() -> None:
    drawn = np.random.default_rng(1)
    truth = np.log(20)  # the 95th percentile of the exponential distribution
    found = [quantile_interval(drawn.exponential(size=200).tolist(), 0.95) for _ in range(600)]
    covered = sum(low <= truth <= high for low, high in found) / len(found)
    assert 0.935 <= covered <= 0.995
    assert [quantile_interval([1.0] * n, 0.99)[1] for n in (367, 368)] == [inf, 1.0]
    assert quantile_interval([], 0.5) == (-inf, inf)


def test_what_is_measured_once_has_no_interval() -> None:
    found = check(parse_line("size<=400MB"), entry(), ())
    assert (found.status, found.margin, found.ci95, found.more) == ("fail", -100, None, None)


def test_what_is_not_known_says_why() -> None:
    without = entry(energy={"joules_per_answer": None, "why": "no sensor of energy can be read here"})
    assert check(parse_line("energy<=1J"), without, ()).why == "no sensor of energy can be read here"
    assert check(parse_line("gap_closed>=0.5"), entry(), ()).why == "needs --baseline teacher=… and student=…"
    assert check(parse_line("size<=1GB"), entry(failed="out of memory"), ()).why == "failed: out of memory"


def test_one_broken_line_decides() -> None:
    found = requirements("accuracy>=0.58, size<=400MB, energy<=1J", [entry()], {})
    assert found is not None
    assert found["variants"][0]["status"] == "fail"
    assert [one["status"] for one in found["variants"][0]["checks"]] == ["undecided", "fail", "unknown"]
    assert together([check(parse_line("accuracy>=0.58"), entry(), ())]) == "undecided"
    assert requirements(None, [entry()], {}) is None
