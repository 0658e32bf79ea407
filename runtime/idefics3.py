"""SmolVLM and Idefics3: a picture as square tiles and an overview, with a fixed number of image tokens per tile.

The steps and their rounding are those of transformers' `Idefics3ImageProcessorPil`; the tests hold both side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpa_edge.bundle import Idefics3Images
from mpa_edge.runtime.families import Cut, Tiles
from mpa_edge.runtime.images import normalise

# transformers' MAX_IMAGE_SIZE: whatever `longest_edge` says, no picture is scaled beyond it.
MAX_EDGE = 4096


class Idefics3:
    """See `Family`."""

    name = "idefics3"
    plan = "idefics3"

    def cut(self, image: Image.Image, settings: Idefics3Images) -> Cut:
        """See `Family.cut`: tiles of `tile_size`, row by row, the overview last."""
        tiles, rows, columns = _tiles_of(image, settings)
        return Cut(tiles, rows, columns)

    def grid(self, size: tuple[int, int], settings: Idefics3Images) -> tuple[int, int]:
        """See `Family.grid`."""
        if not settings.split:
            return 0, 0
        width, height = _whole_tiles_size(_longest_edge_size(size, settings.longest_edge), settings.tile_size)
        rows, columns = height // settings.tile_size, width // settings.tile_size
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def image_tokens(self, rows: int, columns: int, settings: Idefics3Images) -> int:
        """See `Family.image_tokens`."""
        return (rows * columns + 1) * settings.tokens_per_tile

    def tile_tokens(self, settings: Idefics3Images) -> tuple[int, int]:
        """See `Family.tile_tokens`: always as many."""
        return settings.tokens_per_tile, settings.tokens_per_tile

    def layout(self, rows: int, columns: int, image_token: str, settings: Idefics3Images) -> str:
        """See `Family.layout`. Source: `Idefics3Processor.replace_image_token` in transformers."""
        tile, fake = image_token * settings.tokens_per_tile, "<fake_token_around_image>"
        overview = f"{fake}<global-img>{tile}{fake}"
        if rows == 0 and columns == 0:
            return overview
        grid = "".join(
            "".join(f"{fake}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        return f"{grid}\n{overview}"

    def pixel_values(self, cut: Cut, settings: Idefics3Images) -> dict[str, NDArray[Any]]:
        """See `Family.pixel_values`: float32 (1, tiles, 3, height, width), and a mask (1, tiles, height, width)."""
        mask = np.ones((1, *cut.tiles.shape[:3]), np.bool_)
        return {"pixel_values": normalise(cut.tiles, settings)[None], "pixel_attention_mask": mask}

    def positions(self, token_ids: Sequence[int], image_token_id: int, cuts: Sequence[Cut]) -> None:
        """See `Family.positions`: one after the other."""

    def limited(self, settings: Idefics3Images, longest_edge: int) -> Idefics3Images:
        """See `Family.limited`: what a picture is scaled to before it is cut."""
        return settings.model_copy(update={"longest_edge": longest_edge})

    def sizes(self, settings: Idefics3Images) -> list[tuple[str, Idefics3Images]]:
        """See `Family.sizes`: longest edges of whole tiles up to `MAX_EDGE`, and the student's own."""
        tile = settings.tile_size
        whole = range(tile, MAX_EDGE + 1, tile) if settings.split else [tile]
        edges = sorted({*whole, settings.longest_edge})
        return [(f"longest edge {edge}", self.limited(settings, edge)) for edge in edges]


def _tiles_of(image: Image.Image, settings: Idefics3Images) -> tuple[Tiles, int, int]:
    resample = Image.Resampling[settings.resample.upper()]
    tile = settings.tile_size
    image = image.resize(_longest_edge_size(image.size, settings.longest_edge), resample)
    if not settings.split:
        return np.asarray(image.resize((tile, tile), resample))[None], 0, 0
    image = image.resize(_whole_tiles_size(image.size, tile), resample)
    if image.size == (tile, tile):
        return np.asarray(image)[None], 0, 0
    rows, columns = image.height // tile, image.width // tile
    pixels = np.asarray(image).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    overview = np.asarray(image.resize((tile, tile), resample))[None]
    return np.concatenate([pixels, overview]), rows, columns


def _longest_edge_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """The size at which the longer edge is `longest`; the shorter one is truncated and then made even."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return _below_max_edge(max(width, 1), max(height, 1))


def _below_max_edge(width: int, height: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / ratio)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * ratio), MAX_EDGE
    return max(width, 1), max(height, 1)


def _whole_tiles_size(size: tuple[int, int], tile: int) -> tuple[int, int]:
    """Both edges rounded up to whole tiles; the shorter one follows the longer one's rounding first."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return width, height
