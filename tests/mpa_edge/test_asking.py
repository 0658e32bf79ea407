"""Prompts about picture files: what is open at a time, and whose fault it is when nothing is answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.asking import ask
from mpa_edge.errors import InputError, ModelError
from mpa_edge.fake import FakeSettings, FakeVlm
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding

REFUSES = FakeSettings(refuse=1.0)


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    """300 pictures of 8 pixels."""
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    paths = [tmp_path / f"{number}.png" for number in range(300)]
    for path in paths:
        path.hardlink_to(tmp_path / "small.png")
    return paths


def test_when_no_picture_can_be_opened_the_model_is_not_blamed(tmp_path: Path, small: list[Path]) -> None:
    gone = [tmp_path / "gone" / f"{number}.png" for number in range(8)]
    with pytest.raises(InputError, match=r"none of 8 pictures can be opened any more; the first: .*gone/0\.png \("):
        ask(FakeVlm(), gone * 2, ["?"] * 16, Decoding())
    assert all(answer.error for answer in ask(FakeVlm(), gone, ["?"] * 8, Decoding(), again=True))
    with pytest.raises(ModelError, match="answered none of 9 prompts; the first refusal: the fake refuses"):
        ask(FakeVlm(settings=REFUSES), [*gone, *small[:9]], ["?"] * 17, Decoding())
    # Of few that it was asked, a model may refuse all.
    assert all(answer.error for answer in ask(FakeVlm(settings=REFUSES), [*gone, small[0]], ["?"] * 9, Decoding()))


class Counts(FakeVlm):
    """Remembers how many pairs came at a time."""

    batch_size = 1
    seen: tuple[int, ...] = ()

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        self.seen += (len(images),)
        return [Answer(prompt) for prompt in prompts]


def test_many_small_pictures_are_open_at_once_and_few_large_ones(tmp_path: Path, small: list[Path]) -> None:
    prompts = [str(number) for number in range(300)]
    vlm = Counts()
    assert [answer.text for answer in ask(vlm, small, prompts, Decoding())] == prompts
    assert vlm.seen == (256, 44)
    large = []
    for number in range(3):
        large.append(tmp_path / f"large-{number}.png")
        Image.new("RGB", (5000, 2000)).save(large[-1], compress_level=1)
    vlm = Counts()
    ask(vlm, [*large, *small[:97]], prompts[:100], Decoding())
    assert vlm.seen == (32, 68)
    vlm = Counts()
    ask(vlm, large[:1] * 100, prompts[:100], Decoding())  # one picture, opened once
    assert vlm.seen == (100,)
    vlm = Counts()
    vlm.batch_size = 40
    ask(vlm, [*large, *small[:97]], prompts[:100], Decoding())
    assert vlm.seen == (40, 60)
