"""What a model folder holds, as one digest: two folders with one digest give the same answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from mpa_edge.bundle import sha256_of

# Weights, settings, tokenizer and chat template; not READMEs and the like.
SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf", ".onnx", ".onnx_data")


def digest64(text: str) -> int:
    """Names a text in 64 bits; half a surrogate pair, which a teacher may write, is no obstacle."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def digest_of_folder(folder: Path) -> str:
    """The SHA-256 over names and contents of the files that shape a model, in the order of their names."""
    return _digest_of(path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES)


def digest_of_adapter(folder: Path) -> str:
    """The same over an adapter's weights and settings; metrics beside them do not count."""
    return _digest_of(folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))


def digest_of_trained(folder: Path) -> str:
    """The digest of a trained student: of the adapter, or of the whole model where that was fine-tuned."""
    return digest_of_adapter(folder) if (folder / "adapter_config.json").is_file() else digest_of_folder(folder)


def _digest_of(paths: Iterable[Path]) -> str:
    files = sorted(paths, key=lambda path: path.name)
    lines = (f"{path.name} {_digest(path, path.stat().st_size, path.stat().st_mtime_ns)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> str:
    """Read a file once per process; size and time of change are part of the key only."""
    return sha256_of(path)
