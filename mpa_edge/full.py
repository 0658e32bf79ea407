"""Full fine-tuning: all weights of the chosen parts, and the whole model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpa_edge.config import AlignConfig
from mpa_edge.lora import name_of_base, remove_adapter
from mpa_edge.models import WHOLE
from mpa_edge.records import write_atomic
from mpa_edge.sharding import is_spread, whole_state
from mpa_edge.trainable import Anatomy


class WholeModel:
    """A model of which some parts are trained as they are. Weights are held in float32 meanwhile, since steps of
    training get lost in 16 bit; `close` gives them their own type back."""

    def __init__(self, model: Any, processor: Any, config: AlignConfig, folder: Path, start: Path | None) -> None:
        """All else is frozen. With `start`, the weights are those of that folder. `folder` is where it goes."""
        remove_adapter(model)
        if start is not None:
            before = type(model).from_pretrained(start, dtype=model.dtype, use_safetensors=True)
            model.load_state_dict(before.state_dict())
        self._model, self._processor, self._dtype, self._kind = model, processor, model.dtype, type(model)
        self._base = name_of_base(config.student, folder)
        chosen = set(Anatomy(model).weights(config.train))
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in chosen)
        self._cast(torch.float32)
        self.weights: dict[str, nn.Parameter] = {
            name: weight for name, weight in model.named_parameters() if name in chosen
        }

    def close(self) -> None:
        """See `Trainee`."""
        if not self._spread:
            self._cast(self._dtype)

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write a complete transformers folder, and beside it which tensors of which base were trained."""
        model = self._whole(write) if self._spread else self._model
        if not write:
            return
        model.save_pretrained(folder)
        self._processor.save_pretrained(folder)
        facts = {"base_model_name_or_path": self._base, "tensors": sorted(self.weights)}
        write_atomic(folder / WHOLE, json.dumps(facts, indent=2) + "\n")

    @property
    def _spread(self) -> bool:
        return is_spread(next(self._model.parameters()))

    def _whole(self, write: bool) -> Any:
        """A plain model with the weights of one that is spread over several processes."""
        state = whole_state(self._model, self._dtype)
        if not write:
            return None
        model = self._kind._from_config(self._model.config, dtype=self._dtype)
        model.load_state_dict(state)
        model.generation_config = self._model.generation_config
        return model

    def _cast(self, dtype: torch.dtype) -> None:
        # Not `model.to`, which would take the tables of the position embedding, always float32, along.
        for weight in self._model.parameters():
            weight.data = weight.data.to(dtype)
