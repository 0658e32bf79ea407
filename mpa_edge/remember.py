"""Results that are kept on disk with a key that says what they were made of, so that a resume need not make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpa_edge.bundle import sha256_of
from mpa_edge.records import write_atomic


def remembered(
    path: Path,
    key: Any,
    make: Callable[[], Any],
    *files: Path,
    others: Callable[[], str] = str,
    keep: Callable[[Any], bool] = lambda value: True,
) -> Any:
    """What `make` returns, as JSON reads it back.

    It comes from `path` where that has it under the same key, and the `files` that `make` writes are as they were, and
    the `others`, which are named by the digest that this returns. What is not worth to `keep` is made again."""

    def state() -> list[str]:
        return [digest, *(sha256_of(file) for file in files), others()]

    digest = _digest(key)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["sum"] == _digest(known["value"]) and known["state"] == state():
            return known["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not there, or half of it, or older
    value = json.loads(json.dumps(make()))
    if not keep(value):
        path.unlink(missing_ok=True)
        return value
    write_atomic(path, json.dumps({"state": state(), "sum": _digest(value), "value": value}) + "\n")
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
