"""Put prompts about picture files to a model: what annotate and identify have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mpa_edge.errors import ImageError, InputError, ModelError
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm

# A model gets so many pairs at a time, or a batch of its own: a full-size photo takes 36 MB as pixels. While the open
# pictures take less than `OPEN_BYTES` it gets more of them, so that it can put prompts of like length into one batch.
AT_LEAST, AT_MOST = 32, 256
OPEN_BYTES = 64 << 20
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
    answers: list[Answer] = []
    # Several questions about one picture share one picture, so that a model sees that they do.
    opened: dict[Path, Image.Image | Unopened] = {}
    taken = 0
    for end, path in enumerate(paths, 1):
        if path not in opened:
            image = opened[path] = _open(path, blind)
            taken += 3 * image.width * image.height if isinstance(image, Image.Image) else 0
        if end == len(paths) or _enough(vlm, end - len(answers), taken):
            part = slice(len(answers), end)
            answers += _ask(vlm, [opened[path] for path in paths[part]], prompts[part], decoding)
            opened, taken = {}, 0
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


def _enough(vlm: Vlm, pairs: int, taken: int) -> bool:
    """`taken` are the bytes of the open pictures."""
    return pairs >= max(AT_LEAST, getattr(vlm, "batch_size", 1)) and (pairs >= AT_MOST or taken >= OPEN_BYTES)


def _ask(
    vlm: Vlm, images: Sequence[Image.Image | Unopened], prompts: Sequence[str], decoding: Decoding
) -> list[Answer]:
    pairs = [(image, prompt) for image, prompt in zip(images, prompts, strict=True) if isinstance(image, Image.Image)]
    found = iter(vlm.answer([image for image, _ in pairs], [prompt for _, prompt in pairs], decoding) if pairs else [])
    return [next(found) if isinstance(image, Image.Image) else image for image in images]


def _open(path: Path, blind: bool) -> Image.Image | Unopened:
    try:
        image = open_image(path)
    except ImageError as error:
        return Unopened("", finish_reason="error", error=error.reason)
    return Image.new("RGB", image.size, GREY) if blind else image
