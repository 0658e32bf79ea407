from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpa_edge.collapse import collapsed, keys_of, mark_duplicates, question_key
from mpa_edge.records import Annotation


def row(number: int, sample: str, question: str, answer: str = "x", reason: str | None = None) -> Annotation:
    return Annotation(f"{number}", sample, question, answer, "", reason)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What colour is the sign?", "What is the colour of that sign", True),
        ("What colour is the sign?", "What is the sign's colour?", False),  # another order: another key
        ("What colour is the sign?", "what colour is the sign in the image?", True),
        ("What does the sign say?", "What does this sign say", True),
        ("How many cars are there?", "How many cars can be seen in the picture?", True),
        ("How many cars are there?", "How many cats are there?", False),
        ("Is it a cat?", "What is the cat?", False),
        ("Who is this?", "Where is this?", False),
        ("What is in 2010?", "What is in 2011?", False),
        ("What is it?", "What is this?", False),
    ],
)
def test_question_key(one: str, other: str, same: bool) -> None:
    assert (question_key(one) == question_key(other)) is same


def test_a_question_counts_once_per_picture() -> None:
    rows = [
        row(0, "a", "What does the sign say?"),
        row(1, "b", "What does the sign say?"),
        row(2, "a", "what does this sign say", "y"),
        row(3, "a", "How many?", reason="no_answer"),
        row(4, "a", "How many?"),
    ]
    assert [item.reason for item in mark_duplicates(rows)] == [None, None, "duplicate", "no_answer", None]
    assert [item.id for item in mark_duplicates(rows)] == ["0", "1", "2", "3", "4"]


def test_keys_are_those_of_near_duplicates() -> None:
    one = keys_of("What colour is the sign?", "Red")
    assert keys_of("What is the colour of that sign", "the red.") == one
    other = keys_of("What colour is the sign?", "blue")
    assert other[0] == one[0]
    assert other[1] != one[1]


def test_repeated_questions_are_capped_only_when_asked() -> None:
    keys = [keys_of("What time is it?", "10:10" if number % 2 else f"{number}") for number in range(200)]
    questions, pairs = (np.array(column, np.uint64) for column in zip(*keys, strict=True))

    def over(**shares: Any) -> list[int]:
        return list(collapsed(lambda: [(questions[:70], pairs[:70]), (questions[70:], pairs[70:])], **shares))

    assert sum(over()) == 0
    assert sum(over(pair_share=0.2)) == 60  # 40 of the 100 with the answer 10:10 stay
    assert over(question_share=0.25) == [0] * 50 + [1] * 150
    assert sum(over(question_share=0.01)) == 180
    assert sum(over(question_share=0.01, at_least=1)) == 198
    # One that is dropped for its question takes no room of its answer's.
    assert sum(over(question_share=0.25, pair_share=0.2)) == 150
