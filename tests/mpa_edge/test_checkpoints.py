"""Checkpoints on a disk that has no room."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from mpa_edge.checkpoints import CHECKPOINT, State, load_checkpoint, most_bytes, save_checkpoint
from mpa_edge.errors import RunError


def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_to_do(tmp_path: Path) -> None:
    layer = torch.nn.Linear(64, 64)
    weights = dict(layer.named_parameters())
    best = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values())
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
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
