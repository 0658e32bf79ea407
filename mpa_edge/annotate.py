"""Pseudo Annotator: the teacher writes questions with answers about unlabeled pictures, (Q, A) = L(I, p_T)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpa_edge.asking import ask
from mpa_edge.collapse import collapse
from mpa_edge.parts import Advance, run_parts
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm
from mpa_edge.tasks import Task
from mpa_edge.teacher_text import judge, parse

# Raise it when parser or rejection rules change: rows of the old rules must not be mixed with new ones.
RULES = 1
# A question is longer than an answer: what the teacher may write beyond an answer's tokens. The paper has 128 in all.
QUESTION_TOKENS = 116


def annotate(
    teacher: Vlm,
    samples: Sequence[Sample],
    task: Task,
    folder: Path,
    *,
    questions: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    chunk_size: int = 256,
    advance: Advance = lambda count: None,
) -> None:
    """Write a part of `Annotation` rows for every chunk of samples; resumes.

    The teacher is asked `questions` times about each picture, with the next of the task's prompts and another seed each
    time: with one prompt and at temperature 0 it would write the same again. Rejected texts are rows too, with the
    reason.
    """
    decodings = [
        Decoding(max_new_tokens=QUESTION_TOKENS + task.max_new_tokens, temperature=temperature, seed=seed + number)
        for number in range(questions)
    ]
    fingerprint = {
        "stage": "annotate",
        "rules": RULES,
        "teacher": teacher.describe(),
        "prompts": task.annotate_prompts,
        "max_answer_words": task.max_answer_words,
        "decodings": [asdict(decoding) for decoding in decodings],
    }
    run_parts(
        folder,
        samples,
        lambda rows: annotate_chunk(teacher, rows, task, decodings),
        fingerprint,
        chunk_size=chunk_size,
        advance=advance,
    )


def annotate_chunk(
    teacher: Vlm, samples: Sequence[Sample], task: Task, decodings: Sequence[Decoding]
) -> list[Annotation]:
    """The annotations of some pictures, picture by picture."""
    paths = [Path(sample.path) for sample in samples]
    rounds = [
        ask(teacher, paths, [task.prompt_about(sample.id, number) for sample in samples], decoding)
        for number, decoding in enumerate(decodings)
    ]
    rows = []
    for sample, *texts in zip(samples, *rounds, strict=True):
        rows += annotations_of(sample, texts, task)
    return rows


def annotations_of(sample: Sample, texts: Sequence[Answer], task: Task) -> list[Annotation]:
    """The rows of one picture: each pair that the teacher's texts hold, repeated questions rejected. Where the teacher
    failed, the raw text is why."""
    return collapse(
        Annotation(f"{sample.id}-{number}.{place}", sample.id, question, answer, text.error or text.text, reason)
        for number, text in enumerate(texts)
        for place, (question, answer, reason) in enumerate(_pairs(text, task))
    )


def _pairs(text: Answer, task: Task) -> list[tuple[str, str, str | None]]:
    if text.error is not None:
        return [("", "", "teacher_error")]
    if text.finish_reason == "length":
        return [("", "", "unfinished")]
    pairs = [(question, answer, judge(question, answer, task)) for question, answer in parse(text.text)]
    return pairs or [("", "", "no_question")]
