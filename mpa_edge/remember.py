"""Results that are kept on disk with a key that says what they were made of, so that a resume need not make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpa_edge.bundle import sha256_of
from mpa_edge.records import write_atomic


def remembered(path: Path, key: Any, make: Callable[[], Any], *files: Path) -> Any:
    """What `make` returns, as JSON reads it back.

    It comes from `path` where that has it under the same key, and the `files` that `make` writes are as they were."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["key"] == digest and known["files"] == _digests(files):
            return known["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or half of it, or older
    value = json.loads(json.dumps(make()))
    write_atomic(path, json.dumps({"key": digest, "files": _digests(files), "value": value}) + "\n")
    return value


def _digests(files: tuple[Path, ...]) -> list[str]:
    return [sha256_of(path) for path in files]
