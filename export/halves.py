"""A vision-language model's halves, each in float32 without the other: an exporter needs one at a time, and the weights
that it does not need stay in their file."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from mpa_edge.export.merge_weights import load_model


def vision_half(merged: Path) -> Any:
    """The model of a folder without its text model and output head."""
    model = load_model(merged)
    text = model.model.get_decoder()
    for name in [name for name, child in model.model.named_children() if child is text]:
        delattr(model.model, name)
    del model.lm_head, text
    gc.collect()
    return model.float()


def text_half(merged: Path) -> Any:
    """The model of a folder without what makes features of pictures."""
    model = load_model(merged)
    text = model.model.get_decoder()
    for name in [name for name, child in model.model.named_children() if child is not text]:
        delattr(model.model, name)
    gc.collect()
    return model.float()
