"""A teacher that knows something and a student that does not, made in seconds: discs of four colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COLOURS = ("red", "green", "blue", "yellow")
QUESTIONS = ("What colour?", "Which colour is the disc?")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' machine may have a key; no test may send it anywhere."""
    for name in ("OPENAI_API_KEY", "MPA_EDGE_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Pair:
    """Folders: 24 unlabeled pictures, a teacher that writes about them, a student that never saw any."""

    images: Path
    teacher: Path
    student: Path


def draw_discs(folder: Path, count: int = 24, first: int = 0) -> list[tuple[Path, str]]:
    """Write pictures and return them with their colours; each is different from all others."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    discs = []
    for number in range(first, first + count):
        colour = COLOURS[number % len(COLOURS)]
        image = Image.new("RGB", (64, 64), (number % 60, 10 + number // 60, 10))
        ImageDraw.Draw(image).ellipse((5, 5, 60, 60), fill=colour)
        path = folder / f"{number:03d}.png"
        image.save(path)
        discs.append((path, colour))
    return discs


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory, tiny_one_tile: Path) -> Pair:
    """The teacher is `tiny_one_tile` trained for some seconds on labelled discs, the student is `tiny_one_tile`."""
    folder = tmp_path_factory.mktemp("pair")
    draw_discs(folder / "images")
    _teach(tiny_one_tile, draw_discs(folder / "labelled", first=100), folder / "teacher")
    return Pair(folder / "images", folder / "teacher", tiny_one_tile)


def _teach(base: Path, discs: list[tuple[Path, str]], out: Path) -> None:
    import torch

    from mpa_edge.tasks import task_named
    from mpa_edge.training_data import Example, TrainingData, loss_and_exact
    from mpa_edge.transformers_vlm import TransformersVlm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = task_named("reference")
    vlm = TransformersVlm.load(str(base), device="cpu")
    examples = []
    for number, (path, colour) in enumerate(discs):
        for question in QUESTIONS:
            examples.append(Example(str(number), "", path, task.annotate_prompt, f"{question} {colour}", ""))
            examples.append(Example(str(number), "", path, task.prompt(question), colour, ""))
    data = TrainingData(vlm, examples)
    data.prepare()
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=2e-3)
    for epoch in range(25):
        for batch in data.batches(range(len(examples)), 16, str(epoch)):
            loss, _ = loss_and_exact(vlm.model, *data.batch(batch))
            optimizer.zero_grad()
            (loss / len(batch)).backward()
            optimizer.step()
    vlm.model.save_pretrained(out)
    vlm.processor.save_pretrained(out)


@pytest.fixture(scope="session")
def disc_examples(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`disc_examples(count, *questions)`: training examples of discs in four colours; the questions take turns."""
    from mpa_edge.training_data import Example

    def make(count: int, *questions: str) -> list[Any]:
        discs = enumerate(draw_discs(tmp_path_factory.mktemp("discs"), count))
        return [
            Example(f"e{number}", f"g{number}", path, questions[number % len(questions)], colour, "parity")
            for number, (path, colour) in discs
        ]

    return make
