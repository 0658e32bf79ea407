from __future__ import annotations

import platform

import pytest

from mpa_edge.benchmarks.host import busy, host, peak_memory_bytes


def test_the_host_is_described_without_its_name() -> None:
    found = host()
    assert found["cores"] >= 1
    assert "numpy" in found["versions"]
    assert platform.node() not in str(found) or len(platform.node()) < 4


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_and_load_are_read() -> None:
    before = peak_memory_bytes()
    assert before is not None
    ballast = bytearray(b"x" * (before + 50_000_000))
    after = peak_memory_bytes()
    assert after is not None
    assert after >= len(ballast)
    share = busy(0.05)
    assert share is not None
    assert 0 <= share <= 1
