"""The questions and answers that a teacher repeats."""

from __future__ import annotations

from dataclasses import replace

from mpa_edge.audit_questions import Favourites
from mpa_edge.records import lines_of
from tiny_runs import case


def test_favourites() -> None:
    texts = ["What time is it?"] * 6 + ["what time is it in this picture"] * 3 + ["Who?"]
    rows = [replace(case(n), question=text, answer="10:10" if n < 5 else f"{n}") for n, text in enumerate(texts)]
    found = Favourites()
    for number, row in enumerate(rows):
        found.add(row, collapsed=number in (3, 4, 6))
    table = found.table(lines_of(rows).splitlines())
    assert (table["total"], table["different"], table["dropped"]) == (10, 2, 3)
    (time,) = table["questions"]
    assert time["answers"][0] == {"answer": "10:10", "count": 5}
    assert (time["question"], time["count"], time["share"], time["dropped"]) == ("What time is it?", 9, 90, 3)
    (pair,) = table["pairs"]
    assert (pair["answer"], pair["count"], pair["share"], pair["dropped"]) == ("10:10", 5, 50, 2)
    assert Favourites().table(iter(())) == {"total": 0, "different": 0, "dropped": 0, "questions": [], "pairs": []}
