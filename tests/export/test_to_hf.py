"""The Hugging Face folder: the merged model's answers, a card that says what is known, and no trace of the machine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mpa_edge.digests import digest_of_folder
from mpa_edge.errors import ExportError
from mpa_edge.export.merged import Merged, open_source
from mpa_edge.export.model_card import model_card
from mpa_edge.export.samples import Question, synthetic_questions
from mpa_edge.export.to_hf import copy_model, to_hf
from mpa_edge.export.workshop import Workshop
from mpa_edge.records import write_atomic
from mpa_edge.runtime.vlm import Answer, Decoding
from mpa_edge.tasks import task_named
from mpa_edge.transformers_vlm import TransformersVlm

STAGES: dict[str, Any] = {
    "samples": {"used": 1500, "skipped": {"unreadable": 2}, "shared": 7},
    "annotate": {"rows": 4501, "rejected": {"duplicate": 349, "no_answer": 11}},
    "identify": {"rows": 4141, "verdicts": {"agree": 1674, "parity": 1592, "unconfirmed": 875}},
    "select": {"rows": 3184, "verdicts": {"agree": 1592, "parity": 1592}, "collapsed": 0},
    "level": {"examples": {"train": 2877, "holdout": 307}},
}


@dataclass
class Reference:
    questions: list[Question]
    decoding: Decoding
    answers: list[Answer]


@pytest.fixture(scope="module")
def run(tiny_adapter: Path, tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose base holds what a machine leaves in a model folder."""
    folder = tmp_path_factory.mktemp("runs") / "signs"
    base = Path(shutil.copytree(tiny_idefics3, folder.parent / "base"))
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/data/somebody/base"
    (base / "config.json").write_text(json.dumps(config))
    (base / "trainer_state.json").write_text('{"cwd": "/data/somebody"}')
    (base / "training_args.bin").write_bytes(b"pickled")
    (base / "LICENSE").write_text("The licence's text.")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: odd-1.0\nlanguage:\n- de\n---\nA base.\n")
    shutil.copytree(tiny_adapter, folder / "student")
    adapter = folder / "student" / "adapter_config.json"
    adapter.write_text(json.dumps({**json.loads(adapter.read_text()), "base_model_name_or_path": str(base)}))
    task = task_named("textvqa")
    settings = {"task": "textvqa", "teacher": "/models/secret/Big-Teacher", "images": "/data/somebody/photos"}
    settings |= {"method": "lora", "rank": 32, "mix": 0.5, "longest_edge": None}
    write_atomic(folder / "run.json", json.dumps({"config": settings, "task": task.to_json(), "stages": STAGES}))
    return folder


@pytest.fixture(scope="module")
def merged(run: Path) -> Merged:
    return open_source(run, None, lambda line: None)


@pytest.fixture(scope="module")
def reference(merged: Merged) -> Reference:
    torch.set_num_threads(1)
    questions, decoding = synthetic_questions(3), Decoding(max_new_tokens=6)
    vlm = TransformersVlm.load(str(merged.folder), device="cpu", dtype="float32")
    answers = vlm.answer([q.image for q in questions], [q.prompt for q in questions], decoding)
    return Reference(questions, decoding, answers)


@pytest.fixture(scope="module")
def folder(merged: Merged, reference: Reference) -> Path:
    with Workshop(merged.root) as workshop:
        return to_hf(merged, merged.root / "hf", reference, workshop, repo="me/signs")


def metadata(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_folder_holds_safetensors_the_processor_the_licence_and_a_card(merged: Merged, folder: Path) -> None:
    assert folder == merged.root / "hf"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt")) or name.startswith("train")]
    assert (folder / "LICENSE").read_text() == "The licence's text."
    assert "bundle.json" not in names
    assert [path.name for path in merged.root.iterdir()] == ["hf"]


def test_weights_are_the_merged_ones_to_the_bit(merged: Merged, folder: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (merged.folder / "model.safetensors").read_bytes()


def test_nothing_in_it_names_a_machine(run: Path, folder: Path) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"somebody" not in content, path.name
        assert b"secret" not in content, path.name
        assert str(run.parent).encode() not in content, path.name


def test_the_card_says_what_the_hub_reads(folder: Path) -> None:
    about = metadata((folder / "README.md").read_text())
    assert about["library_name"] == "transformers"
    assert about["pipeline_tag"] == "image-text-to-text"
    assert (about["license"], about["license_name"], about["language"]) == ("other", "odd-1.0", ["de"])
    assert {"mpa-edge", "arxiv:2509.16633"} <= set(about["tags"])
    assert "base_model" not in about  # a folder of this machine is no place on the hub
    assert "model-index" not in about  # nothing was measured


def test_the_card_names_a_base_of_the_hub(merged: Merged) -> None:
    source = merged.provenance.model_copy(update={"student": "HuggingFaceTB/SmolVLM-500M-Instruct"})
    about = metadata(model_card(replace(merged, provenance=source), {"samples": 3}))
    assert about["base_model"] == "HuggingFaceTB/SmolVLM-500M-Instruct"
    assert about["base_model_relation"] == "finetune"


def test_the_card_tells_method_settings_and_counts(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "# signs\n" in card
    assert "arxiv.org/abs/2509.16633" in card
    assert "`Big-Teacher`" in card
    assert "| rank | 32 |" in card
    assert "| pictures used | 1,500 |" in card
    assert "| annotations by the teacher | 4,501 |" in card
    assert "| annotations rejected | 360 (duplicate 349, no answer 11) |" in card
    assert "| training set: parity samples (teacher right, student wrong) | 1,592 |" in card
    assert "| training set: agreement samples (both right) | 1,592 |" in card
    assert "very tokens for 3 of 3 questions" in card
    assert "4 of " in card  # tensors that the merge changed
    assert "Not measured" in card
    assert "`odd-1.0`" in card


def test_the_code_in_the_card_gives_the_merged_models_answer(
    folder: Path, merged: Merged, picture: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(100, 80)
    image.save(tmp_path / "photo.png")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert 'name = "me/signs"' in code
    code = code.replace('"me/signs"', repr(str(folder))).replace('"photo.jpg"', repr(str(tmp_path / "photo.png")))
    exec(code, {})
    said = capsys.readouterr().out
    vlm = TransformersVlm.load(str(merged.folder), device="cpu", dtype="float32")
    prompt = task_named("textvqa").prompt("What does the sign say?")
    assert said.strip() == vlm.answer([image], [prompt], Decoding(max_new_tokens=32))[0].text != ""


def test_a_folder_that_answers_otherwise_is_not_placed(
    merged: Merged, folder: Path, reference: Reference, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(merged.folder, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name and "text_model" in name)
    save_file({**tensors, name: -tensors[name]}, damaged / "model.safetensors", metadata={"format": "pt"})
    before = (folder / "README.md").read_bytes()
    with pytest.raises(ExportError, match="is not the merged model"), Workshop(merged.root) as workshop:
        to_hf(replace(merged, folder=damaged), merged.root / "hf", reference, workshop)
    assert [path.name for path in merged.root.iterdir()] == ["hf"]
    assert (folder / "README.md").read_bytes() == before


def test_a_plain_model_is_written_without_a_story(tiny_one_tile: Path, tmp_path: Path) -> None:
    merged = open_source(tiny_one_tile, tmp_path / "out", lambda line: None)
    with Workshop(merged.root) as workshop:
        folder = to_hf(merged, merged.root / "hf", Reference([], Decoding(), []), workshop)
    card = (folder / "README.md").read_text()
    assert metadata(card)["license"] == "apache-2.0"
    assert "nothing was trained" in card
    assert "teacher" not in card


@pytest.mark.parametrize(
    "name", ["tiny_one_tile", "tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava_siglip", "tiny_internvl"]
)
def test_every_family_answers_from_its_folder(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(name)
    merged = open_source(model, tmp_path / "out", lambda line: None)
    questions, decoding = synthetic_questions(2), Decoding(max_new_tokens=4)
    vlm = TransformersVlm.load(str(model), device="cpu", dtype="float32")
    answers = vlm.answer([q.image for q in questions], [q.prompt for q in questions], decoding)
    with Workshop(merged.root) as workshop:
        folder = to_hf(merged, merged.root / "hf", Reference(questions, decoding, answers), workshop)
    assert "very tokens for 2 of 2 questions" in (folder / "README.md").read_text()
    left = {path.name for path in model.iterdir()} - {path.name for path in folder.iterdir()}
    assert not left


@pytest.mark.parametrize("measured", ["adapter", "merged"])
def test_scores_come_from_a_report_of_this_very_student_wherever_it_lies(
    measured: str, merged: Merged, tmp_path: Path
) -> None:
    def entry(step: str, value: float | None) -> dict[str, Any]:
        accuracy = {"value": value, "ci95": value and [0.4, 0.9], "n": 60, "metric": "anls"}
        return {"name": step, "step": step, "failed": None if value else "no", "accuracy": accuracy}

    assert merged.run
    # A copy, whose files are all younger than the report.
    merged = replace(merged, run=Path(shutil.copytree(merged.run, tmp_path / "copy")))
    report: dict[str, Any] = {
        "created": "2020-01-01T00:00:00+00:00",
        "data": {"name": "test", "n": 60},
        "task": {"metric": "anls"},
        "variants": [entry("student", 0.5), entry("aligned", 0.75), entry("full", None)],
    }
    folder = tmp_path / "copy" / "report"
    write_atomic(folder / "report.json", json.dumps(report))
    assert "Not measured" in model_card(merged, {"samples": 3})  # nobody knows of whom it is
    adapter = {"weights": "0" * 64, "adapter": merged.provenance.adapter_sha256}
    whole = {"weights": digest_of_folder(merged.folder)}
    report["variants"][1]["digests"] = adapter if measured == "adapter" else whole
    write_atomic(folder / "report.json", json.dumps(report))
    card = model_card(merged, {"samples": 3})
    assert "| student | 50.0% | 40.0–90.0 |" in card
    assert "| **aligned** (this model) | 75.0% |" in card
    (result,) = metadata(card)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "anls", "value": 0.75}]
    report["variants"][1]["digests"] = {"weights": "0" * 64, "adapter": "1" * 64}
    write_atomic(folder / "report.json", json.dumps(report))
    assert "Not measured" in model_card(merged, {"samples": 3})  # it was of another student
    write_atomic(folder / "report.json", "{}")
    assert "Not measured" in model_card(merged, {"samples": 3})


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("http://10.0.0.7:8000/v1#Qwen2-VL-7B", "Qwen2-VL-7B"),
        ("https://gpu-box/v1", "a model behind a chat server"),
        ("old/place/of/teacher", "teacher"),
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
    ],
)
def test_a_teacher_is_named_without_its_address(teacher: str, name: str, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    content = json.loads((copy / "run.json").read_text())
    content["config"]["teacher"] = teacher
    (copy / "run.json").write_text(json.dumps(content))
    assert open_source(copy, None, lambda line: None).provenance.teacher == name


def test_paths_go_and_names_stay(tiny_one_tile: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_one_tile, tmp_path / "source"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    dirty = {
        "tokenizer_file": "/home/me/tokenizer.json",
        "name_or_path": "../models/x",
        "nested": [{"cache_dir": "/c"}],
    }
    (source / "tokenizer_config.json").write_text(json.dumps({**config, **dirty}))
    copy_model(source, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()) == {**config, "nested": [{}]}
