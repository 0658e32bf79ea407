"""The parts of the page and of the Markdown that say whether the requirements are kept, what changed since an earlier
report, how times spread, and on what machine all of it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpa_edge.benchmarks.outcome import change_line, figure, margin
from mpa_edge.benchmarks.plots import strokes
from mpa_edge.benchmarks.verdict import points

Entry = dict[str, Any]
Report = dict[str, Any]
ABOUT_STUDENT = {
    "deploy": "Better than the student, measurably",
    "keep": "Worse than the student, measurably",
    "undecided": "No measurable difference to the student",
    "none": "Nothing to decide",
}
ABOUT_LINES = {
    "deploy": "Keeps every line",
    "keep": "Keeps every line, but the student is better",
    "undecided": "More samples needed",
    "reject": "Every variant breaks a line",
    "none": "Nothing to decide",
}
MARKS = {"pass": "✓", "fail": "✗", "undecided": "?", "unknown": "–"}


def badge(report: Report) -> str:
    """The decision in a few words."""
    if not report["data"]["n"]:
        return "Times and memory only"
    words = ABOUT_LINES if report.get("requirements") else ABOUT_STUDENT
    return words[report["verdict"]["decision"]]


def required_table(report: Report, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Lines and rows of cells (status, value, note); None where nothing was required."""
    found = report.get("requirements")
    if not found:
        return None
    by_name = {entry["name"]: entry for entry in entries}
    rows = [{"entry": by_name[row["name"]], "cells": list(map(cell, row["checks"]))} for row in found["variants"]]
    return {"lines": found["lines"], "rows": rows}


def cell(check: dict[str, Any]) -> dict[str, Any]:
    """One check as a table's cell."""
    if check["value"] is None:
        return {"status": check["status"], "value": None, "note": check["why"] or ""}
    name = check["name"]
    parts = [f"margin {margin(name, check['margin'])}"]
    if check["ci95"]:
        low, high = check["ci95"]
        parts.append(f"{figure(name, low)} to {'?' if high is None else figure(name, high)}")
    if check["why"]:
        parts.append(check["why"])
    return {"status": check["status"], "value": figure(name, check["value"]), "note": "; ".join(parts)}


def regression_table(report: Report) -> dict[str, Any] | None:
    """The comparison with an earlier report, its rows in words; what became worse comes first."""
    found = report.get("regressions")
    if not found:
        return None
    rows = sorted(found["changes"], key=lambda one: not one["regression"])
    return {**found, "rows": [changed_row(one) for one in rows]}


def changed_row(one: dict[str, Any]) -> dict[str, Any]:
    """A change, its figures in words."""
    name = {"time": "p50"}.get(one["quantity"], one["quantity"])
    if name == "failed":
        return {**one, "before": "–", "after": "failed", "change": one["note"], "interval": "–"}
    say = (lambda value: f"{points(value)} points") if name == "accuracy" else percent_change
    return {
        **one,
        "quantity": {"p50": "median time"}.get(name, name),
        "before": figure(name, one["before"]),
        "after": figure(name, one["after"]),
        "change": say(one["delta"]) + (f" ({one['note']})" if one["note"] else ""),
        "interval": " to ".join(map(say, one["ci95"])) if one["ci95"] else "–",
    }


def percent_change(value: float) -> str:
    """+12%, with a true minus sign."""
    return f"{value:+.0%}".replace("-", "−")


def spread(entries: Sequence[Entry], times: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """A row of strokes per variant; None where nothing was timed. The axis ends at the longest 99th percentile, so that
    one slow answer does not press the others together."""
    known = [entry for entry in entries if times.get(entry["name"])]
    if not known:
        return None
    longest = 1.02 * max(entry["latency_ms"]["total"]["p99"] for entry in known)
    rows = []
    for entry in known:
        shown = [time for time in times[entry["name"]] if time <= longest]
        median = f"M{1000 * entry['latency_ms']['total']['p50'] / longest:.1f} 0v22"
        rows.append({"entry": entry, "path": strokes(shown, longest), "median": median})
    return {"rows": rows}


def where(entry: Entry, threads: int) -> str:
    """Device, precision and threads of a variant."""
    if entry["engine"] == "chat":
        return "its server"
    device = entry.get("device")
    count = entry.get("threads") or threads
    on = f"{device or 'unknown'}, {count} thread{'s' if count != 1 else ''}" if device in (None, "cpu") else device
    told = entry.get("dtype") if entry.get("role") != "bundle" else None  # a bundle's name tells it already
    return f"{on} · {told}" if told else str(on)


def has(entries: Sequence[Entry]) -> dict[str, bool]:
    """Which columns have a figure at all."""
    return {
        "device_memory": any(entry.get("device_memory_mb") for entry in entries),
        "energy": any((entry.get("energy") or {}).get("joules_per_answer") for entry in entries),
    }


def energies(entries: Sequence[Entry]) -> list[str]:
    """From which sensors energy was read, or why not; each once."""
    told = [entry["energy"] for entry in entries if entry.get("energy")]
    return list(dict.fromkeys(one["source"] or f"not known ({one['why']})" for one in told))


def machine(report: Report) -> list[tuple[str, str]]:
    """What the machine was like while the clocks ran, as far as it tells."""
    found = [entry["conditions"] for entry in report["variants"] if entry.get("conditions")]
    rows = []
    governors = sorted({one["governor"] for one in found if one["governor"]})
    modes = sorted({one["power_mode"] for one in found if one["power_mode"]})
    if governors or modes:
        rows.append(("Governor", ", ".join([*governors, *(f"power mode {mode}" for mode in modes)])))
    for name, key, unit in (("Frequency", "mhz", "MHz"), ("Temperature", "temperature_c", "°C")):
        values = [value for one in found for value in one[key] if value is not None]
        if values:
            rows.append((name, f"{min(values):g} to {max(values):g} {unit}"))
    loads = [one["load"] for one in found if one["load"] is not None]
    if loads:
        rows.append(("Load", f"{min(loads):g} to {max(loads):g} before a variant was timed (ourselves included)"))
    slowed = sorted({one["throttled"] for one in found if one["throttled"]})
    return rows + ([("Throttled", "; ".join(slowed))] if slowed else [])


def markdown_decision(report: Report, escape: Callable[[str], str]) -> list[str]:
    """The choice, the requirements as a table, and what became worse, for a pull request."""
    verdict, lines = report["verdict"], []
    if verdict.get("why"):
        lines += [escape(verdict["why"]), ""]
    if found := report.get("requirements"):
        titles = [escape(line["text"]) for line in found["lines"]]
        lines += [f"| required | {' | '.join(titles)} |", f"|:--|{':--|' * len(titles)}"]
        for row in found["variants"]:
            cells = [f"{MARKS[one['status']]} {cell(one)['value'] or ''}".strip() for one in row["checks"]]
            lines.append(f"| {escape(row['name'])} | {' | '.join(map(escape, cells))} |")
        lines.append("")
    if changed := report.get("regressions"):
        worse = [change_line(one) for one in changed["changes"] if one["regression"]]
        lines += [f"- **Worse:** {escape(line)}" for line in worse] or ["No regression."]
        lines.append("")
    return lines
