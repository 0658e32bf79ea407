from __future__ import annotations

from collections import Counter

import pytest

from mpa_edge.collapse import collapse, question_key
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
    assert [item.reason for item in collapse(rows)] == [None, None, "duplicate", "no_answer", None]
    assert [item.id for item in collapse(rows)] == ["0", "1", "2", "3", "4"]


def test_repeated_questions_are_capped_only_when_asked() -> None:
    rows = [
        row(number, f"{number}", "What time is it?", "10:10" if number % 2 else f"{number}") for number in range(200)
    ]
    assert all(item.reason is None for item in collapse(rows))
    by_pair = Counter(item.reason for item in collapse(rows, max_pair_share=0.2))
    assert by_pair == {None: 140, "collapsed": 60}  # 40 of the 100 with the answer 10:10 stay
    by_question = collapse(rows, max_question_share=0.25)
    assert [item.reason for item in by_question] == [None] * 50 + ["collapsed"] * 150
    assert Counter(item.reason for item in collapse(rows, max_question_share=0.01)) == {None: 20, "collapsed": 180}


def test_the_share_is_that_of_the_usable_rows() -> None:
    rows = [row(number, f"{number}", "What time is it?") for number in range(50)]
    rejected = [row(number, f"{number}", "", reason="no_question") for number in range(50, 1000)]
    kept = collapse([*rows, *rejected], max_question_share=0.5, at_least=1)
    assert sum(item.reason is None for item in kept) == 25
    assert collapse(kept, max_question_share=1.0) == kept
