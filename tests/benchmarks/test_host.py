from __future__ import annotations

import platform

import pytest

from mpa_edge.benchmarks.host import core_times, host, peak_memory_bytes, watch_others


def test_the_host_is_described_without_its_name() -> None:
    found = host()
    assert found["cores"] >= 1
    assert "numpy" in found["versions"]
    assert platform.node() not in str(found) or len(platform.node()) < 4


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_peak_memory_is_read() -> None:
    before = peak_memory_bytes()
    assert before is not None
    ballast = bytearray(b"x" * (before + 50_000_000))
    after = peak_memory_bytes()
    assert after is not None
    assert after >= len(ballast)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_our_own_work_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(1000, 2000), (1100, 2200)])  # 200 ticks of all cores passed, 100 of them busy
    clock = iter([5.0, 5.6])  # of which we used 0.6 s
    monkeypatch.setattr("mpa_edge.benchmarks.host.core_times", lambda: next(ticks))
    monkeypatch.setattr("mpa_edge.benchmarks.host.time.process_time", lambda: next(clock))
    monkeypatch.setattr("mpa_edge.benchmarks.host.os.sysconf", lambda name: 100)
    assert watch_others()() == pytest.approx((100 - 60) / 200)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_the_systems_own_clock_is_read() -> None:
    idle, everything = core_times() or (0, 0)
    assert 0 < idle < everything
