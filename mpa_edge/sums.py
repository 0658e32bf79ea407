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
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for found in filter(None, (re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line) for line in lines)):
        path = folder / found[2]
        if not path.is_file() or sha256_of(path) != found[1]:
            raise RunError(
                f"{path} is not as it was written. Delete {folder}, and type its mpa-edge align command again: the "
                f"student is trained anew from the rows that are there. (Where you changed it yourself, remove {SUMS}.)"
            )
