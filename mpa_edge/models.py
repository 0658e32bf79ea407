"""One way to open any model: a transformers folder or hub id, an adapter on its base, a server, a bundle, a fake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from mpa_edge.bundle import MANIFEST
from mpa_edge.chat_address import is_address
from mpa_edge.errors import InputError, MissingExtra, ModelError
from mpa_edge.fake import PREFIX, open_fake
from mpa_edge.pickles import refuse_pickles
from mpa_edge.runtime.vlm import Vlm

Kind = Literal["transformers", "server", "bundle", "fake"]

ADAPTER = "adapter_config.json"
# Beside a whole model that was fine-tuned: the base, under the same key, and the names of the trained tensors.
WHOLE = "trained.json"
# Which kinds a setting fits, with the flag that people type.
FITS: dict[str, tuple[str, tuple[Kind, ...]]] = {
    "four_bit": ("--teacher-4bit or --method qlora", ("transformers",)),
    "longest_edge": ("--teacher-longest-edge or --longest-edge", ("transformers", "server")),
    "max_requests": ("--max-requests", ("server",)),
}


def open_vlm(
    spec: str,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 32,
    four_bit: bool = False,
    longest_edge: int | None = None,
    max_requests: int | None = None,
    concurrency: int = 8,
    timeout: float = 180.0,
    trust_remote_code: bool = False,
) -> Vlm:
    """Open the model that a spec names.

    `http(s)://HOST/v1#MODEL` is a chat server (see `mpa_edge.chat_vlm`), `fake:…` a fake (see `mpa_edge.fake`). A
    folder with `bundle.json` goes to the runtime, one with `adapter_config.json` is a peft adapter that is put on its
    base, one with `config.json` is a transformers model; anything else is a hub id. `name` is how reports call it.

    `device`, `dtype` and `batch_size` matter to transformers models only, `concurrency` and `timeout` (seconds for one
    answer) to chat servers only; the others pass them over. `trust_remote_code` runs code that a transformers model
    brings. The rest changes what a model answers or costs, so it must fit: `four_bit` (weights in NF4) transformers
    models, `max_requests` chat servers, `longest_edge` (pixels) both.

    Raises `InputError` for a path at which no model lies and for a setting that does not fit, `ModelError` for a model
    that cannot be loaded, and `MissingExtra`. Whether a server answers shows when it is asked first: that is here only
    where no `#MODEL` is named.
    """
    kind = kind_of(spec)
    _refuse_what_does_not_fit(kind, spec, four_bit=four_bit, longest_edge=longest_edge, max_requests=max_requests)
    if kind == "fake":
        return open_fake(spec, name=name)
    if kind == "bundle":
        return _open_bundle(Path(spec).expanduser(), name)
    if kind == "server":
        return _open_server(
            spec,
            name=name,
            longest_edge=longest_edge,
            max_requests=max_requests,
            concurrency=concurrency,
            timeout=timeout,
        )
    return _open_transformers(
        spec,
        name,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        four_bit=four_bit,
        longest_edge=longest_edge,
        trust_remote_code=trust_remote_code,
    )


def kind_of(spec: str) -> Kind:
    """What would answer: decided by the spec and by what lies there, before anything is loaded."""
    if spec.startswith(PREFIX):
        return "fake"
    if is_address(spec):
        return "server"
    return "bundle" if (Path(spec).expanduser() / MANIFEST).is_file() else "transformers"


def base_of(trained: Path) -> str:
    """The base model of an adapter, or of a whole model that this tool fine-tuned: a folder that exists, or else a hub
    id. What this tool writes names a local base by its path relative to the folder, so that a run can be moved together
    with its models.
    """
    path = next((trained / name for name in (ADAPTER, WHOLE) if (trained / name).is_file()), trained / ADAPTER)
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error})") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path} does not name its base model")
    beside = trained / base
    if beside.is_dir():
        return str(beside.resolve())
    if base.startswith(("/", ".")) and not Path(base).is_dir():
        raise ModelError(f"{path} names the base model {base}, which is not there")
    return base


def _refuse_what_does_not_fit(kind: Kind, spec: str, **typed: Any) -> None:
    for setting, value in typed.items():
        flag, kinds = FITS[setting]
        if value and kind not in kinds:
            # An address may hold what should not be printed.
            who = "a chat server" if kind == "server" else f"{spec} (a {kind})"
            raise InputError(f"{flag} is for {' and '.join(kinds)} models only and does not go with {who}")


def _open_transformers(spec: str, name: str | None, **settings: Any) -> Vlm:
    folder = Path(spec).expanduser()
    if folder.is_dir() or spec.startswith((".", "/", "~")):
        _require_model(folder, spec)
    try:
        from mpa_edge.transformers_vlm import TransformersVlm
    except ImportError as error:
        raise MissingExtra(error.name or "transformers", "torch") from error
    if (folder / ADAPTER).is_file():
        return TransformersVlm.load(base_of(folder), adapter=folder, name=name or folder.name, **settings)
    return TransformersVlm.load(str(folder) if folder.is_dir() else spec, name=name, **settings)


def _open_server(spec: str, **settings: Any) -> Vlm:
    try:
        from mpa_edge.chat_vlm import ChatVlm
    except ImportError as error:
        raise MissingExtra(error.name or "openai", "align") from error
    return ChatVlm.load(spec, **settings)


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
    refuse_pickles(folder, "adapter_model.safetensors" if (folder / ADAPTER).is_file() else "*.safetensors")
