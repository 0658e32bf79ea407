"""What a log shows of long work."""

from __future__ import annotations

from collections import Counter

import pytest

from mpa_edge import progress as module
from mpa_edge.progress import counting, progress


def test_a_log_gets_a_line_with_count_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "rejected", Counter())  # by what ran before in this process
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("ask", 1000) as advance:
        advance(400)  # found on disk: no time, and nobody's rate
        for _ in range(6):
            now[0] += 10
            advance(50)
        now[0] += 70
        advance(300)
    assert capsys.readouterr().err.splitlines() == [
        "ask: 550 of 1,000, 5.0/s, 0:01:30 left",
        "ask: 700 of 1,000, 5.0/s, 0:01:00 left",
        "ask: 1,000 of 1,000 in 0:02:10",
    ]


def test_short_work_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("scan") as tell:
        tell(1, 3)
        tell(3, 3)
    assert capsys.readouterr().err == "scan: 3 of 3 in 0:00:00\n"
