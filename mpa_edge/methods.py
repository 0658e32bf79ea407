"""The ways to train a student: LoRA, DoRA, QLoRA, or its weights as they are."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mpa_edge.config import AlignConfig, Method
from mpa_edge.errors import InputError, MissingExtra
from mpa_edge.full import WholeModel
from mpa_edge.lora import Adapter
from mpa_edge.ranks import is_sharded, is_zero, launched
from mpa_edge.transformers_vlm import TransformersVlm

# Models of fewer weights are trained without gradient checkpointing: there is memory enough, and it costs a third.
LARGE = 1_000_000_000


class Trainee(Protocol):
    """A model that has been made ready for training."""

    weights: dict[str, nn.Parameter]

    def close(self) -> None:
        """Training is over: the model is as it would be if it had been loaded so."""
        ...

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write what was trained so that `open_vlm` opens the folder. Of weights that are spread over several processes
        all call this, and one of them with `write`."""
        ...


def refuse_untrainable(config: AlignConfig) -> None:
    """Raise `InputError` for settings that this machine cannot train with, before anything is loaded."""
    if config.method == "qlora":
        if config.device in ("cpu", "mps") or not torch.cuda.is_available():
            raise InputError("--method qlora: needs a CUDA GPU; --method lora runs anywhere")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtra("bitsandbytes", "cuda")
        if launched() > 1 and (is_sharded() or is_zero()):
            raise InputError("--method qlora: 4-bit models are trained in several processes by --accelerate ddp only")
    if config.dtype == "float16":
        raise InputError("--dtype float16: gradients do not fit into it; bfloat16 and float32 can be trained in")


def make_trainable(student: TransformersVlm, config: AlignConfig, folder: Path, start: Path | None) -> Trainee:
    """Put the method on the student, in place. `start` is what an earlier training wrote, to go on from."""
    if config.method == "full":
        return WholeModel(student.model, student.processor, config, folder, start)
    return Adapter(student.model, config, folder, start)


def default_rate(model: Any, method: Method) -> float:
    """The learning rate where none is given: 2e-4, usual for LoRA at a width of 2048, in inverse proportion to the
    language model's width (as in maximal update parametrisation, arXiv 2203.03466), at most 2e-3. Weights themselves
    get a tenth of it (the ratio of the best rates in "LoRA Without Regret", Thinking Machines, 2025)."""
    width = int(model.config.get_text_config().hidden_size)
    return min(2e-3, 2e-4 * 2048 / width) * (0.1 if method == "full" else 1)


def autocast(model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Compute in the type that the student came in, where full fine-tuning holds its weights in float32."""
    mixed = dtype == torch.bfloat16 and model.dtype == torch.float32
    return torch.autocast(model.device.type, dtype) if mixed else nullcontext()


def set_checkpointing(model: Any, config: AlignConfig) -> None:
    """Gradient checkpointing as the setting says; `auto` is for models on a GPU from `LARGE` weights on."""
    large = model.device.type == "cuda" and sum(weight.numel() for weight in model.parameters()) >= LARGE
    if config.checkpointing == "on" or (config.checkpointing == "auto" and large):
        # The older name is transformers' before 5.20.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # Only reentrant checkpointing needs inputs with gradients, which would make frozen towers keep theirs.
        model.disable_input_require_grads()
