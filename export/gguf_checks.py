"""What is looked at in GGUF files before they count as made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mpa_edge.errors import ExportError
from mpa_edge.export.gguf_reader import Reader

_K = {"Q4_K", "Q5_K", "Q6_K"}
# The types that llama.cpp mixes for a quantization where every tensor has the shape for it.
TYPES = {
    "f32": {"F32"}, "f16": {"F16"}, "bf16": {"BF16"}, "q8_0": {"Q8_0"}, "q6_k": {"Q6_K"}, "q5_k_m": {"Q5_K", "Q6_K"},
    "q4_k_m": _K, "q4_k_s": _K, "q4_0": {"Q4_0", "Q4_1", "Q6_K"},
}  # fmt: skip


def check_types(file: Path, quant: str) -> dict[str, Any]:
    """How many tensors have which type, and which ones could not get the quantization's own.

    A k-quant takes rows of multiples of 256 values, the others multiples of 32; llama.cpp keeps the rest in larger
    types.
    """
    tensors = Reader(file).tensors
    fallbacks = {
        tensor.name: tensor.tensor_type.name
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.tensor_type.name not in TYPES[quant]
    }
    return {"tensor_types": dict(Counter(tensor.tensor_type.name for tensor in tensors)), "fallbacks": fallbacks}


def check_fit(model: Path, projector: Path) -> None:
    """Raise `ExportError` where the mmproj's features do not have the length of the language model's embeddings."""
    text, vision = Reader(model).fields, gguf.GGUFReader(projector).fields
    architecture = text["general.architecture"].contents()
    length = text[f"{architecture}.embedding_length"].contents()
    features = vision["clip.vision.projection_dim"].contents()
    if length != features:
        raise ExportError(f"the mmproj gives features of {features} values, the language model takes {length}")


def check_projector(own: Path, base: Path | None) -> dict[str, Any]:
    """How the mmproj compares with the one of the model that this one was trained from.

    A fine-tune that answers nonsense with its own mmproj and sense with its base's has lost or damaged its vision
    weights on the way. `vision` is "equal to the base's", "differs from the base's" with the tensors by name, or "not
    compared"; `tensor_types` counts the mmproj's own. Raises `ExportError` where a weight is no finite number (f16 ends
    at 65504): such files answer nonsense too.
    """
    tensors = {tensor.name: tensor for tensor in Reader(own).tensors}
    for name, tensor in tensors.items():
        if tensor.tensor_type.name in ("F16", "F32") and not np.isfinite(tensor.data).all():
            kind = tensor.tensor_type.name
            raise ExportError(f"mmproj: {name} holds NaN, or values beyond {kind}; --mmproj q8_0 takes larger ones")
    types = dict(Counter(tensor.tensor_type.name for tensor in tensors.values()))
    if base is None:
        return {"vision": "not compared", "tensor_types": types}
    others = {tensor.name: tensor for tensor in Reader(base).tensors}
    if tensors.keys() != others.keys():
        names = ", ".join(sorted(tensors.keys() ^ others.keys())[:4])
        raise ExportError(f"the mmproj and the base model's do not have the same tensors: {names}")
    changed = [name for name in tensors if not np.array_equal(tensors[name].data, others[name].data)]
    verdict = "differs from the base's" if changed else "equal to the base's"
    return {"vision": verdict, "changed": changed, "tensor_types": types}
