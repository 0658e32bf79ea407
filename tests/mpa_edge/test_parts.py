"""Parts: whole or absent, resumable, never mixed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.errors import FingerprintMismatch, InputError, RunError, RunLocked
from mpa_edge.parts import ATTEMPTS, Parts, digest_of_stage, open_parts, open_stage, part_path, read_parts, sweep
from mpa_edge.records import Annotation, Sample
from mpa_edge.run_folder import RunFolder, set_aside

ROWS = [Sample(f"s{number}", f"{number}.png", "0" * 64) for number in range(10)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill(folder: Path, settings: dict[str, Any] | None = None, size: int = 4) -> Parts[Sample]:
    """A stage that copies its input."""
    count = -(-len(ROWS) // size)
    parts = open_parts(folder, Sample, settings or {}, count)
    for number in range(count):
        parts.fill(number, lambda known, number=number: ROWS[number * size : (number + 1) * size])
    return parts


def test_rows_come_back_in_order_and_part_by_part(tmp_path: Path) -> None:
    parts = fill(tmp_path / "s")
    assert list(read_parts(tmp_path / "s", Sample)) == ROWS
    assert [len(rows) for rows in parts] == [4, 4, 2]
    assert parts.read(2) == ROWS[8:]
    parts_and_digests = [f"part-0000{number}.{kind}" for number in range(3) for kind in ("jsonl", "sha256")]
    assert sorted(contents(tmp_path / "s")) == [*parts_and_digests, "stage.json"]
    check = ["sha256sum", "--check", "--quiet", *(name for name in parts_and_digests if name.endswith("sha256"))]
    if shutil.which("sha256sum"):
        subprocess.run(check, cwd=tmp_path / "s", check=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_between_rows(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def flip(path: Path) -> None:
    """One bit of a digit, so that the rows still are rows."""
    path.write_bytes(path.read_bytes().replace(b"4.png", b"5.png"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, cut_between_rows, flip, empty])
def test_a_damaged_part_is_found_and_made_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    before = fill(tmp_path / "s") and contents(tmp_path / "s")
    damage(part_path(tmp_path / "s", 1))
    parts = Parts(tmp_path / "s", Sample)
    parts.again = False  # something was trained on the others: it is made again all the same
    assert [parts.due(number) for number in range(3)] == [False, True, False]
    with pytest.raises(RunError, match=r"part-00001\.jsonl is damaged.*again"):
        list(parts)
    with pytest.warns(UserWarning, match=r"part-00001\.jsonl is damaged; it is made again"):
        fill(tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_a_part_without_a_digest_is_taken_as_it_is(tmp_path: Path) -> None:
    parts = fill(tmp_path / "s")
    part_path(tmp_path / "s", 1).with_suffix(".sha256").unlink()
    assert not parts.due(1)
    assert list(read_parts(tmp_path / "s", Sample)) == ROWS


def test_a_damaged_digest_is_found_too(tmp_path: Path) -> None:
    before = fill(tmp_path / "s") and contents(tmp_path / "s")
    part_path(tmp_path / "s", 1).with_suffix(".sha256").write_text("half a dig")
    with pytest.warns(UserWarning, match="is damaged"):
        fill(tmp_path / "s")
    assert contents(tmp_path / "s") == before


def test_resume_fills_the_missing_parts_only(tmp_path: Path) -> None:
    parts = open_parts(tmp_path / "s", Sample, {}, 3)
    parts.fill(0, lambda known: ROWS[:4])

    def killed(known: list[Sample]) -> list[Sample]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.fill(1, killed)
    with pytest.raises(RunError, match=r"part-00001\.jsonl is missing"):
        list(read_parts(tmp_path / "s", Sample))
    assert [parts.due(number) for number in range(3)] == [False, True, True]
    parts.fill(0, killed)  # is there, and not made again
    fill(tmp_path / "s")
    fill(tmp_path / "whole")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def annotation(number: int, reason: str | None = None) -> Annotation:
    return Annotation(f"a{number}", f"s{number}", "What?", "x", "", reason)


def test_failed_rows_are_asked_again_and_others_are_not(tmp_path: Path) -> None:
    good, failed, rejected = annotation(0), annotation(1, "teacher_error"), annotation(2, "no_question")
    parts = open_parts(tmp_path, Annotation, {}, 1)
    parts.fill(0, lambda known: [good, failed, rejected])
    assert parts.due(0)
    given: list[list[Annotation]] = []

    def repaired(known: list[Annotation]) -> list[Annotation]:
        given.append(known)
        return [good, annotation(1), rejected]

    parts.fill(0, repaired)
    parts.fill(0, repaired)
    assert given == [[good, failed, rejected]]
    assert not parts.due(0)
    assert sorted(contents(tmp_path)) == ["part-00000.jsonl", "part-00000.sha256", "stage.json"]


def test_what_fails_again_and_again_is_left_so(tmp_path: Path) -> None:
    parts = open_parts(tmp_path, Annotation, {}, 1)
    calls = []
    for _ in range(ATTEMPTS + 3):
        parts.fill(0, lambda known: calls.append(1) or [annotation(1, "teacher_error")])
    assert len(calls) == ATTEMPTS
    assert not parts.due(0)


def test_a_part_is_due_when_its_input_will_change(tmp_path: Path) -> None:
    parts = fill(tmp_path)
    parts.reopen(1)
    assert [parts.due(number) for number in range(3)] == [False, True, False]
    parts.fill(1, lambda known: known)
    assert not parts.due(1)
    fresh = open_parts(tmp_path / "fresh", Sample, {}, 1)
    fresh.reopen(0)
    assert sorted(contents(tmp_path / "fresh")) == ["stage.json"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    open_stage(tmp_path / "s", {"a": 1})
    torn = tmp_path / "s" / ".part-00000.jsonl.99.tmp"
    torn.write_text('{"id": "s0')
    open_stage(tmp_path / "s", {"a": 1})
    assert not torn.exists()


def test_a_folder_that_an_export_is_making_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".merged.1.tmp" / "weights").mkdir(parents=True)
    sweep(tmp_path)
    assert (tmp_path / ".merged.1.tmp" / "weights").is_dir()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"teacher": {"weights": "abc", "size": [1, 2]}, "prompt": "p"}
    fill(tmp_path / "s", settings)
    fill(tmp_path / "s", {**settings, "teacher": {"weights": "abc", "size": (1, 2)}})
    before = contents(tmp_path / "s")
    with pytest.raises(FingerprintMismatch) as error:
        fill(tmp_path / "s", {**settings, "teacher": {"weights": "xyz", "size": [1, 2]}})
    assert error.value.differences == {"teacher.weights": ("abc", "xyz")}
    assert "--fresh" in str(error.value)
    assert contents(tmp_path / "s") == before


def test_parts_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "stage.json").unlink()
    with pytest.raises(RunError, match=r"without stage\.json"):
        fill(tmp_path)
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        fill(tmp_path)


@pytest.mark.parametrize("settings", [{"prompt": "p"}, {"prompt": "q"}])
def test_settings_in_which_a_bit_flipped_are_damage_and_not_other_settings(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    fill(tmp_path, {"prompt": "p"})
    note = tmp_path / "stage.json"
    whole = note.read_text()
    note.write_text(whole.replace('"prompt": "p"', '"prompt": "q"'))
    with pytest.raises(RunError, match=r"stage\.json cannot be read .*Delete "):
        fill(tmp_path, settings)
    older = json.loads(whole)
    del older["sum"]
    note.write_text(json.dumps(older))
    fill(tmp_path, {"prompt": "p"})


def test_no_rows_give_no_parts(tmp_path: Path) -> None:
    open_parts(tmp_path, Sample, {}, 0)
    assert list(read_parts(tmp_path, Sample)) == []


def test_the_digest_of_a_stage_sees_its_rows(tmp_path: Path) -> None:
    for name, settings in (("a", {"x": 1}), ("b", {"x": 2})):
        fill(tmp_path / name, settings)
    assert digest_of_stage(tmp_path / "a") == digest_of_stage(tmp_path / "b")
    (tmp_path / "b" / "part-00002.jsonl").write_text("")
    assert digest_of_stage(tmp_path / "a") != digest_of_stage(tmp_path / "b")


HOLDER = """
import sys, time
from pathlib import Path
from mpa_edge.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_refused_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match="in use"), RunFolder(tmp_path).lock():
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with RunFolder(tmp_path).lock():
            pass


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"), RunFolder(tmp_path / "file" / "run").lock():
        pass


def test_clear_deletes_what_a_run_and_its_exports_made_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for folder in (run, run.round(1), run.round(12)):
        fill(folder.cases)
        folder.student.mkdir()
        folder.parity.write_text("")
    for name in ("merged", "bundles", "images", "student-old-1", "my-round-1"):
        (tmp_path / name).mkdir()
    for name in ("merged.json", "run.json", "notes.txt"):
        (tmp_path / name).write_text("")
    run.clear()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["images", "my-round-1", "notes.txt", "student-old-1"]


def test_a_student_that_is_put_aside_gets_a_name_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "student").mkdir()
        assert set_aside(tmp_path / "student").name == f"student-old-{number}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student-old-1", "student-old-2"]
