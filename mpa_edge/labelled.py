"""Questions with labels, for the benchmark: our JSONL, the official files of the four benchmarks, and tables.

One bad row never stops a test set: it is left out, with its reason.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpa_edge.datasets import MAX_BYTES, counts_by_reason
from mpa_edge.errors import ImageError, InputError
from mpa_edge.label_formats import Row, entries_of, read_json, table_columns, table_row
from mpa_edge.records import Record
from mpa_edge.scan_index import Skipped
from mpa_edge.tables import Table, keep, name_of, open_table, picture_bytes


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


def read_questions(
    path: str | Path, *, images: Path | None = None, annotations: Path | None = None, store: Path | None = None
) -> Questions:
    """The questions of a labelled test set, with the rows that were left out as `.skipped`.

    `path` is our JSONL (rows of id, image, question, answers, kind, group), an official file of TextVQA, ST-VQA,
    ChartQA or OKVQA, or a table (`mpa_edge.tables`). `images` is the folder of the pictures, the file's own by default;
    no row may name a picture outside of it. `annotations` is the second file of OKVQA, looked for beside the questions
    by default. The pictures of a table are written to the folder `store`, named by their content. Raises `InputError`
    where the source cannot be read, or not one row can be used, and `MissingExtra`.
    """
    if table := open_table(path, extra="bench"):
        if store is None:
            raise InputError(f"{path}: a folder for the pictures of a table is needed")
        found = _of_table(table, store)
    else:
        found = _of_file(Path(path), images, annotations)
    questions = Questions()
    seen: set[str] = set()
    for place, question in found:
        if isinstance(question, Question) and question.id not in seen:
            seen.add(question.id)
            questions.append(question)
            continue
        wrong = _Unusable("duplicate_id", question.id) if isinstance(question, Question) else question
        questions.skipped.append(Skipped(place, wrong.reason, wrong.detail))
    if not questions:
        raise InputError(f"{path}: no usable question ({_why_none(questions.skipped)})")
    return questions


def stratified(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` questions with each kind's share kept (largest remainders), in the file's order."""
    if limit is None or limit >= len(questions):
        return list(questions)
    places: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        places[question.kind].append(place)
    shares = {kind: len(found) * limit / len(questions) for kind, found in places.items()}
    quota = {kind: int(share) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: (quota[kind] - shares[kind], kind))
    for kind in by_remainder[: limit - sum(quota.values())]:
        quota[kind] += 1
    draw = random.Random(seed)
    chosen = [place for kind in sorted(places) for place in draw.sample(places[kind], quota[kind])]
    return [questions[place] for place in sorted(chosen)]


def pictures_in(path: str | Path, *, images: Path | None = None) -> Iterator[tuple[str, Path | bytes | ImageError]]:
    """Yield (name, file or its bytes) for each picture of a labelled test set, once per name; for one that is not
    there, or a row that names none, the error that says so.

    Of a table only the pictures are read; of a file, what rows say besides their picture is not looked at.
    """
    if table := open_table(path, extra="align"):
        column = table.picture_column()
        for place, root, cells in table.rows([column]):
            try:
                yield place, picture_bytes(cells[column], root, MAX_BYTES)
            except ImageError as error:
                yield place, ImageError(place, error.reason, error.detail)
        return
    path, seen = Path(path), set[str]()
    folder = path.parent if images is None else Path(images)
    source: Path | ImageError
    for number, row in entries_of(path, read_json(path), None):
        place = f"{path}:{number}"
        try:
            if isinstance(row, str):
                raise _Unusable("bad_row", row)
            name = _picture(row.images, folder)
            source = Path(name)
        except _Unusable as error:
            name, source = error.detail, ImageError(place, error.reason, error.detail)
        if name not in seen:
            seen.add(name)
            yield name, source


Found = Iterator[tuple[str, "Question | _Unusable"]]


def _of_file(path: Path, images: Path | None, annotations: Path | None) -> Found:
    folder = path.parent if images is None else Path(images)
    for number, row in entries_of(path, read_json(path), annotations):
        try:
            if isinstance(row, str):
                raise _Unusable("bad_row", row)
            yield f"{path}:{number}", _question(row, partial(_picture, row.images, folder))
        except _Unusable as error:
            yield f"{path}:{number}", error


def _of_table(table: Table, store: Path) -> Found:
    column, names = table.picture_column(), table_columns(table.columns)
    if missing := [what for what in ("question", "answers") if what not in names]:
        raise InputError(f"{table.source}: no column for {' and '.join(missing)} among {', '.join(table.columns)}")
    store.mkdir(parents=True, exist_ok=True)
    for number, (place, root, cells) in enumerate(table.rows([column, *names.values()]), 1):
        try:
            yield place, _question(table_row(number, cells, names), partial(_stored, cells[column], root, store))
        except _Unusable as error:
            yield place, error
        except ImageError as error:
            yield place, _Unusable(error.reason, error.detail)
        except ValueError as error:
            yield place, _Unusable("bad_row", str(error))


def _stored(cell: object, root: Path, store: Path) -> str:
    data = picture_bytes(cell, root, MAX_BYTES)
    path = store.absolute() / name_of(data)
    keep(path, data)
    return os.fspath(path)


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _why_none(skipped: list[Skipped]) -> str:
    if not skipped:
        return "no rows"
    first = skipped[0]
    return f"{counts_by_reason(skipped)}; the first is {first.path}: {first.detail or first.reason}"


def _question(row: Row, picture: Callable[[], str]) -> Question:
    """`picture` finds the row's picture; last, so that rows that cannot be used cost nothing."""
    if not row.question.strip():
        raise _Unusable("no_question")
    if not row.answers:
        raise _Unusable("no_answer")
    return Question(row.id, picture(), row.question, row.answers, row.kind, row.group)


def _picture(names: Iterable[str], folder: Path) -> str:
    """The absolute path of the first of these names that is a file in the folder."""
    root = folder.resolve()
    for name in (names := tuple(names)):
        full = folder / name
        try:
            inside, there = full.resolve().is_relative_to(root), full.is_file()
        except ValueError as error:  # a NUL, or half a surrogate pair
            raise _Unusable("bad_row", f"{name!r} is no name of a file ({error})") from error
        if not inside:
            raise _Unusable("outside_folder", f"{name} is not in {folder}; name the pictures' folder, or move it there")
        if there:
            return os.fspath(full.absolute())
    raise _Unusable("missing_image", f"{names[0]} is not in {folder}")
