"""Pictures without labels, for alignment: which files of a folder, a glob or a list can be used, and why others cannot.

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
from pathlib import Path

from mpa_edge.errors import ImageError, InputError
from mpa_edge.records import Record, Sample, write_rows
from mpa_edge.runtime.images import MAX_PIXELS, open_image

# A picture with a shorter edge shows nothing that one could ask about.
MIN_EDGE = 8
# A larger file is a mistake rather than a photo, and would be read into memory whole.
MAX_BYTES = 256 << 20
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
LIST_SUFFIXES = frozenset((".lst", ".list", ".txt"))


@dataclass(frozen=True)
class Skipped(Record):
    """A file, or a row of a file, that was left out; `reason` is a short stable slug, `detail` is for people.

    For files: `unreadable`, `truncated`, `too_small`, `too_large`, `duplicate` (the detail names the first one),
    `missing`, `not_an_image` (its name says so; it was not opened).
    """

    path: str
    reason: str
    detail: str = ""


def scan_images(
    source: str | Path,
    *,
    min_edge: int = MIN_EDGE,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[list[Sample], list[Skipped]]:
    """The usable pictures of a folder (with its subfolders), a glob, or a text file with one path per line.

    Every picture is decoded. Both results are in the order of the paths; each file that was found is in one of them,
    but for hidden ones. A sample's id comes from its content and stays when the file moves; of equal files the first
    one counts. `cache` names a file that remembers the outcome per file, so that the next scan opens only files that
    are new or changed. `progress` is called with (done, of). Raises `InputError` where there is no usable picture.
    """
    paths, others = _find(source)
    rules: dict[str, object] = {"min_edge": min_edge, "max_pixels": MAX_PIXELS, "max_bytes": MAX_BYTES}
    known = _read_cache(cache, rules)
    checks: list[_Check] = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for check in pool.map(lambda path: _check(path, min_edge, known.get(os.fspath(path))), paths):
            checks.append(check)
            if progress:
                progress(len(checks), len(paths))
    if cache:
        write_rows(cache, [rules, *checks])
    samples, skipped = _drop_duplicates(checks)
    skipped.extend(Skipped(_printable(path), "not_an_image") for path in others)
    if not samples:
        raise InputError(f"--images {source}: no usable picture ({counts_by_reason(skipped) or 'no files'})")
    return samples, sorted(skipped, key=lambda item: item.path)


@dataclass(frozen=True)
class _Check(Record):
    """What a scan found out about one file, and how to see that the file is still the same."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    reason: str | None = None
    detail: str = ""


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


def _drop_duplicates(checks: Iterable[_Check]) -> tuple[list[Sample], list[Skipped]]:
    first: dict[str, str] = {}
    samples, skipped = [], []
    for check in checks:
        if check.reason:
            skipped.append(Skipped(check.path, check.reason, check.detail))
        elif check.sha256 in first:
            skipped.append(Skipped(check.path, "duplicate", f"same content as {first[check.sha256]}"))
        else:
            first[check.sha256] = check.path
            samples.append(Sample(id=check.sha256[:16], path=check.path, sha256=check.sha256))
    return samples, skipped


def _read_cache(path: Path | None, rules: dict[str, object]) -> dict[str, _Check]:
    """What an earlier scan by the same rules found out; a cache that cannot be read is none."""
    if path is None or not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as lines:
            if json.loads(next(lines)) != rules:
                return {}
            checks = [_Check.from_json(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError, StopIteration):
        return {}
    return {check.path: check for check in checks}


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def counts_by_reason(skipped: Iterable[Skipped]) -> str:
    """The reasons with their counts, for a message: "3 unreadable, 1 too_small"."""
    counts = Counter(item.reason for item in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
