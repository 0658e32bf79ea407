"""The questions of a run that a bundle is verified with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.export.samples import run_questions
from mpa_edge.records import Case, Sample, write_rows


def put_run(folder: Path, parts: int, rows: int) -> Path:
    """A run whose cases are numbered."""
    Image.new("RGB", (20, 30)).save(folder / "a.png")
    write_rows(folder / "samples.jsonl", [Sample("s", str(folder / "a.png"), "0" * 64)])
    for part in range(parts):
        names = (str(part * rows + row) for row in range(rows))
        cases = [Case(name, "s", name, "a", "a", "b", 1.0, 0.0, "parity") for name in names]
        write_rows(folder / "cases" / f"part-{part:05d}.jsonl", cases)
    (folder / "cases" / "stage.json").write_text(json.dumps({"parts": parts, "fingerprint": {}}))
    (folder / "run.json").write_text(json.dumps({"config": {"images": str(folder)}}))
    return folder


@pytest.mark.parametrize(
    ("parts", "rows", "count", "numbers"),
    [
        (1, 9, 4, [0, 2, 4, 6]),
        (2, 9, 4, [0, 4, 9, 13]),
        (2, 9, 3, [0, 4, 9]),
        (3, 1, 8, [0, 1, 2]),
        (9, 2, 3, [0, 6, 12]),
    ],
)
def test_they_are_from_all_over(parts: int, rows: int, count: int, numbers: list[int], tmp_path: Path) -> None:
    questions = run_questions(put_run(tmp_path, parts, rows), None, count)
    assert [int(question.prompt) for question in questions] == numbers


def test_a_large_run_is_not_read_through_for_a_few(tmp_path: Path) -> None:
    run = put_run(tmp_path, 10, 2)
    for part in range(10):
        if part not in (0, 5):
            (run / "cases" / f"part-{part:05d}.jsonl").write_text("not read")
    assert [question.prompt for question in run_questions(run, None, 2)] == ["0", "10"]
