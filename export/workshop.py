"""Where an export works: hidden folders beside the finished ones, renamed into place when all is done."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from mpa_edge.errors import ExportError, InputError

OLD = "-old"
# What a full disk is called where it is no `OSError` with a number: by Rust and C, and by numpy.
FULL = re.compile(rf"{re.escape(os.strerror(errno.ENOSPC))}|\d+ requested and \d+ written")


class Workshop:
    """Temporary folders beside the finished ones, removed at the end; those of processes that died are removed too.

    Raises `InputError` for a root that cannot be written, and `ExportError` for work that ran out of disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> Workshop:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self._root}: cannot be written ({error.strerror})") from error
        for left in self._root.glob(".*.tmp"):
            found = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", left.name)
            if found and not _is_another(int(found[2])):
                self._clear(left, found[1])
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for left in self._root.glob(f".*.{os.getpid()}.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        if _says_full(error):
            raise ExportError(
                f"--out {self._root}: no space left on its disk; what was begun is removed. Make room, or choose "
                "another --out"
            ) from error

    def folder(self, name: str) -> Path:
        """A temporary path; nothing is there yet."""
        return self._root / f".{name}.{os.getpid()}.tmp"

    def place(self, folder: Path, target: Path) -> None:
        """Put a finished folder in its place, and what was there away."""
        old = self.folder(f"{target.name}{OLD}")
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _clear(self, left: Path, name: str) -> None:
        """Remove what a dead process left; what it had put away, and nothing took its place, is put back."""
        target = self._root / name.removesuffix(OLD)
        if name.endswith(OLD) and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a full disk."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_another(process: int) -> bool:
    """Whether it runs and is not this one: in a container, the next run often has the number of the last."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
