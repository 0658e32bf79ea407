"""Checkpoints on a disk that has no room."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from mpa_edge.checkpoints import CHECKPOINT, State, load_checkpoint, most_bytes, save_checkpoint
from mpa_edge.errors import RunError


@pytest.fixture
def trained() -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor], torch.optim.AdamW]:
    """Weights after one step, the best ones, and the optimizer."""
    layer = torch.nn.Linear(64, 64)
    weights = dict(layer.named_parameters())
    best = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values())
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return weights, best, optimizer


@pytest.mark.parametrize("place", [0.01, 0.5, 0.9])
def test_one_flipped_bit_is_found(place: float, trained: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *trained, State(step=1))
    data = bytearray((tmp_path / CHECKPOINT).read_bytes())
    assert load_checkpoint(tmp_path, *trained).step == 1
    data[int(place * len(data))] ^= 1
    (tmp_path / CHECKPOINT).write_bytes(data)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors cannot be read .*Delete it"):
        load_checkpoint(tmp_path, *trained)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_to_do(trained: Any, tmp_path: Path) -> None:
    weights, best, optimizer = trained
    save_checkpoint(tmp_path, weights, best, optimizer, State(step=1))
    size, count = (tmp_path / CHECKPOINT).stat().st_size, sum(weight.numel() for weight in weights.values())
    assert 0 <= size - most_bytes(count) / 2 < 2000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(RunError, match=r"checkpoint\.safetensors: 66,560 bytes cannot be written .*Make room"):
            save_checkpoint(tmp_path, weights, best, optimizer, State(step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert load_checkpoint(tmp_path, weights, best, optimizer).step == 1
