"""A float32 graph in another precision: half, or weights in fewer bits, or both.

Quantized weights have one scale for each block of 32 (`com.microsoft.MatMulNBits`), norms and attention are left alone;
int8 is GGUF's Q8_0 by construction. ONNX Runtime's older way to int8, `quantize_dynamic`, has one scale per column and
one for all activations: on random decoders of 192 and 576 channels its logits were off by twice as much (root mean
square 9% and 24%, against 4.5% and 11.6%), at a prefill 2.4 to 4.5 times faster on an x86 CPU with AMX.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from mpa_edge.errors import ExportError
from mpa_edge.export.onnx_half import float32_nodes, to_half
from mpa_edge.export.onnx_tensors import array_of, write_graph


@dataclass(frozen=True)
class Precision:
    """How a graph's weights are stored and computed with; `dtype` is transformers.js' name for it."""

    dtype: str
    bits: int | None = None
    symmetric: bool = True
    half: bool = False

    @property
    def suffix(self) -> str:
        """The ending of a graph's file name."""
        return "" if self.dtype == "fp32" else f"_{self.dtype}"


PRECISIONS = {
    "fp32": Precision("fp32"),
    "fp16": Precision("fp16", half=True),
    "int8": Precision("int8", bits=8),
    # Four bits are too few to waste one level: a zero point per block pays for itself.
    "q4": Precision("q4", bits=4, symmetric=False),
    "q4f16": Precision("q4f16", bits=4, symmetric=False, half=True),
}
BLOCK = 32
# Activations are rounded to 8 bits within blocks, for which ONNX Runtime has kernels on x86 and ARM. With float32
# activations (level 0) the 8-bit kernel decoded 8 to 10 times slower than float32 itself.
ACCURACY_LEVEL = 4
PRODUCTS = ("MatMul", "Gemm")
# What a weight may go through on its way to a product.
PASSED_ON = ("Transpose", "Identity", "Cast", "Reshape", "DequantizeLinear")


def convert(source: Path, target: Path, precision: Precision) -> None:
    """Write the float32 graph at `source` in another precision; see `to_half` for the types of inputs and outputs.

    Memory holds the quantized weights and the one that is being converted. Raises `ExportError` when a weight of a
    product stayed as it was, or is too large for a float16.
    """
    model = ir.load(source)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if precision.bits:
        _quantize(model, precision)
    if precision.half:
        to_half(model)
    write_graph(model, target)


def _quantize(model: ir.Model, precision: Precision) -> None:
    quantizer, precise = _quantizer(precision), float32_nodes(model.graph)
    for node in list(model.graph):
        if node.op_type in PRODUCTS and node not in precise and _weight(node).const_value is not None:
            _replace(model.graph, node, quantizer)
    RemoveUnusedNodesPass()(model)
    if left := [node.name for node in model.graph if _has_weight(node) and node not in precise]:
        raise ExportError(f"{len(left)} weights were not quantized, among them that of {left[0]}")
    model.opset_imports["com.microsoft"] = 1


def _weight(node: ir.Node) -> Any:
    """A product's second input, which it always has."""
    return node.inputs[1]


def _replace(graph: ir.Graph, node: ir.Node, quantizer: Any) -> None:
    """Put a product with quantized weights in the node's place, and the addition that a Gemm has too."""
    weight, settings = array_of(_weight(node).const_value), {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    settings |= {name: attribute.value for name, attribute in node.attributes.items()}
    if (settings["transA"], settings["alpha"], settings["beta"]) != (0, 1.0, 1.0) or weight.ndim != 2:
        raise ExportError(f"{node.name} is a {node.op_type} that cannot be quantized: {weight.shape}, {settings}")
    weight = np.ascontiguousarray(weight.T) if settings["transB"] else weight
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], *_stored(graph, str(_weight(node).name), weight, quantizer)],
        {"K": weight.shape[0], "N": weight.shape[1], **_attributes(quantizer.config)},
        domain="com.microsoft",
        name=f"{node.name}_Q{quantizer.config.bits}",
    )
    nodes, result = [product], node.outputs[0]
    if len(node.inputs) > 2:
        nodes.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
        product.outputs[0].name = f"{result.name}.product"
    nodes[-1].outputs[0].name = result.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [result], [nodes[-1].outputs[0]])


def _stored(graph: ir.Graph, name: str, weight: NDArray[Any], quantizer: Any) -> list[ir.Value]:
    """Packed weights, scales, and zero points where there are; a block that is not full is filled with zeros."""
    packed, scales, zeros = quantizer.qbits_block_quant(weight)
    parts = {f"{name}_Q{quantizer.config.bits}": packed, f"{name}_scales": scales}
    if not quantizer.config.is_symmetric:
        parts[f"{name}_zero_points"] = zeros
    for part, numbers in parts.items():
        if part not in graph.initializers:
            graph.register_initializer(ir.Value(name=part, const_value=ir.tensor(numbers, name=part)))
    return [graph.initializers[part] for part in parts]


def _attributes(config: Any) -> dict[str, int]:
    return {"bits": config.bits, "block_size": config.block_size, "accuracy_level": config.accuracy_level}


def _has_weight(node: ir.Node) -> bool:
    """Whether this is a product with a weight, whatever that went through before."""
    if node.op_type not in PRODUCTS:
        return False
    for value in node.inputs[:2]:
        while value is not None and (maker := value.producer()) is not None and maker.op_type in PASSED_ON:
            value = maker.inputs[0]
        if value is not None and value.const_value is not None:
            return True
    return False


def _quantizer(precision: Precision) -> Any:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    # On import this module sets up logging for the whole process.
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    root.setLevel(level)
    root.handlers[:] = handlers
    config = library.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=precision.symmetric, accuracy_level=ACCURACY_LEVEL, bits=precision.bits
    )
    return library.DefaultWeightOnlyQuantizer(config)
