"""Scores of all seeds to one table: accuracy with intervals, the gap closed, what was forgotten, paired differences."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mpa_edge.benchmarks.ablation_rows import TASK, TRIALS, default_of, slug
from mpa_edge.benchmarks.host import host
from mpa_edge.errors import InputError
from mpa_edge.labelled import read_questions
from mpa_edge.tasks import task_named

# The student knows a kind of question from this accuracy on; what it loses there was forgotten.
KNOWN = 0.8
# What the default is compared with, and what each ingredient is.
DEFAULT = "+ agreement mix: the default"
PAIRS = (
    ("random, of the default's size", DEFAULT),
    ("parity, the paper's match", DEFAULT),
    ("all pseudo-labels", DEFAULT),
    ("random, of parity's size", "parity, the official match"),
    ("parity, the paper's match", "parity, the official match"),
    ("parity, the official match", "+ short targets"),
    ("+ short targets", "+ votes (3)"),
    ("+ short targets", "+ blind check"),
    ("+ short targets", "+ several questions"),
    ("+ several questions", DEFAULT),
    (DEFAULT, "+ two rounds"),
    (DEFAULT, "+ deployment-aware at q4"),
    (f"{DEFAULT}, as its q4 bundle", "+ deployment-aware at q4, as its q4 bundle"),
)

Scores = dict[int, list[float]]  # by seed: per question
RESAMPLES = 4000


def collect(out: Path, split: str) -> dict[str, Any]:
    """The table as JSON: `rows` and `paired`. A row counts the seeds that have it, a pair those that have both."""
    seeds = {int(path.name.partition("-")[2]): path for path in out.glob("seed-*")}
    if not seeds:
        raise InputError(f"--out {out}: no seed has been run; see python -m mpa_edge.benchmarks.ablation run --help")
    questions = read_questions(out / split / f"{split}.jsonl")
    kinds = [item.kind for item in questions]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in ("teacher", "student", *(trial.name for trial in TRIALS)):
        paths = {seed: folder / f"{slug(name)}.{split}.json" for seed, folder in sorted(seeds.items())}
        found[name] = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}
    metric = task_named(TASK).metric
    for trial in TRIALS:
        runs = found[trial.name].items()
        quantized = {seed: {**one, "scores": one["quantized"]} for seed, one in runs if one.get("quantized")}
        if trial.quant and quantized:
            found[f"{trial.name}, as its {trial.quant} bundle"] = quantized
    table = {
        name: {seed: one["scores"][split][metric] for seed, one in runs.items()} for name, runs in found.items() if runs
    }
    base = _per_question(table["student"])
    ends = tuple(fmean(_per_question(table[name])) for name in ("student", "teacher"))
    return {
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": host(),
        "split": split,
        "questions": len(questions),
        "metric": metric,
        "defaults": default_of(),
        "rows": [_row(name, found[name], scores, metric, split, kinds, base, ends) for name, scores in table.items()],
        "paired": [_pair(a, b, table[a], table[b]) for a, b in PAIRS if a in table and b in table],
    }


def interval(scores: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of scores (seeds, questions): both are drawn with replacement, as another training
    and another set of questions would be (the two-way bootstrap, Owen 2007)."""
    draw = np.random.default_rng(seed)
    seeds, questions = scores.shape
    by_seed = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    by_question = draw.multinomial(questions, np.full(questions, 1 / questions), size=RESAMPLES) / questions
    low, high = np.percentile(np.einsum("rs,sq,rq->r", by_seed, scores, by_question, optimize=True), [2.5, 97.5])
    return round(float(low), 5), round(float(high), 5)


def _row(
    name: str,
    runs: dict[int, dict[str, Any]],
    scores: Scores,
    metric: str,
    split: str,
    kinds: Sequence[str],
    base: Sequence[float],
    ends: tuple[float, ...],
) -> dict[str, Any]:
    """`forgotten`: of the questions that the student had right, the share that is wrong now. `known_kinds`: accuracy on
    the kinds that it knew. `home`: accuracy in the domain that it was trained in."""
    per_question = _per_question(scores)
    accuracy = fmean(per_question)
    by_kind: dict[str, list[float]] = defaultdict(list)
    base_by_kind: dict[str, list[float]] = defaultdict(list)
    for kind, score, before in zip(kinds, per_question, base, strict=True):
        by_kind[kind].append(score)
        base_by_kind[kind].append(before)
    known = [score for kind, values in base_by_kind.items() if fmean(values) >= KNOWN for score in by_kind[kind]]
    had = [score for score, before in zip(per_question, base, strict=True) if before >= 0.5]
    home = [fmean(one["scores"]["home"][metric]) for one in runs.values() if "home" in one["scores"]]
    sizes = [sum(one["training"].values()) for one in runs.values() if "training" in one]
    return {
        "name": name,
        "seeds": len(scores),
        "train_samples": round(fmean(sizes)) if sizes else None,
        "accuracy": round(accuracy, 5),
        "ci95": interval(np.array(list(scores.values()))),
        "accuracy_by_seed": [round(fmean(one), 5) for one in scores.values()],
        "containment": round(fmean([fmean(one["scores"][split]["containment"]) for one in runs.values()]), 5),
        "gap_closed": round((accuracy - ends[0]) / (ends[1] - ends[0]), 5),
        "forgotten": round(1 - fmean(had), 5),
        "known_kinds": round(fmean(known), 5) if known else None,
        "home": round(fmean(home), 5) if home else None,
        "by_kind": {kind: round(fmean(values), 4) for kind, values in sorted(by_kind.items())},
    }


def _pair(a: str, b: str, first: Scores, second: Scores) -> dict[str, Any]:
    """`b` minus `a` on the same questions, over the seeds that both have."""
    both = sorted(first.keys() & second.keys())
    deltas = np.array([second[seed] for seed in both]) - np.array([first[seed] for seed in both])
    return {
        "a": a,
        "b": b,
        "delta": round(float(deltas.mean()), 5),
        "ci95": interval(deltas),
        "delta_by_seed": [round(float(one.mean()), 5) for one in deltas],
        "seeds": both,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# What each ingredient is worth ({found['split']}, {found['questions']:,} questions, reference pair)",
        "",
        f"Made by `python -m mpa_edge.benchmarks.ablation` on {found['created'][:10]}, {found['host']['cpu']}, "
        f"{found['host']['cores']} cores. Accuracy is `{found['metric']}`, the mean over the seeds; intervals (95%) "
        "resample seeds and questions. *Forgotten*: of the questions that the student had right, the share that it has "
        "wrong now. "
        f"*Known kinds*: accuracy on the kinds of which the student had {KNOWN:.0%} right or more. *Home*: accuracy in "
        "the domain that the student was trained in, which the pool does not show.",
        "",
        "| | seeds | training rows | accuracy | containment | gap closed | forgotten | known kinds | home |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        cells = (
            row["name"],
            str(row["seeds"]),
            "" if row["train_samples"] is None else f"{row['train_samples']:,}",
            f"{row['accuracy']:.1%} ({row['ci95'][0]:.1%}–{row['ci95'][1]:.1%})",
            f"{row['containment']:.1%}",
            f"{row['gap_closed']:.0%}",
            f"{row['forgotten']:.1%}",
            "" if row["known_kinds"] is None else f"{row['known_kinds']:.1%}",
            "" if row["home"] is None else f"{row['home']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference, in points | mean | 95% interval | by seed |", "|:--|--:|:--|:--|"]
    for pair in found["paired"]:
        seeds = ", ".join(f"{100 * delta:+.1f}" for delta in pair["delta_by_seed"])
        low, high = (f"{100 * value:+.1f}" for value in pair["ci95"])
        lines.append(f"| {pair['b']} against {pair['a']} | {100 * pair['delta']:+.1f} | {low} to {high} | {seeds} |")
    return "\n".join(lines) + "\n"


def _per_question(scores: Scores) -> list[float]:
    """The mean over the seeds of each question's score."""
    return [fmean(values) for values in zip(*scores.values(), strict=True)]
