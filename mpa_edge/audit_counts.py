"""The numbers of the audit page: the steps from pictures to training rows, verdicts, reasons, scores, favourites."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpa_edge.collapse import question_key
from mpa_edge.records import Annotation, Case, Sample

BINS = 10

# What the page calls a verdict, and what the verdict says. The order is that of the page.
VERDICTS = {
    "parity": ("parity", "the teacher confirms its answer, the student misses it"),
    "agree": ("agree", "both models give the pseudo-answer"),
    "unconfirmed": ("unconfirmed", "asked again, the teacher gives another answer"),
    "error": ("error", "a model did not answer"),
    "rejected": ("rejected", "the teacher’s text gave no usable pair"),
}
REASONS = {
    "answer_in_question": "the question gives the answer away",
    "answer_too_long": "the answer is longer than the task allows",
    "collapsed": "the teacher asks this about too many pictures",
    "duplicate": "asked about this picture before",
    "not_about_image": "the question is not about the picture",
    "placeholder": "the prompt's form, not filled in",
    "question_too_long": "the question is too long",
    "refusal": "the teacher declines",
    "teacher_error": "the teacher did not answer",
    "unanswerable": "the teacher says that it cannot be known",
    "unfinished": "the text breaks off at the token limit",
}
FILE_REASONS = {
    "duplicate": "the content of another file",
    "missing": "named in the list, or linked to, and not there",
    "not_an_image": "by its name",
    "too_large": "too many pixels or bytes",
    "too_small": "too small to ask about",
    "truncated": "the file breaks off",
    "unreadable": "not a picture, whatever its name says",
}


def run_facts(folder: Path) -> dict[str, str]:
    """What the head of the page says of the run; empty where `run.json` doesn't tell."""
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        config: dict[str, Any] = content["config"]
        names = {side: content.get(side, {}).get("name") or config.get(side) for side in ("teacher", "student")}
        facts = {**names, "task": config.get("task"), "select": config.get("select"), "match": config.get("match")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        facts = dict.fromkeys(("teacher", "student", "task", "select", "match"))
    return {"name": folder.resolve().name, **{key: str(value or "") for key, value in facts.items()}}


def steps(
    samples: Sequence[Sample], annotations: Sequence[Annotation], cases: Sequence[Case], selected: Sequence[Case]
) -> list[dict[str, Any]]:
    """The road from pictures to training rows, each step with its count and its width in percent."""
    verdicts = Counter(case.verdict for case in cases)
    road = [
        ("pictures", len(samples)),
        ("pairs that the teacher wrote", len(annotations)),
        ("usable pairs", sum(row.reason is None for row in annotations)),
        ("confirmed by the teacher", verdicts["parity"] + verdicts["agree"]),
        ("missed by the student", verdicts["parity"]),
        ("rows in the training set", len(selected)),
    ]
    mixture = Counter(case.verdict for case in selected)
    notes = {"rows in the training set": ", ".join(f"{count:,} {name}" for name, count in mixture.most_common())}
    widest = max(count for _, count in road) or 1
    return [
        {"label": label, "count": count, "width": 100 * count / widest, "note": notes.get(label, "")}
        for label, count in road
    ]


def verdict_rows(cases: Sequence[Case], rejected: Sequence[Annotation]) -> list[dict[str, Any]]:
    """The verdicts with their counts and shares; a verdict that this version does not know comes last."""
    counts = Counter(case.verdict for case in cases) + Counter({"rejected": len(rejected)})
    total = sum(counts.values()) or 1
    rows = []
    for key in [*VERDICTS, *sorted(counts.keys() - VERDICTS.keys())]:
        label, meaning = VERDICTS.get(key, (key, ""))
        share = {"count": counts[key], "share": 100 * counts[key] / total}
        rows.append({"key": key if key in VERDICTS else "other", "label": label, "meaning": meaning, **share})
    return [row for row in rows if row["count"]]


def reason_rows(reasons: Iterable[str | None], meanings: Mapping[str, str] = REASONS) -> list[dict[str, Any]]:
    """The reasons with their counts, the commonest first."""
    counts = Counter(reason or "unknown" for reason in reasons)
    most = max(counts.values(), default=1)
    return [
        {"slug": slug, "meaning": meanings.get(slug, ""), "count": count, "width": 100 * count / most}
        for slug, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def score_histograms(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Histograms of both models' scores; none where the metric knows right and wrong only."""
    answered = [case for case in cases if case.verdict != "error"]
    sides = {
        "teacher": [case.teacher_score for case in answered],
        "student": [case.student_score for case in answered],
    }
    if all(score in (0.0, 1.0) for scores in sides.values() for score in scores):
        return []
    rows = []
    for side, scores in sides.items():
        counts = Counter(min(int(score * BINS), BINS - 1) for score in scores)
        most = max(counts.values())
        bins = [
            {"from": place / BINS, "count": counts[place], "height": 100 * counts[place] / most}
            for place in range(BINS)
        ]
        rows.append({"side": side, "bins": bins, "mean": sum(scores) / len(scores)})
    return rows


def favourites(annotations: Sequence[Annotation], count: int = 8) -> list[dict[str, Any]]:
    """The questions that come most often, near-duplicates as one, each with its commonest answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[str, str] = {}
    for row in annotations:
        if row.reason in (None, "collapsed"):
            key = question_key(row.question)
            texts.setdefault(key, row.question)
            answers[key][row.answer] += 1
    total = sum(map(Counter.total, answers.values())) or 1
    most = sorted(answers, key=lambda key: (-answers[key].total(), key))[:count]
    rows: list[dict[str, Any]] = []
    for key in most:
        if answers[key].total() == 1:
            break
        answer, times = min(answers[key].items(), key=lambda item: (-item[1], item[0]))
        asked = answers[key].total()
        share = 100 * asked / total
        rows.append({"question": texts[key], "count": asked, "share": share, "answer": answer, "times": times})
    return rows
