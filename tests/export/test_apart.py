"""Graphs made in another process: results, errors and unhappy ends come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpa_edge.errors import ExportError, UnknownFamily
from mpa_edge.export.apart import export_apart

EXPORTERS = """
import os, subprocess, sys, time
from pathlib import Path
from mpa_edge.errors import ExportError, UnknownFamily

def export_graphs(merged, folder):
    print("talk that is no answer")
    return {"ways": {"whole": whole, "differs": differs, "unknown": unknown, "full": full, "killed": killed,
                     "endless": endless}[merged.name](folder)}

def whole(folder): return 0.5
def differs(folder): raise ExportError("decoder.onnx differs")
def unknown(folder): raise UnknownFamily("gpt", ["llava"])
def full(folder): raise OSError(28, "No space left on device", str(folder))
def killed(folder): os.kill(os.getpid(), 9)
def endless(folder):
    own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids").write_text(f"{os.getpid()} {own.pid} .")
    time.sleep(600)
"""


@pytest.fixture
def exporters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "exporters_apart.py").write_text(EXPORTERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "exporters_apart"


def test_differences_come_back(exporters: str, tmp_path: Path) -> None:
    assert export_apart(exporters, Path("whole"), tmp_path) == {"ways": 0.5}


@pytest.mark.parametrize(
    ("way", "kind", "line"),
    [
        ("differs", ExportError, "^decoder.onnx differs$"),
        ("unknown", UnknownFamily, "^no export for models of type 'gpt'; known: llava"),
        ("full", ExportError, r"could not be exported: OSError: \[Errno 28\] No space left on device"),
        pytest.param(
            "killed",
            ExportError,
            "was killed; was there not enough memory",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="no signals there"),
        ),
    ],
)
def test_errors_come_back(exporters: str, tmp_path: Path, way: str, kind: type[Exception], line: str) -> None:
    with pytest.raises(kind, match=line) as caught:
        export_apart(exporters, Path(way), tmp_path)
    assert type(caught.value) is kind


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_it_ends_with_its_parent_and_what_it_started_too(exporters: str, tmp_path: Path) -> None:
    call = (
        "from pathlib import Path; from mpa_edge.export.apart import export_apart; "
        f"export_apart({exporters!r}, Path('endless'), Path({json.dumps(str(tmp_path))}))"
    )
    with subprocess.Popen([sys.executable, "-c", call]) as parent:
        wait_for(lambda: (tmp_path / "pids").is_file() and "." in (tmp_path / "pids").read_text())
        children = [int(pid) for pid in (tmp_path / "pids").read_text().split()[:2]]
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(runs(child) for child in children))


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    # Where nobody collects orphans an ended one stays as a zombie.
    return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(done: object, seconds: float = 60) -> None:
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
