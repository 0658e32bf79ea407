"""The steps of an export as they are told: each by name when it begins, and with its time when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpa_edge.export.memory import give_back_memory


class Steps:
    """`steps("merge")` ends the step before and begins this one; leaving the `with` block ends the last."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._name: str | None = None
        self._start = 0.0

    def __call__(self, name: str) -> None:
        self._end()
        give_back_memory()
        self._name, self._start = name, time.perf_counter()
        self._tell(f"{name} …")

    def warn(self, text: str) -> None:
        """Tell what does not stop the export and should be known."""
        self._tell(f"warning: {text}")

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # a step that failed did not end
            self._end()

    def _end(self) -> None:
        if self._name is not None:
            self._tell(f"{self._name}: {time.perf_counter() - self._start:.1f} s")
            self._name = None
