"""Scenes to describe: a few things on the ground under a sky."""

from __future__ import annotations

from mpa_edge.benchmarks.world_canvas import SIZE, Canvas, distinct
from mpa_edge.benchmarks.world_facts import Fact, Look

THINGS = ("house", "tree", "car", "boat", "flower", "fish", "flag")
_PLACES = {"left": 18, "middle": 48, "right": 78}
_PAINTED = ("house", "car", "boat", "flower", "fish", "flag")


def draw_thing(canvas: Canvas, thing: str, x: float, y: float, colour: str) -> None:
    """Draw one of `THINGS` standing at (x, y), about 26 pixels high, and mark it."""
    pen, fill, dark = canvas.pen, canvas.shade(colour), canvas.shade("black", 12)
    if thing == "house":
        pen.rectangle((x - 12, y - 16, x + 12, y), fill=fill)
        pen.polygon([(x - 15, y - 16), (x, y - 28), (x + 15, y - 16)], fill=fill)
        pen.rectangle((x - 3, y - 9, x + 3, y), fill=dark)
    elif thing == "tree":
        pen.rectangle((x - 2, y - 12, x + 2, y), fill=canvas.shade("brown"))
        pen.ellipse((x - 11, y - 28, x + 11, y - 8), fill=canvas.shade("green"))
    elif thing == "car":
        pen.rounded_rectangle((x - 14, y - 12, x + 14, y - 3), 3, fill=fill)
        pen.polygon([(x - 9, y - 12), (x - 5, y - 19), (x + 5, y - 19), (x + 9, y - 12)], fill=fill)
        pen.ellipse((x - 11, y - 6, x - 4, y + 1), fill=dark)
        pen.ellipse((x + 4, y - 6, x + 11, y + 1), fill=dark)
    elif thing == "boat":
        pen.polygon([(x - 14, y - 8), (x + 14, y - 8), (x + 8, y), (x - 8, y)], fill=fill)
        pen.line((x, y - 8, x, y - 28), fill=dark, width=2)
        pen.polygon([(x + 2, y - 26), (x + 12, y - 11), (x + 2, y - 11)], fill=canvas.shade("white"))
    elif thing == "flower":
        pen.line((x, y, x, y - 14), fill=canvas.shade("green"), width=2)
        for across, up in ((-5, 18), (5, 18), (0, 23), (0, 13)):
            pen.ellipse((x + across - 5, y - up - 5, x + across + 5, y - up + 5), fill=fill)
        pen.ellipse((x - 3, y - 21, x + 3, y - 15), fill=canvas.shade("yellow"))
    elif thing == "fish":
        pen.ellipse((x - 13, y - 16, x + 7, y - 3), fill=fill)
        pen.polygon([(x + 5, y - 10), (x + 14, y - 16), (x + 14, y - 3)], fill=fill)
        pen.ellipse((x - 9, y - 12, x - 6, y - 9), fill=dark)
    else:
        pen.line((x - 9, y, x - 9, y - 28), fill=dark, width=2)
        pen.rectangle((x - 8, y - 28, x + 11, y - 15), fill=fill)
    canvas.mark((x - 13, y - 27, x + 13, y), "green" if thing == "tree" else colour, thing)


def draw_scene(canvas: Canvas, look: Look) -> list[Fact]:
    """One to three things side by side, by day or by night, and all that can be asked about them."""
    rng = canvas.rng
    night = rng.random() < 0.5
    _draw_sky(canvas, night)
    count = rng.randint(1, 3)
    things = rng.sample(look.things, count)
    places = rng.sample(list(_PLACES), count)
    paint = dict(zip(things, distinct(rng, count, ("green", "brown", "blue" if not night else "black")), strict=True))
    facts = [Fact("scene_time", "night" if night else "day")]
    for thing, place in zip(things, places, strict=True):
        draw_thing(canvas, thing, _PLACES[place] + rng.uniform(-2, 2), rng.uniform(80, 90), paint[thing])
        facts.append(Fact("scene_thing", thing, {"place": place}))
        if thing in _PAINTED:
            facts.append(Fact("scene_color", paint[thing], {"thing": thing}))
    facts.append(Fact("scene_presence", "yes", {"thing": rng.choice(things)}))
    facts.append(Fact("scene_presence", "no", {"thing": rng.choice([t for t in look.things if t not in things])}))
    facts.append(Fact("scene_count", str(count)))
    return facts


def _draw_sky(canvas: Canvas, night: bool) -> None:
    """Sky, ground, and sun or moon, maybe a cloud."""
    rng, horizon = canvas.rng, canvas.rng.randint(62, 74)
    sky = tuple(part + rng.randint(-12, 12) for part in ((24, 28, 66) if night else (160, 206, 238)))
    canvas.pen.rectangle((0, 0, SIZE, horizon), fill=sky)
    land = tuple(part + rng.randint(-14, 14) for part in rng.choice(((96, 170, 84), (196, 178, 120), (150, 150, 150))))
    canvas.pen.rectangle((0, horizon, SIZE, SIZE), fill=tuple(part // 2 for part in land) if night else land)
    x, y = rng.uniform(14, 82), rng.uniform(12, 20)
    canvas.pen.ellipse((x - 8, y - 8, x + 8, y + 8), fill=canvas.shade("white" if night else "yellow"))
    if night:
        canvas.pen.ellipse((x - 3, y - 9, x + 11, y + 5), fill=sky)
    canvas.mark((x - 8, y - 8, x + 8, y + 8), "white" if night else "yellow", "moon" if night else "sun")
    if rng.random() < 0.4:
        x = rng.uniform(14, 82)
        for across, down in ((-7, 3), (0, 0), (7, 3)):
            canvas.pen.ellipse(
                (x + across - 6, 30 + down - 4, x + across + 6, 30 + down + 4), fill=canvas.shade("gray")
            )
        canvas.mark((x - 13, 26, x + 13, 37), "gray", "cloud")
