"""Pictures of every shape and colour mode that a family has to see as its training processor does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

MODES = ("RGBA", "L", "LA", "P")
# Width and height: below one tile, about one, many, very wide, very tall, one pixel.
SHAPES = [(1, 1), (2, 5), (17, 9), (55, 57), (56, 56), (64, 64), (63, 65), (112, 112), (200, 150), (150, 200)]
SHAPES += [(337, 336), (31, 400), (400, 31), (199, 1), (1, 199), (192, 191), (640, 333)]


def noise(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of noise, in which no two resamplings look the same."""
    random = np.random.default_rng(seed)
    width, height = size
    if mode == "P":
        image = Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8)).convert("P")
        image.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "LA": (2,)}[mode]
    return Image.fromarray(random.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode=mode)


def save_turned(path: Path, size: tuple[int, int]) -> Image.Image:
    """Write a picture that lies on its side with an EXIF note that says so; returns it upright."""
    lying = noise("RGB", size)
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(path, exif=exif)
    return lying.transpose(Image.Transpose.ROTATE_270)
