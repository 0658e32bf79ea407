"""One way to open any model: a transformers folder or hub id, an adapter on its base, an exported bundle, a fake."""

from __future__ import annotations

import json
from pathlib import Path

from mpa_edge.bundle import MANIFEST
from mpa_edge.errors import InputError, MissingExtra, ModelError
from mpa_edge.runtime.vlm import Vlm

ADAPTER = "adapter_config.json"


def open_vlm(
    spec: str, *, name: str | None = None, device: str = "auto", dtype: str = "auto", batch_size: int = 32
) -> Vlm:
    """Open the model that a spec names.

    A folder with `bundle.json` goes to the runtime, one with `adapter_config.json` is a peft adapter that is put on its
    base, one with `config.json` is a transformers model; `fake:…` is a fake (see `mpa_edge.fake`); anything else is a
    hub id. `name` is how reports call the model. `device`, `dtype` and `batch_size` matter to transformers models only.

    Raises `InputError` for a path at which no model lies, `ModelError` for one that cannot be loaded, and
    `MissingExtra`.
    """
    from mpa_edge.fake import PREFIX, open_fake

    if spec.startswith(PREFIX):
        return open_fake(spec, name=name)
    folder = Path(spec).expanduser()
    if (folder / MANIFEST).is_file():
        return _open_bundle(folder, name)
    if folder.is_dir() or spec.startswith((".", "/", "~")):
        _require_model(folder, spec)
    try:
        from mpa_edge.transformers_vlm import TransformersVlm
    except ImportError as error:
        raise MissingExtra(error.name or "transformers", "torch") from error
    if (folder / ADAPTER).is_file():
        return TransformersVlm.load(
            base_of(folder), adapter=folder, name=name or folder.name, device=device, dtype=dtype, batch_size=batch_size
        )
    where = str(folder) if folder.is_dir() else spec
    return TransformersVlm.load(where, name=name, device=device, dtype=dtype, batch_size=batch_size)


def base_of(adapter: Path) -> str:
    """The base model of an adapter folder: a folder that exists, or else a hub id.

    Adapters that this tool writes name a local base by its path relative to the adapter's folder, so that a run can be
    moved together with its models.
    """
    path = adapter / ADAPTER
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error})") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path} does not name its base model")
    beside = adapter / base
    if beside.is_dir():
        return str(beside.resolve())
    if base.startswith(("/", ".")) and not Path(base).is_dir():
        raise ModelError(f"{path} names the base model {base}, which is not there")
    return base


def _open_bundle(folder: Path, name: str | None) -> Vlm:
    from mpa_edge.runtime import load

    vlm = load(folder)
    vlm.name = name or vlm.name
    return vlm


def _require_model(folder: Path, spec: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{spec}: no such model folder")
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER)):
        raise InputError(f"{spec}: no model (none of {MANIFEST}, {ADAPTER} and config.json is there)")
