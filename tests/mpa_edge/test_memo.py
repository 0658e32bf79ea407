"""A memo gives the model's answers, asks it once, and goes on after a kill."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mpa_edge.fake import open_fake
from mpa_edge.memo import MemoVlm
from mpa_edge.runtime.vlm import Answer, Decoding

PICTURES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
PROMPTS = ["What colour?", "How many?", "Where?"]


class Counting:
    """A fake that counts what it is asked."""

    def __init__(self, spec: str = "fake:") -> None:
        self._fake = open_fake(spec)
        self.name, self.engine, self.describe, self.close = "f", "fake", self._fake.describe, self._fake.close
        self.asked = 0

    def answer(self, images: list[Image.Image], prompts: list[str], decoding: Decoding) -> list[Answer]:
        self.asked += len(prompts)
        return self._fake.answer(images, prompts, decoding)


def texts(vlm: MemoVlm, decoding: Decoding) -> list[str]:
    return [answer.text for answer in vlm.answer(PICTURES, PROMPTS, decoding)]


def test_what_was_asked_is_not_asked_again_and_the_answer_is_the_same(tmp_path: Path) -> None:
    model = Counting()
    first = texts(MemoVlm(model, tmp_path / "memo.jsonl"), Decoding())
    assert first == [answer.text for answer in model.answer(PICTURES, PROMPTS, Decoding())]
    model.asked = 0
    assert texts(MemoVlm(model, tmp_path / "memo.jsonl"), Decoding()) == first
    assert model.asked == 0


def test_another_decoding_and_another_model_are_other_questions(tmp_path: Path) -> None:
    model, other = Counting(), Counting("fake:?seed=5")
    texts(MemoVlm(model, tmp_path / "memo.jsonl"), Decoding())
    texts(MemoVlm(model, tmp_path / "memo.jsonl"), Decoding(temperature=1.0))
    texts(MemoVlm(other, tmp_path / "memo.jsonl"), Decoding())
    assert (model.asked, other.asked) == (6, 3)


def test_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    path, model = tmp_path / "memo.jsonl", Counting()
    expected = texts(MemoVlm(model, path), Decoding())
    path.write_text(path.read_text()[:-20])
    model.asked = 0
    assert texts(MemoVlm(model, path), Decoding()) == expected
    assert model.asked == 1
    assert texts(MemoVlm(model, path), Decoding()) == expected
    assert model.asked == 1


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    model = Counting("fake:?refuse=1")
    memo = MemoVlm(model, tmp_path / "memo.jsonl")
    assert all(answer.error for answer in memo.answer(PICTURES, PROMPTS, Decoding()))
    assert all(answer.error for answer in memo.answer(PICTURES, PROMPTS, Decoding()))
    assert model.asked == 6
