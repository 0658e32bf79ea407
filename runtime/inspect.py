"""What a bundle is, and what a picture costs it at each size: tiles and tokens, without starting an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mpa_edge.bundle import Bundle, read_bundle
from mpa_edge.runtime.families import family_of_bundle
from mpa_edge.runtime.prompts import Prompts

# Width and height of typical pictures; only their ratio matters.
SHAPES = {"4:3": (4000, 3000), "square": (3000, 3000), "16:9": (4000, 2250)}


@dataclass(frozen=True)
class Cost:
    """What a picture of one shape takes at one size; tokens are the whole prompt's, without the question."""

    size: str
    shape: str
    image_tokens: int
    prompt_tokens: int
    fits: bool
    trained_with: bool


def costs(folder: Path, bundle: Bundle) -> list[Cost]:
    """The cost of every size that makes a difference, from the cheapest up to what the context holds."""
    family, prompt = family_of_bundle(bundle), bundle.prompt
    prompts = Prompts(Tokenizer.from_file(str(bundle.path_of(folder, "tokenizer"))), prompt)
    text = prompt.question_template.replace("{question}", "")
    found: list[Cost] = []
    for name, image in family.sizes(bundle.image):
        row = []
        for shape, size in SHAPES.items():
            rows, columns = family.grid(size, image)
            tokens = len(prompts.tokens(text, [family.layout(rows, columns, prompt.image_token, image)]))
            seen, fits = family.image_tokens(rows, columns, image), tokens < prompt.context_length
            row.append(Cost(name, shape, seen, tokens, fits, image == bundle.image))
        found += row
        if not any(cost.fits for cost in row):
            break
    return found


def report(folder: Path) -> str:
    """A bundle's identity, checks and costs, for people; `BundleError` where a file's size or checksum is not what the
    manifest says."""
    bundle = read_bundle(folder, check_digests=True)
    return "\n".join([*_identity(bundle), "", *_table(costs(folder, bundle))])


def _identity(bundle: Bundle) -> list[str]:
    source = bundle.source
    verified = bundle.checks.get("verify", {})
    agreement = verified.get("token_agreement")
    lines = [
        f"{bundle.name}: {bundle.family}, {bundle.engine}, {bundle.quantization}, {bundle.size_bytes() / 1e6:.1f} MB",
        f"made by mpa-edge {source.tool_version} from {source.student}"
        + (f", aligned to {source.teacher}" if source.teacher else "")
        + (f" on {source.task}" if source.task else ""),
        f"prompt {bundle.prompt.question_template!r}, at most {bundle.prompt.max_new_tokens} new tokens, "
        f"context {bundle.prompt.context_length}",
    ]
    if agreement is not None:
        lines.append(f"verified: {agreement:.0%} of {verified.get('samples')} answers equal the merged model's")
    lines += _road(bundle)
    lines += [f"  {file.role:16} {file.bytes / 1e6:9.2f} MB  {file.path}" for file in bundle.files]
    lines.append(f"sizes and checksums of all {len(bundle.files)} files are as the manifest says")
    return lines


def _road(bundle: Bundle) -> list[str]:
    """The accuracies that export measured from the base to this bundle; none where it had no labels."""
    try:
        road = bundle.checks["road"]
        known = [step for step in road["steps"] if step["step"] != "quantized" or step["name"] == bundle.short_name]
        steps = ", ".join(f"{step['name']} {step['value']:.1%}" for step in known)
        return [f"{road['metric']} on {road['data']['n']:,} questions of {road['data']['name']}: {steps}"]
    except (KeyError, TypeError, ValueError):
        return []  # none, or of another version


def _table(rows: list[Cost]) -> list[str]:
    """Image tokens and prompt tokens by size; time grows with both."""
    head = f"{'':>24}" + "".join(f"{shape:>20}" for shape in SHAPES)
    lines = ["image tokens / prompt tokens of a picture, before the question:", head]
    for start in range(0, len(rows), len(SHAPES)):
        row = rows[start : start + len(SHAPES)]
        cells = "".join(
            f"{f'{cost.image_tokens} / {cost.prompt_tokens}' + ('' if cost.fits else ' full'):>20}" for cost in row
        )
        lines.append(f"{row[0].size:>24}{cells}" + ("  <- trained with" if row[0].trained_with else ""))
    return lines
