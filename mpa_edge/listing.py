"""What lies where a run's pictures come from, by names, sizes and times: a resume that finds it as it was opens none of
those that it asks about, and takes seconds for a million."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from mpa_edge.config import AlignConfig
from mpa_edge.datasets import MAX_BYTES, MIN_EDGE, find_files, table_named
from mpa_edge.errors import ImageError
from mpa_edge.labelled import pictures_in
from mpa_edge.overlap import RULES as OVERLAP_RULES
from mpa_edge.runtime.images import MAX_PIXELS

BATCH = 1024
# Raise it when another picture would be used, or more be noted of them.
RULES = 1


def listing_of(config: AlignConfig) -> str:
    """Names the files that `--images` and `--test` name, and what is to be done with them. In the order in which the
    system lists them: where that changes, they are looked at once more than needed. Raises `InputError` where there are
    none to be listed."""
    rules = (RULES, OVERLAP_RULES, MIN_EDGE, MAX_PIXELS, MAX_BYTES)
    settings = (config.images, config.limit, config.test, config.keep_shared, *rules)
    test = _test(config.test) if config.test else ()
    return _digest(chain([repr(settings).encode()], _pool(config.images), [b"\0test\0"], test))


def stored_in(store: Path) -> str:
    """Names the pictures of a table that a scan wrote."""
    return _digest(map(_line, find_files(store))) if store.is_dir() else ""


def _digest(lines: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    while batch := list(islice(lines, BATCH)):
        digest.update(b"".join(batch))
    return digest.hexdigest()


def _pool(source: str) -> Iterator[bytes]:
    if table := table_named(source):
        yield repr(table.fingerprint).encode()
    else:
        yield from map(_line, find_files(source))


def _test(source: str) -> Iterator[bytes]:
    for name, picture in pictures_in(source):
        if isinstance(picture, bytes):
            yield _named(name) + hashlib.sha256(picture).digest()
        elif isinstance(picture, ImageError):
            yield _named(name) + str(picture).encode(errors="replace")
        else:
            yield _line(os.fspath(picture))


def _line(path: str) -> bytes:
    try:
        status = os.stat(path)  # noqa: PTH116 (a million)
    except (OSError, ValueError):  # a NUL in the name
        return _named(path) + b"-\0"
    return _named(path) + b"%d %d\0" % (status.st_size, status.st_mtime_ns)


def _named(path: str) -> bytes:
    return path.encode(errors="surrogatepass") + b"\0"
