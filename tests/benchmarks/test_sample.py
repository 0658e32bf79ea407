from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.benchmarks.sample import Item, items_of, latency_set, size_of
from mpa_edge.labelled import Question, stratified


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """90 questions: 60 of kind a, 27 of b, 3 of c; two about each of 45 pictures, in three sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number in range(90):
        path = folder / f"{number // 2}.png"
        if not path.exists():
            Image.new("RGB", (8 + 8 * (number // 2 % 3), 8), (number, 0, 0)).save(path)
        kind = "a" if number < 60 else "b" if number < 87 else "c"
        found.append(Question(str(number), str(path), f"what {number}?", ("yes",), kind))
    return found


def items(questions: list[Question]) -> list[Item]:
    return items_of(questions, lambda question: f"Q: {question}")


def test_a_sample_keeps_each_kinds_share_and_the_order(questions: list[Question]) -> None:
    sample = stratified(questions, 30, seed=1)
    assert Counter(question.kind for question in sample) == {"a": 20, "b": 9, "c": 1}
    assert [int(question.id) for question in sample] == sorted(int(question.id) for question in sample)
    assert stratified(questions, 30, seed=1) == sample != stratified(questions, 30, seed=2)


@pytest.mark.parametrize("limit", [1, 7, 31, 89])
def test_a_sample_has_the_size_that_was_asked_for(questions: list[Question], limit: int) -> None:
    assert len(stratified(questions, limit, seed=0)) == limit


def test_no_limit_is_all(questions: list[Question]) -> None:
    assert stratified(questions, None, 0) == stratified(questions, 500, 0) == questions


def test_keys_are_made_of_content(questions: list[Question], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(Path(questions[0].image).read_bytes())
    again = Question("other id", str(moved), questions[0].question, ("no",))
    assert items([again])[0].ask.key == items(questions)[0].ask.key
    assert len({item.ask.key for item in items(questions)}) == 90


def test_timed_pictures_are_distinct_and_warmed_up_in_every_size(questions: list[Question]) -> None:
    warm, timed = latency_set(items(questions), 20, seed=0)
    assert len({ask.image for ask in timed}) == 20
    assert {size_of(ask.image) for ask in warm} == {(8, 8), (16, 8), (24, 8)}
    assert not {ask.image for ask in warm} & {ask.image for ask in timed}


def test_few_pictures_are_used_as_far_as_they_go(questions: list[Question]) -> None:
    warm, timed = latency_set(items(questions[:2]), 20, seed=0)
    assert (len(timed), len(warm)) == (1, 3)


def test_what_is_no_picture_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    assert size_of(str(tmp_path / "text.png")) is None
