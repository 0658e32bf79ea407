"""The canvas of the reference world: 96×96 pixels, and a record of what was drawn where.

Every primitive that a picture family draws is also kept as a `Mark`, so that the dense training stage knows for each
patch which character, thing and colour it holds (`benchmarks/world_dense.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
"""Side of every picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 32, 38),
    "green": (36, 146, 58),
    "blue": (38, 72, 204),
    "yellow": (244, 212, 40),
    "orange": (242, 132, 24),
    "purple": (130, 46, 162),
    "pink": (246, 148, 186),
    "brown": (122, 74, 36),
    "gray": (134, 134, 138),
    "black": (20, 20, 24),
    "white": (248, 248, 246),
}

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Mark:
    """One drawn thing: its box in pixels, its colour, and what it is (a character, or a thing).

    `order` is a character's place in its text, from 1. `value` is a bar's height, or how often a shape occurs. `rank`
    is 1 for the highest, 2 for the lowest, 3 for others, or for shapes at a side 4 to 7: left, right, top, bottom.
    """

    box: Box
    colour: str
    char: str = ""
    thing: str = ""
    value: int = 0
    rank: int = 0
    order: int = 0


def luminance(colour: str) -> float:
    """Perceived brightness of a named colour, 0 to 255."""
    red, green, blue = COLOURS[colour]
    return 0.3 * red + 0.59 * green + 0.11 * blue


def contrasting(rng: random.Random, colour: str, least: float = 85.0) -> str:
    """A named colour that is readable on top of `colour`."""
    return rng.choice([name for name in COLOURS if abs(luminance(name) - luminance(colour)) >= least])


def distinct(rng: random.Random, count: int, but: tuple[str, ...] = ()) -> list[str]:
    """`count` different named colours, none of them in `but`."""
    return rng.sample([name for name in COLOURS if name not in but], count)


def _font_folder() -> Path:
    """Matplotlib's own fonts: the only ones that are the same on every machine."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of `FONTS` at `size` pixels."""
    return ImageFont.truetype(str(_font_folder() / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def size_for_advance(name: str, advance: float) -> int:
    """The size at which capitals and digits of a font are `advance` pixels apart on average."""
    sample = "ABCDEFGHJKLMNPRSTUVXYZ23456789"
    return max(12, round(100 * advance * len(sample) / load_font(name, 100).getlength(sample)))


@cache
def _glyph(name: str, size: int, char: str) -> tuple[Image.Image, int, int, float]:
    """A character's mask, its offset from the pen, and its advance."""
    font = load_font(name, size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(char))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), char, fill=255, font=font)
    return mask, left, top, font.getlength(char)


@dataclass(slots=True)
class Canvas:
    """A picture being drawn. `rng` is the only source of chance, so that a seed gives the same pixels everywhere."""

    rng: random.Random
    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (SIZE, SIZE)))
    marks: list[Mark] = field(default_factory=list)
    pen: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        self.pen = ImageDraw.Draw(self.image)

    def shade(self, colour: str, spread: int = 14) -> tuple[int, int, int]:
        """A named colour, a little off, as things have it."""
        red, green, blue = (min(255, max(0, part + self.rng.randint(-spread, spread))) for part in COLOURS[colour])
        return red, green, blue

    def mark(self, box: Box, colour: str, thing: str, value: int = 0, rank: int = 0) -> None:
        """Remember a drawn thing."""
        self.marks.append(Mark(box, colour, thing=thing, value=value, rank=rank))

    def text_width(self, text: str, font: str, size: int, gap: int = 1) -> float:
        """Width of `text` in pixels."""
        return sum(_glyph(font, size, char)[3] + gap for char in text) - gap

    def text(self, x: float, y: float, text: str, font: str, size: int, colour: str, gap: int = 1) -> None:
        """Write `text` with the top of its capitals at `y`, character by character, each with its mark."""
        shade, top_of_capitals = self.shade(colour, 6), _glyph(font, size, "H")[2]
        for order, char in enumerate(text, start=1):
            mask, left, top, advance = _glyph(font, size, char)
            corner = (round(x + left), round(y + top - top_of_capitals))
            self.image.paste(shade, corner, mask)
            box = (x, corner[1], x + advance, corner[1] + mask.height)
            self.marks.append(Mark(box, colour, char=char, order=order))
            x += advance + gap

    def noise(self, strength: float) -> None:
        """Add grain of `strength` grey levels (standard deviation), from a bank that depends on no platform."""
        row, column = self.rng.randrange(SIZE), self.rng.randrange(SIZE)
        grain = _grain_bank()[row : row + SIZE, column : column + SIZE].astype(np.float32)
        pixels = np.asarray(self.image, dtype=np.float32) + grain * (strength / 64.0)
        self.image.paste(Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)))


@lru_cache(maxsize=1)
def _grain_bank() -> np.ndarray:
    """Fixed grain, 192×192×3, standard deviation 64."""
    values = np.random.RandomState(7).standard_normal((2 * SIZE, 2 * SIZE, 3)) * 64.0
    grain: np.ndarray = values.round().astype(np.int16)
    return grain


def paint_background(canvas: Canvas, style: str, colour: str) -> None:
    """Cover the canvas: `plain`, `gradient`, `stripes` or `blobs`, in shades of one named colour."""
    first, second = canvas.shade(colour), canvas.shade(colour, 40)
    canvas.image.paste(first, (0, 0, SIZE, SIZE))
    if style == "gradient":
        ramp = Image.linear_gradient("L").resize((SIZE, SIZE))
        ramp = ramp.rotate(canvas.rng.choice((0, 90, 180, 270)))
        canvas.image.paste(second, (0, 0, SIZE, SIZE), ramp)
    elif style == "stripes":
        step = canvas.rng.randint(6, 14)
        for start in range(-SIZE, SIZE, 2 * step):
            canvas.pen.line((start, SIZE, start + SIZE, 0), fill=second, width=step // 2)
    elif style == "blobs":
        for _ in range(canvas.rng.randint(6, 14)):
            x, y, radius = canvas.rng.randrange(SIZE), canvas.rng.randrange(SIZE), canvas.rng.randint(3, 14)
            canvas.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=canvas.shade(colour, 30))
