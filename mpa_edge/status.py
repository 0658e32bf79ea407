"""How far a run is, read from its folder while it runs or afterwards; nothing is written, and no row is read."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from mpa_edge.amounts import spoken_seconds
from mpa_edge.errors import RunError
from mpa_edge.lock import LOCK
from mpa_edge.parts import STAGE
from mpa_edge.run_events import LOG
from mpa_edge.run_folder import RUN, known_run
from mpa_edge.terminal import in_one_line

# What is looked at of a log: hours of a run.
TAIL_BYTES = 256 << 10


class Line(BaseModel, extra="allow", strict=True):
    """A line of the log: what is told of it."""

    time: str
    event: str


class Progress(Line):
    """How far a stage is."""

    stage: str
    done: int
    of: int
    rate: FiniteFloat | None = None
    left_s: FiniteFloat | None = None
    rejected: dict[str, int] = {}


class Failed(Line):
    """What ended an attempt."""

    error: str
    message: str | None = None


KINDS: dict[str, type[Line]] = {"progress": Progress, "failed": Failed}


@dataclass(frozen=True)
class Parts:
    """The parts of a stage: whole ones, all, and those that hold rows that failed."""

    written: int
    all: int
    with_failures: int


@dataclass(frozen=True)
class Status:
    """`stages` are the finished ones with their counts as in `run.json`, `parts` those of each folder of rows.
    `progress`, `ended` and `last_error` are lines of the log: how far the last stage of the last attempt was, with rate
    and seconds left; how that attempt ended (None: it runs, or was killed); and the newest error that ended an attempt,
    until one after it is done."""

    run: Path
    running: bool
    stages: dict[str, Any]
    parts: dict[str, Parts]
    progress: dict[str, Any] | None = None
    last_error: dict[str, Any] | None = None
    ended: dict[str, Any] | None = None

    def to_json(self) -> str:
        """For machines: in ASCII, and null for infinity, since a damaged file may hold what JSON does not."""
        whole = json.dumps(asdict(self) | {"run": os.fspath(self.run)})
        return json.dumps(json.loads(whole, parse_constant=lambda _: None), indent=2)

    def summary(self) -> str:
        """In some lines, for people."""
        lines = [f"run          {self.run}", f"state        {self._state()}"]
        for name, facts in self.stages.items():
            lines.append(f"{name:<12} {_counted(facts)}")
        for name, parts in self.parts.items():
            failures = f", {parts.with_failures} with failed rows" if parts.with_failures else ""
            lines.append(f"{name + '/':<12} {parts.written:,} of {parts.all:,} parts{failures}")
        if self.last_error:
            says = self.last_error.get("message") or "see the traceback where it was started"
            lines.append(f"last error   {self.last_error['time']} {self.last_error['error']}: {says}")
        return "\n".join(map(in_one_line, lines))  # names and messages may hold line feeds, which would forge others

    def _state(self) -> str:
        if not self.running:
            how = f"{self.ended['event']} {self.ended['time']}" if self.ended else "killed, or never begun"
            return f"not running ({how})"
        if not self.progress:
            return "running"
        now = self.progress
        rate = f", {now['rate']:,}/s" if now.get("rate") else ""
        left = f", {spoken_seconds((now['left_s'],) * 2)} left" if now.get("left_s") else ""
        rejected = sum(now.get("rejected", {}).values())
        more = f", {rejected:,} rejected" if rejected else ""
        return f"running: {now['stage']} {now['done']:,} of {now['of']:,}{rate}{left}{more} ({now['time']})"


def status_of(run: Path) -> Status:
    """The status of a run's folder. `RunError` where it is none."""
    if not (run / RUN).exists() and not (run / LOG).exists():
        raise RunError(f"{run} is no run folder: it has neither {RUN} nor {LOG}")
    attempt: list[dict[str, Any]] = []
    error = None
    for row in _tail(run / LOG):
        attempt = [row] if row.get("event") == "started" else [*attempt, row]
        if row.get("event") in ("failed", "done"):
            error = row if row["event"] == "failed" else None
    running = is_locked(run)
    over = [row for row in attempt if row.get("event") in ("done", "failed", "stopped")]
    far = [row for row in attempt if row.get("event") == "progress"]
    return Status(
        run=run,
        running=running,
        stages=_stages(known_run(run)),
        parts={path.parent.name: _parts(path) for path in sorted(run.glob(f"*/{STAGE}")) if _has_parts(path)},
        progress=far[-1] if far else None,
        last_error=error,
        ended=over[-1] if over and not running else None,
    )


def _stages(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of a `run.json`; what is no stage is left out."""
    stages = run.get("stages")
    return (
        {name: facts for name, facts in stages.items() if isinstance(facts, dict)} if isinstance(stages, dict) else {}
    )


def is_locked(run: Path) -> bool:
    """Whether a process works in a folder. Asks for a shared lock and gives it back at once."""
    try:
        with (run / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _has_parts(stage: Path) -> bool:
    return bool(re.fullmatch(r"annotations|cases(-round-\d+)?", stage.parent.name))


def _parts(stage: Path) -> Parts:
    names = os.listdir(stage.parent)  # noqa: PTH208 (of many names, only these are wanted)
    written = sum(name.startswith("part-") and name.endswith(".jsonl") for name in names)
    try:
        count = int(json.loads(stage.read_text())["parts"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        count = written
    return Parts(written, count, sum(name.endswith(".failed") for name in names))


def _tail(log: Path) -> Iterator[dict[str, Any]]:
    """The last lines of a log; a torn one, or one that says something else, is left out."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            event = Line.model_validate_json(line).event
            yield KINDS.get(event, Line).model_validate_json(line).model_dump(exclude_unset=True)
        except ValidationError:
            continue


def _counted(facts: dict[str, Any]) -> str:
    """`rows 3,000, rejected 12 duplicate, 3 no_question, 200.1 s`"""
    said = []
    for name, value in facts.items():
        if isinstance(value, dict) and all(isinstance(count, int) for count in value.values()):
            said += [f"{name} {', '.join(f'{count:,} {key}' for key, count in value.items())}"] if value else []
        elif name == "seconds" and isinstance(value, (int, float)):
            said.append(f"{value:,} s")
        elif isinstance(value, int):
            said.append(f"{name} {value:,}")
    return "; ".join(said)
