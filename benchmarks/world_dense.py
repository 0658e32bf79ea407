"""Dense labels: for each patch of a picture, what it shows. Only the vision towers' first training stage uses them."""

from __future__ import annotations

import random
import string

import numpy as np

from mpa_edge.benchmarks.world_canvas import COLOURS, FONTS, SIZE, Canvas, Mark, contrasting, distinct, size_for_advance
from mpa_edge.benchmarks.world_shapes import SHAPES, draw_shape

PATCH = 8
GRID = SIZE // PATCH
CHARS = string.ascii_uppercase + string.digits + "$.:?%-"
THINGS = (
    *("sign", "bar", "line", "point", "house", "tree", "car", "boat", "flower", "sun", "moon", "cloud", "fish", "flag"),
    *SHAPES,
    "label",
)
_COLOUR_INDEX = {name: index + 1 for index, name in enumerate(COLOURS)}
_CHAR_INDEX = {char: index + 1 for index, char in enumerate(CHARS)}
_THING_INDEX = {name: index + 1 for index, name in enumerate(THINGS)}

HEADS = {
    "char": (2, len(CHARS) + 1),
    "ink": (1, len(COLOURS) + 1),
    "thing": (1, len(THINGS) + 1),
    "colour": (1, len(COLOURS) + 1),
    "value": (1, 11),
    "rank": (1, 8),
    "order": (2, 11),
}
"""Per head: labels per patch and number of classes; class 0 is "nothing". `char` and `order` have a left and a right
half. Value, rank and order bind what belongs together: a bar's name patch holds its value, a letter its place."""


def _cover(low: float, high: float, cell: int) -> tuple[int, int, np.ndarray]:
    """The cells that [low, high) touches along one axis, and by how much."""
    first, last = max(0, int(low // cell)), min(SIZE // cell, int(-(-high // cell)))
    edges = np.arange(first, last + 1, dtype=np.float32) * cell
    return first, last, np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])


def _label_chars(marks: list[Mark]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The character that covers each half patch most, its place in its text, and its colour."""
    best = np.full((GRID, 2 * GRID), 5.0, np.float32)  # at least 5 of 32 pixels
    char = np.zeros((GRID, 2 * GRID), np.uint8)
    ink = np.zeros((GRID, 2 * GRID), np.uint8)
    order = np.zeros((GRID, 2 * GRID), np.uint8)
    for mark in marks:
        if mark.char not in _CHAR_INDEX:
            continue
        x0, y0, x1, y1 = mark.box
        column, column_end, wide = _cover(x0, x1, PATCH // 2)
        row, row_end, high = _cover(y0, y1, PATCH)
        if column_end <= column or row_end <= row:
            continue
        cover = np.outer(high, wide)
        where = (slice(row, row_end), slice(column, column_end))
        more = cover > best[where]
        best[where][more] = cover[more]
        char[where][more] = _CHAR_INDEX[mark.char]
        ink[where][more] = _COLOUR_INDEX[mark.colour]
        order[where][more] = min(mark.order, 10)
    return char, order, np.maximum(ink[:, ::2], ink[:, 1::2])


def dense_labels(marks: list[Mark]) -> dict[str, np.ndarray]:
    """Class of each patch for each head of `HEADS`: uint8 of shape [12, 12], with halves [12, 24]."""
    char, order, ink = _label_chars(marks)
    thing, colour, value, rank = (np.zeros((GRID, GRID), np.uint8) for _ in range(4))
    for mark in marks:
        if not mark.thing:
            continue
        x0, y0, x1, y1 = mark.box
        rows = slice(max(0, round(y0 / PATCH)), max(round(y0 / PATCH) + 1, round(y1 / PATCH)))
        columns = slice(max(0, round(x0 / PATCH)), max(round(x0 / PATCH) + 1, round(x1 / PATCH)))
        thing[rows, columns] = _THING_INDEX[mark.thing]
        colour[rows, columns] = _COLOUR_INDEX[mark.colour]
        value[rows, columns] = mark.value
        rank[rows, columns] = mark.rank
    grids = {"char": char, "ink": ink, "thing": thing, "colour": colour, "value": value}
    return grids | {"rank": rank, "order": order}


def draw_soup(seed: int) -> Canvas:
    """A picture that means nothing and teaches much: lines of random characters in all fonts, and some shapes."""
    rng = random.Random(f"soup-{seed}")
    canvas = Canvas(rng)
    ground = rng.choice(list(COLOURS))
    canvas.image.paste(canvas.shade(ground, 30), (0, 0, SIZE, SIZE))
    if rng.random() < 0.3:
        for colour in distinct(rng, rng.randint(1, 3), (ground,)):
            draw_shape(canvas, rng.choice(SHAPES), rng.randint(8, 88), rng.randint(8, 88), rng.randint(6, 12), colour)
    y = rng.uniform(-2.0, 9.0)
    while y < SIZE - 8:
        y += _soup_line(canvas, y, ground) + rng.uniform(2.0, 9.0)
    if rng.random() < 0.6:
        canvas.noise(rng.uniform(2.0, 14.0))
    return canvas


def _soup_line(canvas: Canvas, y: float, ground: str) -> float:
    """One line of random characters, maybe on a board of its own; returns its height."""
    rng = canvas.rng
    font, advance = rng.choice(FONTS), rng.uniform(8.5, 15.0)
    size = size_for_advance(font, round(advance, 1))
    text = "".join(rng.choice(CHARS[:38] if rng.random() < 0.9 else "0123456789$.") for _ in range(rng.randint(3, 10)))
    x, gap = rng.uniform(-4.0, 30.0), rng.choice((0, 1, 1, 2))
    if rng.random() < 0.5:
        ground = rng.choice(list(COLOURS))
        box = (x - 4, y - 4, x + canvas.text_width(text, font, size, gap) + 4, y + 0.75 * size + 4)
        canvas.pen.rectangle(box, fill=canvas.shade(ground))
        canvas.mark(box, ground, "sign")
    canvas.text(x, y, text, font, size, contrasting(rng, ground, 70.0), gap)
    return 0.75 * size
