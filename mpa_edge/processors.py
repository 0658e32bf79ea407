"""Processors, loaded the same way everywhere: pictures go through Pillow, whatever else is installed.

Where torchvision is there, transformers 5 takes it for pictures, and its resampling differs from Pillow's in the last
bits. The runtime has Pillow only, so annotation, training and verification have to see Pillow's pixels too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_processor(spec: str | Path) -> Any:
    """`AutoProcessor.from_pretrained` with the Pillow image processor; another one where the model has no such."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(spec, backend="pil")
