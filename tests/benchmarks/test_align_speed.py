"""The speed benchmark measures what it says: the same work both ways, counted by passes of the encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.benchmarks import align_speed
from mpa_edge.benchmarks.align_speed import OUT
from mpa_edge.benchmarks.align_ways import Ask, Work, measure
from mpa_edge.runtime.vlm import Decoding

SHARED = {"annotate_identify", "train", "train_from_nothing", "train_step"}


@pytest.fixture(scope="module")
def found(tiny_one_tile: Path, picture: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import torch

    from mpa_edge.transformers_vlm import TransformersVlm

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        picture(70, 60, seed=number).save(path)
    teacher, student = (TransformersVlm.load(str(tiny_one_tile), device="cpu") for _ in range(2))
    annotate = [Ask(path, "Write.", Decoding(6, temperature=1.0, seed=seed)) for path in paths for seed in range(2)]
    identify = [Ask(path, question, Decoding(3)) for path in paths for question in ("What?", "How many bars?")]
    return measure(teacher, student, Work(annotate, identify, train_batch=4, repeats=2))


def test_both_ways_do_the_same_work(found: dict[str, Any]) -> None:
    asked = found["annotate_identify"]
    assert asked["same_answers"] == 1
    # 6 annotations, 6 self-checks and 6 answers of the student; or 3 pictures, for the teacher and for the student.
    assert asked["encoder_passes"] == {"plain": 18, "ours": 6}
    assert 0 < asked["encoder_share"]["plain"] < 1
    assert asked["most_by_features"] > 1
    assert len(asked["plain_s"]) == len(asked["ours_s"]) == 2


def test_training_leaves_the_encoder_out(found: dict[str, Any]) -> None:
    trained = found["train"]
    assert trained["rows"] == 6
    assert len(trained["plain_epoch_s"]) == len(trained["ours_epoch_s"]) == 2
    assert all(len(seconds) == 2 for seconds in trained["ours_prepare_s"].values())
    assert trained["ratio_from_nothing"] <= trained["ratio"] <= trained["ratio_step"]
    assert found["ratios"].keys() == SHARED


def test_the_result_tells_its_circumstances(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align_speed, "MODELS", {"one": lambda folder: found, "other": lambda folder: found})
    monkeypatch.setattr(align_speed, "available_cores", lambda: 1)
    align_speed.main(tmp_path / "speed.json", only="one")
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["ratios"] == {"one": found["ratios"]}
    assert written["host"]["cpu"]
    assert written["host"]["versions"]["torch"]
    assert written["created"][:2] == "20"


@pytest.mark.skipif(not OUT.is_file(), reason="not measured yet")
def test_the_committed_result_is_whole() -> None:
    written = json.loads(OUT.read_text())
    assert written["ratios"].keys() == align_speed.MODELS.keys()
    for name, ratios in written["ratios"].items():
        assert ratios.keys() == SHARED
        assert written["models"][name]["annotate_identify"]["same_answers"] == 1
