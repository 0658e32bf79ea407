"""What of a model is trained: its parts by name, derived from the loaded model, and its weights, counted by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from mpa_edge.config import Part
from mpa_edge.errors import ModelError

# Where the projection to the language model is a part of the vision tower (Qwen2-VL and after), it is called so.
MERGER = "merger"


class Anatomy:
    """Tells language model, connector and vision tower of a model apart by the names of weights and modules.

    The language model is `get_decoder` with the output layer, the vision tower is the image encoder without its
    mergers, and the connector is all the rest, which is what lies between the two.

    Raises `ModelError` where a model does not tell its language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kind = type(model).__name__
        decoder = self._prefix(model.get_decoder())
        if decoder is None:
            raise ModelError(f"{self._kind}: cannot tell its language model from the rest")
        head = self._prefix(model.get_output_embeddings())
        self._head = () if head is None else (head,)
        self._language = (decoder, *self._head)
        self._vision = self._prefix(model.get_encoder(modality="image")) if hasattr(model, "get_encoder") else None

    def part_of(self, name: str) -> Part:
        """The part that a weight or module belongs to, by its name in the model."""
        if _lies_in(name, self._language):
            return "language"
        if self._vision and _lies_in(name, (self._vision,)) and MERGER not in name.removeprefix(self._vision):
            return "vision"
        return "connector"

    def linears(self, parts: Collection[Part]) -> list[str]:
        """The names of the linear layers of some parts, which is where LoRA goes. The output layer is none of them."""
        names = (name for name, module in self._model.named_modules() if isinstance(module, nn.Linear))
        return self._chosen([name for name in names if not _lies_in(name, self._head)], parts, "linear layers")

    def weights(self, parts: Collection[Part]) -> list[str]:
        """The names of all weights of some parts; the output layer belongs to the language model."""
        return self._chosen([name for name, _ in self._model.named_parameters()], parts, "weights")

    def _chosen(self, names: list[str], parts: Collection[Part], what: str) -> list[str]:
        if self._vision is None and set(parts) != {"language"}:
            raise ModelError(f"{self._kind}: cannot tell its vision tower; only --train language is possible")
        for part in parts:
            if not any(self.part_of(name) == part for name in names):
                raise ModelError(f"{self._kind}: its {part} part has no {what}; leave out --train {part}")
        return [name for name in names if self.part_of(name) in parts]

    def _prefix(self, module: Any) -> str | None:
        """The module's name; None where there is none, or where it is the model, or the model without its head."""
        if module is None or module in (self._model, self._model.base_model):
            return None
        return next(str(name) for name, found in self._model.named_modules() if found is module)


def count_parameters(model: Any) -> dict[str, dict[str, int]]:
    """Weights by module, trainable and frozen: `{"trainable": {"text_model.q_proj": 6144, …}, "frozen": {…}}`."""
    trainable: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("base_model", "model")]
        if parameter.requires_grad:
            # …text_model.layers.0.self_attn.q_proj.lora_A.default.weight, …visual.merger.mlp.0.weight
            end = next((place for place, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
            layer = next((part for part in reversed(parts[1:end]) if not part.isdigit()), "")
            trainable[f"{parts[0]}.{layer}".rstrip(".")] += parameter.numel()
        else:
            frozen[parts[0]] += _size(parameter)
    return {"trainable": dict(sorted(trainable.items())), "frozen": dict(sorted(frozen.items()))}


def in_words(counted: dict[str, dict[str, int]]) -> str:
    """What `count_parameters` found in a line: `86,016 of 2,021,632 weights (text_model: down_proj, gate_proj, …)`."""
    trainable, frozen = counted["trainable"], counted["frozen"]
    modules: dict[str, list[str]] = {}
    for name in trainable:
        top, _, leaf = name.partition(".")
        modules.setdefault(top, []).append(leaf or "itself")
    listed = "; ".join(f"{top}: {', '.join(leaves)}" for top, leaves in modules.items())
    total = sum(trainable.values()) + sum(frozen.values())
    return f"{sum(trainable.values()):,} of {total:,} weights ({listed})"


def _lies_in(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _size(parameter: nn.Parameter) -> int:
    """The number of weights; a 4-bit one packs two into each byte."""
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)
