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
from mpa_edge.run_events import without_secrets
from mpa_edge.terminal import in_one_line, shown

# What Ctrl-C, a service manager, a batch system or a closed terminal sends; of most Python would die without a word.
ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
# What we send ourselves where one was lost, and after how long.
REMINDER, REMIND_SECONDS = "SIGALRM", 0.1


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


def run_and_leave(app: Callable[[], object]) -> None:
    """As `run`, for a process that ends then: what it still does by itself, Ctrl-C ends without a traceback."""
    try:
        run(app)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    """Raise `Ended` where a signal asks for the end.

    Python drops what is raised in a `__del__`, or in a callback of the garbage collector or a C library. Then it is
    raised again soon, and at the end, where nobody answered it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def answer(number: int, frame: FrameType | None) -> NoReturn:
        if not asked or number != numbers.get(REMINDER):
            asked.append(number)
            if numbers.get(REMINDER) in before:
                signal.setitimer(signal.ITIMER_REAL, 0)  # whoever tidies up after this one is left in peace
        raise Ended(asked[-1])

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Ended):
            tell(what)
        elif numbers.get(REMINDER) in before:
            signal.setitimer(signal.ITIMER_REAL, REMIND_SECONDS)

    numbers = {name: getattr(signal, name) for name in (*ENDING, REMINDER) if hasattr(signal, name)}
    # One that is ignored stays so: nohup.
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in numbers.values() if signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, answer)
    tell, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
        if asked:
            raise Ended(asked[-1])
    finally:
        sys.unraisablehook = tell
        if asked and numbers.get(REMINDER) in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(line: str, code: int) -> NoReturn:
    # What was typed with --fresh must not be typed again with it: that would delete what is finished.
    told = line.replace(AGAIN, f"{AGAIN}, without --fresh,") if "--fresh" in sys.argv else line
    typer.echo(shown(without_secrets(told)), err=True)
    sys.exit(code)
