"""Small randomly initialised models of every family, with the files of their processors, and what else tests make.

Each maker writes a model folder as a hub has it and returns the folder; `width` is the text model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_tokenizers import (
    INTERNVL_SPECIAL,
    QWEN_SPECIAL,
    make_llama_tokenizer,
    make_qwen_tokenizer,
    make_smol_tokenizer,
)

# The templates are the models' own.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}"
    "{{ '<video>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_idefics3(
    folder: Path, *, split: bool = True, longest_edge: int = 192, tied: bool = True, seed: int = 0, width: int = 64
) -> Path:
    """SmolVLM's architecture: tiles of 64 pixels, 16 image tokens each."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_smol_tokenizer()
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": 64}, do_image_splitting=split
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=SMOLVLM_TEMPLATE)
    config = Idefics3Config(
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            **_text_config(tokenizer, width),
            "tie_word_embeddings": tied,
        },
    )
    return _save(folder, Idefics3ForConditionalGeneration, config, processor, tokenizer, seed)


def make_qwen2_vl(folder: Path, *, seed: int = 0, width: int = 64) -> Path:
    """Patches of 8 pixels, 4 to 36 image tokens of 16 x 16 pixels, positions in three axes."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = make_qwen_tokenizer(QWEN_SPECIAL)
    config = Qwen2VLConfig(
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=True,
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": width,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        text_config={**_text_config(tokenizer, width), "rope_parameters": _mrope(width)},
    )
    processor = _qwen_processor(Qwen2VLProcessor, tokenizer, patch=8, most=36)
    return _save(folder, Qwen2VLForConditionalGeneration, config, processor, tokenizer, seed)


def make_qwen2_5_vl(folder: Path, *, seed: int = 0, width: int = 64) -> Path:
    """Patches of 14 pixels, 4 to 48 image tokens; windows of 4 x 4 tokens in every layer but the second and fourth.

    Patch and window are the real model's: llama.cpp takes a window of 112 pixels for granted.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = make_qwen_tokenizer(QWEN_SPECIAL)
    config = Qwen2_5_VLConfig(
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=True,
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        text_config={**_text_config(tokenizer, width), "rope_parameters": _mrope(width)},
    )
    processor = _qwen_processor(Qwen2_5_VLProcessor, tokenizer, patch=14, most=48)
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor, tokenizer, seed)


def make_llava(folder: Path, *, tower: str = "clip", seed: int = 0, width: int = 64) -> Path:
    """LLaVA-1.5's architecture with a CLIP tower (shortest edge, centre crop; 16 image tokens of 14 x 14 pixels), or
    TinyLLaVA's with a SigLIP one (`tower="siglip"`: squeezed to a square, all of the tower's tokens)."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = make_llama_tokenizer()
    clip = tower == "clip"
    images: Any = (
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        if clip
        else SiglipImageProcessorPil(size={"height": 56, "width": 56})
    )
    strategy = "default" if clip else "full"
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if clip else 0,
        chat_template=LLAVA_TEMPLATE,
    )
    config = LlavaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "model_type": "clip_vision_model" if clip else "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            **({"projection_dim": 32} if clip else {"vision_use_head": False}),
        },
        text_config={"model_type": "llama", **_text_config(tokenizer, width), "tie_word_embeddings": False},
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor, tokenizer, seed)


def make_internvl(folder: Path, *, seed: int = 0, width: int = 64) -> Path:
    """InternVL3's architecture: up to 6 tiles of 64 pixels and a thumbnail, 16 image tokens each."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    from mpa_edge.processors import without_videos

    tokenizer = make_qwen_tokenizer(
        INTERNVL_SPECIAL,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, max_patches=6, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    processor = without_videos(InternVLProcessor)(
        images, tokenizer, image_seq_length=16, chat_template=INTERNVL_TEMPLATE
    )
    config = InternVLConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
            "image_size": [64, 64],
            "patch_size": [8, 8],
        },
        text_config={"model_type": "qwen2", **_text_config(tokenizer, width), "tie_word_embeddings": False},
    )
    return _save(folder, InternVLForConditionalGeneration, config, processor, tokenizer, seed)


def make_adapter(folder: Path, base: Path, *, scale: float = 0.05, **options: Any) -> Path:
    """Write a peft adapter for the text model's attention; `scale` 0 leaves it without effect."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_pretrained(base)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*(text|language)_model.*\.(q|v)_proj",
        **options,
    }
    peft_model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(scale)
    peft_model.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    return folder


def make_picture(width: int, height: int, seed: int = 0) -> Any:
    """A deterministic RGB picture with edges and gradients."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2 + 1, height // 2 + 1), fill=(220, 30, 40))
    draw.rectangle((width // 3, height // 3, width - 1, height - 1), outline=(0, 0, 255))
    return image


def _text_config(tokenizer: Any, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # What a layer does to its input grows with the root of its width; so do the errors of its weights.
        "initializer_range": 0.02 * (64 / width) ** 0.5,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _mrope(width: int) -> dict[str, Any]:
    sections = [part * width // 64 for part in (2, 3, 3)]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


def _qwen_token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen_processor(kind: Any, tokenizer: Any, patch: int, most: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mpa_edge.processors import without_videos

    token = (2 * patch) ** 2
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": 4 * token, "longest_edge": most * token}
    )
    return without_videos(kind)(images, tokenizer, chat_template=QWEN_TEMPLATE)


def _save(folder: Path, kind: Any, config: Any, processor: Any, tokenizer: Any, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = kind(config)
    with torch.no_grad():
        # The usual initialisation (0.02) gives nearly flat logits; spread them so that an argmax means something.
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0.005 < parameter.std() < 0.1:
                parameter.mul_(4)
            elif parameter.ndim > 1:  # zeros, which hide a lost position, or so large that a softmax takes one of all
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA random model.\n")
    return folder
