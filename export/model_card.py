"""The model card of an exported model: metadata that the hub reads, and for people how the model was made and is used.

Everything comes from the run's own files: settings and counts from run.json, scores from labelled questions. No card
holds a path or an address: who made the model is not told by where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ValidationError

from mpa_edge.digests import digest_of_folder
from mpa_edge.export.merged import Merged
from mpa_edge.run_folder import RunFolder, read_run

CARD, TEMPLATE = "README.md", "model_card.md.j2"
TAGS = ["mpa-edge", "model-parity-aligner", "vision-language-model", "visual-question-answering", "arxiv:2509.16633"]
# What the base's card says about its licence and languages holds for what was made of it.
CARRIED = ("license", "license_name", "license_link", "language")
# As the card names the settings of run.json.
SETTINGS = {
    "questions": "questions per picture",
    "temperature": "temperature of the questions",
    "match": "what counts as right (`match`)",
    "votes": "teacher votes",
    "blind": "blind check",
    "select": "selection",
    "mix": "share of samples that both had right",
    "target": "training target",
    "rounds": "rounds",
    "method": "method",
    "rank": "rank",
    "alpha": "alpha",
    "train": "trained parts",
    "epochs": "epochs at most",
    "train_batch_size": "batch size",
    "holdout": "held-out share",
    "longest_edge": "longest edge of a picture",
    "seed": "seed",
}
VERDICTS = {
    "parity": "parity samples (teacher right, student wrong)",
    "agree": "agreement samples (both right)",
    "unconfirmed": "not confirmed by the teacher",
    "blind": "answered without the picture",
    "error": "without an answer",
}


@dataclass(frozen=True)
class Row:
    """The accuracy of one model; `here` is the one of this folder."""

    name: str
    value: float
    ci95: Sequence[float]
    here: bool


@dataclass(frozen=True)
class Scores:
    """Accuracies of several models on the same `n` labelled questions."""

    data: str
    metric: str
    n: int
    rows: list[Row]
    source: str

    @property
    def here(self) -> Row | None:
        """The row of this very model."""
        return next((row for row in self.rows if row.here), None)


class Accuracy(BaseModel):
    """Of one variant in a bench report; no interval where nothing was answered."""

    value: float | None
    ci95: tuple[float, float] | None


class Variant(BaseModel):
    """One model in a bench report; without accuracy where it failed."""

    name: str
    step: str
    accuracy: Accuracy | None = None
    digests: dict[str, str] = {}  # of the weights that were opened, and of an adapter


class Data(BaseModel):
    """What a bench report was measured on."""

    name: str
    n: int


class Metric(BaseModel):
    """How a bench report scored answers."""

    metric: str


class Report(BaseModel):
    """What the card needs of a bench report."""

    created: str
    data: Data
    task: Metric
    variants: list[Variant]


def model_card(
    merged: Merged, verified: Mapping[str, Any], *, road: Mapping[str, Any] | None = None, repo: str | None = None
) -> str:
    """The card as Markdown with its YAML front matter. `verified` is the outcome of `to_hf.verify_folder`, `road` that
    of `mpa_edge.export.road`, `repo` the hub repository that it goes to."""
    run = read_run(merged.run) if merged.run else {}
    scores = scores_of_road(road) if road else scores_of_report(merged)
    carried, source = carried_of(merged), merged.provenance
    title = repo.rpartition("/")[2] if repo else merged.name
    environment = Environment(
        loader=PackageLoader("mpa_edge.export", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": code, "cell": cell, "line": line, "tojson": json.dumps}
    return environment.get_template(TEMPLATE).render(
        metadata=metadata(title, merged, scores, carried),
        title=title,
        run=bool(merged.run),
        base=source.student,
        teacher=source.teacher or "its teacher",
        task=source.task or "custom",
        tool_version=source.tool_version,
        repo=repo or "PATH/TO/THIS/FOLDER",
        template=merged.task.question_template if merged.task else "{question}",
        max_new_tokens=merged.task.max_new_tokens if merged.task else 32,
        settings=settings_of(run, RunFolder(merged.run).student if merged.run else None),
        counts=counts_of(run),
        scores=scores,
        verified=verified,
        checks=merged.checks,
        licence=in_words(carried.get("license_name") or carried.get("license") or ""),
    )


def metadata(title: str, merged: Merged, scores: Scores | None, carried: Mapping[str, Any]) -> str:
    """The YAML that the hub reads. A base that has no place on the hub is named in the text alone."""
    source = merged.provenance
    base = source.student if is_hub_id(source.student) else None
    here = scores.here if scores else None
    result = [eval_result(scores, here)] if scores and here else None
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base and merged.run else {}
    data = ModelCardData(
        base_model=base,
        eval_results=result,
        library_name="transformers",
        model_name=title if result else None,
        pipeline_tag="image-text-to-text",
        tags=TAGS if merged.run else TAGS[:1],
        **carried,
        **more,
    )
    return data.to_yaml().strip()


def eval_result(scores: Scores, here: Row) -> EvalResult:
    """This model's score as the hub's model index has it."""
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=re.sub(r"[^a-z0-9]+", "-", scores.data.lower()).strip("-") or "custom",
        dataset_name=scores.data,
        metric_type=scores.metric,
        metric_value=round(here.value, 4),
    )


def carried_of(merged: Merged) -> dict[str, Any]:
    """Licence and languages from the base's own card; nothing where it has none, or one that cannot be read."""
    folder = merged.base or merged.folder
    for card in (folder / CARD, merged.folder / CARD):
        try:
            found = metadata_load(card) if card.is_file() else None
        except Exception:  # whatever a YAML reader trips over
            continue
        if found and found.get("license"):
            return {key: found[key] for key in CARRIED if found.get(key)}
    return {}


def is_hub_id(name: str) -> bool:
    """Whether a model's name looks like `organisation/model`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def settings_of(run: Mapping[str, Any], student: Path | None) -> list[tuple[str, str]]:
    """The settings that shape the result, as the run resolved them; none that tells of the machine."""
    config = run.get("config", {})
    found = [(name, config[key]) for key, name in SETTINGS.items() if config.get(key) not in (None, [], "")]
    metrics = read_metrics(student) if student else {}
    if metrics.get("learning_rate"):
        found.append(("learning rate", f"{metrics['learning_rate']:g}"))
    if run.get("versions"):
        found.append(("made with", ", ".join(f"{name} {version}" for name, version in run["versions"].items())))
    return [(name, in_words(value)) for name, value in found]


def read_metrics(student: Path) -> dict[str, Any]:
    """What training left beside the student; empty where that cannot be read."""
    try:
        found: dict[str, Any] = json.loads((student / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def counts_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was kept and what was dropped, from the stages of run.json; of several rounds the last one."""
    stages = run.get("stages", {})
    rows: list[tuple[str, str]] = []
    samples, annotate = stages.get("samples"), stages.get("annotate")
    if samples:
        rows.append(("pictures used", f"{samples['used']:,}"))
        rows += reasons("pictures left out", samples.get("skipped", {}))
        if samples.get("shared"):
            rows.append(("pictures left out because the test has them", f"{samples['shared']:,}"))
    if annotate:
        rows.append(("annotations by the teacher", f"{annotate['rows']:,}"))
        rows += reasons("annotations rejected", annotate.get("rejected", {}))
    number, suffix = last_round(stages)
    if number > 1:
        rows.append(("rounds", str(number)))
    verdicts = stages.get(f"identify{suffix}", {}).get("verdicts", {})
    rows += [(f"questions: {VERDICTS.get(name, name)}", f"{count:,}") for name, count in verdicts.items()]
    chosen = stages.get(f"select{suffix}", {})
    rows += [(f"training set: {VERDICTS.get(n, n)}", f"{count:,}") for n, count in chosen.get("verdicts", {}).items()]
    if examples := stages.get(f"level{suffix}", {}).get("examples"):
        rows.append(("trained on, held out", f"{examples['train']:,}, {examples['holdout']:,}"))
    return rows


def last_round(stages: Mapping[str, Any]) -> tuple[int, str]:
    """The number of the last round that was trained, and what its stages' names end in."""
    number = max((int(name[6:]) for name in stages if re.fullmatch(r"level-\d+", name)), default=1)
    return number, f"-{number}" if number > 1 else ""


def reasons(what: str, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """A sum with its parts; nothing where nothing was dropped."""
    parts = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in counts.items())
    return [(what, f"{sum(counts.values()):,} ({parts})")] if counts else []


def scores_of_road(road: Mapping[str, Any]) -> Scores:
    """The labelled evaluation that was part of the export."""
    rows = [Row(step["name"], step["value"], step["ci95"], step["step"] == "merged") for step in road["steps"]]
    return Scores(road["data"]["name"], road["metric"], road["data"]["n"], rows, "Measured by the export itself.")


def scores_of_report(merged: Merged) -> Scores | None:
    """The run's own bench report, where one of its variants is this very model: by the digests of what was measured,
    which hold in a copy too."""
    folder = merged.run / "report" if merged.run else None
    if folder is None or not (folder / "report.json").is_file():
        return None
    try:
        report = Report.model_validate_json((folder / "report.json").read_bytes())
    except ValidationError:
        return None  # of another version
    known = [
        (variant.name, found.value, found.ci95)
        for variant in report.variants
        if (found := variant.accuracy) and found.value is not None and found.ci95
    ]
    # The merged model is the aligned one; both are there only where somebody measured both.
    ours = [variant for step in ("merged", "aligned") for variant in report.variants if variant.step == step]
    scored = {name for name, _, _ in known}
    digests = {merged.provenance.adapter_sha256, digest_of_folder(merged.folder)}
    here = next((one.name for one in ours if one.name in scored and digests & {*one.digests.values()}), None)
    if here is None:
        return None
    rows = [Row(name, value, ci95, name == here) for name, value, ci95 in known]
    source = f"From the benchmark of {report.created[:10]}."
    return Scores(report.data.name, report.task.metric, report.data.n, rows, source)


def in_words(value: Any) -> str:
    """A setting's value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def line(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def cell(text: str) -> str:
    """Text in a table's cell."""
    return line(text).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code, whatever is in it."""
    return f"`{line(text).replace('`', '')}`"
