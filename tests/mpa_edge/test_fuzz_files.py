"""What the tool itself wrote, and gets back with other content: reports, runs, stages, caches; and what is typed.

More of `test_fuzz.py`, which has what pictures, questions and teachers bring; `tests/makers/fuzzing.py` says how to let
it run for longer.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fuzzing import fuzzed, mutated, refused_in_one_line, texts, written
from mpa_edge import watching
from mpa_edge.benchmarks.earlier import earlier
from mpa_edge.benchmarks.regress import regressions
from mpa_edge.chat_address import parse_spec
from mpa_edge.errors import InputError, MpaEdgeError, RunError
from mpa_edge.fake import open_fake
from mpa_edge.memo import MemoVlm
from mpa_edge.mirror import Mirror
from mpa_edge.parts import Parts, asked_about, open_stage
from mpa_edge.records import Sample
from mpa_edge.remember import remembered
from mpa_edge.run_events import LOG, Events
from mpa_edge.run_folder import RUN
from mpa_edge.status import status_of
from mpa_edge.sums import SUMS, refuse_damaged
from mpa_edge.terminal import shown

NESTED = "[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- bench --compare -------------------------------------------------------------------------------------------------

ENTRY = {
    "name": "gguf-q8_0",
    "failed": None,
    "accuracy": {"value": 0.5, "ci95": [0.4, 0.6]},
    "latency_ms": {"total": {"p50": 10.0}},
    "size_mb": 1.0,
    "peak_memory_mb": 100.0,
    "conditions": {"power_mode": "15W", "disturbed": None},
}
REPORT = {
    "created": "2026-01-01T00:00:00+00:00",
    "tool_version": "0.1.0",
    "variants": [ENTRY, ENTRY | {"name": "gone"}],
    "task": {"metric": "vqa_accuracy"},
    "host": {"cpu": "a", "cores": 2},
    "settings": {"threads": 2},
    "data": {"sha256": "0"},
}
RAW = [
    {"variant": "gguf-q8_0", "part": "accuracy", "id": "1", "question": "q", "score": 1.0},
    {"variant": "gguf-q8_0", "part": "latency", "key": "1", "wall_ms": 10.0},
]


@fuzzed(60)
@given(written(REPORT), st.lists(written(RAW[0]) | written(RAW[1]), max_size=2))
def test_an_earlier_report(folder: Path, report: bytes, rows: list[bytes]) -> None:
    (folder / "report.json").write_bytes(report)
    (folder / "raw.jsonl").write_bytes(b"\n".join(rows))
    refused_in_one_line(
        lambda: regressions(earlier(folder / "report.json"), json.loads(json.dumps(REPORT)), RAW, 0), InputError
    )


# --- runs ------------------------------------------------------------------------------------------------------------

STAGE = {"fingerprint": {"input": "x", "task": {"name": "t"}}, "parts": 1}
RUN_JSON = {
    "config": {"rounds": 1, "task": "textvqa", "images": "."},
    "task": {"name": "t", "annotate_prompts": ["p"]},
    "teacher": {"name": "t", "engine": "chat"},
    "student": {"name": "s"},
    "stages": {
        "samples": {"used": 1, "skipped": {"duplicate": 1}, "seconds": 1.0},
        "level": {"before": {}, "best": {}},
    },
    "versions": {"python": "3.11"},
}
LINES = [
    {"time": "2026-11-22T10:00:00Z", "event": "started", "pid": 1},
    {"time": "2026-11-22T10:00:00Z", "event": "progress", "stage": "ask", "done": 1, "of": 2, "rate": 1.0, "left_s": 1},
    {"time": "2026-11-22T10:00:00Z", "event": "failed", "error": "ModelError", "message": "m"},
]


@fuzzed(60)
@given(written(RUN_JSON), written(STAGE), st.lists(st.sampled_from(LINES).flatmap(written), max_size=4), st.booleans())
@example(NESTED.encode(), NESTED.encode(), [NESTED.encode()], True)
@example(rb'{"stages": {"\ud800": {"seconds": Infinity, "rows": 1e999}}}', b"", [], False)
def test_the_status_of_a_run(folder: Path, run: bytes, stage: bytes, lines: list[bytes], running: bool) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / RUN).write_bytes(run)
    (folder / LOG).write_bytes(b"\n".join(lines))
    (folder / "annotations" / "stage.json").write_bytes(stage)
    status = replace(status_of(folder), running=running)
    assert json.loads(status.to_json().encode(), parse_constant=pytest.fail)
    shown(status.summary()).encode()  # can be written on a terminal


@fuzzed(60)
@given(written(STAGE))
@example(NESTED.encode())
def test_the_settings_of_a_stage(folder: Path, stage: bytes) -> None:
    (folder / "stage").mkdir(exist_ok=True)
    (folder / "stage" / "stage.json").write_bytes(stage)
    refused_in_one_line(lambda: open_stage(folder / "stage", STAGE["fingerprint"]), RunError)  # type: ignore[arg-type]
    refused_in_one_line(lambda: Parts(folder / "stage", Sample).count, RunError)
    asked_about(folder / "stage")


@fuzzed(40)
@given(written({"key": "0", "files": ["0"], "value": 1}))
@example(NESTED.encode())
def test_what_is_remembered(folder: Path, content: bytes) -> None:
    (folder / "known.json").write_bytes(content)
    assert remembered(folder / "known.json", 1, lambda: 2) == 2


@fuzzed(40)
@given(st.lists(written({"key": "0" * 32, "text": "t", "finish": "stop", "error": None}), max_size=3))
@example([NESTED.encode()])
def test_answers_that_are_kept(folder: Path, lines: list[bytes]) -> None:
    (folder / "answers.jsonl").write_bytes(b"\n".join(lines))
    MemoVlm(open_fake("fake:"), folder / "answers.jsonl")


@fuzzed(40)
@given(mutated(b"".join(b"%s  %s\n" % (b"0" * 64, name) for name in (b"a", b"b"))))
def test_digests_of_a_student(folder: Path, content: bytes) -> None:
    (folder / "student").mkdir(exist_ok=True)
    (folder / "student" / SUMS).write_bytes(content)
    refused_in_one_line(lambda: refuse_damaged(folder / "student"), RunError)


reasons = texts.filter(lambda text: "\ud800" not in text)


@fuzzed(40)
@given(st.lists(reasons, max_size=4), reasons)
def test_metrics_for_prometheus(folder: Path, rejected: list[str], stage: str) -> None:
    watching.rejected.clear()
    watching.rejected.update(rejected)
    events = Events(folder / "events.jsonl", folder / "metrics.prom")
    events.began()
    events.finished(stage, {"seconds": 1.0})
    watching.rejected.clear()
    told = (folder / "metrics.prom").read_bytes().decode()
    samples = [sample for family in text_string_to_metric_families(told) for sample in family.samples]
    counts = {sample.labels["reason"]: sample.value for sample in samples if "reason" in sample.labels}
    assert counts == Counter(rejected)
    assert stage in [sample.labels["stage"] for sample in samples if "stage" in sample.labels]


# --- what is typed ---------------------------------------------------------------------------------------------------

ADDRESSES = [
    "http://",
    "https://",
    "s3://",
    "memory://",
    "fake:?",
    "[::1]",
    ":8000",
    ":99999",
    "/v1",
    "#m",
    "@",
    ",",
    "%",
]
ADDRESSES += ["known=", "right=", "seed=", "&", "nan", "1e999", "localhost"]
typed = st.lists(st.sampled_from(ADDRESSES) | texts, max_size=6).map("".join)


@fuzzed(100)
@given(typed)
def test_addresses(text: str) -> None:
    refused_in_one_line(lambda: parse_spec(text), InputError)
    refused_in_one_line(lambda: open_fake("fake:" + text), MpaEdgeError)


@fuzzed(60)
@given(typed)
@example("s3://[x")
def test_mirrors(folder: Path, text: str) -> None:
    if text.startswith(("http", "s3://a")):
        return
    refused_in_one_line(lambda: Mirror(text, {"a": folder}), MpaEdgeError)
