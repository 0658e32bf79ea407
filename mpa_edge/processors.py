"""Processors, loaded the same way everywhere: pictures go through Pillow, whatever else is installed.

Where torchvision is there, transformers 5 takes it for pictures, and its resampling differs from Pillow's in the last
bits. The runtime has Pillow only, so annotation, training and verification have to see Pillow's pixels too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpa_edge.errors import InputError
from mpa_edge.records import write_atomic

VIDEOS = "video_processor"
# Where a model folder keeps its image processor's settings: a file, and the key under which they lie there.
SETTINGS = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))


def load_processor(spec: str | Path, longest_edge: int | None = None, *, trust_remote_code: bool = False) -> Any:
    """`AutoProcessor.from_pretrained` with the Pillow image processor; another one where the model has no such.

    `longest_edge` changes how large the model sees pictures, see `limit`. Code that the model brings is not run, unless
    `trust_remote_code`.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    known: Any = PROCESSOR_MAPPING.get(
        type(AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)), AutoProcessor
    )
    if known is not AutoProcessor and VIDEOS in known.get_attributes():
        processor = without_videos(known).from_pretrained(spec, backend="pil", **{VIDEOS: None})
    else:
        processor = AutoProcessor.from_pretrained(spec, backend="pil", trust_remote_code=trust_remote_code)
    if longest_edge is not None:
        limit(processor.image_processor, longest_edge)
    return processor


def limit(images: Any, longest_edge: int) -> None:
    """Set the image processor's own limit to pictures of `longest_edge` pixels.

    Idefics3, SmolVLM and others scale a picture to a `longest_edge`, before they cut it into tiles. Qwen2-VL and its
    kin, which merge patches, call by that name the most pixels of a picture, width times height: they get those of a
    square picture. `InputError` for processors that scale every picture to one size.
    """
    size = images.size
    most, least = getattr(size, "longest_edge", None), getattr(size, "shortest_edge", None)
    counts_pixels = hasattr(images, "merge_size")
    if most is None or (counts_pixels and least is None):
        raise InputError(
            f"--longest-edge or --teacher-longest-edge {longest_edge}: {type(images).__name__} has no such setting; "
            "leave it out"
        )
    most = longest_edge**2 if counts_pixels else longest_edge
    images.size = replace(size, longest_edge=most, shortest_edge=None if least is None else min(least, most))


def save_limit(folder: Path, images: Any) -> None:
    """Write an image processor's limit into a model folder's own files, so that whoever loads the folder sees pictures
    as large."""
    edges = {name: getattr(images.size, name) for name in ("shortest_edge", "longest_edge")}
    for name, key in SETTINGS:
        path = folder / name
        content = json.loads(path.read_bytes()) if path.is_file() else {}
        settings = content if key is None else content.get(key)
        if not settings:
            continue
        # Qwen2-VL's older names for the same; they would win.
        for old in ("min_pixels", "max_pixels"):
            settings.pop(old, None)
        settings["size"] = {name: edge for name, edge in edges.items() if edge is not None}
        write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def without_videos(processor: Any) -> Any:
    """A processor class that loads no part for videos: transformers (5.23) has them for torchvision only, and refuses
    to load the others with `backend="pil"`, or at all where torchvision is not installed."""
    parts = [part for part in processor.get_attributes() if part != VIDEOS]
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _: parts)})
