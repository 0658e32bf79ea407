"""Put prompts about picture files to a model: what annotate and identify have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from mpa_edge.errors import ImageError, ModelError
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm

# A full-size photo takes 36 MB as pixels: only so many are open at a time.
OPEN_AT_ONCE = 32
# So many refusals in a row, without one answer, are the model's fault and not the pictures'.
ALL_REFUSED = 8


def ask(vlm: Vlm, paths: Sequence[Path], prompts: Sequence[str], decoding: Decoding) -> list[Answer]:
    """One answer per picture and prompt, in order.

    A picture that cannot be opened, and a pair that the model refuses, give an answer with `error` set. A model that
    refuses everything raises `ModelError`.
    """
    at_once = max(OPEN_AT_ONCE, getattr(vlm, "batch_size", 1))
    answers: list[Answer] = []
    for start in range(0, len(paths), at_once):
        answers += _ask(vlm, paths[start : start + at_once], prompts[start : start + at_once], decoding)
    refusals = [answer.error for answer in answers if answer.error is not None]
    if len(refusals) == len(answers) >= ALL_REFUSED:
        raise ModelError(f"{vlm.name} answered none of {len(answers)} prompts; the first refusal: {refusals[0]}")
    return answers


def _ask(vlm: Vlm, paths: Sequence[Path], prompts: Sequence[str], decoding: Decoding) -> list[Answer]:
    opened = [_open(path) for path in paths]
    pairs = [(image, prompt) for image, prompt in zip(opened, prompts, strict=True) if isinstance(image, Image)]
    found = iter(vlm.answer([image for image, _ in pairs], [prompt for _, prompt in pairs], decoding) if pairs else [])
    return [next(found) if isinstance(image, Image) else image for image in opened]


def _open(path: Path) -> Image | Answer:
    try:
        return open_image(path)
    except ImageError as error:
        return Answer("", finish_reason="error", error=error.reason)
