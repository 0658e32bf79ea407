"""What happens in a run, as JSON lines in `log.jsonl`, and on demand as a text file of metrics for Prometheus.

    {"time": "2026-11-22T10:00:00Z", "event": "started", "tool": "mpa-edge 0.1.0", "pid": 4711}
    {"time": …, "event": "progress", "stage": "ask", "done": 550, "of": 1000, "rate": 5.0, "left_s": 90, "rejected": …}
    {"time": …, "event": "finished", "stage": "annotate", "rows": 3000, "rejected": {"duplicate": 12}, "seconds": 200.1}
    {"time": …, "event": "failed", "error": "ModelError", "message": …}

A run ends with `done`, `failed` or `stopped` (Ctrl-C, SIGTERM); one that was killed with none of them. The log is
written on by every resume. It holds no settings and no texts of models, and keys from the environment are taken out of
messages. At `MOST_BYTES` it becomes `log.1.jsonl`, in place of the one before.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpa_edge import __version__
from mpa_edge.errors import InputError, MpaEdgeError
from mpa_edge.passwords import without_passwords
from mpa_edge.records import write_atomic
from mpa_edge.watching import rejected, watched

LOG = "log.jsonl"
MOST_BYTES = 4 << 20
# Between two lines, or two versions of the metrics, of one stage that goes on.
SECONDS_PER_LINE, SECONDS_PER_SCRAPE = 30.0, 10.0
# Longer messages are those of a server that sends whole pages.
MOST_CHARACTERS = 2_000
SECRETS = ("MPA_EDGE_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


@contextmanager
def recorded(folder: Path, metrics: Path | None = None) -> Iterator[None]:
    """Record what the body does in a run's folder. A log that cannot be written ends no run, since a full disk ends it
    by itself; a metrics file that cannot be written is an `InputError` before the body begins."""
    events = Events(folder / LOG, metrics)
    try:
        events.began()
        with watched(events):
            yield
    except KeyboardInterrupt:
        events.ended("stopped")
        raise
    except BaseException as error:
        events.ended("failed", error)
        raise
    events.ended("done")


class Events:
    """A `Watcher` that writes what it hears."""

    def __init__(self, log: Path, metrics: Path | None = None) -> None:
        self._log, self._metrics = log, metrics
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._seconds: dict[str, float] = {}
        self._outcome = ""
        self._scraped = 0.0

    def began(self) -> None:
        """The run has the folder."""
        self._write("started", tool=f"mpa-edge {__version__}", pid=os.getpid())
        if self._metrics:
            try:
                write_atomic(self._metrics, self._text())
            except (OSError, ValueError) as error:  # an empty name
                path, self._metrics = self._metrics, None
                reason = getattr(error, "strerror", None) or "it names no file"
                raise InputError(f"--metrics-file {path}: cannot be written ({reason})") from error

    def ended(self, outcome: str, error: BaseException | None = None) -> None:
        """The run is over, by itself or because of an error. A bug's own words stay out of the log: nobody knows what
        they hold."""
        self._outcome = outcome
        facts = {"error": type(error).__name__} if error else {}
        if isinstance(error, (MpaEdgeError, OSError)):
            facts["message"] = without_secrets(str(error))[:MOST_CHARACTERS]
        self._write(outcome, **facts)
        self._scrape(last=True)

    def progress(self, stage: str, done: int, of: int) -> None:
        """See `Watcher`."""
        with self._lock:
            known = self._stages.setdefault(stage, _Stage())
            line = known.line(done, of)
        if line:
            self._write("progress", stage=stage, **line)
        self._scrape()

    def finished(self, stage: str, facts: Mapping[str, Any]) -> None:
        """See `Watcher`."""
        self._write("finished", stage=stage, **{key: value for key, value in facts.items() if _is_count(value)})
        self._seconds[stage] = facts.get("seconds", 0.0)
        self._scrape(last=True)

    def _write(self, event: str, **facts: Any) -> None:
        row = {"time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "event": event, **facts}
        with suppress(OSError):  # see `recorded`
            if self._log.exists() and self._log.stat().st_size > MOST_BYTES:
                self._log.replace(self._log.with_suffix(".1.jsonl"))
            with self._log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    # --- Prometheus --------------------------------------------------------------------------------------------------

    def _scrape(self, *, last: bool = False) -> None:
        with self._lock:
            due = self._metrics is not None and (last or time.monotonic() - self._scraped >= SECONDS_PER_SCRAPE)
            self._scraped = time.monotonic() if due else self._scraped
        if due and self._metrics:
            with suppress(OSError):
                write_atomic(self._metrics, self._text())

    def _text(self) -> str:
        """https://prometheus.io/docs/instrumenting/exposition_formats/"""
        with self._lock:
            stages = {name: (stage.done, stage.of, stage.rate) for name, stage in self._stages.items()}
        done, of, rate = ({name: values[place] for name, values in stages.items()} for place in range(3))
        families = (
            ("up", "gauge", "1 while the run goes on.", {"": int(not self._outcome)}),
            ("failed", "gauge", "1 where its last attempt ended in an error.", {"": int(self._outcome == "failed")}),
            ("last_update_timestamp_seconds", "gauge", "When this was written.", {"": round(time.time())}),
            ("stage_done", "gauge", "Pictures, files or steps of a stage that are done.", _by("stage", done)),
            ("stage_all", "gauge", "All there are of them.", _by("stage", of)),
            ("stage_rate", "gauge", "So many a second.", _by("stage", rate)),
            ("stage_seconds", "gauge", "What a finished stage took.", _by("stage", dict(self._seconds))),
            ("rejected_total", "counter", "Annotations rejected by this process.", _by("reason", dict(rejected))),
        )
        lines = []
        for name, kind, words, values in families:
            lines += [f"# HELP mpa_edge_{name} {words}", f"# TYPE mpa_edge_{name} {kind}"]
            lines += [f"mpa_edge_{name}{labels} {value}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"


class _Stage:
    """How far one stage is."""

    def __init__(self) -> None:
        self.done = self.of = 0
        self.rate = 0.0
        self._told, self._at = -1, time.monotonic()

    def line(self, done: int, of: int) -> dict[str, Any] | None:
        """What the log says now; None where it said something shortly before."""
        now, first = time.monotonic(), self._told < 0
        self.done, self.of = done, of
        if not first and now - self._at < SECONDS_PER_LINE and done < of:
            return None
        facts: dict[str, Any] = {"done": done, "of": of}
        if not first and now > self._at:
            self.rate = round((done - self._told) / (now - self._at), 3)
            facts |= {"rate": self.rate, "left_s": round((of - done) / self.rate) if self.rate else None}
        self._told, self._at = done, now
        return facts | ({"rejected": dict(rejected)} if rejected else {})


def without_secrets(text: str) -> str:
    """A text without the values of the environment variables that hold keys, and without passwords in addresses."""
    for value in (os.environ.get(name, "").strip() for name in SECRETS):
        text = text.replace(value, "***") if len(value) >= 4 else text
    return without_passwords(text)


def _is_count(value: Any) -> bool:
    """A number, or a few of them by name: what stages count."""
    if isinstance(value, dict):
        return all(_is_count(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float))


def _by(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f'{{{label}="{_escaped(name)}"}}': value for name, value in values.items()}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
