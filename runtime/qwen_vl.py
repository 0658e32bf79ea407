"""Qwen2-VL and Qwen2.5-VL: a picture in one piece, at its own shape, and positions in three axes.

The steps and their rounding are those of transformers' `Qwen2VLImageProcessorPil`, and positions those of
`Qwen2VLModel.get_rope_index`; the tests hold both side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpa_edge.bundle import QwenVlImages
from mpa_edge.errors import ImageError, ModelError
from mpa_edge.runtime.families import Cut
from mpa_edge.runtime.images import normalise

# The processor's own limit.
MAX_ASPECT_RATIO = 200
# The bundle's limit, see `QwenVlImages`.
MAX_EDGE = 4096


class QwenVl:
    """See `Family`. Rows and columns count image tokens, after patches are merged."""

    plan = "qwen_vl"

    def __init__(self, name: str) -> None:
        self.name = name

    def cut(self, image: Image.Image, settings: QwenVlImages) -> Cut:
        """See `Family.cut`: one tile, whose edges are whole image tokens."""
        rows, columns = self.grid(image.size, settings)
        token = settings.patch_size * settings.merge_size
        image = image.resize((columns * token, rows * token), Image.Resampling[settings.resample.upper()])
        return Cut(np.asarray(image)[None], rows, columns)

    def grid(self, size: tuple[int, int], settings: QwenVlImages) -> tuple[int, int]:
        """See `Family.grid`. Raises `ImageError` (`aspect_ratio`) for a picture over 200 times as long as wide."""
        return _grid(*size, settings)

    def image_tokens(self, rows: int, columns: int, settings: QwenVlImages) -> int:
        """See `Family.image_tokens`."""
        return rows * columns

    def tile_tokens(self, settings: QwenVlImages) -> tuple[int, int]:
        """See `Family.tile_tokens`: bounds that no picture exceeds. Long ones do exceed `max_pixels`: their edges are
        rounded up where they have too few pixels, and are one token wide at least."""
        token = settings.patch_size * settings.merge_size
        # (a + 1) * (b + 1) for edges of a and b tokens with a * b tokens in all, one at most 200 times the other.
        edges = math.sqrt(settings.max_pixels * MAX_ASPECT_RATIO) * (1 + 1 / MAX_ASPECT_RATIO) / token
        return 1, math.ceil(settings.max_pixels / token**2 + edges + 1)

    def layout(self, rows: int, columns: int, image_token: str, settings: QwenVlImages) -> str:
        """See `Family.layout`. Source: `Qwen2VLProcessor.replace_image_token` in transformers; the markers around it
        stand in the chat template."""
        return image_token * (rows * columns)

    def pixel_values(self, cut: Cut, settings: QwenVlImages) -> dict[str, NDArray[Any]]:
        """See `Family.pixel_values`: flat patches, float32 (patches, 3 * temporal_patch_size * patch_size ** 2), with
        those of one image token side by side, and their grid (1, 3): frames, rows and columns of patches."""
        grid = np.array([[1, cut.rows * settings.merge_size, cut.columns * settings.merge_size]], np.int64)
        return {"pixel_values": _patches(normalise(cut.tiles, settings)[0], cut, settings), "image_grid_thw": grid}

    def positions(self, token_ids: Sequence[int], image_token_id: int, cuts: Sequence[Cut]) -> NDArray[np.int64]:
        """See `Family.positions`: axes are time, height and width.

        Text counts on in all three; a picture of rows x columns counts in height and width from where the text before
        it ended, and the text after it goes on past the longer of the two. `ModelError` unless the image tokens are
        those of the cuts.
        """
        ids = np.asarray(token_ids, np.int64)
        places = np.flatnonzero(ids == image_token_id)
        if len(places) != sum(cut.rows * cut.columns for cut in cuts):
            raise ModelError(f"{len(places)} image tokens in the prompt are not those of {len(cuts)} pictures")
        parts, read, position = [], 0, 0
        for cut in cuts:
            text = int(places[places >= read][0]) - read
            parts += [_text(position, text), np.indices((1, cut.rows, cut.columns)).reshape(3, -1) + position + text]
            read += text + cut.rows * cut.columns
            position += text + max(cut.rows, cut.columns)
        return np.concatenate([*parts, _text(position, len(ids) - read)], axis=1)

    def limited(self, settings: QwenVlImages, longest_edge: int) -> QwenVlImages:
        """See `Family.limited`: the most pixels are those of a square picture with that edge."""
        return _limited(settings, longest_edge**2)

    def sizes(self, settings: QwenVlImages) -> list[tuple[str, QwenVlImages]]:
        """See `Family.sizes`: the most pixels that `--longest-edge` sets, those of a square, and the student's own."""
        names = {edge**2: f"longest edge {edge}" for edge in range(224, MAX_EDGE + 1, 224)}
        own = math.isqrt(settings.max_pixels)
        names[settings.max_pixels] = (
            f"longest edge {own}" if own**2 == settings.max_pixels else f"{settings.max_pixels} pixels"
        )
        return [(name, _limited(settings, most)) for most, name in sorted(names.items())]


def _grid(width: int, height: int, settings: QwenVlImages) -> tuple[int, int]:
    """`smart_resize` in transformers, in image tokens: both edges rounded to whole ones, or scaled into the limits."""
    token, most, least = settings.patch_size * settings.merge_size, settings.max_pixels, settings.min_pixels
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise ImageError(
            "picture", "aspect_ratio", f"{width}x{height}; this model sees at most {MAX_ASPECT_RATIO} to 1"
        )
    rows, columns = round(height / token), round(width / token)
    if rows * token * columns * token > most:
        scale = math.sqrt((height * width) / most)
        rows = max(1, math.floor(height / scale / token))
        columns = max(1, math.floor(width / scale / token))
    elif rows * token * columns * token < least:
        scale = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * scale / token), math.ceil(width * scale / token)
    return rows, columns


def _patches(pixels: NDArray[np.float32], cut: Cut, settings: QwenVlImages) -> NDArray[np.float32]:
    """Pixels (3, height, width) to flat patches; the picture stands still for `temporal_patch_size` frames."""
    patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    cells = pixels.reshape(3, cut.rows, merge, patch, cut.columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    still = np.repeat(cells[:, :, :, :, :, None], frames, axis=5)
    return still.reshape(cut.rows * cut.columns * merge**2, -1)


def _text(start: int, count: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count))


def _limited(settings: QwenVlImages, most: int) -> QwenVlImages:
    return settings.model_copy(update={"max_pixels": most, "min_pixels": min(settings.min_pixels, most)})
