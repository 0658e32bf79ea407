"""The identifier's verdicts, and its stage on two small real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpa_edge.errors import FingerprintMismatch
from mpa_edge.identify import case_of, identify, verdict_of
from mpa_edge.models import open_vlm
from mpa_edge.parts import read_parts
from mpa_edge.records import Annotation, Case
from mpa_edge.runtime.vlm import Answer
from mpa_edge.tasks import task_named

TASK = task_named("reference")


def annotation(answer: str = "red", name: str = "000") -> Annotation:
    return Annotation(f"{name}-0.0", name, "What colour?", answer, f"What colour? {answer}")


@pytest.mark.parametrize(
    ("teacher", "student", "verdict"),
    [
        (1.0, 0.0, "parity"),
        (0.5, 0.49, "parity"),
        (1.0, 0.5, "agree"),
        (0.0, 1.0, "unconfirmed"),
        (0.49, 0.0, "unconfirmed"),
    ],
)
def test_verdicts(teacher: float, student: float, verdict: str) -> None:
    assert verdict_of(teacher, student) == verdict


def test_a_case_keeps_both_answers_and_scores() -> None:
    case = case_of(annotation("12.50"), Answer("12.50"), Answer("12"), "exact_match")
    assert (case.teacher_answer, case.student_answer) == ("12.50", "12")
    assert (case.teacher_score, case.student_score, case.verdict, case.reason) == (1.0, 0.0, "parity", None)


def test_the_papers_rule_sees_substrings() -> None:
    five, fifteen = Answer("5"), Answer("15")
    assert case_of(annotation("5"), five, fifteen, "exact_match").verdict == "parity"
    assert case_of(annotation("5"), five, fifteen, "containment").verdict == "agree"


def test_an_answer_that_failed_is_an_error_whatever_the_scores() -> None:
    failed = Answer("red", finish_reason="error", error="out of memory")
    case = case_of(annotation(), failed, Answer("red"), "exact_match")
    assert (case.verdict, case.reason, case.teacher_score) == ("error", "teacher: out of memory", 0.0)
    case = case_of(annotation(), Answer("red"), failed, "exact_match")
    assert (case.verdict, case.reason, case.student_score) == ("error", "student: out of memory", 0.0)


def test_two_real_models(tiny_pair: Any, tmp_path: Path) -> None:
    teacher, student = (open_vlm(str(path), device="cpu") for path in (tiny_pair.teacher, tiny_pair.student))
    pictures = {path.stem: path for path in sorted(tiny_pair.images.iterdir())}
    colours = ("red", "green", "blue", "yellow")
    rows = [annotation(colours[number % 4], name) for number, name in enumerate(pictures)]
    rows[5] = annotation("purple", "005")
    pictures["006"] = tmp_path / "gone.png"
    identify(teacher, student, rows, pictures, TASK, tmp_path / "a", chunk_size=7)
    cases = list(read_parts(tmp_path / "a", Case))
    assert [case.id for case in cases] == [row.id for row in rows]
    verdicts = [case.verdict for case in cases]
    assert verdicts[5] == "unconfirmed"
    assert (verdicts[6], cases[6].reason) == ("error", "teacher: unreadable")
    assert verdicts.count("parity") >= 18
    # The teacher asked in the student's place agrees with itself.
    identify(teacher, teacher, rows[:5], pictures, TASK, tmp_path / "b")
    assert {case.verdict for case in read_parts(tmp_path / "b", Case)} == {"agree"}
    with pytest.raises(FingerprintMismatch, match="metric: was 'exact_match', is 'containment'"):
        identify(teacher, student, rows, pictures, TASK, tmp_path / "a", chunk_size=7, match="paper")
