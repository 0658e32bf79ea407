"""Parity Identifier: ask both models the inference prompt s(Q) and compare with the pseudo-answer A.

    parity = { (I, Q, A) : ok(L(I, s(Q)), A) and not ok(S(I, s(Q)), A) }

That the teacher confirms itself is the quality filter, that the student misses it is the knowledge gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpa_edge.answers import RULES, metric_named
from mpa_edge.asking import ask, refuse_small_budget
from mpa_edge.config import Match
from mpa_edge.records import Annotation, Case
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm
from mpa_edge.tasks import Task

# An answer is right from this score on. Exact match, relaxed accuracy and containment give 0 or 1; ANLS gives 0 below
# 0.5 by its own rule; VQA accuracy gives 0 or 1 against a single pseudo-answer.
RIGHT = 0.5
# Of all votes but the first, which is greedy; the self-consistency paper's for large models (arXiv 2203.11171).
VOTE_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Identifier:
    """A teacher that is asked `votes` times and a student that is asked once, both with the inference prompt.

    `match` "paper" scores by the substring rule of the published code instead of the task's metric. With `blind` the
    teacher also gets each question with a grey picture: what it answers then, no picture is needed for.
    """

    teacher: Vlm
    student: Vlm
    task: Task
    match: Match = "official"
    votes: int = 1
    blind: bool = False
    seed: int = 0
    ask: Callable[..., list[Answer]] = ask

    @property
    def metric(self) -> str:
        """The name of the metric that says what is right."""
        return metric_of(self.task, self.match)

    def fingerprint(self) -> dict[str, Any]:
        """What shapes the cases besides the annotations, as JSON."""
        several = {"temperature": VOTE_TEMPERATURE, "seed": self.seed} if self.votes > 1 else {}
        return {
            "stage": "identify",
            "teacher": self.teacher.describe(),
            "student": self.student.describe(),
            **_rule(self.task, self.metric),
            "votes": {"count": self.votes, **several},
            "blind": self.blind,
        }

    def cases(
        self, annotations: Sequence[Annotation], pictures: Mapping[str, Path], known: Sequence[Case] = ()
    ) -> list[Case]:
        """The cases of usable annotations, in order; `pictures` maps sample ids to files. `known` are cases of an
        earlier attempt: those that did not fail are not asked again. `InputError`, before anything is asked, when it
        would take more than the teacher's `--max-requests`."""
        found = {_pair(case): case for case in known if not case.failed}
        new = [row for row in annotations if _pair(row) not in found]
        refuse_small_budget(self.teacher, len(new) * (self.votes + self.blind), f"a part of {len(new)} questions")
        paths, prompts = [pictures[row.sample_id] for row in new], [self.task.prompt(row.question) for row in new]
        again = bool(known)
        votes = [self.ask(self.teacher, paths, prompts, decoding, again=again) for decoding in self._decodings()]
        student = self.ask(self.student, paths, prompts, _greedy(self.task), again=again)
        grey: list[Answer | None] = [None] * len(new)
        if self.blind:
            grey = [*self.ask(self.teacher, paths, prompts, _greedy(self.task), blind=True, again=again)]
        for row, answer, blind, *answers in zip(new, student, grey, *votes, strict=True):
            found[_pair(row)] = case_of(row, answers, answer, self.metric, blind)
        return [found[_pair(row)] for row in annotations]

    def _decodings(self) -> list[Decoding]:
        longest = self.task.max_new_tokens
        sampled = [Decoding(longest, VOTE_TEMPERATURE, seed=self.seed + number) for number in range(1, self.votes)]
        return [_greedy(self.task), *sampled]


@dataclass(frozen=True)
class Reidentifier:
    """A student that is asked what was asked before, once more: the cases of the first round with its new answers. The
    teacher's stand, whatever the student has become."""

    student: Vlm
    task: Task
    match: Match = "official"
    ask: Callable[..., list[Answer]] = ask

    def fingerprint(self) -> dict[str, Any]:
        """What shapes the cases besides those of the first round, as JSON."""
        rule = _rule(self.task, metric_of(self.task, self.match))
        return {"stage": "identify again", "student": self.student.describe(), **rule}

    def cases(self, first: Sequence[Case], pictures: Mapping[str, Path], known: Sequence[Case] = ()) -> list[Case]:
        """The cases of the first round's, in order; where the teacher failed or needs no picture, they stay."""
        found = {_pair(case): case for case in known if not case.failed}
        new = [case for case in first if _pair(case) not in found and _can_change(case)]
        paths, prompts = [pictures[case.sample_id] for case in new], [self.task.prompt(case.question) for case in new]
        answers = self.ask(self.student, paths, prompts, _greedy(self.task), again=bool(known))
        metric = metric_of(self.task, self.match)
        for case, answer in zip(new, answers, strict=True):
            found[_pair(case)] = _with_answer(case, answer, metric)
        return [found.get(_pair(case), case) for case in first]


def case_of(
    annotation: Annotation, teacher: Sequence[Answer], student: Answer, metric: str, blind: Answer | None = None
) -> Case:
    """Score the answers (the teacher's first one is the greedy one) against the pseudo-answer and pass the verdict."""
    scores = [_score(metric, answer, annotation.answer) for answer in teacher]
    right = [score >= RIGHT for score in scores]
    teacher_score = sum(right) / len(right) if len(right) > 1 else scores[0]
    student_score = _score(metric, student, annotation.answer)
    reason = _reason([*teacher, *([blind] if blind else [])], student)
    if reason is not None:
        verdict = "error"
    elif blind and _score(metric, blind, annotation.answer) >= RIGHT:
        verdict = "blind"
    else:
        verdict = verdict_of(teacher_score, student_score, votes=len(teacher))
    return Case(
        id=annotation.id,
        sample_id=annotation.sample_id,
        question=annotation.question,
        answer=annotation.answer,
        teacher_answer=teacher[right.index(True) if any(right) else 0].text,
        student_answer=student.text,
        teacher_score=teacher_score,
        student_score=student_score,
        verdict=verdict,
        reason=reason,
        votes=tuple(answer.text for answer in teacher) if len(teacher) > 1 else (),
        blind_answer=blind.text if blind else None,
    )


def verdict_of(teacher_score: float, student_score: float, votes: int = 1) -> str:
    """`unconfirmed`, `parity` or `agree`. Of several votes more than half must confirm."""
    if teacher_score < RIGHT or (votes > 1 and teacher_score <= 0.5):
        return "unconfirmed"
    return "parity" if student_score < RIGHT else "agree"


def metric_of(task: Task, match: Match) -> str:
    """The metric that says what is right."""
    return "containment" if match == "paper" else task.metric


def _with_answer(case: Case, answer: Answer, metric: str) -> Case:
    score, reason = _score(metric, answer, case.answer), _reason([], answer)
    if reason:
        verdict = "error"
    elif case.blind_answer is not None and metric_named(metric)(case.blind_answer, [case.answer]) >= RIGHT:
        verdict = "blind"  # where the student had failed before
    else:
        verdict = verdict_of(case.teacher_score, score, votes=max(1, len(case.votes)))
    return replace(case, student_answer=answer.text, student_score=score, verdict=verdict, reason=reason)


def _can_change(case: Case) -> bool:
    return case.verdict != "blind" and not (case.reason or "").startswith("teacher")


def _rule(task: Task, metric: str) -> dict[str, Any]:
    return {
        "prompt": task.question_template,
        "max_new_tokens": task.max_new_tokens,
        "metric": metric,
        "rules": RULES,
        "right": RIGHT,
    }


def _greedy(task: Task) -> Decoding:
    return Decoding(max_new_tokens=task.max_new_tokens)


def _pair(row: Annotation | Case) -> tuple[str, str, str]:
    """What a case is about; an annotation that was asked for again may have its old id."""
    return row.id, row.question, row.answer


def _score(metric: str, answer: Answer, wanted: str) -> float:
    return 0.0 if answer.error is not None else metric_named(metric)(answer.text, [wanted])


def _reason(teacher: Sequence[Answer], student: Answer) -> str | None:
    for answer in teacher:
        if answer.error is not None:
            return f"teacher: {answer.error}"
    return None if student.error is None else f"student: {student.error}"
