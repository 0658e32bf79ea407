"""The benchmark of large runs measures what it says, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from mpa_edge.benchmarks.scale import app


def test_each_size_is_run_and_resumed(tmp_path: Path) -> None:
    result = tmp_path / "scale.json"
    typed = ["--out", str(tmp_path / "out"), "--results", str(result), "--sizes", "20", "--sizes", "40"]
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, done.output
    rows = json.loads(result.read_text())["rows"]
    assert [row["pictures"] for row in rows] == [20, 40]
    for row in rows:
        assert sum(row["first"]["verdicts"].values()) == row["pictures"]
        assert row["resumed"]["verdicts"] == row["first"]["verdicts"]
        assert 0 < row["first"]["training_rows"] == row["resumed"]["training_rows"]
        assert row["first"]["imported_mb"] <= row["first"]["rss_mb"]
    runs = {path.parent.name for path in (tmp_path / "out").glob("run-*/parity.jsonl")}
    assert runs == {"run-20", "run-40"}
