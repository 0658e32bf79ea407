"""The quantizations by name, checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mpa_edge.errors import InputError

Format = Literal["gguf", "onnx"]

# llama.cpp's own names with the numbers of its `llama_ftype`.
GGUF = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_k_s": 14, "q4_0": 2,
}  # fmt: skip
ONNX = ("fp32", "int8", "q4")


def checked(format: Format, quants: Sequence[str]) -> list[str]:
    """The names in lower case, each once; `InputError` when there is none, or one that is not known."""
    known = {"gguf": tuple(GGUF), "onnx": ONNX}[format]
    wanted = list(dict.fromkeys(quant.strip().lower() for quant in quants if quant.strip()))
    if not wanted:
        raise InputError(f"--quant: name at least one of {', '.join(known)}")
    if unknown := [quant for quant in wanted if quant not in known]:
        raise InputError(f"--quant {unknown[0]}: not known for --format {format}; known: {', '.join(known)}")
    return wanted
