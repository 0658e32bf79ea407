"""report.json and the answers behind it as a page for people, and as Markdown for a pull request.

The page is one file: no script, style, font or picture comes from elsewhere, and its policy forbids it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from rich.table import Table

from mpa_edge.benchmarks.gallery import FILTERS, Gallery, gallery
from mpa_edge.benchmarks.measure import Measured
from mpa_edge.benchmarks.plots import scatter
from mpa_edge.benchmarks.report_parts import (
    badge,
    energies,
    has,
    machine,
    markdown_decision,
    regression_table,
    required_table,
    spread,
    where,
)
from mpa_edge.benchmarks.sample import Item
from mpa_edge.benchmarks.score import PHASES, Scored, answered, first
from mpa_edge.benchmarks.verdict import disturbance, milliseconds, percent, points, size
from mpa_edge.records import write_atomic

HTML, MARKDOWN = "report.html", "report.md"
TEMPLATE, STYLES, SCRIPT = "report.html.j2", "report.css.j2", "report.js.j2"
Report = dict[str, Any]


def write_report(
    folder: Path, report: Report, items: Sequence[Item], scored: Sequence[Scored], measured: Mapping[str, Measured]
) -> None:
    """Write report.html and report.md beside report.json."""
    write_atomic(folder / HTML, render_html(report, gallery(items, scored, measured), timed_answers(measured)))
    write_atomic(folder / MARKDOWN, render_markdown(report))


def timed_answers(measured: Mapping[str, Measured]) -> dict[str, list[float]]:
    """The milliseconds of each variant's timed answers, by its name."""
    return {
        name: [row.wall_ms for row in answered(found.latency) if row.wall_ms is not None]
        for name, found in measured.items()
    }


def render_html(report: Report, cases: Gallery, times: Mapping[str, Sequence[float]] | None = None) -> str:
    """The page. Everything that comes from data is escaped. `times` are the milliseconds of the timed answers."""
    environment = Environment(
        loader=PackageLoader("mpa_edge.benchmarks", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"percent": percent, "points": points, "ms": milliseconds, "mb": size, "p": p_value, "words": words}
    environment.filters.update(filters, against=against, breakable=breakable)
    template = environment.get_template(TEMPLATE)
    threads = report["settings"]["threads"]
    entries = [
        {**entry, "tone": tone(entry), "facts": facts(entry), "where": where(entry, threads)}
        for entry in report["variants"]
    ]
    script, styles = (files("mpa_edge.benchmarks").joinpath(name).read_text("utf-8") for name in (SCRIPT, STYLES))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        report=report,
        variants=entries,
        by_name={entry["name"]: entry for entry in entries},
        badge=badge(report),
        required=required_table(report, entries),
        regressions=regression_table(report),
        spread=spread(entries, times or {}),
        fixed=[entry for entry in entries if entry.get("fixed_length")],
        has=has(entries),
        timed=max((entry["latency_ms"]["n"] for entry in entries), default=0),
        energies=energies(entries),
        machine=machine(report),
        road=road_rows(report, [entry for entry in entries if not entry.get("sweep_of")]),
        roads=[(road, made_rows(road)) for road in report["roads"]],
        scatter=scatter(entries, report["verdict"]["pick"]),
        phases=phase_rows(entries),
        kinds=kind_groups(report),
        gain=gained(entries),
        busy=disturbance(entries),
        gallery=cases,
        filters=FILTERS,
        styles=Markup(styles),  # our own text, like the template's
        script=Markup(script),
        script_digest=digest,
    )


def render_markdown(report: Report) -> str:
    """Verdict and table, short enough for a comment under a pull request."""
    verdict, threads = report["verdict"], report["settings"]["threads"]
    lines = [f"### {markdown(verdict['headline'])}", ""]
    if verdict["summary"]:
        lines += [markdown(verdict["summary"]), ""]
    lines += markdown_decision(report, markdown)
    lines += [
        "| variant | accuracy (95% interval) | vs student | p50 | p95 | size | memory |",
        "|:--|:--|--:|--:|--:|--:|--:|",
        *(markdown_row(report, entry) for entry in report["variants"]),
        "",
        *(f"- {markdown(reason)}" for reason in verdict["reasons"]),
        "",
        f"{about_questions(report)}; latency at batch 1 with {threads} thread{'s' if threads != 1 else ''} on "
        f"{markdown(report['host']['cpu'] or 'an unknown CPU')}; "
        f"mpa-edge {report['tool_version']}.",
    ]
    return "\n".join(lines) + "\n"


def about_questions(report: Report) -> str:
    """What was asked, in Markdown."""
    data = report["data"]
    if not data["n"]:
        return f"Pictures of {markdown(data['name'])}, timed only"
    return f"{data['n']:,} questions of {markdown(data['name'])}, metric `{report['task']['metric']}`"


def markdown_row(report: Report, entry: dict[str, Any]) -> str:
    """A variant's row."""
    if entry["failed"]:
        return f"| {markdown(entry['name'])} | failed: {markdown(entry['failed'])} | | | | | |"
    total = entry["latency_ms"]["total"]
    gain = against(report, "student", entry["name"])
    name = markdown(entry["name"])
    cells = [
        f"**{name}**" if entry["name"] == report["verdict"]["pick"] else name,
        accuracy_cell(entry),
        points(gain["delta"]) if gain else "–",
        milliseconds(total["p50"]),
        milliseconds(total["p95"]),
        size(entry["size_mb"]),
        size(entry["peak_memory_mb"]),
    ]
    return f"| {' | '.join(cells)} |"


def accuracy_cell(entry: dict[str, Any]) -> str:
    """77.3% (75.1–79.3), or a dash."""
    value, ends = entry["accuracy"]["value"], entry["accuracy"]["ci95"]
    return percent(value) if ends is None else f"{percent(value)} ({interval(ends)})"


def console_table(report: Report) -> Table:
    """The variants as a table for the terminal."""
    data = report["data"]
    asked = f"{data['n']:,} questions" if data["n"] else "times and memory only"
    table = Table(title=f"{data['name']}: {asked}", title_justify="left")
    for number, column in enumerate(("variant", "accuracy", "95% interval", "p50", "p95", "size", "memory")):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for entry in report["variants"]:
        total = entry["latency_ms"]["total"]
        cells = (
            entry["name"],
            percent(entry["accuracy"]["value"]),
            interval(entry["accuracy"]["ci95"]),
            milliseconds(total["p50"]),
            milliseconds(total["p95"]),
            size(entry["size_mb"]),
            size(entry["peak_memory_mb"]),
        )
        table.add_row(*cells, style="bold" if entry["name"] == report["verdict"]["pick"] else None)
    return table


def road_rows(report: Report, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The variants with what the step to them changed; `effect` is gain, loss, or same where the interval holds 0."""
    rows = []
    for entry in entries:
        found = next(
            (one for one in report["comparisons"] if one["against"] == "road" and one["b"] == entry["name"]), None
        )
        rows.append({"entry": entry, "step": found, "effect": effect(found["ci95"] if found else None)})
    return rows


def made_rows(road: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a road that export measured, with their colours, and what the step before them changed."""
    tones = {
        "base": "student",
        "aligned": "aligned",
        "merged": "aligned",
        "gguf": "gguf",
        "onnx": "onnx",
        "openvino": "openvino",
    }
    return [
        {
            **step,
            "tone": tones.get(step["name"].partition("-")[0], "other"),
            "effect": effect(step["delta_ci95"]),
            "facts": f"{step['name']}: {percent(step['value'])} ({interval(step['ci95'])})",
        }
        for step in road["steps"]
    ]


def effect(ends: Sequence[float] | None) -> str | None:
    """Whether the interval of a difference says gain or loss, or holds 0; None without one."""
    if ends is None:
        return None
    return "gain" if ends[0] > 0 else "loss" if ends[1] < 0 else "same"


def phase_rows(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean milliseconds per phase as shares of the longest bar; what no phase accounts for is `other`."""
    known = [entry for entry in entries if entry["latency_ms"]["total"]["p50"]]
    longest = max((entry["latency_ms"]["total"]["p95"] for entry in known), default=0)
    rows = []
    for entry in known:
        means = entry["latency_ms"]["mean"]
        parts = {phase: means[phase] or 0.0 for phase in PHASES}
        parts["other"] = max(0.0, means["total"] - sum(parts.values()))
        segments = [
            {"phase": phase, "ms": value, "share": 100 * value / longest} for phase, value in parts.items() if value > 0
        ]
        p95 = 100 * entry["latency_ms"]["total"]["p95"] / longest
        rows.append({"entry": entry, "segments": segments, "mean": means["total"], "p95": p95})
    return rows


def kind_groups(report: Report) -> list[tuple[str, list[tuple[str, int]]]]:
    """(group, [(kind, questions)]) in the order of the names."""
    kinds = sorted((about["group"], kind, about["n"]) for kind, about in report["data"]["kinds"].items())
    return [(group, [(kind, n) for _, kind, n in rows]) for group, rows in groupby(kinds, key=lambda row: row[0])]


def gained(entries: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(student, aligned), where both were measured."""
    student, aligned = first(entries, "student"), first(entries, "aligned", "merged", "full")
    return (student, aligned) if student and aligned else None


def against(report: Report, step: str, name: str) -> dict[str, Any] | None:
    """The comparison of a variant with the teacher or the student; None for these themselves."""
    base = next((entry["name"] for entry in report["variants"] if entry["step"] == step), None)
    return next((one for one in report["comparisons"] if (one["a"], one["b"]) == (base, name)), None)


def tone(entry: dict[str, Any]) -> str:
    """The colour that stands for a variant."""
    if entry["role"] == "bundle":
        return {"llama.cpp": "gguf", "onnxruntime": "onnx", "openvino": "openvino"}.get(entry["engine"], "other")
    return {"teacher": "teacher", "student": "student", "aligned": "aligned"}.get(entry["role"] or "", "other")


def facts(entry: dict[str, Any]) -> str:
    """A variant in one line, for a tooltip."""
    accuracy, total = entry["accuracy"], entry["latency_ms"]["total"]
    return (
        f"{entry['name']}: {percent(accuracy['value'])} ({interval(accuracy['ci95'])}), "
        f"p50 {milliseconds(total['p50'])}, p95 {milliseconds(total['p95'])}"
    )


def interval(ends: Sequence[float] | None) -> str:
    """67.3–71.9, in percent."""
    return "–" if ends is None else f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"


def p_value(value: float) -> str:
    """Two digits, or a bound."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def words(name: str) -> str:
    """read_price -> read price"""
    return name.replace("_", " ")


def breakable(name: str) -> Markup:
    """gguf-q4_k_m on two lines where a column is narrow."""
    return escape(name).replace("-", Markup("-<wbr>"))


def markdown(text: str) -> str:
    """Text that Markdown shows as it is: on one line, and nothing in it is a cell, a tag, a link or a mention."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
