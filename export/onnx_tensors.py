"""Graphs on disk, large ones too: weights are read when they are asked for and written one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

# Up to here a graph is one file. Beyond, its weights lie beside it, where ONNX Runtime maps them into memory; a file
# that holds them is parsed, which takes its size once more, and ends at protobuf's 2 GiB.
INLINE_BYTES = 256 * 2**20


def write_graph(model: ir.Model, path: Path) -> None:
    """Write and check a graph; a large one keeps its weights in `<name>.onnx_data`, where transformers.js looks.

    Both files get their names when they are whole, the graph last.
    """
    path.unlink(missing_ok=True)
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    data = f"{path.name}_data" if sum(tensor.nbytes for tensor in tensors) > INLINE_BYTES else None
    if data is None:
        ir.external_data.load_to_model(model)  # what lies in another graph's file would stay there
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        ir.save(model, made, external_data=data)
        onnx.checker.check_model(made)
        path.with_name(f"{path.name}_data").unlink(missing_ok=True)
        if data:
            Path(scratch, data).replace(path.with_name(data))
        made.replace(path)


def array_of(tensor: Any) -> NDArray[Any]:
    """A copy of a tensor's numbers; where they lie in a file, its pages are let go."""
    numbers: NDArray[Any] = tensor.numpy().copy()
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return numbers


def later(tensor: Any, kind: ir.DataType, change: Callable[[NDArray[Any]], NDArray[Any]]) -> ir.LazyTensor:
    """A changed tensor of the same shape, computed when it is written and forgotten then."""
    return ir.LazyTensor(
        lambda: ir.tensor(change(array_of(tensor)), name=tensor.name), dtype=kind, shape=tensor.shape, name=tensor.name
    )
