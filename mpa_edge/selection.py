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
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpa_edge.collapse import collapsed, keys_of
from mpa_edge.config import Select, Target
from mpa_edge.identify import RIGHT
from mpa_edge.records import Case
from mpa_edge.tasks import Task

Item = TypeVar("Item")

# What the teacher confirmed, and what is never trained on.
CONFIRMED = ("parity", "agree")
NEVER = ("error", "blind")
# Rows in memory at a time.
BLOCK = 1 << 12
# A draw's bits after the first 16.
_TAIL = np.uint64(48)


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
    `mpa_edge.collapse.collapsed`. Two bytes of each case stay in memory: there may be more than fit into it."""
    with _Keys(cases, seed) as keys:
        over = collapsed(keys.pairs, question_share=question_share, pair_share=pair_share)
        marks = bytearray(len(over))
        candidates = _Candidates(keys, np.frombuffer(over, np.bool_), np.frombuffer(marks, np.bool_))
        never, parity, agree = keys.test(*NEVER), keys.test("parity"), keys.test("agree")
        if select == "all":
            candidates.mark(lambda rows: ~never(rows))
        elif select == "disagree":
            candidates.mark(lambda rows: rows["missed"] & ~never(rows))
        else:
            sure = candidates.count(parity)
            wanted = min(round(sure * mix / (1 - mix)), candidates.count(agree))
            if select == "random":
                candidates.mark(lambda rows: ~never(rows), sure + wanted)
            else:
                candidates.mark(parity)
                candidates.mark(agree, wanted)
        return Choice(marks, over, dict(sorted(keys.verdicts.items())))


Test = Callable[[NDArray[np.void]], NDArray[np.bool_]]
_ROW = np.dtype(
    [("question", np.uint64), ("pair", np.uint64), ("draw", np.uint64), ("verdict", np.uint8), ("missed", np.bool_)]
)


class _Keys:
    """What a choice needs of each case, 26 bytes, in a temporary file; a context manager."""

    def __init__(self, cases: Iterable[Case], seed: int) -> None:
        self.verdicts: Counter[str] = Counter()
        self._codes: dict[str, int] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it is this object that is the context)
        rows = (self._row(case, seed) for case in cases)
        while batch := list(islice(rows, BLOCK)):
            self._file.write(np.array(batch, _ROW).tobytes())

    def __enter__(self) -> _Keys:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _row(self, case: Case, seed: int) -> tuple[int, int, int, int, bool]:
        self.verdicts[case.verdict] += 1
        return *keys_of(case.question, case.answer), _draw(seed, case.id), self._code(case.verdict), _missed(case)

    def _code(self, verdict: str) -> int:
        return self._codes.setdefault(verdict, len(self._codes))

    def test(self, *verdicts: str) -> Test:
        """Which rows have one of these verdicts."""
        codes = [self._code(verdict) for verdict in verdicts]
        return lambda rows: np.isin(rows["verdict"], codes)

    def blocks(self) -> Iterator[NDArray[np.void]]:
        """The rows in order, some at a time."""
        self._file.seek(0)
        while data := self._file.read(BLOCK * _ROW.itemsize):
            yield np.frombuffer(data, _ROW)

    def pairs(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        """The keys of questions, and of questions with answers, likewise."""
        return ((rows["question"], rows["pair"]) for rows in self.blocks())


class _Candidates:
    """The cases that are not collapsed, of which some are marked."""

    def __init__(self, keys: _Keys, over: NDArray[np.bool_], marks: NDArray[np.bool_]) -> None:
        self._keys, self._over, self._marks = keys, over, marks

    def count(self, test: Test) -> int:
        """How many pass a test."""
        return sum(int(passed.sum()) for _, _, passed in self._passed(test))

    def mark(self, test: Test, count: int | None = None) -> None:
        """Mark those that pass a test, or of them so many whose draws are lowest; of equal draws the first."""
        last, equal = (None, 0) if count is None else self._lowest(test, count)
        for start, rows, passed in self._passed(test):
            chosen = passed
            if last is not None:
                ties = np.flatnonzero(passed & (rows["draw"] == last))[:equal]
                chosen = passed & (rows["draw"] < last)
                chosen[ties] = True
                equal -= len(ties)
            self._marks[start : start + len(rows)] |= chosen

    def _lowest(self, test: Test, count: int) -> tuple[np.uint64, int]:
        """The draw of the last of `count` rows in the order of their draws, and how many of them have that very draw.
        The draws are hashes: those that share their first 16 bits with it are few."""
        if count == 0:
            return np.uint64(0), 0
        heads = np.zeros(1 << 16, np.int64)
        for _, rows, passed in self._passed(test):
            heads += np.bincount((rows["draw"][passed] >> _TAIL).astype(np.int64), minlength=1 << 16)
        head = int(np.searchsorted(np.cumsum(heads), count))
        near = [rows["draw"][passed & (rows["draw"] >> _TAIL == head)] for _, rows, passed in self._passed(test)]
        rest = np.sort(np.concatenate(near))[: count - int(heads[:head].sum())]
        return rest[-1], int((rest == rest[-1]).sum())

    def _passed(self, test: Test) -> Iterator[tuple[int, NDArray[np.void], NDArray[np.bool_]]]:
        start = 0
        for rows in self._keys.blocks():
            yield start, rows, test(rows) & ~self._over[start : start + len(rows)]
            start += len(rows)


def _missed(case: Case) -> bool:
    return case.student_score < RIGHT


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
        "images": [(_relative(picture.parent, folder) / picture.name).as_posix()],
    }


@lru_cache(maxsize=64)
def _relative(folder: Path, to: Path) -> Path:
    """Pictures of one folder mostly come together."""
    return Path(os.path.relpath(folder, to))


def _draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
