"""The figures in words: which bundle to deploy, and what each step of the road gained or cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from typing import Any

from mpa_edge.benchmarks.host import BUSY_FROM
from mpa_edge.benchmarks.pareto import TOLERANCE
from mpa_edge.benchmarks.score import first

# Bundles within TOLERANCE of the most accurate one are as good as it, and those this close to the fastest of them as
# fast: clocks and questions are noisy, sizes are not, so the smallest of those wins.
SLACK = 0.2

Entry = dict[str, Any]


def verdict(
    entries: Sequence[Entry],
    comparisons: Sequence[Entry],
    required: dict[str, Any] | None = None,
    *,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`pick` (a variant's name or None), `decision`, `headline`, `summary`, `reasons`.

    deploy: the picked bundle beats the student, and the interval of the difference is above 0; with requirements, it
    keeps every line and is not measurably worse than the student. keep: it is worse, and the interval is below 0.
    undecided: neither, or no variant is known to keep every line, but one may. reject: every variant breaks a line.
    none: there is no bundle, or no student to beat. `required` is the report's `requirements`,
    `data` its `data`.
    """
    if data and not data["n"]:
        return costs_alone(entries)
    chosen = pick(entries, required)
    against = between(comparisons, first(entries, "student"), chosen)
    status = status_of(chosen, required)
    decision = decide(against, status)
    return {
        "pick": chosen["name"] if chosen else None,
        "decision": decision,
        "headline": headline(decision, chosen, status),
        "summary": summary(chosen, entries),
        "why": why_picked(entries, chosen, required),
        "reasons": reasons(entries, comparisons, chosen, data),
    }


def costs_alone(entries: Sequence[Entry]) -> dict[str, Any]:
    """What can be said of variants that nobody asked for accuracy: nothing about deploying them."""
    timed = [entry for entry in entries if entry["latency_ms"]["total"]["p50"]]
    weighed = [entry for entry in timed if entry["peak_memory_mb"]]
    fastest = min(timed, key=lambda entry: float(entry["latency_ms"]["total"]["p50"]), default=None)
    lightest = min(weighed, key=lambda entry: float(entry["peak_memory_mb"]), default=None)
    told = [
        disturbance(entries),
        *(f"{entry['name']} failed: {entry['failed']}." for entry in entries if entry["failed"]),
    ]
    return {
        "pick": None,
        "decision": "none",
        "headline": "Costs alone: nothing was asked for accuracy",
        "summary": cheapest(fastest, lightest, len(timed)),
        "why": None,
        "reasons": [sentence for sentence in told if sentence],
    }


def cheapest(fastest: Entry | None, lightest: Entry | None, count: int) -> str | None:
    """Which of so many variants is the fastest, and which takes the least memory."""
    if fastest is None:
        return None
    name, took = fastest["name"], f"{milliseconds(fastest['latency_ms']['total']['p50'])} per answer"
    if lightest is None:
        return f"{name} is the fastest, at {took}."
    memory = size(lightest["peak_memory_mb"])
    if count == 1:
        return f"{name} takes {took} and {memory} of memory."
    who = "" if lightest is fastest else f"{lightest['name']} "
    return f"{name} is the fastest, at {took}, and {who}takes the least memory, {memory}."


def candidates(entries: Sequence[Entry]) -> list[Entry]:
    """What could be deployed: bundles; where none was measured, every model but the teacher."""
    known = [entry for entry in entries if entry["accuracy"]["value"] is not None]
    bundles = [entry for entry in known if entry["role"] == "bundle"]
    return bundles or [entry for entry in known if entry["step"] in ("aligned", "merged", "other")]


def eligible(entries: Sequence[Entry], required: dict[str, Any] | None) -> list[Entry]:
    """The candidates that do best at the requirements: those that keep every line, else those that may, else all."""
    found = candidates(entries)
    for status in ("pass", "undecided", "unknown"):
        if some := [entry for entry in found if required and status_of(entry, required) == status]:
            return some
    return found


def status_of(entry: Entry | None, required: dict[str, Any] | None) -> str | None:
    """A variant's status over all lines; None where nothing is required."""
    rows = required["variants"] if required and entry else []
    return next((row["status"] for row in rows if entry and row["name"] == entry["name"]), None)


def pick(entries: Sequence[Entry], required: dict[str, Any] | None = None) -> Entry | None:
    """Of the eligible within one point of the most accurate and within a fifth of the fastest (p95), the smallest."""
    close = as_good(eligible(entries, required))
    return min(close, key=preference, default=None)


def preference(entry: Entry) -> tuple[float, float, float]:
    """The smallest; of the equally small ones the most accurate, then the fastest."""
    return entry["size_mb"] or inf, -entry["accuracy"]["value"], p95(entry)


def as_good(found: Sequence[Entry]) -> list[Entry]:
    """Those within one point of the most accurate one, and within a fifth of the fastest of them."""
    best = max((entry["accuracy"]["value"] for entry in found), default=0)
    close = [entry for entry in found if entry["accuracy"]["value"] >= best - TOLERANCE]
    slowest = (1 + SLACK) * min(map(p95, close), default=0)
    return [entry for entry in close if p95(entry) <= slowest]


def why_picked(entries: Sequence[Entry], chosen: Entry | None, required: dict[str, Any] | None) -> str | None:
    """The choice in words."""
    if chosen is None:
        return None
    able, close = eligible(entries, required), as_good(eligible(entries, required))
    status, name = status_of(chosen, required), chosen["name"]
    noun = "bundles" if chosen["role"] == "bundle" else "models"
    whole = {
        "pass": f"the {len(able)} {noun} that keep every line" if len(able) > 1 else "",
        "undecided": f"the {len(able)} {noun} that may keep every line" if len(able) > 1 else "",
    }.get(status or "", f"{len(able)} {noun}" if len(able) > 1 else "")
    if not whole:
        kept = {"pass": f"the only one of the {noun} that keeps every line", "undecided": "the only one that may"}
        return f"{name} is {kept.get(status or '', f'the only one of the {noun} that was measured')}."
    if len(close) == 1:
        return f"Of {whole}, {name} alone is within a point of the most accurate and a fifth of the fastest of those."
    return (
        f"Of {whole}, {len(close)} are within a point of the most accurate and a fifth of the fastest of those; "
        f"{name} is the smallest of these."
    )


def p95(entry: Entry) -> float:
    """The 95th percentile of the time per answer; infinite where unknown."""
    value = entry["latency_ms"]["total"]["p95"]
    return inf if value is None else float(value)


def decide(against: Entry | None, status: str | None = None) -> str:
    """What a comparison with the student and the requirements' status say."""
    worse = against is not None and against["ci95"][1] < 0
    if status == "fail":
        return "reject"
    if status in ("undecided", "unknown"):
        return "undecided"
    if against is None:
        return "deploy" if status == "pass" else "none"
    if worse:
        return "keep"
    return "deploy" if status == "pass" or against["ci95"][0] > 0 else "undecided"


def headline(decision: str, chosen: Entry | None, status: str | None = None) -> str:
    """A few words."""
    if chosen is None:
        return "No bundle was measured, so there is nothing to deploy yet"
    name = chosen["name"]
    if status and decision != "keep":
        return {
            "deploy": f"Deploy {name}: it keeps every line",
            "undecided": f"Undecided: {name} may keep every line, and this run cannot tell",
            "reject": "No variant keeps every line",
        }[decision]
    return {
        "deploy": f"Deploy {name}",
        "keep": f"Do not deploy {name}: the base student is better",
        "undecided": f"Undecided: {name} cannot be told from the base student",
        "none": f"{name} was measured, but no base student beside it",
    }[decision]


def summary(chosen: Entry | None, entries: Sequence[Entry]) -> str | None:
    """One sentence about the picked bundle."""
    if chosen is None:
        return None
    names = {"student": "the base student", "teacher": "the teacher"}
    found = [(names[step], entry) for step in names if (entry := first(entries, step))]
    beside = " and ".join(
        f"{who} {'has ' if place == 0 else ''}{percent(entry['accuracy']['value'])}"
        for place, (who, entry) in enumerate(found)
    )
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


def reasons(
    entries: Sequence[Entry], comparisons: Sequence[Entry], chosen: Entry | None, data: dict[str, Any] | None = None
) -> list[str]:
    """What each step did, in the road's order, and what should be known of the figures."""
    said = [
        alignment(entries, comparisons),
        conversion(entries, comparisons),
        beside_teacher(entries, chosen),
        cost_of_sample(chosen, data),
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
    disturbed = any((entry["busy"] or 0) >= BUSY_FROM or throttled(entry) for entry in (teacher, chosen))
    ratios = [
        ("smaller", teacher["size_mb"], chosen["size_mb"]),
        ("faster", None if disturbed else teacher["latency_ms"]["total"]["p50"], chosen["latency_ms"]["total"]["p50"]),
        ("lighter in memory", teacher["peak_memory_mb"], chosen["peak_memory_mb"]),
    ]
    told = [f"{large / small:.1f}× {word}" for word, large, small in ratios if large and small and large > small]
    places = [entry.get("device") for entry in (teacher, chosen)]
    where = f" The teacher ran on {places[0]}, {chosen['name']} on {places[1]}." if places[0] != places[1] else ""
    return f"Beside the teacher, {chosen['name']} is {', '.join(told)}.{where}" if told else None


def cost_of_sample(chosen: Entry | None, data: dict[str, Any] | None) -> str | None:
    """What `--limit` costs: intervals narrow with the square root of the number of questions."""
    if chosen is None or data is None or data["n"] >= data["of"]:
        return None
    low, high = chosen["accuracy"]["ci95"]
    half = 50 * (high - low)
    return (
        f"A stratified sample of {data['n']:,} of {data['of']:,} questions: {chosen['name']}'s accuracy is known "
        f"to about ±{half:.1f} points; all of them would make that ±{half / sqrt(data['of'] / data['n']):.1f}."
    )


def disturbance(entries: Sequence[Entry]) -> str | None:
    """Whose clock other work disturbed."""
    names = [entry["name"] for entry in entries if (entry["busy"] or 0) >= BUSY_FROM]
    hot = [entry["name"] for entry in entries if throttled(entry)]
    most = max((entry["busy"] or 0 for entry in entries), default=0)
    told = []
    if names:
        told.append(f"other work took up to {most:.0%} of the machine while {who(names, entries)} ran")
    if hot:
        told.append(f"the machine throttled while {who(hot, entries)} ran")
    if not told:
        return None
    said = " and ".join(told)
    return f"{said[0].upper()}{said[1:]}: their times are too long; mpa-edge bench on a quiet machine takes them again."


def who(names: Sequence[str], entries: Sequence[Entry]) -> str:
    """The names; "every variant" where it is all of several, "8 of 11 variants" where they are many."""
    if len(names) == len(entries) > 2:
        return "every variant"
    return listed(names) if len(names) <= 4 else f"{len(names)} of {len(entries)} variants"


def throttled(entry: Entry) -> str | None:
    """Why the machine was slow while a variant was timed."""
    found: str | None = (entry.get("conditions") or {}).get("throttled")
    return found


def between(comparisons: Sequence[Entry], a: Entry | None, b: Entry | None) -> Entry | None:
    """The comparison of two variants."""
    if a is None or b is None:
        return None
    name = b.get("sweep_of") or b["name"]
    return next((one for one in comparisons if (one["a"], one["b"]) == (a["name"], name)), None)


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
