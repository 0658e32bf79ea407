"""Shapes to describe: colour, name, count, presence and place."""

from __future__ import annotations

import math

from mpa_edge.benchmarks.world_canvas import Canvas, distinct
from mpa_edge.benchmarks.world_facts import Fact, Look

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
_PLACES = ("left", "right", "top", "bottom")


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The ten corners of a five-pointed star."""
    corners = []
    for corner in range(10):
        reach, angle = (radius if corner % 2 == 0 else 0.45 * radius), math.pi * (corner / 5.0 - 0.5)
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners


def draw_shape(
    canvas: Canvas, shape: str, x: float, y: float, radius: float, colour: str, value: int = 0, rank: int = 0
) -> None:
    """Draw one of `SHAPES` around (x, y) and mark it."""
    pen, fill, r = canvas.pen, canvas.shade(colour), radius
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(3, round(0.35 * r)))
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    elif shape == "diamond":
        pen.polygon([(x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)], fill=fill)
    elif shape == "star":
        pen.polygon(_star(x, y, 1.15 * r), fill=fill)
    elif shape == "cross":
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=fill)
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=fill)
    else:
        pen.ellipse((x - r, y - r, x, y + 0.1 * r), fill=fill)
        pen.ellipse((x, y - r, x + r, y + 0.1 * r), fill=fill)
        pen.polygon([(x - 0.93 * r, y - 0.2 * r), (x + 0.93 * r, y - 0.2 * r), (x, y + 1.05 * r)], fill=fill)
    canvas.mark((x - r, y - r, x + r, y + r), colour, shape, value, rank)


def draw_shapes(canvas: Canvas, look: Look) -> list[Fact]:
    """A picture of one to six shapes, and all that can be asked about it."""
    rng = canvas.rng
    if rng.random() < 0.35:
        return _draw_placed(canvas, look)
    kinds = rng.sample(look.shapes, rng.randint(1, 3))
    shapes = [rng.choice(kinds) for _ in range(rng.randint(1, 6))]
    cells = rng.sample([(column, row) for column in range(3) for row in range(3)], len(shapes))
    paint = dict(zip(kinds, distinct(rng, len(kinds), (look.ground,)), strict=True))
    for shape, (column, row) in zip(shapes, cells, strict=True):
        x, y = 18 + 30 * column + rng.uniform(-3, 3), 18 + 30 * row + rng.uniform(-3, 3)
        draw_shape(canvas, shape, x, y, rng.uniform(8, 12), paint[shape], shapes.count(shape))
    facts = [Fact("shape_count", str(shapes.count(shape)), {"shape": shape}) for shape in set(shapes)]
    facts += [Fact("shape_total", str(len(shapes)))]
    return sorted(facts, key=str) + _colour_facts(canvas, look, {shape: paint[shape] for shape in shapes})


def _draw_placed(canvas: Canvas, look: Look) -> list[Fact]:
    """Two or three different shapes at the sides of the picture."""
    rng = canvas.rng
    places = rng.sample(_PLACES, rng.randint(2, 3))
    shapes = rng.sample(look.shapes, len(places))
    paint = dict(zip(shapes, distinct(rng, len(shapes), (look.ground,)), strict=True))
    facts = []
    for shape, place in zip(shapes, places, strict=True):
        across, down = rng.uniform(-5, 5), rng.uniform(-5, 5)
        x = {"left": 16, "right": 80}.get(place, 48) + across
        y = {"top": 16, "bottom": 80}.get(place, 48) + down
        draw_shape(canvas, shape, x, y, rng.uniform(9, 13), paint[shape], 1, 4 + _PLACES.index(place))
        facts.append(Fact("shape_position", place, {"shape": shape}))
    return facts + _colour_facts(canvas, look, paint)


def _colour_facts(canvas: Canvas, look: Look, paint: dict[str, str]) -> list[Fact]:
    """What can be asked about colours and presence, where each shape has one colour."""
    rng = canvas.rng
    facts = [Fact("shape_color", colour, {"shape": shape}) for shape, colour in paint.items()]
    facts += [Fact("shape_name", shape, {"color": colour}) for shape, colour in paint.items()]
    shape = rng.choice(sorted(paint))
    facts.append(Fact("shape_presence", "yes", {"shape": shape, "color": paint[shape]}))
    absent = [name for name in look.shapes if name not in paint]
    if absent and rng.random() < 0.5:
        facts.append(Fact("shape_presence", "no", {"shape": rng.choice(absent), "color": paint[shape]}))
    else:
        other = rng.choice(distinct(rng, 1, (paint[shape],)))
        facts.append(Fact("shape_presence", "no", {"shape": shape, "color": other}))
    return facts
