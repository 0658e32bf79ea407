"""Why pictures are shared with a test set, by their samples' ids: on disk, since a pool may hold many copies."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mpa_edge.records import write_rows
from mpa_edge.scan_index import CACHE_KB


class Shared(Mapping[str, str]):
    """A dictionary in a temporary file, which goes with the object."""

    def __init__(self, found: Iterable[tuple[str, str]] = ()) -> None:
        # SQLite's own name for a database that lies in a temporary file is the empty one.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            f"""PRAGMA temp_store = FILE; PRAGMA journal_mode = OFF; PRAGMA cache_size = -{CACHE_KB};
                CREATE TABLE shared (id TEXT PRIMARY KEY, detail TEXT NOT NULL) WITHOUT ROWID; BEGIN"""
        )
        self.add(found)

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        """Add samples by id, each with the reason."""
        self._database.executemany("INSERT OR REPLACE INTO shared VALUES (?, ?)", found)

    def rows(self) -> Iterator[tuple[str, str]]:
        """All of them: id and reason."""
        yield from self._database.execute("SELECT id, detail FROM shared")

    def __getitem__(self, sample: str) -> str:
        row = self._database.execute("SELECT detail FROM shared WHERE id = ?", (sample,)).fetchone()
        if row is None:
            raise KeyError(sample)
        return str(row[0])

    def __iter__(self) -> Iterator[str]:
        return (sample for sample, _ in self.rows())

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM shared").fetchone()[0])


def write_cache(path: Path, key: str, shared: Shared) -> None:
    """Keep an outcome under a key: JSON lines of ids with their reasons, between the key and the number of them."""
    rows = ({"id": sample, "detail": detail} for sample, detail in shared.rows())
    write_rows(path, chain([{"key": key}], rows, [{"count": len(shared)}]))


def read_cache(path: Path, key: str) -> Shared | None:
    """What was kept under this key; None where nothing was, or the file cannot be read."""
    try:
        with path.open("rb") as lines:
            return Shared(_rows(lines)) if json.loads(lines.readline())["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, sqlite3.IntegrityError):
        return None


def _rows(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    number = 0
    for line in lines:
        row: dict[str, Any] = json.loads(line)
        if "count" in row:
            break
        yield str(row["id"]), str(row["detail"])
        number += 1
    else:
        raise ValueError("it breaks off")
    if row["count"] != number or next(lines, None) is not None:
        raise ValueError("rows are missing, or too many")
