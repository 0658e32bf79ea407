"""The benchmark of large runs measures what it says, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpa_edge.benchmarks.scale import app
from mpa_edge.benchmarks.scale_cost import CostModel


def test_each_size_is_run_and_resumed(tmp_path: Path) -> None:
    result = tmp_path / "scale.json"
    typed = ["--out", str(tmp_path / "out"), "--results", str(result), "--sizes", "20", "--sizes", "40"]
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, done.output
    rows = json.loads(result.read_text())["rows"]
    assert [row["rows"] for row in rows] == [20, 40]
    for row in rows:
        assert sum(row["first"]["verdicts"].values()) == row["rows"]
        assert row["resumed"]["verdicts"] == row["first"]["verdicts"]
        assert 0 < row["first"]["training_rows"] == row["resumed"]["training_rows"]
        assert row["first"]["imported_mb"] <= row["first"]["peak_rss_mb"] <= row["peak_rss_mb"]
        assert row["parts"] == 2
    runs = {path.parent.name for path in (tmp_path / "out").glob("run-*/parity.jsonl")}
    assert runs == {"run-20", "run-40"}
    assert "GPU-hours" in done.output


def test_the_model_of_cost_is_plain_arithmetic() -> None:
    model = CostModel(us_per_row=200, bytes_per_row=1000, write_s=0.1, check_s=0.05, student_s=0.05, usable=0.5)
    assert model.requests(1000) == 4500
    assert model.gpu_hours(3600) == pytest.approx(3 * (0.1 + 0.5 * (0.05 + 0.05)))
    assert model.own_hours(1_000_000) == pytest.approx(600 / 3600)
    assert model.gigabytes(1_000_000) == 3
    assert model.lines()[-3].split()[-3:] == ["125.0h", "15.6h", "2.0h"]
