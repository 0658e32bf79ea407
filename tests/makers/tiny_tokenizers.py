"""Small tokenizers of the kinds that the families use, trained on a few lines: SmolLM's, Qwen2's and Llama's."""

from __future__ import annotations

import json
from typing import Any

TEXT = (
    "What does the sign say? What colour is the sign? How many red circles are there? Which bar is the highest?\n\n"
    "The price is 12.50, the value of the bar is 37.\nYes, no, left, right, top, bottom, red, green, blue, yellow.\n"
    "Is there a triangle in the picture? What is written on the label? The sum of all bars is 120.\n\n"
)
SMOL_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
]
ROWS_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
INTERNVL_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_smol_tokenizer() -> Any:
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
        [AddedToken(token, normalized=False, special=True) for token in SMOL_SPECIAL + ROWS_COLUMNS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def make_qwen_tokenizer(special: list[str], **named: Any) -> Any:
    """A byte-level BPE tokenizer as Qwen2's: NFC, its own split, no BOS; `named` are further tokens with attributes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([TEXT, "\n\n " * 50], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    whole = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        **named,
    )
    whole.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return whole


def make_llama_tokenizer() -> Any:
    """A tokenizer as Llama-2's `tokenizer.json`: SentencePiece's pieces as BPE, bytes for unknown characters, "▁" for
    spaces and before the text, BOS from the post-processor; with LLaVA's `<image>` and `<pad>` after the others."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _llama_pieces()
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
    )


def _llama_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces in Llama's order, and as merges every way to make one of two others, best piece first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=420, show_progress=False))
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    # SentencePiece puts the learned pieces first and single characters last.
    learned.sort(key=lambda piece: len(piece) == 1)
    vocabulary = {piece: place for place, piece in enumerate([*first, *learned])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return vocabulary, merges
