"""Sampling that depends on the row alone: not on the batch it is in, nor on what was sampled before it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from PIL.Image import Image
from transformers import LogitsProcessor


def seed_of(seed: int, image: Image, prompt: str) -> int:
    """The seed of one row, drawn from the caller's seed and the content of picture and prompt."""
    content = f"{seed} {image.size} {prompt}\n".encode() + image.tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


class RowSampling(LogitsProcessor):
    """Turns greedy decoding into sampling: leaves only the token that each row's own generator draws.

    One uniform number per row and step, looked up in the cumulated probabilities at `temperature`, of which the least
    likely are cut off so that `top_p` remains (nucleus sampling, Holtzman et al. 2020). Computed in double precision on
    the CPU, so that a batch's rounding does not decide the draw.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self._rows = [random.Random(seed) for seed in seeds]
        self._temperature = temperature
        self._top_p = top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (rows, vocabulary) in, the same with all but one token per row at minus infinity out."""
        chances = torch.softmax(scores.cpu().double() / self._temperature, dim=-1)
        if self._top_p < 1:
            chances = _nucleus(chances, self._top_p)
        sums = chances.cumsum(dim=-1)
        draws = torch.tensor([[row.random()] for row in self._rows], dtype=torch.float64) * sums[:, -1:]
        chosen = torch.searchsorted(sums, draws, right=True).clamp(max=sums.shape[-1] - 1).to(scores.device)
        kept = torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)
        return kept  # type: ignore[return-value]


def _nucleus(chances: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, places = chances.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return chances.masked_fill((before >= top_p).gather(1, places.argsort(dim=-1)), 0.0)
