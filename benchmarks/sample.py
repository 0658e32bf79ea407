"""How questions are put to a model, and a few distinct pictures for the clock."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mpa_edge.benchmarks.worker import Ask
from mpa_edge.bundle import sha256_of
from mpa_edge.labelled import Question

WARM_UP = 3  # calls at least: the first ones also load libraries and fill caches
WARM_UP_SIZES = 8  # pictures of so many different sizes are warmed up with at most


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


def latency_set(items: Sequence[Item], n: int, seed: int) -> tuple[list[Ask], list[Ask]]:
    """Warm-up questions, and up to `n` questions to time, no two about one picture.

    Distinct pictures keep prefix caches out of the figures. The warm-up has a picture of every size in the timed set
    (a size decides how many tiles a model sees) that is not timed itself where there are enough pictures.
    """
    by_picture: dict[str, Item] = {}
    order = random.Random(seed).sample(range(len(items)), len(items))
    for place in order:
        by_picture.setdefault(items[place].picture, items[place])
    pictures = list(by_picture.values())
    timed, rest = pictures[:n], pictures[n:] or pictures
    sizes = {size_of(item.ask.image): item for item in rest[: 20 * WARM_UP_SIZES]}
    warm = list(sizes.values())[:WARM_UP_SIZES]
    while rest and len(warm) < WARM_UP:
        warm.append(rest[len(warm) % len(rest)])
    return [item.ask for item in warm], [item.ask for item in timed]


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height from the file's header; None for a file that is no picture."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return int(width), int(height)
    except OSError:
        return None
