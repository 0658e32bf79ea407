"""The reference world: small pictures with questions whose answers are known by construction.

`draw_picture(seed, world)` is deterministic: a seed gives the same pixels, questions and answers on every machine.
Three worlds: BROAD is everything, the teacher's training; NARROW is the student's training; TARGET is the domain of the
unlabeled pool and of the labelled test, which only the teacher has seen. Seeds of the four uses
never meet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum

from PIL import Image

from mpa_edge.benchmarks.world_canvas import COLOURS, FONTS, Canvas, Mark, paint_background
from mpa_edge.benchmarks.world_charts import draw_bars, draw_lines
from mpa_edge.benchmarks.world_facts import Fact, Look
from mpa_edge.benchmarks.world_scenes import THINGS, draw_scene
from mpa_edge.benchmarks.world_shapes import SHAPES, draw_shapes
from mpa_edge.benchmarks.world_signs import WORDS, draw_sign

TRAIN_SEEDS = range(0, 10_000_000)
POOL_SEEDS = range(20_000_000, 21_000_000)
VALIDATION_SEEDS = range(25_000_000, 26_000_000)
TEST_SEEDS = range(30_000_000, 31_000_000)


class World(str, Enum):
    """Which domain a picture comes from."""

    BROAD = "broad"
    NARROW = "narrow"
    TARGET = "target"


_ALL = tuple(COLOURS)
LOOKS: dict[World, Look] = {
    World.BROAD: Look(
        fonts=FONTS,
        advances=(9.5, 14.5),
        backgrounds=("plain", "gradient", "stripes", "blobs"),
        grounds=_ALL,
        boards=_ALL,
        charts=("labelled", "grid", "outlined", "bare", "single"),
        shapes=SHAPES,
        things=THINGS,
        words=WORDS,
        noise=10.0,
        spelled=0.6,
    ),
    World.NARROW: Look(
        fonts=("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold"),
        advances=(11.0, 14.5),
        backgrounds=("plain", "gradient"),
        grounds=("white", "gray", "yellow", "pink", "green"),
        boards=_ALL,
        charts=("labelled", "outlined"),
        shapes=SHAPES,
        things=THINGS,
        words=WORDS[::2],
        noise=3.0,
        spelled=0.4,
    ),
    World.TARGET: Look(
        fonts=("DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneralBol"),
        advances=(10.5, 14.5),
        backgrounds=("plain", "gradient", "stripes", "blobs"),
        grounds=("white", "black", "blue", "orange", "brown", "gray"),
        boards=_ALL,
        charts=("labelled", "bare", "grid", "single"),
        shapes=SHAPES,
        things=THINGS,
        words=WORDS,
        noise=8.0,
    ),
}

_FAMILIES = (draw_sign, draw_bars, draw_lines, draw_shapes, draw_scene)
_FAMILY_WEIGHTS = (36, 22, 10, 20, 12)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, the facts that can be asked about it, and its marks (dense labels are made of them)."""

    image: Image.Image
    facts: tuple[Fact, ...]
    marks: tuple[Mark, ...]


def draw_picture(seed: int, world: World) -> Picture:
    """The picture of this seed in this world."""
    rng = random.Random(f"{world.value}-{seed}")
    look = LOOKS[world]
    look = replace(look, ground=rng.choice(look.grounds))
    canvas = Canvas(rng)
    family = rng.choices(_FAMILIES, _FAMILY_WEIGHTS)[0]
    calm = family in (draw_bars, draw_lines)
    paint_background(canvas, rng.choice(("plain", "gradient") if calm else look.backgrounds), look.ground)
    facts = family(canvas, look)
    if rng.random() < 0.7:
        canvas.noise(rng.uniform(0.0, look.noise))
    return Picture(canvas.image, tuple(facts), tuple(canvas.marks))
