"""From cases to the training set: the parity set with a share of agreement, or one of the controls.

parity     what the teacher confirms and the student misses, and of what both get right enough to make up the share
random     as many as that, drawn from all
all        every usable annotation
disagree   what the student misses, confirmed or not

None of them takes a case without an answer, one that the teacher answers blind, or a question that comes too often.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpa_edge.collapse import collapsed, keys_of
from mpa_edge.config import Select, Target
from mpa_edge.identify import RIGHT
from mpa_edge.records import Case
from mpa_edge.tasks import Task

Item = TypeVar("Item")

# What the teacher confirmed, and what is never trained on.
CONFIRMED = ("parity", "agree")
NEVER = ("error", "blind")


@dataclass(frozen=True)
class Choice:
    """What became of each case, by its place, and how many have each verdict."""

    chosen: bytearray
    collapsed: bytearray
    verdicts: dict[str, int]


def choose(
    cases: Iterable[Case],
    select: Select,
    *,
    mix: float,
    seed: int,
    question_share: float | None = None,
    pair_share: float | None = None,
) -> Choice:
    """Which cases to train on. `mix` is the wanted share of `agree` cases among them; the shares are those of
    `mpa_edge.collapse.collapsed`. Of each case some thirty bytes are kept: there may be more than fit into memory."""
    verdicts: list[str] = []
    missed, draws, questions, pairs = bytearray(), array("Q"), array("Q"), array("Q")
    for case in cases:
        question, pair = keys_of(case.question, case.answer)
        verdicts.append(sys.intern(case.verdict))
        missed.append(case.student_score < RIGHT)
        draws.append(_draw(seed, case.id))
        questions.append(question)
        pairs.append(pair)
    over = collapsed(questions, pairs, question_share=question_share, pair_share=pair_share)
    usable = [place for place, verdict in enumerate(verdicts) if verdict not in NEVER and not over[place]]
    if select == "all":
        chosen = usable
    elif select == "disagree":
        chosen = [place for place in usable if missed[place]]
    else:
        parity, agree = ([place for place in usable if verdicts[place] == name] for name in CONFIRMED)
        wanted = round(len(parity) * mix / (1 - mix))
        chosen = [*parity, *heapq.nsmallest(wanted, agree, key=draws.__getitem__)]
        if select == "random":
            chosen = heapq.nsmallest(len(chosen), usable, key=draws.__getitem__)
    marks = bytearray(len(verdicts))
    for place in chosen:
        marks[place] = 1
    return Choice(marks, over, dict(sorted(Counter(verdicts).items())))


def drawn(items: Sequence[Item], count: int, seed: int, *, key: Callable[[Item], str]) -> list[Item]:
    """`count` items drawn without replacement: those whose hash with the seed is lowest, whatever their order."""
    return heapq.nsmallest(count, items, key=lambda item: _draw(seed, key(item)))


def target_of(case: Case, task: Task, target: Target) -> str:
    """The text to learn. `short` is the teacher's confirmed answer to the very prompt that the student gets; where
    there is none, or the paper's rule found the pseudo-answer in more words than the task's answers have, it is what
    the teacher wrote with the question, as `written` always is."""
    short = case.verdict in CONFIRMED and 0 < len(case.teacher_answer.split()) <= task.max_answer_words
    return case.teacher_answer if target == "short" and short else case.answer


def training_row(case: Case, picture: Path, task: Task, folder: Path, target: Target = "short") -> dict[str, Any]:
    """One row of the training set: chat `messages` and `images`, as trainers read them. The picture's path is relative
    to `folder`, in which the training set lies."""
    text = target_of(case, task, target)
    return {
        "id": case.id,
        "sample_id": case.sample_id,
        "verdict": case.verdict,
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.prompt(case.question)}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ],
        "images": [Path(os.path.relpath(picture, folder)).as_posix()],
    }


def _draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
