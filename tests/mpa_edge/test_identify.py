"""The identifier's verdicts, and its stage on two small real models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.asking import GREY
from mpa_edge.fake import FakeSettings, FakeVlm
from mpa_edge.identify import Identifier, Reidentifier, case_of, verdict_of
from mpa_edge.models import open_vlm
from mpa_edge.records import Annotation, Case
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.tasks import task_named

TASK = task_named("reference")


def annotation(answer: str = "red", name: str = "000") -> Annotation:
    return Annotation(f"{name}-0.0", name, "What colour?", answer, f"What colour? {answer}")


@pytest.mark.parametrize(
    ("teacher", "student", "verdict"),
    [
        (1.0, 0.0, "parity"),
        (0.5, 0.49, "parity"),
        (1.0, 0.5, "agree"),
        (0.0, 1.0, "unconfirmed"),
        (0.49, 0.0, "unconfirmed"),
    ],
)
def test_verdicts(teacher: float, student: float, verdict: str) -> None:
    assert verdict_of(teacher, student) == verdict


def test_a_case_keeps_both_answers_and_scores() -> None:
    case = case_of(annotation("12.50"), [Answer("12.50")], Answer("12"), "exact_match")
    assert (case.teacher_answer, case.student_answer) == ("12.50", "12")
    assert (case.teacher_score, case.student_score, case.verdict, case.reason) == (1.0, 0.0, "parity", None)


def test_the_papers_rule_sees_substrings() -> None:
    five, fifteen = Answer("5"), Answer("15")
    assert case_of(annotation("5"), [five], fifteen, "exact_match").verdict == "parity"
    assert case_of(annotation("5"), [five], fifteen, "containment").verdict == "agree"


def test_an_answer_that_failed_is_an_error_whatever_the_scores() -> None:
    failed = Answer("red", finish_reason="error", error="out of memory")
    case = case_of(annotation(), [failed], Answer("red"), "exact_match")
    assert (case.verdict, case.reason, case.teacher_score) == ("error", "teacher: out of memory", 0.0)
    case = case_of(annotation(), [Answer("red")], failed, "exact_match")
    assert (case.verdict, case.reason, case.student_score) == ("error", "student: out of memory", 0.0)


ONE = [Answer("red")]


def answers(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


@pytest.mark.parametrize(
    ("votes", "score", "verdict", "short"),
    [
        (("red", "Red", "blue"), 2 / 3, "parity", "red"),
        (("red", "blue", "blue"), 1 / 3, "unconfirmed", "red"),
        (("blue", "Red", "red"), 2 / 3, "parity", "Red"),  # not the greedy one, which is outvoted
        (("red", "blue"), 0.5, "unconfirmed", "red"),  # more than half must confirm
        (("blue", "green", "blue"), 0.0, "unconfirmed", "blue"),
    ],
)
def test_most_votes_must_confirm(votes: tuple[str, ...], score: float, verdict: str, short: str) -> None:
    case = case_of(annotation(), answers(*votes), Answer("no"), "exact_match")
    assert (case.teacher_score, case.verdict, case.teacher_answer) == (score, verdict, short)
    assert case.votes == votes
    assert Case.from_json(case.to_json()) == case


def test_a_vote_that_failed_is_an_error() -> None:
    failed = Answer("", finish_reason="error", error="time-out")
    case = case_of(annotation(), [*ONE, *ONE, failed], Answer("no"), "exact_match")
    assert (case.verdict, case.reason) == ("error", "teacher: time-out")


def test_what_is_answered_without_the_picture_is_blind_whoever_is_right() -> None:
    for student, blind, verdict in (("no", "red", "blind"), ("red", "Red", "blind"), ("no", "blue", "parity")):
        case = case_of(annotation(), ONE, Answer(student), "exact_match", Answer(blind))
        assert (case.verdict, case.blind_answer) == (verdict, blind)
    assert case_of(annotation(), answers("blue"), Answer("no"), "exact_match", Answer("red")).verdict == "blind"


def test_rows_of_older_runs_read() -> None:
    old = case_of(annotation(), ONE, Answer("no"), "exact_match").to_json()
    del old["votes"], old["blind_answer"]
    case = Case.from_json(old)
    assert (case.votes, case.blind_answer, case.failed) == ((), None, False)


class Told(FakeVlm):
    """Says what a function of the picture and the decoding says, and notes the prompts that it got."""

    def __init__(self, tell: Callable[[Image.Image, Decoding], str]) -> None:
        super().__init__()
        self.tell, self.prompts = tell, list[str]()

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        self.prompts += prompts
        return [Answer(text) if (text := self.tell(image, decoding)) else FAILED for image in images]


FAILED = Answer("", finish_reason="error", error="out of memory")


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.png" for name in ("red", "blue")}
    for number, (name, path) in enumerate(paths.items()):
        Image.new("RGB", (20 + number, 30), name).save(path)
    return paths


def test_the_blind_teacher_sees_a_grey_picture_of_the_same_size(pictures: dict[str, Path]) -> None:
    seen: list[tuple[Any, Any]] = []

    def tell(image: Image.Image, decoding: Decoding) -> str:
        seen.append((image.size, image.getpixel((5, 5))))
        return "red"

    rows = [annotation(name, name) for name in pictures]
    cases = Identifier(Told(tell), Told(lambda *_: "no"), TASK, blind=True).cases(rows, pictures)
    assert [case.verdict for case in cases] == ["blind", "unconfirmed"]
    assert seen == [((20, 30), (255, 0, 0)), ((21, 30), (0, 0, 255)), ((20, 30), GREY), ((21, 30), GREY)]
    cases = Identifier(Told(tell), Told(lambda *_: "no"), TASK).cases(rows, pictures)
    assert [case.verdict for case in cases] == ["parity", "unconfirmed"]
    assert cases[0].blind_answer is None


def test_votes_are_one_greedy_answer_and_sampled_ones_of_different_seeds(pictures: dict[str, Path]) -> None:
    decodings: list[Decoding] = []

    def tell(image: Image.Image, decoding: Decoding) -> str:
        decodings.append(decoding)
        return "red"

    identifier = Identifier(Told(tell), Told(lambda *_: "no"), TASK, votes=3, seed=5)
    (case,) = identifier.cases([annotation(name="red")], pictures)
    assert case.votes == ("red", "red", "red")
    assert [decoding.temperature > 0 for decoding in decodings] == [False, True, True]
    assert len({decoding.seed for decoding in decodings[1:]}) == 2
    assert all(decoding.max_new_tokens == TASK.max_new_tokens for decoding in decodings)
    # The prompt is the one of inference, for all of them.
    teacher = identifier.teacher
    assert isinstance(teacher, Told)
    assert teacher.prompts == [TASK.prompt("What colour?")] * 3


def test_what_shapes_the_cases_is_in_the_fingerprint() -> None:
    teacher, student = FakeVlm(), FakeVlm()
    usual = Identifier(teacher, student, TASK).fingerprint()
    for other in (
        Identifier(teacher, student, TASK, match="paper"),
        Identifier(teacher, student, TASK, votes=2),
        Identifier(teacher, student, TASK, blind=True),
        Identifier(teacher, student, task_named("textvqa")),
    ):
        assert other.fingerprint() != usual


def test_only_failed_cases_are_asked_again(pictures: dict[str, Path]) -> None:
    rows = [annotation(name, name) for name in pictures]
    short_of_memory = Told(lambda image, _: "red" if image.width == 20 else "")
    known = Identifier(short_of_memory, Told(lambda *_: "no"), TASK).cases(rows, pictures)
    assert [case.verdict for case in known] == ["parity", "error"]
    teacher = Told(lambda *_: "blue")
    cases = Identifier(teacher, Told(lambda *_: "no"), TASK).cases(rows, pictures, known)
    assert cases[0] == known[0]
    assert (cases[1].verdict, len(teacher.prompts)) == ("parity", 1)
    # Asked for again, the picture may have another question under the same id.
    rows[0] = Annotation(rows[0].id, "red", "Which colour?", "red", "")
    assert Identifier(teacher, Told(lambda *_: "no"), TASK).cases(rows, pictures, cases)[0].question == "Which colour?"


def test_a_further_round_asks_the_student_alone(pictures: dict[str, Path]) -> None:
    def first(name: str, verdict: str, reason: str | None = None) -> Case:
        score = float(verdict in ("parity", "agree"))
        return Case(reason or verdict, name, "What colour?", name, name, "old", score, 0.0, verdict, reason)

    cases = [
        first("red", "parity"),
        first("blue", "parity"),
        first("red", "unconfirmed"),
        first("red", "blind"),
        first("red", "error", "teacher: time-out"),
        first("red", "error", "student: out of memory"),
    ]
    student = Told(lambda *_: "red")
    found = Reidentifier(student, TASK).cases(cases, pictures)
    assert [case.verdict for case in found] == ["agree", "parity", "unconfirmed", "blind", "error", "unconfirmed"]
    assert [case.student_answer for case in found] == ["red", "red", "red", "old", "old", "red"]
    assert len(student.prompts) == 4
    failed = replace(first("red", "error", "student: out of memory"), teacher_score=1.0, blind_answer="red")
    assert Reidentifier(student, TASK).cases([failed], pictures)[0].verdict == "blind"
    other = FakeVlm(settings=FakeSettings(seed=1))
    assert Reidentifier(other, TASK).fingerprint() != Reidentifier(student, TASK).fingerprint()


def test_two_real_models(tiny_pair: Any, tmp_path: Path) -> None:
    teacher, student = (open_vlm(str(path), device="cpu") for path in (tiny_pair.teacher, tiny_pair.student))
    pictures = {path.stem: path for path in sorted(tiny_pair.images.iterdir())}
    colours = ("red", "green", "blue", "yellow")
    rows = [annotation(colours[number % 4], name) for number, name in enumerate(pictures)]
    rows[5] = annotation("purple", "005")
    pictures["006"] = tmp_path / "gone.png"
    cases = Identifier(teacher, student, TASK).cases(rows, pictures)
    assert [case.id for case in cases] == [row.id for row in rows]
    verdicts = [case.verdict for case in cases]
    assert verdicts[5] == "unconfirmed"
    assert (verdicts[6], cases[6].reason) == ("error", "teacher: unreadable")
    assert verdicts.count("parity") >= 18
    # The teacher asked in the student's place agrees with itself.
    assert {case.verdict for case in Identifier(teacher, teacher, TASK).cases(rows[:5], pictures)} == {"agree"}
