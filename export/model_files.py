"""A model folder's JSON files on their way into an export, without what tells of the machine that they were made on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mpa_edge.records import write_atomic

CONFIG = "config.json"
# Keys under which libraries leave paths: _name_or_path, tokenizer_file, cache_dir, …
LOCAL = re.compile(r"(^|_)(path|file|dir|folder)$")
# A path from the root, from a home folder or from a drive, under whatever key.
PATH = re.compile(r"(?:~|/[^\s/]+)/\S.*|[A-Za-z]:[\\/].*")


def without_paths(content: Any) -> Any:
    """The same JSON without entries that hold a path, at any depth."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items() if not _is_local(key, value)}
    return [without_paths(item) for item in content] if isinstance(content, list) else content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder, without paths."""
    content: dict[str, Any] = without_paths(json.loads(path.read_bytes()))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _is_local(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(LOCAL.search(str(key)) or PATH.fullmatch(value))
