"""The rows of the ablation: which settings each one is, from the paper's plain method to the tool's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpa_edge.config import AlignConfig

TASK = "reference"


@dataclass(frozen=True)
class Trial:
    """A row that trains a student. `quant` is the ONNX quantization in which the student is scored as well; `ask` is
    whether the base student's bundle of that quantization is asked in the student's place."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    quant: str | None = None
    ask: bool = False


# Plain MPA: one question a picture, its written answer as the target, one self-check, the gap alone.
PLAIN: dict[str, Any] = {
    "match": "official",
    "select": "parity",
    "mix": 0.0,
    "target": "written",
    "questions": 1,
    "votes": 1,
    "blind": False,
    "rounds": 1,
}
SHORT = PLAIN | {"target": "short"}
SEVERAL = SHORT | {"questions": AlignConfig.model_fields["questions"].default}


def default_of(*names: str) -> dict[str, Any]:
    """The tool's own values of the settings that the rows vary; today plain MPA with short targets, several questions
    and an agreement mix."""
    return {name: AlignConfig.model_fields[name].default for name in names or PLAIN}


TRIALS = (
    Trial("all pseudo-labels", PLAIN | {"select": "all"}),
    Trial("random, of parity's size", PLAIN | {"select": "random"}),
    Trial("disagree", PLAIN | {"select": "disagree"}),
    Trial("parity, the paper's match", PLAIN | {"match": "paper"}),
    Trial("parity, the official match", PLAIN),
    Trial("+ short targets", SHORT),
    Trial("+ votes (3)", SHORT | {"votes": 3}),
    Trial("+ blind check", SHORT | {"blind": True}),
    Trial("+ several questions", SEVERAL),
    Trial("+ agreement mix: the default", default_of(), quant="q4"),
    Trial("+ two rounds", default_of() | {"rounds": 2}),
    Trial("random, of the default's size", default_of() | {"select": "random"}),
    Trial("+ deployment-aware at q4", default_of(), quant="q4", ask=True),
)


def slug(name: str) -> str:
    """A row's name as a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()).lower()
