"""bench with --require and --compare on fakes: the decision, the exit code, and what became worse."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from mpa_edge.benchmarks import measure
from mpa_edge.benchmarks.bench import BenchConfig, bench
from mpa_edge.benchmarks.earlier import Earlier, earlier
from mpa_edge.benchmarks.jobs import Job
from mpa_edge.benchmarks.outcome import BROKEN, UNDECIDED, exit_code, outcome
from mpa_edge.benchmarks.regress import changes_of, regressions
from mpa_edge.benchmarks.require import requirements
from mpa_edge.benchmarks.variants import Variant
from mpa_edge.benchmarks.verdict import verdict
from mpa_edge.cli import app
from mpa_edge.errors import InputError


def fake(labelled: Path, right: float) -> str:
    return f"fake:?known={labelled}&right={right}"


def run(labelled: Path, report: Path, **settings: Any) -> Path:
    given = {"data": labelled, "task": "reference", "report": report, "latency_n": 5, "threads": 1}
    given |= {"keep_timings": True}  # the machine of the tests does other work
    return bench(BenchConfig(**{**given, **settings}), lambda *_: None)


@pytest.fixture(scope="module")
def old(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(labelled, tmp_path_factory.mktemp("old"), bundles=[fake(labelled, 0.9)])


@pytest.fixture(scope="module")
def new(labelled: Path, old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    return run(labelled, folder, bundles=[fake(labelled, 0.6)], compare=old, require="accuracy>=0.3")


def again(old: Path, new: Path, **changed: Any) -> dict[str, Any]:
    """The comparison, with some of the earlier report changed."""
    before, rows = earlier(old), [json.loads(line) for line in (new.parent / "raw.jsonl").read_text().splitlines()]
    report = {**before.report, **changed}
    return regressions(Earlier(report, changed.get("rows", before.rows)), json.loads(new.read_text()), rows, 0)


def test_a_regression_is_found_and_told(old: Path, new: Path) -> None:
    report = json.loads(new.read_text())
    jsonschema.validate(report, json.loads(files("mpa_edge.benchmarks").joinpath("report.schema.json").read_text()))
    found = {one["quantity"]: one for one in report["regressions"]["changes"]}
    assert found["accuracy"]["regression"]
    assert (found["accuracy"]["paired"], found["time"]["paired"]) == (60, 5)
    assert found["accuracy"]["ci95"][0] < found["accuracy"]["delta"] < found["accuracy"]["ci95"][1] < 0
    lines, code = outcome(new)
    assert code == 5
    assert any("fake: accuracy" in line and "paired over 60" in line for line in lines)


def test_no_change_is_no_regression(old: Path) -> None:
    assert again(old, old)["found"] == 0


def test_without_raw_rows_the_intervals_decide(old: Path, new: Path) -> None:
    change = next(one for one in again(old, new, rows=[])["changes"] if one["quantity"] == "accuracy")
    assert (change["paired"], change["regression"]) == (0, True)
    assert change["ci95"][0] < change["delta"] < change["ci95"][1] < 0


def test_what_cannot_be_compared_is_left_out_and_told(old: Path, new: Path) -> None:
    found = again(old, new, host={"cpu": "another", "cores": 1})
    assert {one["quantity"] for one in found["changes"]} == {"accuracy"}
    assert "another machine" in found["notes"][0]
    with pytest.raises(InputError, match="metric is anls"):
        again(old, new, task={"metric": "anls"})


def test_another_power_mode_is_told_and_is_measured_anew(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(old.read_text())
    before, now = (
        {**report, "variants": [{**one, "conditions": {"power_mode": mode}} for one in report["variants"]]}
        for mode in ("MAXN", "15W")
    )
    found = regressions(Earlier(before, []), now, [], 0)
    assert found["notes"] == ["the power mode was MAXN, now it is 15W"]
    for one in now["variants"]:
        times = one["latency_ms"]["total"]
        one["latency_ms"] = {**one["latency_ms"], "total": {**times, "p50": 3 * times["p50"]}}
    assert regressions(Earlier(before, []), now, [], 0)["found"] == 0
    assert regressions(Earlier(now, []), now, [], 0)["notes"] == []
    variant, job = Variant("q8", "fake:", "full", "fake"), Job("q8", "fake:", 1, 8, 1, [], [], [])
    names = set()
    for mode in (None, "MAXN", "15W"):
        monkeypatch.setattr(measure, "power_mode", lambda mode=mode: mode)
        names.add(measure.folder_name(variant, job, "digest"))
    assert len(names) == 3


def test_of_costs_alone_the_bundles_keep_the_requirements() -> None:
    def code(**status: str) -> int:
        rated = [{"name": name, "status": one} for name, one in status.items()]
        roles = [{"name": name, "role": "bundle" if name.startswith("q") else "teacher"} for name in status]
        required = {"variants": rated}
        return exit_code({
            "requirements": required, "variants": roles, "verdict": {"decision": "none"}, "data": {"n": 0},
            "regressions": None,
        })  # fmt: skip

    assert code(teacher="pass") == 0
    assert code(teacher="pass", q8="fail") == BROKEN
    assert code(teacher="pass", q8="unknown", q4="fail") == UNDECIDED
    assert code(teacher="fail", q8="pass", q4="fail") == 0


def test_slower_larger_and_failed_variants_are_regressions() -> None:
    def entry(p50: float, size: float, busy: float = 0, failed: str | None = None) -> dict[str, Any]:
        accuracy = {"value": 0.5, "ci95": [0.4, 0.6]}
        latency = {"total": {"p50": p50}}
        return {"name": "q8", "accuracy": accuracy, "latency_ms": latency, "size_mb": size, "peak_memory_mb": None,
                "busy": busy, "failed": failed}  # fmt: skip

    def rows(factor: float) -> dict[str, Any]:
        return {"accuracy": {}, "latency": {(n,): {"wall_ms": factor * (10 + n)} for n in range(20)}}

    def found(new: dict[str, Any], factor: float) -> dict[str, bool]:
        changes = changes_of(entry(20, 5), new, rows(1), rows(factor), 0)
        return {one["quantity"]: one["regression"] for one in changes}

    assert found(entry(20, 5), 1.05) == {"accuracy": False, "time": False, "size": False}
    assert found(entry(30, 6), 1.5) == {"accuracy": False, "time": True, "size": True}
    assert found(entry(30, 5, busy=0.5), 1.5)["time"] is False
    assert found(entry(30, 5, failed="out of memory"), 1) == {"failed": True}


@pytest.mark.parametrize(
    ("require", "decision", "code"),
    [
        ("accuracy>=0.5, p95<=2s", "undecided", 4),  # five timings cannot bound a 95th percentile
        ("accuracy>=0.5, memory<=1GB", "deploy", 0),
        ("accuracy>=0.99, memory<=1GB", "reject", 3),
        ("accuracy>=0.5, gap_closed>=0", "undecided", 4),  # no teacher, so nobody knows
    ],
)
def test_the_exit_code_is_the_decisions(old: Path, tmp_path: Path, require: str, decision: str, code: int) -> None:
    report = json.loads(old.read_text())
    report["requirements"] = requirements(require, report["variants"], {"fake": [1.0] * 5})
    report["verdict"] = verdict(report["variants"], [], report["requirements"])
    (tmp_path / "report.json").write_text(json.dumps(report))
    lines, found = outcome(tmp_path / "report.json")
    assert (report["verdict"]["decision"], found) == (decision, code)
    assert len([line for line in lines if line.startswith("    ")]) == 2  # what is picked shows both lines


def test_the_command_line_goes_the_same_way(labelled: Path, old: Path) -> None:
    arguments = ["bench", fake(labelled, 0.9), "--data", str(labelled), "--task", "reference", "--threads", "1"]
    arguments += ["--report", str(old.parent), "--latency-n", "5", "--require", "accuracy>=0.99", "--limit", "20"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code in (3, 4), done.output
    assert "accuracy>=0.99:" in done.output


@pytest.mark.parametrize(("content", "words"), [("{}", "not the report.json"), ("no json", "cannot be read")])
def test_what_is_no_report_is_refused(labelled: Path, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "old.json").write_text(content)
    with pytest.raises(InputError, match=words):
        run(labelled, tmp_path, baselines=[fake(labelled, 1)], compare=tmp_path / "old.json")


def test_bad_flags_are_told() -> None:
    with pytest.raises(InputError, match="--require 'p95<=3': p95 needs"):
        BenchConfig(data="x", require="p95<=3")
    with pytest.raises(InputError, match=r"--compare nowhere.json: no such file"):
        BenchConfig(data="x", compare="nowhere.json")
