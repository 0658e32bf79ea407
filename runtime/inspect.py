"""What a bundle is, and what a picture costs it at each size: tiles and tokens, without starting an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from mpa_edge.bundle import MANIFEST, Bundle, Printable, one_line, read_bundle
from mpa_edge.runtime.families import Family, family_of_bundle
from mpa_edge.runtime.prompts import Prompts, read_tokenizer

# Width and height of typical pictures; only their ratio matters.
SHAPES = {"4:3": (4000, 3000), "square": (3000, 3000), "16:9": (4000, 2250)}
# Sizes in the table, about so many at most.
MOST_SIZES = 20
# Files that are named where the manifest does not name them.
MOST_FILES = 10


class Verified(BaseModel):
    """What inspect tells of `checks["verify"]`."""

    samples: int = Field(ge=0)
    token_agreement: float = Field(ge=0, le=1)


class Step(BaseModel):
    """One model on the road, see `mpa_edge.export.road`."""

    name: Printable
    step: str
    value: FiniteFloat


class Data(BaseModel):
    """The questions that the road was measured with."""

    name: Printable
    n: int = Field(ge=0)


class Road(BaseModel):
    """What inspect tells of `checks["road"]`."""

    metric: Printable
    data: Data
    steps: tuple[Step, ...]


Told = TypeVar("Told", bound=BaseModel)


@dataclass(frozen=True)
class Cost:
    """What a picture of one shape takes at one size. `tiles` is how many times the vision encoder runs, the overview
    included; `prompt_tokens` are the whole prompt's, without the question; None where the image tokens alone fill the
    context."""

    size: str
    shape: str
    tiles: int
    image_tokens: int
    prompt_tokens: int | None
    fits: bool
    trained_with: bool


def costs(folder: Path, bundle: Bundle) -> list[Cost]:
    """The cost of every size that makes a difference, from the cheapest up to what the context holds."""
    family, prompt = family_of_bundle(bundle), bundle.prompt
    prompts = Prompts(read_tokenizer(bundle.path_of(folder, "tokenizer")), prompt)
    text = prompt.question_template.replace("{question}", "")
    found: list[Cost] = []
    for name, image in _told_sizes(family, bundle):
        row = []
        for shape, size in SHAPES.items():
            rows, columns = family.grid(size, image)
            seen, tokens = family.image_tokens(rows, columns, image), None
            if seen < prompt.context_length:  # what does not fit is not even written out
                tokens = len(prompts.tokens(text, [family.layout(rows, columns, prompt.image_token, image)]))
            fits = tokens is not None and tokens < prompt.context_length
            row.append(Cost(name, shape, _tiles(family, seen, image), seen, tokens, fits, image == bundle.image))
        found += row
        if not any(cost.fits for cost in row):
            break
    return found


def _tiles(family: Family, image_tokens: int, settings: Any) -> int:
    """Tiles of a picture with so many image tokens; one where tiles differ, since then there is but one."""
    least, most = family.tile_tokens(settings)
    return image_tokens // most if least == most else 1


def _told_sizes(family: Family, bundle: Bundle) -> list[tuple[str, Any]]:
    """The sizes up to the first whose image tokens fit in no shape; where those are many, every second, third, …"""
    sizes = family.sizes(bundle.image)
    least = [
        min(family.image_tokens(*family.grid(size, image), image) for size in SHAPES.values()) for _, image in sizes
    ]
    end = next((place for place, seen in enumerate(least) if seen >= bundle.prompt.context_length), len(sizes))
    every = max(1, round(end / MOST_SIZES))
    return [
        size
        for place, size in enumerate(sizes[: end + 1])
        if place % every == 0 or place == end or size[1] == bundle.image
    ]


def report(folder: Path) -> str:
    """A bundle's identity, checks and costs, for people; `BundleError` where a file's size or checksum is not what the
    manifest says."""
    bundle = read_bundle(folder, check_digests=True)
    return "\n".join([*_identity(bundle), *_others(folder, bundle), "", *_table(costs(folder, bundle))])


def _identity(bundle: Bundle) -> list[str]:
    source = bundle.source
    verified = _told(Verified, bundle.checks.get("verify"))
    lines = [
        f"{bundle.name}: {bundle.family}, {bundle.engine}, {bundle.quantization}, {bundle.size_bytes() / 1e6:.1f} MB",
        f"made by mpa-edge {source.tool_version} from {source.student}"
        + (f", aligned to {source.teacher}" if source.teacher else "")
        + (f" on {source.task}" if source.task else ""),
        f"prompt {bundle.prompt.question_template!r}, at most {bundle.prompt.max_new_tokens} new tokens, "
        f"context {bundle.prompt.context_length}",
    ]
    if verified:
        agreement = f"{verified.token_agreement:.0%} of {verified.samples}"
        lines.append(f"verified: {agreement} answers equal the merged model's")
    lines += _road(bundle)
    lines += [f"  {file.role:16} {file.bytes / 1e6:9.2f} MB  {file.path}" for file in bundle.files]
    lines.append(f"sizes and checksums of all {len(bundle.files)} files are as the manifest says")
    return lines


def _road(bundle: Bundle) -> list[str]:
    """The accuracies that export measured from the base to this bundle; none where it had no labels."""
    road = _told(Road, bundle.checks.get("road"))
    if road is None:
        return []
    known = [step for step in road.steps if step.step != "quantized" or step.name == bundle.short_name]
    steps = ", ".join(f"{step.name} {step.value:.1%}" for step in known)
    return [f"{road.metric} on {road.data.n:,} questions of {road.data.name}: {steps}"]


def _told(kind: type[Told], content: Any) -> Told | None:
    """A part of `checks`, which the manifest's schema leaves open; None where there is none, or of another version."""
    try:
        return kind.model_validate(content)
    except ValidationError:
        return None


def _others(folder: Path, bundle: Bundle) -> list[str]:
    """Files in the folder that the manifest does not name, so that no checksum speaks for them; not hidden ones."""
    named = {MANIFEST, *(file.path for file in bundle.files)}
    others = sorted(path for path in _files(folder) if path not in named)
    if not others:
        return []
    more = f" and {len(others) - MOST_FILES} more" if len(others) > MOST_FILES else ""
    return [f"not in the manifest, and not checked: {one_line(', '.join(others[:MOST_FILES]))}{more}"]


def _files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in names if not name.startswith("."))


def _table(rows: list[Cost]) -> list[str]:
    """Tiles, image tokens and prompt tokens by size; time grows with all of them."""
    head = f"{'':>24}" + "".join(f"{shape:>20}" for shape in SHAPES)
    lines = ["tiles / image tokens / prompt tokens of a picture, before the question:", head]
    for start in range(0, len(rows), len(SHAPES)):
        row = rows[start : start + len(SHAPES)]
        cells = "".join(f"{_cell(cost):>20}" for cost in row)
        lines.append(f"{row[0].size:>24}{cells}" + ("  <- trained with" if row[0].trained_with else ""))
    return lines


def _cell(cost: Cost) -> str:
    told = f"{cost.tiles} / {cost.image_tokens} / {cost.prompt_tokens or '-'}"
    return told + ("" if cost.fits else " full")
