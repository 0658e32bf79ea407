"""The harness on fakes: fresh processes, caching, resuming, failures, and the schema."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mpa_edge.benchmarks.bench import BenchConfig, bench
from mpa_edge.benchmarks.jobs import Job, whole_rows
from mpa_edge.benchmarks.measure import Measured, Say, measure
from mpa_edge.benchmarks.sample import items_of
from mpa_edge.benchmarks.variants import Variant
from mpa_edge.benchmarks.worker import collect_answers
from mpa_edge.errors import InputError, ModelError
from mpa_edge.fake import open_fake
from mpa_edge.labelled import read_questions
from mpa_edge.runtime.vlm import Decoding


def run(labelled: Path, report: Path, **settings: Any) -> dict[str, Any]:
    values = {"data": labelled, "task": "reference", "report": report, "latency_n": 5, "batch_size": 7, "threads": 1}
    values |= {"keep_timings": True}  # the machine of the tests does other work
    return json.loads(bench(BenchConfig(**{**values, **settings}), silent).read_text())


def silent(name: str, phase: str, done: int, of: int) -> None:
    """No bars in a test's output."""
    assert 0 <= done <= of, (name, phase)


def fake(labelled: Path, **settings: Any) -> str:
    return "fake:?" + "&".join(f"{key}={value}" for key, value in {"known": labelled, **settings}.items())


@pytest.fixture(scope="module")
def road(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole road: teacher, student, aligned and one bundle; one baseline cannot be opened."""
    folder = tmp_path_factory.mktemp("report")
    baselines = [
        f"teacher={fake(labelled, right=0.9)}",
        f"student={fake(labelled, right=0.4)}",
        f"aligned={fake(labelled, right=0.7, vision=15)}",
        "merged=fake:?broken=out+of+memory",
    ]
    return folder, run(labelled, folder, baselines=baselines, bundles=[fake(labelled, right=0.7)])


def variant(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in report["variants"] if entry["name"] == name)


def test_the_report_keeps_its_schema(road: tuple[Path, dict[str, Any]]) -> None:
    schema = json.loads(files("mpa_edge.benchmarks").joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(road[1], schema, format_checker=jsonschema.FormatChecker())
    broken = json.loads(json.dumps(road[1]))
    broken["variants"][0]["accuracy"]["value"] = 88.3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_accuracies_are_those_of_the_fakes(road: tuple[Path, dict[str, Any]]) -> None:
    teacher, student = variant(road[1], "teacher"), variant(road[1], "student")
    assert teacher["accuracy"]["n"] == road[1]["data"]["n"] == 60
    assert 0.75 < teacher["accuracy"]["value"] < 1 > student["accuracy"]["value"] < 0.6
    low, high = teacher["accuracy"]["ci95"]
    assert low < teacher["accuracy"]["value"] < high
    assert {kind: found["n"] for kind, found in teacher["kinds"].items()} == {"colour": 20, "count": 20, "reading": 20}
    assert teacher["groups"]["charts"]["n"] == 20
    assert (teacher["role"], teacher["engine"], teacher["quantization"]) == ("teacher", "fake", None)


def test_comparisons_follow_the_road_and_meet_both_ends(road: tuple[Path, dict[str, Any]]) -> None:
    pairs = {(found["a"], found["b"]): found for found in road[1]["comparisons"]}
    assert set(pairs) == {
        ("teacher", "student"),
        ("student", "aligned"),
        ("aligned", "fake"),
        ("teacher", "aligned"),
        ("teacher", "fake"),
        ("student", "fake"),
    }
    gain = pairs["student", "aligned"]
    values = [variant(road[1], name)["accuracy"]["value"] for name in ("student", "aligned", "teacher")]
    assert gain["delta"] == pytest.approx(values[1] - values[0], abs=1e-4)
    assert gain["ci95"][0] > 0
    assert gain["p"] < 0.01
    assert road[1]["gap_closed"] == pytest.approx((values[1] - values[0]) / (values[2] - values[0]), abs=1e-3)


def test_a_slow_phase_shows_up_in_that_phase(road: tuple[Path, dict[str, Any]]) -> None:
    times = variant(road[1], "aligned")["latency_ms"]
    assert times["n"] == 5
    assert times["vision"] >= 15 > times["preprocess"] + times["decode"]
    assert times["total"]["p95"] >= times["total"]["p50"] >= times["vision"]


def test_a_variant_that_fails_says_why_and_stops_nobody(road: tuple[Path, dict[str, Any]]) -> None:
    merged = variant(road[1], "merged")
    assert "out of memory" in merged["failed"]
    assert merged["accuracy"]["value"] is merged["latency_ms"]["total"]["p50"] is merged["peak_memory_mb"] is None
    assert variant(road[1], "fake")["accuracy"]["value"] is not None


def test_memory_is_the_variants_own(labelled: Path, road: tuple[Path, dict[str, Any]]) -> None:
    ballast = bytearray(os.urandom(1024) * 400_000)  # 400 MB that no worker should be charged with
    report = run(labelled, road[0].parent / "ballast", baselines=[fake(labelled)])
    assert len(ballast) > 4e8
    assert 10 < report["variants"][0]["peak_memory_mb"] < 300


def test_raw_rows_keep_each_answer_and_timing(road: tuple[Path, dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in (road[0] / "raw.jsonl").read_text().splitlines()]
    answers = [row for row in rows if row["variant"] == "student" and row["part"] == "accuracy"]
    assert len(answers) == 60
    assert sum(row["score"] for row in answers) / 60 == pytest.approx(
        variant(road[1], "student")["accuracy"]["value"], abs=1e-4
    )
    assert sum(row["variant"] == "aligned" and row["part"] == "latency" for row in rows) == 5


def test_no_machine_path_or_label_leaks(labelled: Path, road: tuple[Path, dict[str, Any]]) -> None:
    assert str(labelled.parent) not in json.dumps(road[1])
    assert os.uname().nodename not in json.dumps(road[1]["host"])


def test_a_second_run_asks_only_what_is_new(labelled: Path, tmp_path: Path) -> None:
    baselines = [f"student={fake(labelled, right=0.5)}"]
    half = run(labelled, tmp_path, baselines=baselines, limit=30)
    (rows,) = tmp_path.glob("raw/student-*/answers.jsonl")
    first = rows.read_text()
    assert (half["data"]["n"], half["data"]["of"], len(first.splitlines())) == (30, 60, 30)
    assert {kind: found["n"] for kind, found in half["variants"][0]["kinds"].items()} == dict.fromkeys(
        ("colour", "count", "reading"), 10
    )
    latency = (rows.parent / "latency.jsonl").read_text()
    whole = run(labelled, tmp_path, baselines=baselines)
    assert rows.read_text().startswith(first)
    assert len(rows.read_text().splitlines()) == 60
    assert (rows.parent / "latency.jsonl").read_text() == latency
    assert whole["variants"][0]["peak_memory_mb"] == half["variants"][0]["peak_memory_mb"]


def test_an_interrupted_variant_goes_on(labelled: Path, tmp_path: Path) -> None:
    baselines = [f"student={fake(labelled, right=0.5)}"]
    before = run(labelled, tmp_path, baselines=baselines)
    (rows,) = tmp_path.glob("raw/student-*/answers.jsonl")
    whole = rows.read_bytes()
    rows.write_bytes(whole[: len(whole) * 2 // 3])  # torn in the middle of a row
    after = run(labelled, tmp_path, baselines=baselines)
    assert sorted(rows.read_bytes().splitlines()) != []
    assert len(rows.read_bytes().splitlines()) == 60
    assert after["variants"][0]["accuracy"] == before["variants"][0]["accuracy"]


def test_a_model_that_changed_is_asked_again(labelled: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.jsonl"
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    known.write_text("".join(json.dumps({**row, "image": str(labelled.parent / row["image"])}) + "\n" for row in rows))
    spec = f"student=fake:?known={known}"
    assert run(labelled, tmp_path / "report", baselines=[spec])["variants"][0]["accuracy"]["value"] == 1
    known.write_text(known.read_text().replace('"top ', '"nothing at the top '))
    assert run(labelled, tmp_path / "report", baselines=[spec])["variants"][0]["accuracy"]["value"] == 0.5


def test_code_that_a_model_brings_is_for_the_flag_to_allow_and_the_report_says_so(
    road: tuple[Path, dict[str, Any]], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert road[1]["settings"]["trust_remote_code"] is False
    jobs = []

    def watched(variant: Variant, job: Job, raw: Path, say: Say) -> Measured:
        jobs.append(job)
        return measure(variant, job, raw, say)

    monkeypatch.setattr("mpa_edge.benchmarks.bench.measure", watched)
    found = run(labelled, tmp_path, baselines=[fake(labelled)], limit=5, trust_remote_code=True)
    assert found["settings"]["trust_remote_code"] is jobs[0].trust_remote_code is True


def test_refusals_count_as_wrong_and_are_counted(labelled: Path, tmp_path: Path) -> None:
    report = run(labelled, tmp_path, baselines=[f"student={fake(labelled, refuse=0.3)}"])
    (entry,) = report["variants"]
    (refused,) = entry["errors"].values()
    assert 5 < refused < 30
    assert entry["accuracy"]["value"] == pytest.approx(1 - refused / 60, abs=1e-4)
    assert entry["accuracy"]["n"] == 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baselines": []}, "nothing to measure"),
        ({"baselines": ["student=fake:"], "task": None}, "--task is needed"),
        ({"baselines": ["student=fake:"], "task": "chess"}, "no such task"),
        ({"baselines": ["student=./nowhere"]}, "no model folder"),
        ({"baselines": ["fake:"], "limit": 0}, "--limit 0"),
        ({"baselines": ["fake:"], "data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_settings_name_the_flag(labelled: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(labelled, tmp_path, **settings)


def test_answers_side_by_side_are_all_there_and_in_order(labelled: Path, tmp_path: Path) -> None:
    items = items_of(read_questions(labelled), lambda question: question)
    vlms = [open_fake(fake(labelled, vision=1)) for _ in range(3)]
    wanted = [item.ask for item in items]
    collect_answers(vlms, wanted, Decoding(), 4, tmp_path / "answers.jsonl", lambda phase, done, of: None)
    assert [row.key for row in whole_rows(tmp_path / "answers.jsonl")] == [ask.key for ask in wanted]


def test_one_that_fails_ends_the_others(labelled: Path, tmp_path: Path) -> None:
    class Broken:
        def answer(self, *_: object) -> list[Any]:
            raise ModelError("the engine gave up")

    items = items_of(read_questions(labelled), lambda question: question)
    with pytest.raises(ModelError, match="gave up"):
        collect_answers(
            [Broken(), Broken()],  # type: ignore[list-item]
            [item.ask for item in items],
            Decoding(),
            1,
            tmp_path / "answers.jsonl",
            lambda phase, done, of: None,
        )
