"""How questions are put to a model, and a few distinct pictures for the clock."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mpa_edge.benchmarks.jobs import Ask
from mpa_edge.bundle import Bundle, sha256_of
from mpa_edge.errors import InputError
from mpa_edge.labelled import Question
from mpa_edge.runtime.families import family_of_bundle

WARM_UP = 3  # calls at least: the first ones also load libraries and fill caches
WARM_UP_COSTS = 24  # pictures that cost differently are warmed up with, so many at most
HEADERS = 2000  # pictures that are looked at for them, at most
Cost = Callable[[tuple[int, int] | None], Hashable]


@dataclass(frozen=True)
class Item:
    """A question with what a model gets to see of it."""

    question: Question
    ask: Ask
    picture: str  # digest of the file's content


def items_of(questions: Sequence[Question], prompt: Callable[[str], str]) -> list[Item]:
    """The questions as they are put. The key is made of content, so moved or renamed pictures keep their answers."""
    digests: dict[str, str] = {}
    items = []
    for question in questions:
        if question.image not in digests:
            digests[question.image] = sha256_of(Path(question.image))
        picture, text = digests[question.image], prompt(question.question)
        key = hashlib.sha256(f"{picture} {text}".encode()).hexdigest()[:24]
        items.append(Item(question, Ask(key, question.image, text), picture))
    return items


def latency_set(
    items: Sequence[Item], n: int, seed: int, cost: Cost = lambda size: size
) -> tuple[list[Ask], list[Ask]]:
    """Warm-up questions, and up to `n` questions to time, no two about one picture.

    Distinct pictures keep prefix caches out of the figures. `cost` says of a picture's size what decides how much work
    it is (see `cost_of`): the warm-up has a picture of every cost that it finds outside of the timed set, since engines
    plan and reserve memory at the first input of a shape.
    """
    by_picture: dict[str, Item] = {}
    order = random.Random(seed).sample(range(len(items)), len(items))
    for place in order:
        by_picture.setdefault(items[place].picture, items[place])
    pictures = list(by_picture.values())
    timed, rest = pictures[:n], pictures[n:] or pictures
    wanted = {cost(size_of(item.ask.image)) for item in timed}
    found = {cost(size_of(item.ask.image)): item for item in rest[:HEADERS]}
    warm = [item for which, item in found.items() if which in wanted][:WARM_UP_COSTS]
    while rest and len(warm) < WARM_UP:
        warm.append(rest[len(warm) % len(rest)])
    return [item.ask for item in warm], [item.ask for item in timed]


def cost_of(bundles: Sequence[Bundle]) -> Cost:
    """How many image tokens a picture of a size takes in each bundle; the size itself where there is no bundle."""
    seen = [(family_of_bundle(bundle), bundle.image) for bundle in bundles]

    def cost(size: tuple[int, int] | None) -> Hashable:
        if size is None or not seen:
            return size
        try:
            return tuple(family.image_tokens(*family.grid(size, image), image) for family, image in seen)
        except InputError:  # a shape that the model refuses
            return size

    return cost


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height from the file's header; None for a file that is no picture."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return int(width), int(height)
    except OSError:
        return None
