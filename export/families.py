"""What differs between model families on the way to a bundle: one small object per family.

A family reads the image and prompt settings from a transformers model folder. Its prompt layout lives in
`mpa_edge.runtime.prompts` under the same name, because the device needs that and not this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image

from mpa_edge.bundle import Idefics3Images, ImageSettings, PromptSettings
from mpa_edge.errors import ExportError, UnknownFamily


class Family(Protocol):
    """One model family that can be exported."""

    name: str

    def image_settings(self, config: Mapping[str, Any], processor: Any) -> ImageSettings:
        """The picture's way to tiles, from the model's `config.json` and its transformers processor."""
        ...

    def prompt_settings(
        self, config: Mapping[str, Any], processor: Any, question_template: str, max_new_tokens: int
    ) -> PromptSettings:
        """The question's way to tokens."""
        ...


class Idefics3:
    """SmolVLM and Idefics3: square tiles plus an overview, a fixed number of image tokens per tile."""

    name = "idefics3"

    def image_settings(self, config: Mapping[str, Any], processor: Any) -> Idefics3Images:
        """See `Family`. Raises `ExportError` where processor and model disagree, or a step is switched off."""
        images = processor.image_processor
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not getattr(images, step):
                raise ExportError(
                    f"the image processor has {step} switched off; the runtime does not know that variant"
                )
        size, tile = _longest_edge(images, "size"), _longest_edge(images, "max_image_size")
        vision = config["vision_config"]
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2 // config["scale_factor"] ** 2
        if (vision["image_size"], tokens) != (tile, processor.image_seq_len):
            raise ExportError(
                f"model and processor disagree: tiles of {vision['image_size']} pixels and {tokens} tokens in "
                f"config.json, {tile} pixels and {processor.image_seq_len} tokens in the processor's files"
            )
        return Idefics3Images(
            tile_size=tile,
            longest_edge=size,
            split=images.do_image_splitting,
            mean=tuple(images.image_mean),
            std=tuple(images.image_std),
            rescale_factor=images.rescale_factor,
            resample=cast("Any", Image.Resampling(images.resample).name.lower()),
            tokens_per_tile=tokens,
        )

    def prompt_settings(
        self, config: Mapping[str, Any], processor: Any, question_template: str, max_new_tokens: int
    ) -> PromptSettings:
        """See `Family`."""
        tokenizer = processor.tokenizer
        return PromptSettings(
            chat_template=_self_contained(processor.chat_template or tokenizer.chat_template, tokenizer),
            question_template=question_template,
            image_token=processor.image_token,
            stop_token_ids=tuple(sorted(_stop_tokens(config, tokenizer))),
            max_new_tokens=max_new_tokens,
            context_length=config["text_config"]["max_position_embeddings"],
        )


FAMILIES: dict[str, Family] = {"idefics3": Idefics3(), "smolvlm": Idefics3()}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by the `model_type` in its `config.json`; raises `UnknownFamily`."""
    model_type = str(config.get("model_type"))
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UnknownFamily(model_type, FAMILIES) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder with its `generation_config.json` under the key `generation_config`."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        generation = folder / "generation_config.json"
        config["generation_config"] = json.loads(generation.read_bytes()) if generation.is_file() else {}
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} is no transformers model folder: config.json cannot be read ({error})") from error
    return config


def _longest_edge(images: Any, name: str) -> int:
    size = getattr(images, name)
    edge = size.get("longest_edge") if isinstance(size, Mapping) else getattr(size, "longest_edge", None)
    if not edge:
        raise ExportError(f"the image processor's {name} is {size}; a longest_edge is needed")
    return int(edge)


def _stop_tokens(config: Mapping[str, Any], tokenizer: Any) -> set[int]:
    """What ends an answer, as in `TransformersVlm`: the generation config's tokens, and the tokenizer's own."""
    stops = {tokenizer.eos_token_id}
    ids = config["generation_config"].get("eos_token_id", config["text_config"].get("eos_token_id"))
    stops.update(ids if isinstance(ids, list) else [ids])
    return {int(token) for token in stops if token is not None}


def _self_contained(template: str, tokenizer: Any) -> str:
    """The chat template with the special tokens that it names set at its top: the manifest carries no others."""
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in template}
    settings = ["{%- set " + f"{name} = {json.dumps(str(token))}" + " -%}" for name, token in named.items()]
    return "".join(settings) + template
