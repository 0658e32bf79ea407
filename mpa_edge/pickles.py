"""Weights are read from safetensors and nothing else: to open a pickle is to run the program that it may hold."""

from __future__ import annotations

from pathlib import Path

from mpa_edge.errors import ModelError

# As torch, transformers and peft name them.
SUFFIXES = frozenset((".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"))


def refuse_pickles(folder: Path, weights: str = "*.safetensors") -> None:
    """`ModelError` for a folder that holds pickles and nothing called `weights`; pickles beside those are left alone,
    unread. Where there is neither, whoever opens the folder says what is missing."""
    if any(folder.glob(weights)):
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    if found:
        raise ModelError(
            f"{folder / found[0]} is a pickle: to open it would run whatever program it holds. Only safetensors are "
            "read. Where you trust it, load it with transformers or peft and write it again with save_pretrained."
        )
