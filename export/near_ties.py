"""Where the model itself hardly prefers one token to another, the rounding of a precision decides which is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpa_edge.export.samples import Question
from mpa_edge.export.tolerance import TOLERANCE
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.vlm import Answer

# Three standard deviations of the difference of two logits that each have the precision's error.
FACTOR = 3 * math.sqrt(2)


def is_near_tie(bundle: BundleVlm, question: Question, got: Answer, want: Answer) -> bool:
    """Whether the first token in which the bundle's answer differs is one that its precision's error may turn: whether
    the bundle, which reads prompt and answer in one go for this, finds the two alike but for that. Where it much
    prefers the wanted one, the answer came from a broken cache."""
    same = _common_length(got.tokens, want.tokens)
    logits = bundle.logits([question.image], question.prompt, got.tokens[:same])[-1]
    stops = bundle.bundle.prompt.stop_token_ids  # what ends an answer is not among its tokens
    ours, theirs = (logits[list(answer.tokens[same : same + 1] or stops)].max() for answer in (got, want))
    error = TOLERANCE[bundle.bundle.engine][bundle.bundle.quantization] * float(np.std(logits))
    return bool(abs(ours - theirs) <= FACTOR * error)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
