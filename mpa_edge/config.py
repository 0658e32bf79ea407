"""The settings of each command: validated, with messages that name the flag as typed, saved beside the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpa_edge.errors import InputError

Match = Literal["metric", "paper"]
Select = Literal["parity", "all", "random", "disagree"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Settings that check themselves; what is wrong is an `InputError` that names the flag."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError("; ".join(_one_line(item) for item in error.errors())) from None

    def to_json(self) -> dict[str, Any]:
        """The resolved settings, for `run.json`."""
        return self.model_dump(mode="json")


class AlignConfig(Settings):
    """What `mpa-edge align` does. The field `batch_size` is the flag `--batch-size`, and so on.

    `teacher` and `student` are folders or hub ids. `match` decides when an answer counts as right: the task's official
    metric, or the substring rule of the published code. `select` is what becomes training data; all but `parity` are
    controls. `agreement` is the share of the training set that both models already answer right: without it a small
    student forgets what it knew. `learning_rate` 0 means: chosen by the student's size (see `mpa_edge.level`).
    """

    images: Path
    teacher: str = Field(min_length=1)
    student: str = Field(min_length=1)
    task: str = Field(min_length=1)
    out: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    fresh: bool = False

    questions: int = Field(default=1, ge=1, le=64)
    temperature: float = Field(default=1.0, ge=0, le=5)
    match: Match = "metric"
    select: Select = "parity"
    agreement: float = Field(default=0.3, ge=0, lt=1)

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=0.0, ge=0, lt=1)
    epochs: int = Field(default=10, ge=1)
    train_batch_size: int = Field(default=32, ge=1)
    patience: int = Field(default=3, ge=1)
    holdout: float = Field(default=0.1, gt=0, le=0.5)

    batch_size: int = Field(default=32, ge=1)
    chunk_size: int = Field(default=256, ge=1)
    device: Device = "auto"
    dtype: Dtype = "auto"

    @property
    def run(self) -> Path:
        """The run folder: `--out`, or runs/TASK-STUDENT."""
        return self.out or Path("runs") / f"{self.task}-{Path(self.student.rstrip('/')).name}"


def _one_line(error: Any) -> str:
    flag = "--" + str(error["loc"][0]).replace("_", "-") if error["loc"] else "settings"
    if error["type"] == "missing":
        return f"{flag} is needed"
    return f"{flag} {error['input']}: {error['msg'][0].lower()}{error['msg'][1:]}"
