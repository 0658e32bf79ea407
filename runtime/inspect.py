"""What a bundle is, and what a picture costs it at each size: tiles and tokens, without starting an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mpa_edge.bundle import Bundle, ImageSettings, read_bundle
from mpa_edge.runtime.images import MAX_EDGE, grid_of
from mpa_edge.runtime.prompts import Prompts

# Width and height of typical pictures; only their ratio matters.
SHAPES = {"4:3": (4000, 3000), "square": (3000, 3000), "16:9": (4000, 2250)}


@dataclass(frozen=True)
class Cost:
    """What a picture of one shape takes at one longest edge; tokens are the whole prompt's, without the question."""

    longest_edge: int
    shape: str
    tiles: int
    prompt_tokens: int
    fits: bool


def costs(folder: Path, bundle: Bundle) -> list[Cost]:
    """The cost of every longest edge that makes a difference, from one tile up to what the context holds."""
    tokenizer = Tokenizer.from_file(str(bundle.path_of(folder, "tokenizer")))
    prompts = Prompts(tokenizer, bundle.prompt, bundle.family, bundle.image.tokens_per_tile)
    found: list[Cost] = []
    for edge in edges(bundle.image):
        image = bundle.image.model_copy(update={"longest_edge": edge})
        row = []
        for shape, size in SHAPES.items():
            rows, columns = grid_of(size, image)
            tokens = len(prompts.tokens(bundle.prompt.question_template.replace("{question}", ""), rows, columns))
            row.append(Cost(edge, shape, rows * columns + 1, tokens, tokens < bundle.prompt.context_length))
        found += row
        if not any(cost.fits for cost in row):
            break
    return found


def edges(image: ImageSettings) -> list[int]:
    """The longest edges worth comparing: whole tiles up to `MAX_EDGE`, and the one of the student's training."""
    tiles = range(image.tile_size, MAX_EDGE + 1, image.tile_size) if image.split else [image.tile_size]
    return sorted({*tiles, image.longest_edge})


def report(folder: Path) -> str:
    """A bundle's identity, checks and costs, for people."""
    bundle = read_bundle(folder)
    return "\n".join([*_identity(bundle), "", *_table(bundle, costs(folder, bundle))])


def _identity(bundle: Bundle) -> list[str]:
    image, source = bundle.image, bundle.source
    verified = bundle.checks.get("verify", {})
    agreement = verified.get("token_agreement")
    lines = [
        f"{bundle.name}: {bundle.family}, {bundle.engine}, {bundle.quantization}, {bundle.size_bytes() / 1e6:.1f} MB",
        f"made by mpa-edge {source.tool_version} from {source.student}"
        + (f", aligned to {source.teacher}" if source.teacher else "")
        + (f" on {source.task}" if source.task else ""),
        f"prompt {bundle.prompt.question_template!r}, at most {bundle.prompt.max_new_tokens} new tokens, "
        f"context {bundle.prompt.context_length}",
        f"longest edge {image.longest_edge}, tiles of {image.tile_size} pixels ({image.tokens_per_tile} tokens)",
    ]
    if agreement is not None:
        lines.append(f"verified: {agreement:.0%} of {verified.get('samples')} answers equal the merged model's")
    lines += [f"  {file.role:16} {file.bytes / 1e6:9.2f} MB  {file.path}" for file in bundle.files]
    return lines


def _table(bundle: Bundle, rows: list[Cost]) -> list[str]:
    """Tiles and prompt tokens by longest edge; time grows with both."""
    head = f"{'longest edge':>14}" + "".join(f"{shape:>20}" for shape in SHAPES)
    lines = ["tiles and prompt tokens of a picture, before the question:", head]
    for edge in dict.fromkeys(cost.longest_edge for cost in rows):
        cells = "".join(
            f"{f'{cost.tiles} / {cost.prompt_tokens}' + ('' if cost.fits else ' full'):>20}"
            for cost in rows
            if cost.longest_edge == edge
        )
        lines.append(f"{edge:>14}{cells}" + ("  <- trained with" if edge == bundle.image.longest_edge else ""))
    return lines
