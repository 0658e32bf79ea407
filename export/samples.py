"""Pictures and questions to verify a bundle with: the run's own, or drawn ones where there is no run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mpa_edge.errors import ImageError, RunError
from mpa_edge.parts import read_parts
from mpa_edge.records import Case, Sample, read_rows
from mpa_edge.run_folder import RunFolder, read_run
from mpa_edge.runtime.images import open_image
from mpa_edge.tasks import Task

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
        cases = list(read_parts(folder.cases, Case))
        paths = {sample.id: sample.path for sample in read_rows(folder.samples, Sample)}
        images = Path(read_run(run).get("config", {}).get("images", "."))
    except (OSError, RunError):
        return []
    root = images if images.is_dir() else images.parent
    step = max(1, len(cases) // max(1, count))
    questions = []
    for case in cases[::step][:count]:
        try:
            image = open_image(root / paths[case.sample_id])
        except (ImageError, KeyError):
            continue
        questions.append(Question(image, task.prompt(case.question) if task else case.question))
    return questions


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
