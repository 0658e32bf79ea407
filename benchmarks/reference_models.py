"""The architecture of the reference pair: SmolVLM's (idefics3) with a few million weights, tokenizer, processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpa_edge.benchmarks.world_questions import PHRASINGS
from mpa_edge.tasks import task_named

if TYPE_CHECKING:
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast

IMAGE_TOKENS = 36
"""12×12 patches, shuffled 2×2 into one token each."""

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's own."""

BOS, EOS, PAD = "<|im_start|>", "<end_of_utterance>", "<|im_end|>"
SPECIAL = [
    "<|endoftext|>",
    BOS,
    PAD,
    EOS,
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]

ANSWER_WORDS = (
    "yes no on the left on the right at the top at the bottom in the middle rising falling up down night day time "
    "red green blue yellow orange purple pink brown gray black white"
)


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and depths of one model. Text widths are multiples of 256, the block of llama.cpp's k-quants."""

    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    text_inner: int


SIZES = {
    "teacher": Size(vision_width=192, vision_layers=5, text_width=256, text_layers=2, text_inner=1024),
    "student": Size(vision_width=128, vision_layers=4, text_width=256, text_layers=2, text_inner=256),
}


def tokenizer_corpus() -> list[str]:
    """What the merges are learned from: question templates, prompts and answer words, all lower case.

    Capitals and digits have no merges: signs, prices and names stay spelled character by character.
    """
    lines = [phrasing.template for rows in PHRASINGS.values() for phrasing in rows]
    lines = [line.split("{")[0] + " ".join(part.split("}")[-1] for part in line.split("{")[1:]) for line in lines]
    words = [row.split("{")[0] for row in lines]
    prompts = [task_named("reference").annotate_prompt, "Question:", "Answer:", "Assistant:", "User:"]
    return lines + [f" {word}" for word in (ANSWER_WORDS + " " + _slot_words()).split()] + prompts * 4 + words


def _slot_words() -> str:
    """Names of shapes and things, singular and plural."""
    from mpa_edge.benchmarks.world_scenes import THINGS
    from mpa_edge.benchmarks.world_shapes import SHAPES

    return " ".join([*SHAPES, *THINGS, *(f"{shape}s" for shape in SHAPES if shape not in ("cross",))])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with every byte, "\\n", "\\n\\n", the merges of `tokenizer_corpus`, SmolVLM's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(tokenizer_corpus() * 2), *["\n\n"] * 8], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[4:],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """SmolVLM's processor for pictures of one tile: the longest edge becomes 96 pixels and nothing is split."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": 96}, max_image_size={"longest_edge": 96}, resample=1
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def make_config(size: Size, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The idefics3 configuration of a size."""
    from transformers import Idefics3Config

    vocabulary = -(-len(tokenizer) // 64) * 64
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "model_type": "llama",
        "hidden_size": size.text_width,
        "intermediate_size": size.text_inner,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_width // 64,
        "num_key_value_heads": size.text_width // 128,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **ids,
    }
    vision = {
        "hidden_size": size.vision_width,
        "intermediate_size": 4 * size.vision_width,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_width // 32,
        "image_size": 96,
        "patch_size": 8,
    }
    return Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        image_token_id=int(str(tokenizer.convert_tokens_to_ids("<image>"))),
        tie_word_embeddings=True,
        **ids,
    )


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
    """An untrained model of one of `SIZES`."""
    from transformers import Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration(make_config(SIZES[name], tokenizer))
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ids, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model
