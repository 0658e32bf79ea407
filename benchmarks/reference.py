"""The reference pair: a tiny teacher and a tiny student, and the benchmark that they were trained for.

No torch here: pictures, questions and paths only. Load the checkpoints with `AutoModelForImageTextToText` and
`AutoProcessor`, as any other model.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from mpa_edge.benchmarks.world import POOL_SEEDS, TEST_SEEDS, VALIDATION_SEEDS, World, draw_picture
from mpa_edge.benchmarks.world_questions import ask

TEACHER = Path(__file__).parent / "reference" / "teacher"
STUDENT = Path(__file__).parent / "reference" / "student"


def write_pool(folder: str | Path, n: int = 1500) -> list[Path]:
    """Write the first `n` unlabeled pictures of the target domain to `folder` as PNG files; their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in _first(POOL_SEEDS, n):
        path = folder / f"pool-{seed - POOL_SEEDS.start:05d}.png"
        draw_picture(seed, World.TARGET).image.save(path, compress_level=1)
        paths.append(path)
    return paths


def write_test(folder: str | Path, n: int = 1500) -> Path:
    """Write the labelled test, a question per picture of the target domain, to `folder`; the path of its `test.jsonl`.

    Rows: `id`, `image` (relative to the file), `question`, `answers`, `kind`, and `group` (read, chart or describe).
    """
    return write_questions(Path(folder) / "test.jsonl", _first(TEST_SEEDS, n), World.TARGET)


def write_validation(folder: str | Path, n: int = 1500) -> Path:
    """As `write_test`, from seeds of its own: the labelled questions on which settings may be chosen."""
    return write_questions(Path(folder) / "validation.jsonl", _first(VALIDATION_SEEDS, n), World.TARGET)


def write_home(folder: str | Path, n: int = 1500) -> Path:
    """As `write_test`, from the narrow domain that the student was trained in: what it could forget."""
    return write_questions(Path(folder) / "home.jsonl", _first(TEST_SEEDS, n), World.NARROW)


def write_questions(path: Path, seeds: range, world: World) -> Path:
    """Write one question about each seed's picture to `path`, and the pictures to `images/` beside it; the path."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, seed in enumerate(seeds):
        picture = draw_picture(seed, world)
        question = ask(picture.facts, random.Random(f"question-{seed}"), world.value)
        name = f"{path.stem}-{number:05d}"
        picture.image.save(path.parent / "images" / f"{name}.png", compress_level=1)
        row = {"id": name, "image": f"images/{name}.png", "question": question.text, "answers": [question.answer]}
        rows.append(json.dumps(row | {"kind": question.kind, "group": question.group}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def _first(seeds: range, n: int) -> range:
    """The first `n` seeds of a range."""
    if not 0 < n <= len(seeds):
        raise ValueError(f"n must be between 1 and {len(seeds)}, not {n}")
    return seeds[:n]
