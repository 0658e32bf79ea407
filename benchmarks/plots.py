"""The geometry of the one plot that is not made of bars: accuracy against latency, in SVG units.

The template draws it, so that its colours follow the page's light or dark theme and its text can be searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, log10
from typing import Any

from mpa_edge.benchmarks.pareto import unbeaten

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 14, 44
LETTER, LINE = 7.2, 14  # about the width and height of the labels' letters
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Label:
    """Where a name stands; `anchor` is SVG's. With `lead`, it is so far away that a line should go there."""

    x: float
    y: float
    anchor: str
    lead: bool


@dataclass(frozen=True)
class Point:
    """A variant: its place, its interval's ends (y), its p95 (x), and its label."""

    name: str
    tone: str
    x: float
    y: float
    low: float
    high: float
    p95: float
    label: Label
    title: str
    best: bool = True  # none is measurably better in one and as good in the other
    picked: bool = False


@dataclass(frozen=True)
class Scatter:
    """Everything that the template draws."""

    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    front: str = ""  # an SVG path
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on the page from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def scatter(entries: Sequence[dict[str, Any]], pick: str | None = None) -> Scatter | None:
    """Accuracy against the median latency (logarithmic); None where no variant has both. `pick` is marked."""
    answered = [entry for entry in entries if entry["accuracy"]["value"] is not None]
    known = [entry for entry in answered if entry["latency_ms"]["total"]["p50"]]
    if not known:
        return None
    x, y = axes(known)
    ends = [x.at(log10(entry["latency_ms"]["total"]["p95"])) for entry in known]
    labels = place_labels([entry["name"] for entry in known], [place_of(entry, x, y) for entry in known], ends)
    points = tuple(
        replace(point(entry, label, x, y), best=best, picked=entry["name"] == pick)
        for entry, label, best in zip(known, labels, unbeaten(known), strict=True)
    )
    edge = [(one.x, one.y) for one in points if one.best]
    step = next(size for size in (0.05, 0.1, 0.2) if (y.high - y.low) / size <= 8)
    shares = [number * step for number in range(ceil(y.low / step - 1e-9), floor(y.high / step + 1e-9) + 1)]
    return Scatter(
        points,
        tuple(Tick(x.at(log10(value)), duration(value)) for value in decades(x.low, x.high)),
        tuple(Tick(y.at(value), f"{100 * value:.0f}%") for value in shares),
        steps([edge[place] for place in front([(left, -top) for left, top in edge])]),
    )


def front(values: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the (time, accuracy) that no other beats, from the fastest on: none is as fast and more accurate,
    or as accurate and faster."""
    best: list[int] = []
    for place in sorted(range(len(values)), key=lambda place: (values[place][0], -values[place][1])):
        if not best or values[place][1] > values[best[-1]][1]:
            best.append(place)
    return best


def steps(places: Sequence[tuple[float, float]]) -> str:
    """An SVG path along the edge of what the front reaches; empty for a single point."""
    if len(places) < 2:
        return ""
    (x, y), *rest = places
    return f"M{x} {y}" + "".join(f"H{next_x}V{next_y}" for next_x, next_y in rest)


def strokes(times: Sequence[float], longest: float) -> str:
    """An SVG path with a stroke per time, on 1000 by 22 units."""
    return "".join(f"M{1000 * time / longest:.1f} 4v14" for time in sorted(times))


def axes(known: Sequence[dict[str, Any]]) -> tuple[Axis, Axis]:
    """Axes that hold all points with their ranges: the logarithm of milliseconds, and shares in steps of 5%."""
    times = [entry["latency_ms"]["total"][q] for entry in known for q in ("p50", "p95")]
    ends = [end for entry in known for end in entry["accuracy"]["ci95"]]
    low, high = max(0.0, floor(min(ends) * 20) / 20), min(1.0, ceil(max(ends) * 20) / 20)
    return (
        Axis(log10(min(times)) - 0.12, log10(max(times)) + 0.12, LEFT, WIDTH - RIGHT),
        Axis(min(low, 0.95), max(high, min(low, 0.95) + 0.05), HEIGHT - BOTTOM, TOP),
    )


def point(entry: dict[str, Any], label: Label, x: Axis, y: Axis) -> Point:
    """A variant's point."""
    low, high = entry["accuracy"]["ci95"]
    place = place_of(entry, x, y)
    p95 = x.at(log10(entry["latency_ms"]["total"]["p95"]))
    return Point(entry["name"], entry["tone"], *place, y.at(low), y.at(high), p95, label, entry["facts"])


def place_of(entry: dict[str, Any], x: Axis, y: Axis) -> tuple[float, float]:
    """Where a variant's point is."""
    return x.at(log10(entry["latency_ms"]["total"]["p50"])), y.at(entry["accuracy"]["value"])


def duration(value: float) -> str:
    """Milliseconds of one figure: 5 ms, 2 s."""
    return f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s"


def decades(low: float, high: float) -> list[float]:
    """Round values between two powers of ten: 1, 2, 5, 10 …, or closer ones on a short axis."""
    powers = range(floor(low), ceil(high) + 1)
    coarse, fine = (
        [value for power in powers for digit in digits if low <= log10(value := digit * 10.0**power) <= high]
        for digits in ((1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    )
    return coarse if len(coarse) >= 3 else fine


def place_labels(
    names: Sequence[str], places: Sequence[tuple[float, float]], ends: Sequence[float] = ()
) -> list[Label]:
    """Labels beside their points, further away where others are in the way, none on another where there is room.
    `ends` are where the lines to the right of the points end, which are in the way, too."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    taken += [(x, y - 1, end, y + 1) for (x, y), end in zip(places, ends, strict=False)]
    labels = []
    for name, (x, y) in zip(names, places, strict=True):
        spots = [Label(x + 11, y + 4, "start", False), Label(x - 11, y + 4, "end", False)]
        for away in (18, 32, 46, 60, 74, 88):
            for base in (y - away, y + away + 8):
                spots += [Label(x, base, "middle", away > 18), Label(x + 11, base, "start", True)]
                spots += [Label(x - 11, base, "end", True)]
        boxes = [(spot, box_of(spot, name)) for spot in spots]
        free = [spot for spot, box in boxes if inside(box) and not any(overlap(box, one) for one in taken)]
        labels.append((free or spots)[0])
        taken.append(box_of(labels[-1], name))
    return labels


def box_of(label: Label, name: str) -> Box:
    """About the place that a label takes."""
    width = len(name) * LETTER
    left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
    return (left, label.y - LINE + 3, left + width, label.y + 3)


def inside(box: Box) -> bool:
    """Whether a box lies in the plot."""
    return box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - BOTTOM


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
