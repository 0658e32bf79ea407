"""How far a training is, and one file that holds it: from there it goes on to the same weights, bit for bit."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mpa_edge.errors import RunError
from mpa_edge.sharding import like, whole
from mpa_edge.zero import Zero

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class State:
    """How far training is; what a checkpoint holds besides the tensors. Floats survive JSON exactly."""

    step: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-1.0, -math.inf)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epochs_without_gain(self) -> int:
        """Epochs since the best one."""
        return len(self.history) - 1 - self.best_epoch


def most_bytes(weights: int) -> int:
    """What checkpoints of so many weights take on disk at most: weights, best weights and AdamW's two moments, in
    float32, twice while a new one takes the place of the old one."""
    return 2 * 4 * 4 * weights


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | Zero,
    state: State,
    *,
    write: bool = True,
) -> None:
    """Write weights, best weights, AdamW's moments and the state in one step, straight to disk: a full fine-tuning's
    are four times the model in float32. All tensors are whole, so that any number of processes can go on from them;
    where they are spread over several, all call this and one of them with `write`. Raises `RunError` where the disk has
    no room; the old checkpoint stays."""
    tensors = {}
    for name, weight in weights.items():
        moments = optimizer.state[weight]
        for kind, tensor in (
            ("weight", weight),
            ("best", best[name]),
            ("first", moments["exp_avg"]),
            ("second", moments["exp_avg_sq"]),
        ):
            found = whole(tensor.detach())
            if write:
                tensors[f"{kind}/{name}"] = found.contiguous()
    if not write:
        return
    temporary = folder / f".{CHECKPOINT}.{os.getpid()}.tmp"
    try:
        told = json.dumps(asdict(state))
        check = reduce(_check, tensors.values(), zlib.crc32(told.encode()))
        save_file(tensors, temporary, metadata={"state": told, "crc32": str(check)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / CHECKPOINT)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise RunError(
            f"{folder / CHECKPOINT}: {needed:,} bytes cannot be written ({error}). Make room on the disk and type the "
            "same command again: training goes on from its last checkpoint."
        ) from error


def load_checkpoint(
    folder: Path,
    weights: Mapping[str, nn.Parameter],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | Zero,
) -> State:
    """Put everything back as it was; a new state where there is no checkpoint. Raises `RunError` for a damaged one."""
    path = folder / CHECKPOINT
    if not path.exists():
        return State()
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            about = file.metadata()
            state, check = json.loads(about["state"]), zlib.crc32(about["state"].encode())
            for name, weight in weights.items():
                kinds = [file.get_tensor(f"{kind}/{name}") for kind in ("weight", "best", "first", "second")]
                check = reduce(_check, kinds, check)
                weight.copy_(like(weight, kinds[0]))
                best[name].copy_(like(best[name], kinds[1]))
                optimizer.state[weight] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": like(weight, kinds[2]),
                    "exp_avg_sq": like(weight, kinds[3]),
                }
        if about.get("crc32", str(check)) != str(check):
            raise ValueError("its checksum is another one")
        return State(**{**state, "best_score": tuple(state["best_score"])})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). Delete it, and type the same command again: training starts over."
        ) from error


def _check(before: int, tensor: torch.Tensor) -> int:
    """The checksum of all tensors up to this one; safetensors has none."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data, before)
