"""Pictures and questions to verify a bundle with: the run's own, or drawn ones where there is no run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from mpa_edge.errors import ImageError, RunError
from mpa_edge.parts import Parts
from mpa_edge.records import Case, Sample, read_rows
from mpa_edge.run_folder import RunFolder, read_run
from mpa_edge.runtime.images import open_image
from mpa_edge.tasks import Task

Item = TypeVar("Item")

QUESTIONS = ("What is in the picture?", "What does the sign say?", "How many shapes are there?", "Is it red?")


@dataclass(frozen=True)
class Question:
    """One sample: an RGB picture and the text of the user's turn."""

    image: Image.Image
    prompt: str


def run_questions(run: Path, task: Task | None, count: int) -> list[Question]:
    """Up to `count` questions that the run asked about its pictures, spread over it; fewer, or none, where it has them
    no more. Pictures that are gone are passed over."""
    folder = RunFolder(run)
    try:
        cases = _some_cases(Parts(folder.cases, Case), count)
        asked = {case.sample_id for case in cases}
        paths = {sample.id: sample.path for sample in read_rows(folder.samples, Sample) if sample.id in asked}
        images = Path(read_run(run).get("config", {}).get("images", "."))
    except (OSError, RunError):
        return []
    root = images if images.is_dir() else images.parent
    questions = []
    for case in cases:
        try:
            image = open_image(root / paths[case.sample_id])
        except (ImageError, KeyError):
            continue
        questions.append(Question(image, task.prompt(case.question) if task else case.question))
    return questions


def _some_cases(parts: Parts[Case], count: int) -> list[Case]:
    """So many, from all over; a run of a million is not read through for them."""
    numbers = _spread(range(parts.count), count)
    each = -(-count // max(1, len(numbers)))
    return [case for number in numbers for case in _spread(parts.read(number), each)][:count]


def _spread(items: Sequence[Item], count: int) -> Sequence[Item]:
    return items[:: max(1, len(items) // max(1, count))][:count]


def synthetic_questions(count: int) -> list[Question]:
    """`count` drawn pictures of different sizes with a question each; the same in every call."""
    random = np.random.default_rng(0)
    return [Question(_drawing(random), QUESTIONS[index % len(QUESTIONS)]) for index in range(count)]


def _drawing(random: np.random.Generator) -> Image.Image:
    width, height = (int(edge) for edge in random.integers(60, 400, 2))
    image = Image.new("RGB", (width, height), tuple(int(part) for part in random.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(1, 6))):
        x, y = int(random.integers(0, width)), int(random.integers(0, height))
        size = int(random.integers(10, 60))
        colour = tuple(int(part) for part in random.integers(0, 256, 3))
        shape = draw.ellipse if random.integers(0, 2) else draw.rectangle
        shape((x, y, x + size, y + size), fill=colour)
    draw.text((width // 4, height // 2), str(int(random.integers(0, 1000))), fill="white")
    return image
