"""SmolVLM-256M in its true dimensions with random weights: what it computes costs as much as the trained model's.

256,484,928 weights, as its model card says: SigLIP base (tiles of 512 pixels, patches of 16), pixel shuffle of 4 by 4
to 64 image tokens, SmolLM2-135M with an output layer of its own. The tokenizer is the reference pair's, since only its
length could matter and the vocabulary of the model is the true one; every picture is one tile.
"""

from __future__ import annotations

from pathlib import Path

from mpa_edge.benchmarks.reference_models import CHAT_TEMPLATE, make_tokenizer

TILE, IMAGE_TOKENS, VOCABULARY = 512, 64, 49280
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": TILE,
    "patch_size": 16,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
}


def write_random_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """Write model, tokenizer and processor to a folder (1 GB); the folder."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer()
    images = Idefics3ImageProcessorPil(size={"longest_edge": TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Idefics3Config(
        text_config={**TEXT, **ids, "tie_word_embeddings": False},
        vision_config=VISION,
        scale_factor=4,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
