"""Pictures on which the variants disagree, with what each of them said."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpa_edge.benchmarks.measure import Measured
from mpa_edge.benchmarks.sample import Item
from mpa_edge.benchmarks.score import Scored, road
from mpa_edge.errors import ImageError
from mpa_edge.runtime.images import open_image
from mpa_edge.stats import RIGHT_FROM

PER_FILTER = 24  # cases that are shown per filter; the counts are of all
THUMBNAIL = 224  # pixels along the longer edge at most

FILTERS = {
    "fixed": "Fixed by alignment",
    "broken": "Broken by alignment",
    "quantization": "Broken by quantization",
    "missing": "Still missing",
    "beyond": "Right where the teacher is wrong",
}


@dataclass(frozen=True)
class Said:
    """One answer and who gave it, in words."""

    text: str
    right: bool
    who: str
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """A question as the gallery shows it. `thumbnail` is a data URI, None for a picture that cannot be read."""

    id: str
    question: str
    references: tuple[str, ...]
    kind: str
    filters: tuple[str, ...]
    said: tuple[Said, ...]
    thumbnail: str | None


@dataclass(frozen=True)
class Gallery:
    """The shown cases, and how many questions each filter has in all."""

    cases: tuple[Case, ...]
    counts: dict[str, int]


def gallery(items: Sequence[Item], scored: Sequence[Scored], measured: Mapping[str, Measured]) -> Gallery:
    """Choose and show cases, spread over the kinds of questions."""
    usable = [one for one in scored if one.scores]
    labels = [filters_of(place, usable) for place in range(len(items))] if usable else []
    chosen: set[int] = set()
    counts = {}
    for name in FILTERS:
        places = [place for place, found in enumerate(labels) if name in found]
        counts[name] = len(places)
        chosen.update(spread(places, [item.question.kind for item in items], PER_FILTER))
    cases = tuple(case_of(items[place], place, labels[place], usable, measured) for place in sorted(chosen))
    return Gallery(cases, {name: count for name, count in counts.items() if count})


def filters_of(place: int, scored: Sequence[Scored]) -> tuple[str, ...]:
    """Which filters a question falls under."""
    by_step: dict[str, bool] = {}
    for one in scored:
        by_step.setdefault(one.variant.step, one.scores[place] >= RIGHT_FROM)
    teacher, student = by_step.get("teacher"), by_step.get("student")
    aligned = next((by_step[step] for step in ("aligned", "merged", "full") if step in by_step), None)
    quantized_away = any(
        a.scores[place] >= RIGHT_FROM > b.scores[place] for a, b in road(scored) if b.variant.step == "quantized"
    )
    holds = {
        "fixed": student is False and aligned is True,
        "broken": student is True and aligned is False,
        "quantization": quantized_away,
        "missing": teacher is True and student is not True and aligned is False,
        "beyond": teacher is False and aligned is True,
    }
    return tuple(name for name in FILTERS if holds[name])


def spread(places: Sequence[int], kinds: Sequence[str], limit: int) -> list[int]:
    """At most `limit` of the places, one of each kind in turn."""
    queues: dict[str, list[int]] = defaultdict(list)
    for place in places:
        queues[kinds[place]].append(place)
    turns = sorted((turn, kind, place) for kind, queue in queues.items() for turn, place in enumerate(queue))
    return [place for _, _, place in turns[:limit]]


def case_of(
    item: Item, place: int, filters: tuple[str, ...], scored: Sequence[Scored], measured: Mapping[str, Measured]
) -> Case:
    """One case; variants that said the same stand together, in the road's order."""
    said: dict[tuple[str, bool, str | None], list[str]] = defaultdict(list)
    for one in scored:
        row = measured[one.variant.name].answers[item.ask.key]
        said[row.text, one.scores[place] >= RIGHT_FROM, row.error].append(one.variant.name)
    everyone = [one.variant.name for one in scored]
    question = item.question
    return Case(
        question.id,
        question.question,
        tuple(dict.fromkeys(question.answers)),
        question.kind,
        filters,
        tuple(Said(text, right, who(names, everyone), error) for (text, right, error), names in said.items()),
        thumbnail(question.image),
    )


def who(names: Sequence[str], everyone: Sequence[str]) -> str:
    """Names in a list; the few that are missing where that is shorter."""
    others = [name for name in everyone if name not in names]
    if not others:
        return "all"
    return f"all but {' and '.join(others)}" if len(others) <= 2 < len(names) - 2 else ", ".join(names)


def thumbnail(path: str) -> str | None:
    """A small picture as a data URI: PNG where it is small already, else JPEG."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    small = max(image.size) <= THUMBNAIL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
