"""The folder of one run: where each file lies, one process at a time, and `run.json`.

    run.json            tool, config as resolved, versions, both models, per-stage counts and timings
    samples.jsonl       the pictures that are used
    skipped.jsonl       the files that are not, each with its reason
    log.jsonl           what happened when, of every attempt; see mpa_edge.run_events
    images/             the pictures of a parquet file or dataset, each under its digest
    annotations/        stage.json + part-00000.jsonl …
    cases/              stage.json + part-00000.jsonl …
    parity.jsonl        the training set
    parity.llava.json   the same for other trainers (--save-as), and parity.sharegpt.json with dataset_info.json
    audit.html          what was kept and what was dropped, with the pictures
    student/            the adapter with its metrics

Everything but the log and the timings in `run.json` is the same, byte for byte, however often the run was killed and
resumed. (On one machine; a GPU may round a training step differently from one time to the next.)
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mpa_edge import __version__
from mpa_edge.errors import RunError
from mpa_edge.lock import locked
from mpa_edge.records import write_atomic
from mpa_edge.versions import installed
from mpa_edge.watching import tell_finished

# What a run and its exports leave, besides the rounds before the last one.
DERIVED = (
    *("samples.jsonl", "skipped.jsonl", "annotations", "cases", "collapsed.jsonl", "parity.jsonl", "student"),
    *("parity.llava.json", "parity.sharegpt.json", "dataset_info.json"),
    *("audit.html", "merged", "merged.json", "bundles"),
)
RUN = "run.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class RoundFolder:
    """The paths of one round: who was asked what, what was chosen of it, and the student that it made. Those of earlier
    rounds lie beside those of the last one, so that the relative paths in them hold when a round is no longer last."""

    path: Path
    suffix: str = ""

    @property
    def cases(self) -> Path:
        """Both models' answers with the verdict, in parts."""
        return self.path / f"cases{self.suffix}"

    @property
    def collapsed(self) -> Path:
        """The ids of the cases whose question came too often."""
        return self.path / f"collapsed{self.suffix}.jsonl"

    @property
    def parity(self) -> Path:
        """The training set."""
        return self.path / f"parity{self.suffix}.jsonl"

    @property
    def student(self) -> Path:
        """The adapter."""
        return self.path / f"student{self.suffix}"

    def move_to(self, other: RoundFolder) -> None:
        """Move what is here and not there yet; whoever is killed in between does the rest the next time."""
        for old, new in zip(self._paths, other._paths, strict=True):
            if old.exists() and not new.exists():
                old.rename(new)

    @property
    def _paths(self) -> tuple[Path, ...]:
        return self.cases, self.collapsed, self.parity, self.student


class RunFolder(RoundFolder):
    """The paths of a run; its own round is the last one."""

    @property
    def samples(self) -> Path:
        """The pictures that are used."""
        return self.path / "samples.jsonl"

    @property
    def skipped(self) -> Path:
        """The files of the image folder that are not used, with the reason."""
        return self.path / "skipped.jsonl"

    @property
    def images(self) -> Path:
        """The pictures of a table, as files."""
        return self.path / "images"

    @property
    def annotations(self) -> Path:
        """The teacher's pseudo-annotations, in parts."""
        return self.path / "annotations"

    def round(self, number: int, of: int | None = None) -> RoundFolder:
        """The folder of round `number`, from 1, of so many; without `of`, of one that is not the last."""
        return self if number == of else RoundFolder(self.path, f"-round-{number}")

    @property
    def audit(self) -> Path:
        """The page that shows what was kept and dropped."""
        return self.path / "audit.html"

    def lock(self, flag: str | None = "--out") -> AbstractContextManager[None]:
        """Keep other processes out of the folder; see `locked`."""
        return locked(self.path, flag)

    def clear(self) -> None:
        """Delete what earlier runs left here, and what exports made of it, and nothing else. Pictures that a scan
        wrote stay: they are input."""
        for name in (*DERIVED, RUN):
            delete(self.path / name)
        for path in self.path.glob("*-round-*"):
            if re.fullmatch(r"(cases|collapsed|parity|student)-round-\d+((\.llava|\.sharegpt)?\.jsonl?)?", path.name):
                delete(path)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a folder to the first free of NAME-old-1, NAME-old-2 …; returns its new path."""
    new = next(new for number in count(1) if not (new := path.with_name(f"{path.name}-old-{number}")).exists())
    return path.rename(new)


class RunLog:
    """`run.json`, rewritten in one step after each stage. A resumed run starts a new one: counts are recomputed from
    the rows, and a stage's seconds are those of the process that ran it last."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._content: dict[str, Any] = {
            "schema": 1,
            "tool": f"mpa-edge {__version__}",
            "versions": {"python": platform.python_version(), **installed(LIBRARIES)},
            **facts,
            "stages": {},
        }

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time that the body takes to a stage's seconds; bodies may run in several threads at once, whose times
        add up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def note(self, name: str, **facts: Any) -> None:
        """Save a finished stage's facts with its seconds."""
        noted = self._content["stages"][name] = {**facts, "seconds": round(self._seconds.get(name, 0.0), 3)}
        write_atomic(self._path, json.dumps(self._content, indent=2, ensure_ascii=False) + "\n")
        tell_finished(name, noted)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what the body puts into the dictionary that it gets is saved with the seconds."""
        facts: dict[str, Any] = {}
        with self.clock(name):
            yield facts
        self.note(name, **facts)


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's `run.json`; `RunError` when there is none."""
    path = folder / RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{folder} is no run folder: {RUN} cannot be read ({error}). If it was one, type its mpa-edge align "
            "command again: it writes that file anew."
        ) from error
    return content


def known_run(folder: Path) -> dict[str, Any]:
    """The content of a run's `run.json`; empty where there is none, or half of one."""
    try:
        return read_run(folder)
    except RunError:
        return {}
