"""Logits to tokens, and how probable the chosen ones are."""

from __future__ import annotations

import numpy as np

from mpa_edge.errors import ModelError
from mpa_edge.runtime.engine import Logits
from mpa_edge.runtime.vlm import Decoding

# Logits that are divided by less can overflow; long before that, the best token has all of the probability.
LEAST_TEMPERATURE = 1e-6


class Chooser:
    """Logits to a token: greedy below `LEAST_TEMPERATURE`, else nucleus sampling with its own seeded generator."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._random = np.random.default_rng(decoding.seed)

    def __call__(self, logits: Logits) -> int:
        """The chosen token of logits (vocabulary,). Raises `ModelError` when they are not numbers."""
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise ModelError("the engine's logits are not finite: the weights, or their quantization, are broken")
        if self._decoding.temperature < LEAST_TEMPERATURE:
            return best
        scaled = logits.astype(np.float64) / self._decoding.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        # The smallest set whose mass reaches top_p; the token that crosses the line belongs to it.
        kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), self._decoding.top_p)) + 1]
        return int(self._random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


def log_probability(logits: Logits, token: int) -> float:
    """The natural logarithm of a token's probability under logits (vocabulary,): log-softmax at that place.

    The exponentials stay in single precision (a vocabulary of 50,000 in 0.1 ms); their sum does not.
    """
    shifted = logits - logits.max()
    return float(shifted[token]) - float(np.log(np.exp(shifted).sum(dtype=np.float64)))
