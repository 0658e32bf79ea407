"""Export from end to end on a small model: what is written, what is used again, what a failure or a kill leaves."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import warm
from mpa_edge.bundle import MANIFEST, read_bundle
from mpa_edge.errors import ExportError, InputError, RunError, RunLocked, UnknownFamily
from mpa_edge.export import quants
from mpa_edge.export.build import Options, export
from mpa_edge.export.samples import run_questions
from mpa_edge.lock import kept
from mpa_edge.records import Case, Sample, write_rows
from mpa_edge.run_folder import RunFolder
from mpa_edge.runtime import load
from mpa_edge.runtime.selfcheck import selfcheck
from mpa_edge.tasks import task_named

SAMPLES = 4


@pytest.fixture(scope="module")
def run(
    tiny_idefics3: Path, tiny_adapter: Path, picture: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "signs"
    shutil.copytree(tiny_adapter, folder / "student")
    for index in range(3):
        (folder / "pictures").mkdir(exist_ok=True)
        picture(90 + index, 70, seed=index).save(folder / "pictures" / f"{index}.png")
    samples = [Sample(id=f"s{i}", path=str(folder / "pictures" / f"{i}.png"), sha256="0" * 64) for i in range(3)]
    write_rows(folder / "samples.jsonl", samples)
    cases = [Case(f"c{i}", f"s{i % 3}", f"Question {i}?", "a", "a", "b", 1.0, 0.0, "parity") for i in range(9)]
    write_rows(folder / "cases" / "part-00000.jsonl", cases)
    (folder / "cases" / "stage.json").write_text(json.dumps({"parts": 1, "fingerprint": {}}))
    config = {"task": "reference", "teacher": "/models/secret/big-teacher", "images": str(folder / "pictures")}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return folder


@pytest.fixture(scope="module")
def bundles(run: Path) -> list[Path]:
    return export(run, "gguf", ["f16", "Q8_0", "f16"], samples=SAMPLES)


def test_bundles_are_where_and_what_they_should_be(run: Path, bundles: list[Path]) -> None:
    assert bundles == [run / "bundles" / "gguf-f16", run / "bundles" / "gguf-q8_0"]
    for folder in bundles:
        bundle = read_bundle(folder, check_digests=True)
        assert {file.role for file in bundle.files} == {"language_model", "mmproj", "tokenizer", "readme", "config"}
        assert {file.path for file in bundle.files} | {MANIFEST} == {path.name for path in folder.iterdir()}


def test_the_manifest_tells_where_the_weights_came_from(tiny_idefics3: Path, bundles: list[Path]) -> None:
    bundle = read_bundle(bundles[0])
    source = bundle.source
    assert (source.student, source.teacher, source.run) == (tiny_idefics3.name, "big-teacher", "signs")
    assert (source.task, source.metric) == ("reference", "exact_match")
    assert None not in (source.adapter_sha256, source.base_sha256)
    assert bundle.prompt.question_template == task_named("reference").question_template
    assert "/models/secret" not in (bundles[0] / MANIFEST).read_text()


def test_the_manifest_holds_the_outcome_of_the_checks(bundles: list[Path]) -> None:
    checks = read_bundle(bundles[0]).checks
    assert checks["merge"]["changed"] == 4
    assert checks["gguf"]["tokenizer_agreement"] == 1.0
    assert checks["verify"]["token_agreement"] >= 0.75
    assert checks["verify"]["samples"] == SAMPLES


def test_a_bundle_answers(bundles: list[Path], run: Path) -> None:
    with load(bundles[0], threads=1) as vlm:
        answer = vlm.ask(run / "pictures" / "0.png", "What is it?")
    assert answer.finish_reason in ("stop", "length")
    assert answer.timings.total > 0
    assert selfcheck(bundles[0], threads=1).passed


def test_the_merged_model_is_used_again_until_the_adapter_changes(
    run: Path, bundles: list[Path], adapter_on: Callable[..., Path], tiny_idefics3: Path
) -> None:
    steps: list[str] = []
    before = (run / "merged" / "model.safetensors").stat().st_mtime_ns
    export(run, "gguf", ["q8_0"], samples=2, progress=steps.append)
    assert "merge …" not in steps
    assert (run / "merged" / "model.safetensors").stat().st_mtime_ns == before

    other = run.parent / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "student")
    shutil.copytree(adapter_on(tiny_idefics3, scale=0.1), other / "student")
    export(other, "gguf", ["q8_0"], samples=2, progress=steps.append)
    assert "merge …" in steps


def test_a_damaged_merged_model_is_made_anew(run: Path, bundles: list[Path]) -> None:
    (run / "merged" / "generation_config.json").unlink()
    steps: list[str] = []
    export(run, "gguf", ["q8_0"], samples=2, progress=steps.append)
    assert "merge …" in steps
    assert (run / "merged" / "generation_config.json").is_file()


def test_the_run_asks_its_own_questions(run: Path) -> None:
    questions = run_questions(run, task_named("reference"), 4)
    assert [q.prompt for q in questions] == ["Question 0?", "Question 2?", "Question 4?", "Question 6?"]
    assert questions[0].image.size == (90, 70)
    assert run_questions(run.parent / "nothing", None, 4) == []


def test_a_plain_model_folder_is_exported_as_it_is(tiny_one_tile: Path, tmp_path: Path) -> None:
    (folder,) = export(tiny_one_tile, "gguf", ["q8_0"], tmp_path, samples=2)
    assert folder == tmp_path / "gguf-q8_0"
    bundle = read_bundle(folder)
    assert bundle.checks["merge"]["source"] == "base"
    assert bundle.source.adapter_sha256 is None


def test_a_bundle_that_fails_verification_is_not_kept(
    tiny_one_tile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gguf-q8_0").mkdir()
    (tmp_path / "gguf-q8_0" / "older").write_text("an older bundle")

    def fail(*_: object) -> None:
        raise ExportError("not the same model")

    monkeypatch.setattr("mpa_edge.export.verify.verify", fail)
    with pytest.raises(ExportError, match="not the same"):
        export(tiny_one_tile, "gguf", ["q8_0"], tmp_path, samples=2)
    assert [path.name for path in tmp_path.iterdir()] == ["gguf-q8_0"]
    assert (tmp_path / "gguf-q8_0" / "older").is_file()


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tiny_one_tile: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; import mpa_edge.export.verify as v\n"
        "v.verify = lambda *_: (print('verifying', flush=True), time.sleep(600))\n"
        "from mpa_edge.export.build import Options, export\n"
        "export(Path(sys.argv[1]), 'gguf', ['q8_0'], Path(sys.argv[2]), samples=2)\n"
    )
    out, log = tmp_path / "bundles", tmp_path / "log"
    command = [sys.executable, "-c", code, str(tiny_one_tile), str(out)]
    process, end = warm.start(command, log), time.monotonic() + 300
    while "verifying\n" not in log.read_text(errors="replace"):
        assert process.exitcode is None, log.read_text(errors="replace")
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.join()
    left = list(out.iterdir())
    assert left
    assert not list(out.rglob(MANIFEST))
    export(tiny_one_tile, "gguf", ["q8_0"], out, samples=2)
    assert [path.name for path in out.iterdir()] == ["gguf-q8_0"]


def test_a_run_in_which_another_process_works_is_not_merged(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged*", "bundles")))
    with RunFolder(other).lock(), pytest.raises(RunLocked, match="in use by another mpa-edge process"):
        export(other, "gguf", ["q8_0"], tmp_path / "out", samples=2)
    assert not (other / "merged").exists()


def test_nobody_starts_a_run_over_while_it_is_exported(run: Path, bundles: list[Path], tmp_path: Path) -> None:
    tried: list[str] = []

    def align(step: str) -> None:
        if not re.match(r"verify .* …", step):
            return
        tried.append(step)
        with pytest.raises(RunLocked, match="in use by another mpa-edge process"), RunFolder(run).lock():
            pass
        with kept(run):  # another export
            pass

    export(run, "gguf", ["q8_0"], tmp_path / "out", samples=2, progress=align)
    assert tried
    with RunFolder(run).lock(), pytest.raises(RunLocked), kept(run):
        pass


@pytest.mark.parametrize(("format", "quant"), [("gguf", "int8"), ("onnx", "q8_0"), ("gguf", " ")])
def test_unknown_quantizations_name_the_flag_before_any_work(
    format: Any, quant: str, tiny_one_tile: Path, tmp_path: Path
) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match="--quant"):
        export(tiny_one_tile, format, [quant], tmp_path)
    assert time.perf_counter() - start < 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_and_no_model_is_named(tmp_path: Path, tiny_adapter: Path) -> None:
    with pytest.raises(InputError, match="neither a run"):
        export(tmp_path, "gguf", ["f16"])
    with pytest.raises(InputError, match="is an adapter"):
        export(tiny_adapter, "gguf", ["f16"])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="no trained student"):
        export(tmp_path, "gguf", ["f16"])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError):
        export(tmp_path, "gguf", ["f16"])


def test_an_unknown_family_is_named_before_any_conversion(tiny_one_tile: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_one_tile, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "kosmos-2"}))
    with pytest.raises(UnknownFamily, match="kosmos-2"):
        export(model, "gguf", ["f16"], tmp_path / "out")


def test_the_names_of_onnx_quantizations_are_those_that_are_made() -> None:
    from mpa_edge.export.onnx_quantize import PRECISIONS

    assert set(quants.ONNX) == set(PRECISIONS)


def test_each_step_is_told_with_its_time(run: Path, bundles: list[Path]) -> None:
    told: list[str] = []
    export(run, "gguf", ["q8_0"], samples=2, progress=told.append)
    told = [line for line in told if not line.startswith("warning: ")]  # two random answers may differ
    steps = ["convert to gguf", "ask the merged model", "verify gguf-q8_0"]
    assert told[::2] == [f"{step} …" for step in steps]
    assert all(re.fullmatch(rf"{step}: \d+\.\d s", line) for step, line in zip(steps, told[1::2], strict=True))


@pytest.mark.parametrize(
    ("format", "quants", "options", "flag"),
    [
        ("gguf", ["f16"], Options(mmproj="q4_0"), "--mmproj q4_0"),
        ("onnx", ["q4"], Options(mmproj="q8_0"), "--mmproj"),
        ("gguf", ["f16"], Options(quantize_vision=True), "--quantize-vision"),
        ("onnx", ["q4", "fp32"], Options(quantize_vision=True), "--quantize-vision"),
        ("hf", ["q4"], Options(), "--quant q4"),
    ],
)
def test_options_that_do_not_go_together_name_the_flag_before_any_work(
    format: Any, quants: list[str], options: Options, flag: str, tiny_one_tile: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=flag):
        export(tiny_one_tile, format, quants, tmp_path, options=options)
    assert not list(tmp_path.iterdir())
