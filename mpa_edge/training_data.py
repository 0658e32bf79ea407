"""Training batches: the inference prompt, token for token and pixel for pixel, with the answer appended.

A batch is what `TransformersVlm.encode` makes for inference (left-padded) with the target tokens to its right
(right-padded), so that all targets stand in the last columns and only their logits need computing. Nothing is ever cut
off: what is longer than the model's positions is dropped, and counted.

A training set may have more rows than fit into memory: they are read from its file when they are needed, and some
dozens of bytes of each are kept.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL.Image import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mpa_edge.errors import AGAIN, ImageError, RunError
from mpa_edge.features import CACHE_BYTES
from mpa_edge.runtime.images import open_image
from mpa_edge.transformers_vlm import TransformersVlm

IGNORED = -100
FEATURES = "mm_encoder_outputs"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One row of the training set. `group` names the picture, by which rows are held out together."""

    id: str
    group: str
    image: Path
    prompt: str
    answer: str
    verdict: str


class Examples(Sequence[Example]):
    """Rows of a training set's file, which are read when they are asked for; eight bytes of each are kept."""

    def __init__(self, path: Path, starts: array[int]) -> None:
        """`starts` are the places of the rows in the file, in bytes."""
        self._path, self._starts = path, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Examples: ...
    def __getitem__(self, place: int | slice) -> Example | Examples:
        if isinstance(place, slice):
            return Examples(self._path, self._starts[place])
        return next(self._read([self._starts[place]]))

    def __iter__(self) -> Iterator[Example]:
        return self._read(self._starts)

    def only(self, places: Iterable[int]) -> Examples:
        """Those at these places."""
        return Examples(self._path, array("Q", (self._starts[place] for place in places)))

    def _read(self, starts: Sequence[int]) -> Iterator[Example]:
        try:
            with self._path.open("rb") as file:
                for start in starts:
                    file.seek(start)
                    yield _example(self._path, file.readline())
        except (FileNotFoundError, KeyError, IndexError, TypeError, ValueError) as error:
            raise RunError(f"{self._path} was changed while it was trained on; {AGAIN} ({error})") from error


def read_examples(path: Path) -> Examples:
    """The examples of a training set such as `parity.jsonl`; picture paths are relative to its folder. `RunError` where
    a row cannot be read."""
    starts, start = array("Q"), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                _example(path, line)
            except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
                raise RunError(f"{path}, line {number}: not a row of a training set ({error!r})") from error
            starts.append(start)
            start += len(line)
    return Examples(path, starts)


def _example(path: Path, line: bytes) -> Example:
    row = json.loads(line.decode())
    user, assistant = row["messages"]
    return Example(
        id=row["id"],
        group=row["sample_id"],
        image=path.parent / row["images"][0],
        prompt=user["content"][1]["text"],
        answer=assistant["content"][0]["text"],
        verdict=row["verdict"],
    )


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: what has one number per token, what else the model takes, and its picture's features."""

    tokens: dict[str, torch.Tensor]
    facts: dict[str, torch.Tensor]
    features: torch.Tensor


class TrainingData:
    """Examples as model inputs. With a frozen image encoder and a model that takes its output ready-made, prompts and
    features are computed once and kept; otherwise every batch is encoded anew. The loss is the same."""

    def __init__(
        self,
        student: TransformersVlm,
        examples: Sequence[Example],
        *,
        frozen_features: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`frozen_features` says that training changes nothing of what makes the image features."""
        self.examples = examples
        self.dropped: dict[str, str] = {}
        self._student = student
        self._targets = array("I", (len(student.target_ids(example.answer)) for example in examples))  # their lengths
        self._prompts: list[Prompt] = []
        self._lengths = array("I")
        self._caching = frozen_features
        self._listed = True
        self._room = cache_bytes

    def prepare(self) -> None:
        """Look at every prompt before training starts: `examples` keeps those that can be trained on, `dropped` tells
        the reason for the others by their ids. Fills the cache on the way."""
        most = self._student.most_tokens
        kept = array("Q")
        for places in in_batches(range(len(self.examples)), self._student.batch_size):
            examples = {place: self.examples[place] for place in places}
            images = {place: image for place in places if (image := self._opened(examples[place])) is not None}
            asked = [examples[place].prompt for place in images]
            prompts, lengths = self._encode_once(list(images.values()), asked) if images else ([], [])
            for row, place in enumerate(images):
                length = lengths[row] + self._targets[place]
                if most is not None and length > most:
                    self.dropped[examples[place].id] = f"too_long: {length} tokens, the model takes {most}"
                    continue
                kept.append(place)
                self._lengths.append(length)
                self._prompts += prompts[row : row + 1]
            if not self._caching:
                self._prompts.clear()
        if len(kept) < len(self.examples):
            self.examples = _only(self.examples, kept)
            self._targets = array("I", (self._targets[place] for place in kept))

    def batch(self, places: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
        """The model's inputs for some examples, and labels (rows, longest target) with `IGNORED` as padding."""
        examples = [self.examples[place] for place in places]
        inputs = self._joined(places) if self._prompts else self._encoded(examples)
        targets = [self._student.target_ids(example.answer) for example in examples]
        return append_targets(inputs, targets, pad=self._student.pad)

    def batches(self, places: Sequence[int], size: int, seed: str) -> Iterator[list[int]]:
        """Batches of like length in an order that the seed decides."""
        order = array("Q", places)
        generator = random.Random(seed)
        generator.shuffle(order)
        window = size * 16
        for start in range(0, len(order), window):
            order[start : start + window] = array("Q", sorted(order[start : start + window], key=self._length))
        starts = array("Q", range(0, len(order), size))
        generator.shuffle(starts)
        return (order[start : start + size].tolist() for start in starts)

    def target_tokens(self, places: Iterable[int]) -> int:
        """How many tokens the loss of some examples is on."""
        return sum(self._targets[place] for place in places)

    def _length(self, place: int) -> int:
        return self._lengths[place] if self._lengths else len(self.examples[place].prompt) + self._targets[place]

    def _opened(self, example: Example) -> Image | None:
        try:
            return open_image(example.image)
        except ImageError as error:
            self.dropped[example.id] = f"{error.reason}: {error}"
            return None

    def _encoded(self, examples: Sequence[Example]) -> dict[str, Any]:
        images = [open_image(example.image) for example in examples]
        return dict(self._student.encode(images, [example.prompt for example in examples]))

    def _encode_once(self, images: list[Image], texts: list[str]) -> tuple[list[Prompt], list[int]]:
        """The prompts of some examples, none when they are not kept, and their lengths in tokens."""
        if self._caching:
            try:
                inputs = self._student.encode_with_features(images, texts)
                if inputs is not None:
                    prompts = self._cut(dict(inputs))
                    self._room -= sum(prompt.features.nbytes for prompt in prompts)
                    self._caching = self._room >= 0
                    return prompts, [len(prompt.tokens["input_ids"]) for prompt in prompts]
            except (TypeError, ValueError, RuntimeError, AttributeError):
                pass  # a model that takes features in a way of its own, or a bad picture, which raises again below
            self._caching = False
        inputs = self._student.encode(images, texts)
        return [], inputs["attention_mask"].sum(dim=1).tolist()

    def _cut(self, inputs: dict[str, Any]) -> list[Prompt]:
        """A batch as one prompt per row; raises one of Python's own errors where it cannot be cut."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        features = inputs.pop(FEATURES)["image"].pooler_output
        self._listed = isinstance(features, (list, tuple))
        if not self._listed:
            features = features.split((ids == self._student.model.config.image_token_id).sum(dim=1).tolist())
        per_token = {key: value for key, value in inputs.items() if value.shape == ids.shape}
        facts = {key: value for key, value in inputs.items() if key not in per_token}
        if any(len(value) != len(ids) for value in (*facts.values(), features)):
            raise ValueError("not one item per row")
        return [
            Prompt(
                {key: value[row][mask[row]].cpu() for key, value in per_token.items()},
                {key: value[row : row + 1].cpu() for key, value in facts.items()},
                features[row].cpu(),
            )
            for row in range(len(ids))
        ]

    def _joined(self, places: Sequence[int]) -> dict[str, Any]:
        """Prompts that are kept, as a batch."""
        prompts, device = [self._prompts[place] for place in places], self._student.model.device
        width = max(len(prompt.tokens["input_ids"]) for prompt in prompts)
        inputs: dict[str, Any] = {}
        for key in prompts[0].tokens:
            fill = self._student.pad if key == "input_ids" else 0
            rows = [_pad_left(prompt.tokens[key], width, fill) for prompt in prompts]
            inputs[key] = torch.stack(rows).to(device)
        for key in prompts[0].facts:
            inputs[key] = torch.cat([prompt.facts[key] for prompt in prompts]).to(device)
        features: Any = [prompt.features.to(device) for prompt in prompts]
        found = features if self._listed else torch.cat(features)
        return {**inputs, FEATURES: {"image": BaseModelOutputWithPooling(pooler_output=found)}}


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


def split_by_group(examples: Sequence[Example], share: float, seed: int) -> tuple[array[int], array[int]]:
    """The places of the examples to train on and of those held out: whole pictures, at least one, about `share`."""

    def draw(group: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:8], "big")

    draws = np.fromiter((draw(example.group) for example in examples), np.uint64)
    groups = np.unique(draws)
    last = groups[max(1, round(share * len(groups))) - 1] if len(groups) else 0
    train, held = (np.flatnonzero(those).astype(np.uint64) for those in (draws > last, draws <= last))
    return array("Q", train.tobytes()), array("Q", held.tobytes())


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive batches."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _pad_left(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (width - len(row), 0), value=value)


def _only(examples: Sequence[Example], places: Iterable[int]) -> Sequence[Example]:
    return examples.only(places) if isinstance(examples, Examples) else [examples[place] for place in places]
