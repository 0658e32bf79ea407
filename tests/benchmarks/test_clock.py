"""Latency on a clock of our own: every millisecond that a model takes is in its phase and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mpa_edge.benchmarks import timed
from mpa_edge.benchmarks.jobs import Ask
from mpa_edge.benchmarks.report import phase_rows
from mpa_edge.benchmarks.score import PHASES, latency
from mpa_edge.benchmarks.timed import measure_latency, warm_up
from mpa_edge.fake import FakeSettings, FakeVlm
from mpa_edge.runtime.vlm import Answer, Decoding


class Clock:
    """A clock that only goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In the place of the system's; reading a picture's file takes a second of it."""
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(time, "sleep", found.sleep)

    def slow_disk(path: str) -> Image.Image:
        found.sleep(1)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(timed, "open_image", slow_disk)
    return found


def asks(n: int) -> list[Ask]:
    return [Ask(str(number), f"{number}.png", "What?") for number in range(n)]


@pytest.mark.parametrize("slow", PHASES)
def test_a_slow_phase_is_that_phase_alone(clock: Clock, slow: str) -> None:
    usual = {"preprocess": 1.0, "vision": 2.0, "prefill": 3.0, "decode": 4.0}
    taken = {**usual, slow: 250.0}
    rows = measure_latency(FakeVlm(settings=FakeSettings(**taken)), asks(5), Decoding(), lambda *_: None)
    found = latency(rows)
    assert {phase: found[phase] for phase in PHASES} == pytest.approx(taken)
    assert found["mean"] == pytest.approx({**taken, "total": sum(taken.values())})
    assert found["total"]["p50"] == found["total"]["max"] == pytest.approx(sum(taken.values()))  # and no file's second
    (row,) = phase_rows([{"name": "x", "latency_ms": found}])
    assert {part["phase"]: part["ms"] for part in row["segments"]} == pytest.approx(taken)


class Growing:
    """Takes 1 ms for the first picture, 2 for the second, and so on, and tells nothing about phases."""

    name = engine = "growing"

    def __init__(self, clock: Clock) -> None:
        self.clock, self.asked = clock, 0

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding) -> list[Answer]:
        self.asked += 1
        self.clock.sleep(self.asked / 1000)
        return [Answer("x", (1,))]


def test_percentiles_and_the_rate_of_known_times(clock: Clock) -> None:
    model: Any = Growing(clock)
    told: list[tuple[str, int, int]] = []
    rows = measure_latency(model, asks(100), Decoding(), lambda *progress: told.append(progress))
    found = latency(rows)
    expected = {"p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01, "max": 100.0}
    assert found["total"] == pytest.approx(expected)
    assert found["questions_per_minute"] == pytest.approx(60_000 / 50.5, abs=0.1)
    assert found["vision"] is None
    assert told[-1] == ("latency", 100, 100)


def test_the_first_answer_of_all_is_the_warm_ups(clock: Clock) -> None:
    model: Any = Growing(clock)
    assert warm_up(model, asks(3), Decoding()) == pytest.approx(1.0)
    assert measure_latency(model, asks(1), Decoding(), lambda *_: None)[0].wall_ms == pytest.approx(4.0)
    assert warm_up(model, [], Decoding()) is None


def test_a_picture_that_cannot_be_read_takes_no_time(clock: Clock, tmp_path: Path, monkeypatch: Any) -> None:
    from mpa_edge.runtime.images import open_image

    monkeypatch.setattr(timed, "open_image", open_image)
    rows = measure_latency(FakeVlm(), [Ask("a", str(tmp_path / "gone.png"), "?")], Decoding(), lambda *_: None)
    assert (rows[0].wall_ms, rows[0].finish_reason) == (None, "error")
    assert latency(rows)["n"] == 0
