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
    likely are cut off so that `top_p` remains (nucleus sampling, Holtzman et al. 2020). Computed where the scores are,
    in double precision, so that a batch's rounding does not decide the draw. (A GPU sorts a batch of vocabularies of
    150,000 tokens in milliseconds, a CPU core takes half a second.)
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self._rows = [random.Random(seed) for seed in seeds]
        self._temperature = temperature
        self._top_p = top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (rows, vocabulary) in, the same with all but one token per row at minus infinity out."""
        # Apple's GPU has no double precision.
        precise = scores.cpu() if scores.device.type == "mps" else scores
        chances = torch.softmax(precise.double() / self._temperature, dim=-1)
        if self._top_p < 1:
            chances = _nucleus(chances, self._top_p)
        sums = chances.cumsum(dim=-1)
        uniform = torch.tensor([[row.random()] for row in self._rows], dtype=torch.float64).to(sums.device)
        draws = uniform * sums[:, -1:]
        chosen = torch.searchsorted(sums, draws, right=True).clamp(max=sums.shape[-1] - 1).to(scores.device)
        kept = torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)
        return kept  # type: ignore[return-value]


def _nucleus(chances: torch.Tensor, top_p: float) -> torch.Tensor:
    """Tokens as likely as the last one that is needed stay with it."""
    ordered = chances.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    return chances.masked_fill(chances < ordered.gather(1, last), 0.0)
