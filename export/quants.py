"""The quantizations by name, checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mpa_edge.errors import InputError

Format = Literal["gguf", "onnx", "openvino", "hf"]

# llama.cpp's own names with the numbers of its `llama_ftype`.
GGUF = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_k_s": 14, "q4_0": 2,
}  # fmt: skip
MMPROJ = ("f16", "q8_0")
ONNX = ("fp32", "fp16", "int8", "q4", "q4f16")
OPENVINO = ("fp32", "fp16", "int8", "int4")

# By format; a Hugging Face folder keeps the weights' own type.
QUANTS: dict[Format, tuple[str, ...]] = {"gguf": tuple(GGUF), "onnx": ONNX, "openvino": OPENVINO, "hf": ()}
# What is made where nothing is named: the smallest that loses next to nothing.
DEFAULTS: dict[Format, tuple[str, ...]] = {"gguf": ("q8_0",), "onnx": ("int8",), "openvino": ("int8",), "hf": ()}


def checked(format: Format, quants: Sequence[str] | None) -> list[str]:
    """The names in lower case, each once, or the format's default for None; `InputError` when there is none, or one
    that is not known."""
    known = QUANTS[format]
    if quants is None:
        return list(DEFAULTS[format])
    wanted = list(dict.fromkeys(quant.strip().lower() for quant in quants if quant.strip()))
    if wanted and not known:
        raise InputError(f"--quant {wanted[0]}: --format {format} keeps the weights as they are; leave it out")
    if known and not wanted:
        raise InputError(f"--quant: name at least one of {', '.join(known)}")
    if unknown := [quant for quant in wanted if quant not in known]:
        raise InputError(f"--quant {unknown[0]}: not known for --format {format}; known: {', '.join(known)}")
    return wanted


def checked_mmproj(name: str) -> str:
    """The name of an mmproj's precision; `InputError` for others. Fewer bits cost more accuracy than they save."""
    if name not in MMPROJ:
        raise InputError(f"--mmproj {name}: not known; known: {', '.join(MMPROJ)}")
    return name
