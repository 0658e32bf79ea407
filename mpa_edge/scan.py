"""The pictures of a run: those that `--images` names, without those that `--test` has too, up to `--limit`."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mpa_edge.config import AlignConfig
from mpa_edge.datasets import scan, table_named
from mpa_edge.disk import disk_trouble
from mpa_edge.errors import InputError, RunError
from mpa_edge.overlap import Overlap, find_shared
from mpa_edge.progress import counting, say
from mpa_edge.records import Sample
from mpa_edge.run_folder import RunFolder
from mpa_edge.scan_index import ScanIndex, Skipped

# What a run keeps of its scans, for the next one.
SCANNED, SHARED = ".scan.sqlite", ".shared.json"


@dataclass(frozen=True)
class Pictures:
    """What a run uses and leaves out, read from disk each time. `overlap` is what `--test` has too; None without one.
    With `keep_shared` these are used all the same."""

    index: ScanIndex
    store: Path
    overlap: Overlap | None = None
    keep_shared: bool = False

    def samples(self) -> Iterator[Sample]:
        """The pictures, in order."""
        return self.index.samples(self.store)

    def skipped(self) -> Iterator[Skipped]:
        """Those left out, in order, with the reason."""
        return self.index.skipped()

    @property
    def count(self) -> int:
        """How many there are."""
        return self._told[0]

    @property
    def digest(self) -> str:
        """Names the pictures, in their order, by their contents."""
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[int, str]:
        contents, count = hashlib.sha256(), 0
        for sample in self.samples():
            contents.update(f"{sample.sha256}\n".encode())
            count += 1
        return count, contents.hexdigest()

    @property
    def shared(self) -> int | None:
        """How many of the pictures, up to the last one that is used, `--test` has too."""
        if self.overlap is None or self.keep_shared:
            return self.overlap and len(self.overlap.shared)
        return sum(item.reason == "in_test" for item in self.skipped())


@contextmanager
def find_pictures(config: AlignConfig, run: RunFolder) -> Iterator[Pictures]:
    """The pictures, as long as the body runs.

    Raises `InputError` where no picture is left, or one of the two sources cannot be read, and `RunError` where what
    an earlier scan kept is damaged.
    """
    wanted, cache = config.limit, run.path / SCANNED
    if config.fresh and table_named(config.images):  # pictures that its rows name by a path may be others
        cache.unlink(missing_ok=True)
    try:
        while wanted != 0:
            with counting("scan") as tell:
                index = scan(config.images, store=run.images, limit=wanted, cache=cache, progress=tell)
            with index:
                pictures, wanted = _without_test(config, index, run, wanted)
                if wanted == 0:
                    yield pictures
    except sqlite3.DatabaseError as error:
        if disk_trouble(error):
            raise
        raise RunError(
            f"{cache} is damaged ({error}). Delete it, and type the same command again: it looks at the pictures anew."
        ) from error


def _without_test(
    config: AlignConfig, index: ScanIndex, run: RunFolder, wanted: int | None
) -> tuple[Pictures, int | None]:
    """The pictures, and how many of the source must be looked at where these are too few, else 0: `--limit` is of
    pictures that the test does not have, and a table is read no further than that takes."""
    if config.test is None or config.keep_shared:
        index.share({}, config.limit)
    if config.test is None:
        return Pictures(index, run.images), 0
    limit, cache = None if config.keep_shared else config.limit, run.path / SHARED
    found = find_shared(lambda: index.samples(run.images), config.test, limit=limit, cache=cache)
    looked = sum(1 for _ in index.samples(run.images))
    pictures = Pictures(index, run.images, found, config.keep_shared)
    if not config.keep_shared:
        index.share(found.shared, limit)
        if looked == wanted and sum(1 for _ in pictures.samples()) < (limit or 0):
            return pictures, looked + len(found.shared)
    if found.looked_at < found.pictures:
        say(f"--test {config.test}: only {found.looked_at} of its {found.pictures} pictures could be looked at")
    if next(pictures.samples(), None) is None:
        raise InputError(f"--images {config.images}: all pictures are in --test {config.test} too")
    return pictures, 0
