"""What training changed in a model: the sums of an adapter, or the tensors of a whole model that was fine-tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from mpa_edge.errors import ExportError
from mpa_edge.export.merge_weights import load_model
from mpa_edge.lora import no_future_warnings
from mpa_edge.models import WHOLE

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Trained(Protocol):
    """A student as it was trained. `names` are those that the changed tensors have in the base."""

    model: Any
    names: set[str]

    def tensor(self, name: str) -> torch.Tensor:
        """A changed tensor, before it is rounded to the base's type."""
        ...


class WholeModel:
    """A model folder with `trained.json`, which lists the tensors that were trained."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.names = set(json.loads((folder / WHOLE).read_bytes())["tensors"])

    def tensor(self, name: str) -> torch.Tensor:
        """See `Trained`."""
        found: torch.Tensor = self.model.get_parameter(name).data
        return found


class AdaptedModel:
    """A peft adapter on its base, which is changed in place. Raises `ExportError` where the two do not fit.

    The sums are peft's own, for whatever it knows (rank and alpha patterns, rsLoRA, DoRA), and computed in float32, one
    layer at a time.
    """

    def __init__(self, base: Any, folder: Path) -> None:
        try:
            with no_future_warnings():
                self.model = PeftModel.from_pretrained(base, str(folder)).eval()
        except Exception as error:  # peft raises whatever it trips over
            raise ExportError(f"{folder} does not fit its base: {error}") from error
        self.names = targeted_tensors(folder)
        self._folder = folder
        wrapped: Any = self.model.base_model
        modules = wrapped.model.named_modules()
        self._layers = {name: module for name, module in modules if isinstance(module, LoraLayer)}

    def tensor(self, name: str) -> torch.Tensor:
        """See `Trained`. Raises `ExportError` where the sum is not finite."""
        module, _, own = name.rpartition(".")
        return self._sum(module, own) if module in self._layers else self._whole(name)

    def _sum(self, module: str, own: str) -> torch.Tensor:
        layer = self._layers[module]
        weights = dict(layer.get_base_layer().named_parameters())
        stored = {name: weight.data for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.data = weight.data.float()
            layer.merge(safe_merge=True)
            return weights[own].data
        except ValueError as error:
            raise ExportError(f"{self._folder} cannot be merged into {module}: {error}") from error
        finally:
            for name, weight in weights.items():
                weight.data = stored[name]
            layer.merged_adapters.clear()

    def _whole(self, name: str) -> torch.Tensor:
        """What the adapter does not add to but replaces: modules_to_save, trained biases."""
        with safe_open(self._folder / ADAPTER_WEIGHTS, "pt") as tensors:
            key = next(key for key in tensors.keys() if _whole_name(key) == name)  # noqa: SIM118
            found: torch.Tensor = tensors.get_tensor(key)
        return found


def targeted_tensors(adapter: Path) -> set[str]:
    """The tensors that an adapter changes, by the names that they have in the model."""
    targeted = set()
    with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            module, is_lora, end = _whole_name(key).partition(".lora_")
            own = "bias" if end == "B.bias" else "weight"
            targeted.add(f"{module}.{own}" if is_lora else module)
    return targeted


def _whole_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
