"""The harness of faults: some of its rounds, and that it sees what it is there to see."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpa_edge.benchmarks import fault_kinds
from mpa_edge.benchmarks.fault_kinds import KINDS, Round
from mpa_edge.benchmarks.fault_programs import PROGRAMS, Place
from mpa_edge.benchmarks.fault_server import MANNERS, Teacher
from mpa_edge.benchmarks.fault_watch import Ended, Moment, moment_of
from mpa_edge.benchmarks.faults import PLAN, Stage, drawn, summary, table

ASK = PROGRAMS["ask"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Teacher() as teacher:
        yield Stage(Place(tmp_path_factory.mktemp("faults"), teacher.address), teacher, own_disk=False)


def number_where(first_choice: str, among: tuple[str, ...]) -> int:
    """A round of which the first thing drawn is this."""
    return next(number for number in range(1000) if random.Random(f"0 {number}").choice(among) == first_choice)


def test_programs_hear_signals_though_a_shell_ignores_them_in_its_background() -> None:
    """They inherited it, and whatever of Ctrl-C was tried on them was none."""
    told = "import signal; print(signal.getsignal(2).__name__)"
    code = "import signal, subprocess, sys\nsignal.signal(2, signal.SIG_IGN)\n"
    code += "from mpa_edge.benchmarks.faults import hear_signals\nhear_signals()\n"
    code += "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    ran = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout == "default_int_handler\n"


def test_a_teacher_that_misbehaves(stage: Stage) -> None:
    row = stage.go(number_where("half", MANNERS), "server", ASK, 0, None)
    assert row["fault"].startswith("half")
    assert row["problems"] == []
    assert row["cures"][-1] == "again"


def test_a_damaged_file_and_two_at_once(stage: Stage) -> None:
    """Kills are in tests/mpa_edge/test_kill.py."""
    rows = [stage.go(number, kind, ASK, 0, None) for number, kind in enumerate(("damage", "two"), 1)]
    assert [row["problems"] for row in rows] == [[], []]
    assert "in use by another mpa-edge process" in rows[1]["said"]
    assert "two ask" in table(rows)


def test_what_is_lost_torn_or_too_much_is_seen(stage: Stage, tmp_path: Path) -> None:
    place = Place(tmp_path)
    (place.out / "cases").mkdir(parents=True)
    for name in ("cases/part-00000.jsonl", "parity.jsonl", ".hidden"):
        (place.out / name).write_text(name)
    wanted = ASK.results(place.out)
    assert set(wanted) == {"cases/part-00000.jsonl", "parity.jsonl"}
    this = Round(ASK, place, random.Random(0), {**wanted, "student": ""}, (0.0, 1.0), stage.teacher)
    this.compare()
    assert this.problems == ["student is missing"]
    (place.out / "cases" / "part-00000.jsonl").write_text("half")
    (place.out / "new").write_text("")
    this.problems.clear()
    this.nothing_torn()
    this.compare()
    assert this.problems[:3] == ["cases/part-00000.jsonl is torn", "student is missing", "new is too much"]
    assert this.problems[3].startswith("cases/part-00000.jsonl is another: ")


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("error: /x/run: no space left on the disk. Make room, and type the same command again.", None),
        ("scan: 3 of 3\n\nStopped. What is finished is kept: type the same command again to go on.", None),
        ("Traceback (most recent call last):\n  …\nOSError: [Errno 28] No space left on device", "a traceback"),
        ("Aborted!", "no clear line"),
        ("error: the file part-00001.jsonl is of no use at all", "no way to go on"),
    ],
)
def test_a_clear_line_is_told_from_others(said: str, wrong: str | None) -> None:
    found = Ended(1, said).unclear()
    assert (found is None) if wrong is None else (found or "").startswith(wrong)


def test_the_cure_that_a_line_names_is_followed(stage: Stage, tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.out.mkdir(parents=True)
    this = Round(ASK, place, random.Random(0), {}, (0.0, 1.0), stage.teacher)
    file = place.out / "checkpoint"
    file.write_text("")
    assert (
        this.cured(f"error: {file} cannot be read (half). Delete it, and type the same command again.") == this.command
    )
    assert not file.exists()
    this.cured(f"error: {file} cannot be read. Delete {place.out}, and type the same command again.")
    assert not place.out.exists()
    assert this.cured("error: other settings. Use another --out, or --fresh.")[-1] == "--fresh"
    assert this.cures == ["delete checkpoint", "delete out", "fresh"]


def test_rounds_that_went_wrong_are_counted_until_they_are_mended() -> None:
    row = {"kind": "kill", "program": "ask", "faults": 2, "problems": []}
    rows = [
        row,
        {**row, "problems": ["torn"]},
        {**row, "before": ["torn"]},
        {**row, "problems": ["x"], "before": ["y"]},
    ]
    assert summary(rows)["all"] == {"rounds": 4, "faults": 8, "wrong": 2, "mended": 1}


def test_rounds_are_drawn_in_the_proportions_of_the_plan() -> None:
    assert sum(PLAN.values()) == len(drawn(200, 0)) == 200
    assert sorted(drawn(200, 0)) == sorted(pair for pair, count in PLAN.items() for _ in range(count))
    assert drawn(30, 0) == drawn(200, 0)[:30] != drawn(30, 1)
    assert {kind for kind, _ in PLAN} == set(KINDS)
    assert {program for _, program in PLAN} == set(PROGRAMS)


def test_moments_lie_between_changes() -> None:
    rng = random.Random(0)
    found: list[Moment] = [moment_of((0.0, 5.0, 5.1), rng) for _ in range(50)]
    assert {moment.changes for moment in found} == {0, 1}
    assert all(moment.seconds <= (5.0, 0.1)[moment.changes] + 1e-9 for moment in found)


def test_every_damage_changes_the_file(tmp_path: Path) -> None:
    told: set[str] = set()
    for seed in range(40):
        path = tmp_path / "file"
        path.write_bytes(b"0123456789")
        told.add(fault_kinds.spoil(path, random.Random(seed)).split(" ")[0])
        assert path.read_bytes() != b"0123456789"
    assert told == {"cut", "emptied", "zeroed", "flipped"}
