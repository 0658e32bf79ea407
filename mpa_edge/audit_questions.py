"""The favourites of a teacher: the questions, and the questions with their answers, that come most often in a run."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpa_edge.collapse import keys_of
from mpa_edge.records import Case

MOST = 10
ANSWERS = 3

Keys = NDArray[np.uint64]


class Favourites:
    """Counts questions by what is left of them without fillers, as the cap on favourites does (`mpa_edge.collapse`).

    The rows are read twice: `add` keeps 17 bytes of each, `table` finds the words for the few that are shown.
    """

    def __init__(self) -> None:
        self._questions, self._pairs, self._over = array("Q"), array("Q"), bytearray()

    def add(self, case: Case, collapsed: bool) -> None:
        """Count a question; `collapsed` says whether the cap dropped it."""
        question, pair = keys_of(case.question, case.answer)
        self._questions.append(question)
        self._pairs.append(pair)
        self._over.append(collapsed)

    def table(self, cases: Iterable[Case]) -> dict[str, Any]:
        """What comes more than once, the commonest first, given the same rows in the same order once more.

        `total`, `different` and `dropped` count questions; each row of `questions` and `pairs` has its `question`,
        `count`, `share` in percent and `dropped`, and its commonest `answers` or its `answer`.
        """
        questions = np.frombuffer(self._questions, np.uint64)
        pairs = np.frombuffer(self._pairs, np.uint64)
        over = np.frombuffer(self._over, np.uint8)
        often = [item for item in _commonest(questions, MOST) if item[1] > 1]
        answers = {key: _commonest(pairs[questions == key], ANSWERS) for key, _ in often}
        twice = [item for item in _commonest(pairs, MOST) if item[1] > 1]
        words = self._words(cases, {key for key, _ in often}, {*_keys(*answers.values()), *_keys(twice)})
        share = 100 / max(len(questions), 1)
        return {
            "total": len(questions),
            "different": len(np.unique(questions)),
            "dropped": int(over.sum()),
            "questions": [
                {
                    "question": words[key][0],
                    **_counts(count, share, over[questions == key]),
                    "answers": [{"answer": words[pair][1], "count": times} for pair, times in answers[key]],
                }
                for key, count in often
            ],
            "pairs": [
                {"question": words[key][0], "answer": words[key][1], **_counts(count, share, over[pairs == key])}
                for key, count in twice
            ],
        }

    def _words(self, cases: Iterable[Case], questions: set[int], pairs: set[int]) -> dict[int, tuple[str, str]]:
        """Question and answer in the commonest of the wordings that count as one."""
        wordings: dict[int, Counter[tuple[str, str]]] = defaultdict(Counter)
        for case, question, pair in zip(cases, self._questions, self._pairs, strict=True):
            if question in questions:
                wordings[question][case.question, ""] += 1
            if pair in pairs:
                wordings[pair][case.question, case.answer] += 1
        return {key: min(found, key=lambda words: (-found[words], words)) for key, found in wordings.items()}


def _commonest(keys: Keys, count: int) -> list[tuple[int, int]]:
    found, times = np.unique(keys, return_counts=True)
    order = np.lexsort((found, -times))[:count]
    return [(int(found[place]), int(times[place])) for place in order]


def _keys(*lists: list[tuple[int, int]]) -> set[int]:
    return {key for items in lists for key, _ in items}


def _counts(count: int, share: float, over: NDArray[np.uint8]) -> dict[str, Any]:
    return {"count": count, "share": count * share, "dropped": int(over.sum())}
