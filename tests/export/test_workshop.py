"""Temporary folders: what is removed, what is put back, and what a full disk is called."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from mpa_edge.errors import ExportError, InputError, RunError
from mpa_edge.export.workshop import LOCK, Workshop

FULL = Path("/dev/full")


def died(root: Path, name: str, process: int | None = None) -> Path:
    """What a process left that died while it worked on `name`."""
    if process is None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        process = ended.pid
    left = root / f".{name}.{process}.tmp"
    left.mkdir()
    (left / "weights").write_text(name)
    return left


def test_a_folder_is_seen_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with Workshop(tmp_path) as workshop:
        folder = workshop.folder("bundle")
        folder.mkdir()
        (folder / "weights").write_text("new")
        assert not list((tmp_path / "bundle").iterdir())
        workshop.place(folder, tmp_path / "bundle")
        workshop.folder("scratch").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "weights").read_text() == "new"


def test_what_died_is_removed_and_nothing_else(tmp_path: Path) -> None:
    died(tmp_path, "bundle")
    died(tmp_path, "bundle", os.getpid())  # as in a container, where every run has the same number
    died(tmp_path, "bundle", os.getppid())  # the number is that of somebody else by now
    other = tmp_path / ".cache.tmp"
    other.mkdir()
    with Workshop(tmp_path) as workshop:
        assert set(tmp_path.iterdir()) == {other, tmp_path / LOCK}
        workshop.folder("bundle").mkdir()
    assert set(tmp_path.iterdir()) == {other}


def test_who_is_at_work_is_left_alone(tmp_path: Path) -> None:
    """Even one with our own number, as another container on a shared volume may have."""
    with Workshop(tmp_path) as first:
        first.folder("bundle").mkdir()
        with pytest.raises(RunError, match=f"another mpa-edge export is at work in {tmp_path}"), Workshop(tmp_path):
            pass
        assert first.folder("bundle").is_dir()
    with Workshop(tmp_path):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mpa_edge.export.workshop import Workshop\n"
        "with Workshop(Path(sys.argv[1])) as workshop:\n"
        "    workshop.folder('bundle').mkdir(); print('at work', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    with pytest.raises(RunError), Workshop(tmp_path):
        pass
    assert (tmp_path / f".bundle.{process.pid}.tmp").is_dir()
    process.kill()
    process.wait()
    process.stdout.close()
    with Workshop(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_what_was_put_away_for_nothing_is_put_back(tmp_path: Path) -> None:
    died(tmp_path, "bundle-old")
    died(tmp_path, "bundle")
    with Workshop(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"bundle", LOCK}
        assert (tmp_path / "bundle" / "weights").read_text() == "bundle-old"
    died(tmp_path, "bundle-old")
    with Workshop(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"bundle", LOCK}


def python() -> None:
    FULL.write_bytes(b"x")


def numpy() -> None:
    with FULL.open("wb", buffering=0) as file:
        np.zeros(9999).tofile(file)


def rust() -> None:
    """What safetensors says; it writes to another file first, so that `/dev/full` cannot make it say so."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def wrapped() -> None:
    try:
        numpy()
    except OSError as error:
        raise ExportError("it could not be converted") from error


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("write", [python, numpy, rust, wrapped])
def test_a_full_disk_is_one_clean_line(write: Callable[[], None], tmp_path: Path) -> None:
    def work() -> None:
        with Workshop(tmp_path) as workshop:
            workshop.folder("bundle").mkdir()
            write()

    with pytest.raises(ExportError, match=f"--out {tmp_path}: no space left"):
        work()
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Workshop(tmp_path):
        _ = 1 / 0
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), Workshop(tmp_path / "file"):
        pass
