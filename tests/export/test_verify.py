"""Verification: a faithful bundle passes, every kind of unfaithful one is named and refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpa_edge.bundle import Bundle
from mpa_edge.errors import ExportError
from mpa_edge.export.samples import synthetic_questions
from mpa_edge.export.tolerance import TOLERANCE
from mpa_edge.export.verify import Reference, ask_reference, verify
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.transformers_vlm import TransformersVlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify") / "f16"


@pytest.fixture(scope="module")
def reference(tiny_one_tile: Path) -> Reference:
    model = TransformersVlm.load(str(tiny_one_tile), device="cpu", dtype="float32")
    return ask_reference(model, synthetic_questions(6), Decoding(max_new_tokens=6))


@pytest.fixture(scope="module")
def manifest(tiny_one_tile: Path, folder: Path, gguf_bundle: Any) -> Bundle:
    made: Bundle = gguf_bundle(tiny_one_tile, folder, tokens=6)
    return made


def outcome(folder: Path, manifest: Bundle, reference: Reference) -> dict[str, Any]:
    with open_bundle(folder, manifest, threads=1) as vlm:
        return verify(vlm, reference)


def test_a_faithful_bundle_passes(folder: Path, manifest: Bundle, reference: Reference) -> None:
    found = outcome(folder, manifest, reference)
    assert found["token_agreement"] == 1.0
    assert 0 < found["logit_error"] < 0.01
    assert found["samples"] == 6


def test_other_pixels_are_refused(folder: Path, manifest: Bundle, reference: Reference) -> None:
    image = manifest.image.model_copy(update={"resample": "bilinear"})
    with pytest.raises(ExportError, match="pixels differ"):
        outcome(folder, manifest.model_copy(update={"image": image}), reference)


def test_another_prompt_is_refused(folder: Path, manifest: Bundle, reference: Reference) -> None:
    template = manifest.prompt.chat_template.replace("Assistant:", "Assistant: ")
    prompt = manifest.prompt.model_copy(update={"chat_template": template})
    with pytest.raises(ExportError, match="prompt differs"):
        outcome(folder, manifest.model_copy(update={"prompt": prompt}), reference)


def wrong_answers(reference: Reference, count: int) -> Reference:
    answers = [replace(a, tokens=(*a.tokens, 1)) if i < count else a for i, a in enumerate(reference.answers)]
    return replace(reference, answers=answers)


def test_one_near_tie_is_no_proof_and_two_are(folder: Path, manifest: Bundle, reference: Reference) -> None:
    assert outcome(folder, manifest, wrong_answers(reference, 1))["token_agreement"] == pytest.approx(5 / 6, abs=1e-3)
    with pytest.raises(ExportError, match="4 of 6"):
        outcome(folder, manifest, wrong_answers(reference, 2))


@pytest.mark.parametrize(("tolerance", "ties"), [(0.0, 0), (100.0, 3)])
def test_what_rounding_may_turn_is_no_proof(
    folder: Path,
    manifest: Bundle,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float,
    ties: int,
) -> None:
    monkeypatch.setitem(TOLERANCE["llama.cpp"], "f16", tolerance)
    answers = wrong_answers(reference, 3)
    if not ties:
        with pytest.raises(ExportError, match="to 3 of 6 questions, at least 5"):
            outcome(folder, manifest, answers)
        return
    # A distribution so flat that everything is a tie; see below for one that is not.
    found = outcome(folder, manifest, answers)
    assert (found["near_ties"], found["token_agreement"]) == (ties, 0.5)
    # Garbage is not excused by a distribution that is flat.
    with pytest.raises(ExportError, match="to 0 of 6 questions and to 6 one that is hardly less likely"):
        outcome(folder, manifest, wrong_answers(reference, 6))


def test_a_broken_cache_is_no_near_tie(
    folder: Path, manifest: Bundle, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts are read right and say the wanted token; what is decoded from the cache says another."""
    answer = BundleVlm.answer

    def decoded(self: BundleVlm, *asked: Any) -> list[Any]:
        return [replace(one, tokens=(1, *one.tokens[1:])) for one in answer(self, *asked)]

    monkeypatch.setattr(BundleVlm, "answer", decoded)
    assert all(answer.tokens[0] != 1 for answer in reference.answers)
    with pytest.raises(ExportError, match="to 0 of 6 questions, at least 5"):
        outcome(folder, manifest, reference)


def test_logits_of_any_sample_must_be_numbers(
    folder: Path, manifest: Bundle, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = list(reference.logits)
    logits[1] = np.full_like(logits[1], np.nan)
    with pytest.raises(ExportError, match="nan"):
        outcome(folder, manifest, replace(reference, logits=logits))


def test_four_bits_may_differ_but_not_be_garbage(folder: Path, manifest: Bundle, reference: Reference) -> None:
    four = manifest.model_copy(update={"quantization": "q4_k_m"})
    assert outcome(folder, four, wrong_answers(reference, 4))["token_agreement"] == pytest.approx(2 / 6, abs=1e-3)
    with pytest.raises(ExportError, match="0 of 6"):
        outcome(folder, four, wrong_answers(reference, 6))


def test_few_equal_answers_of_a_small_bundle_are_told(folder: Path, manifest: Bundle, reference: Reference) -> None:
    four = manifest.model_copy(update={"quantization": "q4_k_m"})
    assert "warning" not in outcome(folder, four, wrong_answers(reference, 1))
    assert outcome(folder, four, wrong_answers(reference, 2))["warning"].startswith(
        "q4_k_m gives the merged model's very answer to 4 of 6 of the run's own questions"
    )
    # Drawn ones come last, and count where there are no others.
    some_drawn = replace(wrong_answers(reference, 2), drawn=3)
    assert "to 1 of 3 of the run's own" in outcome(folder, four, some_drawn)["warning"]
    all_drawn = replace(wrong_answers(reference, 2), drawn=6)
    assert "to 4 of 6 questions about drawn pictures" in outcome(folder, four, all_drawn)["warning"]


def test_logits_that_are_no_numbers_are_refused(
    folder: Path, manifest: Bundle, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: BundleVlm, images: Any, prompt: str) -> Any:
        return np.full_like(reference.logits[0], np.nan)

    monkeypatch.setattr(BundleVlm, "logits", broken)
    monkeypatch.setattr("mpa_edge.export.verify.LOGIT_SAMPLES", 1)
    with pytest.raises(ExportError, match="nan"):
        outcome(folder, manifest, replace(reference, logits=reference.logits[:1]))


def test_drawn_questions_are_the_same_in_every_call() -> None:
    first, second = synthetic_questions(5), synthetic_questions(5)
    assert [q.prompt for q in first] == [q.prompt for q in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert _sizes(first) > 1


def _sizes(questions: Sequence[Any]) -> int:
    return len({question.image.size for question in questions})
