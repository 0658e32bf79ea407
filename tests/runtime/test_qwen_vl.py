"""Qwen-VL's pictures and positions against transformers: exactly equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from transformers import AutoConfig, Qwen2_5_VLModel, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from mpa_edge.bundle import QwenVlImages
from mpa_edge.errors import ImageError, ModelError
from mpa_edge.export.families import read_config
from mpa_edge.export.image_settings import qwen_vl_images
from mpa_edge.processors import limit, load_processor
from mpa_edge.runtime.families import Cut
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.qwen_vl import QwenVl
from tiny_pictures import PROCESSORS_MODES, SHAPES, noise, save_turned

FAMILY = QwenVl("qwen2_vl")
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# The released models': Qwen2-VL-2B-Instruct and Qwen2.5-VL-3B-Instruct.
RELEASED = {"min_pixels": 3136, "max_pixels": 12845056}
SMALL = {"patch_size": 4, "min_pixels": 4 * 64, "max_pixels": 36 * 64}
IMAGE, TEXT = 9, 1


def settings_of(**changed: Any) -> QwenVlImages:
    shared = {"rescale_factor": 1 / 255, "resample": "bicubic", "patch_size": 14, "merge_size": 2}
    return QwenVlImages.model_validate({**CLIP, **shared, "temporal_patch_size": 2, **RELEASED, **changed})


def processor_of(settings: QwenVlImages) -> Qwen2VLImageProcessorPil:
    names = ("patch_size", "merge_size", "temporal_patch_size", "rescale_factor")
    return Qwen2VLImageProcessorPil(
        **{name: getattr(settings, name) for name in names},
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        resample=Image.Resampling[settings.resample.upper()],
    )


def assert_same(image: Image.Image, settings: QwenVlImages, upright: Image.Image | None = None) -> None:
    expected = processor_of(settings)([upright or image], return_tensors="np")
    cut = FAMILY.cut(open_image(image), settings)
    seen = FAMILY.pixel_values(cut, settings)
    assert seen.keys() == expected.keys()
    for name, values in seen.items():
        assert values.dtype == expected[name].dtype
        np.testing.assert_array_equal(values, expected[name])
    assert FAMILY.image_tokens(cut.rows, cut.columns, settings) * settings.merge_size**2 == len(seen["pixel_values"])


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("changed", [SMALL, {}, {**SMALL, "merge_size": 3, "temporal_patch_size": 1}], ids=str)
def test_pixel_values_equal_the_processors(size: tuple[int, int], changed: dict[str, Any]) -> None:
    assert_same(noise("RGB", size), settings_of(**changed))


@pytest.mark.parametrize("mode", PROCESSORS_MODES)
def test_colour_modes_equal_the_processors(mode: str) -> None:
    assert_same(noise(mode, (120, 90)), settings_of(**SMALL))


@pytest.mark.parametrize("resample", ["bilinear", "lanczos"])
def test_other_filters_equal_the_processors(resample: str) -> None:
    assert_same(noise("RGB", (130, 70)), settings_of(**SMALL, resample=resample))


def test_a_picture_over_the_released_limit_equals_the_processors() -> None:
    assert_same(noise("RGB", (1100, 900)), settings_of(max_pixels=256 * 28 * 28))


def test_exif_orientation_comes_first(tmp_path: Path) -> None:
    upright = save_turned(tmp_path / "turned.png", (90, 40))
    assert_same(open_image(tmp_path / "turned.png"), settings_of(), upright)


sizes = st.tuples(st.integers(1, 6000), st.integers(1, 6000)).filter(lambda size: max(size) <= 200 * min(size))


@given(sizes, st.sampled_from([4, 14, 16]), st.sampled_from([1, 2]), st.integers(1, 10**6), st.integers(1, 10**7))
@hypothesis_settings(deadline=None)
def test_the_grid_is_smart_resizes(size: tuple[int, int], patch: int, merge: int, least: int, more: int) -> None:
    settings = settings_of(patch_size=patch, merge_size=merge, min_pixels=least, max_pixels=least + more)
    rows, columns = FAMILY.grid(size, settings)
    token = patch * merge
    assert (rows * token, columns * token) == smart_resize(size[1], size[0], token, least, least + more)
    fewest, most = FAMILY.tile_tokens(settings)
    assert fewest <= FAMILY.image_tokens(rows, columns, settings) <= most


@given(st.integers(1, 40000), st.integers(1, 5000))
@hypothesis_settings(deadline=None)
def test_no_picture_takes_more_tokens_than_said(limit: int, height: int) -> None:
    settings = settings_of(min_pixels=limit, max_pixels=limit)
    for size in ((200 * height, height), (height, 200 * height), (height, height)):
        assert FAMILY.image_tokens(*FAMILY.grid(size, settings), settings) <= FAMILY.tile_tokens(settings)[1]


def test_what_the_processor_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        processor_of(settings_of())([noise("RGB", (201, 1))])
    for size in ((201, 1), (1, 201)):
        with pytest.raises(ImageError, match="at most 200 to 1") as caught:
            FAMILY.cut(noise("RGB", size), settings_of())
        assert caught.value.reason == "aspect_ratio"


@pytest.mark.parametrize("folder", ["tiny_qwen2_vl", "tiny_qwen2_5_vl"])
def test_settings_and_prompt_are_the_model_folders(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    processor = load_processor(path)
    settings = qwen_vl_images(read_config(path), processor)
    assert settings.min_pixels == processor.image_processor.size.shortest_edge
    images = [noise("RGB", (130, 70)), noise("RGB", (40, 200))]
    text = "a<|image_pad|>b<|image_pad|>"
    expected = processor(images=images, text=text, return_tensors="np")
    cuts = [FAMILY.cut(image, settings) for image in images]
    seen = [FAMILY.pixel_values(cut, settings) for cut in cuts]
    for name in ("pixel_values", "image_grid_thw"):
        np.testing.assert_array_equal(np.concatenate([values[name] for values in seen]), expected[name])
    layouts = [FAMILY.layout(cut.rows, cut.columns, "<|image_pad|>", settings) for cut in cuts]
    written = f"a{layouts[0]}b{layouts[1]}"
    assert processor.tokenizer(written).input_ids == expected["input_ids"][0].tolist()


@pytest.fixture(scope="module", params=["tiny_qwen2_vl", "tiny_qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> Any:
    """A model without weights: it only counts positions."""
    config = AutoConfig.from_pretrained(request.getfixturevalue(request.param))
    with torch.device("meta"):
        return (Qwen2VLModel if config.model_type == "qwen2_vl" else Qwen2_5_VLModel)(config)


def cut_of(rows: int, columns: int) -> Cut:
    return Cut(np.zeros((1, 1, 1, 3), np.uint8), rows, columns)


@pytest.mark.parametrize(
    ("texts", "grids"),
    [
        ([4, 7], [(3, 5)]),
        ([4, 1], [(5, 3)]),
        ([0, 1], [(1, 1)]),
        ([2, 0], [(2, 9)]),
        ([3, 2, 5], [(2, 4), (6, 1)]),
        ([0, 1, 0], [(4, 4), (1, 7)]),
        ([6], []),
    ],
    ids=str,
)
def test_positions_are_get_rope_indexs(model: Any, texts: list[int], grids: list[tuple[int, int]]) -> None:
    ids = [TEXT] * texts[0]
    for text, (rows, columns) in zip(texts[1:], grids, strict=True):
        ids += [IMAGE] * rows * columns + [TEXT] * text
    patches = torch.tensor([[1, rows * 2, columns * 2] for rows, columns in grids]) if grids else None
    expected, delta = model.get_rope_index(
        torch.tensor([ids]), torch.tensor([[int(token == IMAGE) for token in ids]], dtype=torch.int), patches
    )
    positions = FAMILY.positions(ids, IMAGE, [cut_of(*grid) for grid in grids])
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    # Where the model's own decoding goes on.
    assert positions.max() + 1 == len(ids) + delta.item()


def test_pictures_side_by_side_follow_each_other() -> None:
    positions = FAMILY.positions([IMAGE] * 5, IMAGE, [cut_of(1, 2), cut_of(3, 1)])
    np.testing.assert_array_equal(positions, [[0, 0, 2, 2, 2], [0, 0, 2, 3, 4], [0, 1, 2, 2, 2]])


def test_positions_need_the_pictures_of_the_prompt() -> None:
    with pytest.raises(ModelError, match="5 image tokens"):
        FAMILY.positions([TEXT, *[IMAGE] * 5], IMAGE, [cut_of(2, 2)])


@pytest.mark.parametrize("most", [RELEASED["max_pixels"], 448**2, 300**2, 100_000])
def test_sizes_are_what_the_flag_sets(most: int) -> None:
    settings = settings_of(max_pixels=most, min_pixels=60_000)
    sizes = dict(FAMILY.sizes(settings))
    assert settings in sizes.values()
    pixels = [size.max_pixels for size in sizes.values()]
    assert pixels == sorted(set(pixels))
    processor = processor_of(settings)
    limit(processor, 224)
    assert sizes["longest edge 224"].max_pixels == processor.size.longest_edge
    assert sizes["longest edge 224"].min_pixels == processor.size.shortest_edge


@pytest.mark.parametrize(
    "changed",
    [
        {"max_pixels": 4097**2},
        {"patch_size": 0},
        {"merge_size": 100},
        {"temporal_patch_size": 1000},
        {"min_pixels": 0},
        {"min_pixels": 5000, "max_pixels": 4000},
    ],
    ids=str,
)
def test_a_manifest_cannot_ask_for_the_absurd(changed: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        settings_of(**changed)
