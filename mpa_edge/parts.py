"""A stage as chunks of work: chunk i of the input rows becomes `part-0000i.jsonl`, whole or not at all.

Resume means "run the missing parts". Killing the process at any instant loses at most the chunk in flight and never
tears or repeats a row. `stage.json` holds the fingerprint of all that shapes the output; a folder with another
fingerprint is refused, so that nobody mixes the output of two settings unawares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpa_edge.errors import FingerprintMismatch, RunError
from mpa_edge.records import Record, Row, read_rows, write_atomic, write_rows

STAGE = "stage.json"

Work = Callable[[list[Row]], Sequence[Record]]
Advance = Callable[[int], None]


def run_parts(
    folder: Path,
    rows: Sequence[Row],
    work: Work[Row],
    fingerprint: Mapping[str, Any],
    *,
    chunk_size: int = 256,
    fresh: bool = False,
    advance: Advance = lambda count: None,
) -> None:
    """Run the missing parts of a stage, in order.

    `work` maps a chunk of input rows to output rows (any number) and must depend on nothing but the chunk and what the
    fingerprint names. The digest of the input and the chunk size are added to the fingerprint. `advance` is called with
    the number of input rows that are done, once for those found on disk and once after each chunk.

    Raises `FingerprintMismatch` when the folder holds the output of other settings; `fresh` deletes that output first.
    """
    chunks = [list(rows[start : start + chunk_size]) for start in range(0, len(rows), chunk_size)]
    open_stage(
        folder, {**fingerprint, "input": digest_of_rows(rows), "chunk_size": chunk_size}, parts=len(chunks), fresh=fresh
    )
    for number, chunk in enumerate(chunks):
        path = part_path(folder, number)
        if not path.exists():
            write_rows(path, work(chunk))
        advance(len(chunk))


def read_parts(folder: Path, row: type[Row]) -> Iterator[Row]:
    """Yield the rows of a finished stage in input order; `RunError` when parts are missing."""
    for number in range(_read_stage(folder)["parts"]):
        path = part_path(folder, number)
        if not path.exists():
            raise RunError(f"{folder} is not finished: {path.name} is missing. Type the same command again to go on.")
        yield from read_rows(path, row)


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` lies, from 0."""
    return folder / f"part-{number:05d}.jsonl"


def open_stage(folder: Path, fingerprint: Mapping[str, Any], *, parts: int = 0, fresh: bool = False) -> None:
    """Prepare a folder for the output of these settings: sweep what a killed process left half-written, compare the
    fingerprint, write `stage.json`. Raises `FingerprintMismatch`."""
    if fresh and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    now = json.loads(json.dumps(fingerprint))  # as it will read back: tuples become lists
    if (folder / STAGE).exists():
        compare_fingerprints(folder, _read_stage(folder)["fingerprint"], now)
    elif any(folder.glob("part-*.jsonl")):
        raise RunError(f"{folder} holds parts without {STAGE}: nobody knows how they were made. Use --fresh.")
    else:
        write_atomic(folder / STAGE, json.dumps({"fingerprint": now, "parts": parts}, indent=2, sort_keys=True) + "\n")


def compare_fingerprints(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `FingerprintMismatch`, naming each leaf that differs, unless the two are equal."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = before.keys() | after.keys()
    differences = {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
    if differences:
        raise FingerprintMismatch(folder, differences)


def sweep(folder: Path) -> None:
    """Delete the temporary files that a killed process left behind; folders are an export's, which sweeps its own."""
    for leftover in folder.glob(".*.tmp"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def digest_of_rows(rows: Sequence[Record]) -> str:
    """The SHA-256 of rows as they would be written."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.to_json(), ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _read_stage(folder: Path) -> dict[str, Any]:
    path = folder / STAGE
    try:
        stage: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"fingerprint": stage["fingerprint"], "parts": int(stage["parts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}). Use --fresh to start over.") from error


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
