"""Does a bundle still answer here as it did where it was made? Samples in its manifest, replayed and compared.

The pictures are computed, not stored: whole-number arithmetic in numpy, the same on every machine. What export wrote
beside them are digests of the pixels and of the prompt's tokens, which must be equal anywhere, and the answer, which
may differ in a near tie between two tokens where another processor sums in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

from mpa_edge.bundle import Bundle, read_bundle
from mpa_edge.errors import BundleError
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.vlm import Answer
from mpa_edge.versions import installed

NAME, MADE_WITH = "selfcheck", "made_with"  # under `checks` in the manifest
# Libraries whose other version may give other pixels or tokens: Pillow 13 resizes in another order than 12.
SHAPING = ("pillow", "numpy", "tokenizers")
QUESTIONS = ("What is in the picture?", "How many shapes are there?", "Which colour is it?", "What does the sign say?")
SIZES = ((320, 240), (200, 300), (96, 96), (500, 150))
MAX_NEW_TOKENS = 16


class Recorded(BaseModel, extra="forbid"):
    """One sample as the manifest has it. `pixels` and `prompt` are SHA-256 of the tiles and of the token ids."""

    picture: int
    question: str
    pixels: str
    prompt: str
    tokens: tuple[int, ...]
    logprob: float | None


@dataclass(frozen=True)
class Replay:
    """How one sample came out here."""

    question: str
    pixels: bool
    prompt: bool
    answer: bool
    there: str
    here: str
    logprob_difference: float | None


@dataclass(frozen=True)
class Outcome:
    """All samples. `passed`: every pixel, token and answer is equal."""

    replays: tuple[Replay, ...]
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return all(replay.pixels and replay.prompt and replay.answer for replay in self.replays)

    def lines(self) -> list[str]:
        """For people: one line a sample that differs, and the sum."""
        told = []
        for replay in self.replays:
            parts = [name for name in ("pixels", "prompt", "answer") if not getattr(replay, name)]
            if parts:
                what = " and ".join(parts)
                told.append(f"{replay.question!r}: {what} differ; {replay.there!r} there, {replay.here!r} here")
        known = [replay.logprob_difference for replay in self.replays if replay.logprob_difference is not None]
        gap = f"; log-probabilities within {max(known):.2g}" if known else ""
        equal = sum(replay.pixels and replay.prompt and replay.answer for replay in self.replays)
        here = installed(SHAPING)
        others = [f"{name} {there}" for name, there in self.made_with.items() if here.get(name) != there]
        if others and not self.passed:
            told.append(f"made with {', '.join(others)}; here {', '.join(f'{n} {v}' for n, v in here.items())}")
        return [*told, f"{equal} of {len(self.replays)} samples are as they were where the bundle was made{gap}"]


def record(vlm: BundleVlm) -> list[dict[str, Any]]:
    """Ask an open bundle the samples; what its manifest keeps of them."""
    return [_asked(vlm, number, question)[0].model_dump(mode="json") for number, question in enumerate(QUESTIONS)]


def selfcheck(folder: Path, *, device: str = "auto", threads: int | None = None) -> Outcome:
    """Check the digests of a bundle's files, then replay its samples on a device (see `load`).

    `BundleError` when it has none, or is damaged.
    """
    from mpa_edge.runtime import open_bundle

    bundle = read_bundle(folder, check_digests=True)
    recorded = _recorded(folder, bundle)
    with open_bundle(folder, bundle, device=device, threads=threads, cache_mb=0) as vlm:
        return Outcome(tuple(_replay(vlm, sample) for sample in recorded), _made_with(bundle))


def picture(number: int) -> Image.Image:
    """A computed picture: a gradient, with a few discs and rectangles on it."""
    width, height = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    for shape in range(1, 4):
        left, top = (number * 37 + shape * 61) % width, (number * 53 + shape * 47) % height
        size = 20 + 9 * shape
        disc, rectangle = (x - left) ** 2 + (y - top) ** 2 < size**2, (abs(x - left) < size) & (abs(y - top) < 15)
        pixels[disc if shape % 2 else rectangle] = (shape * 83 % 256, shape * 157 % 256, number * 71 % 256)
    return Image.fromarray(pixels.astype(np.uint8))


def _recorded(folder: Path, bundle: Bundle) -> list[Recorded]:
    try:
        found = [Recorded.model_validate(sample) for sample in bundle.checks.get(NAME, [])]
    except ValidationError as error:
        raise BundleError(f"{folder}: the manifest's samples are damaged: {error.errors()[0]['msg']}") from error
    if not found:
        raise BundleError(f"{folder} holds no samples to replay: it was made by an older version; export it again")
    return found


def _made_with(bundle: Bundle) -> dict[str, str]:
    told = bundle.checks.get(MADE_WITH)
    return {str(name): str(version) for name, version in told.items()} if isinstance(told, dict) else {}


def _asked(vlm: BundleVlm, number: int, question: str) -> tuple[Recorded, Answer]:
    image = picture(number)
    tokens, seen = vlm.prepare([image], vlm.put(question))
    answer = vlm.ask(image, question, max_new_tokens=MAX_NEW_TOKENS)
    made = Recorded(
        picture=number,
        question=question,
        pixels=hashlib.sha256(seen.cuts[0].tiles.tobytes()).hexdigest(),
        prompt=hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest(),
        tokens=answer.tokens,
        logprob=answer.logprob,
    )
    return made, answer


def _replay(vlm: BundleVlm, sample: Recorded) -> Replay:
    here, answer = _asked(vlm, sample.picture, sample.question)
    equal = here.tokens == sample.tokens
    comparable = equal and here.logprob is not None and sample.logprob is not None
    return Replay(
        question=sample.question,
        pixels=here.pixels == sample.pixels,
        prompt=here.prompt == sample.prompt,
        answer=equal,
        there=vlm.prompts.text(sample.tokens),
        here=answer.text,
        logprob_difference=abs((here.logprob or 0) - (sample.logprob or 0)) if comparable else None,
    )
