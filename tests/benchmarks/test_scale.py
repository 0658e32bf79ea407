"""The benchmark of large runs, on a small one."""

from __future__ import annotations

from pathlib import Path

from mpa_edge.benchmarks.scale import measure, write_pictures


def test_a_run_of_fakes_is_measured_and_resumed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 60)
    first, resumed = measure(tmp_path, 60), measure(tmp_path, 60)
    assert set(first["verdicts"]) == {"agree", "parity", "unconfirmed"}
    assert sum(first["verdicts"].values()) == 60
    assert 0 < first["training_rows"] <= 60
    assert first["rss_mb"] >= first["imported_mb"] > 10
    assert (resumed["verdicts"], resumed["training_rows"]) == (first["verdicts"], first["training_rows"])
