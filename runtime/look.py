"""Pictures that are asked about more than once: what was computed of them is kept, within bounds.

Two things are worth keeping. The *features* of recent pictures, found by the pixels that the model sees, save the
vision encoder. The *prefix* of the last prompt, up to its last image token, stays in the engine's key-value cache and
saves reading the picture again. Prompts are always read in these two parts, prefix and rest, so an answer is the same
to the bit whether the prefix was there or not.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mpa_edge.bundle import Images
from mpa_edge.errors import BundleError, InputError, ModelError
from mpa_edge.runtime.answering import AnswerStream
from mpa_edge.runtime.engine import Engine, Features, Logits, Positions
from mpa_edge.runtime.families import Cut, Family
from mpa_edge.runtime.prompts import Turn
from mpa_edge.runtime.vlm import Answer, Decoding, Timings

if TYPE_CHECKING:
    from mpa_edge.runtime.bundle_vlm import BundleVlm


@dataclass
class Picture:
    """What is asked about, as the model gets it: one picture, or several. `features` (image tokens, hidden) are there
    once they were encoded; `kept` ones are never forgotten."""

    cuts: tuple[Cut, ...]
    kept: bool = False
    features: Features | None = None

    @cached_property
    def key(self) -> bytes:
        """A digest of all that the model sees of it."""
        digest = hashlib.blake2b()
        for cut in self.cuts:
            digest.update(repr((cut.tiles.shape, cut.rows, cut.columns)).encode())
            digest.update(np.ascontiguousarray(cut.tiles).data)
        return digest.digest()


# Who asks again asks about one of the last few pictures; of a small model, 64 MB would hold thousands.
MOST_PICTURES = 32


class FeatureCache:
    """Features of the `MOST_PICTURES` pictures that were used last, at most so many bytes; the oldest go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[bytes, Features] = OrderedDict()

    def get(self, key: bytes) -> Features | None:
        """The features under a key, which become the newest."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, features: Features) -> None:
        """Keep features unless they are larger than the whole cache."""
        if features.nbytes > self.limit or key in self._kept:
            return
        self._kept[key] = features
        self.bytes += features.nbytes
        while self.bytes > self.limit or len(self._kept) > MOST_PICTURES:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes


class Reader:
    """Reads prompts into an engine and knows what the engine still holds. Not thread-safe."""

    def __init__(self, engine: Engine, family: Family, image: Images, image_token_id: int, cache_bytes: int) -> None:
        self.engine = engine
        self._family = family
        self._image = image
        self.turn = 0  # counts prompts: a stream that finds another number than its own is over
        self._image_token_id = image_token_id
        self._recent = FeatureCache(cache_bytes)
        self._prefix: tuple[bytes, list[int]] | None = None

    def keeps(self, picture: Picture) -> bool:
        """Whether what is computed of the picture may serve another question."""
        return picture.kept or self._recent.limit > 0

    def encode(self, picture: Picture, prefix: Sequence[int]) -> None:
        """Fill in the picture's features, unless they are there, or nobody will need them: the prefix is still held."""
        if picture.features is not None or (self._holds(picture, prefix) and not picture.kept):
            return
        features = self._recent.get(picture.key) if self.keeps(picture) else None
        if features is None:
            features = self._encoded(picture)
            if self._recent.limit:
                self._recent.put(picture.key, features)
        picture.features = features

    def read(self, picture: Picture, prefix: Sequence[int], rest: Sequence[int]) -> tuple[Logits, int]:
        """Read an encoded picture's prompt; the logits after it, and how many of its tokens were held already."""
        held = self.hold(picture, prefix)
        return self.engine.extend(rest), held

    def hold(self, picture: Picture, prefix: Sequence[int]) -> int:
        """Make the engine's cache hold this prefix and nothing else; returns how many of its tokens it held already."""
        self.turn += 1
        if self._holds(picture, prefix) and self.engine.rewind():
            return len(prefix)
        self._prefix = None
        if picture.features is None:  # the engine could not rewind after all
            picture.features = self._encoded(picture)
        self.engine.prefill(prefix, picture.features, self._positions(prefix, picture))
        if self.keeps(picture):
            self.engine.mark()
            self._prefix = (picture.key, list(prefix))
        return 0

    def read_all(self, tokens: Sequence[int], picture: Picture) -> Logits:
        """Logits (positions, vocabulary) of a whole prompt, read in one go."""
        self.turn += 1
        self._prefix = None
        return self.engine.prefill(tokens, self._encoded(picture), self._positions(tokens, picture), all_logits=True)

    def next(self, turn: int, token: int) -> Logits:
        """Append the chosen token of the prompt with this number; `ModelError` once another prompt was read."""
        if turn != self.turn:
            raise ModelError("another question was asked before this stream ended")
        return self.engine.extend([token])

    def split(self, tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """A prompt as prefix, which ends with the last image token, and rest."""
        cut = len(tokens) - list(reversed(tokens)).index(self._image_token_id)
        if cut == len(tokens):
            raise ModelError("the prompt ends with the picture: there is nothing to answer")
        return tokens[:cut], tokens[cut:]

    def forget(self, picture: Picture) -> None:
        """Let go of a kept picture; the engine's cache is overwritten by the next prompt."""
        if not self._recent.limit:
            self._prefix = None
        picture.features, picture.kept = None, False

    def forget_all(self) -> None:
        """Let go of everything."""
        self._recent, self._prefix = FeatureCache(0), None

    def _encoded(self, picture: Picture) -> Features:
        parts = [self.engine.encode(cut) for cut in picture.cuts]
        for cut, features in zip(picture.cuts, parts, strict=True):
            _check_count(cut, len(features), self._family.image_tokens(cut.rows, cut.columns, self._image))
        return np.concatenate(parts)

    def _positions(self, tokens: Sequence[int], picture: Picture) -> Positions | None:
        return self._family.positions(tokens, self._image_token_id, picture.cuts)

    def _holds(self, picture: Picture, prefix: Sequence[int]) -> bool:
        return self.keeps(picture) and self._prefix == (picture.key, list(prefix))


def _check_count(cut: Cut, found: int, wanted: int) -> None:
    """`InputError` where the model skipped a tile, as transformers' Idefics3 does too; `BundleError` where vision
    encoder and image settings do not belong together."""
    if found == wanted:
        return
    told = f"the vision encoder gives {found} image features where {wanted} are needed"
    if any((tile == tile[0, 0]).all() for tile in cut.tiles):
        raise InputError(f"{told}; a tile that has the mean colour everywhere is taken for padding")
    raise BundleError(f"{told}; it does not belong to the manifest's image settings")


class View:
    """One picture, encoded and read once; every question reads itself only. Made by `BundleVlm.look`.

    `timings` tells what the look took; those of its answers have no vision and the prefill of the question alone.
    Questions elsewhere, about other pictures, may come in between: the next one here then reads the picture's features
    again, and still encodes nothing. Thread-safe like the model itself.
    """

    def __init__(self, vlm: BundleVlm, picture: Picture, timings: Timings) -> None:
        self.timings = timings
        self._vlm = vlm
        self._picture = picture
        self._open = True

    def ask(self, question: str, decoding: Decoding | None = None, *, max_new_tokens: int | None = None) -> Answer:
        """See `BundleVlm.ask`; the answer equals that one's."""
        return self.stream(question, decoding, max_new_tokens=max_new_tokens).result()

    def stream(
        self, question: str, decoding: Decoding | None = None, *, max_new_tokens: int | None = None
    ) -> AnswerStream:
        """See `BundleVlm.stream`."""
        if not self._open:
            raise ModelError("the view of this picture is closed")
        turns = [Turn("user", self._vlm.put(question), pictures=len(self._picture.cuts))]
        return AnswerStream(self._vlm, lambda: self._picture, turns, self._vlm.decoding(decoding, max_new_tokens))

    def close(self) -> None:
        """Release the picture's features. Further questions raise `ModelError`."""
        with self._vlm.lock:
            self._open = False
            self._vlm.forget(self._picture)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
