"""Pictures without labels, for alignment: which of a folder, a glob, a list or a table can be used, and why others not.

Questions with labels, for the benchmark, are read by `mpa_edge.labelled`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from mpa_edge.errors import ImageError, InputError
from mpa_edge.parts import sweep
from mpa_edge.records import Sample
from mpa_edge.runtime.images import MAX_PIXELS, open_image
from mpa_edge.scan_index import UNREAD, Check, ScanIndex, Skipped
from mpa_edge.tables import ROWS, Table, is_there, keep, name_of, open_table, picture_bytes

Progress = Callable[[int, int], object]

# A picture with a shorter edge shows nothing that one could ask about.
MIN_EDGE = 8
# Files that a thread of the pool is given at a time.
SLICE = 64
# Files of this size and less are decoded so fast that threads wait for each other most of the time: of 12x12 pictures
# one thread checks 9,400 in a second and two 4,000, of 224x224 2,200 and 1,800, of 500x500 260 and 770.
SMALL_BYTES = 8 << 10
# A larger file is a mistake rather than a photo, and would be read into memory whole.
MAX_BYTES = 256 << 20
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# What `Path` changes in a name. It takes its time, and lists may be long.
_UNCLEAN = re.compile(r"/\.?(/|$)" if os.sep == "/" else "")
LIST_SUFFIXES = frozenset((".lst", ".list", ".txt"))


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
    """As `scan`, with the results in lists."""
    settings: dict[str, Any] = {"min_edge": min_edge, "limit": limit, "workers": workers, "progress": progress}
    with scan(source, store=store, cache=cache, **settings) as index:
        return list(index.samples(store)), list(index.skipped())


def scan(
    source: str | Path,
    *,
    min_edge: int = MIN_EDGE,
    store: Path | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ScanIndex:
    """The usable pictures of a folder (with its subfolders), a glob, a text file with one path per line, or a table:
    parquet files and datasets (`mpa_edge.tables`). The caller closes what is returned.

    Every picture is decoded. Samples and skipped files are in the order of the paths or rows; each file that was found
    is in one of them, but for hidden ones. A sample's id comes from its content and stays when the file moves; of equal
    files the first one counts. `cache` names a file that remembers the outcome per file, so that the next scan opens
    only files that are new or changed. `progress` is called with (done, of). Memory does not grow with the pictures.

    The pictures of a table are written to the folder `store`, once, named by their content; after `limit` usable ones
    the rest of its rows is not looked at. Raises `InputError` where there is no usable picture, and `MissingExtra`.
    """
    table = table_named(source)
    if table and store is None:
        raise InputError(f"--images {source}: a folder for the pictures of a table is needed")
    rules: dict[str, Any] = {"min_edge": min_edge, "max_pixels": MAX_PIXELS, "max_bytes": MAX_BYTES}
    rules |= {"table": table.fingerprint, "limit": limit} if table else {}
    index = ScanIndex(cache, rules)
    try:
        with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
            if table and store:
                _scan_rows(table, store, index, min_edge, limit, pool, progress)
            else:
                _scan_files(source, index, min_edge, pool, progress)
        index.finish()
        if next(index.samples(store), None) is None:
            raise InputError(
                f"--images {source}: no usable picture ({counts_by_reason(index.skipped()) or 'no files'})"
            )
    except BaseException:
        index.close()
        raise
    return index


def table_named(source: str | Path) -> Table | None:
    """The table that `--images` names, None where it names files. A folder with any picture is a folder of pictures."""
    folder = Path(source).expanduser()
    names = _walk(os.fspath(folder.absolute())) if folder.is_dir() else iter(())
    if any(Path(name).suffix.lower() in SUFFIXES for name in names):
        return None
    return open_table(source, flag="--images", extra="align", split="train")


# --- files -----------------------------------------------------------------------------------------------------------


def _scan_files(
    source: str | Path, index: ScanIndex, min_edge: int, pool: ThreadPoolExecutor, progress: Progress | None
) -> None:
    """The checks of the files, some at a time: what waits in a pool takes more memory than what comes out."""
    done, count = 0, index.want(os.fsencode(name) for name in find_files(source))
    by_name = _chosen_by_name(source)
    each: Callable[..., Iterator[list[Check | None]]] = pool.map
    for files in index.wanted():
        slices = [files[start : start + SLICE] for start in range(0, len(files), SLICE)]
        found: list[Check] = []
        try:
            for checks in each(lambda part: [_check(key, known, min_edge, by_name) for key, known in part], slices):
                found += (check for check in checks if check is not None)
                done += len(checks)
                if progress:
                    progress(done, count)
        finally:  # Ctrl-C too
            index.put(found)
        each = map if sum(check.bytes for check in found) < SMALL_BYTES * len(found) else pool.map


def _chosen_by_name(source: str | Path) -> bool:
    """Whether files with other names than a picture's are left alone: not where each is named."""
    return not Path(source).expanduser().is_file()


def find_files(source: str | Path) -> Iterator[str]:
    """The absolute paths of the files that a source names, in no order. Raises `InputError` where there is no such
    folder or file, or a list cannot be read."""
    root = Path(source).expanduser()
    if root.is_dir():
        yield from _walk(os.fspath(root.absolute()))
    elif root.is_file() and root.suffix.lower() in LIST_SUFFIXES:
        yield from _read_list(root)
    elif root.is_file():
        yield os.fspath(root.absolute())
    else:
        found = False
        for name in glob.iglob(os.fspath(root), recursive=True):  # noqa: PTH207 (Path.glob refuses absolute patterns)
            if Path(name).is_file():
                found = True
                yield os.fspath(Path(name).absolute())
        if not found:
            raise InputError(f"--images {source}: no such folder or file, and no file matches it as a pattern")


def _walk(root: str) -> Iterator[str]:
    """The files below a folder, in no order. Not `os.walk`, which holds all names of a folder."""
    folders = [root]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        yield entry.path
                    elif not entry.is_symlink():
                        folders.append(entry.path)
        except OSError:
            continue  # a folder that may not be read


def _read_list(path: Path) -> Iterator[str]:
    folder = path.parent.absolute()
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                if name := line.strip():
                    name = os.path.join(folder, name)  # noqa: PTH118
                    yield os.fspath(Path(name)) if _UNCLEAN.search(name) else name
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--images {path}: not a text file with one path per line ({error})") from error


def _check(key: bytes, known: tuple[int, int] | None, min_edge: int, by_name: bool) -> Check | None:
    """None where size and time are those that are known."""
    name = _printable(key)
    if by_name and os.path.splitext(name)[1].lower() not in SUFFIXES:  # noqa: PTH122 (a million names)
        return Check(key, name, reason="not_an_image")
    if name.encode() != key:
        return Check(key, name, reason="unreadable", detail="the file name is not valid UTF-8")
    if "\0" in name:  # from a list; no call of the system takes it
        return Check(key, name, reason="unreadable", detail="the file name holds a NUL")
    found: tuple[int, int] = (0, 0)
    sha256 = b""
    try:
        status = os.stat(key)  # noqa: PTH116
        found = (status.st_size, status.st_mtime_ns)
        if known == found:
            return None
        data = _read(Path(name), status)
        sha256 = hashlib.sha256(data).digest()
        open_image(data, min_edge=min_edge)
    except FileNotFoundError:
        return Check(key, name, reason="missing")
    except OSError as error:
        return Check(key, name, mtime_ns=UNREAD, reason="unreadable", detail=error.strerror or str(error))
    except ImageError as error:
        return Check(key, name, *found, sha256, error.reason, error.detail)
    return Check(key, name, *found, sha256)


def _read(path: Path, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        raise ImageError(path, "unreadable", "not a regular file")
    if status.st_size > MAX_BYTES:
        raise ImageError(path, "too_large", f"{status.st_size:,} bytes, at most {MAX_BYTES:,}")
    return path.read_bytes()


# --- tables ----------------------------------------------------------------------------------------------------------


def _scan_rows(
    table: Table,
    store: Path,
    index: ScanIndex,
    min_edge: int,
    limit: int | None,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> None:
    """The checks of a table's rows, unless those are there with their pictures."""
    if index.finished and all(is_there(store / name, size) for name, size in index.stored()):
        return
    index.clear()
    checks = _checked_rows(table, store, min_edge, pool, progress)
    index.put(checks if limit is None else _up_to(limit, checks))


def _up_to(usable: int, checks: Iterable[Check]) -> Iterator[Check]:
    """Checks up to so many of usable pictures that differ. Which were there is kept in a temporary file."""
    with closing(sqlite3.connect("")) as seen:
        seen.execute("CREATE TABLE contents (sha256 PRIMARY KEY) WITHOUT ROWID")
        for check in checks:
            yield check
            if check.stored:
                usable -= seen.execute("INSERT OR IGNORE INTO contents VALUES (?)", (check.sha256,)).rowcount
                if not usable:
                    return


def _checked_rows(
    table: Table, store: Path, min_edge: int, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[Check]:
    """The checks of a table's rows, some rows at a time: what the pool is given at once lies in memory."""
    store.mkdir(parents=True, exist_ok=True)
    sweep(store)
    column = table.picture_column()
    rows = enumerate(table.rows([column]))
    done = 0
    while batch := list(islice(rows, ROWS)):
        checks = pool.map(lambda row: _check_row(row[0], row[1][0], row[1][1], row[1][2][column], min_edge), batch)
        for check, data in checks:
            done += 1
            if check.stored:
                keep(store / check.stored, data)
            yield check
        if progress:
            progress(done, table.count)


def _check_row(number: int, place: str, root: Path, cell: Any, min_edge: int) -> tuple[Check, bytes]:
    key = number.to_bytes(8, "big")
    try:
        data = picture_bytes(cell, root, MAX_BYTES)
        open_image(data, min_edge=min_edge)
        name = name_of(data)
    except ImageError as error:
        return Check(key, place, reason=error.reason, detail=error.detail), b""
    return Check(key, place, len(data), sha256=bytes.fromhex(Path(name).stem), stored=name), data


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "replace")


def counts_by_reason(skipped: Iterable[Skipped]) -> str:
    """The reasons with their counts, for a message: "3 unreadable, 1 too_small"."""
    counts = Counter(item.reason for item in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
