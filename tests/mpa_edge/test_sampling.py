"""Sampling row by row: the nucleus, and draws that depend on the row's seed alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mpa_edge.sampling import RowSampling


def drawn(scores: torch.Tensor, seeds: list[int], *, top_p: float = 1.0, temperature: float = 1.0) -> list[int]:
    """The one token that is left of each row."""
    rows = RowSampling(seeds, temperature, top_p)(cast(Any, None), cast(Any, scores))
    assert torch.isfinite(rows).sum(dim=-1).tolist() == [1] * len(seeds)
    return cast("list[int]", rows.argmax(dim=-1).tolist())


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {1}), (0.6, {1, 3}), (0.85, {1, 3, 0}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p: float, kept: set[int]) -> None:
    scores = torch.tensor([0.16, 0.55, 0.04, 0.25]).log().expand(300, -1)
    assert set(drawn(scores, list(range(300)), top_p=top_p)) == kept


def test_tokens_that_are_equally_likely_stay_or_go_together() -> None:
    scores = torch.zeros(200, 4)
    assert set(drawn(scores, list(range(200)), top_p=0.4)) == {0, 1, 2, 3}


def test_a_draw_depends_on_neither_the_batch_nor_the_order() -> None:
    scores = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))
    together = drawn(scores, [3, 1, 4, 1, 5, 9], top_p=0.9)
    assert len(set(together)) > 1
    assert [
        drawn(scores[row : row + 1], [seed], top_p=0.9)[0] for row, seed in enumerate([3, 1, 4, 1, 5, 9])
    ] == together


def test_frequencies_are_the_probabilities() -> None:
    chances = torch.tensor([0.1, 0.6, 0.3])
    found = torch.bincount(torch.tensor(drawn(chances.log().expand(4000, -1), list(range(4000)))), minlength=3) / 4000
    assert torch.allclose(found, chances, atol=0.03)
