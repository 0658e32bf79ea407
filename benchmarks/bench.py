"""Any set of models on the same questions, each in a process of its own, to one report.

    bench(config)            reads the questions, measures, writes report.json, report.html, report.md and raw.jsonl
    report_of(...)           the report of what is measured, as a dict after report.schema.json

What is measured lies under REPORT/raw/, a folder per variant, named by content: a second run does only what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpa_edge import __version__
from mpa_edge.answers import metric_named
from mpa_edge.benchmarks.display import on_terminal
from mpa_edge.benchmarks.earlier import earlier
from mpa_edge.benchmarks.host import host
from mpa_edge.benchmarks.jobs import Job, takes_length
from mpa_edge.benchmarks.measure import Measured, Say, measure
from mpa_edge.benchmarks.pareto import pareto
from mpa_edge.benchmarks.regress import regressions
from mpa_edge.benchmarks.report import timed_answers, write_report
from mpa_edge.benchmarks.require import requirements
from mpa_edge.benchmarks.roads import roads_of
from mpa_edge.benchmarks.sample import Item, cost_of, items_of, latency_set
from mpa_edge.benchmarks.score import Scored, beside_both_ends, compare, first, gap_closed, score
from mpa_edge.benchmarks.settings import BenchConfig
from mpa_edge.benchmarks.variants import Variant, size_bytes, swept, variants_of
from mpa_edge.benchmarks.verdict import verdict
from mpa_edge.bundle import MANIFEST, read_bundle
from mpa_edge.errors import InputError
from mpa_edge.labelled import Questions, read_questions, stratified
from mpa_edge.lock import locked
from mpa_edge.records import write_atomic, write_rows
from mpa_edge.tasks import Task, task_named, task_of_bundle

REPORT, RAW_ROWS = "report.json", "raw.jsonl"

__all__ = ["BenchConfig", "bench", "report_of"]


def bench(config: BenchConfig, say: Say | None = None) -> Path:
    """Measure and write the report; returns the path of report.json, beside which lie report.html and report.md.

    `say(variant, phase, done, of)` hears of the progress; without it a terminal shows bars. A variant that fails is in
    the report with its reason. Raises `InputError` for data, models or flags that cannot be used, and `RunLocked` when
    another process works in the report's folder.
    """
    with locked(config.report, "--report"):
        return _bench(config, say)


def _bench(config: BenchConfig, say: Say | None) -> Path:
    before = earlier(config.compare) if config.compare else None  # read first: it may be the file that we write
    variants = variants_of(config.bundles, config.baselines)
    if config.fixed_length and not any(takes_length(variant.spec) for variant in variants):
        raise InputError("--fixed-length: a chat server ends its answers where it likes; name a bundle or a model too")
    task = task_of(config, variants)
    questions = questions_of(config.data, config.report / "images")
    asked = stratified(questions, config.limit, config.seed)
    items = [] if config.costs_only else items_of(asked, task.prompt)
    costs = cost_of([read_bundle(Path(one.spec)) for one in variants if (Path(one.spec) / MANIFEST).is_file()])
    warm_up, timed = latency_set(items_of(questions, task.prompt), config.latency_n, config.seed, costs)
    variants = swept(variants, config.thread_counts)
    machine = host()
    raw = config.report / "raw"
    measured: dict[str, Measured] = {}
    with on_terminal([variant.name for variant in variants], say) as tell:
        for variant in variants:
            job = Job(
                name=variant.name,
                spec=variant.spec,
                threads=variant.threads or config.thread_counts[0],
                max_new_tokens=task.max_new_tokens,
                batch_size=config.batch_size,
                warm_up=[ask.to_json() for ask in warm_up],
                latency=[ask.to_json() for ask in timed],
                accuracy=[] if variant.sweep_of else [item.ask.to_json() for item in items],
                device=config.device,
                fixed_length=config.fixed_length,
                keep_timings=config.keep_timings,
                trust_remote_code=config.trust_remote_code,
            )
            found = measure(variant, job, raw, tell)
            if variant.sweep_of:  # threads change the times only
                found = replace(found, answers=measured[variant.sweep_of].answers)
            measured[variant.name] = found
    report, scored = report_of(config, task, questions, items, variants, measured, machine)
    rows = raw_rows(items, scored, measured)
    report["regressions"] = regressions(before, report, rows, config.seed) if before else None
    write_rows(config.report / RAW_ROWS, rows)
    write_atomic(config.report / REPORT, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_report(config.report, report, items, [one for one in scored if one.variant.sweep_of is None], measured)
    return config.report / REPORT


def questions_of(paths: Sequence[Path], store: Path) -> Questions:
    """The questions of all files; where there are several, their ids begin with the file's name."""
    if len(paths) == 1:
        return read_questions(paths[0], store=store)
    parts = [read_questions(path, store=store) for path in paths]
    named = [replace(one, id=f"{path.stem}/{one.id}") for path, part in zip(paths, parts, strict=True) for one in part]
    return Questions(named, [skipped for part in parts for skipped in part.skipped])


def task_of(config: BenchConfig, variants: Sequence[Variant]) -> Task:
    """The task that was named, else the one that the bundles were made for."""
    if config.task:
        return task_named(config.task)
    bundles = [Path(variant.spec) for variant in variants if (Path(variant.spec) / MANIFEST).is_file()]
    tasks = {task for task in map(task_of_bundle, map(read_bundle, bundles)) if task}
    if len(tasks) != 1:
        raise InputError(
            f"--task is needed: the bundles were made for different tasks ({', '.join(sorted(t.name for t in tasks))})"
            if tasks
            else "--task is needed: no bundle says which task it was made for"
        )
    return tasks.pop()


def report_of(
    config: BenchConfig,
    task: Task,
    questions: Questions,
    items: Sequence[Item],
    variants: Sequence[Variant],
    measured: dict[str, Measured],
    machine: dict[str, Any],
) -> tuple[dict[str, Any], list[Scored]]:
    """The report as report.schema.json has it, and the scores behind it."""
    metric = metric_named(task.metric)
    scored = [
        score(variant, measured[variant.name], items, metric, task.metric, size_bytes(variant.spec), config.seed)
        for variant in variants
    ]
    entries = [one.entry for one in scored]
    beside_both_ends(scored, measured, items, config.seed)
    for entry, best in zip(entries, pareto(entries), strict=True):
        entry["pareto"] = best
    comparisons = compare(scored, config.seed)
    required = requirements(config.require, entries, timed_answers(measured))
    about = about_data(config, questions, items)
    report = {
        "schema": 1,
        "tool_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": about,
        "task": {"name": task.name, "metric": task.metric, "question_template": task.question_template},
        "settings": {
            "threads": config.thread_counts[0],
            "thread_counts": list(config.thread_counts),
            "device": config.device,
            "fixed_length": config.fixed_length,
            "latency_n": config.latency_n,
            "batch_size": config.batch_size,
            "max_new_tokens": task.max_new_tokens,
            "limit": config.limit,
            "seed": config.seed,
            "trust_remote_code": config.trust_remote_code,
        },
        "host": machine,
        "variants": entries,
        "comparisons": comparisons,
        "roads": roads_of(variants),
        "gap_closed": gap_closed(entries, first(entries, "aligned", "merged", "full", "quantized")),
        "requirements": required,
        "regressions": None,
        "verdict": verdict(entries, comparisons, required, data=about),
    }
    return report, scored


def about_data(config: BenchConfig, questions: Questions, items: Sequence[Item]) -> dict[str, Any]:
    """Name, counts and digest of what was asked."""
    kinds = Counter(item.question.kind for item in items if item.question.kind)
    groups = {item.question.kind: item.question.group for item in items}
    content = [(item.ask.key, *item.question.answers) for item in items]
    return {
        "name": config.name or " + ".join(path.stem for path in config.data),
        "n": len(items),
        "of": len(questions),
        "pictures": len({item.picture for item in items}),
        "kinds": {kind: {"group": groups[kind], "n": kinds[kind]} for kind in sorted(kinds)},
        "sha256": hashlib.sha256(repr(content).encode()).hexdigest(),
        "skipped": dict(Counter(skipped.reason for skipped in questions.skipped)),
    }


def raw_rows(items: Sequence[Item], scored: Sequence[Scored], measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Every answer and every timing, one row each."""
    by_key = {item.ask.key: item.question for item in items}
    rows = []
    for one in scored:
        name = one.variant.name
        answers = measured[name].answers
        for place, item in enumerate([] if one.variant.sweep_of else items):
            if item.ask.key in answers:
                value = one.scores[place] if one.scores else None
                about = {"id": item.question.id, "kind": item.question.kind, "question": item.question.question}
                answer = answers[item.ask.key].to_json()
                rows.append({"variant": name, "part": "accuracy", **about, "score": value, **answer})
        for row in measured[name].latency:
            known = by_key.get(row.key)
            rows.append({"variant": name, "part": "latency", "id": known.id if known else None, **row.to_json()})
    return rows
