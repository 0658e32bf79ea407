"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
        if not _taken(file):
            raise RunLocked(folder, flag)
        sweep(folder)
        yield


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Keep a folder as it is while it is read, by several processes perhaps: whoever would be alone in it (`locked`) is
    refused meanwhile. Raises `RunLocked` where somebody is."""
    try:
        file = (folder / LOCK).open("a")
    except OSError:  # somebody else's run, which may be read only
        yield
        return
    with file:
        if not _taken(file, fcntl.LOCK_SH):
            raise RunLocked(folder, None)
        yield


def _taken(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Try it more than once: who looks whether a folder is locked (`mpa-edge status`) holds the lock for an instant."""
    for pause in (0.0, 0.05, 0.1):
        time.sleep(pause)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False
