"""`--require "accuracy>=0.60, p95<=300ms"`: the lines that a variant must keep, and whether it does.

A figure with an interval keeps a line when its whole 95% interval does and breaks it when none of the interval does.
In between the line is undecided, and the number of further samples that would decide it is estimated:

    means (accuracy, agreement, gap_closed, tokens_per_s)   n (h / d)² - n
        An interval narrows with the square root of n. d is the distance of the value to the line, h of the value to
        the end of the interval beyond the line.
    percentiles (p50, p90, p95, p99)                        z² q (1 - q) / (s - q)² - n
        The q-th percentile is within the line where the share s of answers within the line is q or more; that is how
        many samples the score test of a proportion needs (z = 1.96).

A value right on the line is decided by no number of samples. Size, memory and energy are measured once per variant and
have no interval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, floor, inf, log10
from typing import Any, Literal

from mpa_edge.benchmarks.host import BUSY_FROM
from mpa_edge.errors import InputError
from mpa_edge.stats import Z, quantile_interval, wilson

Status = Literal["pass", "fail", "undecided", "unknown"]
Entry = dict[str, Any]
Interval = tuple[float, float]

SHARE = {"": 1.0, "%": 0.01}
TIME = {"ms": 1.0, "s": 1000.0}
BYTES = {"MB": 1.0, "GB": 1000.0, "MiB": 2**20 / 1e6, "GiB": 2**30 / 1e6}
RATE = {"": 1.0, "/s": 1.0}
ENERGY = {"J": 1.0, "mJ": 0.001}
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Quantity:
    """Something that can be required. `units` turn what is typed into the report's unit."""

    better: Literal[">=", "<="]
    units: dict[str, float]
    samples: str  # what more of would narrow the interval


QUANTITIES = {
    "accuracy": Quantity(">=", SHARE, "questions"),
    "gap_closed": Quantity(">=", SHARE, "questions"),
    "agreement": Quantity(">=", SHARE, "questions"),
    **{name: Quantity("<=", TIME, "timed pictures (--latency-n)") for name in PERCENTILES},
    "tokens_per_s": Quantity(">=", RATE, "timed pictures (--latency-n)"),
    "memory": Quantity("<=", BYTES, ""),
    "size": Quantity("<=", BYTES, ""),
    "energy": Quantity("<=", ENERGY, ""),
}
LINE = re.compile(r"(?P<name>\w+)\s*(?P<sign>[<>=≤≥]+)\s*(?P<value>[0-9]*\.?[0-9]+)\s*(?P<unit>[A-Za-z%/]*)")


@dataclass(frozen=True)
class Line:
    """One requirement. `value` is in the report's unit: a share, milliseconds, megabytes, tokens per second, joules."""

    text: str
    name: str
    value: float

    @property
    def quantity(self) -> Quantity:
        """What is required."""
        return QUANTITIES[self.name]

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.quantity.better == ">=" else -1


@dataclass(frozen=True)
class Check:
    """A variant at a line. `margin` is how far the value lies on the good side, in the report's unit, negative on the
    bad side; `more` the further samples that would about decide it; `why` says why nothing is decided."""

    name: str
    status: Status
    value: float | None = None
    margin: float | None = None
    ci95: tuple[float, float | None] | None = None
    more: int | None = None
    why: str | None = None


def parse_lines(text: str) -> list[Line]:
    """The lines of a `--require`. `InputError` says what is wrong with one, and what there is to require."""
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise InputError(f"--require is empty; {_known()}")
    return [parse_line(part) for part in parts if part]


def parse_line(text: str) -> Line:
    """One line: a quantity, >= or <=, a number, and its unit."""
    found = LINE.fullmatch(text)
    if found is None:
        raise InputError(f"--require {text!r}: not of the form QUANTITY>=VALUE or QUANTITY<=VALUE; {_known()}")
    name, sign = found["name"], found["sign"].replace("≤", "<=").replace("≥", ">=")
    if name not in QUANTITIES:
        raise InputError(f"--require {text!r}: no such quantity; {_known()}")
    quantity = QUANTITIES[name]
    if sign != quantity.better:
        raise InputError(f"--require {text!r}: write {name}{quantity.better}{found['value']}{found['unit']}")
    units = {unit.lower(): factor for unit, factor in quantity.units.items()}
    if (unit := found["unit"].lower()) not in units:
        raise InputError(f"--require {text!r}: {_unit_of(name)}")
    value = float(found["value"]) * units[unit]
    if quantity.units is SHARE and value > 1:
        raise InputError(f"--require {text!r}: {_unit_of(name)}")
    return Line(text, name, value)


def _known() -> str:
    return f'known: {", ".join(QUANTITIES)}; for example "accuracy>=0.60, p95<=300ms, memory<=1GB, size<=500MB"'


def _unit_of(name: str) -> str:
    units = [unit for unit in QUANTITIES[name].units if unit]
    if QUANTITIES[name].units is SHARE:
        return f"{name} is a share from 0 to 1, or a percentage such as 60%"
    return f"{name} needs {'the unit' if len(units) == 1 else 'one of the units'} {', '.join(units)}"


def requirements(
    text: str | None, entries: Sequence[Entry], times: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """The report's `requirements`: the lines, and each variant's checks; None where nothing is required.

    `times` holds the milliseconds per timed answer by the variants' names.
    """
    if text is None:
        return None
    lines = parse_lines(text)
    rows = []
    for entry in entries:
        checks = [check(line, entry, times.get(entry["name"], ())) for line in lines]
        rows.append(
            {"name": entry["name"], "status": together(checks), "checks": [asdict(one) for one in checks]},
        )
    return {"lines": [asdict(line) for line in lines], "variants": rows}


def together(checks: Sequence[Check]) -> Status:
    """A variant's status over all lines: one that fails decides, then one that is not known or not decided."""
    found = {one.status for one in checks}
    order: tuple[Status, ...] = ("fail", "unknown", "undecided", "pass")
    return next(status for status in order if status in found)


def check(line: Line, entry: Entry, times: Sequence[float]) -> Check:
    """One variant at one line."""
    value = value_of(entry, line.name)
    if entry.get("failed") or value is None:
        return Check(line.name, "unknown", why=why_unknown(entry, line.name))
    margin = round(line.sign * (value - line.value), 6)
    ends = interval_of(entry, line.name, times)
    if ends is None:
        return Check(line.name, "undecided", value, margin, why="the teacher is not measurably ahead of the student")
    status = side(line, ends)
    shown = None if ends[0] == ends[1] else (ends[0], None if ends[1] == inf else ends[1])
    noise = disturbed(entry) if line.name in PERCENTILES else None
    if status == "fail" and noise:
        return Check(line.name, "undecided", value, margin, shown, why=noise)
    more = further_samples(line, entry, value, ends, times) if status == "undecided" else None
    why = None
    if status == "undecided":
        why = f"about {more:,} more {line.quantity.samples} needed" if more else "right on the line"
        why += f"; {noise}" if noise else ""
    return Check(line.name, status, value, margin, shown, more, why)


def disturbed(entry: Entry) -> str | None:
    """What made a variant's times too long."""
    if (entry.get("busy") or 0) >= BUSY_FROM:
        return "other work disturbed the clock"
    found: str | None = (entry.get("conditions") or {}).get("throttled")
    return found


def side(line: Line, ends: Interval) -> Status:
    """On which side of the line an interval lies."""
    worst, best = ends if line.sign > 0 else ends[::-1]
    if line.sign * (worst - line.value) >= 0:
        return "pass"
    return "fail" if line.sign * (best - line.value) < 0 else "undecided"


def value_of(entry: Entry, name: str) -> float | None:
    """A variant's figure, in the report's unit."""
    if name in PERCENTILES:
        value = entry["latency_ms"]["total"].get(name)
    elif name in ("accuracy", "agreement"):
        value = (entry.get(name) or {}).get("value")
    elif name == "tokens_per_s":
        value = (entry["latency_ms"].get(name) or {}).get("value")
    elif name == "energy":
        value = (entry.get(name) or {}).get("joules_per_answer")
    elif name == "memory":
        value = whole_memory(entry)
    else:
        value = entry.get({"size": "size_mb"}.get(name, name))
    return None if value is None else float(value)


def whole_memory(entry: Entry) -> float | None:
    """The process's peak with the GPU's memory; on a Jetson, where both are one, the larger figure."""
    own: float | None = entry["peak_memory_mb"]
    device: float | None = entry.get("device_memory_mb")
    if own is None or device is None:
        return own
    return max(own, device) if "board" in (entry.get("device_memory_how") or "") else own + device


def why_unknown(entry: Entry, name: str) -> str:
    """Why a figure is missing."""
    if entry.get("failed"):
        return f"failed: {entry['failed']}"
    if name == "energy":
        return (entry.get("energy") or {}).get("why") or "not measured"
    if name in ("gap_closed", "agreement"):
        return "needs --baseline teacher=… and student=…" if name == "gap_closed" else "needs --baseline teacher=…"
    return "not measured"


def interval_of(entry: Entry, name: str, times: Sequence[float]) -> Interval | None:
    """The 95% interval of a figure; (value, value) for one that is measured once, None for one that cannot be told."""
    if name in PERCENTILES:
        low, high = quantile_interval(times, PERCENTILES[name])
        return max(0.0, low), high
    if name in ("accuracy", "agreement"):
        low, high = entry[name]["ci95"]
        # A bootstrap of equal scores has no width, which says more than so many questions can know.
        return wilson(entry[name]["value"], entry[name]["n"]) if low == high else (low, high)
    if name == "gap_closed":
        return tuple(entry["gap_ci95"]) if entry.get("gap_ci95") else None
    if name == "tokens_per_s":
        return tuple(entry["latency_ms"][name]["ci95"])
    value = value_of(entry, name)
    assert value is not None  # the caller looked
    return value, value


def further_samples(line: Line, entry: Entry, value: float, ends: Interval, times: Sequence[float]) -> int | None:
    """How many more samples would about decide the line (see above), to two figures; None where no number would."""
    if line.name in PERCENTILES:
        q, n = PERCENTILES[line.name], len(times)
        within = sum(time <= line.value for time in times) / n
        needed = Z**2 * q * (1 - q) / (within - q) ** 2 if within != q else inf
    else:
        n = entry["latency_ms"]["n"] if line.name == "tokens_per_s" else entry["accuracy"]["n"]
        distance, half = line.value - value, (ends[1] if line.value > value else ends[0]) - value
        needed = n * (half / distance) ** 2 if distance else inf
    return None if needed == inf else two_figures(max(1.0, needed - n))


def two_figures(value: float) -> int:
    """Rounded up: 1234 -> 1300."""
    step: int = 10 ** max(0, floor(log10(value)) - 1)
    return ceil(value / step) * step
