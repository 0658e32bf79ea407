"""What becomes training data."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpa_edge.config import Select
from mpa_edge.records import Case
from mpa_edge.selection import choose, drawn, target_of, training_row
from mpa_edge.tasks import Task, task_named
from mpa_edge.training_data import read_examples


def case(number: int, verdict: str, question: str = "", short: str = "x", written: str = "x") -> Case:
    student_score = 1.0 if verdict == "agree" else 0.0
    question = question or f"What is number {number}?"
    return Case(f"c{number}", f"s{number}", question, written, short, "y", 1.0, student_score, verdict)


# 30 parity, 60 agree, 20 unconfirmed, 10 blind, 5 errors, mixed.
VERDICTS = ["parity"] * 6 + ["agree"] * 12 + ["unconfirmed"] * 4 + ["blind"] * 2 + ["error"]
CASES = [case(number, verdict) for number, verdict in enumerate(VERDICTS * 5)]


def chosen_of(cases: list[Case], select: Select, *, mix: float = 0.25, seed: int = 0, **shares: float) -> list[Case]:
    choice = choose(iter(cases), select, mix=mix, seed=seed, **shares)
    return [item for item, chosen in zip(cases, choice.chosen, strict=True) if chosen]


def counts(select: Select, mix: float = 0.25, seed: int = 0) -> dict[str, int]:
    chosen = [item.verdict for item in chosen_of(CASES, select, mix=mix, seed=seed)]
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
    chosen = chosen_of(CASES, "parity")
    assert chosen == chosen_of(CASES, "parity")
    assert chosen != chosen_of(CASES, "parity", seed=1)
    assert {item.id for item in chosen_of(CASES[::-1], "parity")} == {item.id for item in chosen}


def test_questions_that_come_too_often_are_not_trained_on() -> None:
    asked = [case(number, "parity", question="What time is it?") for number in range(100)]
    cases = [item for pair in zip(asked, CASES[:100], strict=True) for item in pair]
    choice = choose(cases, "all", mix=0, seed=0, question_share=0.25)
    assert sum(choice.collapsed) == 50
    kept = [item for item, chosen in zip(cases, choice.chosen, strict=True) if chosen]
    assert [item for item in kept if item.question == "What time is it?"] == asked[:50]  # the first ones
    assert not sum(choose(cases, "all", mix=0, seed=0).collapsed)
    assert sum(choose(cases, "parity", mix=0, seed=0, pair_share=0.25).collapsed) == 50


def test_a_target_is_the_teachers_own_short_answer_where_it_confirmed_one() -> None:
    task = task_named("reference")  # answers of at most 4 words
    assert target_of(case(0, "parity", short="12", written="12 euros"), task, "short") == "12"
    assert target_of(case(0, "agree", short="12", written="12 euros"), task, "short") == "12"
    assert target_of(case(0, "parity", short="12", written="12 euros"), task, "written") == "12 euros"
    assert target_of(case(0, "unconfirmed", short="13", written="12 euros"), task, "short") == "12 euros"
    assert target_of(case(0, "parity", short="the sign says stop here", written="stop"), task, "short") == "stop"
    row = training_row(case(0, "parity", short="12", written="12 euros"), Path("a.png"), task, Path(), "written")
    assert row["messages"][1]["content"][0]["text"] == "12 euros"


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
    assert example.prompt == task.prompt("What is number 1?")
    assert example.answer == "x"
    assert example.image.resolve() == (tmp_path / "photos" / "a.png").resolve()
    assert example.group == "s1"


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    from mpa_edge.errors import RunError

    (tmp_path / "parity.jsonl").write_text('{"id": "x", "messages": []}\n')
    with pytest.raises(RunError, match=r"parity\.jsonl, line 1"):
        read_examples(tmp_path / "parity.jsonl")
