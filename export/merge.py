"""Student and adapter to one model folder: the base's folder, with the adapter's tensors replaced and nothing else.

The sum is computed in float32 and stored in the base's own type, tensor by tensor. Files that hold no weights are the
base's. Every way in which a merge is known to go wrong is looked for, on what was written, and refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mpa_edge.errors import ExportError, ModelError
from mpa_edge.lora import no_future_warnings
from mpa_edge.models import WHOLE, base_of
from mpa_edge.processors import load_processor, save_limit

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What makes a model folder besides its weights.
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model")
# Merged and adapter model may differ by this share of what the adapter does, or of the logits' own size.
OF_EFFECT, OF_LOGITS = 0.05, 1e-3


def merge(trained: Path, out: Path, *, longest_edge: int | None = None) -> dict[str, Any]:
    """Merge an adapter, or the tensors of a whole model that was fine-tuned, into the base that its folder names, and
    write the folder `out`, which must not exist.

    `longest_edge` is the picture size that it was trained with, where that is not the base's own.

    Returns the outcome of the checks. Raises `ExportError` when the base is quantized or one of the checks fails: at
    least one targeted tensor changed; all others are bit-identical; names, shapes and types are the base's; the written
    model and the trained one give the same logits; processor, tokenizer and chat template are in the folder.
    """
    base = base_folder(trained)
    refuse_quantized(base)
    model = _load(base)
    probe = probe_of(base)
    base_logits = logits_of(model, probe)
    whole = (trained / WHOLE).is_file()
    targeted = set(json.loads((trained / WHOLE).read_bytes())["tensors"]) if whole else targeted_tensors(trained)
    tensors, trained_logits = _whole(trained, probe) if whole else _adapted(model, trained, probe)
    write_merged(base, out, {name: tensors[name] for name in targeted & tensors.keys()}, targeted)
    if longest_edge is not None:
        save_limit(out, load_processor(out, longest_edge).image_processor)
    del model, tensors
    return {
        **check_tensors(base, out, targeted),
        **check_logits(out, probe, base_logits, trained_logits),
        **check_files(out),
    }


def _whole(folder: Path, probe: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a fine-tuned model, and its logits."""
    model = _load(folder)
    return model.state_dict(), logits_of(model, probe)


def _adapted(model: Any, adapter: Path, probe: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of the base with the adapter merged into it, and the logits of the two before that."""
    try:
        with no_future_warnings():
            adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # peft raises whatever it trips over
        raise ExportError(f"{adapter} does not fit its base: {error}") from error
    logits = logits_of(adapted, probe)
    try:
        return adapted.merge_and_unload(safe_merge=True).state_dict(), logits
    except ValueError as error:
        raise ExportError(f"{adapter} cannot be merged: {error}") from error


def base_folder(adapter: Path) -> Path:
    """The folder of the model that an adapter names, from the hub's cache where the name is a hub id."""
    try:
        base = base_of(adapter)
        if Path(base).is_dir():
            return Path(base)
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(base, allow_patterns=["*.safetensors", "*.md", *(f"*{s}" for s in KEPT_SUFFIXES)])
        )
    except ModelError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ExportError(f"the base model {base} cannot be fetched: {error}") from error


def refuse_quantized(folder: Path) -> None:
    """Raise `ExportError` for a checkpoint that is quantized: its weights are not the ones that were trained on."""
    config = json.loads((folder / "config.json").read_bytes())
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise ExportError(f"{folder.name} is quantized ({method}); name the 16 or 32 bit checkpoint it was made from")


def targeted_tensors(adapter: Path) -> set[str]:
    """The tensors that an adapter changes, by the names that they have in the model."""
    targeted = set()
    with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name = key.removeprefix("base_model.model.")
            module, is_lora, _ = name.partition(".lora_")
            # Anything else is stored whole: modules_to_save, trained biases.
            targeted.add(f"{module}.weight" if is_lora else name)
    return targeted


def write_merged(base: Path, out: Path, changed: dict[str, torch.Tensor], targeted: set[str]) -> None:
    """Write the base's shards with the changed tensors in them, and its other files."""
    shards = weight_files(base)
    held = {name for shard in shards for name in tensor_names(shard)}
    if absent := sorted(targeted - held):
        raise ExportError(
            f"training changed {len(absent)} tensors that the checkpoint does not hold under that name, {absent[0]} "
            "first; a tied output layer is not stored, so it cannot be trained apart from the embedding"
        )
    out.mkdir(parents=True)
    for shard in shards:
        tensors = load_file(shard)
        for name in tensors.keys() & changed.keys():
            tensors[name] = changed[name].to(tensors[name].dtype).contiguous()
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    for file in base.iterdir():
        if file.is_file() and file.suffix in KEPT_SUFFIXES:
            shutil.copyfile(file, out / file.name)
    _write_config(base, out)
    _write_card(base, out)


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
    merged: Path, probe: dict[str, torch.Tensor], base: np.ndarray[Any, Any], adapter: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Compare the written model with base plus adapter on one prompt; raises `ExportError` when they disagree."""
    error = float(np.abs(logits_of(_load(merged), probe) - adapter).max())
    effect, size = float(np.abs(adapter - base).max()), float(np.abs(adapter).max())
    # A comparison with nan is false, and so refused.
    if not (error <= OF_EFFECT * effect or error <= OF_LOGITS * size):
        raise ExportError(
            f"merged and adapter model disagree: their logits differ by up to {error:.3g}, where the adapter itself "
            f"moves them by {effect:.3g}"
        )
    return {"adapter_effect": round(effect, 6), "logit_error": round(error, 6)}


def check_files(folder: Path) -> dict[str, Any]:
    """Whether a model folder has all that a prompt needs: processor, tokenizer, chat template."""
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder} has no tokenizer.json")
    try:
        processor = load_processor(folder)
    except Exception as error:  # transformers raises whatever it trips over
        raise ExportError(f"{folder}: the processor cannot be loaded ({error})") from error
    if not hasattr(processor, "image_processor"):
        raise ExportError(
            f"{folder} has no image processor: preprocessor_config.json or processor_config.json is missing"
        )
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ExportError(f"{folder} has no chat template")
    return {"files": "complete"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; `ExportError` when there are none."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ExportError(f"{folder} lacks {absent[0]}; weights in other formats than safetensors are not read")
    return files


def tensor_names(shard: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    with safe_open(shard, "pt") as tensors:
        return list(tensors.keys())


def probe_of(folder: Path) -> dict[str, torch.Tensor]:
    """A drawn picture with a question, as the model's inputs."""
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    pixels = np.stack([x * 255 // 159, y * 255 // 119, (x // 20 + y // 20) % 2 * 255], axis=-1)
    processor = load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    return dict(processor(text=[prompt], images=[[image]], return_tensors="pt"))


@torch.inference_mode()
def logits_of(model: Any, probe: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Logits (positions, vocabulary) in float32."""
    return np.asarray(model(**probe).logits[0].float().numpy())


def _load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


def _same_bits(before: Path, after: Path, name: str) -> bool:
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        first, second = old.get_tensor(name), new.get_tensor(name)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        raise ExportError(f"{name} is {second.dtype} {tuple(second.shape)} after the merge, {first.dtype} before")
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _write_config(base: Path, out: Path) -> None:
    """The base's config without the path that some versions of transformers leave in it."""
    config = json.loads((base / "config.json").read_bytes())
    config.pop("_name_or_path", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_card(base: Path, out: Path) -> None:
    """A model card that carries on the base's license; converters copy that into their files."""
    card = base / "README.md"
    found = re.search(r"^license: *(.+)$", card.read_text(errors="replace") if card.is_file() else "", re.MULTILINE)
    license_line = f"license: {found.group(1)}\n" if found else ""
    (out / "README.md").write_text(f"---\n{license_line}---\n{base.name}, trained and merged by mpa-edge.\n")
