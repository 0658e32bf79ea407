"""Where an export works: hidden folders beside the finished ones, renamed into place when all is done."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from mpa_edge.disk import is_full
from mpa_edge.errors import ExportError, InputError, RunError

LOCK, OLD = ".export.lock", "-old"


class Workshop:
    """Temporary folders beside the finished ones, removed at the end; those of processes that died are removed too.

    One at a time in a root, by a lock of the kernel's (flock): it ends with the process that holds it, and it holds
    where process ids say nothing, between containers that share a volume. Raises `RunError` where another one is at
    work, `InputError` for a root that cannot be written, and `ExportError` for work that ran out of disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held = ExitStack()

    def __enter__(self) -> Workshop:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = _locked(self._root / LOCK)
        except OSError as error:
            raise InputError(f"--out {self._root}: cannot be written ({error.strerror})") from error
        self._held.enter_context(lock)
        self._held.callback((self._root / LOCK).unlink, missing_ok=True)
        for left in self._root.glob(".*.tmp"):
            found = re.fullmatch(r"\.(.+)\.(\d+)\.tmp", left.name)
            if found:
                self._clear(left, found[1])
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for left in self._root.glob(f".*.{os.getpid()}.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        self._held.close()
        if is_full(error):
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


def _locked(path: Path) -> IO[str]:
    """The file, open and locked; `RunError` where another process has it."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have deleted it between our opening and locking it: then it keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise RunError(
                f"another mpa-edge export is at work in {path.parent}; wait for it, or choose another --out"
            ) from None
        file.close()
