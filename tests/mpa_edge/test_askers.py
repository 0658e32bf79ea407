"""Askers: what is recorded of a part about which nobody lives to tell."""

from __future__ import annotations

from pathlib import Path

from mpa_edge.askers import Asks, Here, annotator_of, identifier_of, reidentifier_of
from mpa_edge.config import AlignConfig
from mpa_edge.fake import FakeVlm
from mpa_edge.identify import case_of
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import Answer

CONFIG = AlignConfig(images="p", teacher="t", student="s", task="reference", questions=2, votes=3, blind=True)
SAMPLES = [Sample(f"s{number}", f"/nowhere/{number}.png", "0" * 64) for number in range(20)]


def test_unanswered_parts_hold_failed_rows_for_every_picture_and_question() -> None:
    teacher, student = FakeVlm(), FakeVlm()
    asks = Asks(annotator_of(CONFIG, teacher), identifier_of(CONFIG, teacher, student)).unanswered("all died")
    rows = asks.annotations(SAMPLES, [])
    assert [row.sample_id for row in rows] == [sample.id for sample in SAMPLES for _ in range(2)]
    assert {(row.reason, row.raw, row.failed) for row in rows} == {("teacher_error", "all died", True)}
    known = [Annotation("s3-0.0", "s3", "What?", "red", "")]
    assert [row for row in asks.annotations(SAMPLES, known) if not row.failed] == known

    cases = asks.cases(known, {"s3": Path("/nowhere/3.png")}, [])
    assert [(case.verdict, case.reason) for case in cases] == [("error", "teacher: all died")]
    first = [case_of(known[0], [Answer("red")], Answer("blue"), "vqa_accuracy")]
    again = Asks(None, reidentifier_of(CONFIG, student)).unanswered("all died")
    assert [case.reason for case in again.cases(first, {"s3": Path("/nowhere/3.png")}, [])] == ["student: all died"]


def test_the_local_engine_asks_part_by_part_in_order() -> None:
    asks = Asks(None, reidentifier_of(CONFIG, FakeVlm()))
    seen = []
    parts = [(0, SAMPLES[:10]), (1, SAMPLES[10:])]
    done = Here().each(asks, parts, lambda asker, part: seen.append((asker, part[0])))
    assert next(iter(done)) == parts[0]
    assert seen == [(asks, 0)]
