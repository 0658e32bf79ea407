"""What becomes training data."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpa_edge.config import Select
from mpa_edge.records import Case
from mpa_edge.selection import drawn, select_cases, training_row
from mpa_edge.tasks import Task, task_named
from mpa_edge.training_data import read_examples


def case(number: int, verdict: str) -> Case:
    student_score = 1.0 if verdict == "agree" else 0.0
    return Case(f"c{number}", f"s{number}", "What?", "x", "x", "y", 1.0, student_score, verdict)


# 30 parity, 60 agree, 20 unconfirmed, 5 errors, mixed.
CASES = [
    case(number, verdict)
    for number, verdict in enumerate((["parity"] * 6 + ["agree"] * 12 + ["unconfirmed"] * 4 + ["error"]) * 5)
]


def counts(select: Select, mix: float = 0.25, seed: int = 0) -> dict[str, int]:
    chosen = [item.verdict for item in select_cases(CASES, select, mix=mix, seed=seed)]
    return {verdict: chosen.count(verdict) for verdict in sorted(set(chosen))}


def test_parity_with_its_share_of_mix() -> None:
    assert counts("parity") == {"agree": 10, "parity": 30}
    assert counts("parity", mix=0) == {"parity": 30}
    assert counts("parity", mix=0.9) == {"agree": 60, "parity": 30}  # no more than there are


def test_controls() -> None:
    assert counts("all") == {"agree": 60, "parity": 30, "unconfirmed": 20}
    assert counts("disagree") == {"parity": 30, "unconfirmed": 20}
    assert sum(counts("random").values()) == 40
    assert len(counts("random")) == 3


def test_the_order_is_that_of_the_cases_and_the_draw_the_seeds() -> None:
    chosen = select_cases(CASES, "parity", mix=0.25, seed=0)
    assert [item.id for item in chosen] == sorted((item.id for item in chosen), key=lambda name: int(name[1:]))
    assert chosen == select_cases(CASES, "parity", mix=0.25, seed=0)
    assert chosen != select_cases(CASES, "parity", mix=0.25, seed=1)


def test_a_draw_does_not_depend_on_the_order_and_a_smaller_one_is_part_of_it() -> None:
    names = [str(number) for number in range(50)]
    assert drawn(names, 9, 3, key=str) == drawn(names[::-1], 9, 3, key=str)
    assert drawn(names, 9, 3, key=str)[:4] == drawn(names, 4, 3, key=str)


@pytest.mark.parametrize("template", ["{question}", "{question}\nAnswer with one word."])
def test_a_row_is_the_inference_prompt_and_reads_back(tmp_path: Path, template: str) -> None:
    import json

    usual = task_named("reference")
    task = Task("t", usual.annotate_prompt, template, usual.metric, 8, 4)
    (tmp_path / "run").mkdir()
    row = training_row(case(1, "parity"), tmp_path / "photos" / "a.png", task, tmp_path / "run")
    assert row["images"] == ["../photos/a.png"]
    (tmp_path / "run" / "parity.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = read_examples(tmp_path / "run" / "parity.jsonl")
    assert example.prompt == task.prompt("What?")
    assert example.answer == "x"
    assert example.image.resolve() == (tmp_path / "photos" / "a.png").resolve()
    assert example.group == "s1"


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    from mpa_edge.errors import RunError

    (tmp_path / "parity.jsonl").write_text('{"id": "x", "messages": []}\n')
    with pytest.raises(RunError, match=r"parity\.jsonl, line 1"):
        read_examples(tmp_path / "parity.jsonl")
