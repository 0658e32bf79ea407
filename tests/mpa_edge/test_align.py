"""The loop over the stages: what it keeps, drops and says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mpa_edge.align import align, align_models, warn_without_export
from mpa_edge.bundle import write_bundle
from mpa_edge.config import AlignConfig
from mpa_edge.errors import FingerprintMismatch, InputError, RunError
from mpa_edge.fake import FakeVlm
from mpa_edge.models import open_vlm
from mpa_edge.parts import read_parts
from mpa_edge.records import Case, Sample, read_rows
from mpa_edge.runtime import load
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding, Vlm
from mpa_edge.tasks import task_named


def config(pair: Any, out: Path, **settings: Any) -> AlignConfig:
    torch.set_num_threads(1)
    usual: dict[str, Any] = {
        "images": pair.images,
        "teacher": str(pair.teacher),
        "student": str(pair.student),
        "task": "reference",
        "out": out,
        "device": "cpu",
        "questions": 2,
        "chunk_size": 8,
        "epochs": 2,
        "train_batch_size": 8,
    }
    values = {**usual, **settings}
    return AlignConfig(**{**values, "images": str(values["images"])})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_pair: Any) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("runs") / "discs"
    return out, align(config(tiny_pair, out))


def test_a_run_leaves_what_the_design_says(run: tuple[Path, Any]) -> None:
    out, result = run
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert names == [
        "annotations",
        "audit.html",
        "cases",
        "collapsed.jsonl",
        "log.jsonl",
        "parity.jsonl",
        "run.json",
        "samples.jsonl",
        "skipped.jsonl",
        "student",
    ]
    assert result.run == out
    assert result.pictures == 24
    assert result.annotations == 48
    assert result.verdicts["parity"] == sum(result.training.values()) > 24
    assert result.metrics["best"]["holdout_loss"] < result.metrics["before"]["holdout_loss"]


def test_run_json_tells_what_was_done(run: tuple[Path, Any], tiny_pair: Any) -> None:
    out, result = run
    log = json.loads((out / "run.json").read_text())
    assert AlignConfig(**log["config"]) == config(tiny_pair, out)
    assert list(log["stages"]) == ["samples", "annotate", "identify", "select", "level"]
    assert all(stage["seconds"] >= 0 for stage in log["stages"].values())
    assert log["stages"]["annotate"]["rejected"] == result.rejected
    assert log["stages"]["level"]["parameters"]["trainable"]
    assert len(log["teacher"]["weights"]) == len(log["student"]["weights"]) == 64
    assert torch.__version__.startswith(log["versions"]["torch"])


def test_the_summary_says_what_was_kept_dropped_and_what_is_next(run: tuple[Path, Any]) -> None:
    out, result = run
    summary = result.summary()
    assert "pictures     24 used, none skipped" in summary
    assert f"{sum(result.rejected.values())} rejected (" in summary
    assert f"training     {sum(result.training.values())} rows" in summary
    assert summary.splitlines()[-1].split(maxsplit=1)[1] == f"mpa-edge export {out} --format gguf"


def test_the_training_set_reads_as_chat_messages(run: tuple[Path, Any], tiny_pair: Any) -> None:
    out, _ = run
    rows = [json.loads(line) for line in (out / "parity.jsonl").read_text().splitlines()]
    assert {row["messages"][1]["content"][0]["text"] for row in rows} == {"red", "green", "blue", "yellow"}
    assert all((out / row["images"][0]).resolve().parent == tiny_pair.images.resolve() for row in rows)
    assert not any(row["images"][0].startswith("/") for row in rows)


def test_the_student_learns_to_look(tiny_pair: Any, tmp_path: Path) -> None:
    """No label was used, and these pictures were in no training: half of the answers right is far above none."""
    result = align(config(tiny_pair, tmp_path / "run", epochs=25, patience=25, learning_rate=4e-3))
    aligned, base = open_vlm(str(result.adapter), device="cpu"), open_vlm(str(tiny_pair.student), device="cpu")
    paths = sorted((tiny_pair.images.parent / "labelled").iterdir())
    images, prompts = [open_image(path) for path in paths], ["What colour?"] * len(paths)
    colours = ["red", "green", "blue", "yellow"] * 6  # as they were drawn

    def right(vlm: Vlm) -> int:
        answers = vlm.answer(images, prompts, Decoding(max_new_tokens=12))
        return sum(answer.text == colour for answer, colour in zip(answers, colours, strict=True))

    assert right(base) == 0
    assert right(aligned) >= 12


def test_the_same_command_again_changes_nothing(run: tuple[Path, Any], tiny_pair: Any) -> None:
    out, result = run

    def files() -> dict[str, bytes]:
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name not in ("log.jsonl", "run.json")
        }

    before = files()
    assert align(config(tiny_pair, out)) == result
    assert files() == before


def test_other_settings_are_refused_before_anything_is_written(
    run: tuple[Path, Any], tiny_pair: Any, tmp_path: Path
) -> None:
    out = tmp_path / run[0].name
    shutil.copytree(run[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for settings, says in (
        ({"match": "paper"}, r"\(--match: was 'official', is 'paper'\)"),
        ({"questions": 1, "votes": 3}, r"\(--questions: was 2, is 1; --votes: was 1, is 3\)"),
        ({"limit": 12}, r"\(--limit: was None, is 12\)"),
        ({"teacher": str(tiny_pair.student)}, r"\(--teacher\.weights: was "),
        (
            {"images": tiny_pair.images.parent / "labelled"},
            "--images: was '24 pictures', is '24 pictures, 24 of them new'",
        ),
    ):
        with pytest.raises(FingerprintMismatch, match=says):
            align(config(tiny_pair, out, **settings))
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = [path.name for path in before if after[path] != before[path]]
    assert set(changed) <= {".scan.sqlite", "log.jsonl"}


def test_settings_of_the_training_redo_the_student_alone(run: tuple[Path, Any], tiny_pair: Any, tmp_path: Path) -> None:
    out = tmp_path / run[0].name
    shutil.copytree(run[0], out)
    asked = files_of(out, "annotations", "cases")
    adapter = (out / "student" / "adapter_model.safetensors").read_bytes()
    result = align(config(tiny_pair, out, rank=4, epochs=1))
    assert files_of(out, "annotations", "cases") == asked
    assert json.loads((out / "student" / "adapter_config.json").read_text())["r"] == 4
    assert result.training == run[1].training
    # The one that was finished is not lost, and can still be used.
    assert (out / "student-old-1" / "adapter_model.safetensors").read_bytes() == adapter
    # One that was not finished is no loss.
    (out / "student" / "metrics.json").unlink()
    align(config(tiny_pair, out, rank=8, epochs=1, select="all", mix=0))
    assert sorted(path.name for path in out.glob("student*")) == ["student", "student-old-1"]
    assert files_of(out, "annotations", "cases") == asked


def files_of(out: Path, *folders: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for name in folders for path in sorted((out / name).iterdir())}


def test_a_second_round_asks_what_the_first_one_trained(run: tuple[Path, Any], tiny_pair: Any, tmp_path: Path) -> None:
    """From a finished run, of which nothing is asked or trained again."""
    out = tmp_path / run[0].name
    shutil.copytree(run[0], out)
    first = {name: path.read_bytes() for path in (out / "student").iterdir() if (name := path.name) != "stage.json"}
    result = align(config(tiny_pair, out, rounds=2))
    assert {name: (out / "student-round-1" / name).read_bytes() for name in first} == first
    assert not list(out.glob("student-old-*"))
    before, after = (list(read_parts(out / name, Case)) for name in ("cases-round-1", "cases"))
    assert [(case.id, case.teacher_answer) for case in before] == [(case.id, case.teacher_answer) for case in after]
    assert [case.student_answer for case in before] != [case.student_answer for case in after]
    assert [counts.verdicts for counts, _ in result.earlier] == [run[1].verdicts]
    # It went on from the first one's weights.
    assert result.metrics["before"]["holdout_loss"] < run[1].metrics["before"]["holdout_loss"]
    assert "round        2 of 2" in result.summary()
    log = json.loads((out / "run.json").read_text())
    assert list(log["stages"]) == [
        *("samples", "annotate", "identify", "select", "level"),
        *("identify-2", "select-2", "level-2"),
    ]
    everything = files_of(out, "cases", "cases-round-1", "student", "student-round-1")
    assert align(config(tiny_pair, out, rounds=2)) == result
    assert files_of(out, "cases", "cases-round-1", "student", "student-round-1") == everything
    # Another training of the first round makes another student, which is asked anew.
    shutil.copytree(out, tmp_path / "other" / out.name)
    align(config(tiny_pair, tmp_path / "other" / out.name, rounds=2, epochs=1))
    assert files_of(tmp_path / "other" / out.name, "cases") != files_of(out, "cases")
    kept = sorted(path.name for path in (tmp_path / "other" / out.name).glob("*-old-1"))
    assert kept == ["student-old-1", "student-round-1-old-1"]
    # And back: the first round is the last one again.
    assert align(config(tiny_pair, out)).metrics == run[1].metrics
    assert {name: (out / "student" / name).read_bytes() for name in first} == first


def test_a_bundle_is_asked_in_the_students_place(tiny_pair: Any, tmp_path: Path, gguf_bundle: Any) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(bundle, gguf_bundle(tiny_pair.student, bundle, "q8_0", tokens=12))
    result = align(config(tiny_pair, tmp_path / "run", ask=str(bundle), limit=12, epochs=1))
    assert result.adapter.joinpath("adapter_model.safetensors").exists()
    log = json.loads((tmp_path / "run" / "run.json").read_text())
    assert log["ask"]["engine"] == "llama.cpp"
    stage = json.loads((tmp_path / "run" / "cases" / "stage.json").read_text())
    assert stage["fingerprint"]["student"]["engine"] == "llama.cpp"
    cases = list(read_parts(tmp_path / "run" / "cases", Case))
    samples = {row.id: row.path for row in read_rows(tmp_path / "run" / "samples.jsonl", Sample)}
    with load(bundle) as vlm:
        prompt = task_named("reference").prompt(cases[0].question)
        decoding = Decoding(max_new_tokens=task_named("reference").max_new_tokens)
        image = open_image(samples[cases[0].sample_id])
        assert vlm.answer([image], [prompt], decoding)[0].text == cases[0].student_answer
    with pytest.raises(FingerprintMismatch, match="--ask: was 'a bundle', is None"):
        align(config(tiny_pair, tmp_path / "run", limit=12, epochs=1))


def test_fresh_starts_over_and_leaves_other_files(run: tuple[Path, Any], tiny_pair: Any, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(run[0], out)
    (out / "notes.txt").write_text("mine")
    result = align(config(tiny_pair, out, limit=12, fresh=True, epochs=1, batch_size=5))
    assert result.pictures == 12
    assert (out / "notes.txt").exists()


def test_bad_files_are_accounted_for_by_reason(tiny_pair: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(tiny_pair.images, folder)
    Image.effect_noise((200, 200), 90).convert("RGB").save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:3000])
    (folder / "whole.jpg").unlink()
    (folder / "text.png").write_text("this is no picture")
    shutil.copy(folder / "000.png", folder / "z-copy.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "notes.txt").write_text("no picture by its name")
    result = align(config(tiny_pair, tmp_path / "run", images=folder, epochs=1))
    assert result.pictures == 24
    assert result.skipped == {"duplicate": 1, "not_an_image": 1, "too_small": 1, "truncated": 1, "unreadable": 1}
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {(Path(row["path"]).name, row["reason"]) for row in skipped} == {
        ("truncated.jpg", "truncated"),
        ("text.png", "unreadable"),
        ("z-copy.png", "duplicate"),
        ("dot.png", "too_small"),
        ("notes.txt", "not_an_image"),
    }
    assert len(list(read_rows(tmp_path / "run" / "samples.jsonl", Sample))) == 24
    assert "5 skipped (1 duplicate" in result.summary()


def test_nothing_to_learn_is_said_not_trained(tiny_pair: Any, tmp_path: Path) -> None:
    """The teacher as its own student agrees with itself."""
    with pytest.raises(RunError) as error:
        align(config(tiny_pair, tmp_path / "run", student=str(tiny_pair.teacher), mix=0))
    assert "training rows from 24 pictures, at least 8 are needed" in str(error.value)
    assert "agree" in str(error.value)
    assert (tmp_path / "run" / "audit.html").exists()
    assert not (tmp_path / "run" / "student").exists()


def test_a_teacher_that_writes_no_questions_is_said(tiny_pair: Any, tmp_path: Path) -> None:
    settings = config(tiny_pair, tmp_path / "run", teacher="fake:")
    with pytest.raises(RunError, match=r"48 rejected .*No annotation could be used"):
        align(settings)


def test_what_cannot_be_trained_is_refused_before_anything_runs(
    tiny_pair: Any, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--student fake:: runs on fake; only transformers models"):
        align(config(tiny_pair, tmp_path / "a", student="fake:"))
    with pytest.raises(InputError, match="is an adapter"):
        align(config(tiny_pair, tmp_path / "b", student=str(tiny_adapter)))
    with pytest.raises(InputError, match="--ask fake:: is no bundle"):
        align(config(tiny_pair, tmp_path / "b", ask="fake:"))
    with pytest.raises(InputError, match="--task none"):
        align(config(tiny_pair, tmp_path / "c", task="none"))
    with pytest.raises(InputError, match="--images"):
        align(config(tiny_pair, tmp_path / "d", images=tmp_path / "nowhere"))


def test_it_works_on_loaded_models(tiny_pair: Any, tmp_path: Path) -> None:
    teacher, student = (open_vlm(str(path), device="cpu") for path in (tiny_pair.teacher, tiny_pair.student))
    result = align_models(config(tiny_pair, tmp_path / "run", epochs=1), teacher, student)
    assert result.adapter.joinpath("adapter_model.safetensors").exists()
    with pytest.raises(InputError, match="only transformers"):
        align_models(config(tiny_pair, tmp_path / "run"), teacher, FakeVlm())


def with_model_type(model: Path, folder: Path, model_type: str) -> Path:
    """A folder that holds a model's configuration, under another type, and no weights."""
    folder.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    return folder


def test_a_student_without_export_is_named_before_anything_is_loaded(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = with_model_type(tiny_pair.student, tmp_path / "kosmos", "kosmos-2")

    def stop(*_: object) -> None:
        raise InputError("this is where models are loaded")

    monkeypatch.setattr("mpa_edge.align.open_models", stop)
    with pytest.raises(InputError, match="models are loaded"):
        align(config(tiny_pair, tmp_path / "run", student=str(student)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: --student {student}: no export for models of type 'kosmos-2'")
    assert "idefics3" in line
    assert "can still be aligned" in line


def test_a_student_of_the_hub_is_known_by_its_configuration(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, commit = tmp_path / "models--me--kosmos", "0" * 40
    with_model_type(tiny_pair.student, cache / "snapshots" / commit, "kosmos-2")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    warn_without_export("me/kosmos")
    assert "warning: --student me/kosmos: no export for models of type 'kosmos-2'" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["fake:gold", "http://localhost:1/v1#model", "no/such-model", "./no-such-folder"])
def test_what_can_be_exported_or_is_no_model_here_gets_no_warning(
    spec: str, tiny_pair: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    warn_without_export(spec)
    warn_without_export(str(tiny_pair.student))
    assert capsys.readouterr().err == ""
