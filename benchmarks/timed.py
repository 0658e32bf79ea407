"""The clock's part of a worker: single answers about distinct pictures after a warm-up, and what they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpa_edge.benchmarks.conditions import conditions, during
from mpa_edge.benchmarks.energy import measure_energy
from mpa_edge.benchmarks.host import BUSY_FROM, peak_memory_bytes, watch_others
from mpa_edge.benchmarks.jobs import (
    FIXED,
    LATENCY,
    Ask,
    Job,
    Row,
    Say,
    asks,
    lines_of,
    row_of,
    takes_length,
    unanswered,
    whole_rows,
)
from mpa_edge.benchmarks.memory import proportional_bytes
from mpa_edge.errors import ImageError
from mpa_edge.records import write_atomic
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding, Vlm

MEMORY = ("peak_memory_bytes", "proportional_memory_bytes", "device_memory_bytes", "device_memory_how")
KEPT = ("load_ms", "first_answer_ms", *MEMORY, "busy", "conditions", "energy")


def timed_part(
    vlm: Vlm,
    job: Job,
    folder: Path,
    decoding: Decoding,
    before: dict[str, Any] | None,
    say: Say,
    device_memory: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Time the model, unless what was measured before still serves; returns what goes into measured.json.

    A series that other work disturbed is taken again, and the less disturbed of the two is kept. Answers of one length
    are timed after it, and again where it is.
    """
    there = before is not None and is_timed(folder, job)
    if before and there and (job.keep_timings or not is_disturbed(before)):
        if not is_length_timed(folder, job):
            warm_up(vlm, asks(job.warm_up), decoding)
            time_length(vlm, job, folder, say)
        return {key: before.get(key) for key in KEPT}
    others, start = watch_others(), conditions()
    cold = warm_up(vlm, asks(job.warm_up), decoding)
    here = vlm.engine != "chat"  # what a chat server takes, its own machine knows
    energy = measure_energy(on_gpu=device_of(vlm) not in (None, "cpu")) if here else lambda: None
    rows = measure_latency(vlm, asks(job.latency), decoding, say)
    joules = energy()
    time_length(vlm, job, folder, say)
    about = {
        "load_ms": None,
        "first_answer_ms": cold,
        "energy": joules,
        "busy": others(),
        "conditions": during(start, conditions()),
        "peak_memory_bytes": peak_memory_bytes() if here else None,
        "proportional_memory_bytes": proportional_bytes() if here else None,
        **(device_memory() if here else {}),
    }
    if before and there and (before.get("busy") or 0) < (about["busy"] or 0):
        about = {key: before.get(key) for key in KEPT}
    else:
        write_atomic(folder / LATENCY, lines_of(rows))
    return about


def time_length(vlm: Vlm, job: Job, folder: Path, say: Say) -> None:
    """Time answers of one length, where the job has one and the model can be held to it."""
    if job.fixed_length and takes_length(job.spec):
        with endless(vlm):
            rows = measure_latency(vlm, asks(job.latency), Decoding(max_new_tokens=job.fixed_length), say, "fixed")
        write_atomic(folder / FIXED, lines_of(rows))


def are_timed(folder: Path, job: Job) -> bool:
    """Whether all of the job's series lie there."""
    return is_timed(folder, job) and is_length_timed(folder, job)


def is_timed(folder: Path, job: Job) -> bool:
    """Whether the job's natural series lies there, in this order."""
    return [row.key for row in whole_rows(folder / LATENCY)] == [ask["key"] for ask in job.latency]


def is_length_timed(folder: Path, job: Job) -> bool:
    """Whether the series of one length lies there, or none is wanted."""
    return not job.fixed_length or not takes_length(job.spec) or bool(fixed_rows(folder, job))


def fixed_rows(folder: Path, job: Job) -> list[Row]:
    """The rows of the series of one length; none where they have another length, or are about other pictures."""
    rows = whole_rows(folder / FIXED)
    same = [row.key for row in rows] == [ask["key"] for ask in job.latency]
    return rows if same and {row.n_tokens for row in rows} <= {job.fixed_length, 0} else []


def is_disturbed(about: dict[str, Any]) -> bool:
    """Whether other work, or heat, made the times of a measured.json too long."""
    return (about.get("busy") or 0) >= BUSY_FROM or bool((about.get("conditions") or {}).get("throttled"))


def warm_up(vlm: Vlm, wanted: Sequence[Ask], decoding: Decoding) -> float | None:
    """Answer the warm-up's questions; returns the milliseconds of the first, the model's first answer of all."""
    rows = [answer_one(vlm, ask, decoding) for ask in wanted]
    return rows[0].wall_ms if rows else None


@contextmanager
def endless(vlm: Vlm) -> Iterator[None]:
    """Let answers end at their longest alone: no token stops them."""
    with endless_bundle(vlm) if hasattr(vlm, "bundle") else endless_model(vlm):
        yield


@contextmanager
def endless_bundle(vlm: Any) -> Iterator[None]:
    """Of a bundle, whose manifest names the stop tokens."""
    bundle = vlm.bundle
    prompt = bundle.prompt.model_copy(update={"stop_token_ids": ()})
    vlm.bundle = bundle.model_copy(update={"prompt": prompt})
    try:
        yield
    finally:
        vlm.bundle = bundle


@contextmanager
def endless_model(vlm: Any) -> Iterator[None]:
    """Of a transformers model, whose stop tokens `generate` and the cut of its answers know."""
    config, stops = vlm.model.generation_config, vlm._stops
    vlm._stops, config.eos_token_id = [], None
    try:
        yield
    finally:
        vlm._stops, config.eos_token_id = stops, stops


def device_of(vlm: Vlm) -> str | None:
    """Where a model computes, as its engine calls it; None for one on another machine, and where nobody tells."""
    if hasattr(vlm, "reader"):
        return str(getattr(vlm.reader.engine, "device", "")).removesuffix("ExecutionProvider").lower() or None
    found = getattr(getattr(vlm, "model", None), "device", None)
    return None if found is None else str(found)


def measure_latency(vlm: Vlm, timed: Sequence[Ask], decoding: Decoding, say: Say, phase: str = "latency") -> list[Row]:
    """Time single answers, all in one go: a part of an old series is of no use."""
    rows = []
    for number, ask in enumerate(timed, 1):
        rows.append(answer_one(vlm, ask, decoding))
        say(phase, number, len(timed))
    return rows


def answer_one(vlm: Vlm, ask: Ask, decoding: Decoding) -> Row:
    """One picture, one prompt, on the caller's clock. Reading the file is not timed: a camera has no file."""
    try:
        image = open_image(ask.image)
    except ImageError as error:
        return row_of(ask, unanswered(error))
    started = time.perf_counter()
    (answer,) = vlm.answer([image], [ask.prompt], decoding)
    return row_of(ask, answer, wall_ms=(time.perf_counter() - started) * 1000)
