"""Settings: checked, and the message names the flag."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError
from mpa_edge.passwords import without_passwords

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


@pytest.mark.parametrize(
    ("flag", "address"),
    [
        ("mirror", "s3://bucket/me@work/run"),
        ("mirror", "dir::file://a::memory://b/me@work"),
        ("teacher", "http://a:8000/v1,http://[::1]:8000/v1#model@2"),
        ("images", "hf:me/photos:config:train"),
        ("images", "hf:/home/me@work/photos"),
        ("images", "photos/what? me@work: 1.png"),
        ("address", "ray://cluster:10001"),
        ("address", "cluster:6379"),
    ],
)
def test_an_address_without_a_password_is_taken_and_told_as_it_is(flag: str, address: str) -> None:
    settings = AlignConfig(**{**GOOD, "engine": "ray", flag: address})
    assert getattr(settings, flag) == address == without_passwords(address)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("(s3://me:word@bucket/run)", "(s3://***@bucket/run)"),
        ("s3://me:wo/r+d=@bucket/run", "s3://***@bucket/run"),
        ("ftp://me:1234@host, and 'ftp://me:w@rd@host'", "ftp://***@host, and 'ftp://***@host'"),
        ("simplecache::ftp://me:word@host/x", "simplecache::ftp://***@host/x"),
        ("http://a/v1,http://word@b/v1#m", "http://a/v1,http://***@b/v1#m"),
        ("hf:me:word@x/y", "hf:***@x/y"),
    ],
)
def test_a_password_is_not_told(address: str, told: str) -> None:
    assert without_passwords(address) == told
    for flag in ("images", "teacher", "student", "mirror"):
        with pytest.raises(InputError, match=f"^--{flag}: an address with a password") as error:
            AlignConfig(**{**GOOD, flag: address})
        assert "wo" not in str(error.value).replace("password", "").replace("would", "")


@pytest.mark.parametrize("flag", ["out", "images"])
def test_a_name_that_is_not_in_utf8_names_the_flag(flag: str) -> None:
    settings = {"images": "i", "teacher": "t", "student": "s", "task": "reference", flag: os.fsdecode(b"o\xff")}
    with pytest.raises(InputError, match=f"^--{flag}: its name is not in UTF-8"):
        AlignConfig(**settings)  # type: ignore[arg-type]
