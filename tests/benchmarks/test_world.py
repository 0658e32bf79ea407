"""The renderer: determinism, disjoint uses, kinds, and answers that are true by construction."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest

from mpa_edge.benchmarks.reference import write_pool, write_test
from mpa_edge.benchmarks.world import LOOKS, POOL_SEEDS, TEST_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, World, draw_picture
from mpa_edge.benchmarks.world_canvas import COLOURS, SIZE
from mpa_edge.benchmarks.world_dense import GRID, HEADS, dense_labels, draw_soup
from mpa_edge.benchmarks.world_questions import FORMS, PHRASINGS, ask
from mpa_edge.benchmarks.world_signs import WORDS


def questions(world: World, count: int) -> list:
    asked = []
    for seed in TEST_SEEDS[:count]:
        asked.append(ask(draw_picture(seed, world).facts, random.Random(seed), world.value))
    return asked


@pytest.mark.parametrize("world", World)
def test_a_seed_gives_the_same_picture_and_facts(world: World) -> None:
    for seed in (3, 4, 5, 60):
        first, second = draw_picture(seed, world), draw_picture(seed, world)
        assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
        assert first.facts == second.facts
        assert first.image.size == (SIZE, SIZE)
        assert first.image.mode == "RGB"


def test_seeds_of_training_pool_and_test_never_meet() -> None:
    ranges = sorted((TRAIN_SEEDS, POOL_SEEDS, VALIDATION_SEEDS, TEST_SEEDS), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))
    assert len(TEST_SEEDS) >= 1500
    assert LOOKS[World.TARGET].spelled == 0


def test_the_target_domain_asks_many_kinds_and_every_group() -> None:
    asked = questions(World.TARGET, 1500)
    kinds = {question.kind for question in asked}
    assert len(kinds) >= 12
    assert kinds == set(PHRASINGS)
    assert {question.group for question in asked} == {"read", "chart", "describe"}
    assert {"read_word", "read_code", "read_number", "read_price"} <= kinds


def test_every_kind_has_phrasings_of_both_worlds_and_some_that_only_the_target_has() -> None:
    for kind, phrasings in PHRASINGS.items():
        assert len(phrasings) >= 4, kind
        assert any("n" in phrasing.worlds for phrasing in phrasings), kind
        assert any(phrasing.worlds == "t" for phrasing in phrasings), kind
        assert all(phrasing.form in FORMS for phrasing in phrasings), kind
    assert set(LOOKS[World.NARROW].fonts) != set(LOOKS[World.TARGET].fonts)


@pytest.mark.parametrize("world", World)
def test_answers_have_the_shape_that_their_kind_promises(world: World) -> None:
    shapes = {
        "read_word": lambda answer: answer in WORDS or (LOOKS[world].spelled and answer.isalpha() and answer.isupper()),
        "read_code": lambda answer: re.fullmatch(r"(?=.*\d)[A-Z2-9]{3,4}", answer) and answer not in WORDS,
        "read_number": str.isdigit,
        "read_price": lambda answer: re.fullmatch(r"\$?\d{1,2}\.\d\d", answer),
        "bar_value": lambda answer: answer in "123456789",
        "sign_color": COLOURS.__contains__,
        "shape_presence": {"yes", "no"}.__contains__,
    }
    for question in questions(world, 800):
        assert question.answer
        assert "{" not in question.text
        assert shapes.get(question.kind, bool)(question.answer), question


def test_what_the_sign_says_is_what_was_written() -> None:
    checked = 0
    for seed in range(200):
        picture = draw_picture(seed, World.TARGET)
        for fact in picture.facts:
            if fact.kind.startswith("read_"):
                assert fact.answer in "".join(mark.char for mark in picture.marks)
                checked += 1
    assert checked > 50


def test_chart_facts_agree_with_the_bars_that_were_drawn() -> None:
    checked = 0
    for seed in range(300):
        picture = draw_picture(seed, World.TARGET)
        values = [mark.value for mark in picture.marks if mark.thing == "bar"]
        if not values:
            continue
        facts = {fact.kind: fact for fact in picture.facts}
        named = {fact.slots["bar"]: int(fact.answer) for fact in picture.facts if fact.kind == "bar_value"}
        assert list(named.values()) == values
        assert named[facts["bar_highest"].answer] == max(values)
        assert named[facts["bar_lowest"].answer] == min(values)
        assert facts["bar_count"].answer == str(len(values))
        for fact in picture.facts:
            if fact.kind == "bar_compare":
                higher = named[fact.slots["bar"]] > named[fact.slots["other"]]
                assert fact.answer == ("yes" if higher else "no")
        checked += 1
    assert checked > 30


def test_shape_counts_agree_with_the_shapes_that_were_drawn() -> None:
    for seed in range(300):
        picture = draw_picture(seed, World.BROAD)
        drawn = [mark.thing for mark in picture.marks]
        for fact in picture.facts:
            if fact.kind == "shape_count":
                assert drawn.count(fact.slots["shape"]) == int(fact.answer)
            if fact.kind == "shape_presence" and fact.answer == "yes":
                assert any(m.thing == fact.slots["shape"] and m.colour == fact.slots["color"] for m in picture.marks)


def test_dense_labels_name_the_characters_and_bars_of_a_picture() -> None:
    for seed in range(20):
        for marks in (draw_soup(seed).marks, draw_picture(seed, World.BROAD).marks):
            labels = dense_labels(list(marks))
            assert labels["char"].shape == (GRID, 2 * GRID)
            for name, (_, classes) in HEADS.items():
                assert labels[name].max() < classes
    assert np.count_nonzero(dense_labels(list(draw_soup(1).marks))["char"]) > 40


def test_pool_and_test_are_files_that_can_be_written_again_to_the_byte(tmp_path) -> None:
    first = [path.read_bytes() for path in write_pool(tmp_path / "a", 5)]
    assert first == [path.read_bytes() for path in write_pool(tmp_path / "b", 5)]
    one, two = write_test(tmp_path / "c", 20), write_test(tmp_path / "d", 20)
    assert one.read_text() == two.read_text()
    assert len(one.read_text().splitlines()) == 20
    with pytest.raises(ValueError, match="n must be"):
        write_pool(tmp_path / "e", 0)
