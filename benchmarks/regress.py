"""`--compare old.json`: what became worse since an earlier report.

Variants are paired by name. Accuracy is compared question by question where the earlier report's raw.jsonl lies beside
it, and by the two intervals otherwise; times picture by picture or by medians, and only on the same machine with the
same threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, hypot, log
from typing import Any

from mpa_edge.benchmarks.earlier import Earlier
from mpa_edge.benchmarks.pareto import HEAVIER_FROM, LARGER_FROM, SLOWER_FROM
from mpa_edge.benchmarks.require import disturbed
from mpa_edge.errors import InputError
from mpa_edge.stats import mean_interval, paired_difference

Rows = Sequence[dict[str, Any]]


def regressions(before: Earlier, report: dict[str, Any], rows: Rows, seed: int) -> dict[str, Any]:
    """The report's `regressions`. `InputError` where the two have different metrics."""
    old, metrics = before.report, (before.report["task"]["metric"], report["task"]["metric"])
    if metrics[0] != metrics[1]:
        raise InputError(f"--compare: the earlier report's metric is {metrics[0]}, this one's {metrics[1]}")
    entries = {entry["name"]: entry for entry in report["variants"]}
    changes: list[dict[str, Any]] = []
    gone = []
    for entry in old["variants"]:
        name = entry["name"]
        if name not in entries:
            gone.append(name)
        elif not entry["failed"]:
            pairs = pair_of(before.rows, name), pair_of(rows, name)
            changes += changes_of(entry, entries[name], *pairs, seed, other_mode(old, report))
    obstacle = why_no_times(old, report)
    if obstacle:
        changes = [one for one in changes if one["quantity"] not in ("time", "memory")]
    return {
        "against": {"created": old["created"], "tool_version": old["tool_version"]},
        "found": sum(one["regression"] for one in changes),
        "changes": changes,
        "gone": gone,
        "notes": [note for note in (obstacle, other_mode(old, report), other_data(old, report)) if note],
    }


def pair_of(rows: Rows, name: str) -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """A variant's rows by part, then by what identifies a row in both runs."""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {"accuracy": {}, "latency": {}}
    for row in rows:
        if row["variant"] == name:
            key = (row["id"], row.get("question")) if row["part"] == "accuracy" else (row["key"],)
            found[row["part"]][key] = row
    return found


def changes_of(
    old: dict[str, Any], new: dict[str, Any], a: Any, b: Any, seed: int, mode: str | None = None
) -> list[dict[str, Any]]:
    """What changed in a variant. In another power `mode` other times are no regression."""
    if new["failed"]:
        return [change(new, "failed", None, None, note=new["failed"], regression=True)]
    found: list[dict[str, Any] | None] = [accuracy_change(old, new, a["accuracy"], b["accuracy"], seed)]
    busy = next((why for entry in (old, new) if (why := disturbed(entry))), None)
    found.append(time_change(old, new, a["latency"], b["latency"], seed, mode or busy))
    for quantity, key, most in (("size", "size_mb", LARGER_FROM), ("memory", "peak_memory_mb", HEAVIER_FROM)):
        if old[key] and new[key]:
            worse = new[key] > most * old[key]
            found.append(change(new, quantity, old[key], new[key], delta=new[key] / old[key] - 1, regression=worse))
    return [one for one in found if one]


def accuracy_change(old: dict[str, Any], new: dict[str, Any], a: Any, b: Any, seed: int) -> dict[str, Any] | None:
    """Paired over the questions of both runs, else by intervals (their half widths add up as independent errors do);
    None where one of the two asked nothing."""
    both = [key for key in a if key in b and a[key]["score"] is not None and b[key]["score"] is not None]
    values = old["accuracy"]["value"], new["accuracy"]["value"]
    intervals = old["accuracy"]["ci95"], new["accuracy"]["ci95"]
    if None in (*values, *intervals):
        return None
    paired = paired_difference([a[key]["score"] for key in both], [b[key]["score"] for key in both], seed=seed)
    if paired:
        delta, ends = paired.value, (paired.low, paired.high)
    else:
        delta = values[1] - values[0]
        (low_a, high_a), (low_b, high_b) = intervals
        ends = (
            delta - hypot(values[1] - low_b, high_a - values[0]),
            delta + hypot(high_b - values[1], values[0] - low_a),
        )
    return change(new, "accuracy", *values, delta=delta, ci95=ends, paired=len(both), regression=ends[1] < 0)


def time_change(
    old: dict[str, Any], new: dict[str, Any], a: Any, b: Any, seed: int, busy: str | None
) -> dict[str, Any] | None:
    """The ratio of times over the pictures of both runs (geometric mean), else of the medians; `delta` is it less 1."""
    values = old["latency_ms"]["total"]["p50"], new["latency_ms"]["total"]["p50"]
    if not all(values):
        return None
    both = [key for key in a if key in b and a[key]["wall_ms"] and b[key]["wall_ms"]]
    logs = mean_interval([log(b[key]["wall_ms"] / a[key]["wall_ms"]) for key in both], seed=seed)
    ratio, ends = (exp(logs.value), (exp(logs.low), exp(logs.high))) if logs else (values[1] / values[0], None)
    worse = (ends[0] if ends else ratio) > SLOWER_FROM and not busy
    shown = (ends[0] - 1, ends[1] - 1) if ends else None
    return change(new, "time", *values, delta=ratio - 1, ci95=shown, paired=len(both), note=busy, regression=worse)


def change(
    entry: dict[str, Any],
    quantity: str,
    before: float | None,
    after: float | None,
    *,
    delta: float | None = None,
    ci95: tuple[float, float] | None = None,
    paired: int = 0,
    note: str | None = None,
    regression: bool,
) -> dict[str, Any]:
    """One entry of `changes`. `delta` is a difference of shares for accuracy, else a relative change."""
    return {
        "variant": entry["name"],
        "quantity": quantity,
        "before": before,
        "after": after,
        "delta": None if delta is None else round(delta, 5),
        "ci95": [round(end, 5) for end in ci95] if ci95 else None,
        "paired": paired,
        "note": note,
        "regression": regression,
    }


def why_no_times(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why times and memory of the two runs cannot be compared."""
    if any(old["host"][key] != new["host"][key] for key in ("cpu", "cores")):
        return "another machine: times and memory are not compared"
    if old["settings"]["threads"] != new["settings"]["threads"]:
        return "another number of threads: times and memory are not compared"
    return None


def other_mode(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Whether a board's power mode differs, which is what a sweep over modes is for, and no regression of a model."""
    before, now = (
        sorted({mode for one in report["variants"] if (mode := (one.get("conditions") or {}).get("power_mode"))})
        for report in (old, new)
    )
    return (
        f"the power mode was {' and '.join(before)}, now it is {' and '.join(now)}"
        if before and now and before != now
        else None
    )


def other_data(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Whether the questions differ."""
    same = old["data"].get("sha256") == new["data"].get("sha256")
    return None if same else "the questions are not the same ones; those that are in both runs are compared"
