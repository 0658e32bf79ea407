"""Parity Identifier: ask both models the inference prompt s(Q) and compare with the pseudo-answer A.

    parity = { (I, Q, A) : ok(L(I, s(Q)), A) and not ok(S(I, s(Q)), A) }

That the teacher confirms itself is the quality filter, that the student misses it is the knowledge gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mpa_edge.answers import RULES, metric_named
from mpa_edge.asking import ask
from mpa_edge.config import Match
from mpa_edge.parts import Advance, run_parts
from mpa_edge.records import Annotation, Case
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm
from mpa_edge.tasks import Task

# An answer is right from this score on. Exact match, relaxed accuracy and containment give 0 or 1; ANLS gives 0 below
# 0.5 by its own rule; VQA accuracy gives 0 or 1 against a single pseudo-answer.
RIGHT = 0.5


def identify(
    teacher: Vlm,
    student: Vlm,
    annotations: Sequence[Annotation],
    pictures: Mapping[str, Path],
    task: Task,
    folder: Path,
    *,
    match: Match = "official",
    chunk_size: int = 256,
    advance: Advance = lambda count: None,
) -> None:
    """Write a part of `Case` rows for every chunk of usable annotations; resumes. `pictures` maps sample ids to files.

    `match` "paper" scores by the substring rule of the published code instead of the task's metric.
    """
    metric = "containment" if match == "paper" else task.metric
    fingerprint = {
        "stage": "identify",
        "teacher": teacher.describe(),
        "student": student.describe(),
        "prompt": task.question_template,
        "max_new_tokens": task.max_new_tokens,
        "metric": metric,
        "rules": RULES,
        "right": RIGHT,
    }
    run_parts(
        folder,
        annotations,
        lambda rows: identify_chunk(teacher, student, rows, pictures, task, metric),
        fingerprint,
        chunk_size=chunk_size,
        advance=advance,
    )


def identify_chunk(
    teacher: Vlm,
    student: Vlm,
    annotations: Sequence[Annotation],
    pictures: Mapping[str, Path],
    task: Task,
    metric: str,
) -> list[Case]:
    """The cases of some annotations, in order."""
    paths = [pictures[row.sample_id] for row in annotations]
    prompts = [task.prompt(row.question) for row in annotations]
    decoding = Decoding(max_new_tokens=task.max_new_tokens)
    answers = zip(ask(teacher, paths, prompts, decoding), ask(student, paths, prompts, decoding), strict=True)
    return [case_of(row, *pair, metric) for row, pair in zip(annotations, answers, strict=True)]


def case_of(annotation: Annotation, teacher: Answer, student: Answer, metric: str) -> Case:
    """Score both answers against the pseudo-answer and pass the verdict."""
    score = metric_named(metric)
    reason = _reason(teacher, student)
    scores = [
        0.0 if answer.error is not None else score(answer.text, [annotation.answer]) for answer in (teacher, student)
    ]
    return Case(
        id=annotation.id,
        sample_id=annotation.sample_id,
        question=annotation.question,
        answer=annotation.answer,
        teacher_answer=teacher.text,
        student_answer=student.text,
        teacher_score=scores[0],
        student_score=scores[1],
        verdict=verdict_of(*scores) if reason is None else "error",
        reason=reason,
    )


def verdict_of(teacher_score: float, student_score: float) -> str:
    """`unconfirmed`, `parity` or `agree`."""
    if teacher_score < RIGHT:
        return "unconfirmed"
    return "parity" if student_score < RIGHT else "agree"


def _reason(teacher: Answer, student: Answer) -> str | None:
    if teacher.error is not None:
        return f"teacher: {teacher.error}"
    return None if student.error is None else f"student: {student.error}"
