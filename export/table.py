"""What each model family can be exported to: one table for `mpa-edge families`, for the README and for machines.

    python -m mpa_edge.export.table    writes it into README.md anew, between its two comments

Names, model types, formats and precisions are the code's own; what is said about them stands here. Nothing heavy is
imported.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from mpa_edge.errors import InputError
from mpa_edge.export.families import FAMILIES
from mpa_edge.export.quants import DEFAULTS, QUANTS
from mpa_edge.records import write_atomic

BEGIN, END = "<!-- families -->", "<!-- /families -->"


@dataclass(frozen=True)
class About:
    """What people want to know of a family: models of the hub that are of it, how it sees a picture, and what counts
    positions and is special about prompts."""

    examples: tuple[str, ...]
    picture: str
    positions: str
    notes: str = ""


ABOUT = {
    "idefics3": About(
        examples=(
            "HuggingFaceTB/SmolVLM-256M-Instruct",
            "HuggingFaceTB/SmolVLM-500M-Instruct",
            "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
            "HuggingFaceM4/Idefics3-8B-Llama3",
        ),
        picture="scaled to a longest edge, cut into square tiles, and an overview; a fixed number of tokens per tile",
        positions="0, 1, 2, …; the prompt names each tile's row and column",
    ),
    "qwen2_vl": About(
        examples=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        picture="in one piece of its own shape, between a least and a most number of pixels",
        positions="M-RoPE: time, height and width",
    ),
    "qwen2_5_vl": About(
        examples=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        picture="in one piece of its own shape, between a least and a most number of pixels",
        positions="M-RoPE: time, height and width",
        notes="window attention in the vision tower",
    ),
    "llava": About(
        examples=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-interleave-qwen-0.5b-hf"),
        picture="one square tile: the centre, or the whole picture squeezed",
        positions="0, 1, 2, …",
        notes="CLIP or SigLIP tower; the checkpoint must have a chat template",
    ),
    "internvl": About(
        examples=("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-2B-hf"),
        picture="the grid of square tiles that is nearest to its shape, and an overview",
        positions="0, 1, 2, …",
        notes="the -hf checkpoints, with a Qwen2 language model; transformers.js does not know it (ONNX Runtime does)",
    ),
}
RUNS_ON = {
    "gguf": "llama.cpp and what is built on it",
    "onnx": "ONNX Runtime, transformers.js",
    "openvino": "OpenVINO on CPUs (its GPU device is not tested)",
    "hf": "transformers: the merged model in safetensors, with a model card",
}


@dataclass(frozen=True)
class Row:
    """One family. `formats` maps what goes after `--format` to what goes after `--quant`; a format without any keeps
    the weights as they are."""

    family: str
    model_types: tuple[str, ...]
    examples: tuple[str, ...]
    picture: str
    positions: str
    notes: str
    formats: dict[str, tuple[str, ...]]


def families_table() -> list[Row]:
    """A row per family, in the order of `FAMILIES`."""
    formats = {str(name): quants for name, quants in QUANTS.items()}
    return [Row(family.name, family.model_types, **vars(ABOUT[family.name]), formats=formats) for family in FAMILIES]


def as_json() -> str:
    """The table for machines: families, and formats with their default precision."""
    formats = {
        name: {"runs_on": RUNS_ON[name], "quants": quants, "default": DEFAULTS[name]} for name, quants in QUANTS.items()
    }
    return json.dumps({"families": [asdict(row) for row in families_table()], "formats": formats}, indent=2)


def as_text() -> str:
    """The table for a terminal: a paragraph per family, and the formats."""
    lines = []
    for row in families_table():
        lines.append(f"{row.family}  (model_type {', '.join(row.model_types)})")
        facts = {"models": ", ".join(row.examples), "picture": row.picture, "positions": row.positions}
        facts |= {"notes": row.notes} if row.notes else {}
        facts |= {"formats": ", ".join(row.formats)}
        lines += [f"  {name:<10} {text}" for name, text in facts.items()]
        lines.append("")
    lines.append("formats and precisions, the same for every family (the default in brackets)")
    lines += [f"  {name:<10} {_precisions(name)}; {RUNS_ON[name]}" for name in QUANTS]
    lines += ["", "Other models that transformers can load can be aligned, not exported."]
    return "\n".join(lines)


def as_markdown() -> str:
    """The table for the README: families by formats, then the precisions of each format."""
    lines = [
        f"| family (`model_type`) | models, for example | a picture is seen | positions | {' | '.join(QUANTS)} |",
        "|:--|:--|:--|:--|" + ":-:|" * len(QUANTS),
    ]
    for row in families_table():
        name = f"**{row.family}** ({_code(row.model_types)})" + (f"<br>{row.notes}" if row.notes else "")
        cells = [name, "<br>".join(map(_code, row.examples)), row.picture, row.positions]
        cells += ["✓" if format in row.formats else "–" for format in QUANTS]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| `--format` | `--quant` (default) | for |", "|:--|:--|:--|"]
    lines += [f"| `{name}` | {_precisions(name)} | {RUNS_ON[name]} |" for name in QUANTS]
    return "\n".join(lines)


def between_marks(text: str) -> str:
    """A README's text with the table of today; `InputError` where it does not have the two comments."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise InputError(f"the text has no {BEGIN} … {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{as_markdown()}\n{END}", text)


def _precisions(format: str) -> str:
    known = {str(name): (quants, DEFAULTS[name]) for name, quants in QUANTS.items()}
    quants, default = known[format]
    return ", ".join(f"({quant})" if quant in default else quant for quant in quants) or "the weights' own type"


def _code(names: str | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in ((names,) if isinstance(names, str) else names))


if __name__ == "__main__":
    readme = Path(__file__).parent.parent / "README.md"
    write_atomic(readme, between_marks(readme.read_text(encoding="utf-8")))
