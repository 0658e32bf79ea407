"""The figures in words: which bundle to deploy, and what each step of the road gained or cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from mpa_edge.benchmarks.score import BUSY_FROM, first

# Bundles this close to the most accurate one are as good as it, and those this close to the fastest of them as fast:
# clocks and questions are noisy, sizes are not, so the smallest of those wins.
TOLERANCE = 0.01
SLACK = 0.2

Entry = dict[str, Any]


def verdict(entries: Sequence[Entry], comparisons: Sequence[Entry]) -> dict[str, Any]:
    """`pick` (a variant's name or None), `decision` (deploy, undecided, keep, none), `headline`, `summary`, `reasons`.

    deploy: the picked bundle beats the student, and the interval of the difference is above 0. keep: it is worse, and
    the interval is below 0. undecided: neither. none: there is no bundle, or no student to beat.
    """
    chosen = pick(entries)
    student = first(entries, "student")
    against = between(comparisons, student, chosen)
    decision = decide(against)
    return {
        "pick": chosen["name"] if chosen else None,
        "decision": decision,
        "headline": headline(decision, chosen),
        "summary": summary(chosen, entries),
        "reasons": reasons(entries, comparisons, chosen),
    }


def pick(entries: Sequence[Entry]) -> Entry | None:
    """Of the bundles within one point of the most accurate and within a fifth of the fastest (p95), the smallest."""
    bundles = [entry for entry in entries if entry["role"] == "bundle" and entry["accuracy"]["value"] is not None]
    if not bundles:
        return None
    best = max(entry["accuracy"]["value"] for entry in bundles)
    close = [entry for entry in bundles if entry["accuracy"]["value"] >= best - TOLERANCE]
    slowest = (1 + SLACK) * min(p95(entry) for entry in close)
    return min((entry for entry in close if p95(entry) <= slowest), key=lambda entry: entry["size_mb"] or inf)


def p95(entry: Entry) -> float:
    """The 95th percentile of the time per answer; infinite where unknown."""
    value = entry["latency_ms"]["total"]["p95"]
    return inf if value is None else float(value)


def decide(against: Entry | None) -> str:
    """What a comparison with the student says."""
    if against is None:
        return "none"
    low, high = against["ci95"]
    return "deploy" if low > 0 else "keep" if high < 0 else "undecided"


def headline(decision: str, chosen: Entry | None) -> str:
    """A few words."""
    if chosen is None:
        return "No bundle was measured, so there is nothing to deploy yet"
    return {
        "deploy": f"Deploy {chosen['name']}",
        "keep": f"Do not deploy {chosen['name']}: the base student is better",
        "undecided": f"Undecided: {chosen['name']} cannot be told from the base student",
        "none": f"{chosen['name']} was measured, but no base student beside it",
    }[decision]


def summary(chosen: Entry | None, entries: Sequence[Entry]) -> str | None:
    """One sentence about the picked bundle."""
    if chosen is None:
        return None
    names = {"student": "the base student has", "teacher": "the teacher"}
    found = [(names[step], first(entries, step)) for step in names]
    beside = " and ".join(f"{words} {percent(entry['accuracy']['value'])}" for words, entry in found if entry)
    said = f"It answers {percent(chosen['accuracy']['value'])} right" + (f", where {beside}" if beside else "")
    costs = [
        f"{text} {unit}"
        for text, unit, known in (
            (milliseconds(chosen["latency_ms"]["total"]["p50"]), "per answer", chosen["latency_ms"]["total"]["p50"]),
            (size(chosen["size_mb"]), "on disk", chosen["size_mb"]),
        )
        if known is not None
    ]
    return f"{said}{', at ' if costs else ''}{' and '.join(costs)}."


def reasons(entries: Sequence[Entry], comparisons: Sequence[Entry], chosen: Entry | None) -> list[str]:
    """What each step did, in the road's order."""
    said = [
        alignment(entries, comparisons),
        conversion(entries, comparisons),
        beside_teacher(entries, chosen),
        disturbance(entries),
        *(f"{entry['name']} failed: {entry['failed']}." for entry in entries if entry["failed"]),
    ]
    return [sentence for sentence in said if sentence]


def alignment(entries: Sequence[Entry], comparisons: Sequence[Entry]) -> str | None:
    """What alignment gained."""
    aligned = first(entries, "aligned", "merged", "full")
    found = between(comparisons, first(entries, "student"), aligned)
    if found is None or aligned is None:
        return None
    low, high = found["ci95"]
    what = "raised" if low > 0 else "lowered" if high < 0 else "did not measurably change"
    closed = aligned.get("gap_closed")
    share = f" and closed {closed:.0%} of the gap to the teacher" if closed is not None and low > 0 else ""
    change = f"{points(found['delta'])} points (95% interval {points(low)} to {points(high)})"
    return f"Alignment {what} the student's accuracy: {change}{share}."


def conversion(entries: Sequence[Entry], comparisons: Sequence[Entry]) -> str | None:
    """What merging, conversion and quantization cost, each against the step before it."""
    names = {entry["name"] for entry in entries if entry["step"] in ("merged", "full", "quantized")}
    steps = [one for one in comparisons if one["against"] == "road" and one["b"] in names]
    kept = [one["b"] for one in steps if one["ci95"][0] <= 0 <= one["ci95"][1]]
    moved = [f"{one['b']} {points(one['delta'])} points against {one['a']}" for one in steps if one["b"] not in kept]
    told = ([f"no change that {steps[0]['n']:,} questions can show in {listed(kept)}"] if kept else []) + moved
    return f"On the way to the device: {'; '.join(told)}." if told else None


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def beside_teacher(entries: Sequence[Entry], chosen: Entry | None) -> str | None:
    """How much smaller, faster and lighter the picked bundle is."""
    teacher = next((entry for entry in entries if entry["step"] == "teacher" and not entry["failed"]), None)
    if teacher is None or chosen is None:
        return None
    disturbed = any((entry["busy"] or 0) >= BUSY_FROM for entry in (teacher, chosen))
    ratios = [
        ("smaller", teacher["size_mb"], chosen["size_mb"]),
        ("faster", None if disturbed else teacher["latency_ms"]["total"]["p50"], chosen["latency_ms"]["total"]["p50"]),
        ("lighter in memory", teacher["peak_memory_mb"], chosen["peak_memory_mb"]),
    ]
    told = [f"{large / small:.1f}× {word}" for word, large, small in ratios if large and small and large > small]
    return f"Beside the teacher, {chosen['name']} is {', '.join(told)}." if told else None


def disturbance(entries: Sequence[Entry]) -> str | None:
    """Whose clock other work disturbed."""
    names = [entry["name"] for entry in entries if (entry["busy"] or 0) >= BUSY_FROM]
    if not names:
        return None
    most = max(entry["busy"] or 0 for entry in entries)
    return (
        f"Other work took up to {most:.0%} of the machine while {listed(names)} ran: their times are too long. "
        "To time them again, delete the report's raw folder."
    )


def between(comparisons: Sequence[Entry], a: Entry | None, b: Entry | None) -> Entry | None:
    """The comparison of two variants."""
    if a is None or b is None:
        return None
    return next((one for one in comparisons if (one["a"], one["b"]) == (a["name"], b["name"])), None)


def percent(value: float | None) -> str:
    """0.613 -> 61.3%"""
    return "–" if value is None else f"{100 * value:.1f}%"


def points(value: float) -> str:
    """0.123 -> +12.3, with a true minus sign; no sign on what rounds to zero."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def milliseconds(value: float | None) -> str:
    """Three figures at most: 0.84 ms, 12.3 ms, 345 ms, 2.41 s."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def size(value: float | None) -> str:
    """Megabytes, or gigabytes from a thousand on."""
    if value is None:
        return "–"
    return f"{value / 1000:.2f} GB" if value >= 1000 else f"{value:.0f} MB" if value >= 100 else f"{value:.1f} MB"
