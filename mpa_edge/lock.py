"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpa_edge.errors import InputError, RunLocked
from mpa_edge.parts import sweep

LOCK = ".lock"


@contextmanager
def locked(folder: Path, flag: str | None) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, and sweep what a killed one left half-written.

    The lock is the kernel's (flock): it ends with the process that holds it, however that dies. `flag` is what people
    type to name the folder, None where they cannot choose another. Raises `RunLocked` when another process is in it,
    and `InputError` for a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        who = f"{flag} {folder}" if flag else str(folder)
        raise InputError(f"{who}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(folder, flag) from None
        sweep(folder)
        yield
