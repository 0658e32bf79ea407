"""LoRA and its kin (DoRA, QLoRA) on the chosen parts of the student, and the adapter on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import nn

from mpa_edge.config import AlignConfig
from mpa_edge.records import write_atomic
from mpa_edge.sharding import whole
from mpa_edge.trainable import Anatomy


class Adapter:
    """An adapter on a model whose own weights are frozen. `weights` are the adapter's, in float32 whatever the type of
    the model: peft casts them so, since steps of training get lost in 16 bit.

    The model, whose layers are changed in place, answers with the adapter from now on.
    """

    def __init__(self, model: Any, config: AlignConfig, folder: Path, start: Path | None) -> None:
        """A new adapter, which changes no answer yet, or that of the folder `start`; one that is on the model already
        is taken off first. `folder` is where it will be saved."""
        remove_adapter(model)
        with no_future_warnings():
            if start is None:
                self._peft: Any = get_peft_model(model, _settings(model, config))
            else:
                self._peft = PeftModel.from_pretrained(model, str(start), is_trainable=True)
        # peft fills in where the model was loaded from, which may be a path of this machine only.
        self._peft.peft_config["default"].base_model_name_or_path = name_of_base(config.student, folder)
        self.weights: dict[str, nn.Parameter] = {
            name: weight for name, weight in self._peft.named_parameters() if weight.requires_grad
        }

    def close(self) -> None:
        """See `Trainee`."""

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` as peft reads them."""
        # The vocabulary is never changed here; peft would look for the base model to find out.
        found = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in found.items()}
        if not write:
            return
        write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        settings = self._peft.peft_config["default"]
        settings.inference_mode = True
        # peft makes a set of it, whose order on disk would be another one in each process.
        settings.target_modules = sorted(settings.target_modules)
        settings.save_pretrained(str(folder))


@contextmanager
def no_future_warnings() -> Iterator[None]:
    """peft uses names that transformers has deprecated; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def remove_adapter(model: Any) -> None:
    """Take a peft adapter off a model: its own layers, with their own weights, stand in their places again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def name_of_base(spec: str, folder: Path) -> str:
    """How a trained student in `folder` names its base: a local one by its relative path, so that no machine's paths
    are kept and both can be moved together; else its hub id."""
    local = Path(spec).expanduser()
    return Path(os.path.relpath(local.resolve(), folder.resolve())).as_posix() if local.is_dir() else spec


def _settings(model: Any, config: AlignConfig) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        use_dora=config.method == "dora",
        target_modules=Anatomy(model).linears(config.train),
    )
