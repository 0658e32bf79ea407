"""Digests of a finished folder's files beside them, as `sha256sum -c SHA256SUMS` reads them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from mpa_edge.bundle import sha256_of
from mpa_edge.errors import RunError
from mpa_edge.records import write_atomic

SUMS = "SHA256SUMS"


def write_sums(folder: Path, **coming: str) -> None:
    """Note the digests of a folder's files, and of a text that will be written there under a name; not of hidden files,
    nor of checkpoints, which pass."""
    kept = (path for path in folder.iterdir() if path.is_file() and not re.match(rf"\.|checkpoint|{SUMS}", path.name))
    sums = {path.name: sha256_of(path) for path in kept}
    sums |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in coming.items()}
    write_atomic(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def refuse_damaged(folder: Path) -> None:
    """`RunError` for a student of which a file is not as it was written. One without digests, of an older version, is
    taken as it is."""
    if damaged := _damaged(folder):
        raise RunError(
            f"{damaged} is not as it was written. Delete {folder}, and type its mpa-edge align command again: the "
            f"student is trained anew from the rows that are there. (Where you changed it yourself, remove {SUMS}.)"
        )


def _damaged(folder: Path) -> Path | None:
    """The first file that is; it may be that of the digests."""
    if not (folder / SUMS).exists():
        return None
    lines = (folder / SUMS).read_bytes().decode(errors="replace").splitlines()
    for line in lines or [""]:
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        path = folder / (found[2] if found else SUMS)
        if not found or not path.is_file() or sha256_of(path) != found[1]:
            return path
    return None
