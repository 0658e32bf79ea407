"""InternVL's pictures against transformers' processor: exactly equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from mpa_edge.bundle import InternVlImages
from mpa_edge.export.families import read_config
from mpa_edge.export.image_settings import internvl_images
from mpa_edge.processors import load_processor
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.internvl import InternVl, _nearest_grid
from tiny_pictures import PROCESSORS_MODES, SHAPES, noise, save_turned

FAMILY = InternVl()


def settings_of(**changed: Any) -> InternVlImages:
    """InternVL3's own: tiles of 448 pixels, 12 of them at most."""
    shared = {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "rescale_factor": 1 / 255,
        "resample": "bicubic",
        "tile_size": 448,
        "min_patches": 1,
        "max_patches": 12,
        "tokens_per_tile": 256,
    }
    return InternVlImages.model_validate({**shared, **changed})


def processor_of(settings: InternVlImages) -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        size={"height": settings.tile_size, "width": settings.tile_size},
        min_patches=settings.min_patches,
        max_patches=settings.max_patches,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        resample=Image.Resampling[settings.resample.upper()],
    )


def assert_same(image: Image.Image, settings: InternVlImages, upright: Image.Image | None = None) -> None:
    expected = processor_of(settings)([upright or image], return_tensors="np")
    cut = FAMILY.cut(open_image(image), settings)
    seen = FAMILY.pixel_values(cut, settings)["pixel_values"]
    assert seen.dtype == expected["pixel_values"].dtype
    np.testing.assert_array_equal(seen, expected["pixel_values"])
    assert FAMILY.image_tokens(cut.rows, cut.columns, settings) == expected["num_patches"][0] * settings.tokens_per_tile


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 6), (3, 12)])
def test_pixel_values_equal_the_processors(size: tuple[int, int], least: int, most: int) -> None:
    assert_same(noise("RGB", size), settings_of(tile_size=32, min_patches=least, max_patches=most))


@pytest.mark.parametrize("size", [(100, 80), (448, 448), (1344, 900), (60, 1900)], ids=str)
def test_the_released_sizes_equal_the_processors(size: tuple[int, int]) -> None:
    assert_same(noise("RGB", size), settings_of())


@pytest.mark.parametrize("mode", PROCESSORS_MODES)
def test_colour_modes_equal_the_processors(mode: str) -> None:
    assert_same(noise(mode, (120, 90)), settings_of(tile_size=32))


@pytest.mark.parametrize("resample", ["bilinear", "lanczos"])
def test_other_filters_equal_the_processors(resample: str) -> None:
    assert_same(noise("RGB", (130, 70)), settings_of(tile_size=32, resample=resample))


def test_exif_orientation_comes_first(tmp_path: Path) -> None:
    upright = save_turned(tmp_path / "turned.png", (90, 40))
    assert_same(open_image(tmp_path / "turned.png"), settings_of(tile_size=32), upright)


edges = st.one_of(st.integers(1, 6000), st.sampled_from([224, 448, 896, 1344]))


# Grids that are equally near: the area decides, and the order where it does not.
@example(633, 633, 1, 11, 448)
@example(634, 634, 1, 11, 448)
@example(960, 960, 1, 11, 448)
@example(125, 100, 2, 0, 448)
@example(1250, 1000, 2, 0, 448)
@given(edges, edges, st.integers(1, 12), st.integers(0, 12), st.sampled_from([64, 448]))
def test_the_grid_is_transformers(width: int, height: int, least: int, more: int, tile: int) -> None:
    settings = settings_of(min_patches=least, max_patches=least + more, tile_size=tile)
    columns, rows = get_optimal_tiled_canvas((height, width), (tile, tile), least, least + more)
    assert _nearest_grid(width, height, settings) == (rows, columns)
    assert FAMILY.grid((width, height), settings) == ((0, 0) if (rows, columns) == (1, 1) else (rows, columns))


def test_settings_and_prompt_are_the_model_folders(tiny_internvl: Path) -> None:
    processor = load_processor(tiny_internvl)
    # Off in the image processor's own file, as in the released models', and switched on by InternVL's processor.
    assert not processor.image_processor.crop_to_patches
    settings = internvl_images(read_config(tiny_internvl), processor)
    assert (settings.tile_size, settings.max_patches, settings.tokens_per_tile) == (64, 6, 16)
    images = [noise("RGB", (200, 70)), noise("RGB", (50, 50))]
    expected = processor(images=images, text="a<IMG_CONTEXT>b<IMG_CONTEXT>", return_tensors="np")
    cuts = [FAMILY.cut(image, settings) for image in images]
    assert [(cut.rows, cut.columns) for cut in cuts] == [(1, 3), (0, 0)]
    seen = np.concatenate([FAMILY.pixel_values(cut, settings)["pixel_values"] for cut in cuts])
    np.testing.assert_array_equal(seen, expected["pixel_values"])
    layouts = [FAMILY.layout(cut.rows, cut.columns, "<IMG_CONTEXT>", settings) for cut in cuts]
    for cut, layout in zip(cuts, layouts, strict=True):
        assert layout.count("<IMG_CONTEXT>") == FAMILY.image_tokens(cut.rows, cut.columns, settings)
    assert processor.tokenizer(f"a{layouts[0]}b{layouts[1]}").input_ids == expected["input_ids"][0].tolist()


def test_sizes_are_fewer_tiles() -> None:
    settings = settings_of(min_patches=3, max_patches=6)
    sizes = FAMILY.sizes(settings)
    assert [size.max_patches for _, size in sizes] == [1, 2, 3, 4, 5, 6]
    assert [size.min_patches for _, size in sizes] == [1, 2, 3, 3, 3, 3]
    assert sizes[-1] == ("at most 6 tiles", settings)
    assert FAMILY.tile_tokens(settings) == (256, 256)
    assert FAMILY.positions([1, 2], 2, []) is None


@pytest.mark.parametrize(
    "changed",
    [{"max_patches": 1000}, {"tile_size": 4096}, {"min_patches": 7, "max_patches": 6}, {"min_patches": 0}],
    ids=str,
)
def test_a_manifest_cannot_ask_for_the_absurd(changed: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        settings_of(**changed)
