"""The package itself: what importing it loads, what it offers, and how many threads it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mpa_edge.runtime as runtime
from mpa_edge.errors import BundleError
from mpa_edge.runtime.prompts import read_tokenizer


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "llama_cpp", "onnxruntime")
    code = f"import sys, mpa_edge.runtime; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_exports_are_complete_and_sorted() -> None:
    assert list(runtime.__all__) == sorted(runtime.__all__)
    assert all(hasattr(runtime, name) for name in runtime.__all__)


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime.usable_cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert runtime.usable_cores() >= 1


@pytest.mark.parametrize(
    ("content", "cores"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)]
)
def test_a_containers_quota_bounds_the_threads(content: str, cores: int | None, tmp_path: Path) -> None:
    from mpa_edge.runtime import _quota

    (tmp_path / "cpu.max").write_text(content)
    assert _quota(tmp_path / "cpu.max") == cores
    assert _quota(tmp_path / "gone") is None


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="no tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json")
