"""Prompts about picture files: what is open at a time, and whose fault it is when nothing is answered."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.asking import ask
from mpa_edge.errors import InputError, ModelError
from mpa_edge.fake import FakeSettings, FakeVlm
from mpa_edge.runtime.vlm import Decoding

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
