"""The settings of `mpa-edge bench`. Light: the command line reads them to make its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mpa_edge.config import Settings, setting
from mpa_edge.errors import InputError

DECISION, ACCURACY, LATENCY = "Decision", "Accuracy", "Latency"


class BenchOptions(Settings):
    """What the flags of `mpa-edge bench` say: the field `latency_n` is the flag `--latency-n`, and so on."""

    data: tuple[Path, ...] = setting(
        help="Labelled questions (JSONL, a table, or a benchmark's official file); repeat to put several together."
    )
    report: Path = setting(Path("report"), help="Folder of the report; also holds what is already measured.")
    task: str | None = setting(None, help="What the questions are put and scored as.", shown="the bundles' own")

    require: str | None = setting(
        None, DECISION, help='What a variant must reach: "accuracy>=0.60, p95<=300ms, memory<=1GB, size<=500MB".'
    )
    compare: Path | None = setting(None, DECISION, help="report.json of an earlier run: tell what became worse.")

    limit: int | None = setting(None, ACCURACY, ge=1, help="Ask a stratified sample of N questions.")
    seed: int = setting(0, ACCURACY, ge=0, help="Seed of the sample and the bootstrap.")

    # From 72 timings on a 95% interval of the 95th percentile has an upper end.
    latency_n: int = setting(100, LATENCY, ge=1, help="Time so many distinct pictures, one at a time.")
    threads: str | None = setting(
        None, LATENCY, help="CPU threads per variant; 1,2,4 times each bundle with every number.", shown="all cores"
    )
    device: str = setting("auto", LATENCY, help="Where models run: auto, cpu, or an accelerator such as cuda.")
    trust_remote_code: bool = setting(
        False, help="Run Python code that a baseline's folder or hub page brings; report.json records it."
    )
    fixed_length: int | None = setting(
        None, LATENCY, ge=1, help="Also time answers of exactly N tokens, to compare engines (not of chat servers)."
    )
    costs_only: bool = setting(
        False, LATENCY, help="Ask nothing for accuracy: times, memory, energy and sizes alone, in minutes."
    )
    keep_timings: bool = setting(
        False, LATENCY, help="Keep times that other work disturbed; without, they are taken again."
    )

    @field_validator("data", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @field_validator("threads", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        if value is None:
            return None
        counts = [text.strip() for text in str(value).split(",")]
        if not all(text.isdigit() and int(text) > 0 for text in counts):
            raise InputError(f"--threads {value}: whole numbers from 1 on, such as 4 or 1,2,4")
        return ",".join(counts)

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """The numbers of threads, the largest first; all cores where none is named."""
        from mpa_edge.runtime import available_cores

        counts = map(int, self.threads.split(",")) if self.threads else [available_cores()]
        return tuple(sorted(set(counts), reverse=True))

    @field_validator("require")
    @classmethod
    def _lines(cls, text: str | None) -> str | None:
        from mpa_edge.benchmarks.require import parse_lines

        if text is not None:
            parse_lines(text)
        return text

    @field_validator("compare")
    @classmethod
    def _is_report(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise InputError(f"--compare {path}: no such file; name the report.json of an earlier run")
        return path


class BenchConfig(BenchOptions):
    """What `bench` does.

    `bundles` are folders of exported bundles, `baselines` are `role=spec` or `spec`, where the role is teacher,
    student, aligned or merged and the spec a folder, a hub id, a chat server's address or a fake (`mpa_edge.fake`).
    `data` is a labelled test set. `task` sets prompt and metric; bundles know theirs, so it is needed only without
    one. `batch_size` is for the accuracy part of transformers models only. `name` is what the report calls the data.
    """

    bundles: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    name: str | None = None
    batch_size: int = Field(default=32, ge=1)

    @field_validator("bundles", "baselines", mode="before")
    @classmethod
    def _texts(cls, values: Any) -> Any:
        return tuple(map(str, values)) if isinstance(values, (list, tuple)) else values
