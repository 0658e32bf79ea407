"""What the audit counts of a round."""

from __future__ import annotations

from dataclasses import replace

from mpa_edge.audit_counts import MOST_ERRORS, Round, histograms
from tiny_runs import case


def test_histograms() -> None:
    found = Round()
    for number in range(11):
        found.add(replace(case(number, "agree"), teacher_score=number / 10), False)
    teacher, student = histograms(found)
    assert [bar["count"] for bar in teacher["bars"]] == [1] * 9 + [2]
    assert [bar["name"] for bar in teacher["bars"] if bar["right"]] == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    assert [(bar["name"], bar["count"]) for bar in student["bars"]] == [("wrong", 0), ("right", 11)]
    voted = Round()
    for number in (0, 1, 2, 3, 3):
        voted.add(replace(case(1), votes=("a", "b", "c"), teacher_score=number / 3), False)
    votes, _ = histograms(voted)
    assert votes["title"].startswith("teacher’s votes")
    assert [(bar["count"], bar["right"]) for bar in votes["bars"]] == [(1, False), (1, False), (1, True), (2, True)]
    assert histograms(Round()) == []


def test_errors_without_end_are_not_all_counted_apart() -> None:
    found = Round()
    for number in range(2 * MOST_ERRORS):
        found.add(replace(case(number, "error"), reason=f"HTTP 500: request {number} failed"), False)
    assert (len(found.errors), found.errors["others"]) == (MOST_ERRORS + 1, MOST_ERRORS)
