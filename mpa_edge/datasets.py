"""Pictures without labels, for alignment: which of a folder, a glob, a list or a table can be used, and why others not.

Questions with labels, for the benchmark, are read by `mpa_edge.labelled`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mpa_edge.errors import ImageError, InputError
from mpa_edge.parts import sweep
from mpa_edge.records import Record, Sample, write_rows
from mpa_edge.runtime.images import MAX_PIXELS, open_image
from mpa_edge.tables import ROWS, Table, is_there, keep, name_of, open_table, picture_bytes

Progress = Callable[[int, int], object]

# A picture with a shorter edge shows nothing that one could ask about.
MIN_EDGE = 8
# Files that the pool is given at a time.
FILES = 1024
# A larger file is a mistake rather than a photo, and would be read into memory whole.
MAX_BYTES = 256 << 20
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
LIST_SUFFIXES = frozenset((".lst", ".list", ".txt"))


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


def scan_images(
    source: str | Path,
    *,
    min_edge: int = MIN_EDGE,
    store: Path | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Sample], list[Skipped]]:
    """The usable pictures of a folder (with its subfolders), a glob, a text file with one path per line, or a table:
    parquet files and datasets (`mpa_edge.tables`).

    Every picture is decoded. Both results are in the order of the paths or rows; each file that was found is in one of
    them, but for hidden ones. A sample's id comes from its content and stays when the file moves; of equal files the
    first one counts. `cache` names a file that remembers the outcome per file, so that the next scan opens only files
    that are new or changed. `progress` is called with (done, of).

    The pictures of a table are written to the folder `store`, once, named by their content; after `limit` usable ones
    the rest of its rows is not looked at. Raises `InputError` where there is no usable picture, and `MissingExtra`.
    """
    rules: dict[str, Any] = {"min_edge": min_edge, "max_pixels": MAX_PIXELS, "max_bytes": MAX_BYTES}
    others: list[Path] = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        if table := table_named(source):
            if store is None:
                raise InputError(f"--images {source}: a folder for the pictures of a table is needed")
            rules |= {"table": table.fingerprint, "limit": limit}
            checks = _read_stored(cache, rules, store)
            checks = checks or list(_checked_rows(table, store, min_edge, limit, pool, progress))
        else:
            paths, others = _find(source)
            names = [os.fspath(path) for path in paths]
            del paths  # of a hundred thousand, they are large
            known = {check.path: check for check in _read_cache(cache, rules)}
            checks = list(_checked_files(names, known, min_edge, pool, progress))
    if cache:
        write_rows(cache, [rules, *checks])
    samples, skipped = _drop_duplicates(checks, store)
    skipped.extend(Skipped(_printable(path), "not_an_image") for path in others)
    if not samples:
        raise InputError(f"--images {source}: no usable picture ({counts_by_reason(skipped) or 'no files'})")
    return samples, skipped if table else sorted(skipped, key=lambda item: item.path)


def table_named(source: str | Path) -> Table | None:
    """The table that `--images` names, None where it names files. A folder with any picture is a folder of pictures."""
    folder = Path(source).expanduser()
    if folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in _walk(folder)):
        return None
    return open_table(source, flag="--images", extra="align", split="train")


@dataclass(frozen=True)
class _Check(Record):
    """What a scan found out about one file, and how to see that the file is still the same; or about one row of a
    table, whose picture is then the file `stored` in the store."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    reason: str | None = None
    detail: str = ""
    stored: str = ""


def _checked_files(
    names: list[str], known: dict[str, _Check], min_edge: int, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[_Check]:
    for start in range(0, len(names), FILES):  # what waits in a pool takes more memory than what comes out
        batch = names[start : start + FILES]
        checks = pool.map(lambda name: _check(Path(name), min_edge, known.get(name)), batch)
        for number, check in enumerate(checks, start + 1):
            yield check
            if progress:
                progress(number, len(names))


def _checked_rows(
    table: Table, store: Path, min_edge: int, limit: int | None, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[_Check]:
    """The checks of a table's rows, some rows at a time: what the pool is given at once lies in memory."""
    store.mkdir(parents=True, exist_ok=True)
    sweep(store)
    column = table.picture_column()
    rows = table.rows([column])
    done, usable = 0, set[str]()
    while batch := list(islice(rows, ROWS)):
        for check, data in pool.map(lambda row: _check_row(row[0], row[1], row[2][column], min_edge), batch):
            done += 1
            if check.stored:
                usable.add(check.sha256)
                keep(store / check.stored, data)
            yield check
            if limit is not None and len(usable) >= limit:
                return
        if progress:
            progress(done, table.count)


def _check_row(place: str, root: Path, cell: Any, min_edge: int) -> tuple[_Check, bytes]:
    try:
        data = picture_bytes(cell, root, MAX_BYTES)
        open_image(data, min_edge=min_edge)
        name = name_of(data)
    except ImageError as error:
        return _Check(place, 0, 0, "", error.reason, error.detail), b""
    return _Check(place, len(data), 0, Path(name).stem, stored=name), data


def _find(source: str | Path) -> tuple[list[Path], list[Path]]:
    """The files to open and the files that are no pictures by their name, both sorted."""
    root = Path(source).expanduser()
    if root.is_dir():
        found = list(_walk(root))
    elif root.is_file() and root.suffix.lower() in LIST_SUFFIXES:
        return sorted(set(_read_list(root)), key=os.fspath), []
    elif root.is_file():
        return [root.absolute()], []
    else:
        names = glob.glob(os.fspath(root), recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
        found = [Path(name).absolute() for name in names if Path(name).is_file()]
        if not found:
            raise InputError(f"--images {source}: no such folder or file, and no file matches it as a pattern")
    found.sort(key=os.fspath)
    pictures = [path for path in found if path.suffix.lower() in SUFFIXES]
    return pictures, [path for path in found if path.suffix.lower() not in SUFFIXES]


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root.absolute()):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--images {path}: not a text file with one path per line ({error})") from error
    return [(path.parent / line.strip()).absolute() for line in lines if line.strip()]


def _check(path: Path, min_edge: int, known: _Check | None) -> _Check:
    name = _printable(path)
    if name != os.fspath(path):
        return _Check(name, 0, 0, "", "unreadable", "the file name is not valid UTF-8")
    try:
        status = path.stat()
        if known and (known.bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return known
        data = _read(path, status.st_size)
        sha256 = hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        return _Check(name, 0, 0, "", "missing")
    except OSError as error:
        return _Check(name, 0, 0, "", "unreadable", error.strerror or str(error))
    except ImageError as error:
        return _Check(name, status.st_size, status.st_mtime_ns, "", error.reason, error.detail)
    try:
        open_image(data, min_edge=min_edge)
    except ImageError as error:
        return _Check(name, status.st_size, status.st_mtime_ns, sha256, error.reason, error.detail)
    return _Check(name, status.st_size, status.st_mtime_ns, sha256)


def _read(path: Path, size: int) -> bytes:
    if not path.is_file():  # a pipe would be waited for without end
        raise ImageError(path, "unreadable", "not a regular file")
    if size > MAX_BYTES:
        raise ImageError(path, "too_large", f"{size:,} bytes, at most {MAX_BYTES:,}")
    return path.read_bytes()


def _drop_duplicates(checks: Iterable[_Check], store: Path | None) -> tuple[list[Sample], list[Skipped]]:
    first: dict[str, str] = {}
    samples, skipped = [], []
    for check in checks:
        if check.reason:
            skipped.append(Skipped(check.path, check.reason, check.detail))
        elif check.sha256 in first:
            skipped.append(Skipped(check.path, "duplicate", f"same content as {first[check.sha256]}"))
        else:
            first[check.sha256] = check.path
            path = os.fspath(store.absolute() / check.stored) if store and check.stored else check.path
            samples.append(Sample(id=check.sha256[:16], path=path, sha256=check.sha256))
    return samples, skipped


def _read_stored(path: Path | None, rules: dict[str, Any], store: Path) -> list[_Check]:
    """What an earlier scan of the same table found out, if all of its pictures are still in the store."""
    checks = _read_cache(path, rules)
    return checks if all(is_there(store / check.stored, check.bytes) for check in checks if check.stored) else []


def _read_cache(path: Path | None, rules: dict[str, Any]) -> list[_Check]:
    """What an earlier scan by the same rules found out; a cache that cannot be read is none."""
    if path is None or not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as lines:
            if json.loads(next(lines)) != json.loads(json.dumps(rules)):
                return []
            return [_Check.from_json(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError, StopIteration):
        return []


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def counts_by_reason(skipped: Iterable[Skipped]) -> str:
    """The reasons with their counts, for a message: "3 unreadable, 1 too_small"."""
    counts = Counter(item.reason for item in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
