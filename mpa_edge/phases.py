"""Where the time of one answer goes in a transformers model: preprocess, vision, prefill, decode."""

from __future__ import annotations

import time
from typing import Any

import torch

from mpa_edge.runtime.vlm import Timings


class Phases:
    """A stopwatch around one `generate` call.

    Vision begins with the image encoder's first forward and ends where the language model's begins (so it holds
    projection and merging); prefill ends with the first logits, which `generate` hands to the logits processors, of
    which this object is one that changes nothing. Where a model has no such modules the phase is None.
    """

    def __init__(self, model: Any, *, watch: bool) -> None:
        """With `watch` off, nothing is measured and `timings` is empty."""
        self._model = model
        self._watch = watch
        self._at: dict[str, float] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Phases:
        if self._watch:
            self.mark("start")
            for name, module in (("vision", self._encoder()), ("language", _decoder(self._model))):
                if module is not None:
                    self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.mark(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """A logits processor's signature: the first call marks the first logits."""
        self.mark("logits")
        return scores

    def mark(self, name: str) -> None:
        """Note the time of an event; the first of its name counts."""
        if self._watch and name not in self._at:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._at[name] = time.perf_counter()

    def timings(self) -> Timings:
        """Milliseconds by phase; all None when nothing was watched."""
        return Timings(
            preprocess=self._between("start", "encoded"),
            vision=self._between("vision", "language"),
            prefill=self._between("language", "logits"),
            decode=self._between("logits", "done"),
            total=self._between("start", "done"),
        )

    def _between(self, start: str, end: str) -> float | None:
        if start not in self._at or end not in self._at:
            return None
        return (self._at[end] - self._at[start]) * 1000

    def _encoder(self) -> Any:
        # transformers answers with the model itself, or its base, when there is no such module.
        encoder = self._model.get_encoder(modality="image") if hasattr(self._model, "get_encoder") else None
        return None if encoder in (self._model, self._model.base_model) else encoder


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return None if decoder is model else decoder
