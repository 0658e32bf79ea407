"""The demo's own parts; its stages have tests of their own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpa_edge.demo import Steps, demo, duration, is_of, write_pictures
from mpa_edge.errors import InputError


def test_pictures_are_drawn_once(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3, 2)
    pool = sorted((tmp_path / "pictures").iterdir())
    assert len(pool) == 3
    assert len((tmp_path / "test" / "test.jsonl").read_text().splitlines()) == 2
    pool[0].write_bytes(b"mark")
    write_pictures(tmp_path, 3, 2)
    assert pool[0].read_bytes() == b"mark"
    write_pictures(tmp_path, 4, 2)
    assert pool[0].read_bytes() != b"mark"


def test_no_label_lies_among_the_pictures_for_alignment(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2, 2)
    assert {path.suffix for path in (tmp_path / "pictures").iterdir()} == {".png"}


def test_steps_are_announced_and_timed() -> None:
    out = io.StringIO()
    steps = Steps(Console(file=out, width=120), of=2)
    with steps.step("align", "about it") as tell:
        tell("[brackets] stay")
    assert [name for name, _ in steps.taken] == ["align"]
    assert "1/2 align  about it" in out.getvalue()
    assert "[brackets] stay" in out.getvalue()
    assert "align 0.0 s; in all 0.0 s" in steps.summary()


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (0.42, 12.6, 185.0)] == ["0.4 s", "13 s", "3:05 min"]


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    assert not is_of(tmp_path, "0" * 64)


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        demo(tmp_path, teacher=tmp_path / "teacher", student=tmp_path / "student")


def test_the_whole_road_on_a_few_pictures_and_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    few: dict[str, Any] = {
        "pictures": 60,
        "questions": 12,
        "bundles": {"gguf": ("q8_0",)},
        "settings": {"questions": 1, "epochs": 1},
        "threads": 1,
        "console": Console(file=io.StringIO()),
    }
    report = json.loads(demo(tmp_path, **few).read_text())
    variants = {one["step"]: one for one in report["variants"]}
    assert list(variants) == ["teacher", "student", "aligned", "quantized"]
    assert not any(one["failed"] for one in variants.values())
    assert all(one["accuracy"]["n"] == 12 for one in variants.values())
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("bundles/*/*")}
    assert made
    demo(tmp_path, **few)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("bundles/*/*")}
