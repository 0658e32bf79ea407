"""Rows to figures: one variant's entry in report.json, the comparisons, and the share of the gap that is closed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpa_edge.answers import Metric, exact_match, metric_named
from mpa_edge.benchmarks.energy import per_answer
from mpa_edge.benchmarks.jobs import Row
from mpa_edge.benchmarks.measure import Measured
from mpa_edge.benchmarks.sample import Item
from mpa_edge.benchmarks.variants import Variant
from mpa_edge.bundle import MANIFEST, sha256_of
from mpa_edge.stats import Estimate, mean_interval, paired_difference, percentile, ratio_interval

PHASES = ("preprocess", "vision", "prefill", "decode")


@dataclass(frozen=True)
class Scored:
    """A variant with its score per question, in the questions' order; empty where it failed."""

    variant: Variant
    scores: list[float]
    entry: dict[str, Any]


def score(
    variant: Variant, measured: Measured, items: Sequence[Item], metric: Metric, name: str, size: int | None, seed: int
) -> Scored:
    """A variant's entry. An answer that did not come counts as wrong; a variant that failed has no accuracy at all."""
    rows = [measured.answers.get(item.ask.key) for item in items]
    known = [row for row in rows if row is not None]
    whole = measured.reason is None and len(known) == len(items)
    scores = scores_of(known, items, metric) if whole else []
    entry = {
        "name": variant.name,
        "role": variant.role,
        "step": variant.step,
        "engine": measured.engine or variant.engine,
        "quantization": variant.quantization,
        "accuracy": {"metric": name, **estimate(mean_interval(scores, seed=seed))},
        "containment": mean(scores_of(known, items, metric_named("containment"))) if whole else None,
        "kinds": by(lambda item: item.question.kind, items, scores, seed),
        "groups": by(lambda item: item.question.group, items, scores, seed),
        "errors": dict(Counter(row.error or "unknown" for row in known if row.finish_reason == "error")),
        "cut_off": sum(row.finish_reason == "length" for row in known),
        "latency_ms": latency(measured.latency),
        "busy": measured.busy,
        "device": measured.device,
        "dtype": dtype_of(variant, measured),
        "digests": digests_of(variant, measured),
        "threads": variant.threads,
        "sweep_of": variant.sweep_of,
        "conditions": measured.conditions,
        "fixed_length": fixed_length(measured.fixed),
        "load_ms": rounded(measured.load_ms),
        "first_answer_ms": rounded(measured.first_answer_ms),
        "size_mb": megabytes(size),
        "peak_memory_mb": megabytes(measured.peak_memory_bytes),
        "proportional_memory_mb": megabytes(measured.proportional_memory_bytes),
        "device_memory_mb": megabytes(measured.device_memory_bytes),
        "device_memory_how": measured.device_memory_how,
        "energy": per_answer(measured.energy, len(measured.latency)),
        "failed": measured.reason or (None if whole else f"{len(items) - len(known)} questions have no answer"),
    }
    return Scored(variant, scores, entry)


def scores_of(rows: Sequence[Row], items: Sequence[Item], metric: Metric) -> list[float]:
    """The metric per question; 0 for an answer that did not come."""
    return [
        0.0 if row.finish_reason == "error" else float(metric(row.text, item.question.answers))
        for row, item in zip(rows, items, strict=True)
    ]


def by(
    label: Callable[[Item], str], items: Sequence[Item], scores: Sequence[float], seed: int
) -> dict[str, dict[str, Any]]:
    """Accuracy per label; questions without one are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, scores, strict=False):
        if label(item):
            found[label(item)].append(value)
    return {name: estimate(mean_interval(found[name], seed=seed)) for name in sorted(found)}


def estimate(found: Estimate | None) -> dict[str, Any]:
    """A mean as the report holds it; null where there is none."""
    if found is None:
        return {"value": None, "ci95": None, "n": 0}
    return {"value": round(found.value, 5), "ci95": [round(found.low, 5), round(found.high, 5)], "n": found.n}


def answered(rows: Sequence[Row]) -> list[Row]:
    """The timed rows that count: those with an answer."""
    return [row for row in rows if row.wall_ms is not None and row.finish_reason != "error"]


def latency(rows: Sequence[Row]) -> dict[str, Any]:
    """Percentiles of the total by the caller's clock, and of each phase that the engine tells the median.

    Medians of phases do not add up to the median of the total; means do, so they are there too.
    """
    known = answered(rows)
    times = {phase: [row.timings.get(phase) for row in known] for phase in PHASES} | {
        "total": [row.wall_ms for row in known]
    }
    total = {f"p{q}": rounded(percentile(times["total"], q)) for q in (50, 90, 95, 99)}
    total["max"] = rounded(percentile(times["total"], 100))
    return {
        "total": total,
        **{phase: rounded(percentile(times[phase], 50)) for phase in PHASES},
        "mean": {name: mean([value for value in values if value is not None]) for name, values in times.items()},
        "n": len(known),
        "tokens_per_s": tokens_per_s(known),
        "questions_per_minute": per_minute(times["total"]),
        "tokens_per_answer": rounded(percentile([row.n_tokens for row in known], 50)),
    }


def tokens_per_s(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Steps of decoding per second, all answers together; None where the engine does not tell.

    Decoding takes a step per new token: the first token comes out of the prefill, the stop token out of the last step.
    """
    told = [(row, time) for row in rows if (time := row.timings.get("decode"))]
    steps = [row.n_tokens - (row.finish_reason == "length") for row, _ in told]
    found = ratio_interval(steps, [time / 1000 for _, time in told])
    return {"value": round(found.value, 2), "ci95": [round(found.low, 2), round(found.high, 2)]} if found else None


def per_minute(times: Sequence[float | None]) -> float | None:
    """How many questions are answered in a minute, one after the other."""
    known = [time for time in times if time]
    return round(60_000 * len(known) / sum(known), 1) if known else None


def fixed_length(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The times of answers of one length; None where none were taken."""
    if not (known := answered(rows)):
        return None
    return {"tokens": max(row.n_tokens for row in known), "latency_ms": latency(rows)}


def dtype_of(variant: Variant, measured: Measured) -> str | None:
    """The precision of the weights: a bundle's quantization, or the model's own type."""
    return variant.quantization or (measured.describe or {}).get("dtype")


def digests_of(variant: Variant, measured: Measured) -> dict[str, str]:
    """SHA-256 of what was measured: of a bundle's `manifest`, which holds those of its files, of a model's `weights`,
    of its `adapter`. Empty where nobody can tell, as behind a server."""
    told = {key: value for key in ("adapter", "weights") if (value := (measured.describe or {}).get(key))}
    path = Path(variant.spec) / MANIFEST
    return told | ({"manifest": sha256_of(path)} if path.is_file() else {})


def compare(scored: Sequence[Scored], seed: int) -> list[dict[str, Any]]:
    """`b` against `a` on the same questions: each step of the road, then every variant against teacher and student."""
    usable = [one for one in scored if one.scores and one.variant.sweep_of is None]
    pairs = {(a.variant.name, b.variant.name): (a, b, "road") for a, b in road(usable)}
    for role in ("teacher", "student"):
        for a in [one for one in usable if one.variant.step == role][:1]:
            for b in usable:
                names = (a.variant.name, b.variant.name)
                if b is not a and not {names, names[::-1]} & pairs.keys():
                    pairs[names] = (a, b, role)
    return [comparison(a, b, against, seed) for a, b, against in pairs.values()]


def road(scored: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Neighbours on the road: teacher, student, aligned, merged, then per engine full precision and each quantized."""
    found: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        found[one.variant.step].append(one)
    trunk = [found[step][0] for step in ("teacher", "student", "aligned", "merged") if found[step]]
    pairs = list(pairwise(trunk))
    for full in found["full"]:
        pairs += [(trunk[-1], full)] if trunk else []
    for quantized in found["quantized"]:
        parents = [full for full in found["full"] if full.entry["engine"] == quantized.entry["engine"]] or trunk
        pairs += [(parents[-1], quantized)] if parents else []
    return pairs


def comparison(a: Scored, b: Scored, against: str, seed: int) -> dict[str, Any]:
    """The entry of a pair; `delta` is what `b` has more than `a`."""
    found = paired_difference(a.scores, b.scores, seed=seed)
    assert found is not None  # both have scores
    return {
        "a": a.variant.name,
        "b": b.variant.name,
        "against": against,
        "delta": round(found.value, 5),
        "ci95": [round(found.low, 5), round(found.high, 5)],
        "p": found.p,
        "n": found.n,
    }


def gap_closed(entries: Sequence[dict[str, Any]], of: dict[str, Any] | None) -> float | None:
    """(x - student) / (teacher - student); None without the three, or where the teacher is not ahead."""
    teacher, student = (first(entries, step) for step in ("teacher", "student"))
    values = [one["accuracy"]["value"] for one in (of, student, teacher) if one]
    if len(values) < 3 or None in values:
        return None
    x, low, high = values
    return round((x - low) / (high - low), 5) if high > low else None


def beside_both_ends(
    scored: Sequence[Scored], measured: Mapping[str, Measured], items: Sequence[Item], seed: int
) -> None:
    """Add to each entry what needs teacher and student: `gap_closed` with `gap_ci95`, and `agreement`."""
    entries = [one.entry for one in scored]
    usable = {one.variant.step: one for one in reversed(scored) if one.scores}
    teacher, student = usable.get("teacher"), usable.get("student")
    for one in scored:
        one.entry["gap_closed"] = gap_closed(entries, one.entry)
        one.entry["gap_ci95"] = gap_interval(teacher, student, one, seed)
        one.entry["agreement"] = agreement(teacher, one, measured, items, seed)


def gap_interval(teacher: Scored | None, student: Scored | None, one: Scored, seed: int) -> list[float] | None:
    """The interval of the share of the gap that is closed; None where the teacher is not measurably ahead."""
    if teacher is None or student is None or not one.scores:
        return None
    gained = [x - low for x, low in zip(one.scores, student.scores, strict=True)]
    gap = [high - low for high, low in zip(teacher.scores, student.scores, strict=True)]
    found = ratio_interval(gained, gap, seed=seed)
    return [round(found.low, 5), round(found.high, 5)] if found else None


def agreement(
    teacher: Scored | None, one: Scored, measured: Mapping[str, Measured], items: Sequence[Item], seed: int
) -> dict[str, Any] | None:
    """The share of the teacher's answers that this variant gives too, right or wrong, after `normalize_vqa`."""
    if teacher is None or one is teacher or not one.scores:
        return None
    wanted, given = (measured[name].answers for name in (teacher.variant.name, one.variant.name))
    keys = [item.ask.key for item in items if wanted[item.ask.key].finish_reason != "error"]
    return estimate(mean_interval([same_answer(wanted[key], given[key]) for key in keys], seed=seed))


def same_answer(a: Row, b: Row) -> float:
    """Whether two rows say the same; an answer that did not come says nothing."""
    return 0.0 if b.finish_reason == "error" else exact_match(b.text, [a.text])


def first(entries: Sequence[dict[str, Any]], *steps: str) -> dict[str, Any] | None:
    """The first variant with an accuracy whose step comes first in `steps`."""
    for step in steps:
        for entry in entries:
            if entry["step"] == step and entry["accuracy"]["value"] is not None:
                return entry
    return None


def mean(values: Sequence[float]) -> float | None:
    """Rounded mean; None of nothing."""
    return round(sum(values) / len(values), 5) if values else None


def rounded(value: float | None) -> float | None:
    """A time in milliseconds to the microsecond."""
    return None if value is None else round(value, 3)


def megabytes(size: int | None) -> float | None:
    """Of 1,000,000 bytes."""
    return None if size is None else round(size / 1e6, 3)
