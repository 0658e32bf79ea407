"""The page on which a person judges a run: what was kept, what was dropped and why, with the pictures.

One HTML file that needs nothing else: no network, no other files, readable without JavaScript. It shows a sample of the
rows, drawn evenly from the verdicts and, within them, from the reasons, so that what is rare is seen too.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mpa_edge.audit_counts import (
    FILE_REASONS,
    VERDICTS,
    favourites,
    reason_rows,
    run_facts,
    score_histograms,
    steps,
    verdict_rows,
)
from mpa_edge.datasets import Skipped
from mpa_edge.errors import ImageError, RunError
from mpa_edge.parts import read_parts
from mpa_edge.records import Annotation, Case, Sample, read_rows, write_atomic
from mpa_edge.runtime.images import open_image

Item = TypeVar("Item")

CARDS = 200
# Cards are about this wide; the pictures of a page of 200 cards then take some 3 MB.
THUMBNAIL = 320


@dataclass(frozen=True)
class Card:
    """One row on the page. `picture` is a data: URL, or None where the file cannot be read any more."""

    verdict: str
    reason: str | None
    name: str
    picture: str | None
    tiny: bool
    question: str
    answer: str
    trained: bool
    case: Case | None = None
    raw: str = ""


def audit_run(folder: Path, *, limit: int = CARDS) -> Path:
    """Write the page of a run folder from the files in it; returns its path. `RunError` where there is no such run."""
    if not (folder / "samples.jsonl").is_file():
        raise RunError(f"{folder} is no run folder: it has no samples.jsonl")
    skipped, parity, cases = folder / "skipped.jsonl", folder / "parity.jsonl", folder / "cases"
    chosen = {json.loads(line)["id"] for line in parity.open(encoding="utf-8")} if parity.is_file() else set()
    rows = list(read_parts(cases, Case)) if cases.is_dir() else []
    write_audit(
        folder / "audit.html",
        samples=list(read_rows(folder / "samples.jsonl", Sample)),
        skipped=list(read_rows(skipped, Skipped)) if skipped.is_file() else [],
        annotations=list(read_parts(folder / "annotations", Annotation)),
        cases=rows,
        selected=[case for case in rows if case.id in chosen],
        limit=limit,
    )
    return folder / "audit.html"


def write_audit(
    path: Path,
    *,
    samples: Sequence[Sample],
    annotations: Sequence[Annotation],
    cases: Sequence[Case],
    skipped: Sequence[Skipped] = (),
    selected: Sequence[Case] = (),
    limit: int = CARDS,
) -> None:
    """Write the page of these rows. `selected` are the cases in the training set; at most `limit` rows get a card.

    The names of the models are taken from the `run.json` beside the page, where there is one.
    """
    rejected = [row for row in annotations if row.reason]
    pictures = {sample.id: Path(sample.path) for sample in samples}
    chosen = {case.id for case in selected}
    shown = pick([*cases, *rejected], limit)
    page = _template().render(
        run=run_facts(path.parent),
        steps=steps(samples, annotations, cases, selected),
        verdicts=verdict_rows(cases, rejected),
        rejected=reason_rows(row.reason for row in rejected),
        errors=reason_rows(case.reason for case in cases if case.verdict == "error"),
        skipped=reason_rows((item.reason for item in skipped), FILE_REASONS),
        scores=score_histograms(cases),
        favourites=favourites(annotations),
        cards=[_card(row, pictures.get(row.sample_id), chosen) for row in shown],
        rows=len(cases) + len(rejected),
    )
    # A teacher's text may hold half a surrogate pair, which no file can.
    write_atomic(path, page.encode("utf-8", "replace"))


# --- which rows get a card -------------------------------------------------------------------------------------------


def pick(rows: Iterable[Case | Annotation], limit: int) -> list[Case | Annotation]:
    """At most `limit` rows, spread evenly over the verdicts and within them over the reasons, in the page's order.

    Rows are drawn by the hash of their ids: the same rows give the same page, whatever their order.
    """
    groups: dict[str, list[Case | Annotation]] = defaultdict(list)
    for row in rows:
        groups[verdict_of(row)].append(row)
    order = [verdict for verdict in VERDICTS if verdict in groups] + sorted(groups.keys() - VERDICTS.keys())
    shares = _shares({verdict: len(groups[verdict]) for verdict in order}, limit)
    return [row for verdict in order for row in _spread(groups[verdict], shares[verdict], lambda row: str(row.reason))]


def verdict_of(row: Case | Annotation) -> str:
    """The verdict of a case; `rejected` for an annotation."""
    return row.verdict if isinstance(row, Case) else "rejected"


def _spread(
    rows: Sequence[Case | Annotation], count: int, group_of: Callable[[Case | Annotation], str]
) -> list[Case | Annotation]:
    groups: dict[str, list[Case | Annotation]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: hashlib.sha256(row.id.encode("utf-8", "replace")).digest()):
        groups[group_of(row)].append(row)
    shares = _shares({name: len(group) for name, group in groups.items()}, count)
    return [row for name in sorted(groups) for row in groups[name][: shares[name]]]


def _shares(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Equal shares of the limit; what a small group leaves over goes to the larger ones."""
    shares: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        shares[name] = min(size, limit // (len(sizes) - len(shares)))
        limit -= shares[name]
    return shares


# --- the cards -------------------------------------------------------------------------------------------------------


def _card(row: Case | Annotation, picture: Path | None, chosen: set[str]) -> Card:
    url, tiny = _thumbnail(picture)
    verdict = verdict_of(row)
    return Card(
        verdict=verdict if verdict in VERDICTS else "other",
        reason=row.reason,
        name=picture.name if picture else row.sample_id,
        picture=url,
        tiny=tiny,
        question=row.question,
        answer=row.answer,
        trained=row.id in chosen,
        case=row if isinstance(row, Case) else None,
        raw=row.raw if isinstance(row, Annotation) else "",
    )


def _thumbnail(path: Path | None) -> tuple[str | None, bool]:
    """A small copy of the picture as a data: URL, and whether it is so small that it is shown enlarged."""
    try:
        if path is None:
            return None, False
        image = open_image(path)
    except ImageError:
        return None, False
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}", max(image.size) <= THUMBNAIL // 2


def _template() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.get_template("audit.html.j2")
