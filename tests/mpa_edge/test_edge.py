"""What ends a command is one line and an exit code: signals, and a disk that is full or may not be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mpa_edge import edge
from mpa_edge.disk import disk_trouble
from mpa_edge.records import write_atomic

# As in a terminal: under nohup, and in the background of a shell, signals are ignored, and children inherit that.
WAITING = """
import signal, time
from mpa_edge import edge
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
with edge.resumable():
    try:
        print("at work", flush=True)
        time.sleep(600)
    finally:
        print("tidied up", flush=True)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_in_one_line_after_tidying_up(name: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            process.send_signal(getattr(signal, name))
            out, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (code, "tidied up\n")
    assert told == "\nStopped. What is finished is kept: type the same command again to go on.\n"


# The signal that `sys.argv[1]` names comes in a `__del__`; {rest} is what the program does afterwards.
DROPPED = """
import signal, sys, time
from mpa_edge import edge
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
class Old:
    def __del__(self):
        signal.raise_signal(getattr(signal, sys.argv[1]))
        time.sleep(0)
with edge.resumable():
    Old()
    print("lost", flush=True)
    {rest}
print("went on", flush=True)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("rest", ["time.sleep(600)", "pass"])
def test_a_signal_that_python_drops_ends_all_the_same(name: str, code: int, rest: str) -> None:
    """What a `__del__` raises becomes "Exception ignored in"; the program went on and ended with 0."""
    command = [sys.executable, "-c", DROPPED.format(rest=rest), name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = "\nStopped. What is finished is kept: type the same command again to go on.\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "lost\n", told)


# All is done; Python ends, which takes some time where torch is loaded.
LEAVING = """
import atexit, signal, sys, time
from mpa_edge import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(time.sleep, 600)
atexit.register(print, "leaving", flush=True)
sys.argv[1:] = ["--version"]
cli.main()
"""


def test_ctrl_c_when_all_is_done_shows_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("mpa-edge ")
            assert process.stdout.readline() == "leaving\n"
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, told) == (-signal.SIGINT, "")


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with edge.resumable():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/photos/run/part-00003.jsonl")


def closed() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/photos/run")


def in_rust() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def closed_in_rust() -> None:
    raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


def in_sqlite() -> None:
    raise sqlite3.OperationalError("database or disk is full")


def locked_in_sqlite() -> None:
    raise sqlite3.OperationalError("database is locked")


def closed_in_sqlite() -> None:
    raise sqlite3.OperationalError("attempt to write a readonly database")


def underneath() -> None:
    try:
        full()
    except OSError as error:
        raise RuntimeError("it could not be saved") from error


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (full, "error: /photos/run/part-00003.jsonl: no space left on the disk."),
        (closed, "error: /photos/run: read-only file system."),
        (in_rust, "error: no space left on the disk."),
        (closed_in_rust, "error: permission denied (os error 13)."),
        (in_sqlite, "error: no space left on the disk."),
        (closed_in_sqlite, "error: attempt to write a readonly database."),
        (
            locked_in_sqlite,
            "error: the run's .scan.sqlite is locked: another program reads or copies it, or this disk keeps no locks.",
        ),
        (underneath, "error: /photos/run/part-00003.jsonl: no space left on the disk."),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_line(
    fail: Callable[[], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        edge.run(fail)
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told == f"{words} What is finished is kept: see to it, and type the same command again to go on.\n"


def test_a_bug_keeps_its_traceback() -> None:
    def bug() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        edge.run(bug)
    assert disk_trouble(ValueError("No such file or directory (os error 2)")) is None


def test_the_file_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SystemExit):
            edge.run(lambda: write_atomic(tmp_path / "part-00003.jsonl", b"x" * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"error: {tmp_path}/part-00003.jsonl: file too large. " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
