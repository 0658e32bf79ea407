"""The random models are what they stand for: as many weights, and a tokenizer for the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from mpa_edge.benchmarks.reference_models import SPECIAL, make_tokenizer
from mpa_edge.benchmarks.smolvlm import (
    IMAGE_TOKENS,
    SHUFFLE,
    TILE,
    VISION,
    VOCABULARY,
    full_tokenizer,
    smolvlm_config,
)


@pytest.mark.parametrize(("size", "weights"), [("256M", 256_484_928), ("500M", 507_482_304)])
def test_the_model_has_the_true_size(size: str, weights: int) -> None:
    """As its model card says; made without memory."""
    from transformers import Idefics3ForConditionalGeneration

    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(smolvlm_config(size))
    assert sum(weight.numel() for weight in model.parameters()) == weights
    assert (TILE // VISION["patch_size"]) ** 2 // SHUFFLE**2 == IMAGE_TOKENS


def test_the_vocabulary_is_full() -> None:
    tokenizer, plain = full_tokenizer(), make_tokenizer()
    assert len(tokenizer) == VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == plain.convert_tokens_to_ids(SPECIAL)
    text = "<image>What does the sign say? 12 EUR\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
