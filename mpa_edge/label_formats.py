"""The file formats of labelled test sets, as rows of one form.

    ours      JSONL   {"id", "image", "question", "answers", "kind", "group"}
    TextVQA   JSON    {"data": [{"question_id", "image_id", "question", "answers": […]}]}
    ST-VQA    JSON    {"data": [{"question_id", "file_path", "question", "answers": […]}]}
    ChartQA   JSON    [{"imgname", "query", "label"}], human and augmented questions in files of their own
    OKVQA     JSON    {"questions": […]} and {"annotations": […]} in two files or one; or a list with both combined,
                      one row per question, or one per picture with "qas"
    tables    parquet files and datasets: image, question | query, answers | answer | label, and where they are there
              question_id | id, kind | question_type | human_or_machine, group

A row names the picture by candidates, since the official files name it by an id; whoever has the folder chooses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpa_edge.errors import InputError

EXPECTED = (
    "expected JSON lines of {id, image, question, answers}, or an official file: TextVQA or ST-VQA {data: […]}, "
    "ChartQA [{imgname, query, label}], OKVQA {questions: […]} beside its annotations, or both combined; or a .parquet "
    "file or a dataset with the columns image, question and answers"
)
COCO_SPLITS = ("val2014", "train2014", "test2014")


@dataclass(frozen=True)
class Row:
    """One labelled question before the picture is found; `images` are candidate names, the likeliest first."""

    id: str
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    group: str = ""


# A table's columns by what they hold, the likelier name first.
ID = ("question_id", "questionId", "id")
QUESTION = ("question", "query")
ANSWERS = ("answers", "answer", "label")
KIND = ("kind", "question_type", "human_or_machine")
# ChartQA's labels on the hub, as numbers.
HUMAN_OR_MACHINE = ("human", "augmented")


def table_columns(columns: Sequence[str]) -> dict[str, str]:
    """Which column of a table holds what: "question", "answers" and, where there are such, "id", "kind", "group"."""
    names = {"id": ID, "question": QUESTION, "answers": ANSWERS, "kind": KIND, "group": ("group",)}
    found = {what: next((name for name in given if name in columns), None) for what, given in names.items()}
    return {what: name for what, name in found.items() if name is not None}


def table_row(number: int, row: dict[str, Any], names: dict[str, str]) -> Row:
    """The question of a table's row; its picture is in a cell, not in a file."""
    cell = {what: row[name] for what, name in names.items()}
    answers, kind = cell["answers"], cell.get("kind")
    if names.get("kind") == "human_or_machine" and kind in (0, 1):
        kind = HUMAN_OR_MACHINE[kind]
    return Row(
        id=_text(number if cell.get("id") is None else cell["id"], "id"),
        images=(),
        question=_text(cell["question"], "question"),
        answers=_answers(answers if isinstance(answers, list) else [answers]),
        kind=_text("" if kind is None else kind, "kind"),
        group=_text("" if cell.get("group") is None else cell["group"], "group"),
    )


def read_json(path: Path) -> object:
    """The content of a JSON file, or of JSON lines as a list: None for a blank line, a `ValueError` for a bad one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {EXPECTED}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; {EXPECTED}") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_line(line) for line in text.split("\n")]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); {EXPECTED}") from error


def _line(line: str) -> object:
    try:
        return json.loads(line) if line.strip() else None
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def entries_of(path: Path, data: object, annotations: Path | None = None) -> Iterator[tuple[int, Row | str]]:
    """Yield (number from 1, row) for each entry of a file's content; a broken entry comes as the text that says why.

    Raises `InputError` where the content is of none of the formats.
    """
    reader, entries = _reader_of(path, data, annotations)
    for number, entry in enumerate(entries, 1):
        if entry is None:
            continue
        try:
            if isinstance(entry, Exception):
                raise entry
            yield number, reader(number, entry)
        except KeyError as error:
            yield number, f"no {error.args[0]!r}"
        except (ValueError, OverflowError, TypeError, AttributeError) as error:
            yield number, str(error)


Reader = Callable[[int, Any], Row]


def _reader_of(path: Path, data: object, annotations: Path | None) -> tuple[Reader, list[Any]]:
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        return _okvqa(data, annotations or _beside(path), path)
    entries = data.get("data") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise InputError(f"{path}: {EXPECTED}")
    known = ("imgname", "file_path", "qas", "image_id", "image")
    mark = next((key for entry in entries if isinstance(entry, dict) for key in known if key in entry), None)
    if mark == "imgname":
        return _chartqa_reader(path), entries
    if mark == "file_path":
        return _stvqa, entries
    if mark == "qas":
        return _combined, _flat(entries)
    if mark == "image_id":
        return (_textvqa if isinstance(data, dict) else _combined), entries
    if mark == "image":
        return _ours, entries
    raise InputError(f"{path}: no row names a picture; {EXPECTED}")


def _ours(number: int, entry: dict[str, Any]) -> Row:
    return Row(
        id=_text(entry.get("id", number), "id"),
        images=(_text(entry["image"], "image"),),
        question=_text(entry["question"], "question"),
        answers=_answers(entry["answers"]),
        kind=_text(entry.get("kind", ""), "kind"),
        group=_text(entry.get("group", ""), "group"),
    )


def _textvqa(number: int, entry: dict[str, Any]) -> Row:
    name = f"{_text(entry['image_id'], 'image_id')}.jpg"
    return Row(
        id=_text(entry.get("question_id", number), "question_id"),
        images=(name, f"train_images/{name}", f"images/{name}", f"test_images/{name}"),
        question=_text(entry["question"], "question"),
        answers=_answers(entry.get("answers", [])),
    )


def _stvqa(number: int, entry: dict[str, Any]) -> Row:
    return Row(
        id=_text(entry.get("question_id", number), "question_id"),
        images=(_text(entry["file_path"], "file_path"),),
        question=_text(entry["question"], "question"),
        answers=_answers(entry.get("answers", [])),
        group=_text(entry.get("dataset", ""), "dataset"),
    )


def _chartqa_reader(path: Path) -> Reader:
    kind = next((kind for kind in ("human", "augmented") if kind in path.stem.lower()), "")

    def read(number: int, entry: dict[str, Any]) -> Row:
        name = _text(entry["imgname"], "imgname")
        label = entry["label"]
        return Row(
            id=_text(entry.get("question_id", number - 1), "question_id"),
            images=(name, f"png/{name}"),
            question=_text(entry["query"], "query"),
            answers=_answers(label if isinstance(label, list) else [label]),
            kind=kind,
        )

    return read


def _okvqa(data: dict[str, Any], beside: Path | None, path: Path) -> tuple[Reader, list[Any]]:
    """Questions joined with their annotations, which are in the same file or in another."""
    source = data
    if "annotations" not in data:
        if beside is None or not beside.is_file():
            raise InputError(f"{path}: questions without answers; put mscoco_…_annotations.json beside the file")
        other = read_json(beside)
        source = other if isinstance(other, dict) else {}
    if not isinstance(source.get("annotations"), list):
        raise InputError(f"{beside or path}: no list of annotations; {EXPECTED}")
    kinds = source.get("question_types", {})
    dicts = (entry for entry in source["annotations"] if isinstance(entry, dict))
    notes = {entry["question_id"]: entry for entry in dicts if isinstance(entry.get("question_id"), (int, str))}
    split = str(data.get("data_subtype", ""))

    def read(number: int, entry: dict[str, Any]) -> Row:
        note = notes.get(entry["question_id"], {})
        kind = note.get("question_type", "")
        joined = {"answers": [], **note, **entry, "split": split}
        return _combined(number, joined | {"kind": kinds.get(kind, kind)})

    return read, data["questions"]


def _combined(number: int, entry: dict[str, Any]) -> Row:
    image = entry["image_id"]
    splits = [entry["split"]] if entry.get("split") else []
    names = [f"COCO_{split}_{int(image):012d}.jpg" for split in dict.fromkeys([*splits, *COCO_SPLITS])]
    in_folders = [f"{name.split('_')[1]}/{name}" for name in names]
    return Row(
        id=_text(entry.get("question_id", number), "question_id"),
        images=(*names, *in_folders, f"{int(image):012d}.jpg"),
        question=_text(entry["question"], "question"),
        answers=_answers(entry.get("answers", [])),
        kind=_text(entry.get("kind", ""), "kind"),
    )


def _flat(entries: list[Any]) -> list[Any]:
    """One entry per question of a list with one entry per picture; what is no such entry stays as it is."""
    flat = []
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("qas"), list):
            image = {"image_id": entry["image_id"]} if "image_id" in entry else {}
            flat += [image | question if isinstance(question, dict) else question for question in entry["qas"]]
        else:
            flat.append(entry)
    return flat


def _beside(path: Path) -> Path | None:
    """OpenEnded_mscoco_val2014_questions.json -> mscoco_val2014_annotations.json."""
    name = path.name.removeprefix("OpenEnded_").replace("questions", "annotations")
    return None if name == path.name else path.with_name(name)


def _answers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"answers: a list is needed, not {value!r}")
    texts = (_text(item["answer"] if isinstance(item, dict) else item, "answers") for item in value)
    return tuple(text for text in texts if text.strip())


def _text(value: Any, key: str) -> str:
    """Strings and numbers as text; anything else in this place is a broken row."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{key}: a text is needed, not {value!r}")
    return str(value)
