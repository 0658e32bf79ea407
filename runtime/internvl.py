"""InternVL: a picture as the grid of square tiles that is nearest to its shape, and an overview.

The steps and their rounding are those of transformers' `GotOcr2ImageProcessorPil`, which InternVL uses; the tests hold
both side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpa_edge.bundle import InternVlImages
from mpa_edge.errors import InputError
from mpa_edge.runtime.families import Cut
from mpa_edge.runtime.images import normalise

# What `InternVLProcessor` puts around the image tokens.
START, END = "<img>", "</img>"


class InternVl:
    """See `Family`. A picture of one tile has no overview: its rows and columns are 0."""

    name = "internvl"
    plan = "internvl"

    def cut(self, image: Image.Image, settings: InternVlImages) -> Cut:
        """See `Family.cut`: tiles of `tile_size`, row by row, the overview last."""
        tile, resample = settings.tile_size, Image.Resampling[settings.resample.upper()]
        rows, columns = self.grid(image.size, settings)
        overview = np.asarray(image.resize((tile, tile), resample))[None]
        if rows == 0:
            return Cut(overview, 0, 0)
        pixels = np.asarray(image.resize((columns * tile, rows * tile), resample))
        tiles = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        return Cut(np.concatenate([tiles, overview]), rows, columns)

    def grid(self, size: tuple[int, int], settings: InternVlImages) -> tuple[int, int]:
        """See `Family.grid`."""
        rows, columns = _nearest_grid(*size, settings)
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def image_tokens(self, rows: int, columns: int, settings: InternVlImages) -> int:
        """See `Family.image_tokens`."""
        return (rows * columns + 1) * settings.tokens_per_tile

    def tile_tokens(self, settings: InternVlImages) -> tuple[int, int]:
        """See `Family.tile_tokens`: always as many."""
        return settings.tokens_per_tile, settings.tokens_per_tile

    def layout(self, rows: int, columns: int, image_token: str, settings: InternVlImages) -> str:
        """See `Family.layout`. Source: `InternVLProcessor.replace_image_token` in transformers."""
        return f"{START}{image_token * self.image_tokens(rows, columns, settings)}{END}"

    def pixel_values(self, cut: Cut, settings: InternVlImages) -> dict[str, NDArray[Any]]:
        """See `Family.pixel_values`: float32 (tiles, 3, tile_size, tile_size)."""
        return {"pixel_values": normalise(cut.tiles, settings)}

    def positions(self, token_ids: Sequence[int], image_token_id: int, cuts: Sequence[Cut]) -> None:
        """See `Family.positions`: one after the other."""

    def limited(self, settings: InternVlImages, longest_edge: int) -> InternVlImages:
        """See `Family.limited`: always raises `InputError`."""
        raise InputError(f"--longest-edge {longest_edge}: {self.name} has no such setting; leave it out")

    def sizes(self, settings: InternVlImages) -> list[tuple[str, InternVlImages]]:
        """See `Family.sizes`: fewer tiles, down to one."""
        return [(f"at most {most} tiles", _limited(settings, most)) for most in range(1, settings.max_patches + 1)]


def _nearest_grid(width: int, height: int, settings: InternVlImages) -> tuple[int, int]:
    """Rows and columns as `get_optimal_tiled_canvas` in transformers chooses them: the first grid, with few tiles
    before many, whose shape is nearest to the picture's; of grids of equal shape (1x1, 2x2, …) the one with the most
    tiles that covers less than twice the picture's area."""
    best, smallest = (1, 1), float("inf")
    for rows, columns in _grids(settings.min_patches, settings.max_patches):
        difference = abs(width / height - columns / rows)
        if difference < smallest:
            best, smallest = (rows, columns), difference
        elif difference == smallest and width * height > 0.5 * settings.tile_size**2 * rows * columns:
            best = rows, columns
    return best


def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """(rows, columns) with `least` to `most` tiles; fewer tiles first, and among those fewer columns."""
    edges = range(1, most + 1)
    grids = [(rows, columns) for columns in edges for rows in edges if least <= rows * columns <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _limited(settings: InternVlImages, most: int) -> InternVlImages:
    return settings.model_copy(update={"max_patches": most, "min_patches": min(settings.min_patches, most)})
