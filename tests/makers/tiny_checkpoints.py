"""Changes to the weights of a small model folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# How older releases of transformers, and with them the checkpoints on the hub, call what is now called otherwise.
OF_THE_HUB = {
    "qwen2_vl": {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."},
    "llava": {
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.language_model\.": "language_model.model.",
        r"^model\.vision_tower\.": "vision_tower.vision_model.",
        r"^model\.multi_modal_projector\.": "multi_modal_projector.",
    },
    "internvl": {
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.language_model\.": "language_model.model.",
        r"^model\.(vision_tower|multi_modal_projector)\.": r"\1.",
    },
}
OF_THE_HUB["qwen2_5_vl"] = OF_THE_HUB["qwen2_vl"]


def hub_name(model_type: str, name: str) -> str:
    """What checkpoints on the hub call a tensor of the loaded model."""
    for pattern, there in OF_THE_HUB.get(model_type, {}).items():
        if re.search(pattern, name):
            return re.sub(pattern, there, name)
    return name


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a folder's tensors anew, in one file, as `edit` returns them."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(edit(tensors), path, metadata={"format": "pt"})


def change_tensor(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Change one tensor of a folder."""
    edit_tensors(folder, lambda tensors: {**tensors, name: edit(tensors[name])})
