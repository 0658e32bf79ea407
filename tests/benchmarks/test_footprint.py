"""What the footprint is made of: a light process, and what an installation adds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpa_edge.benchmarks.footprint import OUT, PROBE, sizes
from mpa_edge.benchmarks.reference import write_pool


def test_a_bundle_answers_without_the_training_side(tiny_gguf: Path, tmp_path: Path) -> None:
    """Here they are installed, so that an import of one would succeed, and be seen."""
    picture = write_pool(tmp_path, 1)[0]
    command = [sys.executable, "-m", PROBE, str(tiny_gguf), str(picture)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert found["heavy"] == []
    assert list(found["seconds"]) == list(found["rss_mb"]) == ["import", "import_engine", "load", "answer"]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    rss = [mb for mb in found["rss_mb"].values() if mb is not None]
    assert rss == sorted(rss)


def test_sizes_go_by_package(tmp_path: Path) -> None:
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "a.py").write_bytes(b"x" * 10)
    (tmp_path / "one" / "deep" / "b.so").write_bytes(b"x" * 100)
    (tmp_path / "two.py").write_bytes(b"x" * 5)
    assert sizes(tmp_path) == {"one": 110, "two.py": 5}


@pytest.mark.skipif(not OUT.is_file(), reason="not measured yet")
def test_the_committed_result_is_light() -> None:
    extras = json.loads(OUT.read_text())["extras"]
    assert extras.keys() == {"gguf", "onnx"}
    for found in extras.values():
        assert found["installed_heavy"] == found["imported_heavy"] == []
        assert 0 < found["installed_mb"] < 1000
