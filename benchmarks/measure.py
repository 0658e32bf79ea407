"""Measure one variant: find what is already measured, start a fresh process for the rest, and read its rows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpa_edge.benchmarks.host import cpu_name, versions
from mpa_edge.benchmarks.jobs import ANSWERS, ERROR, LATENCY, MEASURED, Job, Row, read_json, whole_rows
from mpa_edge.benchmarks.timed import KEPT, are_timed, fixed_rows, is_disturbed
from mpa_edge.benchmarks.variants import Variant, content_digest
from mpa_edge.runtime import available_cores
from mpa_edge.runtime.doctor import power_mode

ABOUT = ("engine", "device", "describe", *KEPT)
Say = Callable[[str, str, int, int], None]  # variant, phase, done, of


@dataclass(frozen=True)
class Measured:
    """What is known of a variant. `reason` says why it failed; then the rest may be empty."""

    answers: dict[str, Row]
    latency: list[Row]
    engine: str | None = None
    load_ms: float | None = None
    peak_memory_bytes: int | None = None
    busy: float | None = None
    reason: str | None = None
    first_answer_ms: float | None = None
    device: str | None = None
    conditions: dict[str, Any] | None = None
    fixed: tuple[Row, ...] = ()
    describe: dict[str, Any] | None = None
    proportional_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    device_memory_how: str | None = None
    energy: dict[str, Any] | None = None


def measure(variant: Variant, job: Job, raw: Path, say: Say) -> Measured:
    """Answers and timings of a variant, from `raw` where they are there already."""
    digest = content_digest(variant.spec)
    folder = raw / folder_name(variant, job, digest)
    folder.mkdir(parents=True, exist_ok=True)
    # A hub id may have moved on since: only opening the model tells, and the worker keeps what is still valid.
    reason = None if digest and is_complete(folder, job) else run_worker(variant.name, job, folder, say)
    if reason is None:
        say(variant.name, "done", 1, 1)
    return read_measured(folder, reason, job)


def folder_name(variant: Variant, job: Job, digest: str | None) -> str:
    """Names what shapes a variant's answers and timings but for the questions: those are in the rows' keys."""
    machine = (cpu_name(), available_cores(), sorted(versions().items()))
    settings: tuple[object, ...] = (job.max_new_tokens, job.threads, *machine)
    settings += (job.device,) if job.device != "auto" else ()
    settings += ("trust_remote_code",) if job.trust_remote_code else ()
    settings += (mode,) if (mode := power_mode()) else ()  # times of a Jetson's other mode are no times of this one
    content = hashlib.sha256(repr((digest or variant.spec, settings)).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', variant.name)[:60]}-{content[:10]}"


def is_complete(folder: Path, job: Job) -> bool:
    """Whether there is nothing left to measure; an answer that did not come is left."""
    about = read_json(folder / MEASURED)
    if not about.get("done") or (is_disturbed(about) and not job.keep_timings):
        return False
    answered = {row.key for row in whole_rows(folder / ANSWERS) if row.finish_reason != "error"}
    return are_timed(folder, job) and answered >= {ask["key"] for ask in job.accuracy}


def run_worker(name: str, job: Job, folder: Path, say: Say) -> str | None:
    """Do the job in a fresh process; returns why it failed, or None."""
    command = [sys.executable, "-m", "mpa_edge.benchmarks.worker", str(folder)]
    (folder / ERROR).unlink(missing_ok=True)
    with (folder / "stderr.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(job.threads)
        )
        try:
            send(process, json.dumps(job.to_json()))
            relay(process, name, say)
            code = process.wait()
        finally:  # Ctrl-C, or a broken display: a model left running would spoil the next variant's timings
            process.kill()
            process.wait()
            hang_up(process)
    return None if code == 0 else failure(code, folder)


def environment(threads: int) -> dict[str, str]:
    """Ours, with the thread count for every library that reads one from there, and no downloads' progress bars."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **dict.fromkeys(names, count), **quiet}


def send(process: subprocess.Popen[bytes], text: str) -> None:
    """Hand the job over, and leave the pipe open: its end tells the worker that we are gone. A worker that is gone
    already says why in its exit code."""
    assert process.stdin is not None
    try:
        process.stdin.write(text.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass


def hang_up(process: subprocess.Popen[bytes]) -> None:
    """Close our ends of the pipes; what a worker that is gone did not read is lost anyway."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()


def relay(process: subprocess.Popen[bytes], name: str, say: Say) -> None:
    """Pass the worker's progress on; libraries may print to the same stream, and such lines are skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            told = json.loads(line)
            say(name, told["phase"], told["done"], told["of"])
        except (ValueError, KeyError, TypeError):
            continue


def failure(code: int, folder: Path) -> str:
    """Why a worker failed, in one line."""
    told = read_json(folder / ERROR).get("reason")
    if told:
        return str(told).strip().splitlines()[0]
    if code < 0:
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"the process was ended by {signal.Signals(-code).name}{hint}"
    return f"the process ended with exit code {code}; see {folder.name}/stderr.log"


def read_measured(folder: Path, reason: str | None, job: Job | None = None) -> Measured:
    """What lies in a variant's folder."""
    about = read_json(folder / MEASURED)
    answers = {row.key: row for row in whole_rows(folder / ANSWERS)}
    latency = whole_rows(folder / LATENCY)
    known = {key: about[key] for key in ABOUT if key in about}
    fixed = tuple(fixed_rows(folder, job)) if job and job.fixed_length else ()
    return Measured(answers, latency, **known, reason=reason, fixed=fixed)
