"""What a disk that is full, or cannot be written, is called by the many libraries that write to it."""

from __future__ import annotations

import errno
import os
import re

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG)
# Where it is no `OSError` with a number: by Rust and C, by numpy, and by SQLite.
SAID = re.compile(rf"{re.escape(os.strerror(errno.ENOSPC))}|\d+ requested and \d+ written|^database or disk is full$")
SAID_CLOSED = re.compile(
    "|".join(rf"{re.escape(os.strerror(number))} \(os error {number}\)" for number in CLOSED)
    + "|^attempt to write a readonly database$|^disk I/O error$"
    + "|^unable to open (database file$|a temporary database file)"
)
# Somebody copies the folder for longer than we wait, or a network disk without locks.
SAID_LOCKED = re.compile(r"^database (table )?is locked|^locking protocol$")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a full disk."""
    return any(getattr(one, "errno", None) in FULL or SAID.search(str(one)) for one in _chain(error))


def disk_trouble(error: BaseException | None) -> str | None:
    """In a few words what is wrong with the disk, where an error, or one that led to it, says so; None otherwise."""
    for one in _chain(error):
        where = getattr(one, "filename", None)
        prefix = f"{where}: " if where else ""
        if getattr(one, "errno", None) in FULL or SAID.search(str(one)):
            return f"{prefix}no space left on the disk"
        if isinstance(one, OSError) and one.errno in CLOSED:
            return f"{prefix}{(one.strerror or str(one)).lower()}"
        if found := SAID_CLOSED.search(str(one)):
            return f"{prefix}{found[0].lower()}"
        if SAID_LOCKED.search(str(one)):
            return "the run's .scan.sqlite is locked: another program reads or copies it, or this disk keeps no locks"
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
