"""SmolVLM-256M and -500M in their true dimensions with random weights: what they compute costs as much as the trained
models' work.

256,484,928 and 507,482,304 weights, as their model cards say: SigLIP base (tiles of 512 pixels, patches of 16), pixel
shuffle of 4 by 4 to 64 image tokens, SmolLM2-135M or -360M with an output layer of its own. The tokenizer is the
reference pair's, filled up to the true vocabulary with merges of its own tokens; every picture is one tile.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpa_edge.benchmarks.reference_models import CHAT_TEMPLATE, SPECIAL, make_tokenizer

if TYPE_CHECKING:
    from transformers import Idefics3Config, PreTrainedTokenizerFast

TILE, IMAGE_TOKENS, VOCABULARY = 512, 64, 49280
SHUFFLE = 4  # patches in each direction that become one image token
VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": TILE,
    "patch_size": 16,
}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
}
TEXTS: dict[str, dict[str, Any]] = {
    "256M": {
        **TEXT,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "500M": {
        **TEXT,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}


def smolvlm_config(size: str = "256M", **ids: int) -> Idefics3Config:
    """The configuration of "256M" or "500M"; `ids` are special tokens' ids."""
    from transformers import Idefics3Config

    special = {name: value for name, value in ids.items() if name != "image_token_id"}
    given: dict[str, Any] = dict(ids)
    return Idefics3Config(
        text_config={**TEXTS[size], **special, "tie_word_embeddings": False},
        vision_config=VISION,
        scale_factor=SHUFFLE,
        tie_word_embeddings=False,
        **given,
    )


def write_random_smolvlm(folder: Path, size: str = "256M", *, seed: int = 0) -> Path:
    """Write model, tokenizer and processor to a folder (4 bytes a weight); the folder."""
    import torch
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = full_tokenizer()
    images = Idefics3ImageProcessorPil(size={"longest_edge": TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = smolvlm_config(size, image_token_id=processor.image_token_id, **ids)
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def full_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """The reference pair's tokenizer with further merges, of any two of its tokens, up to `size` tokens."""
    from tokenizers import models

    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary, merges = state["vocab"], [tuple(pair) for pair in state["merges"]]
    words = [token for token in vocabulary if token not in SPECIAL]
    for first, second in product(words, words):
        if len(vocabulary) >= size:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    return tokenizer
