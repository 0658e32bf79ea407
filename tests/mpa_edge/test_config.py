"""Settings: checked, and the message names the flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError

GOOD: dict[str, Any] = {"images": "photos", "teacher": "t", "student": "models/small", "task": "reference"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"holdout": 0.9}, "--holdout 0.9: input should be less than or equal to 0.5"),
        ({"learning_rate": -1}, "--learning-rate -1"),
        ({"select": "best"}, "--select best: input should be 'parity', 'all', 'random' or 'disagree'"),
        ({"mix": 1}, "--mix 1: input should be less than 1"),
        ({"questions": "many"}, "--questions many"),
        ({"epoch": 3}, "--epoch 3"),
        ({"ask": "bundle", "rounds": 2}, "--ask with --rounds 2: "),
    ],
)
def test_a_wrong_setting_names_its_flag(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        AlignConfig(**{**GOOD, **wrong})
    assert str(error.value).startswith(says)


def test_a_missing_setting_names_its_flag() -> None:
    with pytest.raises(InputError, match="--teacher is needed"):
        AlignConfig(**{key: value for key, value in GOOD.items() if key != "teacher"})


def test_the_run_folder_has_a_name() -> None:
    assert AlignConfig(**GOOD).run == Path("runs/reference-small")
    assert AlignConfig(**GOOD, out=Path("x")).run == Path("x")


def test_settings_survive_json() -> None:
    config = AlignConfig(**GOOD, limit=5)
    assert AlignConfig(**config.to_json()) == config
