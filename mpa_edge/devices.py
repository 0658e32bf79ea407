"""Where a transformers model runs and in which precision: CUDA, Apple's GPU or the CPU; 32, 16 or 4 bit."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from mpa_edge.errors import InputError


def device_named(device: str) -> torch.device:
    """The device of a `--device` value; auto takes CUDA, then Apple's GPU, then the CPU. `InputError` when it is not
    there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error


def dtype_named(dtype: str, device: torch.device) -> torch.dtype:
    """The type of a `--dtype` value; auto is float32 on the CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def four_bit_config() -> Any:
    """How linear layers are loaded in 4 bit, as QLoRA does (arXiv 2305.14314): NF4, with the scales quantized too, and
    bfloat16 to compute in. A `BitsAndBytesConfig` for `from_pretrained`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def require_four_bit(device: torch.device) -> None:
    """`InputError` where models cannot be loaded in 4 bit."""
    if device.type != "cuda":
        missing = f"a CUDA GPU, and the model is to run on {device.type}"
    elif importlib.util.find_spec("bitsandbytes") is None:
        missing = "bitsandbytes, which is not installed"
    else:
        return
    raise InputError(
        f"--teacher-4bit or --method qlora: needs {missing}. Leave it out, or on a CUDA GPU: "
        'pip install "mpa-edge[cuda]"'
    )
