"""Training batches: the inference prompt, token for token and pixel for pixel, with the answer appended.

A batch is what `TransformersVlm.encode` makes for inference (left-padded) with the target tokens to its right
(right-padded), so that all targets stand in the last columns and only their logits need computing.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mpa_edge.errors import RunError
from mpa_edge.runtime.images import open_image
from mpa_edge.transformers_vlm import TransformersVlm

# Image features of a frozen encoder are computed once, as long as they fit.
CACHE_BYTES = 2 << 30
# What a model may take besides pixels for its prompt to be put together from the cache.
PIXELS = {"pixel_values", "pixel_attention_mask"}
TEXT = {"input_ids", "attention_mask"}
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One row of the training set. `group` names the picture, by which rows are held out together."""

    id: str
    group: str
    image: Path
    prompt: str
    answer: str
    verdict: str


def read_examples(path: Path) -> list[Example]:
    """The examples of a training set such as `parity.jsonl`; picture paths are relative to its folder. `RunError` where
    a row cannot be read."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            user, assistant = row["messages"]
            examples.append(
                Example(
                    id=row["id"],
                    group=row["sample_id"],
                    image=path.parent / row["images"][0],
                    prompt=user["content"][1]["text"],
                    answer=assistant["content"][0]["text"],
                    verdict=row["verdict"],
                )
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RunError(f"{path}, line {number}: not a row of a training set ({error!r})") from error
    return examples


class TrainingData:
    """Examples as model inputs. With a frozen image encoder and a model that takes its output ready-made, prompts and
    features are computed once and kept; otherwise every batch is encoded anew. The loss is the same."""

    def __init__(
        self, student: TransformersVlm, examples: Sequence[Example], *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._student = student
        self._examples = examples
        self._targets = [student.target_ids(example.answer) for example in examples]
        self._prompts: dict[int, torch.Tensor] = {}
        self._features: dict[Path, torch.Tensor] = {}
        self._cache_bytes = cache_bytes

    def prepare(self) -> None:
        """Fill the cache, batch by batch in the order of the examples, so that it never depends on a resume."""
        if not takes_features(self._student.model):
            return
        for start in range(0, len(self._examples), self._student.batch_size):
            places = range(start, min(start + self._student.batch_size, len(self._examples)))
            if not self._keep(places):
                self._prompts.clear()
                self._features.clear()
                return

    def batch(self, places: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
        """The model's inputs for some examples, and labels (rows, longest target) with `IGNORED` as padding."""
        inputs = self._cached(places) if self._prompts else self._encoded(places)
        targets = [self._targets[place] for place in places]
        return append_targets(inputs, targets, pad=self._student.pad)

    def batches(self, places: Sequence[int], size: int, seed: str) -> list[list[int]]:
        """Batches of like length in an order that the seed decides."""
        order = list(places)
        generator = random.Random(seed)
        generator.shuffle(order)
        window = size * 16
        batches = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=self._length)
            batches += [near[first : first + size] for first in range(0, len(near), size)]
        generator.shuffle(batches)
        return batches

    def _length(self, place: int) -> int:
        return len(self._examples[place].prompt) + len(self._targets[place])

    def _encoded(self, places: Sequence[int]) -> dict[str, Any]:
        examples = [self._examples[place] for place in places]
        images = [open_image(example.image) for example in examples]
        return dict(self._student.encode(images, [example.prompt for example in examples]))

    @torch.no_grad()
    def _keep(self, places: Sequence[int]) -> bool:
        """Compute and keep what these examples need; False when that cannot be, or takes too much memory."""
        inputs = self._encoded(places)
        if not inputs.keys() <= TEXT | PIXELS:
            return False
        pixels = {key: value for key, value in inputs.items() if key in PIXELS}
        found = self._student.model.get_image_features(**pixels).pooler_output
        if not isinstance(found, (list, tuple)) or len(found) != len(places):
            return False
        for row, place in enumerate(places):
            self._prompts[place] = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            self._features.setdefault(self._examples[place].image, found[row].clone())
        return sum(features.nbytes for features in self._features.values()) <= self._cache_bytes

    def _cached(self, places: Sequence[int]) -> dict[str, Any]:
        prompts = [self._prompts[place] for place in places]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.stack([_pad_left(prompt, width, self._student.pad) for prompt in prompts])
        mask = torch.stack([_pad_left(torch.ones_like(prompt), width, 0) for prompt in prompts])
        features = [self._features[self._examples[place].image] for place in places]
        # A list with the features of each picture, as `get_image_features` gives it.
        image = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
        return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": image}}


def append_targets(
    inputs: dict[str, Any], targets: Sequence[list[int]], *, pad: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Put the target tokens to the right of left-padded prompts; returns the inputs and the labels.

    Whatever else holds one number per token (token types) gets zeros. Positions are not passed: text models count from
    the padding's begin then, which rotary embeddings, being relative, do not notice.
    """
    ids, device = inputs["input_ids"], inputs["input_ids"].device
    width = max(len(target) for target in targets)
    labels = torch.tensor([target + [IGNORED] * (width - len(target)) for target in targets], device=device)
    extra = {"input_ids": labels.masked_fill(labels == IGNORED, pad), "attention_mask": (labels != IGNORED).long()}
    whole = {
        key: torch.cat([value, extra.get(key, torch.zeros_like(labels)).to(value.dtype)], dim=1)
        if isinstance(value, torch.Tensor) and value.shape == ids.shape
        else value
        for key, value in inputs.items()
    }
    return whole, labels


def loss_and_exact(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy of the target tokens, and the number of rows whose targets are all the model's first
    choice, which is the number of answers that greedy decoding would give to the letter."""
    wanted = labels.shape[1]
    logits = model(**inputs, use_cache=False, logits_to_keep=wanted + 1).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return loss, int(right.all(dim=1).sum())


def takes_features(model: Any) -> bool:
    """Whether the model's forward takes an image encoder's output in the place of pixels."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters and hasattr(model, "get_image_features")


def split_by_group(examples: Sequence[Example], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The places of the examples to train on and of those held out: whole pictures, at least one, about `share`."""
    from mpa_edge.selection import drawn

    groups = sorted({example.group for example in examples})
    held_groups = set(drawn(groups, max(1, round(share * len(groups))), seed, key=str))
    places = range(len(examples))
    held = [place for place in places if examples[place].group in held_groups]
    return [place for place in places if examples[place].group not in held_groups], held


def in_batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive batches."""
    return (places[start : start + size] for start in range(0, len(places), size))


def _pad_left(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (width - len(row), 0), value=value)
