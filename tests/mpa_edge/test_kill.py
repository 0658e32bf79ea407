"""SIGKILL in every stage of two rounds, the same command again each time: the files of an undisturbed run, byte for
byte."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import warm

COMMAND = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mpa_edge import level
from mpa_edge.align import align
from mpa_edge.config import AlignConfig
level.STEPS_PER_CHECKPOINT = 3
images, teacher, student, out = sys.argv[1:]
align(AlignConfig(images=images, teacher=teacher, student=student, task="reference", out=Path(out), device="cpu",
                  questions=2, chunk_size=2, epochs=4, patience=4, train_batch_size=8, rounds=2,
                  select="all"))
"""
# A stage has surely begun, and surely not ended, when this file appears.
SIGNS = (
    "annotations/part-00002.jsonl",
    "cases-round-1/part-00005.jsonl",
    "student-round-1/checkpoint.safetensors",
    "cases/part-00003.jsonl",
    "student/checkpoint.safetensors",
)
AT_MOST = 300.0


def command(pair: Any, out: Path) -> list[str]:
    return [sys.executable, "-c", COMMAND, *map(str, (pair.images, pair.teacher, pair.student, out))]


def kill_when(sign: Path, arguments: list[str], log: Path) -> None:
    """Start the command and kill it as soon as a file is there."""
    process = warm.start(arguments, log)
    end = time.monotonic() + AT_MOST
    while not sign.exists():
        assert process.exitcode is None, log.read_text()
        assert time.monotonic() < end, f"{sign} did not appear"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def files(out: Path) -> dict[str, bytes]:
    """Everything but what timings, or times of files, are part of."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in (".lock", ".scan.sqlite", "log.jsonl", "run.json")
    }


def without_timings(out: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((out / "run.json").read_text())
    log["config"].pop("out")  # all that may differ is where it lies, and how long it took
    for stage in log["stages"].values():
        stage.pop("seconds")
    return log


def test_killed_in_each_stage_it_ends_in_the_same_files(tiny_pair: Any, tmp_path: Path) -> None:
    # The folder has one name in both: the audit page shows it.
    disturbed, undisturbed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for sign in SIGNS:
        kill_when(disturbed / sign, command(tiny_pair, disturbed), tmp_path / "log")
        assert not (disturbed / "student" / "metrics.json").exists(), f"killed too late at {sign}"
        (disturbed / sign).parent.joinpath(".left-behind.1.tmp").write_text("half a line")
    for out in (disturbed, undisturbed):  # each in a fresh process: nothing depends on the seed of hashes
        subprocess.run(command(tiny_pair, out), check=True, capture_output=True, text=True, timeout=AT_MOST)
    found, wanted = files(disturbed), files(undisturbed)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert len([name for name in wanted if name.startswith("annotations/part-") and name.endswith(".jsonl")]) == 12
    assert without_timings(disturbed) == without_timings(undisturbed)
