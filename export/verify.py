"""The bundle against the merged model: the same questions, through the runtime and through transformers.

Pixels and tokens must be equal; answers and logits may differ as far as the quantization explains. The outcome holds a
`warning` where answers differ more than most would want, and not enough to say that the bundle is broken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from mpa_edge.errors import ExportError
from mpa_edge.export.near_ties import is_near_tie
from mpa_edge.export.samples import Question
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.vlm import Answer, Decoding
from mpa_edge.transformers_vlm import TransformersVlm

# The least share of equal answers, token by token. Four bits are reported as they are; the floor catches garbage.
LEAST_AGREEMENT = {"f32": 0.99, "fp32": 0.99, "f16": 0.99, "bf16": 0.97, "q8_0": 0.95, "int8": 0.95, "q6_k": 0.9}
# Unlike GGUF's f16 this one computes in float16 too, which turns near ties in long answers.
LEAST_AGREEMENT["fp16"] = 0.95
FLOOR = 0.25
# What passes the floor and gives fewer equal answers than this is told: to make so small a bundle may be wanted.
GOOD_AGREEMENT = 0.8
# On so many samples logits are compared too, at so many positions: the last, which see all that is before them. All
# positions take 180 MB a picture with Qwen's vocabulary.
LOGIT_SAMPLES, LOGIT_POSITIONS = 4, 64
# What the processor makes of a picture, by the names that the vision encoder has for it.
VISION_INPUTS = ("pixel_values", "image_grid_thw")


@dataclass(frozen=True)
class Reference:
    """What the merged model says, in float32: answers to all questions, logits at the last positions of the first few.

    `pixels` are digests by the vision encoder's names. `drawn` of the questions are about drawn pictures, the others
    are the run's own.
    """

    questions: Sequence[Question]
    decoding: Decoding
    answers: Sequence[Answer]
    tokens: Sequence[Sequence[int]]
    pixels: Sequence[dict[str, str]]
    logits: Sequence[np.ndarray[Any, Any]]
    drawn: int = 0


def ask_reference(
    model: TransformersVlm, questions: Sequence[Question], decoding: Decoding, *, drawn: int = 0
) -> Reference:
    """Ask the merged model once for any number of bundles."""
    answers = model.answer([q.image for q in questions], [q.prompt for q in questions], decoding)
    if failed := [answer for answer in answers if answer.error]:
        raise ExportError(f"the merged model does not answer: {failed[0].error}")
    tokens, pixels = [], []
    logits: list[np.ndarray[Any, Any]] = []
    for question in questions:
        inputs = model.encode([question.image], [question.prompt])
        tokens.append(inputs["input_ids"][0].tolist())
        pixels.append({name: _digest(inputs[name].cpu().numpy()) for name in VISION_INPUTS if name in inputs})
        if len(logits) < LOGIT_SAMPLES:
            logits.append(_last_logits(model, inputs))
    return Reference(
        questions=questions,
        decoding=decoding,
        answers=answers,
        tokens=tokens,
        pixels=pixels,
        logits=logits,
        drawn=drawn,
    )


def verify(bundle: BundleVlm, reference: Reference) -> dict[str, Any]:
    """Ask the bundle the same and compare; returns the outcome, raises `ExportError` when it is not the same model."""
    _check_inputs(bundle, reference)
    errors = [
        float(np.abs(bundle.logits([question.image], question.prompt)[-len(expected) :] - expected).max())
        for question, expected in zip(reference.questions, reference.logits, strict=False)
    ]
    questions = reference.questions
    answers = bundle.answer([q.image for q in questions], [q.prompt for q in questions], reference.decoding)
    equal = [got.tokens == want.tokens for got, want in zip(answers, reference.answers, strict=True)]
    held_to = bundle.bundle.quantization in LEAST_AGREEMENT  # four bits turn more than near ties
    ties = [
        held_to and not same and not got.error and is_near_tie(bundle, question, got, want)
        for same, question, got, want in zip(equal, questions, answers, reference.answers, strict=True)
    ]
    outcome = {
        "samples": len(equal),
        "drawn_samples": reference.drawn,
        "token_agreement": round(sum(equal) / len(equal), 4),
        "near_ties": sum(ties),
        "logit_error": round(float(np.max(errors)), 6),  # NaN where one is
        "logit_spread": round(float(np.std(reference.logits[0])), 6),
        "prompt_tokens": "equal",
        "pixels": "equal",
    }
    _check_agreement(bundle.bundle.quantization, equal, ties, outcome, answers, reference)
    if warning := _warning(bundle.bundle.quantization, equal, reference.drawn):
        outcome["warning"] = warning
    return outcome


@torch.inference_mode()
def _last_logits(model: TransformersVlm, inputs: Any) -> np.ndarray[Any, Any]:
    kept = model.model(**inputs, logits_to_keep=LOGIT_POSITIONS, use_cache=False).logits[0]
    logits: np.ndarray[Any, Any] = kept.float().cpu().numpy()
    return logits


def _digest(values: np.ndarray[Any, Any]) -> str:
    """Equal for equal arrays: the pixels of one picture are 50 MB where a model sees it in many tiles."""
    same = np.ascontiguousarray(values, np.int64 if values.dtype.kind == "i" else np.float32) + 0  # -0.0 equals 0.0
    return f"{same.shape} {sha256(same.data).hexdigest()}"


def _check_inputs(bundle: BundleVlm, reference: Reference) -> None:
    for question, tokens, pixels in zip(reference.questions, reference.tokens, reference.pixels, strict=True):
        got, picture = bundle.prepare([question.image], question.prompt)
        if list(got) != list(tokens):
            raise ExportError(
                f"the runtime's prompt differs from the processor's for {question.prompt!r}: {len(got)} tokens, "
                f"{len(tokens)} in transformers"
            )
        values = bundle.family.pixel_values(picture.cuts[0], bundle.bundle.image)
        if not all(_digest(np.asarray(values[name])) == wanted for name, wanted in pixels.items()):
            raise ExportError(
                "the runtime's pixels differ from the processor's: was the model asked through another image backend "
                "than Pillow's?"
            )


def _warning(quantization: str, equal: Sequence[bool], drawn: int) -> str | None:
    """What to tell of few equal answers. The run's own questions count, which come first, where there are any."""
    own = equal[: len(equal) - drawn] or equal
    if own.count(True) >= GOOD_AGREEMENT * len(own):
        return None
    whose = "of the run's own questions" if len(equal) > drawn else "questions about drawn pictures"
    return (
        f"{quantization} gives the merged model's very answer to {own.count(True)} of {len(own)} {whose}; try one with "
        "more bits, or score it with --data"
    )


def _check_agreement(
    quantization: str,
    equal: Sequence[bool],
    ties: Sequence[bool],
    outcome: dict[str, Any],
    answers: Sequence[Answer],
    reference: Reference,
) -> None:
    least = LEAST_AGREEMENT.get(quantization, FLOOR)
    passed = [same or tie for same, tie in zip(equal, ties, strict=True)]
    # A tie that is not near enough, once, is no proof.
    allowed = max(1, math.floor((1 - least) * len(equal) + 1e-9))
    # Nor are nearly all of them ties.
    garbage = any(ties) and equal.count(True) < math.ceil(FLOOR * len(equal))
    if not math.isfinite(outcome["logit_error"]) or passed.count(False) > allowed or garbage:
        place = next((place for wrong in (passed, equal) if False in wrong for place in [wrong.index(False)]), 0)
        near = f" and to {sum(ties)} one that is hardly less likely" if any(ties) else ""
        raise ExportError(
            f"the {quantization} bundle gives the merged model's answer to {equal.count(True)} of {len(equal)} "
            f"questions{near}, at least {len(equal) - allowed} are needed; to {reference.questions[place].prompt!r} it "
            f"says {answers[place].text!r} instead of {reference.answers[place].text!r} (largest logit error "
            f"{outcome['logit_error']})"
        )
