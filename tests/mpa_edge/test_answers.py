"""The digests and tables here were computed with the public implementations that `mpa_edge.answers` names."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpa_edge.answers import (
    METRICS,
    anls,
    containment,
    exact_match,
    metric_named,
    normalize_mpa,
    normalize_vqa,
    relaxed_accuracy,
    vqa_accuracy,
)
from mpa_edge.errors import InputError

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "mpa_official"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no excerpts of the official files")

CHARACTERS = list("aAbzZ 019.,;:%-+_/\\'\"!?()[]{}<>@`=\n\t\x0b\x1c\u00a0\u2009ßİΣſ٣²éo")
FRAGMENTS = ["'s", " the ", "a ", "none", "dont", " ten", "somebody'd", "..", "%", "1.5", "ow's'at", "'ow'sat", "Im"]


def official(name: str) -> Any:
    return json.loads((OFFICIAL / name).read_text(encoding="utf-8"))


def digest(lines: Iterable[object]) -> str:
    return hashlib.sha256("\n".join(map(repr, lines)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def random_texts(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    pieces = CHARACTERS + FRAGMENTS
    for _ in range(count):
        yield "".join(pieces[rng.randrange(len(pieces))] for _ in range(rng.randrange(15)))


def random_cases(count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """A prediction with ten references, of which some equal it and some come close."""
    rng = random.Random(seed)
    texts = list(random_texts(count, seed + 1))
    for prediction in texts:
        near = [prediction, prediction.upper(), f"the {prediction}", prediction + "x", prediction.replace("a", "b")]
        yield prediction, [(near + texts)[rng.randrange(8)] for _ in range(10)]


# --- the VQA normaliser and accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("the cat's", "cat 's"),
        ("it's", "it 's"),
        ("1,000", "1000"),
        ("$5.50", "$5.50"),
        ("5.", "5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("v2.", "v2"),
        ("10:10", "10:10"),
        ("black-and-white", "black and white"),
        ("black - and-white", "black andwhite"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("a/an", ""),
        ("a\nb\tc", "b c"),
        ("what?", "what"),
        ("  STOP!  ", "stop"),
        ("(3)", "3"),
        ("A", ""),
        ("", ""),
        (". " * 40, ". . . . . . . ."),
    ],
)
def test_normalize_vqa(text: str, normal: str) -> None:
    assert normalize_vqa(text) == normal


def test_normalisers_equal_the_public_ones_on_random_texts() -> None:
    texts = list(random_texts(20_000, seed=0))
    assert digest(map(normalize_vqa, texts)) == "d7581fc8fdd49804"
    assert digest(map(normalize_mpa, texts)) == "b7a4abc60850abb7"


@needs_official
def test_normalisers_equal_the_public_ones_on_official_texts() -> None:
    texts = [answer for row in official("okvqa_val_questions.json") for answer in row["answers"]]
    for row in official("okvqa_pseudo_annotations.json"):
        texts += [row["ground_truth_answer"], row["predicted_question"], row["predicted_answer"]]
    for row in official("textvqa_pseudo_conversations.json"):
        texts += [turn["value"] for turn in row["conversations"]]
    texts += [row["label"] for row in official("chartqa_test_questions.json")]
    assert len(texts) > 20_000
    assert digest(map(normalize_vqa, texts)) == "078ccbf5562b50d8"
    assert digest(map(normalize_mpa, texts)) == "2636434b81376b7e"


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_number_of_matches(matches: int, score: float) -> None:
    assert vqa_accuracy("Two.", ["2"] * matches + ["three"] * (10 - matches)) == pytest.approx(score, abs=1e-15)


def test_vqa_accuracy_equals_the_public_one_on_random_cases() -> None:
    cases = list(random_cases(3_000, seed=1))
    assert digest(vqa_accuracy(*case) for case in cases) == "29b7bec59c95cceb"


@needs_official
def test_vqa_accuracy_equals_the_public_one_on_official_references() -> None:
    rows = official("okvqa_val_questions.json")
    scores = [vqa_accuracy(answer, row["answers"]) for row in rows for answer in sorted(set(row["answers"]))]
    assert digest(scores) == "ce027e777b5792e2"


@given(st.text(max_size=6), st.lists(st.sampled_from(["a dog", "dog", "cat", "2", "two"]), min_size=1, max_size=12))
def test_vqa_accuracy_is_the_mean_of_the_leave_one_out_sets(prediction: str, references: list[str]) -> None:
    for answer in (prediction, "the dog", "2"):
        normal = [normalize_vqa(reference) for reference in references]
        scores = [
            min(1, (normal[:i] + normal[i + 1 :]).count(normalize_vqa(answer)) / 3) for i in range(len(references))
        ]
        assert vqa_accuracy(answer, references) == statistics.mean(scores)


def test_a_single_reference() -> None:
    assert vqa_accuracy("dog", ["dog"]) == 0.0  # the public rule: no other annotator agrees
    assert metric_named("vqa_accuracy")("A dog", ["dog"]) == 1.0
    assert metric_named("vqa_accuracy")("cat", ["dog"]) == 0.0
    assert metric_named("vqa_accuracy")("dog", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(0.9)


# --- the others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("HELLO ", ["hello"], 1.0),
        ("helo", ["hello"], 0.8),
        ("he", ["hello"], 0.0),
        ("ab", ["abcd"], 0.5),
        ("abc", ["abcdefg"], 0.0),
        ("a  b", ["a b"], 1.0),
        ("ab   ", ["abc"], 0.8),  # the length is that of the text as it came
        ("stop", ["go", "shop"], 0.75),
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("straße", ["strasse"], 5 / 7),  # "ß" counts as two in upper case
    ],
)
def test_anls(prediction: str, references: list[str], score: float) -> None:
    assert anls(prediction, references) == pytest.approx(score, abs=1e-15)


def test_anls_equals_the_public_one_on_random_cases() -> None:
    assert digest(anls(*case) for case in random_cases(3_000, seed=2)) == "1179656295571d61"


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("105", "100", 1.0),
        ("105.01", "100", 0.0),
        ("95", "100", 1.0),
        ("-95", "-100", 1.0),
        ("95", "-100", 0.0),
        ("5%", "0.05", 1.0),
        ("5", "5%", 0.0),
        ("0.05", "5%%", 1.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),
        ("0%", "0", 0.0),
        ("1e2", "100", 1.0),
        ("1_00", "100", 1.0),
        (" 100 ", "100", 1.0),
        ("1,000", "1000", 0.0),
        ("Yes", "yes", 1.0),
        ("yes ", "yes", 0.0),
        ("%", "%", 1.0),
        ("nan", "nan", 0.0),
        ("NaN", "x", 0.0),
        ("inf", "inf", 0.0),
        ("10", "ten", 0.0),
    ],
)
def test_relaxed_accuracy(prediction: str, reference: str, score: float) -> None:
    assert relaxed_accuracy(prediction, reference) == score


@needs_official
def test_relaxed_accuracy_on_official_labels() -> None:
    labels = [row["label"] for row in official("chartqa_test_questions.json")]
    rng = random.Random(3)
    predictions = [labels[rng.randrange(len(labels))] if rng.random() < 0.3 else str(rng.gauss(50, 30)) for _ in labels]
    pairs = [pair for p, r in zip(predictions, labels, strict=True) for pair in ((p, r), (r, r), (f"{r}%", r))]
    assert digest(relaxed_accuracy(*pair) for pair in pairs) == "507d9bc95e253b0f"
    assert digest(containment(*pair) for pair in pairs) == "d2e310904d29eadc"


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("15", "5", 1.0),
        ("snow", "No", 1.0),
        ("1.5", "15", 1.0),
        ("-15", "15", 1.0),
        ("The red car.", "red car", 1.0),
        ("red", "red car", 0.0),
        ("anything", "?!", 1.0),
        ("", "a", 0.0),
        ("snake_case", "e_c", 1.0),
        ("Straße", "straße", 1.0),
    ],
)
def test_containment(prediction: str, reference: str, score: float) -> None:
    assert containment(prediction, reference) == score


def test_exact_match() -> None:
    assert exact_match("The Two.", ["three", "2"]) == 1.0
    assert exact_match("12", ["2"]) == 0.0
    assert exact_match("a", ["A"]) == 1.0
    assert exact_match("", ["A"]) == 0.0
    assert exact_match("the", ["A"]) == 0.0


# --- all of them -----------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(METRICS)), st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=11))
def test_every_metric_gives_a_fraction_whatever_the_text(name: str, prediction: str, references: list[str]) -> None:
    score = metric_named(name)(prediction, references)
    assert isinstance(score, float)
    assert 0.0 <= score <= 1.0


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_knows_right_from_wrong(name: str) -> None:
    metric = metric_named(name)
    assert metric("stop", ["stop"]) == 1.0
    assert metric("stop", ["go"] * 9 + ["walk"]) == 0.0
    assert metric("stop", ["go"] * 6 + ["stop"] * 4) == 1.0


def test_no_reference_and_no_such_metric() -> None:
    for metric in METRICS.values():
        with pytest.raises(InputError, match="at least one reference"):
            metric("x", [])
        with pytest.raises(InputError, match="a list"):
            metric("x", "x")
    with pytest.raises(InputError, match="known: anls, containment, exact_match, relaxed_accuracy, vqa_accuracy"):
        metric_named("accuracy")
