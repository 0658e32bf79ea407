"""Image settings of the families whose processors come in many variants: those that the runtime knows, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.errors import ExportError
from mpa_edge.export.families import read_config
from mpa_edge.export.image_settings import internvl_images, llava_images, qwen_vl_images
from mpa_edge.processors import limit, load_processor

Read = Callable[[Mapping[str, Any], Any], Any]
READERS: dict[str, Read] = {
    "tiny_qwen2_vl": qwen_vl_images,
    "tiny_qwen2_5_vl": qwen_vl_images,
    "tiny_llava": llava_images,
    "tiny_llava_siglip": llava_images,
    "tiny_internvl": internvl_images,
}


@pytest.fixture
def parts(request: pytest.FixtureRequest) -> Callable[[str], tuple[Read, dict[str, Any], Any]]:
    """`parts(folder)`: what reads the settings, and a fresh config and processor for it."""

    def load(name: str) -> tuple[Read, dict[str, Any], Any]:
        folder: Path = request.getfixturevalue(name)
        return READERS[name], read_config(folder), load_processor(folder)

    return load


def test_settings_are_the_folders(parts: Any) -> None:
    settings = {name: read(config, processor) for name in READERS for read, config, processor in [parts(name)]}
    qwen = settings["tiny_qwen2_5_vl"]
    assert (qwen.patch_size, qwen.merge_size, qwen.temporal_patch_size) == (14, 2, 2)
    assert (qwen.min_pixels, qwen.max_pixels, qwen.resample) == (4 * 28**2, 48 * 28**2, "bicubic")
    clip, siglip = settings["tiny_llava"], settings["tiny_llava_siglip"]
    assert (clip.tile_size, clip.shortest_edge, clip.tokens_per_tile) == (56, 56, 16)
    assert (siglip.tile_size, siglip.shortest_edge, siglip.tokens_per_tile) == (56, None, 16)
    assert (clip.mean[0], siglip.mean[0], siglip.rescale_factor) == (0.48145466, 0.5, 1 / 255)
    internvl = settings["tiny_internvl"]
    assert (internvl.tile_size, internvl.min_patches, internvl.max_patches) == (64, 1, 6)
    assert (internvl.tokens_per_tile, internvl.std) == (16, (0.229, 0.224, 0.225))


def test_what_a_config_leaves_out_is_the_default(parts: Any) -> None:
    read, config, processor = parts("tiny_qwen2_vl")
    for name in ("spatial_merge_size", "temporal_patch_size"):
        config["vision_config"].pop(name, None)
    assert read(config, processor).merge_size == 2
    read, config, processor = parts("tiny_llava")
    config.pop("vision_feature_select_strategy")
    assert read(config, processor).tokens_per_tile == 16


def test_the_trained_picture_size_is_kept(parts: Any) -> None:
    read, config, processor = parts("tiny_qwen2_vl")
    limit(processor.image_processor, 20)
    settings = read(config, processor)
    assert (settings.min_pixels, settings.max_pixels) == (400, 400)


@pytest.mark.parametrize("folder", ["tiny_qwen2_vl", "tiny_llava", "tiny_internvl"])
@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"])
def test_a_step_that_is_switched_off_is_refused(parts: Any, folder: str, step: str) -> None:
    read, config, processor = parts(folder)
    setattr(processor.image_processor, step, False)
    with pytest.raises(ExportError, match=f"{step} switched off"):
        read(config, processor)


def test_another_kind_of_processor_is_refused(parts: Any) -> None:
    other = parts("tiny_qwen2_vl")[2].image_processor
    for folder in ("tiny_llava", "tiny_internvl"):
        read, config, processor = parts(folder)
        processor.image_processor = other
        with pytest.raises(ExportError, match="is a Qwen2VLImageProcessor; the runtime knows"):
            read(config, processor)


@pytest.mark.parametrize(
    ("folder", "changed", "reason"),
    [
        ("tiny_qwen2_vl", {"patch_size": 16}, "disagree on patch_size: 8 in config.json, 16"),
        ("tiny_qwen2_vl", {"merge_size": 4}, "disagree on merge_size"),
        ("tiny_qwen2_vl", {"size": {"longest_edge": 784}}, "shortest_edge is needed"),
        ("tiny_qwen2_vl", {"size": {"shortest_edge": 1, "longest_edge": 10**9}}, "cannot hold: max_pixels"),
        ("tiny_llava", {"do_pad": True}, "do_pad"),
        ("tiny_llava", {"do_center_crop": False}, "pictures of many sizes"),
        ("tiny_llava", {"crop_size": {"height": 28, "width": 28}}, "disagree on tile: 56 in config.json, 28"),
        ("tiny_llava", {"crop_size": {"height": 56, "width": 28}}, "square ones only"),
        ("tiny_llava", {"size": {"height": 70, "width": 70}}, "cuts 56 pixels out of 70"),
        ("tiny_llava", {"size": {"shortest_edge": 56, "longest_edge": 90}}, "pictures of many sizes"),
        ("tiny_llava_siglip", {"size": {"height": 28, "width": 28}}, "disagree on tile"),
        ("tiny_internvl", {"size": {"height": 64, "width": 32}}, "square ones only"),
        ("tiny_internvl", {"size": {"height": 32, "width": 32}}, "disagree on tile"),
        ("tiny_internvl", {"max_patches": 65}, "cannot hold: max_patches"),
        ("tiny_internvl", {"min_patches": 7}, "min_patches 7 exceeds"),
    ],
    ids=str,
)
def test_settings_that_the_runtime_does_not_know(parts: Any, folder: str, changed: dict[str, Any], reason: str) -> None:
    from transformers.image_utils import SizeDict

    read, config, processor = parts(folder)
    for name, value in changed.items():
        setattr(processor.image_processor, name, SizeDict(**value) if isinstance(value, dict) else value)
    with pytest.raises(ExportError, match=reason):
        read(config, processor)


@pytest.mark.parametrize(
    ("folder", "changed", "reason"),
    [
        ("tiny_llava", {"patch_size": None}, "disagree on patch_size: 14 in config.json, None"),
        ("tiny_llava", {"num_additional_image_tokens": 0}, "disagree on tokens: 16 in config.json, 15"),
        ("tiny_llava_siglip", {"vision_feature_select_strategy": "default"}, "disagree on tokens"),
        ("tiny_internvl", {"image_seq_length": 256}, "disagree on tokens: 16 in config.json, 256"),
        ("tiny_internvl", {"start_image_token": "<image>"}, "disagree on markers"),
    ],
    ids=str,
)
def test_prompts_that_do_not_fit_the_model(parts: Any, folder: str, changed: dict[str, Any], reason: str) -> None:
    read, config, processor = parts(folder)
    for name, value in changed.items():
        setattr(processor, name, value)
    with pytest.raises(ExportError, match=reason):
        read(config, processor)


def test_a_llava_with_another_tower_is_refused(parts: Any) -> None:
    read, config, processor = parts("tiny_llava")
    config["vision_config"] = {"model_type": "pixtral"}
    with pytest.raises(ExportError, match="pixtral tower has no export; known: clip_vision_model, siglip_vision_model"):
        read(config, processor)


def test_an_exact_size_that_is_cropped_to_itself_is_known(parts: Any) -> None:
    from transformers.image_utils import SizeDict

    read, config, processor = parts("tiny_llava")
    processor.image_processor.size = SizeDict(height=56, width=56)
    assert read(config, processor).shortest_edge is None


def test_one_tile_where_internvls_processor_does_not_cut(parts: Any) -> None:
    read, config, processor = parts("tiny_internvl")
    processor.images_kwargs = {"crop_to_patches": False}
    settings = read(config, processor)
    assert (settings.min_patches, settings.max_patches) == (1, 1)
