"""Start a program, disturb it at a moment of its work, and see how it ends."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mpa_edge.benchmarks.fault_programs import environment

AT_MOST = 900.0
POLL = 0.01
# What a clear line is: it says what is wrong, how to go on, and no more than people read.
CLEAR = re.compile(r"^(error: .{20,900}|Stopped\. .{20,200})$", re.MULTILINE)
GO_ON = re.compile(
    r"again|choose another|--fresh|make room|delete|wait for|use (--|another|more)|start |name |lower |remove|"
    r"cannot be written",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Moment:
    """A moment in a program's work: after so many changes in its folder, and some seconds more."""

    changes: int
    seconds: float


@dataclass(frozen=True)
class Ended:
    """How a program ended. `hit` says whether what was to happen meanwhile did."""

    code: int
    said: str
    hit: bool = True
    moments: tuple[float, ...] = ()
    peak: int = 0

    @property
    def line(self) -> str:
        """The last line of what it said on the error stream."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1].strip()[:900] if lines else ""

    def unclear(self) -> str | None:
        """What is wrong with how a failure was told; None where it was told well."""
        if "Traceback" in self.said:
            return f"a traceback: {self.line}"
        found = CLEAR.search(self.said)
        if not found:
            return f"no clear line: {self.line!r}"
        return None if GO_ON.search(found[0]) else f"no way to go on: {found[0]}"


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The program in a session of its own, as in a terminal of its own; what it says goes to a file."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=environment(),
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path, *, hit: bool = True, moments: tuple[float, ...] = ()) -> Ended:
    """Wait for a program; one that does not end is killed, and has said nothing."""
    try:
        code = process.wait(AT_MOST)
    except subprocess.TimeoutExpired:
        kill(process, signal.SIGKILL)
        return Ended(process.wait(), "it did not end", hit, moments)
    return Ended(code, log.read_text(encoding="utf-8", errors="replace"), hit, moments)


def run(command: list[str]) -> Ended:
    """Run a program to its end."""
    return disturbed(command, Path(os.devnull), None, lambda process: None)


def disturbed(
    command: list[str], folder: Path, moment: Moment | None, fault: Callable[[subprocess.Popen[bytes]], None]
) -> Ended:
    """Run a program whose work shows in `folder`, and call `fault` at a moment; not, if it ends before."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "stderr"
        process = start(command, log)
        try:
            hit = moment is not None and reached(process, folder, moment)
            if hit:
                fault(process)
            return finish(process, log, hit=hit)
        finally:
            if process.poll() is None:
                kill(process, signal.SIGKILL)
                process.wait()


def reached(process: subprocess.Popen[bytes], folder: Path, moment: Moment) -> bool:
    """Wait for a moment; False when the program ended before."""
    seen, changes = state(folder), 0
    while changes < moment.changes:
        if process.poll() is not None:
            return False
        time.sleep(POLL)
        now = state(folder)
        changes += now != seen
        seen = now
    try:
        process.wait(moment.seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def watched(command: list[str], folder: Path, disk: Path) -> Ended:
    """Run a program and note when its folder changes, in seconds since the start, and the most bytes on the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "stderr"
        process, started = start(command, log), time.monotonic()
        seen, moments, peak = state(folder), [0.0], 0
        while process.poll() is None:
            time.sleep(POLL)
            peak = max(peak, used(disk))
            now = state(folder)
            if now != seen:
                moments.append(time.monotonic() - started)
                seen = now
        moments.append(time.monotonic() - started)
        return replace(finish(process, log, moments=tuple(moments)), peak=peak)


def moment_of(moments: tuple[float, ...], rng: random.Random) -> Moment:
    """Some moment: after any change of the folder, and before the next one as an undisturbed run had it."""
    changes = rng.randrange(len(moments) - 1)
    return Moment(changes, rng.random() * (moments[changes + 1] - moments[changes]))


def kill(process: subprocess.Popen[bytes], number: int) -> None:
    """Ctrl-C reaches the program and all that it started, as in a terminal; other signals the program alone."""
    with suppress(ProcessLookupError):
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)


def used(folder: Path) -> int:
    """Bytes that are taken on a folder's file system."""
    about = os.statvfs(folder)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def state(folder: Path) -> frozenset[tuple[str, int, int]]:
    """What changes when something in a folder does."""
    found: set[tuple[str, int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    about = entry.stat(follow_symlinks=False)
                    found.add((entry.path, about.st_mtime_ns, about.st_size))
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError:
            continue  # gone meanwhile
    return frozenset(found)
