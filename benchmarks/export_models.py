"""SmolVLM-500M, Qwen2-VL-2B and -7B in their true dimensions with random bfloat16 weights, and a random adapter.

What an export costs depends on the dimensions only; these are the public `config.json`s'. Embeddings are larger than
all that the layers add, and the output layer is the embedding: so the answers, the last token again and again, are the
same at every precision, as a trained model's nearly are. Vocabularies have their true size. Pictures are one tile
(SmolVLM) or at most 256 image tokens (Qwen2-VL), where nothing else is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpa_edge.benchmarks.reference_models import CHAT_TEMPLATE
from mpa_edge.benchmarks.smolvlm import IMAGE_TOKENS, TILE, full_tokenizer, smolvlm_config
from mpa_edge.processors import without_videos
from mpa_edge.records import write_atomic

if TYPE_CHECKING:
    import torch

QWEN_TEXT: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN_7B_TEXT = QWEN_TEXT | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for line in message['content'] %}"
    "{% if line['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ line['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_run(name: str, run: Path) -> Path:
    """Write a run folder whose student is a random adapter on a random model, which lies beside it; the model."""
    import torch

    torch.manual_seed(0)
    with made_in(torch.bfloat16):
        model, processor = MODELS[name]()
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight.normal_()
            model.get_output_embeddings().weight.copy_(embedding)
    base = run.with_name(f"{run.name}-base")
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(base)
    processor.save_pretrained(base)
    _write_adapter(model, base, run / "student")
    write_atomic(run / "run.json", json.dumps({"config": {"task": "reference"}}) + "\n")
    return base


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights that are made in the body have this type."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_smolvlm(longest_edge: int = TILE) -> tuple[Any, Any]:
    """(SmolVLM-500M, its processor); a longest edge of 2,048 pixels is the published model's."""
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = full_tokenizer()
    images = Idefics3ImageProcessorPil(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)
    config = smolvlm_config("500M", image_token_id=processor.image_token_id, **_ids(tokenizer))
    return Idefics3ForConditionalGeneration(config), processor


def random_qwen2_vl(
    text: dict[str, Any] = QWEN_TEXT, *, tied: bool = True, most_image_tokens: int = 256
) -> tuple[Any, Any]:
    """(a Qwen2-VL, its processor)."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    tokenizer = full_tokenizer(text["vocab_size"] - len(marks))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks.values()]})
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28 * 28, "longest_edge": most_image_tokens * 28 * 28})
    processor = without_videos(Qwen2VLProcessor)(images, tokenizer, chat_template=QWEN_TEMPLATE)
    tokens: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()
    }
    config = Qwen2VLConfig(
        text_config={**text, **_ids(tokenizer)},
        vision_config=QWEN_VISION | {"hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        **tokens,
    )
    return Qwen2VLForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "smolvlm-500m": random_smolvlm,
    "qwen2-vl-2b": random_qwen2_vl,
}


def _ids(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_adapter(model: Any, base: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from mpa_edge.trainable import Anatomy

    names = Anatomy(model).linears(["language", "connector"])
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.002)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
