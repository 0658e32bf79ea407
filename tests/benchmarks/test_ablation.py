"""The ablation's table says what the scores say, and its rows are what their names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mpa_edge.benchmarks import ablation
from mpa_edge.benchmarks.ablation_rows import PLAIN, TRIALS
from mpa_edge.benchmarks.ablation_table import DEFAULT, PAIRS, collect, interval, markdown
from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError

QUESTIONS = 40
KINDS = ("read_word", "sign_color")  # the student knows the second only


def write_seed(out: Path, seed: int, name: str, right: list[int], **extra: Any) -> None:
    """A row's scores: 1 on the questions in `right`."""
    scores = [float(number in right) for number in range(QUESTIONS)]
    both = {"exact_match": scores, "containment": scores}
    path = out / f"seed-{seed}" / f"{ablation.slug(name)}.test.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"scores": {"test": both, "home": both}, **extra}))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "test"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    rows = [{"image": "a.png", "question": f"Q{n}?", "answers": ["a"], "kind": KINDS[n % 2]} for n in range(QUESTIONS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    odd = list(range(1, QUESTIONS, 2))
    for seed in (0, 1, 10):
        write_seed(tmp_path, seed, "teacher", list(range(QUESTIONS)))
        write_seed(tmp_path, seed, "student", odd)
        # Seed 10 forgets two of the twenty that the student had right.
        write_seed(
            tmp_path,
            seed,
            DEFAULT,
            [*range(0, 24, 2), *(odd if seed < 10 else odd[2:])],
            training={"parity": 70, "agree": 30},
            quantized={"test": {"exact_match": [1.0] * QUESTIONS, "containment": [1.0] * QUESTIONS}},
        )
        write_seed(tmp_path, seed, "random, of the default's size", odd, training={"agree": 100})
    return tmp_path


def test_a_row_holds_accuracy_gap_and_what_was_forgotten(out: Path) -> None:
    rows = {row["name"]: row for row in collect(out, "test")["rows"]}
    row = rows[DEFAULT]
    assert row["accuracy_by_seed"] == [0.8, 0.8, 0.75]
    assert row["accuracy"] == pytest.approx(2.35 / 3, abs=1e-4)
    assert row["ci95"][0] < row["accuracy"] < row["ci95"][1]
    assert row["gap_closed"] == pytest.approx((2.35 / 3 - 0.5) / 0.5, abs=1e-4)
    assert row["train_samples"] == 100
    assert row["forgotten"] == pytest.approx(2 / 20 / 3, abs=1e-4)
    assert row["known_kinds"] == pytest.approx(1 - 2 / 20 / 3, abs=1e-4)
    assert row["by_kind"]["read_word"] == 0.6
    assert rows["student"]["forgotten"] == 0
    assert rows[f"{DEFAULT}, as its q4 bundle"]["accuracy"] == 1.0
    assert rows[f"{DEFAULT}, as its q4 bundle"]["home"] is None  # it was not asked there


def test_a_pair_is_compared_question_by_question_over_all_seeds(out: Path) -> None:
    found = collect(out, "test")
    pair = next(one for one in found["paired"] if one["b"] == DEFAULT and one["a"].startswith("random"))
    assert pair["delta_by_seed"] == [0.3, 0.3, 0.25]
    assert pair["delta"] == pytest.approx(0.85 / 3, abs=1e-4)
    assert 0 < pair["ci95"][0] < pair["delta"] < pair["ci95"][1]
    assert "| + agreement mix: the default against random, of the default's size | +28.3 |" in markdown(found)


def test_a_pair_is_of_the_seeds_that_both_have(out: Path) -> None:
    (out / "seed-0" / f"{ablation.slug(DEFAULT)}.test.json").unlink()
    (out / "seed-1" / f"{ablation.slug('random, of the default')}-s-size.test.json").unlink()
    pair = next(one for one in collect(out, "test")["paired"] if one["b"] == DEFAULT and one["a"].startswith("random"))
    assert pair["seeds"] == [10]
    assert pair["delta_by_seed"] == [0.25]


def test_the_interval_knows_of_seeds_and_of_questions() -> None:
    by_question = np.tile(np.repeat([0.0, 1.0], 50), (3, 1))
    by_seed = np.tile([[0.2], [0.5], [0.8]], (1, 100))
    low, high = interval(by_question)
    assert 0.38 < low < 0.42  # 1.96 standard errors of 0.05
    assert 0.58 < high < 0.62
    assert interval(by_seed) == (pytest.approx(0.2), pytest.approx(0.8))


def test_a_folder_without_seeds_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ablation run"):
        collect(tmp_path, "test")


def test_every_row_is_a_valid_setting_and_every_pair_has_rows() -> None:
    base = {"images": "p", "teacher": "t", "student": "s", "task": "reference"}
    configs = {trial.name: AlignConfig(**base, **trial.settings) for trial in TRIALS}
    assert configs[DEFAULT] == AlignConfig(**base)
    differing = {name for name in PLAIN if configs[DEFAULT].to_json()[name] != PLAIN[name]}
    assert differing == {"target", "questions", "mix"}  # the rows before it add these one by one
    assert configs["random, of the default's size"].select == "random"
    assert configs["parity, the paper's match"].match == "paper"
    assert {"votes", "blind", "questions", "mix", "rounds", "target"} <= PLAIN.keys()
    assert len({ablation.slug(name) for name in configs}) == len(configs)
    names = {name.removesuffix(", as its q4 bundle") for pair in PAIRS for name in pair}
    assert names <= configs.keys()


def test_a_row_is_trained_scored_and_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(ablation, "POOL", 40)
    monkeypatch.setattr(ablation, "QUESTIONS", 12)
    monkeypatch.setattr(ablation, "HOME", 12)
    typed = ["run", "--out", str(tmp_path), "--split", "validation", "--only", "parity, the official", "--threads", "1"]
    result = CliRunner().invoke(ablation.app, typed)
    assert result.exit_code == 0, result.output
    path = tmp_path / "seed-0" / "parity-the-official-match.validation.json"
    found = json.loads(path.read_text())
    assert len(found["scores"]["validation"]["exact_match"]) == len(found["scores"]["home"]["containment"]) == 12
    assert set(found["training"]) == {"parity"}
    before = path.stat().st_mtime_ns
    assert CliRunner().invoke(ablation.app, typed).exit_code == 0
    assert path.stat().st_mtime_ns == before
    path.write_text(json.dumps(found | {"made": {"settings": "others"}}))
    assert CliRunner().invoke(ablation.app, typed).exit_code == 0
    assert json.loads(path.read_text())["made"] == found["made"]
