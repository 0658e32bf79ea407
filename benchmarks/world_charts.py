"""Bar and line charts to look up and compare."""

from __future__ import annotations

import itertools

from mpa_edge.benchmarks.world_canvas import SIZE, Canvas, distinct, luminance, size_for_advance
from mpa_edge.benchmarks.world_facts import Fact, Look

LABELS = ("BCDEF", "KLMNP", "RSTUV")
"""Names of bars and points. There is no "A": answers are compared without articles."""
_FLOOR = 78


def _ink(look: Look) -> str:
    """Axis and label colour that is readable on the ground."""
    return "black" if luminance(look.ground) > 110 else "white"


def _axes(canvas: Canvas, look: Look, style: str) -> None:
    """The axes and, in `grid` charts, a line per two units."""
    ink = canvas.shade(_ink(look), 6)
    if style == "grid":
        for unit in range(2, 10, 2):
            canvas.pen.line((6, _FLOOR - 7 * unit, SIZE - 4, _FLOOR - 7 * unit), fill=canvas.shade("gray", 10))
    canvas.pen.line((6, _FLOOR, SIZE - 4, _FLOOR), fill=ink)
    if style != "bare":
        canvas.pen.line((6, 8, 6, _FLOOR), fill=ink)


def _label(canvas: Canvas, look: Look, x: float, y: float, text: str, font: str) -> None:
    """A short label centred at x."""
    size = size_for_advance(font, 10.0)
    canvas.text(x - canvas.text_width(text, font, size) / 2, y, text, font, size, _ink(look))


def draw_bars(canvas: Canvas, look: Look) -> list[Fact]:
    """A bar chart of three to five bars with values from 1 to 9, all different."""
    rng = canvas.rng
    count, style, font = rng.randint(3, 5), rng.choice(look.charts), rng.choice(look.fonts)
    values, names = rng.sample(range(1, 10), count), rng.choice(LABELS)
    single = style == "single"
    paint = distinct(rng, 1 if single else count, (look.ground, _ink(look), "gray")) * (count if single else 1)
    pitch = 84 / count
    width = pitch * rng.uniform(0.5, 0.85)
    _axes(canvas, look, style)
    for index, (value, colour) in enumerate(zip(values, paint, strict=True)):
        middle = 9 + pitch * (index + 0.5)
        box = (middle - width / 2, _FLOOR - 7 * value, middle + width / 2, _FLOOR)
        canvas.pen.rectangle(
            box, fill=canvas.shade(colour), outline=canvas.shade("black") if style == "outlined" else None
        )
        rank = {max(values): 1, min(values): 2}.get(value, 3)
        canvas.mark(box, colour, "bar", value, rank)
        canvas.mark((middle - 6, _FLOOR + 3, middle + 6, _FLOOR + 16), colour, "label", value, rank)
        _label(canvas, look, middle, _FLOOR + 4, names[index], font)
        if style in ("labelled", "bare", "single"):
            _label(canvas, look, middle, _FLOOR - 7 * value - 12, str(value), font)
    return _bar_facts(canvas, values, names[:count], [] if single else paint)


def _bar_facts(canvas: Canvas, values: list[int], names: str, paint: list[str]) -> list[Fact]:
    """All that can be asked about a bar chart."""
    rng = canvas.rng
    order = sorted(range(len(values)), key=values.__getitem__)
    facts = [Fact("bar_value", str(value), {"bar": name}) for name, value in zip(names, values, strict=True)]
    for kind, index in (("bar_highest", order[-1]), ("bar_lowest", order[0])):
        facts.append(Fact(kind, names[index], {"painted": paint[index] if paint else ""}))
    facts.append(Fact("bar_count", str(len(values))))
    for _ in range(2):
        first, second = rng.sample(range(len(values)), 2)
        slots = {
            "bar": names[first],
            "other": names[second],
            "winner": names[max(first, second, key=values.__getitem__)],
        }
        facts.append(Fact("bar_compare", "yes" if values[first] > values[second] else "no", slots))
    return facts + [Fact("bar_color", colour, {"bar": name}) for name, colour in zip(names, paint, strict=False)]


def draw_lines(canvas: Canvas, look: Look) -> list[Fact]:
    """A line chart of four or five points: one line, or two that cross or not."""
    rng = canvas.rng
    points, both = rng.randint(4, 5), rng.random() < 0.5
    style, font, names = rng.choice(look.charts), rng.choice(look.fonts), rng.choice(LABELS)
    paint = distinct(rng, 2 if both else 1, (look.ground, _ink(look), "gray"))
    _axes(canvas, look, style)
    xs = [15 + 72 * index / (points - 1) for index in range(points)]
    for index, x in enumerate(xs):
        _label(canvas, look, x, _FLOOR + 4, names[index], font)
    if both:
        ends = rng.sample(range(1, 10), 2)
        while abs(ends[0] - ends[1]) < 2:
            ends = rng.sample(range(1, 10), 2)
        for colour, end in zip(paint, ends, strict=True):
            _draw_line(
                canvas, xs, [rng.uniform(1, 9) for _ in xs[1:]] + [end], colour, style, 1 if end == max(ends) else 2
            )
        return [Fact("line_top", paint[0] if ends[0] > ends[1] else paint[1]), Fact("line_count", "2")]
    return _draw_single_line(canvas, xs, names, paint[0], style)


def _draw_single_line(canvas: Canvas, xs: list[float], names: str, colour: str, style: str) -> list[Fact]:
    """One line: a trend, or a peak."""
    rng = canvas.rng
    if rng.random() < 0.5:
        levels = sorted(rng.uniform(1, 9) for _ in xs)
        levels[0], levels[-1] = rng.uniform(1.0, 2.5), rng.uniform(7.0, 9.0)
        rising = rng.random() < 0.5
        _draw_line(canvas, xs, levels if rising else levels[::-1], colour, style)
        return [Fact("line_trend", "up" if rising else "down"), Fact("line_color", colour), Fact("line_count", "1")]
    peak = rng.randrange(len(xs))
    levels = [rng.uniform(1, 6) for _ in xs]
    levels[peak] = rng.uniform(7.7, 9)
    _draw_line(canvas, xs, levels, colour, style)
    for index, x in enumerate(xs):
        canvas.mark((x - 6, _FLOOR + 3, x + 6, _FLOOR + 16), colour, "label", 0, 1 if index == peak else 3)
    return [Fact("line_peak", names[peak]), Fact("line_color", colour), Fact("line_count", "1")]


def _draw_line(canvas: Canvas, xs: list[float], levels: list[float], colour: str, style: str, rank: int = 0) -> None:
    """A line through the points, with its marks along the way."""
    points = [(x, _FLOOR - 7 * level) for x, level in zip(xs, levels, strict=True)]
    shade = canvas.shade(colour)
    canvas.pen.line(points, fill=shade, width=3 if style in ("labelled", "single") else 2)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        for step in range(6):
            x, y = x0 + (x1 - x0) * step / 5, y0 + (y1 - y0) * step / 5
            canvas.mark((x - 3, y - 3, x + 3, y + 3), colour, "line", 0, rank)
    for (x, y), level in zip(points, levels, strict=True):
        if style != "bare":
            canvas.pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=shade)
        canvas.mark((x - 4, y - 4, x + 4, y + 4), colour, "point", round(level), rank)
