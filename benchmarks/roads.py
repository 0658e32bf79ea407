"""What export measured on the way to the bundles: base, aligned, merged and each bundle, from their manifests.

It is there where the benchmark runs on a device that has the bundles and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mpa_edge.benchmarks.variants import Variant
from mpa_edge.bundle import MANIFEST, read_bundle

Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]


class Step(BaseModel):
    """One model: its accuracy, and what changed against the step that it was made from."""

    name: str
    step: Literal["base", "aligned", "merged", "full", "quantized"]
    value: Share
    ci95: tuple[Share, Share]
    before: str | None = Field(alias="from")
    delta: Difference | None
    delta_ci95: tuple[Difference, Difference] | None


class Data(BaseModel):
    """The labelled questions that all steps were asked."""

    name: str
    n: int = Field(ge=1)
    sha256: str


class Road(BaseModel):
    """As `mpa_edge.export.road` leaves it under `checks` in a manifest."""

    data: Data
    task: str
    metric: str
    steps: tuple[Step, ...] = Field(min_length=1)

    @property
    def start(self) -> str:
        """Names the questions, and who was asked them before any bundle: roads that begin alike are one."""
        trunk = [step.model_dump() for step in self.steps if step.step not in ("full", "quantized")]
        return json.dumps([self.data.sha256, self.task, self.metric, trunk])


def roads_of(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The roads in the bundles' manifests, those of one run and one test set as one; none for bundles without."""
    folders = [Path(variant.spec) for variant in variants if variant.role == "bundle"]
    bundles = [read_bundle(folder) for folder in folders if (folder / MANIFEST).is_file()]
    return joined(found for bundle in bundles if (found := road_in(bundle.checks)))


def road_in(checks: dict[str, Any]) -> Road | None:
    """The road among a manifest's checks; None where it has none, or one of another version."""
    try:
        return Road.model_validate(checks["road"])
    except (KeyError, ValidationError):
        return None


def joined(roads: Iterable[Road]) -> list[dict[str, Any]]:
    """Roads that begin alike, with the steps of all; full precision before what was quantized from it."""
    by_start: dict[str, Road] = {}
    for road in roads:
        known = by_start.setdefault(road.start, road)
        names = {step.name for step in known.steps}
        more = tuple(step for step in road.steps if step.name not in names)
        by_start[road.start] = known.model_copy(update={"steps": known.steps + more})
    return [road.model_dump(mode="json", by_alias=True) for road in by_start.values()]
