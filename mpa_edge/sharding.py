"""A model whose weights are spread over the processes of a training (PyTorch's fully sharded data parallelism), and
tensors of it as a whole again.

Each process has its share of every weight, gradient and moment; a block's weights are together only while it computes.
Tensors that are not spread pass through all functions as they are, so that files hold the same whichever way they were
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def shard(model: nn.Module, weights: Mapping[str, nn.Parameter], *, offload: bool = False) -> dict[str, nn.Parameter]:
    """Spread a model in place, block by block, and return the weights that took the place of the given ones. With
    `offload` shares lie in main memory. From now on only its forward and backward passes work, and all processes must
    make each of them together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    names = {id(weight): name for name, weight in weights.items()}
    order = [names.get(id(weight)) for weight in model.parameters()]
    kind = next(model.parameters()).device.type
    options: dict[str, Any] = {
        "mesh": init_device_mesh(kind, (torch.distributed.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, **options)
    fully_shard(model, **options)
    found = {name: weight for name, weight in zip(order, model.parameters(), strict=True) if name is not None}
    return {name: found[name] for name in weights}


def reshard(model: nn.Module) -> None:
    """Let go of the weights that a forward pass has left together, so that the model's are the shares again."""
    for module in model.modules():
        again: Any = getattr(module, "reshard", None)
        if again:
            again()


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether it is a share of a tensor (`torch.distributed.tensor.DTensor`, whose import takes a second)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, in main memory where it is spread; then every process must call this."""
    spread: Any = tensor
    return spread.full_tensor().cpu() if is_spread(tensor) else tensor


def like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value on the device of a tensor, and spread as that is. Every process must have the same value."""
    if not is_spread(tensor):
        return value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    spread: Any = tensor
    return distribute_tensor(value.to(tensor.device), spread.device_mesh, spread.placements, src_data_rank=None)


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy to be put back later: in main memory, since a GPU has none to spare; of a spread one, the share."""
    return tensor.detach().clone() if is_spread(tensor) else tensor.detach().cpu().clone()


def whole_state(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of a model with whole tensors, parameters in this type and ties kept. Every process must call it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, torch.Tensor] = {}
    for weight in parameters.values():
        if id(weight) not in made:
            made[id(weight)] = whole(weight.detach()).to(dtype)
    return {
        name: made[id(parameters[name])] if name in parameters else whole(tensor)
        for name, tensor in model.state_dict().items()
    }
