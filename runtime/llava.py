"""LLaVA: one square tile per picture, as its CLIP or SigLIP tower sees it.

The steps and their rounding are those of transformers' `CLIPImageProcessorPil` and `SiglipImageProcessorPil`; the tests
hold both side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpa_edge.bundle import LlavaImages
from mpa_edge.errors import ImageError, InputError
from mpa_edge.runtime.families import Cut
from mpa_edge.runtime.images import MAX_PIXELS, normalise


class Llava:
    """See `Family`. Every picture is one tile, so that rows and columns are always 0."""

    name = "llava"
    plan = "llava"

    def cut(self, image: Image.Image, settings: LlavaImages) -> Cut:
        """See `Family.cut`. Raises `ImageError` (`aspect_ratio`) for a picture that would become gigantic before its
        centre is cut out: its shorter edge decides the scale."""
        image = image.resize(_resized(image.size, settings), Image.Resampling[settings.resample.upper()])
        # Past an edge Pillow crops zeros, as transformers pads them.
        left, top = (image.width - settings.tile_size) // 2, (image.height - settings.tile_size) // 2
        image = image.crop((left, top, left + settings.tile_size, top + settings.tile_size))
        return Cut(np.asarray(image)[None], 0, 0)

    def grid(self, size: tuple[int, int], settings: LlavaImages) -> tuple[int, int]:
        """See `Family.grid`."""
        return 0, 0

    def image_tokens(self, rows: int, columns: int, settings: LlavaImages) -> int:
        """See `Family.image_tokens`."""
        return settings.tokens_per_tile

    def tile_tokens(self, settings: LlavaImages) -> tuple[int, int]:
        """See `Family.tile_tokens`: always as many."""
        return settings.tokens_per_tile, settings.tokens_per_tile

    def layout(self, rows: int, columns: int, image_token: str, settings: LlavaImages) -> str:
        """See `Family.layout`. Source: `LlavaProcessor.replace_image_token` in transformers."""
        return image_token * settings.tokens_per_tile

    def pixel_values(self, cut: Cut, settings: LlavaImages) -> dict[str, NDArray[Any]]:
        """See `Family.pixel_values`: float32 (1, 3, tile_size, tile_size)."""
        return {"pixel_values": normalise(cut.tiles, settings)}

    def positions(self, token_ids: Sequence[int], image_token_id: int, cuts: Sequence[Cut]) -> None:
        """See `Family.positions`: one after the other."""

    def limited(self, settings: LlavaImages, longest_edge: int) -> LlavaImages:
        """See `Family.limited`: always raises `InputError`."""
        raise InputError(f"--longest-edge {longest_edge}: {self.name} has no such setting; leave it out")

    def sizes(self, settings: LlavaImages) -> list[tuple[str, LlavaImages]]:
        """See `Family.sizes`: the tower knows one size only."""
        return [(f"{settings.tile_size}x{settings.tile_size}", settings)]


def _resized(size: tuple[int, int], settings: LlavaImages) -> tuple[int, int]:
    """Width and height before the centre is cut out; the longer edge is truncated."""
    if settings.shortest_edge is None:
        return settings.tile_size, settings.tile_size
    short = settings.shortest_edge
    long = int(short * max(size) / min(size))
    if short * long > MAX_PIXELS:
        at_most = MAX_PIXELS // short**2
        raise ImageError("picture", "aspect_ratio", f"{size[0]}x{size[1]}; this model sees at most {at_most} to 1")
    return (short, long) if size[0] <= size[1] else (long, short)
