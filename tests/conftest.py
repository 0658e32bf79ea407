"""Shared fixtures: a small randomly initialised model in the SmolVLM architecture, made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The smallest machine that the suite must run on has two cores; one thread each keeps runs comparable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# SmolVLM's own template.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for line in message['content'] %}"
    "{% if line['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ line['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
]
ROWS_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
TEXT = (
    "What does the sign say? What colour is the sign? How many red circles are there? Which bar is the highest?\n\n"
    "The price is 12.50, the value of the bar is 37.\nYes, no, left, right, top, bottom, red, green, blue, yellow.\n"
    "Is there a triangle in the picture? What is written on the label? The sum of all bars is 120.\n\n"
)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer as SmolLM's: digits split, GPT-2 pre-tokenizer, the pieces that llama.cpp looks up."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([TEXT, "\n\n " * 50], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL + ROWS_COLUMNS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def make_idefics3(
    folder: Path, *, split: bool = True, longest_edge: int = 192, tied: bool = True, seed: int = 0
) -> Path:
    """Write a random Idefics3 (tiles of 64 pixels, 16 image tokens each) with its processor; returns the folder."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer()
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": 64}, do_image_splitting=split
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=CHAT_TEMPLATE)
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
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
        },
    )
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        # The usual initialisation (0.02) gives nearly flat logits; spread them so that an argmax means something.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA random model.\n")
    return folder


def make_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Qwen2-VL with the files of its processor; returns the folder."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", *tokens.values()]})
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}

    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 4 * 16 * 16, "longest_edge": 36 * 16 * 16}
    )
    config = Qwen2VLConfig(
        **ids,
        tie_word_embeddings=True,
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: pictures become up to 3 x 3 tiles of 64 pixels plus the overview."""
    return make_idefics3(tmp_path_factory.mktemp("tiny") / "tiny-idefics3")


@pytest.fixture(scope="session")
def tiny_one_tile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_idefics3`, but every picture is one tile, untied output weights."""
    return make_idefics3(tmp_path_factory.mktemp("tiny") / "tiny-one-tile", longest_edge=64, tied=False, seed=1)


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL: pictures of 4 to 36 image tokens, positions in three axes."""
    return make_qwen2_vl(tmp_path_factory.mktemp("tiny") / "tiny-qwen2-vl")


@pytest.fixture(scope="session")
def onnx_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`onnx_graphs(model)`: where `to_onnx` keeps the float32 graphs of a model folder; each is exported once."""
    root = tmp_path_factory.mktemp("onnx-graphs")
    return lambda model: root / model.name


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_idefics3: Path) -> Path:
    """A LoRA adapter with random, non-zero weights on `tiny_idefics3`."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "student", tiny_idefics3)


@pytest.fixture
def adapter_on(tmp_path: Path) -> Callable[..., Path]:
    """`adapter_on(base, scale=…, **LoraConfig options)`: a fresh adapter folder on a base of the test's choice."""
    return lambda base, **options: make_adapter(tmp_path / "adapter", base, **options)


def make_adapter(folder: Path, base: Path, *, scale: float = 0.05, **options: Any) -> Path:
    """Write a peft adapter for the text model's attention; `scale` 0 leaves it without effect."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": r".*text_model.*\.(q|v)_proj", **options}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(scale)
    peft_model.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    return folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., Any]:
    """`picture(width, height, seed)`: a deterministic RGB picture with edges and noise."""
    return make_picture


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


@pytest.fixture(scope="session")
def gguf_bundle() -> Callable[..., Any]:
    """`gguf_bundle(model, folder, quant, name=…, template=…, tokens=…)` converts a model into `folder` and returns its
    manifest, without the checks that an export makes; it is not written."""

    def make(
        model: Path, folder: Path, quant: str = "f16", *, name: str = "tiny", template: str = "{question}", tokens: int
    ) -> Any:
        from mpa_edge.bundle import Bundle, Source
        from mpa_edge.export.families import family_of, read_config
        from mpa_edge.export.merged import Names
        from mpa_edge.export.to_gguf import to_gguf
        from mpa_edge.processors import load_processor

        files, _ = to_gguf(model, {quant: folder}, Names(name))[quant]
        config, processor = read_config(model), load_processor(model)
        family = family_of(config)
        return Bundle(
            name=f"{name}-{quant}",
            family=family.name,
            engine="llama.cpp",
            quantization=quant,
            files=tuple(files),
            image=family.image_settings(config, processor),
            prompt=family.prompt_settings(config, processor, template, tokens),
            source=Source(student=name, tool_version="0"),
        )

    return make
