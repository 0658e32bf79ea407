"""What stands beside accuracy: the teacher's answers, the gap, McNemar's test, the sample, both parts of ChartQA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from mpa_edge.answers import metric_named
from mpa_edge.benchmarks.bench import questions_of
from mpa_edge.benchmarks.jobs import ANSWERS, LATENCY, MEASURED, Job, Row, whole_rows
from mpa_edge.benchmarks.measure import Measured, is_complete
from mpa_edge.benchmarks.sample import Item, items_of
from mpa_edge.benchmarks.score import Scored, beside_both_ends, by, score
from mpa_edge.benchmarks.variants import Variant
from mpa_edge.benchmarks.verdict import cost_of_sample
from mpa_edge.benchmarks.worker import collect_answers
from mpa_edge.fake import FakeVlm
from mpa_edge.labelled import Question, read_questions
from mpa_edge.runtime.vlm import Answer, Decoding
from mpa_edge.stats import mcnemar, ratio_interval


def answer_row(key: str, text: str, error: str | None = None) -> Row:
    return Row(key, text, 1, 1, "error" if error else "stop", error, {})


@pytest.fixture(scope="module")
def items(labelled: Path) -> list[Item]:
    return items_of(read_questions(labelled), lambda question: question)


def scored_with(items: list[Item], **answers: list[str | None]) -> list[Scored]:
    """Variants with these answers; None is one that did not come."""
    measured = {
        name: Measured(
            {
                item.ask.key: answer_row(item.ask.key, text or "", None if text is not None else "timed out")
                for item, text in zip(items, texts, strict=True)
            },
            [],
        )
        for name, texts in answers.items()
    }
    metric = metric_named("exact_match")
    steps: dict[str, Any] = {"teacher": "teacher", "student": "student"}
    found = [
        score(Variant(name, "", steps.get(name, "full"), "fake"), measured[name], items, metric, "exact_match", None, 0)
        for name in answers
    ]
    beside_both_ends(found, measured, items, 0)
    return found


def test_agreement_counts_the_same_answer_right_or_wrong(items: list[Item]) -> None:
    right = [item.question.answers[0] for item in items]
    teacher = [*right[:30], *["nonsense"] * 30]
    bundle: list[str | None] = [text.upper() + "." for text in teacher]
    bundle[0] = bundle[40] = None
    found = scored_with(items, teacher=teacher, student=["other"] * 60, q8=bundle)
    assert [one.entry["agreement"] and one.entry["agreement"]["value"] for one in found] == [
        None, 0.0, pytest.approx(58 / 60, abs=1e-5),
    ]  # fmt: skip


def test_what_the_teacher_did_not_answer_is_no_disagreement(items: list[Item]) -> None:
    found = scored_with(items, teacher=[None, *["x"] * 59], q8=["x"] * 60)
    assert found[1].entry["agreement"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 59}


def test_the_gap_has_an_interval_where_there_is_a_gap(items: list[Item]) -> None:
    right: list[str | None] = [item.question.answers[0] for item in items]
    wrong: list[str | None] = ["wrong"] * 60
    found = scored_with(items, teacher=right, student=wrong, q8=right[:30] + wrong[30:])
    low, high = found[2].entry["gap_ci95"]
    assert low < found[2].entry["gap_closed"] == 0.5 < high
    none = scored_with(items, teacher=right[:3] + wrong[3:], student=wrong[:57] + right[57:], q8=right)
    assert none[2].entry["gap_ci95"] is None


def test_the_ratios_interval_covers_it() -> None:
    drawn, covered = np.random.default_rng(0), 0
    for trial in range(200):
        teacher, student, x = (drawn.random(300) < share for share in (0.9, 0.5, 0.7))
        found = ratio_interval(
            (x.astype(float) - student).tolist(), (teacher.astype(float) - student).tolist(), seed=trial, resamples=500
        )
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99
    assert ratio_interval([], []) is None
    with pytest.raises(ValueError, match="one length"):
        ratio_interval([1], [1, 2])


def test_mcnemar_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    drawn = np.random.default_rng(0)
    for n in (1, 5, 40, 700):
        a, b = (drawn.random(n) < 0.6).astype(float), (drawn.random(n) < 0.7).astype(float)
        only_a, differ = int(((a == 1) & (b == 0)).sum()), int((a != b).sum())
        expected = stats.binomtest(only_a, differ, 0.5).pvalue if differ else 1.0
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_containment_stands_beside_the_metric(items: list[Item]) -> None:
    wordy = [f"it is {item.question.answers[0]}" for item in items]
    (found,) = scored_with(items, q8=wordy)
    assert (found.entry["accuracy"]["value"], found.entry["containment"]) == (0, 1)


def test_a_sample_says_what_it_costs() -> None:
    entry = {"name": "q8", "accuracy": {"ci95": [0.55, 0.65]}}
    said = cost_of_sample(entry, {"n": 100, "of": 400})
    assert said is not None
    assert said.startswith("A stratified sample of 100 of 400 questions: q8")
    assert "known to about ±5.0 points; all of them would make that ±2.5." in said
    assert cost_of_sample(entry, {"n": 400, "of": 400}) is None


def test_both_parts_of_chartqa_are_one_set_with_two_kinds(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for part, label in (("human", "5"), ("augmented", "7")):
        rows = [{"imgname": "1.png", "query": f"{part} {number}?", "label": label} for number in range(2)]
        (tmp_path / f"test_{part}.json").write_text(json.dumps(rows))
    questions = questions_of([tmp_path / "test_human.json", tmp_path / "test_augmented.json"], tmp_path)
    assert [question.id for question in questions] == [
        "test_human/0", "test_human/1", "test_augmented/0", "test_augmented/1",
    ]  # fmt: skip
    found = by(lambda item: item.question.kind, items_of(questions, str), [1, 1, 0, 1], 0)
    assert {kind: one["value"] for kind, one in found.items()} == {"human": 1, "augmented": 0.5}


class Flaky(FakeVlm):
    """Times out on the first call of each question."""

    seen: ClassVar[set[str]] = set()

    def _answer(self, image: Image.Image, prompt: str, decoding: Decoding) -> Answer:
        key = f"{image.tobytes()!r} {prompt}"
        if key in self.seen:
            return Answer("late", (1,))
        self.seen.add(key)
        return Answer("", finish_reason="error", error="timed out")


def test_an_answer_that_did_not_come_is_asked_for_again(items: list[Item], tmp_path: Path) -> None:
    wanted = [item.ask for item in items[:4]]
    job = Job("x", "fake:", 1, 8, 2, [], [], [ask.to_json() for ask in wanted])
    (tmp_path / MEASURED).write_text('{"done": true}')
    (tmp_path / LATENCY).write_text("")
    for reason, complete in (("error", False), ("stop", True)):
        collect_answers([Flaky()], wanted, Decoding(), 2, tmp_path / ANSWERS, lambda *_: None)
        rows = whole_rows(tmp_path / ANSWERS)
        assert [row.key for row in rows] == [ask.key for ask in wanted]
        assert {row.finish_reason for row in rows} == {reason}
        assert is_complete(tmp_path, job) is complete


def test_questions_keep_their_ids_where_there_is_one_file(labelled: Path, tmp_path: Path) -> None:
    (question, *_) = questions_of([labelled], tmp_path)
    assert isinstance(question, Question)
    assert question.id == "0-top"
