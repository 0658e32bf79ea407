"""The words: what is picked, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from mpa_edge.benchmarks.verdict import milliseconds, percent, pick, points, size, verdict


def entry(name: str, step: str, accuracy: float | None, p50: float = 10.0, megabytes: float = 5.0) -> dict[str, Any]:
    return {
        "name": name,
        "step": step,
        "role": "bundle" if step in ("full", "quantized") else step,
        "accuracy": {"value": accuracy},
        "latency_ms": {"total": {"p50": p50, "p95": 2 * p50}},
        "size_mb": megabytes,
        "peak_memory_mb": 100.0,
        "gap_closed": 0.5,
        "busy": 0.02,
        "failed": None if accuracy is not None else "out of memory",
    }


def against(a: str, b: str, delta: float, width: float = 0.02, kind: str = "student") -> dict[str, Any]:
    return {"a": a, "b": b, "delta": delta, "ci95": [delta - width, delta + width], "against": kind, "n": 1500}


def test_the_smallest_of_the_good_and_fast_ones_is_picked() -> None:
    bundles = [
        entry("f16", "full", 0.70, p50=10, megabytes=8),
        entry("q8", "quantized", 0.695, p50=11.5, megabytes=5),
        entry("slow", "quantized", 0.70, p50=13, megabytes=3),
        entry("q4", "quantized", 0.66, p50=5, megabytes=2),
        entry("broken", "quantized", None, p50=1, megabytes=1),
    ]
    found = pick([entry("teacher", "teacher", 0.9), *bundles])
    assert found is not None
    assert found["name"] == "q8"
    assert pick([entry("teacher", "teacher", 0.9)]) is None


@pytest.mark.parametrize(
    ("delta", "decision", "headline"),
    [
        (0.10, "deploy", "Deploy q8"),
        (0.01, "undecided", "Undecided"),
        (-0.10, "keep", "Do not deploy q8"),
    ],
)
def test_the_decision_is_the_intervals(delta: float, decision: str, headline: str) -> None:
    entries = [entry("student", "student", 0.5), entry("q8", "quantized", 0.5 + delta)]
    found = verdict(entries, [against("student", "q8", delta)])
    assert (found["decision"], found["pick"]) == (decision, "q8")
    assert found["headline"].startswith(headline)


def test_the_steps_are_told_in_words() -> None:
    entries = [
        entry("teacher", "teacher", 0.9, p50=100, megabytes=50),
        entry("student", "student", 0.5),
        entry("aligned", "aligned", 0.7),
        entry("f16", "full", 0.7),
        entry("q4", "quantized", 0.6),
        entry("q8", "quantized", None),
    ]
    comparisons = [
        against("student", "aligned", 0.2, kind="road"),
        against("aligned", "f16", 0.0, kind="road"),
        against("f16", "q4", -0.1, kind="road"),
        against("student", "f16", 0.2),
    ]
    found = verdict(entries, comparisons)
    assert found["reasons"] == [
        "Alignment raised the student's accuracy: +20.0 points (95% interval +18.0 to +22.0) and closed 50% of the gap "
        "to the teacher.",
        "On the way to the device: no change that 1,500 questions can show in f16; q4 −10.0 points against f16.",
        "Beside the teacher, f16 is 10.0× smaller, 10.0× faster.",
        "q8 failed: out of memory.",
    ]
    assert found["summary"] == (
        "It answers 70.0% right, where the base student has 50.0% and the teacher 90.0%, at 10.0 ms per answer and "
        "5.0 MB on disk."
    )


def test_no_speed_is_claimed_that_other_work_disturbed() -> None:
    teacher, bundle = entry("teacher", "teacher", 0.9, p50=900, megabytes=50), entry("q8", "quantized", 0.7)
    reasons = verdict([{**teacher, "busy": 0.8}, bundle], [])["reasons"]
    assert reasons[0] == "Beside the teacher, q8 is 10.0× smaller."
    assert reasons[1].startswith("Other work took up to 80% of the machine while teacher ran")
    many = [entry(str(n), "full", 0.5) | {"busy": 0.4} for n in range(6)]
    assert "while every variant ran" in verdict(many, [])["reasons"][-1]
    assert "while 6 of 7 variants ran" in verdict([*many, bundle], [])["reasons"][-1]
    assert verdict([{**teacher, "busy": None}, bundle], [])["reasons"] == [
        "Beside the teacher, q8 is 10.0× smaller, 90.0× faster."
    ]


def test_nothing_measured_is_nothing_decided() -> None:
    found = verdict([], [])
    assert (found["decision"], found["pick"], found["summary"], found["reasons"]) == ("none", None, None, [])


def test_figures_are_short() -> None:
    assert [points(value) for value in (0.123, -0.0551, 0.0001, -0.0004)] == ["+12.3", "−5.5", "0.0", "0.0"]
    assert [milliseconds(value) for value in (0.84, 12.34, 345.6, 2410.0, None)] == [
        "0.84 ms", "12.3 ms", "346 ms", "2.41 s", "–",
    ]  # fmt: skip
    assert [size(value) for value in (3.14, 214.6, 2140.0, None)] == ["3.1 MB", "215 MB", "2.14 GB", "–"]
    assert [percent(0.6134), percent(None)] == ["61.3%", "–"]


def required(**status: str) -> dict[str, Any]:
    return {"lines": [], "variants": [{"name": name, "status": one, "checks": []} for name, one in status.items()]}


def test_requirements_come_before_size() -> None:
    entries = [entry("f16", "full", 0.7, megabytes=8), entry("q8", "quantized", 0.7, megabytes=5)]
    found = verdict(entries, [], required(f16="pass", q8="fail"))
    assert (found["pick"], found["decision"]) == ("f16", "deploy")
    assert found["headline"] == "Deploy f16: it keeps every line"
    assert found["why"] == "f16 is the only one of the bundles that keeps every line."
    maybe = verdict(entries, [], required(f16="undecided", q8="fail"))
    assert (maybe["pick"], maybe["decision"]) == ("f16", "undecided")
    none = verdict(entries, [], required(f16="fail", q8="fail"))
    assert (none["pick"], none["decision"], none["headline"]) == ("q8", "reject", "No variant keeps every line")


def test_lines_that_are_kept_do_not_hide_a_better_student() -> None:
    entries = [entry("student", "student", 0.8), entry("q8", "quantized", 0.7)]
    found = verdict(entries, [against("student", "q8", -0.1)], required(student="pass", q8="pass"))
    assert found["decision"] == "keep"
    assert verdict(entries, [against("student", "q8", 0.01)], required(q8="pass"))["decision"] == "deploy"


def test_the_choice_is_told_in_words() -> None:
    entries = [entry("f16", "full", 0.7, megabytes=8), entry("q8", "quantized", 0.7, megabytes=5)]
    assert verdict(entries, [])["why"] == (
        "Of 2 bundles, 2 are within a point of the most accurate and a fifth of the fastest of those; q8 is the "
        "smallest of these."
    )


def test_models_are_picked_from_where_there_is_no_bundle() -> None:
    entries = [entry("teacher", "teacher", 0.9), entry("a", "other", 0.5), entry("b", "other", 0.7)]
    assert verdict(entries, [])["pick"] == "b"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("teacher", "student"), "where the base student has 50.0% and the teacher 90.0%, at"),
        (("teacher",), "where the teacher has 90.0%, at"),
        (("student",), "where the base student has 50.0%, at"),
        ((), "70.0% right, at"),
    ],
)
def test_the_summary_names_who_was_measured(steps: tuple[str, ...], words: str) -> None:
    entries = [entry(step, step, {"teacher": 0.9, "student": 0.5}[step]) for step in steps]
    assert words in verdict([*entries, entry("q8", "full", 0.7)], [])["summary"]


def test_costs_alone_name_the_fastest_and_the_lightest() -> None:
    def costs(*found: tuple[str, float, float | None]) -> str | None:
        entries = [
            {**entry(name, "full", None, p50=p50), "peak_memory_mb": mb, "failed": None} for name, p50, mb in found
        ]
        told: str | None = verdict(entries, [], data={"n": 0})["summary"]
        return told

    assert costs(("q8", 10, 200), ("q4", 20, 100)) == (
        "q8 is the fastest, at 10.0 ms per answer, and q4 takes the least memory, 100 MB."
    )
    assert costs(("q8", 10, 100), ("q4", 20, 200)) == (
        "q8 is the fastest, at 10.0 ms per answer, and takes the least memory, 100 MB."
    )
    assert costs(("q8", 10, 100)) == "q8 takes 10.0 ms per answer and 100 MB of memory."
    assert costs(("server", 10, None), ("other", 20, None)) == "server is the fastest, at 10.0 ms per answer."
    assert costs() is None
