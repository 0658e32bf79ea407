"""The processor's files beside the graphs, as transformers.js reads them and transformers still does.

transformers.js (4.3) knows the processors of Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL and LLaVA by the names that
transformers has for them. InternVL it does not know at all: neither processor nor model; its graphs run under plain
ONNX Runtime and in this runtime.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mpa_edge.bundle import File, describe_file
from mpa_edge.errors import ExportError
from mpa_edge.export.model_files import read_json, write_json

TOKENIZER = "tokenizer.json"
# Taken over, without paths of the machine; those that transformers no longer writes are optional.
OTHERS = (
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def write_processor(merged: Path, folder: Path) -> list[File]:
    """Copy and complete the files of a model folder's processor, and describe them for the manifest."""
    if not (merged / TOKENIZER).is_file():
        raise ExportError(f"{merged} has no {TOKENIZER}")
    names = [TOKENIZER, *(name for name in OTHERS if (merged / name).is_file())]
    for name in names:
        if name != TOKENIZER and name.endswith(".json"):
            write_json(folder / name, read_json(merged / name))
        else:
            shutil.copyfile(merged / name, folder / name)
    write_json(folder / PREPROCESSOR, _preprocessor(merged))
    names.append(PREPROCESSOR)
    _add_chat_template(folder)
    _count_image_tokens(folder / PROCESSOR)
    return [describe_file(folder, name, "tokenizer" if name == TOKENIZER else "config") for name in names]


def _preprocessor(merged: Path) -> dict[str, Any]:
    """The image processor's settings in a file of their own, where transformers.js and transformers 4 look for them."""
    if (merged / PREPROCESSOR).is_file():
        settings = read_json(merged / PREPROCESSOR)
    else:
        processor = read_json(merged / PROCESSOR)
        settings = {**processor["image_processor"], "processor_class": processor.get("processor_class")}
    # transformers 5 appends its backend to the class name, which only it knows.
    kind = str(settings.get("image_processor_type", "")).removesuffix("Pil").removesuffix("Fast")
    # LLaVA's own differs from CLIP's in padding, which the export refuses.
    settings["image_processor_type"] = {"LlavaImageProcessor": "CLIPImageProcessor"}.get(kind, kind)
    if "merge_size" in settings:  # Qwen-VL's older names for the same, the only ones that transformers.js 3 reads
        settings.setdefault("min_pixels", settings["size"]["shortest_edge"])
        settings.setdefault("max_pixels", settings["size"]["longest_edge"])
    return settings


def _add_chat_template(folder: Path) -> None:
    """transformers.js reads the template from `tokenizer_config.json`, where transformers 5 no longer writes it."""
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file() and config.is_file():
        settings = json.loads(config.read_bytes())
        write_json(config, {**settings, "chat_template": template.read_text(encoding="utf-8")})


def _count_image_tokens(path: Path) -> None:
    """LLaVA's processor counts a CLIP tower's class token and takes it off again; transformers.js forgets to.

    Counted neither by the one nor by the other, the sum is the same in both.
    """
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    if settings.get("vision_feature_select_strategy") == "default" and settings.get("num_additional_image_tokens") == 1:
        write_json(path, {**settings, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0})
