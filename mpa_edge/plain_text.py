"""Text that a user typed stays text: `<image>` in a question is seven characters, not a picture.

transformers has `sanitize_control_tokens` for this (5.2x), which Idefics3's processor cannot take: it then asks the
encoding for character positions that are not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch


class PlainText:
    """A fast tokenizer without its added tokens, special or not."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        # White space may be an added token and is no one's control token.
        contents = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self._added = re.compile("|".join(map(re.escape, contents)) or "(?!)")

    def holds_added_tokens(self, text: str) -> bool:
        """Whether the tokenizer would find one of its added tokens in the text."""
        return self._added.search(text) is not None

    def encode(self, text: str) -> list[int]:
        """The tokens of a piece of text."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        pieces = [text]
        if self._backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self._backend.model.tokenize(piece)]


def insert_left_padded(inputs: Any, texts: Mapping[int, list[int]], *, before_last: int, pad: int) -> None:
    """Insert tokens into rows of a left-padded batch, ahead of the last `before_last` ones, and pad anew.

    Changes `inputs` in place: `input_ids`, `attention_mask`, and what else holds one number per token.
    """
    shape = inputs["input_ids"].shape
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    width = max(length + len(texts.get(row, ())) for row, length in enumerate(lengths))
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            continue
        filler = {"input_ids": pad}.get(key, 0)
        widened = value.new_full((shape[0], width), filler)
        for row, length in enumerate(lengths):
            old = value[row, shape[1] - length :]
            text = texts.get(row, [])
            new = {"input_ids": text, "attention_mask": [1] * len(text)}.get(key, [0] * len(text))
            cut = length - before_last
            widened[row, width - length - len(text) :] = torch.cat([old[:cut], old.new_tensor(new), old[cut:]])
        inputs[key] = widened
