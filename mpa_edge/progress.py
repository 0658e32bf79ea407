"""How far long work is, on the error stream: a bar in a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from mpa_edge.parts import Advance
from mpa_edge.terminal import shown
from mpa_edge.watching import rejected, tell_progress

Tell = Callable[[int, int], object]

SECONDS_PER_LINE = 30.0
INSTANT = 1.0


class _Rate(TextColumn):
    """Rows per second, by rich's own moving estimate."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Bar) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show how far the body is while it runs; the body calls what it gets with the number just done."""
    done = 0
    with counting(label, total) as tell:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            tell(done, total)

        yield advance


@contextmanager
def counting(label: str, total: int | None = None) -> Iterator[Tell]:
    """The same for a body that calls what it gets with the number done so far and the number there are."""
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(label)
        yield _telling(label, lines.tell)
        lines.close()
        return
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rejects]}"),
    )
    with Progress(*columns, console=console) as display:
        task = display.add_task(label, total=total, rejects="")
        yield _telling(label, lambda done, of: display.update(task, completed=done, total=of, rejects=_rejects()))


def _telling(label: str, tell: Tell) -> Tell:
    """Tell those who watch the run, too."""

    def both(done: int, of: int) -> None:
        tell_progress(label, done, of)
        tell(done, of)

    return both


def _rejects() -> str:
    count = rejected.total()
    return f"{count:,} rejected" if count else ""


class Lines:
    """Progress as plain lines, for logs: count, rate since the line before, and time left at that rate."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._done = self._of = self._told = 0
        self._start = self._last = time.monotonic()

    def tell(self, done: int, of: int) -> None:
        """So many are done, of so many."""
        now = time.monotonic()
        if now - self._start < INSTANT:
            self._told = done  # found on disk by a resume: no work, which would spoil the rate
        self._done, self._of = done, of
        if now - self._last >= SECONDS_PER_LINE and done < of:
            rate = (done - self._told) / (now - self._last)
            left = f", {_clock((of - done) / rate)} left" if rate else ""
            rejects = f", {_rejects()}" if rejected else ""
            say(f"{self._label}: {done:,} of {of:,}, {rate:.1f}/s{left}{rejects}")
            self._last, self._told = now, done

    def close(self) -> None:
        """Say that it is over, and how long it took, if there was anything to do."""
        if self._of:
            say(f"{self._label}: {self._done:,} of {self._of:,} in {_clock(time.monotonic() - self._start)}")


def say(text: str) -> None:
    """A line on the error stream."""
    print(shown(text), file=sys.stderr, flush=True)  # noqa: T201


def _clock(seconds: float) -> str:
    """0:00:42"""
    return str(timedelta(seconds=round(seconds)))
