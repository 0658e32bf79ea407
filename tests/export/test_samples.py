"""The questions of a run that a bundle is verified with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mpa_edge.export import samples
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


@pytest.mark.parametrize(("parts", "rows", "count"), [(1, 40, 4), (5, 9, 4), (30, 2, 8)])
def test_others_are_drawn_for_those_whose_pictures_are_gone(parts: int, rows: int, count: int, tmp_path: Path) -> None:
    run = put_run(tmp_path, parts, rows)
    first = {question.prompt for question in run_questions(run, None, count)}
    for path in (run / "cases").glob("part-*.jsonl"):
        cases = [json.loads(line) for line in path.read_text().splitlines()]
        gone = [case | {"sample_id": "gone"} if case["question"] in first else case for case in cases]
        path.write_text("".join(json.dumps(case) + "\n" for case in gone))
    then = [question.prompt for question in run_questions(run, None, count)]
    assert len(set(then)) == count
    assert not first & set(then)


def test_a_short_part_leaves_no_question_out(tmp_path: Path) -> None:
    run = put_run(tmp_path, 3, 9)
    (run / "cases" / "part-00001.jsonl").write_text("")
    assert len({question.prompt for question in run_questions(run, None, 8)}) == 8


def test_empty_parts_at_the_beginning_leave_no_question_out(tmp_path: Path) -> None:
    run = put_run(tmp_path, 7, 9)
    for part in range(4):
        (run / "cases" / f"part-{part:05d}.jsonl").write_text("")
    assert len({question.prompt for question in run_questions(run, None, 4)}) == 4


def test_of_pictures_that_are_all_gone_no_more_are_looked_for_than_memory_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = put_run(tmp_path, 2, 100), []
    (tmp_path / "a.png").unlink()
    monkeypatch.setattr(samples, "MOST_DRAWN", 40)
    monkeypatch.setattr(samples, "_asked", lambda cases, *_: asked.extend(cases) or iter(()))
    assert run_questions(run, None, 4) == []
    assert 16 <= len(asked) <= 40
