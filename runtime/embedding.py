"""What the engines share that are fed embeddings: ONNX Runtime and OpenVINO. The library computes, here is the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpa_edge.bundle import one_line
from mpa_edge.errors import ModelError
from mpa_edge.runtime.engine import Features, Logits, Positions

# Tiles that go through the vision encoder together: attention over more of them takes memory and no less time.
TILES_AT_ONCE = 4


class Place(NamedTuple):
    """Where a cache ends: tokens in it, and the position of the next one. These are not the same where a picture has
    rows and columns."""

    length: int = 0
    position: int = 0

    def numbered(self, count: int, positions: Positions | None = None) -> tuple[Positions, Place]:
        """Positions (axes or 1, tokens) of the next `count` tokens, and the place after them."""
        if positions is None:
            positions = np.arange(self.position, self.position + count, dtype=np.int64)[None]
        return positions, Place(self.length + count, int(positions.max()) + 1)


def shaped(positions: Positions, axes: int) -> Positions:
    """Positions (axes or 1, tokens) as a graph takes them: (batch, tokens), or (axes, batch, tokens) where it has
    axes."""
    if not axes:
        return positions
    return np.ascontiguousarray(np.broadcast_to(positions, (axes, positions.shape[1]))[:, None])


def put_features(embeds: Features, token_ids: NDArray[np.int64], image_token: int, features: Features) -> None:
    """Put features (image tokens, hidden) in the image tokens' places of embeddings (1, tokens, hidden).

    Raises `ModelError` unless they are as many, and as wide.
    """
    places = np.flatnonzero(token_ids == image_token)
    if len(places) != len(features):
        raise ModelError(f"{len(places)} image tokens in the prompt for {len(features)} image features")
    if embeds.shape[-1] != features.shape[-1]:
        raise ModelError(
            f"image features are {features.shape[-1]} wide, embeddings {embeds.shape[-1]}: the bundle's graphs do not "
            "belong together"
        )
    embeds[0, places] = features


class EmbeddingEngine:
    """Prompts for an engine that reads embeddings: see `Engine.prefill` and `Engine.extend`. The engine computes."""

    _image_token: int

    def prefill(
        self,
        token_ids: Sequence[int],
        features: Features,
        positions: Positions | None = None,
        *,
        all_logits: bool = False,
    ) -> Logits:
        """See `Engine.prefill`."""
        ids = np.asarray(token_ids, np.int64)
        embeds = self._embed(ids)
        put_features(embeds, ids, self._image_token, features)
        self._forget()
        logits = self._step(embeds, 0 if all_logits else 1, positions)
        last: Logits = logits[-1]
        return logits if all_logits else last

    def extend(self, token_ids: Sequence[int]) -> Logits:
        """See `Engine.extend`."""
        logits: Logits = self._step(self._embed(np.asarray(token_ids, np.int64)), 1)[-1]
        return logits

    def _forget(self) -> None:
        """Empty the cache, and drop the mark."""
        raise NotImplementedError

    def _embed(self, ids: NDArray[np.int64]) -> Features:
        """Embeddings (1, tokens, hidden) of token ids (tokens), free to be written into."""
        raise NotImplementedError

    def _step(self, embeds: Features, keep: int, positions: Positions | None = None) -> Logits:
        """Read embeddings on top of the cache; the logits of the last `keep` positions, of all for 0."""
        raise NotImplementedError


@contextmanager
def running(graph: str) -> Iterator[None]:
    """Around a library's call that computes: whatever it raises becomes a `ModelError`, in one line."""
    try:
        yield
    except Exception as error:  # the C++ sides raise a dozen kinds
        raise ModelError(
            f"the {graph} cannot be run; does its file belong to this bundle? {one_line(str(error))}"
        ) from error
