"""What an inference engine must do; prompts, pixels and the choice of tokens are the same for all, and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpa_edge.runtime.families import Cut

Features = NDArray[np.float32]
Logits = NDArray[np.float32]
Positions = NDArray[np.int64]


class Engine(Protocol):
    """One loaded model with one key-value cache. Not thread-safe: one caller at a time."""

    name: str

    def encode(self, cut: Cut) -> Features:
        """Image features of one picture: float32 (image tokens, hidden)."""
        ...

    def prefill(
        self,
        token_ids: Sequence[int],
        features: Features,
        positions: Positions | None = None,
        *,
        all_logits: bool = False,
    ) -> Logits:
        """Forget the cache, read a whole prompt, and return the logits that follow it.

        `features` (image tokens, hidden) replace the image tokens in `token_ids`, in order; their count must match.
        `positions` are the tokens' position ids (axes, tokens), see `Family.positions`. Returns (vocabulary,) for the
        last position, or (positions, vocabulary) with `all_logits`.
        """
        ...

    def extend(self, token_ids: Sequence[int]) -> Logits:
        """Append text tokens, at least one, to the cache and return the logits (vocabulary,) that follow the last.

        Their positions go on after the largest one so far.
        """
        ...

    def mark(self) -> None:
        """Remember where the cache ends now. There is one mark; the next prefill forgets it."""
        ...

    def rewind(self) -> bool:
        """Forget all that came after the mark, which stays. False where there is none, or this model cannot."""
        ...

    def close(self) -> None:
        """Release native memory."""
        ...
