"""The annotator on a small real teacher, and its rules on texts made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.annotate import Annotator, annotations_of
from mpa_edge.asking import ask
from mpa_edge.errors import ModelError
from mpa_edge.fake import FakeSettings, FakeVlm
from mpa_edge.models import open_vlm
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Vlm
from mpa_edge.tasks import task_named

TASK = task_named("reference")
SAMPLE = Sample("s", "s.png", "0" * 64)


@pytest.fixture(scope="module")
def teacher(tiny_pair: Any) -> Vlm:
    return open_vlm(str(tiny_pair.teacher), device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def samples(tiny_pair: Any) -> list[Sample]:
    return [Sample(path.stem, str(path), path.stem) for path in sorted(tiny_pair.images.iterdir())][:10]


def test_the_teacher_writes_usable_pairs(teacher: Vlm, samples: list[Sample]) -> None:
    rows = Annotator(teacher, TASK, questions=2).annotations(samples)
    assert [row.id for row in rows[:3]] == ["000-0.0", "000-1.0", "001-0.0"]
    usable = [row for row in rows if row.reason is None]
    assert len(usable) >= 10
    assert {row.answer for row in usable} == {"red", "green", "blue", "yellow"}
    assert len({row.question for row in usable}) >= 2  # sampled, so not always the same question
    assert all(row.raw for row in rows)


def test_rows_do_not_depend_on_batches_or_chunks(tiny_pair: Any, samples: list[Sample]) -> None:
    found = []
    for batch_size, chunk_size in ((4, 4), (1, 10), (10, 3)):
        annotator = Annotator(open_vlm(str(tiny_pair.teacher), device="cpu", batch_size=batch_size), TASK, questions=2)
        chunks = [samples[start : start + chunk_size] for start in range(0, len(samples), chunk_size)]
        found.append([row for chunk in chunks for row in annotator.annotations(chunk)])
    assert found[0] == found[1] == found[2]


def test_the_seed_and_the_number_of_questions_shape_the_rows(teacher: Vlm, samples: list[Sample]) -> None:
    one, other = Annotator(teacher, TASK, seed=0), Annotator(teacher, TASK, seed=99)
    assert [row.raw for row in one.annotations(samples)] != [row.raw for row in other.annotations(samples)]
    several = Annotator(teacher, TASK, questions=2)
    assert len({str(item.fingerprint()) for item in (one, other, several)}) == 3


def test_a_picture_that_is_gone_is_one_row_with_its_reason(teacher: Vlm, samples: list[Sample], tmp_path: Path) -> None:
    gone = Sample("gone", str(tmp_path / "gone.png"), "0")
    rows = Annotator(teacher, TASK).annotations([samples[0], gone, samples[1]])
    assert [(row.sample_id, row.reason) for row in rows if row.sample_id == "gone"] == [("gone", "teacher_error")]
    assert "unreadable" in next(row.raw for row in rows if row.sample_id == "gone")
    assert sum(row.sample_id != "gone" for row in rows) == 2


def test_only_pictures_with_a_failed_row_are_asked_again(samples: list[Sample]) -> None:
    class Counting(FakeVlm):
        asked = 0

        def answer(self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> Any:
            self.asked += len(prompts)
            return [Answer("What colour? red")] * len(prompts)

    vlm = Counting()
    annotator = Annotator(vlm, TASK, questions=2)
    known = annotator.annotations(samples[:3])
    assert vlm.asked == 6
    # The second text about the second picture came to nothing.
    known[3] = Annotation(known[3].id, known[3].sample_id, "", "", "time-out", "teacher_error")
    again = annotator.annotations(samples[:3], known)
    assert vlm.asked == 8
    assert [row.failed for row in again] == [False] * 6
    assert [row.sample_id for row in again] == [name for name in ("000", "001", "002") for _ in range(2)]


@pytest.mark.parametrize(
    ("texts", "reasons"),
    [
        ([Answer("What colour? red")], [None]),
        ([Answer("What colour? red"), Answer("what  colour? blue")], [None, "duplicate"]),
        ([Answer("Question: A? Answer: x\nQuestion: B? Answer: y")], [None, None]),
        ([Answer("")], ["no_question"]),
        ([Answer("hm")], ["no_question"]),
        ([Answer("What colour? red", finish_reason="length")], ["unfinished"]),
        ([Answer("", finish_reason="error", error="out of memory")], ["teacher_error"]),
        ([Answer("What? one two three four five six")], ["answer_too_long"]),
    ],
)
def test_texts_become_rows(texts: list[Answer], reasons: list[str | None]) -> None:
    rows = annotations_of(SAMPLE, texts, TASK)
    assert [row.reason for row in rows] == reasons
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.sample_id == "s" for row in rows)


def test_a_model_that_refuses_everything_is_an_error(samples: list[Sample]) -> None:
    paths, prompts = [Path(sample.path) for sample in samples], ["?"] * len(samples)
    with pytest.raises(ModelError, match="fake answered none of 10 prompts; the first refusal: the fake refuses"):
        ask(FakeVlm(settings=FakeSettings(refuse=1.0)), paths, prompts, Decoding())
    # Those that failed before may fail again, all of them.
    answers = ask(FakeVlm(settings=FakeSettings(refuse=1.0)), paths, prompts, Decoding(), again=True)
    assert all(answer.error for answer in answers)


def test_answers_keep_their_places_beside_unreadable_pictures(tmp_path: Path, samples: list[Sample]) -> None:
    class Echo(FakeVlm):
        def answer(self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> Any:
            return [Answer(prompt) for prompt in prompts]

    good = Path(samples[0].path)
    answers = ask(Echo(), [good, tmp_path / "no.png", good] * 30, [str(n) for n in range(90)], Decoding())
    assert [answer.text for answer in answers] == [str(n) if n % 3 != 1 else "" for n in range(90)]
    assert all((answer.error is not None) == (n % 3 == 1) for n, answer in enumerate(answers))
