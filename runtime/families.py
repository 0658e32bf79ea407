"""What differs between model families on the device: one small object per family, on numpy and Pillow alone.

A family cuts a picture as its training processor does, says what stands for it in the prompt, and counts positions.
What it takes to export one lives in `mpa_edge.export.families` under the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from mpa_edge.bundle import Bundle
from mpa_edge.errors import BundleError

Tiles = NDArray[np.uint8]


@dataclass(frozen=True)
class Cut:
    """One picture as a model sees it.

    `tiles` are uint8 RGB (tiles, height, width, 3), all of one size. `rows` and `columns` are the family's grid: of
    tiles, where it cuts tiles (0, 0: one tile only), or of image tokens, where it sees the picture in one piece.
    """

    tiles: Tiles
    rows: int
    columns: int


class Family(Protocol):
    """One model family. `settings` is always the manifest's `image`, of the class that the family's plan has."""

    name: str
    plan: str

    def cut(self, image: Image, settings: Any) -> Cut:
        """The pixels of an upright RGB picture, resized and cut as the training processor does, to the bit.

        Raises `InputError` for a shape that the model cannot see.
        """
        ...

    def grid(self, size: tuple[int, int], settings: Any) -> tuple[int, int]:
        """Rows and columns of a picture (width, height), as `cut` finds them."""
        ...

    def image_tokens(self, rows: int, columns: int, settings: Any) -> int:
        """How many image tokens a picture with this grid takes."""
        ...

    def tile_tokens(self, settings: Any) -> tuple[int, int]:
        """The fewest and the most image tokens that one tile takes."""
        ...

    def layout(self, rows: int, columns: int, image_token: str, settings: Any) -> str:
        """What takes the place of the template's one image token: image tokens, and the pieces around them."""
        ...

    def pixel_values(self, cut: Cut, settings: Any) -> dict[str, NDArray[Any]]:
        """The vision encoder's inputs for one picture, by name, equal to what the training processor makes."""
        ...

    def positions(self, token_ids: Sequence[int], image_token_id: int, cuts: Sequence[Cut]) -> NDArray[np.int64] | None:
        """Position ids (axes, tokens) of a prompt; None where they are just 0, 1, 2, …

        Decoding goes on at the largest position plus one.
        """
        ...

    def limited(self, settings: Any, longest_edge: int) -> Any:
        """Settings for pictures of `longest_edge` pixels, as `mpa_edge.processors.limit` sets a training processor.

        Raises `InputError` where the model sees every picture at one size.
        """
        ...

    def sizes(self, settings: Any) -> list[tuple[str, Any]]:
        """Settings worth comparing when a picture has to cost less, each with its name for people; from the cheapest
        up, the given ones among them."""
        ...


def family_named(name: str) -> Family:
    """The family that a manifest names; `BundleError` when this version does not know it."""
    families = _families()
    if name not in families:
        raise BundleError(f"family {name!r} is not known to this version; known: {', '.join(sorted(families))}")
    return families[name]


def family_of_bundle(bundle: Bundle) -> Family:
    """The family of a bundle; `BundleError` when its image settings are another family's."""
    family = family_named(bundle.family)
    if bundle.image.plan != family.plan:
        raise BundleError(f"image settings of the plan {bundle.image.plan!r} do not go with family {bundle.family!r}")
    return family


def _families() -> dict[str, Family]:
    from mpa_edge.runtime.idefics3 import Idefics3
    from mpa_edge.runtime.internvl import InternVl
    from mpa_edge.runtime.llava import Llava
    from mpa_edge.runtime.qwen_vl import QwenVl

    known: tuple[Family, ...] = (Idefics3(), QwenVl("qwen2_vl"), QwenVl("qwen2_5_vl"), Llava(), InternVl())
    return {family.name: family for family in known}
