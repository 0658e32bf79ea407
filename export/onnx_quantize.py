"""The decoder's weights in fewer bits. Vision encoder and token embedding stay float32.

Both have one scale for each block of 32 weights (`com.microsoft.MatMulNBits`) and leave norms and attention alone; int8
is GGUF's Q8_0 by construction. ONNX Runtime's older way to int8, `quantize_dynamic`, has one scale per column and one
for all activations: on random decoders of 192 and 576 channels its logits were off by twice as much (root mean square
9% and 24%, against 4.5% and 11.6%), at a prefill 2.4 to 4.5 times faster on an x86 CPU with AMX.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import onnx

from mpa_edge.errors import ExportError
from mpa_edge.export.onnx_graphs import save_graph
from mpa_edge.export.quiet import quiet


@dataclass(frozen=True)
class Quantization:
    """One way to store the decoder; `dtype` is transformers.js' name for it and `suffix` its file name's ending."""

    dtype: str
    suffix: str
    bits: int | None = None
    symmetric: bool = True


QUANTIZATIONS = {
    "fp32": Quantization("fp32", ""),
    "int8": Quantization("int8", "_int8", bits=8),
    # Four bits are too few to waste one level: a zero point per block pays for itself.
    "q4": Quantization("q4", "_q4", bits=4, symmetric=False),
}
BLOCK = 32
# Activations are rounded to 8 bits within blocks, for which ONNX Runtime has kernels on x86 and ARM. With float32
# activations (level 0) the 8-bit kernel decoded 8 to 10 times slower than float32 itself.
ACCURACY_LEVEL = 4


def quantize_decoder(source: Path, target: Path, quantization: Quantization) -> list[str]:
    """Write the decoder at `source` with quantized weights, and return the names of the nodes that were quantized.

    Raises `ExportError` when a weight of a MatMul stayed as it was.
    """
    model = _quantized(onnx.load(source), quantization)
    weights = {tensor.name for tensor in model.graph.initializer}
    left = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    if left:
        raise ExportError(f"{len(left)} of the decoder's weights were not quantized, among them {left[0]}")
    save_graph(model, target)
    return [node.name for node in model.graph.node if node.op_type == "MatMulNBits"]


def _quantized(model: onnx.ModelProto, quantization: Quantization) -> onnx.ModelProto:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    # On import this module sets up logging for the whole process.
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=quantization.bits,
            block_size=BLOCK,
            is_symmetric=quantization.symmetric,
            accuracy_level=ACCURACY_LEVEL,
        )
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized
