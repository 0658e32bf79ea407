"""How GGUF files are called, and what they say about themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

from mpa_edge.export.gguf_reader import Reader
from mpa_edge.export.merged import Names


def metadata_of(merged: Path, names: Names) -> dict[str, Any]:
    """`general.*`, in full: what is left open, the converter guesses from the folder's name."""
    _, organisation, basename, finetune, version, size = gguf.Metadata.get_model_id_components(names.base)
    fields: dict[str, Any] = {
        "general.basename": basename or names.base.rpartition("/")[2],
        "general.finetune": "-".join(part for part in (finetune, names.finetune) if part) or None,
        "general.version": version,
        "general.organization": organisation,
        "general.size_label": size or _size_label(merged),
    }
    if names.finetune:
        fields["general.base_models"] = [_base_model(names.base)]
    return fields


def _base_model(base: str) -> dict[str, str]:
    organization, slash, name = base.partition("/")
    if not slash:  # a folder, not a hub id
        return {"name": base}
    return {"name": name, "organization": organization, "repo_url": f"https://huggingface.co/{base}"}


def full_name(names: Names) -> str:
    """The name for people."""
    return " ".join(part for part in (names.base.rpartition("/")[2], names.finetune) if part)


def _size_label(merged: Path) -> str:
    count = 0
    for file in merged.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(key).get_shape()
                count += torch.Size(shape).numel()
    return str(gguf.size_label(count, 0, 0, 0))


def file_stem(full: Path) -> str:
    """`<Base>-<Size>-<Finetune>`, ASCII: some programs cannot open other names."""
    fields = Reader(full).fields
    parts = [
        str(fields[key].contents()) for key in ("general.basename", "general.size_label", "general.finetune")
        if key in fields
    ]  # fmt: skip
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.") or "model"
