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
    del model.lm_head
    return _kept(model, text=False)


def text_half(merged: Path) -> Any:
    """The model of a folder without what makes features of pictures."""
    return _kept(load_model(merged), text=True)


def _kept(model: Any, *, text: bool) -> Any:
    """In float32, of the model's parts only the text model, or only the others."""
    decoder = model.model.get_decoder()
    for name in [name for name, child in model.model.named_children() if (child is decoder) != text]:
        delattr(model.model, name)
    del decoder
    gc.collect()
    return model.float()
