"""What is measured, as it lies on disk: rows that a kill tore off or a disk changed are left out, and nothing else; and
a worker that ends with whoever started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpa_edge.benchmarks.jobs import Row, lines_of, read_json, sealed, unsealed, whole_rows
from mpa_edge.records import Record

ROWS = [Row(f"k{number}", "rouge é", 2, None, "stop", None, {"total": 1.25 / 3}) for number in range(4)]
PARENT = """
import subprocess, sys
from mpa_edge.benchmarks.measure import send
code = "import time\\nfrom mpa_edge import orphan\\ninput()\\norphan.end_with_whoever_started_us()\\n"
child = subprocess.Popen([sys.executable, "-c", code + "print(1)\\ntime.sleep(600)"], stdin=-1, stdout=-1)
send(child, "{}")
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def torn(content: bytes) -> bytes:
    return content[:-9]


def flipped(content: bytes) -> bytes:
    return content[:-40].replace(b"k2", b"k3") + content[-40:]


def zeroed(content: bytes) -> bytes:
    return content[:-30] + bytes(30)


@pytest.mark.parametrize(("damage", "left"), [(torn, [0, 1, 2]), (flipped, [0, 1, 3]), (zeroed, [0, 1, 2])])
def test_damaged_rows_are_left_out_and_cut_out(
    damage: Callable[[bytes], bytes], left: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(lines_of(ROWS), encoding="utf-8")
    assert whole_rows(path) == ROWS
    path.write_bytes(damage(path.read_bytes()))
    assert whole_rows(path) == [ROWS[number] for number in left]
    assert path.read_text(encoding="utf-8") == lines_of(ROWS[number] for number in left)


def test_rows_of_an_older_version_have_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"".join(line_without_check(row) for row in ROWS))
    assert whole_rows(path) == ROWS


def line_without_check(row: Record) -> bytes:
    return json.dumps(row.to_json()).encode() + b"\n"


def test_a_damaged_note_is_none(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    assert read_json(path) == {}
    path.write_text(sealed({"done": True, "busy": 0.125}, indent=2) + "\n")
    assert read_json(path) == {"done": True, "busy": 0.125}
    assert unsealed(path.read_bytes()[:-1]) is None
    for before, now in (("0.125", "0.625"), ("true", "tru"), ("{", "[")):
        content = path.read_text()
        path.write_text(content.replace(before, now))
        assert read_json(path) == {}
        path.write_text(content)


def test_a_worker_ends_with_whoever_started_it() -> None:
    """Left alone, it would go on for hours, and spoil what the next benchmark measures."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30
    while is_alive(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
