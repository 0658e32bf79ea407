"""What differs between model families on the way to a bundle: one small object per family.

A family reads the image settings from a transformers model folder. How pictures are cut and what stands for them in a
prompt lives in `mpa_edge.runtime.families` under the same name, because the device needs that and not this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpa_edge.bundle import Images, PromptSettings
from mpa_edge.errors import ExportError, InputError, MpaEdgeError, UnknownFamily
from mpa_edge.export.image_settings import full_config, idefics3_images, internvl_images, llava_images, qwen_vl_images
from mpa_edge.processors import load_processor

# A longer context is cut to this: its cache would take gigabytes on the device, for prompts that nobody has.
MOST_CONTEXT = 32_768


@dataclass(frozen=True)
class Family:
    """One model family that can be exported: `model_types` are what it is called in a `config.json`.

    `image_settings(config, processor)` gives the picture's way to pixel values, from the model's `config.json` and its
    transformers processor; it raises `ExportError` for a variant that the runtime does not know.
    """

    name: str
    model_types: tuple[str, ...]
    image_settings: Callable[[Mapping[str, Any], Any], Images]


FAMILIES = (
    Family("idefics3", ("idefics3", "smolvlm"), idefics3_images),
    Family("qwen2_vl", ("qwen2_vl",), qwen_vl_images),
    Family("qwen2_5_vl", ("qwen2_5_vl",), qwen_vl_images),
    Family("llava", ("llava",), llava_images),
    Family("internvl", ("internvl",), internvl_images),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by the `model_type` in its `config.json`; raises `UnknownFamily`."""
    model_type = str(config.get("model_type"))
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise UnknownFamily(model_type, [known for family in FAMILIES for known in family.model_types])


def read_settings(folder: Path, question_template: str, max_new_tokens: int) -> tuple[Family, Images, PromptSettings]:
    """The family of a model folder, and what its files say about pictures and prompts. Raises `UnknownFamily`, and
    `ExportError` where the files cannot be read, or say what nobody expects."""
    config, processor = read_config(folder), read_processor(folder)
    family = family_of(config)
    try:
        images = family.image_settings(config, processor)
        return family, images, prompt_settings(config, processor, question_template, max_new_tokens)
    except MpaEdgeError:
        raise
    except Exception as error:  # values of whatever type, in transformers' hands and in ours
        raise ExportError(f"{folder}: its settings are no model's ({error!r})") from error


def prompt_settings(
    config: Mapping[str, Any], processor: Any, question_template: str, max_new_tokens: int
) -> PromptSettings:
    """The question's way to tokens, from a model's `config.json` and its transformers processor; `ExportError` for
    values that no bundle may hold."""
    tokenizer, text = processor.tokenizer, full_config(config)["text_config"]
    try:
        return PromptSettings(
            chat_template=_self_contained(processor.chat_template or tokenizer.chat_template, tokenizer),
            question_template=question_template,
            image_token=processor.image_token,
            begin_token_ids=_begin_tokens(processor),
            stop_token_ids=tuple(sorted(_stop_tokens(config, text, tokenizer))),
            max_new_tokens=max_new_tokens,
            context_length=min(text["max_position_embeddings"], MOST_CONTEXT),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(
            f"prompt settings that a bundle cannot hold: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder with its `generation_config.json` under the key `generation_config`."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        generation = folder / "generation_config.json"
        config["generation_config"] = json.loads(generation.read_bytes()) if generation.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{folder} is no transformers model folder: config.json cannot be read ({error})") from error
    return config


def read_processor(folder: Path, longest_edge: int | None = None) -> Any:
    """The processor of a model folder (see `load_processor`); `ExportError` where it cannot be loaded."""
    try:
        return load_processor(folder, longest_edge)
    except InputError:
        raise
    except Exception as error:  # transformers and tokenizers raise whatever they trip over
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ExportError(f"{folder}: its processor cannot be loaded ({reason})") from error


def _begin_tokens(processor: Any) -> tuple[int, ...]:
    """What the processor puts before a prompt; nothing where the template begins with it, as transformers has it."""
    tokenizer = processor.tokenizer
    whole, bare = (tokenizer("?", add_special_tokens=special)["input_ids"] for special in (True, False))
    if whole == bare:
        return ()
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return () if begins else tuple(whole[: len(whole) - len(bare)])


def _stop_tokens(config: Mapping[str, Any], text: Mapping[str, Any], tokenizer: Any) -> set[int]:
    """What ends an answer, as in `TransformersVlm`: the generation config's tokens, and the tokenizer's own."""
    ids = config["generation_config"].get("eos_token_id", text.get("eos_token_id"))
    stops = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}
    return {int(token) for token in stops if token is not None}


def _self_contained(template: str, tokenizer: Any) -> str:
    """The chat template with the special tokens that it names set at its top: the manifest carries no others."""
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in template}
    settings = ["{%- set " + f"{name} = {json.dumps(str(token))}" + " -%}" for name, token in named.items()]
    return "".join(settings) + template
