"""Equal answers are counted question by question, apart from whether they are right."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mpa_edge.benchmarks.agreement import agreement
from mpa_edge.labelled import Question
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.tasks import TASKS


class Says:
    """A model that says the same words every time."""

    engine = "test"

    def __init__(self, name: str, words: list[str]) -> None:
        self.name, self.words = name, words

    def answer(self, images: list[Image.Image], prompts: list[str], decoding: Decoding = GREEDY) -> list[Answer]:
        return [Answer(word) for word in self.words]

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        return None


def test_agreement_is_not_accuracy(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    questions = [Question(str(n), str(tmp_path / "a.png"), "What?", ("red",)) for n in range(4)]
    merged, bundle = Says("merged", ["red", "blue", "red", "x"]), Says("q4", ["red", "green", "red", "red"])
    assert agreement(merged, [bundle], questions, TASKS["reference"]) == {
        "questions": 4,
        "merged": {"accuracy": 0.5},
        "q4": {"same_answer": 0.5, "accuracy": 0.75},
    }
