"""LLaVA's pictures against transformers' CLIP and SigLIP processors: exactly equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mpa_edge.bundle import LlavaImages
from mpa_edge.errors import ImageError
from mpa_edge.export.families import read_config
from mpa_edge.export.image_settings import llava_images
from mpa_edge.processors import load_processor
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.llava import Llava, _resized
from tiny_pictures import PROCESSORS_MODES, SHAPES, noise, save_turned

FAMILY = Llava()
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# LLaVA-1.5's CLIP at 336 pixels and llava-interleave's SigLIP at 384; small ones; ones whose crop is smaller, and
# larger, than what is left of the picture.
VARIANTS: dict[str, dict[str, Any]] = {
    "clip-336": {**CLIP, "tile_size": 336, "shortest_edge": 336},
    "siglip-384": {**HALF, "tile_size": 384},
    "clip-56": {**CLIP, "tile_size": 56, "shortest_edge": 56},
    "siglip-56": {**HALF, "tile_size": 56},
    "crop": {**CLIP, "tile_size": 41, "shortest_edge": 60},
    "pad": {**CLIP, "tile_size": 61, "shortest_edge": 40},
}


def settings_of(variant: str, **changed: Any) -> LlavaImages:
    shared = {"rescale_factor": 1 / 255, "resample": "bicubic", "tokens_per_tile": 16}
    return LlavaImages.model_validate({**shared, **VARIANTS[variant], **changed})


def processor_of(settings: LlavaImages) -> Any:
    shared: dict[str, Any] = {
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "resample": Image.Resampling[settings.resample.upper()],
    }
    square = {"height": settings.tile_size, "width": settings.tile_size}
    if settings.shortest_edge is None:
        return SiglipImageProcessorPil(size=square, **shared)
    return CLIPImageProcessorPil(size={"shortest_edge": settings.shortest_edge}, crop_size=square, **shared)


def assert_same(image: Image.Image, settings: LlavaImages, upright: Image.Image | None = None) -> None:
    expected = processor_of(settings)([upright or image], return_tensors="np")
    seen = FAMILY.pixel_values(FAMILY.cut(open_image(image), settings), settings)
    assert seen.keys() == expected.keys()
    assert seen["pixel_values"].dtype == expected["pixel_values"].dtype
    np.testing.assert_array_equal(seen["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("variant", ["clip-56", "siglip-56", "crop", "pad"])
def test_pixel_values_equal_the_processors(size: tuple[int, int], variant: str) -> None:
    assert_same(noise("RGB", size), settings_of(variant))


@pytest.mark.parametrize("size", [(1, 1), (100, 80), (336, 336), (900, 600), (60, 1900)], ids=str)
@pytest.mark.parametrize("variant", ["clip-336", "siglip-384"])
def test_the_released_sizes_equal_the_processors(size: tuple[int, int], variant: str) -> None:
    assert_same(noise("RGB", size), settings_of(variant))


@pytest.mark.parametrize("mode", PROCESSORS_MODES)
@pytest.mark.parametrize("variant", ["clip-56", "siglip-56"])
def test_colour_modes_equal_the_processors(mode: str, variant: str) -> None:
    assert_same(noise(mode, (120, 90)), settings_of(variant))


@pytest.mark.parametrize("resample", ["bilinear", "lanczos"])
def test_other_filters_equal_the_processors(resample: str) -> None:
    assert_same(noise("RGB", (130, 70)), settings_of("clip-56", resample=resample))


def test_exif_orientation_comes_first(tmp_path: Path) -> None:
    upright = save_turned(tmp_path / "turned.png", (90, 40))
    assert_same(open_image(tmp_path / "turned.png"), settings_of("clip-56"), upright)


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([30, 224, 336]))
def test_the_size_before_the_crop_is_transformers(width: int, height: int, shortest: int) -> None:
    settings = settings_of("clip-336", shortest_edge=shortest)
    picture = np.broadcast_to(np.uint8(0), (3, height, width))
    long, short = max(width, height), min(width, height)
    if shortest * int(shortest * long / short) > 80_000_000:
        with pytest.raises(ImageError):
            _resized((width, height), settings)
        return
    expected = get_resize_output_image_size(picture, shortest, False, input_data_format="channels_first")
    assert _resized((width, height), settings)[::-1] == expected


def test_a_picture_that_would_become_gigantic_is_refused() -> None:
    with pytest.raises(ImageError, match="8000000x1; this model sees at most 708 to 1") as caught:
        FAMILY.cut(Image.new("RGB", (8_000_000, 1)), settings_of("clip-336"))
    assert caught.value.reason == "aspect_ratio"
    assert FAMILY.cut(Image.new("RGB", (8_000_000, 1)), settings_of("siglip-56")).tiles.shape == (1, 56, 56, 3)


@pytest.mark.parametrize("folder", ["tiny_llava", "tiny_llava_siglip"])
def test_settings_and_prompt_are_the_model_folders(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    processor = load_processor(path)
    settings = llava_images(read_config(path), processor)
    images = [noise("RGB", (130, 70)), noise("RGB", (40, 50))]
    expected = processor(images=images, text="a<image>b<image>", return_tensors="np")
    cuts = [FAMILY.cut(image, settings) for image in images]
    seen = np.concatenate([FAMILY.pixel_values(cut, settings)["pixel_values"] for cut in cuts])
    np.testing.assert_array_equal(seen, expected["pixel_values"])
    layout = FAMILY.layout(0, 0, "<image>", settings)
    assert layout.count("<image>") == FAMILY.image_tokens(0, 0, settings)
    assert processor.tokenizer(f"a{layout}b{layout}").input_ids == expected["input_ids"][0].tolist()


def test_there_is_one_size() -> None:
    settings = settings_of("clip-336")
    assert FAMILY.sizes(settings) == [("336x336", settings)]
    assert FAMILY.grid((500, 20), settings) == (0, 0)
    assert FAMILY.tile_tokens(settings) == (16, 16)
    assert FAMILY.positions([1, 2], 2, []) is None


@pytest.mark.parametrize(
    "changed", [{"tile_size": 5000}, {"shortest_edge": 5000}, {"tokens_per_tile": 10**6}, {"tile_size": 0}], ids=str
)
def test_a_manifest_cannot_ask_for_the_absurd(changed: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        settings_of("clip-336", **changed)
