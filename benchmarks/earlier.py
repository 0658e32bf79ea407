"""An earlier report, and the answers behind it, as `--compare` reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat, NonNegativeFloat, ValidationError

from mpa_edge.errors import InputError


class _Strict(BaseModel, strict=True):
    """What is read of it; `report.schema.json` has the rest."""


class _Accuracy(_Strict):
    value: FiniteFloat | None
    ci95: tuple[FiniteFloat, FiniteFloat] | None


class _Total(_Strict):
    p50: NonNegativeFloat | None


class _Latency(_Strict):
    total: _Total


class _Conditions(_Strict):
    power_mode: str | None = None
    throttled: str | None = None


class _Variant(_Strict):
    name: str
    failed: str | None
    accuracy: _Accuracy
    latency_ms: _Latency
    size_mb: NonNegativeFloat | None
    peak_memory_mb: NonNegativeFloat | None
    busy: FiniteFloat | None = None
    conditions: _Conditions | None = None


class _Task(_Strict):
    metric: str


class _Host(_Strict):
    cpu: str | None
    cores: int


class _Settings(_Strict):
    threads: int


class _Data(_Strict):
    sha256: str | None = None


class _Report(_Strict):
    created: str
    tool_version: str
    variants: list[_Variant]
    task: _Task
    host: _Host
    settings: _Settings
    data: _Data


class _Row(_Strict):
    variant: str
    part: Literal["accuracy", "latency"]


class _Asked(_Row):
    id: str
    question: str | None = None
    score: FiniteFloat | None


class _Timed(_Row):
    key: str
    wall_ms: NonNegativeFloat | None


@dataclass(frozen=True)
class Earlier:
    """An earlier report and its raw rows; none where they are not beside it."""

    report: dict[str, Any]
    rows: list[dict[str, Any]]


def earlier(path: Path) -> Earlier:
    """Read an earlier report; `InputError` for a file that is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--compare {path}: cannot be read ({error.strerror})") from error
    try:
        _Report.model_validate_json(content)
    except ValidationError as error:
        damaged = error.errors()[0]["type"] == "json_invalid"
        what = "cannot be read" if damaged else "not the report.json of mpa-edge bench"
        raise InputError(f"--compare {path}: {what} ({_why(error)})") from error
    return Earlier(json.loads(content), _rows(path.with_name("raw.jsonl")))


def _rows(raw: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(raw.read_bytes().splitlines() if raw.is_file() else [], 1):
        try:
            known = _Row.model_validate_json(line)
            (_Asked if known.part == "accuracy" else _Timed).model_validate_json(line)
        except ValidationError as error:
            raise InputError(
                f"--compare: {raw}, line {number}, is damaged ({_why(error)}); delete the file to compare by intervals"
            ) from error
        rows.append(json.loads(line))
    return rows


def _why(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
