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

from mpa_edge.errors import ExportError, InputError
from mpa_edge.export.workshop import Workshop

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


def test_what_died_is_removed_and_what_lives_is_left(tmp_path: Path) -> None:
    died(tmp_path, "bundle")
    lives = died(tmp_path, "bundle", os.getppid())
    other = tmp_path / ".cache.tmp"
    other.mkdir()
    with Workshop(tmp_path):
        assert set(tmp_path.iterdir()) == {lives, other}


def test_a_dead_process_may_have_had_our_number(tmp_path: Path) -> None:
    """As in a container, where every run has the same."""
    died(tmp_path, "bundle", os.getpid())
    with Workshop(tmp_path) as workshop:
        workshop.folder("bundle").mkdir()


def test_what_was_put_away_for_nothing_is_put_back(tmp_path: Path) -> None:
    died(tmp_path, "bundle-old")
    died(tmp_path, "bundle")
    with Workshop(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        assert (tmp_path / "bundle" / "weights").read_text() == "bundle-old"
    died(tmp_path, "bundle-old")
    with Workshop(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


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
