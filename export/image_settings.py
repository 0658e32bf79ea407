"""A transformers processor's image settings as the manifest's, and a refusal of those that the runtime does not know.

Each function takes a model's `config.json` and its processor, and raises `ExportError` with the reason where a step is
switched off, the processor is of another kind, or it and the model disagree on sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from PIL import Image
from pydantic import ValidationError

from mpa_edge.bundle import Idefics3Images, ImageSettings, InternVlImages, LlavaImages, QwenVlImages
from mpa_edge.errors import ExportError
from mpa_edge.runtime.internvl import END, START

STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
# Towers with a fixed picture size, by model_type: how many tokens each has beside its patches' (a class token).
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}

Settings = TypeVar("Settings", bound=ImageSettings)


def idefics3_images(config: Mapping[str, Any], processor: Any) -> Idefics3Images:
    """SmolVLM and Idefics3: square tiles and an overview."""
    images, known = _images(processor, "Idefics3ImageProcessor", "SmolVLMImageProcessor"), full_config(config)
    tile, vision = _edge(images, "max_image_size", "longest_edge"), known["vision_config"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 // known["scale_factor"] ** 2
    _agree({"tile": vision["image_size"], "tokens": tokens}, {"tile": tile, "tokens": processor.image_seq_len})
    return _settings(
        Idefics3Images,
        images,
        tile_size=tile,
        longest_edge=_edge(images, "size", "longest_edge"),
        split=images.do_image_splitting,
        tokens_per_tile=tokens,
    )


def qwen_vl_images(config: Mapping[str, Any], processor: Any) -> QwenVlImages:
    """Qwen2-VL and Qwen2.5-VL: dynamic size between two numbers of pixels."""
    images, vision = _images(processor, "Qwen2VLImageProcessor"), full_config(config)["vision_config"]
    names = ("patch_size", "temporal_patch_size", "merge_size")
    sizes = {name: getattr(images, name) for name in names}
    model = {name: vision["spatial_merge_size" if name == "merge_size" else name] for name in names}
    _agree(model, sizes)
    least, most = _edge(images, "size", "shortest_edge"), _edge(images, "size", "longest_edge")
    return _settings(QwenVlImages, images, **sizes, min_pixels=least, max_pixels=most)


def llava_images(config: Mapping[str, Any], processor: Any) -> LlavaImages:
    """LLaVA with a CLIP or SigLIP tower: one square tile, cut out of the centre or squeezed."""
    known = full_config(config)
    vision, default = known["vision_config"], known["vision_feature_select_strategy"] == "default"
    if vision["model_type"] not in TOWERS:
        raise ExportError(f"LLaVA with a {vision['model_type']} tower has no export; known: {', '.join(TOWERS)}")
    images = _images(processor, "CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
    if getattr(images, "do_pad", False):
        raise ExportError("the image processor has do_pad switched on; the runtime does not know that variant")
    tile, shortest = _llava_sizes(images)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens = patches + TOWERS[vision["model_type"]] - default
    _agree(
        {"tile": vision["image_size"], "patch_size": vision["patch_size"], "tokens": tokens},
        {"tile": tile, "patch_size": processor.patch_size, "tokens": _llava_tokens(processor, tile)},
    )
    return _settings(LlavaImages, images, tile_size=tile, shortest_edge=shortest, tokens_per_tile=tokens)


def internvl_images(config: Mapping[str, Any], processor: Any) -> InternVlImages:
    """InternVL: square tiles and an overview."""
    known, images = full_config(config), _images(processor, "GotOcr2ImageProcessor")
    vision, tile = known["vision_config"], _square(images, "size")
    tokens = int((vision["image_size"][0] // vision["patch_size"][0] * known["downsample_ratio"]) ** 2)
    _agree(
        {"tile": tuple(vision["image_size"]), "tokens": tokens, "markers": (START, END)},
        {
            "tile": (tile, tile),
            "tokens": processor.image_seq_length,
            "markers": (processor.start_image_token, processor.end_image_token),
        },
    )
    # What the processor class passes to the image processor wins over the latter's own file, where it is off.
    # Before transformers 5.23 it stands in another class.
    older = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get("images_kwargs", {})
    crops = getattr(processor, "images_kwargs", older).get("crop_to_patches", images.crop_to_patches)
    least, most = (images.min_patches, images.max_patches) if crops else (1, 1)
    return _settings(
        InternVlImages, images, tile_size=tile, min_patches=least, max_patches=most, tokens_per_tile=tokens
    )


def _images(processor: Any, *kinds: str) -> Any:
    """The image processor, which must be one of these classes with all its steps switched on."""
    images = processor.image_processor
    kind = type(images).__name__.removesuffix("Pil").removesuffix("Fast")
    if kind not in kinds:
        raise ExportError(f"the image processor is a {kind}; the runtime knows {' and '.join(kinds)} for this family")
    for step in STEPS:
        if not getattr(images, step):
            raise ExportError(f"the image processor has {step} switched off; the runtime does not know that variant")
    return images


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` with the defaults that it leaves out."""
    from transformers import AutoConfig

    given = {name: value for name, value in config.items() if name != "generation_config"}
    return dict(AutoConfig.for_model(**given).to_dict())


def _agree(model: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    for name, value in model.items():
        if processor[name] != value:
            raise ExportError(
                f"model and processor disagree on {name}: {value} in config.json, {processor[name]} in the "
                "processor's files"
            )


def _settings(kind: type[Settings], images: Any, **values: Any) -> Settings:
    """The settings with what all families have; `ExportError` for values that no bundle may hold."""
    shared = {
        "mean": tuple(images.image_mean),
        "std": tuple(images.image_std),
        "rescale_factor": images.rescale_factor,
        "resample": Image.Resampling(images.resample).name.lower(),
    }
    try:
        return kind.model_validate({**shared, **values})
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(
            f"image settings that a bundle cannot hold: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def _edge(images: Any, name: str, edge: str) -> int:
    size = getattr(images, name)
    if not (size and size.get(edge)):
        raise ExportError(f"the image processor's {name} is {dict(size or {})}; {edge} is needed")
    return int(size.get(edge))


def _square(images: Any, name: str) -> int:
    height, width = _edge(images, name, "height"), _edge(images, name, "width")
    if height != width:
        raise ExportError(f"the image processor's {name} is {height}x{width}; the runtime knows square ones only")
    return height


def _llava_sizes(images: Any) -> tuple[int, int | None]:
    """The tile's edge, and the shortest edge that a picture is scaled to before that is cut out; None: squeezed."""
    crop = _square(images, "crop_size") if getattr(images, "do_center_crop", False) else None
    if images.size.get("height"):
        tile = _square(images, "size")
        if crop not in (None, tile):
            raise ExportError(f"the image processor cuts {crop} pixels out of {tile}; the runtime does not know that")
        return tile, None
    shortest = _edge(images, "size", "shortest_edge")
    if crop is None or images.size.get("longest_edge"):
        raise ExportError("the image processor makes pictures of many sizes; LLaVA's tower has one: set crop_size")
    return crop, shortest


def _llava_tokens(processor: Any, tile: int) -> int | None:
    """How many image tokens the processor puts into a prompt; None where it cannot tell."""
    if not processor.patch_size:
        return None
    default = processor.vision_feature_select_strategy == "default"
    return int((tile // processor.patch_size) ** 2 + processor.num_additional_image_tokens - default)
