"""The favourites of a teacher: the questions, and the questions with their answers, that come most often in a run."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from mpa_edge.collapse import keys_of
from mpa_edge.records import Case

MOST = 10
ANSWERS = 3
# Rows that are put into the database at once.
BATCH = 1024
# SQLite's integers have a sign.
_HALF = 1 << 63


class Favourites:
    """Counts questions by what is left of them without fillers, as the cap on favourites does (`mpa_edge.collapse`).

    The rows are read twice: `add` keeps their keys in a temporary database on disk, so that memory does not grow with
    them, `table` finds the words for the few that are shown, and understands the lines of no others.
    """

    def __init__(self) -> None:
        # SQLite's own name for a database that lies in a temporary file is the empty one.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            """PRAGMA temp_store = FILE; PRAGMA journal_mode = OFF;
               CREATE TABLE asked (question INTEGER, pair INTEGER, collapsed INTEGER); BEGIN"""
        )
        self._new: list[tuple[int, int, bool]] = []

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def add(self, case: Case, collapsed: bool) -> None:
        """Count a question; `collapsed` says whether the cap dropped it."""
        question, pair = keys_of(case.question, case.answer)
        self._new.append((question - _HALF, pair - _HALF, collapsed))
        if len(self._new) == BATCH:
            self._insert()

    def _insert(self) -> None:
        self._database.executemany("INSERT INTO asked VALUES (?, ?, ?)", self._new)
        self._new.clear()

    def table(self, lines: Iterable[bytes]) -> dict[str, Any]:
        """What comes more than once, the commonest first, given the same rows in the same order once more, as JSON.

        `total`, `different` and `dropped` count questions; each row of `questions` and `pairs` has its `question`,
        `count`, `share` in percent and `dropped`, and its commonest `answers` or its `answer`.
        """
        self._insert()
        total, dropped = self._rows("SELECT count(*), coalesce(sum(collapsed), 0) FROM asked")[0]
        ((different,),) = self._rows("SELECT count(*) FROM (SELECT 1 FROM asked GROUP BY question)")
        often, twice = self._commonest("question"), self._commonest("pair")
        answers = {key: self._answers(key) for key, *_ in often}
        pairs = {pair for rows in (twice, *answers.values()) for pair, *_ in rows}
        words = self._words(lines, {key for key, *_ in often}, pairs)
        share = 100 / max(total, 1)
        return {
            "total": total,
            "different": different,
            "dropped": dropped,
            "questions": [
                {
                    "question": words[key][0],
                    **_counts(count, share, over),
                    "answers": [{"answer": words[pair][1], "count": times} for pair, times in answers[key]],
                }
                for key, count, over in often
            ],
            "pairs": [
                {"question": words[key][0], "answer": words[key][1], **_counts(count, share, over)}
                for key, count, over in twice
            ],
        }

    def _commonest(self, column: str) -> list[Any]:
        """Key, count, and how many of them were dropped."""
        return self._rows(
            f"""SELECT {column}, count(*), sum(collapsed) FROM asked GROUP BY 1 HAVING count(*) > 1
                ORDER BY 2 DESC, 1 LIMIT {MOST}"""
        )

    def _answers(self, question: int) -> list[Any]:
        """The commonest pairs of a question with their counts."""
        query = f"SELECT pair, count(*) FROM asked WHERE question = ? GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {ANSWERS}"
        return self._rows(query, question)

    def _rows(self, query: str, *values: int) -> list[Any]:
        return self._database.execute(query, values).fetchall()

    def _words(self, lines: Iterable[bytes], questions: set[int], pairs: set[int]) -> dict[int, tuple[str, str]]:
        """Question and answer in the commonest of the wordings that count as one."""
        wordings: dict[int, Counter[tuple[str, str]]] = defaultdict(Counter)
        keys = self._database.execute("SELECT question, pair FROM asked ORDER BY rowid")
        for line, (question, pair) in zip(lines, keys, strict=True):
            if question not in questions and pair not in pairs:
                continue
            case = Case.from_json(json.loads(line))
            if question in questions:
                wordings[question][case.question, ""] += 1
            if pair in pairs:
                wordings[pair][case.question, case.answer] += 1
        return {key: min(found, key=lambda words: (-found[words], words)) for key, found in wordings.items()}


def _counts(count: int, share: float, dropped: int) -> dict[str, Any]:
    return {"count": count, "share": count * share, "dropped": dropped}
