"""Parts: whole or absent, resumable, never mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpa_edge.errors import FingerprintMismatch, InputError, RunError, RunLocked
from mpa_edge.parts import digest_of_rows, open_stage, part_path, read_parts, run_parts, sweep
from mpa_edge.records import Sample
from mpa_edge.run_folder import RunFolder

ROWS = [Sample(f"s{number}", f"{number}.png", "0" * 64) for number in range(10)]


def double(rows: list[Sample]) -> list[Sample]:
    return [Sample(f"{row.id}-{copy}", row.path, row.sha256) for row in rows for copy in range(2)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    run_parts(tmp_path / "s", ROWS, double, {"a": 1}, chunk_size=4)
    assert [row.id for row in read_parts(tmp_path / "s", Sample)] == [f"s{n}-{c}" for n in range(10) for c in range(2)]
    assert sorted(contents(tmp_path / "s")) == [
        "part-00000.jsonl",
        "part-00001.jsonl",
        "part-00002.jsonl",
        "stage.json",
    ]


def test_resume_runs_the_missing_parts_only(tmp_path: Path) -> None:
    calls: list[int] = []

    def dies_at_second(rows: list[Sample]) -> list[Sample]:
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return double(rows)

    with pytest.raises(KeyboardInterrupt):
        run_parts(tmp_path / "s", ROWS, dies_at_second, {}, chunk_size=4)
    with pytest.raises(RunError, match=r"part-00001\.jsonl is missing"):
        list(read_parts(tmp_path / "s", Sample))
    done: list[int] = []
    run_parts(tmp_path / "s", ROWS, dies_at_second, {}, chunk_size=4, advance=done.append)
    assert calls == [4, 4, 4, 2]
    assert done == [4, 4, 2]
    run_parts(tmp_path / "whole", ROWS, double, {}, chunk_size=4)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


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
    run_parts(tmp_path / "s", ROWS, double, settings, chunk_size=4)
    run_parts(tmp_path / "s", ROWS, double, {**settings, "teacher": {"weights": "abc", "size": (1, 2)}}, chunk_size=4)
    before = contents(tmp_path / "s")
    with pytest.raises(FingerprintMismatch) as error:
        run_parts(
            tmp_path / "s", ROWS, double, {**settings, "teacher": {"weights": "xyz", "size": [1, 2]}}, chunk_size=4
        )
    assert error.value.differences == {"teacher.weights": ("abc", "xyz")}
    assert "--fresh" in str(error.value)
    with pytest.raises(FingerprintMismatch, match="chunk_size"):
        run_parts(tmp_path / "s", ROWS, double, settings, chunk_size=5)
    with pytest.raises(FingerprintMismatch, match="input"):
        run_parts(tmp_path / "s", ROWS[:9], double, settings, chunk_size=4)
    assert contents(tmp_path / "s") == before


def test_fresh_starts_over(tmp_path: Path) -> None:
    run_parts(tmp_path / "s", ROWS, double, {"a": 1}, chunk_size=1)
    run_parts(tmp_path / "s", ROWS, double, {"a": 2}, chunk_size=5, fresh=True)
    assert not part_path(tmp_path / "s", 2).exists()
    assert json.loads((tmp_path / "s" / "stage.json").read_text())["fingerprint"]["a"] == 2


def test_parts_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    run_parts(tmp_path, ROWS, double, {}, chunk_size=4)
    (tmp_path / "stage.json").unlink()
    with pytest.raises(RunError, match=r"without stage\.json"):
        run_parts(tmp_path, ROWS, double, {}, chunk_size=4)
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        run_parts(tmp_path, ROWS, double, {}, chunk_size=4)


def test_no_rows_give_no_parts(tmp_path: Path) -> None:
    run_parts(tmp_path, [], double, {})
    assert list(read_parts(tmp_path, Sample)) == []


def test_the_digest_sees_order_and_content() -> None:
    assert digest_of_rows(ROWS) == digest_of_rows(list(ROWS))
    assert digest_of_rows(ROWS) != digest_of_rows(ROWS[::-1])


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


def test_clear_leaves_other_files_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run_parts(run.cases, ROWS, double, {})
    run.parity.write_text("")
    (tmp_path / "bundles").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundles", "notes.txt"]
