"""Where a command meets its user: what ends it becomes one line that says how to go on, and an exit code.

    an error of ours            1
    the disk: full, read-only   1
    Ctrl-C                      130
    SIGTERM, SIGHUP             143, 129

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from mpa_edge.disk import disk_trouble
from mpa_edge.errors import AGAIN, MpaEdgeError
from mpa_edge.terminal import in_one_line, shown

# What a service manager, a batch system or a closed terminal sends; Python would die of them without a word.
ENDING = ("SIGTERM", "SIGHUP")


class Ended(KeyboardInterrupt):
    """A signal asked for the end. Whatever tidies up after Ctrl-C does so after it too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(app: Callable[[], object]) -> None:
    """Run a command line; the errors that it raises become one clean line and exit code 1."""
    try:
        app()
    except MpaEdgeError as error:
        _end(f"error: {in_one_line(str(error))}", 1)
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        _end(f"error: {trouble}. What is finished is kept: see to it, and {AGAIN} to go on.", 1)


@contextmanager
def resumable() -> Iterator[None]:
    """Turn Ctrl-C, and the signals that ask for the end, into one line that says how to go on."""
    try:
        with _signals():
            yield
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        _end(f"\nStopped. What is finished is kept: {AGAIN} to go on.", 128 + number)


@contextmanager
def _signals() -> Iterator[None]:
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # One that is ignored stays so: nohup.
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(number)


def _end(line: str, code: int) -> NoReturn:
    # What was typed with --fresh must not be typed again with it: that would delete what is finished.
    told = line.replace(AGAIN, f"{AGAIN}, without --fresh,") if "--fresh" in sys.argv else line
    typer.echo(shown(told), err=True)
    sys.exit(code)
