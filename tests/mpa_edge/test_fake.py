from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.errors import InputError, ModelError
from mpa_edge.fake import open_fake
from mpa_edge.runtime.vlm import Decoding, Vlm


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = []
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "question": "what?", "answers": [f"answer {number}"]})
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask_all(spec: str, labelled: Path) -> list[str]:
    images = [Image.open(labelled.parent / f"{number}.png") for number in range(40)]
    return [answer.text for answer in open_fake(spec).answer(images, ["Look: what? Answer briefly."] * 40)]


def test_it_is_a_vlm_and_always_says_the_same(labelled: Path) -> None:
    assert isinstance(open_fake("fake:"), Vlm)
    assert ask_all("fake:", labelled) == ask_all("fake:", labelled)
    assert len(set(ask_all("fake:", labelled))) > 3


def test_it_is_right_as_often_as_asked_and_on_nested_sets(labelled: Path) -> None:
    truth = [f"answer {number}" for number in range(40)]
    assert ask_all(f"fake:?known={labelled}", labelled) == truth
    right = {
        share: {answer for answer in ask_all(f"fake:?known={labelled}&right={share}", labelled) if answer in truth}
        for share in (0.3, 0.7)
    }
    assert 4 < len(right[0.3]) < 20 < len(right[0.7]) < 36
    assert right[0.3] < right[0.7]


def test_time_passes_in_the_phase_that_is_slow() -> None:
    (answer,) = open_fake("fake:?vision=30").answer([Image.new("RGB", (2, 2))], ["?"])
    assert answer.timings.vision is not None
    assert answer.timings.total is not None
    assert answer.timings.decode is not None
    assert answer.timings.vision >= 30 > answer.timings.decode
    assert answer.timings.total >= answer.timings.vision


def test_answers_respect_the_token_limit() -> None:
    (answer,) = open_fake("fake:").answer([Image.new("RGB", (2, 2))], ["?"], Decoding(max_new_tokens=2))
    assert len(answer.tokens) == len(answer.text) == 2


def test_refusals_are_errors_of_one_answer() -> None:
    (answer,) = open_fake("fake:?refuse=1").answer([Image.new("RGB", (2, 2))], ["?"])
    assert (answer.finish_reason, answer.text) == ("error", "")
    assert answer.error


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("fake:?colour=1", InputError, "no setting 'colour'"),
        ("fake:?right=often", InputError, "right must be a number"),
        ("fake:?known=/nowhere.jsonl", InputError, "nowhere"),
        ("fake:?broken=out+of+memory", ModelError, "out of memory"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_fake(spec)
