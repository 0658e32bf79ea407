"""AdamW whose gradients and moments are spread over the processes of a training: DeepSpeed's ZeRO, stages 1 and 2.

Each process has all weights, so that the model answers, and is saved, as one that is not spread. What is written are
our own checkpoints; DeepSpeed's are pickles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mpa_edge.errors import InputError, require

MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare(*, cpu: bool) -> None:
    """Before the processes meet: refuse what DeepSpeed cannot do here, and tell it where to compute."""
    zero_settings()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


def zero_settings() -> dict[str, Any]:
    """`zero_optimization` of the DeepSpeed configuration that `accelerate launch` was given; all else in it is for this
    tool to say. `InputError` for one that accelerate refuses and for other stages, `MissingExtra` without DeepSpeed."""
    from accelerate import DeepSpeedPlugin

    try:
        found: dict[str, Any] = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    except ValueError as error:
        raise InputError(f"the DeepSpeed configuration cannot be used: {error}") from error
    stage = found.get("stage", 0)
    if stage not in (1, 2):
        instead = "fsdp, which spreads the weights too" if stage == 3 else "ddp, which spreads nothing"
        raise InputError(f"DeepSpeed's ZeRO stage must be 1 or 2, not {stage}; or use --accelerate {instead}")
    require("deepspeed", ["deepspeed"])
    return found


class Zero:
    """A model's training by DeepSpeed; `param_groups`, `state`, `zero_grad` and `step` are those of an optimizer, but
    that gradients are in no `weight.grad`.

    Gradients are the mean over the processes, and clipped to the norm `clip` by `step`. All processes must make the
    same passes and steps together, and ask for the state of the same weights.
    """

    def __init__(
        self, model: nn.Module, weights: Iterable[nn.Parameter], loss: Callable[..., Any], *, rate: float, clip: float
    ) -> None:
        """`loss` makes a pass with the model and returns its loss first."""
        import deepspeed

        settings = {
            "zero_optimization": zero_settings(),
            "gradient_clipping": clip,
            "train_micro_batch_size_per_gpu": 1,  # unused: batches are ours
            "zero_force_ds_cpu_optimizer": False,  # with moments in main memory too, the same AdamW
        }
        self._adam = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        self._weights: list[nn.Parameter] = self._adam.param_groups[0]["params"]
        self._engine, *_ = deepspeed.initialize(model=_Pass(model, loss), optimizer=self._adam, config=settings)
        self.param_groups = self._adam.param_groups
        self.state = _State(self._weights, self._adam)

    def zero_grad(self) -> None:
        """Nothing: `step` does it."""

    def backward(self, *inputs: Any, scale: float, last: bool) -> torch.Tensor:
        """Make a pass and add the gradient of its loss times `scale`; returns the loss. `step` comes after the last."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss: torch.Tensor = self._engine(*inputs)[0]
        self._engine.backward(loss * scale)
        return loss.detach()

    def step(self) -> None:
        """Change the weights by the gradients that were added up since the last step."""
        self._engine.step()

    def close(self) -> None:
        """Training is over: the model is a plain one again."""
        self._engine.destroy()


class _Pass(nn.Module):
    """A model with its loss: DeepSpeed watches what a module returns for the begin of the backward pass."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, *inputs: Any) -> Any:
        return self._loss(*inputs)


class _State:
    """AdamW's state by weight, whole: of each process's share of all of them, laid end to end, DeepSpeed knows whose is
    what."""

    def __init__(self, weights: list[nn.Parameter], adam: torch.optim.AdamW) -> None:
        self._weights, self._adam = weights, adam

    def __getitem__(self, weight: nn.Parameter) -> dict[str, torch.Tensor]:
        """The moments, in main memory. Every process must call this."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {name: safe_get_full_optimizer_state(weight, name).cpu() for name in MOMENTS}

    def __setitem__(self, weight: nn.Parameter, value: Mapping[str, torch.Tensor]) -> None:
        """Go on from these, and from what the weight is now."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._begin(value["step"])
        safe_set_full_fp32_param(weight, weight.detach())
        for name in MOMENTS:
            safe_set_full_optimizer_state(weight, value[name], name)

    def _begin(self, step: torch.Tensor) -> None:
        """AdamW makes its state in its first step, after which DeepSpeed looks for it; here it is wanted before."""
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        (share,) = self._adam.param_groups[0]["params"]
        if share not in self._adam.state:
            self._adam.state[share] = {name: torch.zeros_like(share) for name in MOMENTS}
            lazy_init_hp_params_optimizer_state(self._weights, share, self._adam.state)
        self._adam.state[share]["step"] = step.clone()
