"""A merged model as a Hugging Face folder: safetensors, the processor's files, and a model card.

There is no `bundle.json` in it: that names the engine of our runtime that opens the folder, and none does. What a
manifest would say stands in the model card; transformers opens the folder, and so does `mpa-edge` as any other model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpa_edge.errors import ExportError
from mpa_edge.export.merge_weights import weight_files
from mpa_edge.export.merged import Merged
from mpa_edge.export.model_card import CARD, model_card
from mpa_edge.export.model_files import read_json, write_json
from mpa_edge.export.samples import Question
from mpa_edge.export.workshop import Workshop
from mpa_edge.runtime.vlm import Answer, Decoding

# What transformers reads besides weights. Anything else in a model folder (logs, trainer states) may tell of a machine.
SETTINGS = (
    *("config.json", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"),
)
OTHERS = (
    *("tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "model.safetensors.index.json"),
)
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


class Reference(Protocol):
    """What the merged model said in float32: its answers to the questions, in their order."""

    @property
    def questions(self) -> Sequence[Question]: ...
    @property
    def decoding(self) -> Decoding: ...
    @property
    def answers(self) -> Sequence[Answer]: ...


def to_hf(
    merged: Merged,
    target: Path,
    reference: Reference,
    workshop: Workshop,
    *,
    road: Mapping[str, Any] | None = None,
    repo: str | None = None,
) -> Path:
    """Write the merged model to the folder `target`, whole or not at all, and return it.

    What was written is opened with transformers and must give the merged model's very answers, token by token.
    `workshop` is open in `target`'s parent. `road` is the outcome of `mpa_edge.export.road`, for the card's scores;
    without it they come from the run's own bench report, where that is of this student. `repo` is the hub repository
    that the card tells how to load. Raises `ExportError`.
    """
    folder = workshop.folder(target.name)
    copy_model(merged.folder, folder)
    _copy_licence(merged, folder)
    verified = verify_folder(folder, reference)
    (folder / CARD).write_text(model_card(merged, verified, road=road, repo=repo), encoding="utf-8")
    workshop.place(folder, target)
    return target


def copy_model(source: Path, folder: Path) -> None:
    """Copy weights and settings of a model folder into a new one: safetensors only, nothing that names a machine."""
    weights = weight_files(source)
    folder.mkdir(parents=True)
    for path in (*weights, *(source / name for name in OTHERS)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    for name in SETTINGS:
        if (source / name).is_file():
            write_json(folder / name, read_json(source / name))


def verify_folder(folder: Path, reference: Reference) -> dict[str, Any]:
    """Open the folder with AutoModelForImageTextToText and ask it what the merged model was asked; the same weights in
    the same library leave no room for another token. Returns the counts, raises `ExportError`."""
    from mpa_edge.transformers_vlm import TransformersVlm

    vlm = TransformersVlm.load(str(folder), device="cpu", dtype="float32")
    try:
        images = [question.image for question in reference.questions]
        prompts = [question.prompt for question in reference.questions]
        answers = vlm.answer(images, prompts, reference.decoding)
    finally:
        vlm.close()
    for prompt, got, expected in zip(prompts, answers, reference.answers, strict=True):
        if got.error or got.tokens != expected.tokens:
            raise ExportError(
                f"the Hugging Face folder is not the merged model: to {prompt!r} it says {got.error or got.text!r} "
                f"instead of {expected.text!r}"
            )
    return {"samples": len(answers), "token_agreement": 1.0}


def _copy_licence(merged: Merged, folder: Path) -> None:
    """The licence texts of the base, which has to go with its weights."""
    source = merged.base or merged.folder
    for pattern in LICENCES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
