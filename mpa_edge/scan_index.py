"""What a scan found out about each file or row, in a small database on disk: a run of a million pictures scans them in
the memory of a run of a thousand, and the next scan opens only files that are new or changed.

Rows are kept in the order of their keys: the bytes of a file's path, or the number of a table's row. Each has a sum of
its own, since SQLite sees no bit that flips in a row.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mpa_edge.disk import disk_trouble
from mpa_edge.records import Record, Sample

BATCH = 1024
# Pages that SQLite keeps in memory, of either of its files; they, and not the rows, are what a large scan takes.
CACHE_KB = 512
PATIENCE_SECONDS = 60.0
# The time of a file that the system did not give; no file has it.
UNREAD = -1
# `finished` counts the checks of a scan that came to its end.
_TABLES = """
CREATE TABLE IF NOT EXISTS rules (content TEXT, finished INTEGER);
CREATE TABLE IF NOT EXISTS checks (
    key BLOB PRIMARY KEY, path TEXT, bytes INTEGER, mtime_ns INTEGER, sha256 BLOB, reason TEXT, detail TEXT,
    stored TEXT, sum INTEGER
) WITHOUT ROWID;
CREATE TEMP TABLE wanted (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE firsts (sha256 BLOB PRIMARY KEY, first BLOB, name TEXT) WITHOUT ROWID;
CREATE TEMP TABLE shared (sha256 BLOB PRIMARY KEY, detail TEXT) WITHOUT ROWID;
"""
# Pictures of their own, in order: usable, the first of their content, and not the test's.
_USABLE = """
FROM checks LEFT JOIN firsts USING (sha256)
WHERE reason IS NULL AND (first IS NULL OR first = checks.key)
"""
_KEPT = f"{_USABLE} AND sha256 NOT IN (SELECT sha256 FROM shared) ORDER BY checks.key"


@dataclass(frozen=True)
class Skipped(Record):
    """A file, or a row of a file, that was left out; `reason` is a short stable slug, `detail` is for people.

    For pictures: `unreadable`, `truncated`, `too_small`, `too_large`, `duplicate` (the detail names the first one),
    `missing`, `not_an_image` (its name says so; it was not opened), `in_test` (see `mpa_edge.overlap`); in tables also
    `no_image` and `outside_folder`.
    """

    path: str
    reason: str
    detail: str = ""


# The type, under a name that no field has.
Bytes = bytes


@dataclass(frozen=True)
class Check:
    """What a scan found out about one file, and how to see that the file is still the same; or about one row of a
    table, whose picture is then the file `stored` in the store. `path` is for people, `sha256` empty where the bytes
    could not be read."""

    key: Bytes
    path: str
    bytes: int = 0
    mtime_ns: int = 0
    sha256: Bytes = b""
    reason: str | None = None
    detail: str = ""
    stored: str = ""


class ScanIndex:
    """The checks of one source by one set of rules. One process at a time; a context manager."""

    def __init__(self, path: Path | None, rules: Mapping[str, Any]) -> None:
        """`path` is where the checks are kept for the next scan; without one they last as long as this object. What
        was found out by other rules, and a file that is damaged, is dropped."""
        self._rules = json.dumps(rules, sort_keys=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._database = _connect(path)
        try:
            self._prepare(path)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # of a name that damage made
            self.close()
            if path is None or disk_trouble(error):
                raise
            path.unlink(missing_ok=True)
            self._database = _connect(path)
            self._prepare(path)
        self._limit = -1

    def _prepare(self, path: Path | None) -> None:
        self._database.execute("PRAGMA temp_store = FILE")
        for schema in ("main", "temp"):
            self._database.execute(f"PRAGMA {schema}.cache_size = -{CACHE_KB}")
        self._database.executescript(_TABLES)
        _check_file(self._database, path)
        if self._database.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() != _schema():
            raise sqlite3.DatabaseError("it has other tables")
        if self._database.execute("SELECT content FROM rules").fetchall() != [(self._rules,)]:
            self.clear()
        for *row, noted in self._database.execute("SELECT * FROM checks"):
            if _sum(row) != noted:
                raise sqlite3.DatabaseError(f"the row {row[1]} is another")

    def __enter__(self) -> ScanIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    # --- filling -----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all checks."""
        with self._transaction():
            self._database.execute("DELETE FROM checks")
            self._database.execute("DELETE FROM rules")
            self._database.execute("INSERT INTO rules VALUES (?, NULL)", (self._rules,))

    @property
    def finished(self) -> bool:
        """Whether a scan by these rules came to its end, and all its checks are there."""
        return self._one("SELECT coalesce(finished, -1) = (SELECT count(*) FROM checks) FROM rules") == 1

    def want(self, keys: Iterable[bytes]) -> int:
        """Name the files that there are now; the checks of others are forgotten. Returns their number."""
        with self._transaction():
            self._database.executemany("INSERT OR IGNORE INTO wanted VALUES (?)", ((key,) for key in keys))
            self._database.execute("DELETE FROM checks WHERE key NOT IN (SELECT key FROM wanted)")
        return self._one("SELECT count(*) FROM wanted")

    def wanted(self) -> Iterator[list[tuple[bytes, tuple[int, int] | None]]]:
        """The wanted files in order, some at a time: the key, and size and time of its last check where it has one.
        Checks may be put meanwhile."""
        query = """SELECT wanted.key, bytes, mtime_ns FROM wanted LEFT JOIN checks USING (key)
                   WHERE wanted.key > ? ORDER BY wanted.key LIMIT ?"""
        last = b""
        while rows := self._database.execute(query, (last, BATCH)).fetchall():
            yield [(key, None if size is None else (size, mtime)) for key, size, mtime in rows]
            last = rows[-1][0]

    def put(self, checks: Iterable[Check]) -> None:
        """Keep some checks, in place of those with the same keys."""
        rows = ((*row, _sum(row)) for row in (list(vars(check).values()) for check in checks))
        while batch := list(islice(rows, BATCH)):
            with self._transaction():
                self._database.executemany("INSERT OR REPLACE INTO checks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", batch)

    def finish(self) -> None:
        """All checks are put: tell which of equal pictures comes first."""
        with self._transaction():
            self._database.execute("UPDATE rules SET finished = (SELECT count(*) FROM checks)")
            # SQLite takes the other columns from the row of the minimum.
            self._database.execute(
                """INSERT INTO firsts SELECT sha256, min(key), path FROM checks WHERE reason IS NULL
                   GROUP BY sha256 HAVING count(*) > 1"""
            )

    def share(self, details: Mapping[str, str], limit: int | None) -> None:
        """Leave out the samples with these ids for the reasons given, and what comes after `limit` others."""
        with self._transaction():
            samples = self.samples(None) if details else ()
            rows = ((sample.sha256, details[sample.id]) for sample in samples if sample.id in details)
            found = ((bytes.fromhex(digest), detail) for digest, detail in rows)
            # Not at once into the table that the samples are read with.
            self._database.execute("CREATE TEMP TABLE found (sha256 BLOB, detail TEXT)")
            self._database.executemany("INSERT INTO found VALUES (?, ?)", found)
            self._database.execute("INSERT INTO shared SELECT * FROM found")
            self._database.execute("DROP TABLE found")
        self._limit = -1 if limit is None else limit

    # --- reading -----------------------------------------------------------------------------------------------------

    def samples(self, store: Path | None) -> Iterator[Sample]:
        """The usable pictures in order, each once; those of a table lie in `store`."""
        for digest, path, stored in self._database.execute(f"SELECT sha256, path, stored {_KEPT} LIMIT {self._limit}"):
            name = digest.hex()
            where = os.fspath(store.absolute() / stored) if store and stored else path
            yield Sample(id=name[:16], path=where, sha256=name)

    def skipped(self) -> Iterator[Skipped]:
        """The others in order, with the reason; but for those after the limit that could be used."""
        rows = self._database.execute(
            """SELECT checks.path, coalesce(reason, CASE WHEN first <> checks.key THEN 'duplicate' ELSE 'in_test' END),
                   CASE WHEN reason IS NOT NULL THEN checks.detail
                        WHEN first <> checks.key THEN 'same content as ' || name
                        ELSE shared.detail END
               FROM checks LEFT JOIN firsts USING (sha256) LEFT JOIN shared USING (sha256)
               WHERE reason IS NOT NULL OR first <> checks.key OR (shared.sha256 IS NOT NULL AND checks.key <= ?)
               ORDER BY checks.key""",
            (self._last(),),
        )
        return (Skipped(*row) for row in rows)

    @property
    def unread(self) -> bool:
        """Whether there are files that the system did not give: a later scan tries them again."""
        return self._one(f"SELECT count(*) FROM checks WHERE mtime_ns = {UNREAD}") > 0

    def stored(self) -> Iterator[tuple[str, int]]:
        """The files in a table's store, with their sizes."""
        yield from self._database.execute("SELECT stored, bytes FROM checks WHERE stored <> ''")

    def _last(self) -> bytes:
        """The key of the last picture within the limit, or one after all."""
        row = self._database.execute(f"SELECT checks.key {_KEPT} LIMIT 1 OFFSET ?", (self._limit - 1,)).fetchone()
        return row[0] if self._limit > 0 and row else b"\xff" * 8

    def _one(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])

    def _transaction(self) -> Any:
        self._database.execute("BEGIN")
        return self._database


def copy_cache(cache: Path, to: Path) -> None:
    """Copy what a scan keeps, though a run may be writing there. Raises `sqlite3.DatabaseError` where it is damaged."""
    address = f"{cache.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True)) as there, closing(sqlite3.connect(to)) as here:
        _check_file(there, cache)
        there.backup(here)


def _connect(path: Path | None) -> sqlite3.Connection:
    # SQLite's own name for a database that lies in a temporary file is the empty one. The file may be locked while it
    # is copied.
    return sqlite3.connect(path or "", PATIENCE_SECONDS, isolation_level=None)


def _check_file(database: sqlite3.Connection, path: Path | None) -> None:
    """What SQLite does not take for damage: of a last page that is cut off it takes the rest for zeros, and other
    versions in the header forbid it to write."""
    if path is None:
        return
    with path.open("rb") as file:
        versions = file.read(20)[18:]
    if path.stat().st_size % database.execute("PRAGMA page_size").fetchone()[0] or versions not in (b"", b"\1\1"):
        raise sqlite3.DatabaseError(f"{path} is cut off, or its header is another")


def _schema() -> list[tuple[str]]:
    """The tables as SQLite notes them in the file."""
    with closing(sqlite3.connect("")) as new:
        new.executescript(_TABLES)
        return new.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()


def _sum(row: list[Any]) -> int:
    """Of one row as `Check` has it. A million are summed each time a run goes on, so not of their `repr`."""
    key, path, size, mtime_ns, sha256, *told = row
    if not isinstance(key, bytes) or not isinstance(sha256, bytes):
        return -1  # a bit of its type flipped
    return zlib.crc32(b"%b\0%b\0%b" % (key, sha256, f"{path}\0{size}\0{mtime_ns}\0{told}".encode()))
