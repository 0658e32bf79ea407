"""The tokenizer on the way to GGUF: which of llama.cpp's pre-tokenizers it is, and whether llama.cpp agrees with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
from transformers import AutoTokenizer

from mpa_edge.errors import ExportError
from mpa_edge.export.gguf_reader import Reader
from mpa_edge.runtime import llamacpp

# What llama.cpp's multimodal part looks up by its text, by model type; it fails inside `llama_decode` where one is
# missing.
IDEFICS3 = ("\n", "\n\n", "<fake_token_around_image>", "<global-img>")
QWEN_VL = ("<|vision_start|>", "<|vision_end|>")
LOOKED_UP = {
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "internvl": ("<img>", "</img>"),
}
SPACE = "▁"
NFC = {"type": "NFC"}

# Split patterns of byte-level BPE tokenizers -> llama.cpp's name for that pre-tokenizer.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}

SAMPLE_TEXTS = (
    "What does the sign say?",
    "12.50 EUR, 3 apples and 1314151 pears: it's 'quoted' & (bracketed)!",
    "two  spaces,\ttabs\n\nand   lines \n",
    "Straße, naïve café, Здравствуйте, 你好，世界 🦙🚀",
)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE `tokenizer.json`, by its structure.

    The converter knows tokenizers by the hash of a sample's token ids; a fine-tune that added a token, or a tokenizer
    of one's own, has another hash and the same structure. None where the structure is not known. Unicode's NFC, which
    Qwen2's has as a normalizer, is left out by llama.cpp for every tokenizer: nearly all text has that form.
    """
    normalizer = tokenizer.get("normalizer")
    if tokenizer["model"]["type"] != "BPE" or tokenizer["model"].get("byte_fallback") or normalizer not in (None, NFC):
        return None
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return "smollm"
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True):
            return PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
    return None


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary as llama.cpp keeps it: by token id, each piece's text, score and kind.

    llama.cpp joins the two neighbours whose joint piece has the highest score.
    """

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    space_first: bool


def sentence_pieces(tokenizer: Mapping[str, Any], size: int) -> Pieces | None:
    """The vocabulary of a `tokenizer.json` of Llama 2's kind, filled up to `size`; None where it is of another kind.

    Such a file holds SentencePiece's pieces as a BPE with bytes for unknown characters. It has no scores, but
    SentencePiece joins in their order and the merges are written in that order, so a piece's first merge stands for its
    score.
    Raises `ExportError` for variants that llama.cpp cannot follow.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    if model.get("ignore_merges"):
        raise ExportError("the tokenizer joins bytes and ignores merges; llama.cpp knows no such vocabulary")
    largest = max([*model["vocab"].values(), *(added["id"] for added in tokenizer["added_tokens"])])
    if largest >= size:
        raise ExportError(f"the tokenizer has a token {largest}, beyond the model's vocab_size of {size}")
    texts = [f"[PAD{place}]" for place in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    scores = [-1e6] * size
    for rank, merge in enumerate(model["merges"]):
        piece = "".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge)
        place = model["vocab"][piece]
        scores[place] = max(scores[place], float(-rank))
    for piece, place in model["vocab"].items():
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        texts[place], kinds[place] = piece, int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        kinds[model["vocab"][unknown]] = int(gguf.TokenType.UNKNOWN)
    return Pieces(texts, scores, kinds, _space_first(tokenizer))


def _space_first(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text's first word gets the space that the others have."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    prepends = [step.get("prepend") for step in normalizer.get("normalizers", [normalizer])]
    return SPACE in prepends or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never")


def check_pieces(merged: Path) -> None:
    """Raise `ExportError` when the tokenizer lacks a piece that llama.cpp looks up."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    looked_up = LOOKED_UP.get(json.loads((merged / "config.json").read_bytes())["model_type"], ())
    missing = [piece for piece in looked_up if len(tokenizer.encode(piece, add_special_tokens=False)) != 1]
    if missing:
        raise ExportError(f"the tokenizer lacks pieces that llama.cpp looks up: {', '.join(map(repr, missing))}")


def check_tokenizer(full: Path, merged: Path) -> dict[str, Any]:
    """Whether llama.cpp tokenizes plain text as the original does: for users of its own programs, ours pass ids."""
    llamacpp.silence()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(full), params)
    if not model:
        raise ExportError("llama.cpp cannot load the vocabulary of the converted model")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    vocabulary = llama.llama_model_get_vocab(model)
    try:
        equal = [_tokens(vocabulary, text) == tokenizer.encode(text, add_special_tokens=False) for text in SAMPLE_TEXTS]
    finally:
        llama.llama_model_free(model)
    pre = Reader(full).fields["tokenizer.ggml.pre"].contents()
    return {"pre_tokenizer": pre, "tokenizer_agreement": sum(equal) / len(equal)}


def _tokens(vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    found = (llama.llama_token * (len(data) + 8))()
    count = llama.llama_tokenize(vocabulary, data, len(data), found, len(found), False, False)
    return list(found[:count])
