"""The weights of a model folder: in which files they lie, under which names, and the model that they make."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mpa_edge.errors import ExportError
from mpa_edge.pickles import refuse_pickles

# The 16 bit types by the names that safetensors has for them.
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; `ExportError` when there are none, `ModelError` when there are pickles."""
    refuse_pickles(folder)
    index = folder / "model.safetensors.index.json"
    names = set(_indexed(index)) if index.is_file() else {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ExportError(f"{folder} lacks {absent[0]}; weights in other formats than safetensors are not read")
    return files


def _indexed(index: Path) -> list[str]:
    """The files that an index names: beside it, and nowhere else."""
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("it must name safetensors files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{index} cannot be read ({error!r})") from error
    return names


def tensor_names(shard: Path) -> list[str]:
    """The names of the tensors in a safetensors file; `ExportError` where it is none."""
    with _opened(shard) as tensors:
        return list(tensors.keys())


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, "pt")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{shard} is not a whole safetensors file ({error})") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The 16 bit type of a checkpoint that holds one only; float32 for all others."""
    found = set()
    for shard in weight_files(folder):
        with _opened(shard) as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def load_model(folder: Path) -> Any:
    """The model with its weights as they are stored, mapped from the files: they take no memory of the process.

    Raises `ExportError` where it cannot be loaded, and where the files lack weights that the model has; transformers
    would draw them at random.
    """
    dtype = stored_dtype(folder)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises whatever it trips over
        raise ExportError(f"{folder} cannot be loaded: {error}") from error
    model, found = loaded
    if absent := sorted(found["missing_keys"]):
        raise ExportError(f"{folder} lacks {len(absent)} tensors of its model, {absent[0]} first")
    return model.eval()


def names_on_disk(folder: Path, model: Any) -> dict[str, str]:
    """Names of tensors in the files by the names of the same in the loaded model.

    They differ for checkpoints of earlier times, which transformers renames when it loads them; this is its own table.
    Left out is what it makes of several stored tensors, or of a part of one.
    """
    known = model.state_dict()
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    prefix, names = model.base_model_prefix, {}
    for stored in sorted(name for shard in weight_files(folder) for name in tensor_names(shard)):
        name, conversion = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, conversion = stored, None
        if conversion is None:
            names[name] = stored
    return names


@contextmanager
def in_float32(model: Any, rounded: Collection[str] = ()) -> Iterator[None]:
    """Let a model whose weights are in 16 bit compute in float32: each weight is widened when a layer asks for it, and
    the wide one is dropped right after, so that there is never a second model in memory.

    `rounded` weights get a random error as large as that of rounding them to their type.
    """
    narrow = {
        f"{path}.{name}": (module, name, weight.dtype)
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.is_floating_point() and weight.dtype != torch.float32
    }
    for path, (module, name, dtype) in narrow.items():
        error = torch.finfo(dtype).eps if path in rounded else 0.0
        parametrize.register_parametrization(module, name, _Wide(error), unsafe=True)
    # Some models cast pictures to the type of their weights.
    hooks = [module.register_forward_pre_hook(_widen) for module in {module for module, _, _ in narrow.values()}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, _ in narrow.values():
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)


class _Wide(nn.Module):
    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        wide = weight.float()
        if self.error:
            noise = torch.rand(wide.shape, generator=torch.Generator().manual_seed(0))
            wide *= noise.sub_(0.5).mul_(self.error).add_(1)
        return wide


def _widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given.float() if torch.is_tensor(given) and given.is_floating_point() else given for given in inputs)
