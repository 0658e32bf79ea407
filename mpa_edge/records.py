"""The rows that pass between stages: Sample -> Annotation -> Case, as JSON lines.

Stages meet only on disk; a row is one JSON object on one line, UTF-8, in the field order of its dataclass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from mpa_edge.errors import RunError

Row = TypeVar("Row", bound="Record")

_in_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Record:
    """A row; `to_json` and `from_json` are each other's inverse."""

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, its fields in their order."""
        return dict(vars(self))

    @classmethod
    def from_json(cls: type[Row], data: dict[str, Any]) -> Row:
        """The row of a JSON object; keys that a newer version added are ignored."""
        known = _names(cls)  # type: ignore[arg-type]  # a class is hashable
        return cls(**(data if data.keys() <= known else {key: data[key] for key in data.keys() & known}))

    @property
    def failed(self) -> bool:
        """Whether a model gave no answer, so that asking again may help."""
        return False


@lru_cache
def _names(row: type[Record]) -> frozenset[str]:
    return frozenset(field.name for field in fields(row))


@dataclass(frozen=True)
class Sample(Record):
    """One unlabeled picture. `id` is unique in a run, `path` absolute or relative to the run's image root."""

    id: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Annotation(Record):
    """What the teacher wrote for one picture: a question with its answer, or a rejection.

    `raw` is the teacher's text as it came. `reason` is None for a usable pair, else a short stable slug
    (`no_question`, `answer_too_long`, …) by which rejections are counted.
    """

    id: str
    sample_id: str
    question: str
    answer: str
    raw: str
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """The teacher did not answer."""
        return self.reason == "teacher_error"


@dataclass(frozen=True)
class Case(Record):
    """Both models' short answers to one pseudo-annotated question, and the verdict.

    `teacher_answer` is the first of its answers that matches the pseudo-answer, or else its first one; where it was
    asked more than once, `votes` are all of them, in order, and `teacher_score` is the share that matches. Otherwise
    scores are the task's metric against the pseudo-answer, in [0, 1]. `blind_answer` is the teacher's answer to a grey
    picture, where that was asked. `verdict` is one of `parity` (the teacher confirms itself, the student misses),
    `agree` (both right), `unconfirmed` (the teacher contradicts itself), `blind` (it gives the pseudo-answer without
    the picture too) and `error` (a model did not answer; `reason` says why).
    """

    id: str
    sample_id: str
    question: str
    answer: str
    teacher_answer: str
    student_answer: str
    teacher_score: float
    student_score: float
    verdict: str
    reason: str | None = None
    votes: tuple[str, ...] = ()
    blind_answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "votes", tuple(self.votes))  # JSON has lists only

    @property
    def failed(self) -> bool:
        """A model did not answer."""
        return self.verdict == "error"


def read_rows(path: Path, row: type[Row]) -> Iterator[Row]:
    """Yield the rows of a JSONL file; a line that is no row is a `RunError` that names file and line."""
    with path.open("rb") as lines:
        yield from rows_in(lines, row, path)


def rows_in(lines: Iterable[bytes], row: type[Row], path: Path, first: int = 1) -> Iterator[Row]:
    """The same for lines of such a file, of which the first has the number `first`."""
    for number, line in enumerate(lines, first):
        try:
            yield row.from_json(json.loads(line.decode()))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{path}, line {number}: not a {row.__name__} ({error})") from error


def write_rows(path: Path, rows: Iterable[Record | dict[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all, and return their number; they need not fit into memory."""
    count = 0
    with _replacing(path) as file:
        for row in rows:
            file.write(lines_of([row]))
            count += 1
    return count


def lines_of(rows: Iterable[Record | dict[str, Any]]) -> bytes:
    """Rows as JSONL."""
    plain = (row if isinstance(row, dict) else row.to_json() for row in rows)
    return b"".join(_in_json(row).encode() + b"\n" for row in plain)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader, or a killed writer, leaves the old content or the new, never a mixture."""
    with _replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """As `write_atomic`, for a content that need not fit into memory."""
    with _replacing(path) as file:
        file.writelines(pieces)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the system names it when it cannot open a file, and not when that is full
        raise
