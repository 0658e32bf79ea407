"""Who wants to know how far a run is: a log, a metrics file. Stages tell; whoever watches hears of it at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol


class Watcher(Protocol):
    """Hears of a run. May be called from several threads."""

    def progress(self, stage: str, done: int, of: int) -> None:
        """So many are done, of so many."""
        ...

    def finished(self, stage: str, facts: Mapping[str, Any]) -> None:
        """A stage is done; `facts` are what `run.json` says of it."""
        ...


_watchers: list[Watcher] = []
# Annotations that this process rejected, by reason.
rejected: Counter[str] = Counter()


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher what happens in the body."""
    _watchers.append(watcher)
    rejected.clear()
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell_progress(stage: str, done: int, of: int) -> None:
    """So many are done, of so many."""
    for watcher in _watchers:
        watcher.progress(stage, done, of)


def tell_finished(stage: str, facts: Mapping[str, Any]) -> None:
    """A stage is done."""
    for watcher in _watchers:
        watcher.finished(stage, facts)


def tell_rejected(reasons: Iterable[str | None]) -> None:
    """The reasons of new annotations; None for those that can be used."""
    rejected.update(reason for reason in reasons if reason is not None)
