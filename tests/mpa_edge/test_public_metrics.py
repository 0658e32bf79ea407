"""`mpa_edge.answers` beside an independent writing-down of the public definitions (`makers/public_metrics.py`): on
thousands of generated pairs that are dense in what metrics stumble over, and on real answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import public_metrics as public
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpa_edge.answers import METRICS, anls, normalize_vqa, relaxed_accuracy, vqa_accuracy

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "mpa_official"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no excerpts of the official files")

NUMBERS = ["0", "-0", "0.0", "0%", "00", "1", "1.0", "1,000", "1000", "1 000", "1.000,5", "1_000", "1e3", "-1.5"]
NUMBERS += [".5", "5.", "+5", "5%", "5 %", "5%%", "%", "%5", "12.5%", "0.125", "½", "²", "٣", "१२", "nan", "inf"]
NUMBERS += ["\N{MINUS SIGN}1.5", "-inf", "105", "100", "95", "94.9", "-95", "-100", "105%", "1.05"]
UNITS = ["$1.75", "€5", "5€", "£1,200.50", "10:10", "10 km", "10km", "20°", "20°C", "3'", '6"', "5-6", "5 - 6", "5/6"]
WORDS = ["", " ", "no", "No.", "none", "None", "zero", "ten", "eleven", "a", "an", "The", "the", "a an the", "yes/no"]
WORDS += ["dont", "don't", "Im", "somebody'd", "yall'll", "mightnt've", "'ow'sat", "oclock", "twas", "let's", "cat's"]
MARKED = ["U.S.A.", "v2.", "...", ". " * 40, "a.b.c", "!?", "what?", "black-and-white", "black - white", "snake_case"]
MARKED += ["(3)", "[a]", "{b}", "x=y", "C++", "a\\b", "@me", "<b>", "`q`", '"quoted"', ";", "a;b", "a\nb", "a\tb"]
LISTS = ["a, b", "a, b, and c", "[1, 2]", "1, 2, 3", "['a', 'b']", "red,green", "red and green"]
UNICODE = ["straße", "STRASSE", "İstanbul", "i\u0307", "ΑΣ", "ς", "ſ", "café", "cafe\u0301", "naïve", "日本", "日 本"]
UNICODE += [
    "\u00a05\u2009",
    "5\u200b",
    "\x1c5",
    "👍",
    "\ufeffyes",
    "yes\u2028no",
    "\u0130",
    "Ω",
    "\u2126",
    "５",
    "５％",
    "ﬁ",
]
TEXTS = NUMBERS + UNITS + WORDS + MARKED + LISTS + UNICODE
LETTERS = "aAbzZ 01359.,;:%-+_/\\'\"!?()[]{}<>@`=$€\n\t\x0b\x1c\u00a0\u2009ßİΣſ٣²é\u0301日"
TIMES = 2


def near(text: str, rng: random.Random) -> str:
    """The text, or one that a model might say instead of it."""
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            text,
            text.upper(),
            text.title(),
            f" {text} ",
            f"the {text}",
            f"{text}.",
            f"{text}%",
            text.rstrip("%"),
            text.replace(",", ""),
            text.replace("'", ""),
            text[:at] + rng.choice(LETTERS) + text[at:],
            text[:at] + text[at + 1 :],
            rng.choice(TEXTS),
            near_number(text, rng),
        ]
    )


def near_number(text: str, rng: random.Random) -> str:
    """A number about a twentieth away, on either side of what is still right."""
    try:
        return f"{float(text.strip('%')) * rng.choice([0.94, 0.95, 0.955, 1.045, 1.05, 1.055]):.6g}"
    except ValueError:
        return text


def pairs(texts: Sequence[str], times: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Each text with ten references, some of them near it, and as the answer to what is near it."""
    rng = random.Random(seed)
    for text in list(texts) * times:
        references = [near(text, rng) if rng.random() < 0.6 else rng.choice(texts) for _ in range(10)]
        yield text, references
        yield near(text, rng), references[: rng.randrange(1, 11)]


def disagreements(cases: Iterator[tuple[str, list[str]]]) -> tuple[int, list[tuple[str, str, str]]]:
    """How many single comparisons were made, and those in which package and definition differ, with the metric."""
    count, found = 0, []

    def note(name: str, given: float, wanted: float, text: str, reference: object) -> None:
        nonlocal count
        count += 1
        if abs(given - wanted) > 1e-12:
            found.append((name, text, f"{reference!r}: {given} for {wanted}"))

    for text, references in cases:
        note("vqa", vqa_accuracy(text, references), float(public.vqa_soft(text, references)), text, references)
        note("anls", anls(text, references), float(public.anls(text, references)), text, references)
        for reference in references[:3]:
            note("chartqa", relaxed_accuracy(text, reference), public.chartqa_relaxed(text, reference), text, reference)
            contained = METRICS["containment"](text, [reference])
            note("containment", contained, public.mpa_contains(text, reference), text, reference)
    return count, found


def test_thousands_of_pairs_dense_in_edge_cases() -> None:
    rng = random.Random(5)
    random_texts = ["".join(rng.choice(LETTERS) for _ in range(rng.randrange(9))) for _ in range(400)]
    numbers = [f"{rng.uniform(-200, 200):.{rng.randrange(4)}f}{rng.choice(['', '%', ' '])}" for _ in range(200)]
    count, found = disagreements(pairs(TEXTS + random_texts + numbers, TIMES, seed=6))
    assert count > 12_000
    assert found == []


def test_every_text_as_the_answer_to_every_other() -> None:
    """Who equals whom, in full: 15,000 pairs of the listed texts."""
    normal = {text: (normalize_vqa(text), public.vqa_normal(text)) for text in TEXTS}
    assert [text for text, (given, wanted) in normal.items() if given != wanted] == []
    differ = [(a, b) for a in TEXTS for b in TEXTS if bool(relaxed_accuracy(a, b)) != public.chartqa_relaxed(a, b)]
    assert differ == []


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_the_normaliser_on_any_unicode(text: str) -> None:
    assert normalize_vqa(text) == public.vqa_normal(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_every_metric_on_any_unicode(text: str, references: list[str]) -> None:
    assert disagreements(iter([(text, references), (references[0], references)]))[1] == []


def test_every_contraction_of_the_evaluation() -> None:
    for whole in public.CONTRACTIONS:
        typed = whole.replace("'", "")
        assert normalize_vqa(typed) == public.vqa_normal(typed) == whole
    for whole in public.DOUBLE:
        first, second = whole.index("'"), whole.rindex("'")
        for typed in (whole[:first] + whole[first + 1 :], whole[:second] + whole[second + 1 :]):
            assert normalize_vqa(typed) == public.vqa_normal(typed), typed


@needs_official
def test_real_answers() -> None:
    """OKVQA's annotators, the paper's pseudo-answers, ChartQA's labels, TextVQA's conversations."""
    read = lambda name: json.loads((OFFICIAL / name).read_text(encoding="utf-8"))  # noqa: E731
    rows: list[dict[str, Any]] = read("okvqa_val_questions.json")
    cases = [(answer, row["answers"]) for row in rows[:400] for answer in {*row["answers"][:2], row["answers"][-1]}]
    pseudo = read("okvqa_pseudo_annotations.json")
    cases += [(row["predicted_answer"][:80], [row["ground_truth_answer"][:80]] * 10) for row in pseudo[:200]]
    labels = [row["label"] for row in read("chartqa_test_questions.json")]
    rng = random.Random(7)
    cases += [(rng.choice([label, f"{label}%", rng.choice(labels)]), [label]) for label in labels[:1200]]
    count, found = disagreements(iter(cases))
    assert count > 4_000
    assert found == []
