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
    """A processor's fast tokenizer without its added tokens, special or not."""

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        self._backend = tokenizer.backend_tokenizer
        # White space may be an added token and is no one's control token.
        added = {
            place: token.content for place, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
        }
        self._ids = frozenset(added)
        # Processors look for some of them as text, before the tokenizer does.
        contents = {*added.values(), *filter(str.strip, _markers(processor))}
        self._added = re.compile("|".join(map(re.escape, contents)) or "(?!)")

    def holds_added_tokens(self, text: str) -> bool:
        """Whether the tokenizer would find one of its added tokens in the text, as it stands or once normalised."""
        if self._added.search(text) is not None:
            return True
        return not self._ids.isdisjoint(self._backend.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of a piece of text."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        pieces = [text]
        if self._backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self._backend.model.tokenize(piece)]


def _markers(processor: Any) -> list[str]:
    """What the processor calls its own tokens: `image_token`, `video_token` and the like."""
    named = (getattr(processor, name) for name in vars(processor) if name.endswith("_token"))
    return [value for value in named if isinstance(value, str)]


def append_left_padded(inputs: Any, texts: Mapping[int, list[int]], *, pad: int) -> None:
    """Append tokens to rows of a left-padded batch, and pad anew.

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
            widened[row, width - length - len(text) :] = torch.cat([old, old.new_tensor(new)])
        inputs[key] = widened
