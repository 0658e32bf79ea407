"""Digests beside a trained student: what a disk changed is refused, with the way to go on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mpa_edge.errors import RunError
from mpa_edge.sums import SUMS, refuse_damaged, write_sums


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "stage.json", "checkpoint.safetensors", ".half.1.tmp"):
        (folder / name).write_text(name)
    write_sums(folder, **{"metrics.json": "{}\n"})
    (folder / "metrics.json").write_text("{}\n")
    return folder


def test_a_whole_student_is_taken_and_its_sums_are_sha256sums(student: Path) -> None:
    refuse_damaged(student)
    names = [line.split()[1] for line in (student / SUMS).read_text().splitlines()]
    assert names == ["adapter_model.safetensors", "metrics.json", "stage.json"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=student, check=True)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "metrics.json"])
@pytest.mark.parametrize("content", [None, "", "adapter_model.safetensorz"])
def test_a_changed_file_is_refused(name: str, content: str | None, student: Path) -> None:
    (student / name).unlink() if content is None else (student / name).write_text(content)
    with pytest.raises(RunError, match=rf"{name} is not as it was written\. Delete {student}, .*command again"):
        refuse_damaged(student)


def test_a_student_without_digests_is_taken_as_it_is(student: Path) -> None:
    (student / SUMS).unlink()
    (student / "adapter_model.safetensors").write_text("trained elsewhere")
    refuse_damaged(student)


@pytest.mark.parametrize("content", [b"", b"half a di", b"\0" * 99, b"\xff\n"])
def test_damaged_digests_are_refused(content: bytes, student: Path) -> None:
    (student / SUMS).write_bytes(content)
    with pytest.raises(RunError, match=f"{SUMS} is not as it was written"):
        refuse_damaged(student)
