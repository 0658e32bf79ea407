"""Every way in which a merge is known to go wrong, looked for on what was written."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from mpa_edge.errors import ExportError
from mpa_edge.export.families import read_processor
from mpa_edge.export.merge_weights import in_float32, load_model, tensor_names, weight_files

# Merged and adapter model may differ by this share of what the adapter does, or of the logits' own size.
OF_EFFECT, OF_LOGITS = 0.05, 1e-3
# The last positions see all others; logits of every position would take more memory than the model does.
POSITIONS = 32


def refuse_quantized(folder: Path) -> None:
    """Raise `ExportError` for a checkpoint that is quantized: its weights are not the ones that were trained on."""
    config = json.loads((folder / "config.json").read_bytes())
    # A part of the model may be quantized alone: then its own configuration says so.
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if settings := next((part["quantization_config"] for part in parts if part.get("quantization_config")), None):
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
        raise ExportError(f"{folder.name} is quantized ({method}); name the 16 or 32 bit checkpoint it was made from")


def check_tensors(base: Path, merged: Path, targeted: Iterable[str]) -> dict[str, Any]:
    """Compare two checkpoints on disk; raises `ExportError` unless they differ in targeted tensors only, and in one."""
    before = {name: shard for shard in weight_files(base) for name in tensor_names(shard)}
    after = {name: shard for shard in weight_files(merged) for name in tensor_names(shard)}
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ExportError(f"merged and base model hold different tensors: {len(odd)} differ, {odd[0]} first")
    changed = {name for name in before if not _same_bits(before[name], after[name], name)}
    if strays := sorted(changed - set(targeted)):
        raise ExportError(f"the merge changed tensors that training did not target: {', '.join(strays[:3])}")
    if not changed:
        raise ExportError(
            "the merge changed nothing: the student is untrained, or its adapter does not reach the model"
        )
    return {"tensors": len(before), "targeted": len(set(targeted)), "changed": len(changed)}


def check_logits(
    merged: Path,
    probe: dict[str, torch.Tensor],
    base: np.ndarray[Any, Any],
    trained: np.ndarray[Any, Any],
    changed: Collection[str],
) -> dict[str, Any]:
    """Compare the written model with the trained one on one prompt; raises `ExportError` when they disagree.

    `changed` are the names of merged tensors in the model. Where these are stored in 16 bit, the logits may differ by
    twice of what rounding does: that is measured, on the same prompt, with random errors of that size.
    """
    model = load_model(merged)
    logits = logits_of(model, probe)
    error, effect, size = _most(logits - trained), _most(trained - base), _most(trained)
    allowed = max(OF_EFFECT * effect, OF_LOGITS * size)
    # A comparison with nan is false, and so refused.
    if not error <= allowed:
        allowed = 2 * _most(logits_of(model, probe, rounded=changed) - logits)
    if not error <= allowed:
        raise ExportError(
            f"merged and adapter model disagree: their logits differ by up to {error:.3g}, where the adapter itself "
            f"moves them by {effect:.3g}"
        )
    return {"adapter_effect": round(effect, 6), "logit_error": round(error, 6)}


def check_files(folder: Path) -> dict[str, Any]:
    """Whether a model folder has all that a prompt needs: processor, tokenizer, chat template."""
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder} has no tokenizer.json")
    processor = read_processor(folder)
    if not hasattr(processor, "image_processor"):
        raise ExportError(
            f"{folder} has no image processor: preprocessor_config.json or processor_config.json is missing"
        )
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ExportError(f"{folder} has no chat template")
    return {"files": "complete"}


def probe_of(folder: Path) -> dict[str, torch.Tensor]:
    """A drawn picture with a question, as the model's inputs."""
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    pixels = np.stack([x * 255 // 159, y * 255 // 119, (x // 20 + y // 20) % 2 * 255], axis=-1)
    processor = read_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    return dict(processor(text=[prompt], images=[[image]], return_tensors="pt"))


@torch.inference_mode()
def logits_of(model: Any, probe: dict[str, torch.Tensor], rounded: Collection[str] = ()) -> np.ndarray[Any, Any]:
    """Logits (last positions, vocabulary), computed in float32; for `rounded` see `in_float32`."""
    with in_float32(model, rounded):
        logits = model(**probe, logits_to_keep=POSITIONS, use_cache=False).logits
    return np.asarray(logits[0].float().numpy())


def _most(difference: np.ndarray[Any, Any]) -> float:
    return float(np.abs(difference).max())


def _same_bits(before: Path, after: Path, name: str) -> bool:
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        first, second = old.get_tensor(name), new.get_tensor(name)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        raise ExportError(f"{name} is {second.dtype} {tuple(second.shape)} after the merge, {first.dtype} before")
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
