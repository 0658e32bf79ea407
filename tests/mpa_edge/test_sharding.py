"""Two real processes train with a whole student each, with a share of one each, and with a share of its optimizer each:
the same as one process, which goes on from their checkpoints as they go on from its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from mpa_edge import level as module
from mpa_edge.config import Accelerate, AlignConfig
from mpa_edge.errors import InputError, MissingExtra
from mpa_edge.launching import CONFIGS, command, relaunch_if_wanted
from mpa_edge.level import level
from mpa_edge.methods import refuse_untrainable
from mpa_edge.ranks import Ranks
from mpa_edge.training_data import Example
from mpa_edge.transformers_vlm import TransformersVlm

# 22 rows to train on: the last step of an epoch has four, of which the last batch of one process is smaller.
SETTINGS: dict[str, Any] = {
    **{"images": "none", "teacher": "none", "task": "reference", "device": "cpu", "epochs": 2, "patience": 99},
    **{"train_batch_size": 3, "accumulate": 2, "learning_rate": 5e-3, "rank": 4, "holdout": 0.1},
}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not there")


class Enough(Exception):
    """As far as a training should get."""


def train(student: str, examples: list[Example], folder: Path, steps: int | None = None, **settings: Any) -> None:
    """Train in `folder`; after so many steps, of which the last one is in no checkpoint, break off."""
    torch.set_num_threads(1)
    module.STEPS_PER_CHECKPOINT = 2
    done = []

    def advance(count: int) -> None:
        done.append(count)
        if steps is not None and sum(done) >= steps:
            raise Enough

    config = AlignConfig(student=student, **SETTINGS, **settings)
    try:
        level(TransformersVlm.load(student, device="cpu"), examples, folder, config, advance=advance)
    except Enough:
        assert steps is not None


def share(work: Path) -> None:
    """What each of the two processes does."""
    told = json.loads((work / "task.json").read_text())
    examples = [Example(**{**row, "image": Path(row["image"])}) for row in told["examples"]]
    for way in told["ways"]:
        os.environ["ACCELERATE_USE_FSDP"] = str(way == "fsdp")
        train(told["student"], examples, work / f"{way}-two-then-one", 3)
        train(told["student"], examples, work / f"{way}-one-then-two")
    train(told["student"], examples, work / "full-two", method="full")


def same(folder: Path, wanted: Path) -> None:
    """What was trained, and what it reached on the way."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in wanted.iterdir())
    ours, theirs = (json.loads((each / "metrics.json").read_text()) for each in (folder, wanted))
    assert (ours["steps"], ours["parameters"]) == (theirs["steps"], theirs["parameters"])
    for row, other in zip(ours["history"], theirs["history"], strict=True):
        assert {**row, "train_loss": row["train_loss"] or 0} == pytest.approx(
            {**other, "train_loss": other["train_loss"] or 0}, rel=1e-3
        )
    name = next(path.name for path in wanted.glob("*.safetensors"))
    tensors, others = load_file(folder / name), load_file(wanted / name)
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("ways", [("ddp", "fsdp"), pytest.param(("deepspeed",), marks=needs_deepspeed)])
def test_any_number_of_processes_trains_the_same_and_goes_on_from_any_others_checkpoint(
    ways: tuple[str, ...], tiny_one_tile: Path, disc_examples: Callable[..., list[Example]], tmp_path: Path
) -> None:
    examples, student = disc_examples(24, "What colour?"), str(tiny_one_tile)
    rows = [{**asdict(example), "image": str(example.image)} for example in examples]
    (tmp_path / "task.json").write_text(json.dumps({"ways": ways, "student": student, "examples": rows}))
    train(student, examples, tmp_path / "one")
    train(student, examples, tmp_path / "full-one", method="full")
    train(student, examples, tmp_path / "begun", 3)
    for way in ways:
        shutil.copytree(tmp_path / "begun", tmp_path / f"{way}-one-then-two")
    launch = command(ways[-1], 2, [])[:-2]
    done = subprocess.run([*launch, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    for way in ways:
        assert (tmp_path / f"{way}-two-then-one" / "checkpoint.safetensors").exists()
        train(student, examples, tmp_path / f"{way}-two-then-one")
        for order in ("one-then-two", "two-then-one"):
            same(tmp_path / f"{way}-{order}", tmp_path / "one")
    same(tmp_path / "full-two", tmp_path / "full-one")


def test_what_cannot_be_shared_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AlignConfig(student="x", accelerate="ddp", **SETTINGS)
    with pytest.raises(InputError, match="--accelerate ddp: there is no GPU to count; say how many with --processes"):
        relaunch_if_wanted(config, [])
    relaunch_if_wanted(config.model_copy(update={"processes": 1}), [])  # this one is enough
    relaunch_if_wanted(AlignConfig(student="x", **SETTINGS), [])
    with pytest.raises(InputError, match="--processes goes with --accelerate"):
        relaunch_if_wanted(AlignConfig(student="x", processes=2, **SETTINGS), [])
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(get_args(Accelerate))
    monkeypatch.setenv("WORLD_SIZE", "2")
    relaunch_if_wanted(config, [])  # a process that was started so
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(InputError, match="--method qlora: 4-bit models are trained in several"):
        refuse_untrainable(AlignConfig(**{**SETTINGS, "student": "x", "method": "qlora", "device": "cuda"}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(InputError, match="ZeRO stage must be 1 or 2, not 3; or use --accelerate fsdp"):
        Ranks(cpu=True)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mpa-edge\[deepspeed\]"):
        Ranks(cpu=True)


if __name__ == "__main__":
    share(Path(sys.argv[1]))
