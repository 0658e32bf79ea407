"""From cases to the training set: the parity set with a share of agreement, or one of the controls.

parity     what the teacher confirms and the student misses, and of what both get right enough to make up the share
random     as many as that, drawn from all
all        every usable annotation
disagree   what the student misses, confirmed or not
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mpa_edge.config import Select
from mpa_edge.identify import RIGHT
from mpa_edge.records import Case
from mpa_edge.tasks import Task

Item = TypeVar("Item")


def select_cases(cases: Sequence[Case], select: Select, *, mix: float, seed: int) -> list[Case]:
    """The cases to train on, in their order. `mix` is the wanted share of `agree` cases among the result."""
    answered = [case for case in cases if case.verdict != "error"]
    if select == "all":
        return answered
    if select == "disagree":
        return [case for case in answered if case.student_score < RIGHT]
    parity = [case for case in answered if case.verdict == "parity"]
    agree = [case for case in answered if case.verdict == "agree"]
    wanted = round(len(parity) * mix / (1 - mix))
    chosen = [*parity, *drawn(agree, wanted, seed, key=_id)]
    if select == "random":
        chosen = drawn(answered, len(chosen), seed, key=_id)
    kept = {case.id for case in chosen}
    return [case for case in answered if case.id in kept]


def drawn(items: Sequence[Item], count: int, seed: int, *, key: Callable[[Item], str]) -> list[Item]:
    """`count` items drawn without replacement: those whose hash with the seed is lowest, whatever their order."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed} {key(item)}".encode()).digest())[:count]


def training_row(case: Case, picture: Path, task: Task, folder: Path) -> dict[str, Any]:
    """One row of the training set: chat `messages` and `images`, as trainers read them. The picture's path is relative
    to `folder`, in which the training set lies."""
    return {
        "id": case.id,
        "sample_id": case.sample_id,
        "verdict": case.verdict,
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.prompt(case.question)}]},
            {"role": "assistant", "content": [{"type": "text", "text": case.answer}]},
        ],
        "images": [Path(os.path.relpath(picture, folder)).as_posix()],
    }


def _id(case: Case) -> str:
    return case.id
