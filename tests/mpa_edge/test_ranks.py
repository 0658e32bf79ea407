"""Two real processes share a training: the same adapter as one makes, and one of them writes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpa_edge.config import AlignConfig
from mpa_edge.level import level
from mpa_edge.ranks import Ranks, is_main
from mpa_edge.training_data import read_examples
from mpa_edge.transformers_vlm import TransformersVlm

# The last step of an epoch may have a single row, so that one process has none.
FLAGS = {"epochs": 2, "train_batch_size": 3, "accumulate": 2, "rank": 4, "learning_rate": 5e-3, "holdout": 0.1}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_train_what_one_trains(tiny_pair: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "images": str(tiny_pair.images),
        "teacher": str(tiny_pair.teacher),
        "student": str(tiny_pair.student),
        "task": "reference",
        "out": tmp_path / "run",
        "device": "cpu",
        "select": "all",
        **FLAGS,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    # --multi_gpu starts several processes on a machine without a GPU too, --cpu only one.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}"]
    others = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", *launch, *others, "-m", "mpa_edge.cli", "align", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    # Only the main process speaks.
    assert done.stdout.count("held out") == done.stderr.count("level:") == 1
    assert done.stderr.count("Warning") == 0, done.stderr

    torch.set_num_threads(1)
    run, alone = tmp_path / "run", tmp_path / "alone"
    student = TransformersVlm.load(str(tiny_pair.student), device="cpu")
    level(student, read_examples(run / "parity.jsonl"), alone, AlignConfig(**settings))
    assert sorted(path.name for path in (run / "student").iterdir()) == sorted(path.name for path in alone.iterdir())
    shared, single = (json.loads((folder / "metrics.json").read_text()) for folder in (run / "student", alone))
    assert shared["steps"] == single["steps"]
    assert shared["best_epoch"] == single["best_epoch"]
    for row, other in zip(shared["history"], single["history"], strict=True):
        for key in ("holdout_loss", "holdout_exact"):
            assert row[key] == pytest.approx(other[key], rel=1e-3)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run / "student", alone))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=2e-4)


def test_one_process_is_the_main_one_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(cpu=True)
    ranks.wait()
    tensors = [torch.ones(2)]
    assert ranks.sum(tensors) is tensors
    assert list(ranks.share([1, 2, 3])) == [1, 2, 3]
    assert is_main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not is_main()


def test_shares_are_disjoint_and_all_there_is() -> None:
    shares = []
    for number in range(3):
        ranks = Ranks(cpu=True)
        ranks.count, ranks.number = 3, number
        shares.append(ranks.share(range(7)))
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) == 1
