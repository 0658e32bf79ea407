"""Where LoRA goes, derived from the loaded model; what is trainable, counted; and the adapter on disk."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch import nn

from mpa_edge.errors import ModelError
from mpa_edge.records import write_atomic


def add_lora(model: Any, *, rank: int, alpha: int, base: str) -> Any:
    """Put LoRA on all linear layers of the language model and freeze everything else. Returns peft's model, whose
    layers the given model shares. `base` is what the adapter will name as its base model.

    The vision tower and the projection stay as they are: image features can then be computed once, and a merged
    model's vision file is the base model's.
    """
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=language_linears(model))
    adapted = get_peft_model(model, settings)
    # peft fills in where the model was loaded from, which may be a path of this machine only.
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def language_linears(model: Any) -> str:
    """A regular expression that matches the names of the language model's linear layers and no others."""
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder and name), None)
    if prefix is None:
        raise ModelError(f"{type(model).__name__}: cannot tell its language model from the rest")
    linear = (name for name, module in decoder.named_modules() if isinstance(module, nn.Linear))
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    if not leaves:
        raise ModelError(f"{type(model).__name__}: its language model has no linear layers that LoRA could adapt")
    return rf"{re.escape(prefix)}\..*\.({'|'.join(leaves)})"


def width_of(model: Any) -> int:
    """The hidden size of the language model."""
    return int(model.config.get_text_config().hidden_size)


def count_parameters(model: Any) -> dict[str, dict[str, int]]:
    """Weights by module, trainable and frozen: `{"trainable": {"text_model.q_proj": 6144, …}, "frozen": {…}}`."""
    trainable: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("base_model", "model")]
        if parameter.requires_grad:
            # …text_model.layers.0.self_attn.q_proj.lora_A.default.weight
            layer = next((parts[place - 1] for place, part in enumerate(parts) if part.startswith("lora_")), parts[-2])
            trainable[f"{parts[0]}.{layer}"] += parameter.numel()
        else:
            frozen[parts[0]] += parameter.numel()
    return {"trainable": dict(sorted(trainable.items())), "frozen": dict(sorted(frozen.items()))}


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as peft reads them."""
    # The vocabulary is never changed here; peft would look for the base model to find out.
    found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    settings = adapted.peft_config["default"]
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def name_of_base(spec: str, folder: Path) -> str:
    """How an adapter in `folder` names its base: a local one by its relative path, so that no machine's paths are kept
    and both can be moved together; else its hub id."""
    local = Path(spec).expanduser()
    return Path(os.path.relpath(local.resolve(), folder.resolve())).as_posix() if local.is_dir() else spec
