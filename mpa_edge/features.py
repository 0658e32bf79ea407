"""Image features once per picture: they are kept, and the same picture under another question is not encoded again.

Where a model's forward takes its image encoder's output in the place of pixels (`mm_encoder_outputs`), one pass of the
encoder serves all questions about a picture: annotation, self-check, every vote, training. A picture is known by its
pixels, and is encoded by itself, never in a batch: what is kept depends on the picture alone, not on which others it
was first asked with, so that a resumed run computes the very same numbers.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL.Image import Image
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mpa_edge.ahead import ahead

CACHE_BYTES = 2 << 30
# An encoder that gives more than these (deepstack features, say) cannot be replaced by its pooled output.
KNOWN_OUTPUTS = {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}


@dataclass(frozen=True)
class Known:
    """What a model needs of a picture. `features` (image tokens, width) lie in main memory, so that they never take
    room from the model; `facts` are the image processor's outputs beside the pixels (rows and columns of tiles, the
    grid of patches, …), from which the processor tells how many image tokens the prompt has. `listed` says whether the
    encoder gives a list with an item per picture, or one tensor for all."""

    features: torch.Tensor
    facts: dict[str, Any]
    listed: bool


class FeatureCache:
    """The most recently used pictures, up to a number of bytes."""

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._items: OrderedDict[bytes, Known] = OrderedDict()
        self._weights: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: bytes) -> Known | None:
        """The picture with this digest, if it is known; it was used last now."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, known: Known) -> None:
        """Keep a picture, and let go of those that were not used for longest."""
        self._items[key] = known
        self.bytes += known.features.nbytes
        while self.bytes > self.most_bytes:
            self.bytes -= self._items.popitem(last=False)[1].features.nbytes

    def check(self, model: Any) -> None:
        """Forget everything if the weights that made it have changed since the last check."""
        weights = weights_of_encoder(model)
        if weights != self._weights:
            self._items.clear()
            self.bytes, self._weights = 0, weights


class KnownPictures:
    """Stands in a processor for its image processor: what that would say about pictures, without their pixels.

    The processor puts the prompt together from it as ever, so the image tokens are its own whatever the family. One
    picture per prompt. Known pictures come from the cache; new ones go through image processor and encoder first.
    """

    def __init__(self, image_processor: Any, model: Any, cache: FeatureCache) -> None:
        self._image_processor, self._model, self._cache = image_processor, model, cache
        self._wanted: list[Known] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def __call__(self, images: Sequence[Any], **settings: Any) -> BatchFeature:
        """As the image processor's call, for pictures of which each comes alone, in a list of its own or not."""
        self._wanted += self._know([images[place : place + 1] for place in range(len(images))], settings)
        return BatchFeature(
            {key: _joined([known.facts[key] for known in self._wanted]) for key in self._wanted[0].facts}
        )

    def encoder_outputs(self) -> dict[str, BaseModelOutputWithPooling]:
        """`mm_encoder_outputs` for the pictures of the call."""
        features: Any = [known.features.to(self._model.device) for known in self._wanted]
        if not self._wanted[0].listed:
            features = torch.cat(features)
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def _know(self, images: list[Any], settings: dict[str, Any]) -> list[Known]:
        keys = [digest_of(image[0] if isinstance(image[0], Image) else image[0][0]) for image in images]
        known = {key: self._cache.get(key) for key in keys}
        new = {key: image for key, image in zip(keys, images, strict=True) if known[key] is None}
        tensors = {**settings, "return_tensors": "pt"}
        # One core makes pixels more slowly than a GPU encodes them.
        pixels = ahead(lambda image: self._image_processor(images=image, **tensors), new.values())
        for key, outputs in zip(new, pixels, strict=True):
            # What is made in inference mode could not be trained on.
            with torch.inference_mode(False), torch.no_grad():
                found = known[key] = self._encode(outputs)
            self._cache.put(key, found)
        return [cast("Known", known[key]) for key in keys]

    def _encode(self, outputs: BatchFeature) -> Known:
        encode = self._model.get_image_features
        names = inspect.signature(encode).parameters.keys() & outputs.keys()
        inputs = BatchFeature({name: outputs[name] for name in names}).to(self._model.device, dtype=self._model.dtype)
        found = encode(**inputs, return_dict=True)
        if not found.keys() <= KNOWN_OUTPUTS:
            raise TypeError(f"{type(found).__name__} holds more than pooled features")
        listed = isinstance(found.pooler_output, (list, tuple))
        features = torch.cat(tuple(found.pooler_output)) if listed else found.pooler_output
        facts = {name: value for name, value in outputs.items() if not name.startswith("pixel")}
        return Known(features.cpu(), facts, listed)


def known_pictures(processor: Any, model: Any, cache: FeatureCache) -> tuple[Any, KnownPictures]:
    """A processor that knows pictures from the cache, and where their features are to be had after its call."""
    cache.check(model)
    pictures = KnownPictures(processor.image_processor, model, cache)
    knowing = copy.copy(processor)
    knowing.image_processor = pictures
    return knowing, pictures


def takes_features(model: Any) -> bool:
    """Whether the model's forward takes an image encoder's output in the place of pixels."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters and hasattr(model, "get_image_features")


def digest_of(image: Image) -> bytes:
    """Names a picture by its content."""
    return hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes(), digest_size=16).digest()


def weights_of_encoder(model: Any) -> list[tuple[Any, ...]]:
    """Which tensors all but the language model consists of, and how often each was written to."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    language = {id(parameter) for parameter in decoder.parameters()} if decoder not in (None, model) else set()
    return [
        (name, id(parameter), parameter._version)
        for name, parameter in model.named_parameters()
        if id(parameter) not in language
    ]


def _joined(values: list[Any]) -> Any:
    """One batch of the outputs for single pictures."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]
