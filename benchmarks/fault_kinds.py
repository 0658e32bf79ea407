"""What happens to a program, and what must be true afterwards.

    kill       SIGKILL, SIGTERM or Ctrl-C at a random moment, up to three times in a row
    full       the disk has room for a part of what the program writes: a tmpfs, made larger afterwards
    readonly   the folder may not be written, from the beginning or from a random moment on
    damage     a file is cut, emptied, zeroed at its end, or has one bit flipped; of a finished run or of a killed one
    server     the teacher's server answers 429, 500, 503, late, never, with rubbish, half, or not at all
    two        the same command a second time while the first is at work: refused

After each, the same command is typed again, and what it says is to be done is done. Then every file is as an
undisturbed run leaves it.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mpa_edge.benchmarks.fault_programs import Place, Program
from mpa_edge.benchmarks.fault_server import MANNERS, Teacher, Trouble
from mpa_edge.benchmarks.fault_watch import Ended, disturbed, kill, moment_of, run, used

KILLS = {"SIGKILL": (-9,), "SIGTERM": (143,), "SIGINT": (130,)}
ROOM = "512m"
# Root may write what is read-only; without these capabilities it is as anybody.
LIKE_ANYBODY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@dataclass
class Round:
    """One round while it lasts: what was done, what was seen, and what is wrong with it."""

    program: Program
    place: Place
    rng: random.Random
    wanted: dict[str, str]
    moments: tuple[float, ...]
    teacher: Teacher
    peak: int = 0
    fault: str = ""
    code: int | None = None
    said: str = ""
    cures: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    faults: int = 0

    @property
    def command(self) -> list[str]:
        """What is typed."""
        return self.program.command(self.place)

    def saw(self, ended: Ended, *, fault: str, codes: tuple[int, ...] | None = None) -> None:
        """Note how a disturbed program ended; `codes` are those that it must end with, 1 or its own otherwise."""
        self.faults += 1
        self.fault = f"{self.fault}; {fault}" if self.fault else fault
        self.code, self.said = ended.code, ended.line if ended.code else ""
        if ended.code not in (codes or (1, *self.program.codes)):
            self.problems.append(f"exit code {ended.code}: {ended.line}")
        if ended.code not in (*self.program.codes, -signal.SIGKILL) and (unclear := ended.unclear()):
            self.problems.append(unclear)
        if "Traceback" in ended.said and ended.code in self.program.codes:
            self.problems.append(f"a traceback, though all went well: {ended.line}")

    def nothing_torn(self) -> None:
        """What is there under a final name is whole at any moment; parts with failed rows differ."""
        out = self.place.out
        paths = (path for glob in self.program.whole for path in out.glob(glob))
        seen = {path.relative_to(out).as_posix() for path in paths if not path.with_suffix(".failed").exists()}
        here = {name: text for name, text in self.program.results(out).items() if name in seen}
        self.problems += [f"{name} is torn" for name, text in here.items() if self.wanted.get(name, text) != text]

    def again(self) -> None:
        """Type the same command until it ends well, and do what it says until then."""
        command = self.command
        for _ in range(4):
            ended = run(command)
            if ended.code in self.program.codes:
                self.cures.append("again")
                return self.compare()
            if unclear := ended.unclear():
                self.problems.append(unclear)
                return None
            command = self.cured(ended.line)
        self.problems.append(f"typed again four times: {self.said}")
        return None

    def cured(self, line: str) -> list[str]:
        """The command to type after doing what a line says."""
        self.said = line
        if found := re.search(r"\b[Dd]elete (it\b|/[^\s,;]+)", line):
            named = found[1] if found[1] != "it" else line[line.index("/") :].split()[0].rstrip(":;,.")
            path = Path(named)
            self.cures.append(f"delete {path.name}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            return self.command
        if "--fresh" in line:
            self.cures.append("fresh")
            return [*self.command, "--fresh"]
        self.cures.append("again")
        return self.command

    def compare(self) -> None:
        """Nothing lost, nothing twice, nothing else."""
        found = self.program.results(self.place.out)
        self.problems += [f"{name} is missing" for name in sorted(self.wanted.keys() - found.keys())]
        self.problems += [f"{name} is too much" for name in sorted(found.keys() - self.wanted.keys())]
        both = sorted(found.keys() & self.wanted.keys())
        others = [name for name in both if found[name] != self.wanted[name]]
        self.problems += [f"{name} is another{_where(found[name], self.wanted[name])}" for name in others]


def _where(found: str, wanted: str) -> str:
    """Where two texts part, in some words of each."""
    pairs = enumerate(zip(found, wanted, strict=False))
    at = max(0, next((place for place, (one, other) in pairs if one != other), min(len(found), len(wanted))) - 30)
    return f": {found[at : at + 80]!r}, not {wanted[at : at + 80]!r}"


def killed(this: Round) -> None:
    """Killed up to three times in a row."""
    for _ in range(this.rng.choice((1, 1, 2, 3))):
        name = this.rng.choice(sorted(KILLS))
        moment = moment_of(this.moments, this.rng)
        number = getattr(signal, name)

        def fault(process: subprocess.Popen[bytes], number: int = number) -> None:
            kill(process, number)

        ended = disturbed(this.command, this.place.out, moment, fault)
        if not ended.hit:
            break
        # Python itself dies without a word, before its first line of ours and after the last, when all is there.
        outside = moment.changes == 0 or this.program.results(this.place.out) == this.wanted
        silent = outside and ended.code in (1, -number)
        codes = (*KILLS[name], *this.program.codes, *((1, -number) if outside else ()))
        told = Ended(-signal.SIGKILL, ended.said) if silent else ended
        codes = (*codes, -signal.SIGKILL) if silent else codes
        this.saw(told, fault=f"{name} {moment.seconds:.2f} s after change {moment.changes}", codes=codes)
        this.code = ended.code
        this.nothing_torn()
    this.again()


def full(this: Round) -> None:
    """The disk fills up."""
    taken = used(this.place.now)
    room = taken + int(this.rng.random() * max(0, this.peak - taken))
    remount(this.place.now, f"{room // 1024}k")
    ended = run(this.command)
    this.saw(ended, fault=f"full after {(room - taken) // 1024} of {(this.peak - taken) // 1024} kB")
    this.nothing_torn()
    remount(this.place.now, ROOM)
    this.again()


def readonly(this: Round) -> None:
    """The folder may not be written."""
    command = [*LIKE_ANYBODY, *this.command] if os.geteuid() == 0 else this.command
    if this.rng.random() < 0.4:
        _writable(this.place.now, False)
        fault, ended = "read-only from the beginning", run(command)
    else:
        moment = moment_of(this.moments, this.rng)
        fault = f"read-only {moment.seconds:.2f} s after change {moment.changes}"
        ended = disturbed(command, this.place.out, moment, lambda process: _writable(this.place.now, False))
    this.saw(ended, fault=fault)
    this.nothing_torn()
    _writable(this.place.now, True)
    this.again()


def damage(this: Round) -> None:
    """A file is damaged: after the end, or after a kill."""
    if this.rng.random() < 0.5:
        shutil.rmtree(this.place.out, ignore_errors=True)
        shutil.copytree(this.place.wanted / this.program.name, this.place.out)
        when = "finished"
    else:
        moment = moment_of(this.moments, this.rng)
        disturbed(this.command, this.place.out, moment, lambda process: kill(process, signal.SIGKILL))
        when = f"killed {moment.seconds:.2f} s after change {moment.changes}"
    out = this.place.out
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.stat().st_size]
    files = [path for path in files if re.search(this.program.own, path.relative_to(out).as_posix())]
    if files:
        path = this.rng.choice(files)
        how = spoil(path, this.rng)
        this.fault = f"{path.relative_to(out)} {how}, {when}"
    else:
        this.fault = f"nothing there, {when}"
    this.faults += 1
    this.again()


def spoil(path: Path, rng: random.Random) -> str:
    """Damage a file; says how."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    how = rng.choice(("cut", "emptied", "zeroed from", "flipped a bit"))
    if how == "flipped a bit":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "zeroed from":
        data[at:] = bytes(len(data) - at)
    else:
        del data[at if how == "cut" else 0 :]
    path.write_bytes(data)
    return how if how == "emptied" else f"{how} at byte {at}"


def server(this: Round) -> None:
    """The teacher's server misbehaves: for some requests, or until somebody sees to it."""
    manner = this.rng.choice(MANNERS)
    count = this.rng.choice((1, 3, 10, 10_000))
    trouble = Trouble(manner, this.rng.randrange(1, 60), 60 if manner == "slow" else count)
    this.teacher.expect(trouble)
    ended = run(this.command)
    this.saw(ended, fault=f"{manner} {this.teacher.spoilt} times from request {trouble.first} on")
    this.teacher.expect(None)
    this.again()


def two(this: Round) -> None:
    """The second of two at work in one folder is refused, and harms nothing."""
    refusal: list[Ended] = []

    def second(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGSTOP)
        refusal.append(run(this.command))
        os.killpg(process.pid, signal.SIGCONT)

    # In its first third: it must still be at work then, and not each time is alike.
    moment = moment_of(this.moments[: 1 + len(this.moments) // 3], this.rng)
    moment = type(moment)(max(1, moment.changes), moment.seconds)
    ended = disturbed(this.command, this.place.out, moment, second)
    this.saw(
        ended, fault=f"a second one {moment.seconds:.2f} s after change {moment.changes}", codes=this.program.codes
    )
    if not refusal:  # it had ended before its moment
        this.faults = 0
    for other in refusal:
        this.code, this.said = other.code, other.line
        if other.code != 1 or not re.search("another mpa-edge", other.line):
            this.problems.append(f"the second was not refused: {other.code} {other.line}")
    this.compare()


KINDS: dict[str, Callable[[Round], None]] = {
    "kill": killed,
    "full": full,
    "readonly": readonly,
    "damage": damage,
    "server": server,
    "two": two,
}


def mount(folder: Path) -> bool:
    """Lay a file system of its own over a folder; False where this may not be done."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    """Take it away again."""
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def remount(folder: Path, size: str) -> None:
    """Give it another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True, capture_output=True)


def _writable(folder: Path, writable: bool) -> None:
    for path in [folder, *sorted(folder.rglob("*"))]:
        with suppress(FileNotFoundError):  # gone meanwhile
            path.chmod((0o755 if path.is_dir() else 0o644) if writable else (0o555 if path.is_dir() else 0o444))
