"""Pictures and questions to verify a bundle with: the run's own, or drawn ones where there is no run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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

# Of a run whose pictures are gone, no more rows than these are looked at: they are in memory.
MOST_DRAWN = 10_000
QUESTIONS = ("What is in the picture?", "What does the sign say?", "How many shapes are there?", "Is it red?")


@dataclass(frozen=True)
class Question:
    """One sample: an RGB picture and the text of the user's turn."""

    image: Image.Image
    prompt: str


def run_questions(run: Path, task: Task | None, count: int) -> list[Question]:
    """`count` questions that the run asked about its pictures, spread over it; fewer, or none, where it has no more.
    Pictures that are gone are passed over, and others drawn in their place, `MOST_DRAWN` in all."""
    folder, seen = RunFolder(run), set[str]()
    questions: list[Question] = []
    try:
        images = Path(read_run(run).get("config", {}).get("images", "."))
        parts = Parts(folder.cases, Case)
        drawn = count
        while len(questions) < count and drawn <= max(count, MOST_DRAWN):
            cases = [case for case in _some_cases(parts, drawn) if case.id not in seen]
            seen.update(case.id for case in cases)
            found = _asked(cases, folder, images if images.is_dir() else images.parent, task) if cases else iter(())
            questions += islice(found, count - len(questions))
            drawn *= 4
    except (OSError, RunError):
        pass  # none, or those of the parts that can be read
    return questions


def _asked(cases: Sequence[Case], folder: RunFolder, root: Path, task: Task | None) -> Iterator[Question]:
    """The questions of those cases whose pictures can be opened."""
    asked = {case.sample_id for case in cases}
    paths = {sample.id: sample.path for sample in read_rows(folder.samples, Sample) if sample.id in asked}
    for case in cases:
        try:
            image = open_image(root / paths[case.sample_id])
        except (ImageError, KeyError):
            continue
        yield Question(image, task.prompt(case.question) if task else case.question)


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
