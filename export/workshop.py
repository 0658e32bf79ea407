"""Where an export works: hidden folders beside the finished ones, renamed into place when all is done."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mpa_edge.errors import InputError


class Workshop:
    """Temporary folders beside the finished ones, removed at the end; those of processes that died are removed too."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> Workshop:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self._root}: cannot be written ({error.strerror})") from error
        for left in self._root.glob(".*.tmp"):
            owner = re.fullmatch(r"\..+\.(\d+)\.tmp", left.name)
            if owner and not _is_running(int(owner.group(1))):
                shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        for left in self._root.glob(f".*.{os.getpid()}.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """A temporary path; nothing is there yet."""
        return self._root / f".{name}.{os.getpid()}.tmp"

    def place(self, folder: Path, target: Path) -> None:
        """Put a finished folder in its place, and what was there away."""
        old = self.folder(f"{target.name}-old")
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
