"""Pictures of every shape and colour mode that a family has to see as its training processor does."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

MODES = ("RGBA", "L", "LA", "P")
# Our own code opens each picture before a processor sees it, so that what a processor does itself matters here only.
on_white = pytest.mark.skipif(
    tuple(int(part) for part in version("transformers").split(".")[:2]) < (5, 21),
    reason="before 5.21, transformers forgets transparency and does not lay white under it",
)
PROCESSORS_MODES = [pytest.param(mode, marks=[on_white] if "A" in mode else []) for mode in MODES]
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


def save_every_kind(folder: Path, size: tuple[int, int] = (90, 120)) -> dict[str, Path]:
    """Files that a decoder can get wrong: each colour mode, a palette with holes, 16 bits, and one that lies on its
    side."""
    files = {name: folder / f"{name}.png" for name in (*MODES, "P with transparency", "16 bits")}
    for mode in MODES:
        noise(mode, size).save(files[mode])
    noise("P", size).save(files["P with transparency"], transparency=bytes(range(256)))
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 1 << 16, size[::-1], dtype=np.uint16)).save(files["16 bits"])
    files["turned"] = folder / "turned.jpg"
    save_turned(files["turned"], size)
    return files


def upright_rgb(file: Path) -> Image.Image:
    """What a model should see of such a file, without the runtime: Pillow turns it, white is laid under by hand."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode not in ("LA", "RGBA") and "transparency" not in image.info:
        return image.convert("RGB")
    pixels = np.asarray(image.convert("RGBA")) / 255
    colours, opacity = pixels[..., :3], pixels[..., 3:]
    return Image.fromarray(np.floor((colours * opacity + 1 - opacity) * 255 + 0.5).astype(np.uint8))
