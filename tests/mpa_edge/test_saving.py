"""The training set in other trainers' formats, read back as they read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from mpa_edge.records import Case, write_rows
from mpa_edge.saving import save_for_trainers
from mpa_edge.selection import training_row
from mpa_edge.tasks import TASKS

TASK = TASKS["textvqa"]
QUESTIONS = ["Was steht auf dem Schild?", "What does <image> say?", "line\nbreak?"]


@pytest.fixture
def parity(tmp_path: Path) -> Path:
    """A training set whose pictures lie outside of the run."""
    run = tmp_path / "run"
    rows = []
    for number, question in enumerate(QUESTIONS):
        picture = tmp_path / "pictures" / f"{number} ü.png"
        picture.parent.mkdir(exist_ok=True)
        picture.touch()
        case = Case(
            f"c{number}", f"s{number}", question, f"Die Straße {number}", f"Straße {number}", "s", 1.0, 0.0, "parity"
        )
        rows.append(training_row(case, picture, TASK, run))
    write_rows(run / "parity.jsonl", rows)
    return run / "parity.jsonl"


def loaded(path: Path, cache: Path) -> list[dict[str, Any]]:
    return list(datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache)))


def test_llava(parity: Path, tmp_path: Path) -> None:
    [path] = save_for_trainers(parity, ["llava"])
    assert path == parity.with_name("parity.llava.json")
    rows = loaded(path, tmp_path / "cache")
    assert rows == json.loads(path.read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == ["c0", "c1", "c2"]
    for number, row in enumerate(rows):
        human, gpt = row["conversations"]
        assert human == {
            "from": "human",
            "value": f"<image>\n{TASK.prompt(QUESTIONS[number].replace('<image>', 'image'))}",
        }
        assert gpt == {"from": "gpt", "value": f"Straße {number}"}
        assert Path(row["image"]).is_absolute()
        assert Path(row["image"]).samefile(tmp_path / "pictures" / f"{number} ü.png")


def test_sharegpt_as_llama_factory_reads_it(parity: Path, tmp_path: Path) -> None:
    [path] = save_for_trainers(parity, ["sharegpt"])
    info = json.loads((parity.parent / "dataset_info.json").read_text())["parity.sharegpt"]
    assert parity.with_name(info["file_name"]) == path
    tags, columns = info["tags"], info["columns"]
    for number, row in enumerate(loaded(path, tmp_path / "cache")):
        user, assistant = row[columns["messages"]]
        assert (user[tags["role_tag"]], assistant[tags["role_tag"]]) == (tags["user_tag"], tags["assistant_tag"])
        text = user[tags["content_tag"]]
        assert text.startswith(f"<image>{QUESTIONS[number].replace('<image>', 'image')}")
        assert text.count("<image>") == len(row[columns["images"]]) == 1
        assert assistant[tags["content_tag"]] == f"Straße {number}"
        assert Path(row[columns["images"]][0]).is_file()


def test_both_and_none(parity: Path) -> None:
    assert save_for_trainers(parity, []) == []
    written = save_for_trainers(parity, ["llava", "sharegpt", "llava"])
    assert [path.name for path in written] == ["parity.llava.json", "parity.sharegpt.json"]
    assert not list(parity.parent.glob(".*"))


def test_files_of_formats_that_are_no_longer_asked_for_are_deleted(parity: Path) -> None:
    kept = [parity.with_name(name) for name in ("parity.mine.json", "other.llava.json")]
    for path in kept:
        path.touch()
    save_for_trainers(parity, ["llava", "sharegpt"])
    save_for_trainers(parity, ["llava"])
    assert sorted(parity.parent.iterdir()) == sorted([*kept, parity, parity.with_name("parity.llava.json")])
    save_for_trainers(parity, [])
    foreign = parity.with_name("dataset_info.json")
    foreign.write_text('{"mine": {}}')
    save_for_trainers(parity, [])
    assert sorted(parity.parent.iterdir()) == sorted([*kept, parity, foreign])


def test_an_empty_training_set(tmp_path: Path) -> None:
    (tmp_path / "parity-round-2.jsonl").touch()
    [path] = save_for_trainers(tmp_path / "parity-round-2.jsonl", ["llava"])
    assert (path.name, json.loads(path.read_text())) == ("parity-round-2.llava.json", [])


def test_a_failure_leaves_the_older_file(parity: Path) -> None:
    [path] = save_for_trainers(parity, ["llava"])
    before = path.read_bytes()
    with parity.open("a") as file:
        file.write("torn")
    with pytest.raises(ValueError, match="Expecting value"):
        save_for_trainers(parity, ["llava"])
    assert path.read_bytes() == before
