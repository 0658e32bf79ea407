"""The accuracy of everything from the base to the quantized bundle: right figures, and nobody is asked twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpa_edge.bundle import Bundle
from mpa_edge.errors import InputError
from mpa_edge.export import road
from mpa_edge.export.build import Options, export
from mpa_edge.export.merged import Merged, open_source
from mpa_edge.export.road import KEPT, Road, missing_full_precision, read_asked
from mpa_edge.models import open_vlm
from mpa_edge.runtime import load, open_bundle
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.tasks import task_named
from mpa_edge.transformers_vlm import TransformersVlm

PICTURES = 5
QUESTIONS = ("What is it?", "What colour?")


@pytest.fixture(scope="module")
def merged(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "signs"
    shutil.copytree(tiny_adapter, run / "student")
    task = {**task_named("reference").to_json(), "max_new_tokens": 4}
    (run / "run.json").write_text(json.dumps({"config": {"task": "reference"}, "task": task}))
    return open_source(run, None, lambda line: None)


def road_of(merged: Merged, data: Path, limit: int | None = None) -> Road:
    assert merged.run is not None
    return Road(merged, read_asked(merged.run, merged.root, data, limit))


@pytest.fixture(scope="module")
def data(merged: Merged, picture: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions. The base's own answers are the labels of the first seven: its accuracy is 70% by construction."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(PICTURES):
        picture(60 + number, 50, seed=number).save(folder / f"{number}.png")
    asked = [(f"{number}.png", question) for number in range(PICTURES) for question in QUESTIONS]
    base = TransformersVlm.load(str(merged.base), device="cpu", dtype="float32")
    images = [open_image(folder / name) for name, _ in asked]
    answers = base.answer(images, [question for _, question in asked], Decoding(max_new_tokens=4))
    rows = []
    for place, ((name, question), answer) in enumerate(zip(asked, answers, strict=True)):
        label = answer.text if place < 7 else "nobody says this"
        rows.append({"id": str(place), "image": name, "question": question, "answers": [label]})
    rows.append({"id": "gone", "image": "gone.png", "question": "What?", "answers": ["x"]})
    (folder / "shelves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "shelves.jsonl"


@pytest.fixture(scope="module")
def bundles(merged: Merged, gguf_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Bundle]]:
    """The quantized one first, as nobody promises an order."""
    root = tmp_path_factory.mktemp("bundles")
    return [(root / quant, gguf_bundle(merged.folder, root / quant, quant, tokens=4)) for quant in ("q8_0", "f16")]


@pytest.fixture(scope="module")
def found(merged: Merged, data: Path, bundles: list[tuple[Path, Bundle]]) -> dict[str, Any]:
    return road_of(merged, data).checks(bundles)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that are opened from here on."""
    names: list[str] = []

    def vlm(spec: str, **options: Any) -> Any:
        names.append(Path(spec).name)
        return open_vlm(spec, **options)

    def bundle(folder: Path, manifest: Bundle) -> Any:
        names.append(folder.name)
        return open_bundle(folder, manifest)

    monkeypatch.setattr(road, "open_vlm", vlm)
    monkeypatch.setattr(road, "open_bundle", bundle)
    return names


def test_every_step_is_scored_on_the_same_questions(found: dict[str, Any]) -> None:
    assert [(step["name"], step["step"], step["from"]) for step in found["steps"]] == [
        ("base", "base", None),
        ("aligned", "aligned", "base"),
        ("merged", "merged", "aligned"),
        ("gguf-f16", "full", "merged"),
        ("gguf-q8_0", "quantized", "gguf-f16"),
    ]
    assert found["data"] == {
        "name": "shelves",
        "n": 10,
        "of": 10,
        "pictures": 5,
        "skipped": {"missing_image": 1},
        "sha256": found["data"]["sha256"],
    }
    assert (found["task"], found["metric"]) == ("reference", "exact_match")
    json.dumps(found, allow_nan=False)


def test_figures_are_those_of_the_answers(
    found: dict[str, Any], merged: Merged, data: Path, bundles: list[tuple[Path, Bundle]]
) -> None:
    base, aligned, same, full, quantized = found["steps"]
    assert base["value"] == 0.7
    assert base["ci95"][0] < 0.7 < base["ci95"][1]
    assert aligned["value"] == same["value"] < 0.7  # the adapter is random, and the merge loses nothing
    assert aligned["delta"] == round(aligned["value"] - 0.7, 5)
    assert aligned["delta_ci95"][0] < aligned["delta"] <= aligned["delta_ci95"][1]
    assert (same["delta"], same["delta_ci95"]) == (0, [0, 0])
    assert all(step["errors"] == 0 for step in found["steps"])
    rows = [json.loads(line) for line in data.read_text().splitlines()][:10]
    for (folder, bundle), entry in zip(bundles, (quantized, full), strict=True):
        with open_bundle(folder, bundle, threads=1) as vlm:
            answers = vlm.answer(
                [open_image(data.parent / row["image"]) for row in rows],
                [row["question"] for row in rows],
                Decoding(max_new_tokens=4),
            )
        right = [
            a.text.strip().lower() == row["answers"][0].strip().lower() for a, row in zip(answers, rows, strict=True)
        ]
        assert entry["value"] == sum(right) / 10


def test_nobody_is_asked_twice(
    found: dict[str, Any], merged: Merged, data: Path, bundles: list[tuple[Path, Bundle]], opened: list[str]
) -> None:
    steps: list[str] = []
    assert road_of(merged, data).checks(bundles, steps.append) == found
    assert not opened
    assert steps[0] == "score base on 10 questions"
    assert road_of(merged, data).checks()["steps"] == found["steps"][:3]
    half = road_of(merged, data, limit=6).checks(bundles)  # a sample of what was asked
    assert not opened
    assert (half["data"]["n"], half["data"]["of"]) == (6, 10)
    assert half["data"]["sha256"] != found["data"]["sha256"]


def test_an_interrupted_evaluation_goes_on_where_it_was(
    found: dict[str, Any], merged: Merged, data: Path, bundles: list[tuple[Path, Bundle]], opened: list[str]
) -> None:
    answers = merged.root / KEPT / "answers.jsonl"
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[:-3]) + "\n" + lines[-1][:20])  # torn in the middle of a line
    assert road_of(merged, data).checks(bundles) == found
    assert opened == ["q8_0"]


def test_another_adapter_is_asked_anew(merged: Merged, data: Path, found: dict[str, Any], opened: list[str]) -> None:
    metrics = merged.run / "student" / "adapter_config.json"  # type: ignore[operator]
    before = metrics.read_text()
    try:
        metrics.write_text(before + " ")
        road_of(merged, data).checks()
        assert opened == ["student"]
    finally:
        metrics.write_text(before)


def test_a_picture_that_cannot_be_read_counts_as_wrong(merged: Merged, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data.parent, tmp_path / "data"))
    (copy / "0.png").write_bytes(b"no picture")  # of the first two questions, which the base has right
    base = road_of(merged, copy / "shelves.jsonl").checks()["steps"][0]
    assert (base["value"], base["errors"]) == (0.5, 2)


def test_what_cannot_be_scored_is_refused_before_any_work(merged: Merged, tiny_one_tile: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data .* names no task"):
        read_asked(tiny_one_tile, tmp_path, tmp_path / "test.jsonl")
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        road_of(merged, tmp_path / "nowhere.jsonl")


def test_questions_are_read_before_the_merge(merged: Merged, tiny_one_tile: Path, tmp_path: Path) -> None:
    assert merged.run is not None
    run = Path(shutil.copytree(merged.run, tmp_path / "run", ignore=shutil.ignore_patterns("merged*", "bundles")))
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        export(run, "gguf", options=Options(data=tmp_path / "nowhere.jsonl"))
    assert not (run / "merged").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")  # nothing of it is looked at
    with pytest.raises(InputError, match=r"--data .* names no task"):
        export(tmp_path / "model", "gguf", options=Options(data=tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match="--limit goes with --data"):
        export(run, "gguf", options=Options(limit=5))


@pytest.mark.parametrize(
    ("format", "quants", "extra"),
    [
        ("gguf", ["q8_0", "q4_k_m"], ["f16"]),
        ("gguf", ["q8_0", "f32"], []),
        ("gguf", ["bf16"], []),
        ("onnx", ["int8"], ["fp32"]),
        ("onnx", ["fp16", "q4"], []),
        ("hf", [], []),
    ],
)
def test_a_bundle_at_full_precision_is_made_where_none_was_asked_for(
    format: str, quants: list[str], extra: list[str]
) -> None:
    assert missing_full_precision(format, quants) == extra


def test_kept_answers_are_no_bundle(merged: Merged, found: dict[str, Any]) -> None:
    """They lie beside the bundles, hidden, and without a manifest."""
    assert [path.name for path in merged.root.iterdir()] == [KEPT]
    with pytest.raises(ValueError, match="no bundle"):
        load(merged.root / KEPT)
