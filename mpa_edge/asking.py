"""Put prompts about picture files to a model: what annotate and identify have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mpa_edge.errors import ImageError, InputError, ModelError
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm

# A full-size photo takes 36 MB as pixels: only so many are open at a time.
OPEN_AT_ONCE = 32
# So many refusals in a row, without one answer, are the model's fault and not the pictures'.
ALL_REFUSED = 8
GREY = (128, 128, 128)


class Unopened(Answer):
    """In the place of an answer: the picture could not be opened, and the model was not asked."""


def ask(
    vlm: Vlm,
    paths: Sequence[Path],
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    blind: bool = False,
    again: bool = False,
) -> list[Answer]:
    """One answer per picture and prompt, in order. With `blind` the model sees a grey picture of the same size instead.

    A picture that cannot be opened, and a pair that the model refuses, give an answer with `error` set. A model that
    refuses everything raises `ModelError`, and pictures of which none can be opened `InputError`, unless these are the
    ones that failed before (`again`).
    """
    at_once = max(OPEN_AT_ONCE, getattr(vlm, "batch_size", 1))
    answers: list[Answer] = []
    for start in range(0, len(paths), at_once):
        part = slice(start, start + at_once)
        answers += _ask(vlm, paths[part], prompts[part], decoding, blind)
    if not again:
        _refuse_if_all_failed(vlm, paths, answers)
    return answers


def _refuse_if_all_failed(vlm: Vlm, paths: Sequence[Path], answers: Sequence[Answer]) -> None:
    asked = [answer for answer in answers if not isinstance(answer, Unopened)]
    if not asked and len(answers) >= ALL_REFUSED:
        raise InputError(
            f"--images: none of {len(set(paths))} pictures can be opened any more; the first: {paths[0]} "
            f"({answers[0].error}). Are they still where they were?"
        )
    if len(asked) >= ALL_REFUSED and all(answer.error is not None for answer in asked):
        raise ModelError(f"{vlm.name} answered none of {len(asked)} prompts; the first refusal: {asked[0].error}")


def refuse_small_budget(vlm: Vlm, requests: int, part: str) -> None:
    """`InputError` when one part takes more requests than `--max-requests` allows a whole run: each run would pay for
    its beginning anew, and none would ever keep it."""
    most = getattr(vlm, "max_requests", None)
    if most is not None and most < requests:
        raise InputError(
            f"--max-requests {most}: {part} may take {requests}. "
            "Allow more, or in a new run make the parts smaller (--chunk-size)."
        )


def _ask(vlm: Vlm, paths: Sequence[Path], prompts: Sequence[str], decoding: Decoding, blind: bool) -> list[Answer]:
    # Several questions about one picture share one picture, so that a model sees that they do.
    opened = {path: _open(path, blind) for path in dict.fromkeys(paths)}
    images = [opened[path] for path in paths]
    pairs = [(image, prompt) for image, prompt in zip(images, prompts, strict=True) if isinstance(image, Image.Image)]
    found = iter(vlm.answer([image for image, _ in pairs], [prompt for _, prompt in pairs], decoding) if pairs else [])
    return [next(found) if isinstance(image, Image.Image) else image for image in images]


def _open(path: Path, blind: bool) -> Image.Image | Answer:
    try:
        image = open_image(path)
    except ImageError as error:
        return Unopened("", finish_reason="error", error=error.reason)
    return Image.new("RGB", image.size, GREY) if blind else image
