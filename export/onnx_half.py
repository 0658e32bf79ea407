"""Half precision: a graph that computes in float16 between float32 inputs and outputs.

What has no place in float16 stays float32: squares inside a norm, which overflow from 256 on, and positions on their
way to an angle or an index, since a float16 counts to 2048 only. The converter of ONNX Runtime and onnxconverter-common
can be told of such nodes, but rounds between two neighbours of them, and writes a Cast twice that both need.

On a CPU, ONNX Runtime (1.22 to 1.31) has float16 kernels for attention, norms and quantized products. Plain products it
computes in float32 and widens their weights when it loads them: there fp16 halves the file, not the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mpa_edge.errors import ExportError
from mpa_edge.export.onnx_tensors import array_of, later

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# By these, and by a Cast to another type, a float becomes an angle, an index or a decision. The last two know no
# float16, or want some of their inputs in float32.
PRECISE = {"Sin", "Cos", "Floor", "Round", "NonZero", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"}
PRECISE |= {"Range", "Resize"}
# A layer's output is what the model makes of its input, and no position; smaller weights are constants of positions.
LAYER_WEIGHTS = 1024
LARGEST = 65504
# From here on a number means infinity: a mask's lowest value.
MASKED = 1e30
# From the mean of squares to the factor of the hidden state; the Div or Mul after them is the last step.
ROOT = {"ReduceMean", "Add", "Sqrt", "Reciprocal"}


def to_half(model: ir.Model) -> None:
    """Let the graph compute in float16, in place. The key-value cache is float16 too, other inputs and outputs stay
    float32: transformers.js feeds float32 embeddings, and keeps the cache as it comes.

    Raises `ExportError` for a weight that is too large for a float16.
    """
    graph = model.graph
    _infer_types(model)
    kept = float32_nodes(graph)
    for node in graph:
        if node not in kept:
            _give_half(node)
    cache = [value for value in graph.inputs if _is_cache(value)]
    for value in [*cache, *graph.initializers.values()]:
        if value.dtype == FLOAT and not set(value.consumers()) & kept:
            _hold_half(value)
    casts = _Casts(graph)
    for node in list(graph):
        if node.op_type != "Cast":
            for place, given in enumerate(node.inputs):
                node.replace_input_with(place, casts.to(FLOAT if node in kept else HALF, given))
    for place, value in enumerate(graph.outputs):
        if not _is_cache(value):
            graph.outputs[place] = casts.output(value)
    graph.sort()


def float32_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that lead to an angle, an index or a decision, and those that take a norm's root."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in PRECISE or _casts_away(node):
            found |= _reach(node, ir.Node.predecessors, lambda step: not _is_layer(step))
        elif node.op_type == "ReduceMean":
            root = _reach(node, ir.Node.successors, lambda step: step.op_type in ROOT)
            ends = {after for step in root for after in step.successors() if after.op_type in ("Div", "Mul")}
            found |= root | ends | {before for before in node.predecessors() if not _is_layer(before)}
    return found


def _reach(
    start: ir.Node, step: Callable[[ir.Node], Iterable[ir.Node]], goes: Callable[[ir.Node], bool]
) -> set[ir.Node]:
    found, left = {start}, [start]
    while left:
        new = {node for node in step(left.pop()) if node not in found and goes(node)}
        found |= new
        left += new
    return found


def _casts_away(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() not in (FLOAT, HALF)


def _is_layer(node: ir.Node) -> bool:
    tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return node.op_type == "GroupQueryAttention" or any(tensor.size >= LAYER_WEIGHTS for tensor in tensors)


def _is_cache(value: ir.Value) -> bool:
    return str(value.name).startswith(("past_key_values.", "present."))


def _infer_types(model: ir.Model) -> None:
    """Know every float32 value. onnx' inference ends at ONNX Runtime's own operators; what they give is float32."""
    for node in model.graph:
        for value in node.outputs if node.domain == "com.microsoft" else ():
            value.dtype = FLOAT
    ShapeInferencePass()(model)


def _give_half(node: ir.Node) -> None:
    """Let a node give float16 where it gave float32; that of most follows from their inputs."""
    for value in node.outputs:
        if value.dtype == FLOAT:
            value.dtype = HALF
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", HALF)
    if node.op_type == "ConstantOfShape":
        filling: Any = node.attributes.get("value")
        number: Any = 0.0 if filling is None else filling.as_tensor().numpy()
        if filling is None or number.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.reshape(number, 1).astype(np.float16)))


def _hold_half(value: ir.Value) -> None:
    """Make an input or a weight a float16."""
    value.dtype = HALF
    tensor = value.const_value
    if tensor is None:
        return
    if tensor.size >= LAYER_WEIGHTS:
        sizes = np.abs(array_of(tensor))
        if ((sizes > LARGEST) & (sizes < MASKED)).any():
            raise ExportError(f"{value.name} holds values beyond float16's {LARGEST}; take --quant fp32, int8 or q4")
    value.const_value = later(
        tensor, HALF, lambda numbers: np.clip(numbers, -LARGEST, LARGEST, out=numbers).astype(np.float16)
    )


class _Casts:
    """The Cast nodes of a graph: one for each value that is wanted in the other type."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[ir.Value, ir.Value] = {}

    def to(self, kind: ir.DataType, value: ir.Value | None) -> ir.Value | None:
        """The value in this type; those that are no floats stay as they are."""
        if value is None or value.dtype not in (FLOAT, HALF) or value.dtype == kind:
            return value
        if value not in self._made:
            self._made[value] = self._cast(value, kind, f"{value.name}.{kind.name.lower()}")
        return self._made[value]

    def output(self, value: ir.Value) -> ir.Value:
        """An output of the graph as a float32 under its own name."""
        if value.dtype != HALF:
            return value
        name, value.name = str(value.name), f"{value.name}.half"
        return self._cast(value, FLOAT, name)

    def _cast(self, value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(kind)}, name=f"/cast/{name}")
        result = node.outputs[0]
        result.name, result.dtype, result.shape = name, kind, value.shape
        self._graph.append(node)
        return result
