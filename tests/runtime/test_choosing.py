"""The choice of tokens: broken logits, sampling by distribution and seed, log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from mpa_edge.errors import ModelError
from mpa_edge.runtime.choosing import Chooser, log_probability
from mpa_edge.runtime.vlm import Decoding


def test_log_probabilities_are_those_of_torch() -> None:
    import torch

    logits = np.random.default_rng(0).normal(0, 6, 50_000).astype(np.float32)
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    for token in (0, 17, int(logits.argmax()), int(logits.argmin())):
        assert log_probability(logits, token) == pytest.approx(float(wanted[token]), abs=1e-5)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300, 9e-7])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    for logits in (np.array([1.0, 1.2, 0.3], np.float32), np.array([-3e38, 3e38, 0], np.float32)):
        assert Chooser(Decoding(temperature=temperature, seed=1))(logits) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        Chooser(Decoding())(np.full(5, bad, np.float32))


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    draws = [Chooser(Decoding(temperature=1.0, seed=seed))(logits) for seed in range(600)]
    shares = np.bincount(draws, minlength=3) / 600
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.07)
    assert draws == [Chooser(Decoding(temperature=1.0, seed=seed))(logits) for seed in range(600)]


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    drawn = {Chooser(Decoding(temperature=1.0, top_p=0.7, seed=seed))(logits) for seed in range(200)}
    assert drawn == {0, 1}
    assert {Chooser(Decoding(temperature=1.0, top_p=0.01, seed=s))(logits) for s in range(50)} == {0}


def test_a_low_temperature_is_greedy() -> None:
    logits = np.array([1.0, 1.2, 0.3], np.float32)
    assert {Chooser(Decoding(temperature=1e-3, seed=seed))(logits) for seed in range(50)} == {1}
