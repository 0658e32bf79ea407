"""Student and adapter to one model folder: the base's folder, with the trained tensors replaced and nothing else.

The sum is computed in float32 and stored in the base's own type, tensor by tensor, under the base's own names. Files
that hold no weights are the base's. Every way in which a merge is known to go wrong is looked for, on what was written,
and refused.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mpa_edge.errors import ExportError, ModelError
from mpa_edge.export.families import read_processor
from mpa_edge.export.merge_checks import check_files, check_logits, check_tensors, logits_of, probe_of, refuse_quantized
from mpa_edge.export.merge_trained import AdaptedModel, Trained, WholeModel
from mpa_edge.export.merge_weights import load_model, names_on_disk, weight_files
from mpa_edge.export.model_files import CONFIG, read_json, write_json
from mpa_edge.models import WHOLE, base_of
from mpa_edge.processors import save_limit

# What makes a model folder besides its weights.
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model")


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
    check_files(base)
    probe, model = probe_of(base), load_model(base)
    names, base_logits = names_on_disk(base, model), logits_of(model, probe)
    student: Trained = WholeModel(trained) if (trained / WHOLE).is_file() else AdaptedModel(model, trained)
    changed = _stored(student.names, names, getattr(model, "all_tied_weights_keys", {}))
    trained_logits = logits_of(student.model, probe)
    write_merged(base, out, changed, student.tensor)
    if longest_edge is not None:
        save_limit(out, read_processor(out, longest_edge).image_processor)
    del model, student
    return {
        **check_tensors(base, out, changed),
        **check_logits(out, probe, base_logits, trained_logits, changed.values()),
        **check_files(out),
    }


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


def write_merged(base: Path, out: Path, changed: Mapping[str, str], tensor: Callable[[str], torch.Tensor]) -> None:
    """Write the base's shards with the changed tensors in them, and its other files.

    `changed` has the name in the model for each stored one, and `tensor` the new values for that. What did not change
    goes from file to file; of the rest, one shard is in memory at a time.
    """
    out.mkdir(parents=True)
    for shard in weight_files(base):
        tensors = load_file(shard)
        for stored in tensors.keys() & changed.keys():
            tensors[stored] = _like(tensors[stored], tensor(changed[stored]), stored)
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    for file in base.iterdir():
        if file.is_file() and file.suffix in KEPT_SUFFIXES:
            shutil.copyfile(file, out / file.name)
    write_json(out / CONFIG, read_json(base / CONFIG))
    _write_card(base, out)


def _stored(changed: set[str], names: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    """The changed tensors by their names on disk. One that is tied to another, and stored twice all the same, changes
    in both places."""
    if absent := sorted(changed - names.keys()):
        raise ExportError(
            f"training changed {len(absent)} tensors that the checkpoint does not hold as such, {absent[0]} first. "
            "It cannot be merged: a tied output layer is not stored apart from the embedding, and weights that are "
            "stored together with others, or under names that transformers does not know, are not found"
        )
    stored = {names[name]: name for name in changed}
    for one, other in tied.items():
        for name, partner in ((one, other), (other, one)):
            if name in changed and partner in names:
                stored.setdefault(names[partner], name)
    return stored


def _like(before: torch.Tensor, after: torch.Tensor, name: str) -> torch.Tensor:
    if not before.is_floating_point():
        raise ExportError(f"{name} is stored as {before.dtype}; name the 16 or 32 bit checkpoint it was made from")
    if after.shape != before.shape:
        raise ExportError(f"{name} has the shape {tuple(after.shape)} after training, {tuple(before.shape)} before")
    return after.to(before.dtype, copy=True).contiguous()


def _write_card(base: Path, out: Path) -> None:
    """A model card that carries on the base's license; converters copy that into their files."""
    card = base / "README.md"
    found = re.search(r"^license: *(.+)$", card.read_text(errors="replace") if card.is_file() else "", re.MULTILINE)
    license_line = f"license: {found.group(1)}\n" if found else ""
    (out / "README.md").write_text(f"---\n{license_line}---\n{base.name}, trained and merged by mpa-edge.\n")
