"""A stage as chunks of work: chunk i of the run's pictures becomes `part-0000i.jsonl`, whole or not at all.

Resume means "fill the missing parts". Killing the process at any instant loses at most the chunk in flight and never
tears or repeats a row. `stage.json` holds the fingerprint of all that shapes the output; a folder with another
fingerprint is refused, so that nobody mixes the output of two settings unawares.

Rows that failed (a model ran out of memory, a server did not answer) are asked again by the next run, and so is nothing
else, as long as nothing was trained on the others: beside their part lies `part-0000i.failed` with the number of
attempts, of which there are at most `ATTEMPTS`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from mpa_edge.errors import FingerprintMismatch, RunError
from mpa_edge.records import Record, Row, lines_of, read_rows, write_atomic

STAGE, DIGEST = "stage.json", ".sha256"
# What fails so often fails for its own sake, and not because of the day.
ATTEMPTS = 3

Work = Callable[[list[Row]], Sequence[Row]]
Advance = Callable[[int], None]


class Parts(Generic[Row]):
    """The parts of one stage in its folder."""

    def __init__(self, folder: Path, row: type[Row]) -> None:
        self.folder = folder
        self.again = True  # whether failed rows are asked again
        self._row = row

    def due(self, number: int) -> bool:
        """Whether part `number`, from 0, is missing or damaged, or holds failed rows that are worth another attempt."""
        worth = self.again and 0 < self._attempts(number) < ATTEMPTS
        return worth or not part_path(self.folder, number).exists() or is_damaged(part_path(self.folder, number))

    def fill(self, number: int, work: Work[Row]) -> None:
        """Write part `number` if it is due. `work` gets the rows that are there, failed ones too, and returns all rows
        of the part; it must depend on nothing but them, the part's input and what the fingerprint names."""
        if not self.due(number):
            return
        path, note = part_path(self.folder, number), self._note(number)
        if damaged := is_damaged(path):
            warnings.warn(f"{path} is damaged; it is made again", stacklevel=2)
        rows = work(self.read(number) if path.exists() and not damaged else [])
        # In this order, so that whoever is killed in between leaves a part that is looked at once more.
        if any(row.failed for row in rows):
            self._mark(number, self._attempts(number) + 1)
        _write_part(path, rows)
        if not any(row.failed for row in rows):
            note.unlink(missing_ok=True)

    def reopen(self, number: int) -> None:
        """Make a part that is there due: its input will change."""
        if part_path(self.folder, number).exists():
            self._mark(number, 1)

    def read(self, number: int) -> list[Row]:
        """The rows of part `number`; `RunError` when it is missing."""
        path = part_path(self.folder, number)
        if not path.exists():
            raise RunError(
                f"{self.folder} is not finished: {path.name} is missing. Type the same command again to go on."
            )
        if is_damaged(path):
            raise RunError(f"{path} is damaged. Type the mpa-edge align command again: it makes this part anew.")
        return list(read_rows(path, self._row))

    def __iter__(self) -> Iterator[list[Row]]:
        """The rows of a finished stage, part by part in input order; `RunError` when parts are missing."""
        return (self.read(number) for number in range(self.count))

    @property
    def count(self) -> int:
        """How many parts the finished stage has."""
        return int(_read_stage(self.folder)["parts"])

    def _note(self, number: int) -> Path:
        return part_path(self.folder, number).with_suffix(".failed")

    def _mark(self, number: int, attempts: int) -> None:
        write_atomic(self._note(number), f"{attempts}\n")

    def _attempts(self, number: int) -> int:
        try:
            return int(self._note(number).read_text())
        except (OSError, ValueError):
            return 0


def open_parts(folder: Path, row: type[Row], fingerprint: Mapping[str, Any], count: int) -> Parts[Row]:
    """The parts of a stage that will have `count` of them. Raises `FingerprintMismatch` when the folder holds those of
    other settings."""
    open_stage(folder, fingerprint, parts=count)
    return Parts(folder, row)


def read_parts(folder: Path, row: type[Row]) -> Iterator[Row]:
    """Yield the rows of a finished stage in input order; `RunError` when parts are missing."""
    for rows in Parts(folder, row):
        yield from rows


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` lies, from 0."""
    return folder / f"part-{number:05d}.jsonl"


def is_damaged(path: Path) -> bool:
    """Whether a part, or the digest beside it, is not as it was written; a part without a digest, of an older version,
    is taken as it is."""
    noted = path.with_suffix(DIGEST)
    return path.exists() and noted.exists() and noted.read_bytes() != _digest_line(path.name, path.read_bytes())


def _write_part(path: Path, rows: Sequence[Record]) -> None:
    """Write a part after its digest: whoever is killed in between leaves a part that is made again, or none."""
    content = lines_of(rows)
    write_atomic(path.with_suffix(DIGEST), _digest_line(path.name, content))
    write_atomic(path, content)


def _digest_line(name: str, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()


def open_stage(folder: Path, fingerprint: Mapping[str, Any], *, parts: int = 0) -> None:
    """Prepare a folder for the output of these settings: sweep what a killed process left half-written, compare the
    fingerprint, write `stage.json`. Raises `FingerprintMismatch`."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    now = json.loads(json.dumps(fingerprint))  # as it will read back: tuples become lists
    if (folder / STAGE).exists():
        compare_fingerprints(folder, _read_stage(folder)["fingerprint"], now)
    elif any(folder.glob("part-*.jsonl")):
        raise RunError(f"{folder} holds parts without {STAGE}: nobody knows how they were made. Use --fresh.")
    else:
        stage = {"fingerprint": now, "parts": parts}
        write_atomic(folder / STAGE, json.dumps(stage | {"sum": _sum(stage)}, indent=2, sort_keys=True) + "\n")


def drop_stage(folder: Path) -> None:
    """Delete a stage, its fingerprint last: whoever is killed meanwhile leaves a stage that can be dropped again."""
    for path in sorted(folder.iterdir()):
        path.unlink()
    folder.rmdir()


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


def digest_of_stage(folder: Path) -> str:
    """The SHA-256 over all parts of a finished stage."""
    digest = hashlib.sha256()
    for number in range(_read_stage(folder)["parts"]):
        digest.update(part_path(folder, number).read_bytes())
    return digest.hexdigest()


def asked_about(folder: Path) -> str | None:
    """The digest of the pictures that a stage is about, as its fingerprint has it; None where it does not tell."""
    try:
        found = _read_stage(folder)["fingerprint"]["input"]
    except (RunError, KeyError, TypeError):
        return None
    return str(found)


def _read_stage(folder: Path) -> dict[str, Any]:
    path = folder / STAGE
    try:
        return stage_in(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). Delete {folder}, and type the same command again: it makes this stage "
            "anew."
        ) from error


def stage_in(content: bytes) -> dict[str, Any]:
    """`fingerprint` and `parts` as a `stage.json` has them. Raises what reading JSON does, `KeyError` and `TypeError`
    for other content, and `ValueError` where its sum tells that it is damaged; one of an older version has none."""
    noted = json.loads(content)
    stage = {"fingerprint": dict(noted["fingerprint"]), "parts": int(noted["parts"])}
    if noted.get("sum", _sum(stage)) != _sum(stage):
        raise ValueError("it is not as it was written")
    return stage


def _sum(stage: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stage, sort_keys=True).encode()).hexdigest()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
