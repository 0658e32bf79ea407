"""Whether a run survives the night: kills, full and read-only disks, damaged files, teachers that misbehave.

    python -m mpa_edge.benchmarks.faults                     200 rounds, to benchmarks/results/faults.json
    python -m mpa_edge.benchmarks.faults --only server       those of one kind

A round starts a program on a few pictures (`fault_programs`), does something to it (`fault_kinds`), types the same
command again, does what that says, and compares every file with those of an undisturbed run. Rounds are drawn by their
number and the seed; those in the results are not gone through again, but with `--retry` those that went wrong are, and
keep what was wrong before. Disks are small file systems in memory, for which the harness starts itself anew in a
namespace of its own (`unshare`); without the right to do so the rounds of the kind `full` are left out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.benchmarks.fault_kinds import KINDS, Round, mount, unmount
from mpa_edge.benchmarks.fault_programs import PROGRAMS, Place, Program, write_inputs
from mpa_edge.benchmarks.fault_server import Teacher
from mpa_edge.benchmarks.fault_watch import watched
from mpa_edge.benchmarks.host import host
from mpa_edge.records import write_atomic

OUT = Path(__file__).parent / "results" / "faults.json"
ROUNDS = 200
# How many of 200 rounds are of which kind and program.
PLAN = {
    ("kill", "ask"): 30,
    ("kill", "align"): 20,
    ("kill", "export"): 10,
    ("kill", "bench"): 20,
    ("full", "ask"): 8,
    ("full", "align"): 6,
    ("full", "export"): 3,
    ("full", "bench"): 5,
    ("readonly", "ask"): 6,
    ("readonly", "align"): 3,
    ("readonly", "export"): 2,
    ("readonly", "bench"): 4,
    ("damage", "ask"): 18,
    ("damage", "align"): 14,
    ("damage", "export"): 4,
    ("damage", "bench"): 12,
    ("server", "ask"): 27,
    ("two", "ask"): 3,
    ("two", "align"): 1,
    ("two", "export"): 2,
    ("two", "bench"): 2,
}
INSIDE = "MPA_EDGE_FAULTS_INSIDE"

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = ROUNDS,
    only: Annotated[list[str] | None, typer.Option(help="Kinds or programs; repeat for several.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other rounds.")] = 0,
    retry: Annotated[bool, typer.Option("--retry", help="Go through those that went wrong again.")] = False,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = OUT,
) -> None:
    """Go through the rounds and write what came of them."""
    hear_signals()
    if sys.platform == "linux" and INSIDE not in os.environ:
        _go_inside()
    known = _read(out, seed)
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as scratch,
        Teacher() as teacher,
        closing(Stage(Place(Path(scratch), teacher.address), teacher)) as stage,
    ):
        for number, (kind, program) in enumerate(drawn(rounds, seed)):
            before = known.get(number)
            done = before is not None and not (retry and before["problems"])
            asked = not only or {kind, program} & set(only)
            if done or not asked or (kind == "full" and not stage.own_disk):
                continue
            known[number] = stage.go(number, kind, PROGRAMS[program], seed, before)
            typer.echo(told(known[number]))
            _write(out, seed, known, stage.own_disk)
    typer.echo(table(known.values()))


def drawn(rounds: int, seed: int) -> list[tuple[str, str]]:
    """Kind and program of each round, in the proportions of the plan whatever their number."""
    found: list[tuple[str, str]] = []
    rng = random.Random(f"plan {seed}")
    while len(found) < rounds:
        block = [pair for pair, count in PLAN.items() for _ in range(count)]
        rng.shuffle(block)
        found += block
    return found[:rounds]


def hear_signals() -> None:
    """In the background of a shell Ctrl-C is ignored; programs that are started there inherit that, and nothing of it
    would be tried."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stage:
    """Where rounds take place, and what undisturbed programs left there. With `own_disk` that is a disk of its own,
    where this process may mount one."""

    def __init__(self, place: Place, teacher: Teacher, *, own_disk: bool = True) -> None:
        self._place, self.teacher = place, teacher
        self._moments: dict[str, tuple[float, ...]] = {}
        self._results: dict[str, dict[str, str]] = {}
        self._peak: dict[str, int] = {}
        write_inputs(place)
        self.own_disk = own_disk and mount(place.now)

    def close(self) -> None:
        """Take the disk away."""
        if self.own_disk:
            unmount(self._place.now)

    def go(self, number: int, kind: str, program: Program, seed: int, before: dict[str, Any] | None) -> dict[str, Any]:
        """One round, as its row of the results."""
        self._want(program)
        self._clear()
        program.prepare(self._place)
        this = Round(
            program,
            self._place,
            random.Random(f"{seed} {number}"),
            self._results[program.name],
            self._moments[program.name],
            self.teacher,
            self._peak[program.name],
        )
        self.teacher.expect(None)
        started = time.monotonic()
        try:
            KINDS[kind](this)
        except Exception as error:
            this.problems.append(f"the round itself failed: {type(error).__name__}: {error}")
        earlier = [*(before or {}).get("before", []), *(before or {}).get("problems", [])]
        return {
            "round": number,
            "kind": kind,
            "program": program.name,
            "faults": this.faults,
            "fault": this.fault,
            "code": this.code,
            "said": this.said.replace(str(self._place.home), ""),
            "cures": this.cures,
            "problems": [text.replace(str(self._place.home), "")[:600] for text in this.problems[:10]],
            **({"before": earlier} if earlier else {}),
            "seconds": round(time.monotonic() - started, 1),
        }

    def _want(self, program: Program) -> None:
        """See to it that the undisturbed run of a program, and those that it needs, are there."""
        if program.name in self._results:
            return
        if program.needs:
            self._want(PROGRAMS[program.needs])
        self._clear()
        program.prepare(self._place)
        self.teacher.expect(None)
        ended = watched(program.command(self._place), self._place.out, self._place.now)
        if ended.code not in program.codes:
            raise RuntimeError(f"{program.name} fails undisturbed: {ended.said}")
        self._moments[program.name], self._peak[program.name] = ended.moments, ended.peak
        shutil.copytree(self._place.out, self._place.wanted / program.name)
        self._results[program.name] = program.results(self._place.out)

    def _clear(self) -> None:
        self._place.now.mkdir(exist_ok=True)
        for path in self._place.now.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def told(row: dict[str, Any]) -> str:
    """A round in a line, and what is wrong with it in others."""
    lines = [f"{row['round']:>4} {row['kind']} {row['program']}: {row['fault']} ({row['seconds']} s)"]
    lines += [f"       said: {row['said']}"] if row["said"] else []
    lines += [f"     WRONG: {problem}" for problem in row["problems"]]
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rounds, faults, and rounds that went wrong, by kind and program."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for name in (f"{row['kind']} {row['program']}", "all"):
            counts.setdefault(name, Counter())
            wrong = int(bool(row["problems"]))
            counts[name].update(
                rounds=1, faults=row["faults"], wrong=wrong, mended=int(bool(row.get("before")) and not wrong)
            )
    return {name: dict(counts[name]) for name in sorted(counts)}


def table(rows: Any) -> str:
    """The summary for people."""
    lines = [f"{'':16} rounds  faults  wrong  mended since"]
    for name, count in summary(list(rows)).items():
        lines.append(f"{name:16} {count['rounds']:6}  {count['faults']:6}  {count['wrong']:5}  {count['mended']:6}")
    return "\n".join(lines)


def _go_inside() -> None:
    """Start anew where file systems can be mounted that nobody else sees, if that is allowed here."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", "--mount", *as_root]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    os.environ[INSIDE] = "1"
    if allowed:
        os.execvp("unshare", [*command, sys.executable, "-m", "mpa_edge.benchmarks.faults", *sys.argv[1:]])


def _read(path: Path, seed: int) -> dict[int, dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {row["round"]: row for row in content.get("rounds", [])} if content.get("seed") == seed else {}


def _write(path: Path, seed: int, known: dict[int, dict[str, Any]], own_disk: bool) -> None:
    rows = [known[number] for number in sorted(known)]
    content = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.faults",
        "host": host(),
        "disk": "tmpfs in a mount namespace" if own_disk else "none of its own: no rounds with a full disk",
        "seed": seed,
        "summary": summary(rows),
        "rounds": rows,
    }
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
