"""Joules per answer, from the sensor that sees most of the machine; null with the reason where none can be read.

A Jetson's rails and a battery see the whole machine, so either stands alone. Elsewhere it is the processor's counters,
and for a model on an NVIDIA GPU those of the GPU with them. What the machine takes when idle is in the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpa_edge.benchmarks.energy_sources import (
    Clock,
    NoSensor,
    Source,
    open_battery,
    open_jetson,
    open_nvml,
    open_rapl,
)

ROOT = Path("/")


def sources(on_gpu: bool, root: Path = ROOT, *, thread: bool = True) -> tuple[list[Source], list[str]]:
    """(the sources to add up, why others cannot be read)."""
    reasons = []
    for whole in (open_jetson, open_battery):
        try:
            return [whole(root, thread=thread)], []
        except NoSensor as error:
            reasons.append(str(error))
    found: list[Source] = []
    wanted: list[Callable[[], Source]] = [lambda: open_rapl(root)]
    wanted += [lambda: open_nvml(thread=thread)] if on_gpu else []
    for open_one in wanted:
        try:
            found.append(open_one())
        except NoSensor as error:
            reasons.append(str(error))
    return found, reasons


def measure_energy(
    on_gpu: bool, root: Path = ROOT, *, clock: Clock = time.perf_counter, thread: bool = True
) -> Callable[[], dict[str, Any]]:
    """Call it before a series, and what it returns after: `joules`, `seconds`, `source`, `why` (one of the first and
    the last is None). A GPU's energy without its host's is told as such in `source`."""
    found, reasons = sources(on_gpu, root, thread=thread)
    started, begin = clock(), [source.joules() for source in found]

    def end() -> dict[str, Any]:
        seconds = clock() - started
        try:
            joules = sum(source.joules() - first for source, first in zip(found, begin, strict=True))
        except (OSError, ValueError, NoSensor) as error:
            return _unknown(f"the sensor failed ({error})")
        finally:
            for source in found:
                source.close()
        if not found:
            return _unknown("; ".join(reasons))
        least = max(source.least_s for source in found)
        if seconds < least:
            return _unknown(
                f"{found[0].name}: the series took {seconds:.1f} s, its sensor needs {least:g} s; raise --latency-n"
            )
        return {"joules": joules, "seconds": seconds, "source": " + ".join(one.name for one in found), "why": None}

    return end


def _unknown(why: str) -> dict[str, Any]:
    return {"joules": None, "seconds": None, "source": None, "why": why}


def per_answer(told: dict[str, Any] | None, answers: int) -> dict[str, Any] | None:
    """The report's figures of a series with so many answers; None where nobody tried to measure."""
    if told is None:
        return None
    if told["joules"] is None or not answers:
        return {"joules_per_answer": None, "answers_per_joule": None, "watts": None, **_sources(told)}
    joules = told["joules"] / answers
    return {
        "joules_per_answer": round(joules, 6),
        "answers_per_joule": round(1 / joules, 6) if joules else None,
        "watts": round(told["joules"] / told["seconds"], 3) if told["seconds"] else None,
        **_sources(told),
    }


def _sources(told: dict[str, Any]) -> dict[str, Any]:
    return {"source": told["source"], "why": told["why"]}
