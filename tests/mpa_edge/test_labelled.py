from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mpa_edge.errors import InputError
from mpa_edge.labelled import Question, Questions, pictures_in, read_questions

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "mpa_official"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no excerpts of the official files")


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in content)
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text(json.dumps(content))
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def reasons(questions: Questions) -> list[tuple[str, str]]:
    return [(item.path.rpartition(":")[2], item.reason) for item in questions.skipped]


def test_our_jsonl(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.png", "images/2.png")
    rows = [
        {
            "id": "a",
            "image": "images/1.png",
            "question": "what?",
            "answers": ["x", "y"],
            "kind": "word",
            "group": "read",
        },
        {"image": "images/2.png", "question": "line\u2028separator?", "answers": [4, 0.5]},
    ]
    questions = read_questions(write(tmp_path / "test.jsonl", rows))
    image = str(tmp_path / "images")
    assert questions == [
        Question("a", f"{image}/1.png", "what?", ("x", "y"), "word", "read"),
        Question("2", f"{image}/2.png", "line\u2028separator?", ("4", "0.5")),
    ]
    assert questions.skipped == []
    assert [Question.from_json(json.loads(json.dumps(question.to_json()))) for question in questions] == questions


def test_bad_rows_are_left_out_with_line_and_reason(tmp_path: Path) -> None:
    touch(tmp_path, "set/1.png", "secret.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    good = {"id": 1, "image": "1.png", "question": "q?", "answers": ["a"]}
    rows = [
        {"question": "a row without a picture"},
        good,
        "",
        "{broken",
        good,
        {**good, "id": 2, "image": "../secret.png"},
        {**good, "id": 3, "image": str(tmp_path / "secret.png")},
        {**good, "id": 4, "image": "link.png"},
        {**good, "id": 5, "image": "none.png"},
        {**good, "id": 6, "question": " "},
        {**good, "id": 7, "answers": [" "]},
        {**good, "id": 8, "answers": "a"},
        {**good, "id": 9, "question": None},
        {**good, "id": [10]},
        "[]",
        json.dumps({**good, "id": 11, "image": "\ud83d.png"}),  # half a surrogate pair
        {**good, "id": 12, "image": "a\0.png"},
    ]
    questions = read_questions(write(tmp_path / "set" / "test.jsonl", rows))
    assert [question.id for question in questions] == ["1"]
    assert reasons(questions) == [
        ("1", "bad_row"),
        ("4", "bad_row"),
        ("5", "duplicate_id"),
        ("6", "outside_folder"),
        ("7", "outside_folder"),
        ("8", "outside_folder"),
        ("9", "missing_image"),
        ("10", "no_question"),
        ("11", "no_answer"),
        ("12", "bad_row"),
        ("13", "bad_row"),
        ("14", "bad_row"),
        ("15", "bad_row"),
        ("16", "bad_row"),
        ("17", "bad_row"),
    ]
    assert questions.skipped[0].detail == "no 'image'"


def test_textvqa(tmp_path: Path) -> None:
    touch(tmp_path, "train_images/abc.jpg", "def.jpg")
    data = {
        "dataset_version": "0.5.1",
        "data": [
            {"question_id": 34602, "image_id": "abc", "question": "what brand?", "answers": ["nikon"] * 10},
            {"question_id": 34603, "image_id": "def", "question": "which?", "answers": ["x"] * 10},
            {"question_id": 34604, "image_id": "def", "question": "a test question has no answers"},
        ],
    }
    questions = read_questions(write(tmp_path / "TextVQA_0.5.1_val.json", data))
    assert [(q.id, Path(q.image).name, len(q.answers)) for q in questions] == [
        ("34602", "abc.jpg", 10),
        ("34603", "def.jpg", 10),
    ]
    assert reasons(questions) == [("3", "no_answer")]


def test_stvqa(tmp_path: Path) -> None:
    touch(tmp_path / "train", "coco-text/COCO_train2014_1.jpg")
    row = {
        "question_id": 1,
        "file_path": "coco-text/COCO_train2014_1.jpg",
        "dataset": "coco-text",
        "question": "what?",
        "answers": ["a", "b"],
    }
    questions = read_questions(write(tmp_path / "train_task_1.json", {"data": [row]}), images=tmp_path / "train")
    assert (questions[0].answers, questions[0].group) == (("a", "b"), "coco-text")


def test_chartqa_reports_human_and_augmented_apart(tmp_path: Path) -> None:
    touch(tmp_path, "png/1.png")
    rows = [{"imgname": "1.png", "query": "how many?", "label": "14"}, {"imgname": "1.png", "query": "?", "label": 3}]
    for kind in ("human", "augmented"):
        questions = read_questions(write(tmp_path / f"test_{kind}.json", rows))
        assert [(q.id, q.kind, q.answers) for q in questions] == [("0", kind, ("14",)), ("1", kind, ("3",))]


def okvqa(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    touch(path, "COCO_val2014_000000297147.jpg")
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 297147, "question": "What sport?", "question_id": 2971475},
            {"image_id": 297147, "question": "not annotated?", "question_id": 1},
        ],
    }
    answers = [{"answer_id": i, "raw_answer": "racing", "answer": "race"} for i in range(10)]
    note = {"image_id": 297147, "question_id": 2971475, "question_type": "four", "answers": answers}
    return questions, {"annotations": [note], "question_types": {"four": "Sports and Recreation"}}


@pytest.mark.parametrize("form", ["two files", "named", "one file"])
def test_okvqa_questions_with_annotations(tmp_path: Path, form: str) -> None:
    data, notes = okvqa(tmp_path)
    if form == "one file":
        questions = read_questions(write(tmp_path / "okvqa.json", data | notes))
    elif form == "named":
        other = write(tmp_path / "other.json", notes)
        questions = read_questions(write(tmp_path / "okvqa.json", data), annotations=other)
    else:
        write(tmp_path / "mscoco_val2014_annotations.json", notes)
        questions = read_questions(write(tmp_path / "OpenEnded_mscoco_val2014_questions.json", data))
    assert [(q.id, q.kind, q.answers) for q in questions] == [("2971475", "Sports and Recreation", ("race",) * 10)]
    assert reasons(questions) == [("2", "no_answer")]


@pytest.mark.parametrize("grouped", [True, False])
def test_okvqa_combined(tmp_path: Path, grouped: bool) -> None:
    touch(tmp_path, "train2014/COCO_train2014_000000000042.jpg")
    row = {"question": "what?", "question_id": 7, "answers": ["race", "race"]}
    rows = [{"image_id": 42, "qas": [row]}, "junk"] if grouped else [{"image_id": 42, **row}, "junk"]
    questions = read_questions(write(tmp_path / "okvqa_val_combine.json", rows))
    assert [(q.id, Path(q.image).parent.name) for q in questions] == [("7", "train2014")]
    assert reasons(questions) == [("2", "bad_row")]


@needs_official
@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("okvqa_val_questions.json", lambda row: f"COCO_val2014_{row['image_id']:012d}.jpg"),
        ("chartqa_test_questions.json", lambda row: row["imgname"]),
    ],
)
def test_official_excerpts_are_read_whole(tmp_path: Path, name: str, picture: Any) -> None:
    rows = json.loads((OFFICIAL / name).read_text())
    touch(tmp_path, *map(picture, rows))
    questions = read_questions(OFFICIAL / name, images=tmp_path)
    assert (len(questions), questions.skipped) == (1000, [])
    for question, row in zip(questions, rows, strict=True):
        assert question.question == row.get("question", row.get("query"))
        assert question.answers == tuple(row["answers"] if "answers" in row else [row["label"]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
        (b"nonsense", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "expected JSON lines"),
        (b"[]", "no row names a picture"),
        (b'[{"a": 1}]', "no row names a picture"),
        (b'{"questions": []}', "questions without answers"),
        (b'{"questions": [], "annotations": 3}', "no list of annotations"),
        (b'[{"imgname": "1.png"}]', "no usable question .1 bad_row; the first is .*no 'label'"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "test.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"test.json.*{message}"):
        read_questions(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "data",
                    "questions",
                    "annotations",
                    "question_types",
                    "question_id",
                    "image_id",
                    "imgname",
                    "image",
                    "file_path",
                    "qas",
                    "query",
                    "label",
                    "question",
                    "answers",
                    "answer",
                    "id",
                    "kind",
                    "split",
                ]
            ),
            values,
            max_size=5,
        )
    ),
    max_leaves=15,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(json_values, st.sampled_from([".json", ".jsonl"]))
@example([{"image_id": float("inf"), "question": "Q?"}], ".json")
def test_whatever_the_content_it_is_read_or_refused_cleanly(tmp_path: Path, content: Any, suffix: str) -> None:
    path = tmp_path / f"test{suffix}"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError):  # there are no pictures
        read_questions(path)


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_a_table_with_the_columns_of_each_benchmark(tmp_path: Path) -> None:
    cell = {"bytes": picture(1), "path": "x.png"}
    textvqa = {"image_id": ["a"], "question_id": [34602], "question": ["what?"], "answers": [["nikon"] * 10]}
    chartqa = {"query": ["how many?", "and?"], "label": [["14"], ["15"]], "human_or_machine": [0, 1]}
    okvqa = {"question_id": ["7"], "question": ["what?"], "answers": [["race", "racing"]], "question_type": ["sports"]}
    ours = {"id": ["q"], "question": ["what?"], "answer": ["x"], "kind": ["word"], "group": ["read"]}
    found = {}
    for name, columns in {"textvqa": textvqa, "chartqa": chartqa, "okvqa": okvqa, "ours": ours}.items():
        rows = len(next(iter(columns.values())))
        pq.write_table(pa.table({**columns, "image": [cell] * rows}), tmp_path / f"{name}.parquet")
        questions = read_questions(tmp_path / f"{name}.parquet", store=tmp_path / "store")
        assert questions.skipped == []
        assert all(Path(q.image).read_bytes() == picture(1) for q in questions)
        found[name] = [(q.id, q.question, q.answers, q.kind, q.group) for q in questions]
    assert found == {
        "textvqa": [("34602", "what?", ("nikon",) * 10, "", "")],
        "chartqa": [("1", "how many?", ("14",), "human", ""), ("2", "and?", ("15",), "augmented", "")],
        "okvqa": [("7", "what?", ("race", "racing"), "sports", "")],
        "ours": [("q", "what?", ("x",), "word", "read")],
    }
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    rows = [
        {"image": picture(1), "question": "q?", "answers": ["a"], "id": 1},
        {"image": None, "question": "q?", "answers": ["a"], "id": 2},
        {"image": b"none", "question": "q?", "answers": ["a"], "id": 3},
        {"image": picture(2), "question": None, "answers": ["a"], "id": 4},
        {"image": picture(2), "question": " ", "answers": ["a"], "id": 5},
        {"image": picture(2), "question": "q?", "answers": [], "id": 6},
        {"image": picture(2), "question": "q?", "answers": None, "id": 7},
        {"image": picture(1), "question": "q?", "answers": ["a"], "id": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    questions = read_questions(tmp_path / "p.parquet", store=tmp_path / "store")
    assert [q.id for q in questions] == ["1"]
    expected = ["no_image", "unreadable", "bad_row", "no_question", "no_answer", "bad_row", "duplicate_id"]
    assert reasons(questions) == [(str(number), reason) for number, reason in enumerate(expected, 2)]
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_a_dataset_on_disk_needs_its_split(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"image": [picture(1)], "question": ["q?"], "answers": [["a"]]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved: has the splits train, test; name one of them \(.*saved/train\)"):
        read_questions(tmp_path / "saved", store=tmp_path / "store")
    assert [q.answers for q in read_questions(tmp_path / "saved" / "test", store=tmp_path / "store")] == [("a",)]


def test_a_table_without_questions_or_a_place_for_pictures(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [picture(1)], "question": ["q?"]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p.parquet: no column for answers among image, question"):
        read_questions(tmp_path / "p.parquet", store=tmp_path / "store")
    with pytest.raises(InputError, match="a folder for the pictures"):
        read_questions(tmp_path / "p.parquet")


def test_the_pictures_of_a_test_set_alone(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png")
    rows = [{"imgname": "1.png", "query": "q", "label": ""}, {"imgname": "1.png", "query": "", "label": "a"}]
    path = write(tmp_path / "test_human.json", [*rows, {"imgname": "2.png", "query": "q", "label": "a"}, "junk"])
    found = [(Path(name).name, source) for name, source in pictures_in(path)]
    assert [name for name, source in found if isinstance(source, Path)] == ["1.png", "2.png"]
    assert [str(source).split(": ")[1][:7] for _, source in found[2:]] == ["bad_row"]
    pq.write_table(pa.table({"image": [picture(1), None, picture(2)]}), tmp_path / "p.parquet")
    first, none, last = (data for _, data in pictures_in(tmp_path / "p.parquet"))
    assert (first, last) == (picture(1), picture(2))
    assert str(none) == f"{tmp_path}/p.parquet:2: no_image (the cell is empty)"
