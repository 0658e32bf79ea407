"""What the audit page says of a run's settings, from its `run.json`."""

from __future__ import annotations

import json
from typing import Any

from mpa_edge.config import AlignConfig

SIDES = ("teacher", "student", "ask")
# Of what a model says about itself, what people look for.
MODEL_FACTS = ("engine", "model", "dtype", "revision")
# Where a run lies is not what it is.
LEFT_OUT = ("out", "fresh")


def facts_of(content: dict[str, Any]) -> dict[str, Any]:
    """Models, task, settings (those that differ from the defaults first) and versions, as lists of rows for the page;
    what `run.json` does not tell is left out."""
    config, task = content.get("config") or {}, content.get("task") or {}
    settings = [
        {"flag": f"--{name.replace('_', '-')}", "value": _shown(value), "changed": value != _default(name)}
        for name, value in config.items()
        if name not in LEFT_OUT
    ]
    return {
        "models": [_model(side, content.get(side) or {}, config) for side in SIDES if side in (*content, *SIDES[:2])],
        "task": str(task.get("name") or config.get("task") or ""),
        "prompts": [str(prompt) for prompt in task.get("annotate_prompts") or ()],
        "template": str(task.get("question_template") or ""),
        "rule": _rule(config, task),
        "select": str(config.get("select") or ""),
        "settings": settings,
        "versions": {"mpa-edge": str(content.get("tool", "")).removeprefix("mpa-edge "), **content.get("versions", {})},
    }


def held_out(content: dict[str, Any], number: int) -> tuple[float, float] | None:
    """The shares of held-out rows that were right before and after the training of a round (from 1); None where it has
    not been trained."""
    stage = content.get("stages", {}).get("level" if number == 1 else f"level-{number}")
    return (stage["before"]["holdout_exact"], stage["best"]["holdout_exact"]) if stage else None


def _model(side: str, model: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    facts = {name: str(model[name]) for name in MODEL_FACTS if model.get(name)}
    if weights := model.get("weights"):
        facts["weights"] = str(weights)[:12]
    role = "asked in the student’s place" if side == "ask" else side
    return {"side": side, "role": role, "name": str(model.get("name") or config.get(side) or "unknown"), "facts": facts}


def _rule(config: dict[str, Any], task: dict[str, Any]) -> str:
    if config.get("match") == "paper":
        return "the paper’s substring rule"
    metric = task.get("metric")
    return f"the task’s metric ({str(metric).replace('_', ' ')})" if metric else "the task’s metric"


def _default(name: str) -> Any:
    field = AlignConfig.model_fields.get(name)
    if field is None or field.is_required():
        return ...
    return json.loads(json.dumps(field.default))  # as it reads back: tuples become lists


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
