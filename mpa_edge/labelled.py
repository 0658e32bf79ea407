"""Questions with labels, for the benchmark: our JSONL, or the official files of the four benchmarks.

One bad row never stops a test set: it is left out, with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mpa_edge.datasets import Skipped, counts_by_reason
from mpa_edge.errors import InputError
from mpa_edge.label_formats import Row, entries_of, read_json
from mpa_edge.records import Record


@dataclass(frozen=True)
class Question(Record):
    """One labelled question. `image` is the picture's absolute path, `answers` holds at least one reference.

    `kind` and `group` may be empty; a benchmark reports accuracy by them.
    """

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers))


class Questions(list[Question]):
    """The questions of a file in its order; `skipped` holds the rows that were left out."""

    def __init__(self, questions: Iterable[Question] = (), skipped: Iterable[Skipped] = ()) -> None:
        super().__init__(questions)
        self.skipped = list(skipped)


def read_questions(path: str | Path, *, images: Path | None = None, annotations: Path | None = None) -> Questions:
    """The questions of a labelled test set, with the rows that were left out as `.skipped`.

    `path` is our JSONL (rows of id, image, question, answers, kind, group) or an official file of TextVQA, ST-VQA,
    ChartQA or OKVQA. `images` is the folder of the pictures, the file's own by default; no row may name a picture
    outside of it. `annotations` is the second file of OKVQA, looked for beside the questions by default. Raises
    `InputError` where the file cannot be read, or not one row can be used.
    """
    path = Path(path)
    folder = path.parent if images is None else Path(images)
    questions = Questions()
    seen: set[str] = set()
    for place, row in entries_of(path, read_json(path), annotations):
        try:
            question = _question(row, folder)
            if question.id in seen:
                raise _Unusable("duplicate_id", question.id)
        except _Unusable as error:
            questions.skipped.append(Skipped(f"{path}:{place}", error.reason, error.detail))
            continue
        seen.add(question.id)
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: no usable question ({_why_none(questions.skipped)})")
    return questions


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _why_none(skipped: list[Skipped]) -> str:
    if not skipped:
        return "no rows"
    first = skipped[0]
    return f"{counts_by_reason(skipped)}; the first is {first.path}: {first.detail or first.reason}"


def _question(row: Row | str, folder: Path) -> Question:
    if isinstance(row, str):
        raise _Unusable("bad_row", row)
    if not row.question.strip():
        raise _Unusable("no_question")
    if not row.answers:
        raise _Unusable("no_answer")
    return Question(row.id, _picture(row.images, folder), row.question, row.answers, row.kind, row.group)


def _picture(names: Iterable[str], folder: Path) -> str:
    """The absolute path of the first of these names that is a file in the folder."""
    root = folder.resolve()
    for name in (names := tuple(names)):
        full = folder / name
        if not full.resolve().is_relative_to(root):
            raise _Unusable("outside_folder", f"{name} is not in {folder}; name the pictures' folder, or move it there")
        if full.is_file():
            return os.fspath(full.absolute())
    raise _Unusable("missing_image", f"{names[0]} is not in {folder}")
