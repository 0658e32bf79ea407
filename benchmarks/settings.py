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
    threads: int | None = setting(None, LATENCY, ge=1, help="CPU threads per variant.", shown="all cores")

    @field_validator("data", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

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
