"""Full fine-tuning goes on from what an earlier round wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mpa_edge.config import AlignConfig
from mpa_edge.full import WholeModel


def test_pickled_weights_are_no_start(tiny_one_tile: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_one_tile)
    config = AlignConfig(images="none", teacher="none", student=str(tiny_one_tile), task="reference", method="full")
    WholeModel(model, None, config, tmp_path, tiny_one_tile).close()
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_one_tile, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        WholeModel(model, None, config, tmp_path, pickled)
