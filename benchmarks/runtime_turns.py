"""Several ways to ask one model, each in a process of its own, that take turns on the same pictures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from mpa_edge.benchmarks.measure import environment
from mpa_edge.benchmarks.runtime_ways import Job

QUESTIONS = ("what is written on the sign?", "how many red circles are there?")
# The reference pair's answers have two or three tokens; more than that belongs to the rate of decoding.
ANSWER_TOKENS = 3


class WayFailed(Exception):
    """A way that cannot be measured here, with the reason. `crashed`: a signal ended it."""

    def __init__(self, reason: str, *, crashed: bool = False) -> None:
        super().__init__(reason)
        self.crashed = crashed


class Process:
    """One way in a process of its own; `start_s` is what it took from its start until it could be asked."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-m", "mpa_edge.benchmarks.runtime_ways", json.dumps(job.to_json())]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(job.threads),
        )
        self.ready = self._reply()
        self.start_s = time.perf_counter() - start

    def __call__(self, do: str, picture: Path, question: str, tokens: int) -> dict[str, Any]:
        """The reply to one command, see `runtime_ways.main`; raises `WayFailed` when the process has ended."""
        assert self._process.stdin is not None
        command = {"do": do, "picture": str(picture), "question": question, "tokens": tokens}
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: the missing reply tells
        return self._reply()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                found = json.loads(line)
            except ValueError:  # a library prints to the same stream
                continue
            if isinstance(found, dict):
                return found
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        reason = f"ended by signal {-code}" if code < 0 else (lines or [f"exit code {code}"])[-1]
        raise WayFailed(reason, crashed=code < 0)


@dataclass
class Times:
    """What one way took: seconds of each first and each further question, tokens per second of each long answer."""

    start_s: float
    load_s: float
    cold_first_s: float
    loaded_bytes: int | None
    note: str | None = None
    first_s: list[float] = field(default_factory=list)
    followup_s: list[float] = field(default_factory=list)
    decode_per_s: list[float] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Raw values and medians, memory in megabytes of 1,000,000 bytes."""
        raw = {name: [round(value, 5) for value in getattr(self, name)] for name in RAW}
        return {
            "medians": {name: middle(values) for name, values in raw.items()},
            **{name: round(getattr(self, name), 3) for name in ("start_s", "load_s", "cold_first_s")},
            "loaded_mb": megabytes(self.loaded_bytes),
            "peak_mb": megabytes(self.peak_bytes),
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
            "note": self.note,
            "raw": raw,
        }


RAW = ("first_s", "followup_s", "decode_per_s")
CRASHED = "llama.cpp's defaults crash here, as where GCC 12 or older compiled it for Intel's AMX; measured without them"


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return round(median(values), 5) if values else None


def megabytes(count: int | None) -> float | None:
    """Of 1,000,000 bytes."""
    return None if count is None else round(count / 1e6, 1)


def start(job: Job, picture: Path) -> tuple[Process, Times]:
    """Start a way and warm it up; once more without llama.cpp's extra buffers when it crashes with them."""
    try:
        return _started(job, picture)
    except WayFailed as error:
        if not error.crashed or not job.extra_buffers or job.way == "ours":
            raise
    process, times = _started(replace(job, extra_buffers=False), picture)
    times.note = CRASHED
    return process, times


def _started(job: Job, picture: Path) -> tuple[Process, Times]:
    process = Process(job)
    try:
        cold = process("ask", picture, QUESTIONS[0], ANSWER_TOKENS)
        process("ask", picture, QUESTIONS[1], ANSWER_TOKENS)
    except WayFailed:
        process.close()
        raise
    times = Times(process.start_s, process.ready["load_s"], cold["seconds"], process.ready["rss"])
    times.prompt_tokens = cold["prompt_tokens"]
    return process, times


def take_turns(
    jobs: Mapping[str, Job], pictures: Sequence[Path], *, tokens: int, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Times], dict[str, str]]:
    """Measure all ways on all pictures but the first, which warms up: a first and a further question about each, and an
    answer of `tokens` tokens. What each took, and why some could not be measured. `say` is told what is done."""
    warm_up, *rest = pictures
    processes: dict[str, Process] = {}
    times: dict[str, Times] = {}
    failed: dict[str, str] = {}
    try:
        for name, job in jobs.items():
            say(f"start {name}")
            depth = max((found.prompt_tokens or 0 for found in times.values()), default=0)
            try:
                processes[name], times[name] = start(replace(job, depth=depth) if job.way == "loop" else job, warm_up)
            except WayFailed as error:
                failed[name] = str(error)
        for number, picture in enumerate(rest, 1):
            say(f"picture {number} of {len(rest)}")
            for name, process in processes.items():
                if jobs[name].way != "loop":
                    _questions(process, times[name], picture)
            for name, process in processes.items():
                _decode(process, times[name], picture, tokens)
    finally:
        for process in processes.values():
            process.close()
    return times, failed


def _questions(process: Process, times: Times, picture: Path) -> None:
    for question, seconds in zip(QUESTIONS, (times.first_s, times.followup_s), strict=True):
        reply = process("ask", picture, question, ANSWER_TOKENS)
        seconds.append(reply["seconds"])
        times.answer_tokens.append(reply["tokens"])


def _decode(process: Process, times: Times, picture: Path, tokens: int) -> None:
    reply = process("decode", picture, QUESTIONS[0], tokens)
    # A trained model ends most answers at once where nobody can keep it from that: no rate to speak of.
    if reply["tokens"] >= tokens // 4:
        times.decode_per_s.append(reply["tokens"] / reply["seconds"])
    times.peak_bytes = reply["peak_rss"]
