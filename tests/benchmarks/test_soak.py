"""The soak asks about every picture, and sees memory that grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpa_edge.benchmarks import soak as module
from mpa_edge.benchmarks.soak import OUT, SETTLED, soak, told, write_pictures


@pytest.fixture
def two_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLED", 2)
    monkeypatch.setattr(module, "EVERY", 1)


@pytest.mark.usefixtures("two_settle")
def test_growth_is_what_came_after_the_first(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([90_000_000, 95_000_000, 100_000_000, 104_000_000, 108_000_000])
    monkeypatch.setattr(module, "resident_bytes", lambda: next(held))
    pictures = sorted(write_pictures(tmp_path / "pictures", 4).iterdir())
    assert len({path.read_bytes() for path in pictures}) == 4
    found = soak(tiny_gguf, pictures, threads=1)
    assert found["rss_mb"] == {0: 90.0, 1: 95.0, 2: 100.0, 3: 104.0, 4: 108.0}
    assert found["growth"] == 0.08
    assert "+8.0% since picture 2; 0: 90 MB, 1: 95 MB" in told(found)


@pytest.mark.skipif(not OUT.is_file(), reason="not measured yet")
def test_the_committed_result_holds() -> None:
    written = json.loads(OUT.read_text())
    assert len(written["growth"]) >= 2
    assert all(abs(growth) <= 0.05 for growth in written["growth"].values())
    assert all(run["pictures"] >= 1000 and str(SETTLED) in run["rss_mb"] for run in written["runs"])
