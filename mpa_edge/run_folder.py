"""The folder of one run: where each file lies, one process at a time, and `run.json`.

    run.json            tool, config as resolved, versions, both models, per-stage counts and timings
    samples.jsonl       the pictures that are used
    skipped.jsonl       the files that are not, each with its reason
    images/             the pictures of a parquet file or dataset, each under its digest
    annotations/        stage.json + part-00000.jsonl …
    cases/              stage.json + part-00000.jsonl …
    parity.jsonl        the training set
    audit.html          what was kept and what was dropped, with the pictures
    student/            the adapter with its metrics

Everything but the timings in `run.json` is the same, byte for byte, however often the run was killed and resumed. (On
one machine; a GPU may round a training step differently from one time to the next.)
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpa_edge import __version__
from mpa_edge.errors import InputError, RunError, RunLocked
from mpa_edge.parts import sweep
from mpa_edge.records import write_atomic
from mpa_edge.versions import installed

LOCK = ".lock"
RUN = "run.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

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
        """The pictures that came out of a table; those that were files stay where they are."""
        return self.path / "images"

    @property
    def annotations(self) -> Path:
        """The teacher's pseudo-annotations, in parts."""
        return self.path / "annotations"

    @property
    def cases(self) -> Path:
        """Both models' answers with the verdict, in parts."""
        return self.path / "cases"

    @property
    def parity(self) -> Path:
        """The training set."""
        return self.path / "parity.jsonl"

    @property
    def audit(self) -> Path:
        """The page that shows what was kept and dropped."""
        return self.path / "audit.html"

    @property
    def student(self) -> Path:
        """The adapter."""
        return self.path / "student"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; `RunLocked` when one is in it.

        The lock is the kernel's (flock): it ends with the process that holds it, however that dies.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("w")
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be written ({error.strerror})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(self.path) from None
            sweep(self.path)
            yield

    def clear(self) -> None:
        """Delete what earlier runs left here, and nothing else."""
        for folder in (self.images, self.annotations, self.cases, self.student):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.samples, self.skipped, self.parity, self.audit, self.path / RUN):
            file.unlink(missing_ok=True)


class RunLog:
    """`run.json`, rewritten in one step after each stage. A resumed run starts a new one: counts are recomputed from
    the rows, and a stage's seconds are those of the process that ran it last."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "schema": 1,
            "tool": f"mpa-edge {__version__}",
            "versions": {"python": platform.python_version(), **installed(LIBRARIES)},
            **facts,
            "stages": {},
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what the body puts into the dictionary that it gets is saved with the seconds."""
        facts: dict[str, Any] = {}
        start = time.perf_counter()
        yield facts
        self._content["stages"][name] = {**facts, "seconds": round(time.perf_counter() - start, 3)}
        write_atomic(self._path, json.dumps(self._content, indent=2, ensure_ascii=False) + "\n")


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's `run.json`; `RunError` when there is none."""
    path = folder / RUN
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is no run folder: {RUN} cannot be read ({error})") from error
    return content
