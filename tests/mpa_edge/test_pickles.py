"""What a model folder could run: nothing of it is run, and the refusal says why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpa_edge.benchmarks.jobs import Job
from mpa_edge.benchmarks.worker import open_variant
from mpa_edge.config import AlignConfig
from mpa_edge.errors import MpaEdgeError
from mpa_edge.export.merged import open_source
from mpa_edge.models import open_vlm
from mpa_edge.opening import open_student


class Program:
    """What a pickle can hold: opening it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> object:
        return Path.touch, (self.made,)


def with_pickle(model: Path, folder: Path, name: str, made: Path) -> Path:
    """A copy of a model folder with a pickle in the place of its safetensors."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"weight": Program(made)}, folder / name)
    return folder


def test_pickled_weights_are_refused_with_the_reason(tiny_one_tile: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = with_pickle(tiny_one_tile, tmp_path / "model", "pytorch_model.bin", made)
    with pytest.raises(MpaEdgeError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        open_vlm(str(folder))
    with pytest.raises(MpaEdgeError, match=r"pytorch_model\.bin is a pickle"):
        open_source(folder, None, print)
    assert not made.exists()


def test_a_pickled_adapter_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = with_pickle(tiny_adapter, tmp_path / "adapter", "adapter_model.bin", made)
    with pytest.raises(MpaEdgeError, match=r"adapter_model\.bin is a pickle"):
        open_vlm(str(folder))
    assert not made.exists()


def test_pickles_beside_safetensors_are_left_alone(tiny_one_tile: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = tmp_path / "model"
    shutil.copytree(tiny_one_tile, folder)
    torch.save({"weight": Program(made)}, folder / "pytorch_model.bin")
    open_vlm(str(folder), device="cpu").close()
    assert not made.exists()


@pytest.fixture
def with_code(tiny_one_tile: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model folder whose type is its own code's, and the file that this makes when it is run."""
    folder, made = tmp_path / "with-code", tmp_path / "made"
    shutil.copytree(tiny_one_tile, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(made)!r}).touch()\n"
        "from transformers import PreTrainedConfig\nclass Own(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    return folder, made


def test_code_of_a_model_runs_by_the_flag_only(
    with_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked
    config = AlignConfig(images="a", teacher="b", student=str(folder), task="textvqa", device="cpu")
    with pytest.raises(MpaEdgeError, match="custom code"):
        open_student(config, config.student)
    assert not made.exists()
    trusting = config.model_copy(update={"trust_remote_code": True})
    assert trusting.to_json()["trust_remote_code"] is True  # which is what run.json holds
    with pytest.raises(MpaEdgeError):  # it is no model of a kind that transformers could make of this
        open_student(trusting, trusting.student)
    assert made.exists()


def test_bench_too_runs_it_by_the_flag_only(
    with_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    job = Job("student", str(folder), 1, 8, 1, [], [], [], device="cpu")
    with pytest.raises(MpaEdgeError, match="custom code"):
        open_variant(job)
    assert not made.exists()
    with pytest.raises(MpaEdgeError):
        open_variant(replace(job, trust_remote_code=True))
    assert made.exists()
