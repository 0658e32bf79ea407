"""One setting for how large the model sees pictures, for families that count edges and for those that count pixels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.errors import InputError
from mpa_edge.processors import limit, load_processor, save_limit
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.transformers_vlm import TransformersVlm


def tiles(processor: Any, image: Any) -> int:
    return int(processor(text=["<image>"], images=[[image]], return_tensors="pt")["pixel_values"].shape[1])


def test_tiles_become_fewer(tiny_idefics3: Path, picture: Callable[..., Any]) -> None:
    image = picture(300, 280)
    assert tiles(load_processor(tiny_idefics3), image) == 10
    assert tiles(load_processor(tiny_idefics3, 128), image) == 5
    assert tiles(load_processor(tiny_idefics3, 64), image) == 1


def test_the_model_is_asked_and_described_with_it(tiny_idefics3: Path, picture: Callable[..., Any]) -> None:
    vlm, small = (TransformersVlm.load(str(tiny_idefics3), device="cpu", longest_edge=edge) for edge in (None, 64))
    assert small.describe() == {**vlm.describe(), "image": {**vlm.describe()["image"], "size": {"longest_edge": 64}}}
    images, decoding = [picture(300, 280), picture(200, 200)], Decoding(max_new_tokens=2)
    many, few = (model.answer(images, ["?", "?"], decoding) for model in (vlm, small))
    assert all(b.error is None and b.prompt_tokens < a.prompt_tokens / 5 for a, b in zip(many, few, strict=True))


def test_pixels_are_limited_where_a_family_counts_them(tiny_qwen2_vl: Path, picture: Callable[..., Any]) -> None:
    def seen(longest_edge: int | None) -> tuple[dict[str, int], int]:
        images = load_processor(tiny_qwen2_vl, longest_edge).image_processor
        grid = images([picture(300, 300)], return_tensors="pt")["image_grid_thw"]
        edges = {"shortest": images.size.shortest_edge, "longest": images.size.longest_edge}
        return edges, int(grid.prod()) // images.merge_size**2

    assert seen(None) == ({"shortest": 1024, "longest": 9216}, 36)
    assert seen(48) == ({"shortest": 1024, "longest": 48 * 48}, 9)
    # Fewer than the least that the processor was set to: that goes down too.
    assert seen(16) == ({"shortest": 256, "longest": 256}, 1)


def test_a_family_with_videos_is_loaded_without_them(tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    """transformers loads them with torchvision only, and then refuses Pillow's pictures."""
    processor = load_processor(tiny_qwen2_vl)
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert processor.chat_template
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Qwen2VLProcessor"


def test_a_processor_of_one_size_has_no_limit() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with pytest.raises(InputError, match="--longest-edge or --teacher-longest-edge 300: CLIPImageProcessorPil"):
        limit(CLIPImageProcessorPil(size={"shortest_edge": 224}), 300)


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_it_is_saved_where_the_folder_keeps_its_settings(tiny_idefics3: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(tiny_idefics3, tmp_path / "model"))
    whole = json.loads((folder / "processor_config.json").read_text())
    settings = whole["image_processor"]
    if file == "preprocessor_config.json":
        (folder / file).write_text(json.dumps(whole.pop("image_processor")))
        (folder / "processor_config.json").write_text(json.dumps(whole))
    save_limit(folder, load_processor(folder, 128).image_processor)
    assert load_processor(folder).image_processor.size.longest_edge == 128
    saved = json.loads((folder / file).read_text())
    assert (saved if file == "preprocessor_config.json" else saved["image_processor"]) == {
        **settings,
        "size": {"longest_edge": 128},
    }


def test_older_names_of_the_same_setting_do_not_win(tmp_path: Path) -> None:
    """Qwen2-VL's own preprocessor_config.json has them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    old = {"min_pixels": 3136, "max_pixels": 12845056, "size": {"min_pixels": 3136, "max_pixels": 12845056}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14, "merge_size": 2, **old}))
    images = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    limit(images, 448)
    assert images.size.longest_edge == 448 * 448
    save_limit(tmp_path, images)
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size.longest_edge == 448 * 448
