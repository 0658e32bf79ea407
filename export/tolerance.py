"""How far a bundle's logits may be from transformers' float32 ones, by engine and precision, and why.

The error is the root mean square of the difference over all positions, as a fraction of the logits' own standard
deviation. Full precision is not free of error: llama.cpp keeps its key-value cache in float16 and looks GELU up in a
table of float16, where ONNX Runtime adds in another order and nothing else. What quantization adds was measured on
random weights, which are worse off than trained ones; the bounds are about twice what was seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TOLERANCE: dict[str, dict[str, float]] = {
    "llama.cpp": {
        "f32": 0.01,
        "f16": 0.01,
        "bf16": 0.015,  # 8 bits of mantissa
        "q8_0": 0.05,
        "q6_k": 0.08,
        "q5_k_m": 0.25,
        "q4_k_m": 0.3,
        "q4_k_s": 0.35,
        "q4_0": 0.5,
    },
    "onnxruntime": {
        "fp32": 5e-5,
        "fp16": 0.004,  # 11 bits of mantissa; vision encoder and embedding too
        "int8": 0.05,
        "q4": 0.5,
        "q4f16": 0.5,
    },
    "openvino": {
        "fp32": 5e-5,
        "fp16": 0.02,  # vision encoder and embedding too, as in all below
        "int8": 0.05,
        "int4": 0.5,
    },
}


def logit_error(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference of logits (positions, vocabulary), as a fraction of `wanted`'s deviation."""
    return float(np.sqrt(np.mean(np.square(got.astype(np.float64) - wanted))) / wanted.std())
