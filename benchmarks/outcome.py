"""What `mpa-edge bench` says at the end, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpa_edge.benchmarks.verdict import milliseconds, percent, points, size

BROKEN, UNDECIDED, REGRESSION = 3, 4, 5
MARKS = {"pass": "kept", "fail": "broken", "undecided": "undecided", "unknown": "unknown"}
SAID = {"pass": "keeps every line", "fail": "breaks a line", "undecided": "undecided", "unknown": "not known"}


def outcome(path: Path) -> tuple[list[str], int]:
    """(lines for the terminal, exit code) of a report.json."""
    report = json.loads(path.read_text(encoding="utf-8"))
    verdict = report["verdict"]
    lines = [verdict["headline"] + "."]
    lines += [f"  {text}" for text in (verdict["summary"], verdict.get("why")) if text]
    lines += [f"  {line}" for line in [*required_lines(report), *regression_lines(report)]]
    return lines, exit_code(report)


def exit_code(report: dict[str, Any]) -> int:
    """Where both speak, broken requirements come before regressions."""
    if report["requirements"]:
        codes = {"deploy": 0, "keep": 0, "undecided": UNDECIDED}
        code = codes.get(report["verdict"]["decision"], BROKEN)
        if not report["data"]["n"]:  # costs alone: no decision, but lines that are kept or not
            found = statuses(report)
            code = 0 if "pass" in found else UNDECIDED if found & {"undecided", "unknown"} else BROKEN
        if code:
            return code
    return REGRESSION if (report["regressions"] or {}).get("found") else 0


def statuses(report: dict[str, Any]) -> set[str]:
    """How what can be deployed keeps the requirements: the bundles, and where there are none whatever was measured."""
    rows = {row["name"]: row["status"] for row in report["requirements"]["variants"]}
    bundles = [entry["name"] for entry in report["variants"] if entry["role"] == "bundle"]
    return {rows[name] for name in bundles or rows if name in rows}


def required_lines(report: dict[str, Any]) -> list[str]:
    """A line per variant, and below it one for each requirement that it does not keep, or not for certain."""
    if not report["requirements"]:
        return []
    texts = [line["text"] for line in report["requirements"]["lines"]]
    lines = []
    for row in report["requirements"]["variants"]:
        lines.append(f"{row['name']}: {SAID[row['status']]}")
        for text, check in zip(texts, row["checks"], strict=True):
            if check["status"] != "pass" or row["name"] == report["verdict"]["pick"]:
                lines.append(f"  {text}: {MARKS[check['status']]}{told(check)}")
    return lines


def told(check: dict[str, Any]) -> str:
    """A check's value, interval, margin and reason."""
    if check["value"] is None:
        return f" ({check['why']})"
    name = check["name"]
    low, high = check["ci95"] or (None, None)
    ends = "" if low is None else f", 95% interval {figure(name, low)} to {'?' if high is None else figure(name, high)}"
    why = f"; {check['why']}" if check["why"] else ""
    return f" ({figure(name, check['value'])}{ends}, margin {margin(name, check['margin'])}{why})"


def margin(name: str, value: float) -> str:
    """A distance to the line, with its sign."""
    if name in ("accuracy", "gap_closed", "agreement"):
        return f"{points(value)} points"
    return f"{'−' if value < 0 else '+'}{figure(name, abs(value))}"


def figure(name: str, value: float) -> str:
    """A value with its unit."""
    if name in ("accuracy", "gap_closed", "agreement"):
        return percent(value)
    if name in ("memory", "size"):
        return size(value)
    if name == "tokens_per_s":
        return f"{value:.1f}/s"
    if name == "energy":
        return f"{value:.3g} J"
    return milliseconds(value)


def regression_lines(report: dict[str, Any]) -> list[str]:
    """What became worse, and why something was not compared."""
    found = report["regressions"]
    if not found:
        return []
    worse = [change_line(one) for one in found["changes"] if one["regression"]]
    head = f"Since {found['against']['created'][:10]}: " + (f"{len(worse)} worse" if worse else "no regression")
    gone = [f"not measured any more: {', '.join(found['gone'])}"] if found["gone"] else []
    return [head, *(f"  {line}" for line in [*worse, *gone, *found["notes"]])]


def change_line(one: dict[str, Any]) -> str:
    """A change in one line."""
    name = {"time": "p50"}.get(one["quantity"], one["quantity"])
    if name == "failed":
        return f"{one['variant']} failed: {one['note']}"
    change = f"{points(one['delta'])} points" if name == "accuracy" else f"{one['delta']:+.0%}".replace("-", "−")
    paired = f", paired over {one['paired']:,}" if one["paired"] else ""
    return f"{one['variant']}: {name} {figure(name, one['before'])} -> {figure(name, one['after'])} ({change}{paired})"
