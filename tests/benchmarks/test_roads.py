"""What export measured, out of the manifests and onto the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mpa_edge.benchmarks.report import made_rows
from mpa_edge.benchmarks.roads import joined, road_in, roads_of
from mpa_edge.benchmarks.variants import bundle_of
from mpa_edge.bundle import NEEDED, Bundle, Idefics3Images, PromptSettings, Source, describe_file, write_bundle

TRUNK = [("base", "base", 0.5, None), ("aligned", "aligned", 0.8, "base"), ("merged", "merged", 0.8, "aligned")]
GGUF = [("gguf-f16", "full", 0.8, "merged"), ("gguf-q4_0", "quantized", 0.7, "gguf-f16")]
ONNX = [("onnx-fp32", "full", 0.8, "merged"), ("onnx-int8", "quantized", 0.79, "onnx-fp32")]


def road(steps: list[tuple[str, str, float, str | None]], sha256: str = "0" * 64) -> dict[str, Any]:
    """As export writes it; every interval is 0.05 to each side."""
    values = {name: value for name, _, value, _ in steps}
    entries = []
    for name, step, value, before in steps:
        delta = None if before is None else round(value - values[before], 5)
        ends = None if delta is None else [delta - 0.05, delta + 0.05]
        entry = {"name": name, "step": step, "value": value, "ci95": [value - 0.05, value + 0.05], "errors": 0}
        entries.append({**entry, "from": before, "delta": delta, "delta_ci95": ends})
    data = {"name": "shelves", "n": 400, "of": 400, "pictures": 90, "skipped": {}, "sha256": sha256}
    return {"data": data, "task": "shelves", "metric": "anls", "steps": entries}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(engine, quantization, checks)`: a bundle with a manifest; returns its path."""

    def make(engine: Any, quantization: str, checks: dict[str, Any]) -> str:
        folder = tmp_path / f"{engine}-{quantization}"
        folder.mkdir()
        for role in NEEDED[engine]:
            (folder / role).write_text(role)
        image = Idefics3Images(
            tile_size=64, longest_edge=64, split=False, tokens_per_tile=16, mean=(0.5,) * 3, std=(0.5,) * 3,
            rescale_factor=1 / 255, resample="bicubic",
        )  # fmt: skip
        prompt = PromptSettings(
            chat_template="t", image_token="<image>", stop_token_ids=(1,), max_new_tokens=8, context_length=64
        )
        bundle = Bundle(
            name="b", family="idefics3", engine=engine, quantization=quantization, image=image, prompt=prompt,
            files=tuple(describe_file(folder, role, role) for role in NEEDED[engine]),
            source=Source(student="s", tool_version="0"), checks=checks,
        )  # fmt: skip
        write_bundle(folder, bundle)
        return str(folder)

    return make


def test_bundles_of_one_run_share_one_road(write: Callable[..., str]) -> None:
    variants = [
        bundle_of(write("llama.cpp", "f16", {"road": road([*TRUNK, *GGUF])})),
        bundle_of(write("llama.cpp", "q4_0", {"road": road([*TRUNK, *GGUF])})),
        bundle_of(write("onnxruntime", "int8", {"road": road([*TRUNK, *ONNX])})),
        bundle_of(write("onnxruntime", "fp32", {})),
    ]
    (found,) = roads_of(variants)
    assert [step["name"] for step in found["steps"]] == [name for name, *_ in [*TRUNK, *GGUF, *ONNX]]
    schema = json.loads(files("mpa_edge.benchmarks").joinpath("report.schema.json").read_text())
    jsonschema.validate(found, {"$defs": schema["$defs"], "$ref": "#/$defs/road"})


def test_roads_of_other_questions_or_models_are_not_mixed() -> None:
    other = [("base", "base", 0.4, None), *TRUNK[1:]]
    roads = [road(TRUNK), road(TRUNK, sha256="1" * 64), road(other)]
    assert len(joined(found for checks in roads if (found := road_in({"road": checks})))) == 3


@pytest.mark.parametrize("damage", [{"steps": []}, {"metric": None}, {"data": {}}])
def test_a_road_of_another_version_is_passed_over(damage: dict[str, Any]) -> None:
    assert road_in({"road": {**road(TRUNK), **damage}}) is None
    assert road_in({}) is None
    wild = road(TRUNK)
    wild["steps"][0]["value"] = 50
    assert road_in({"road": wild}) is None


def test_what_a_step_changed_is_told_by_its_interval() -> None:
    rows = made_rows(road([*TRUNK, *GGUF]))
    assert [row["effect"] for row in rows] == [None, "gain", "same", "same", "loss"]
    assert [row["tone"] for row in rows] == ["student", "aligned", "aligned", "gguf", "gguf"]
    assert rows[1]["facts"] == "aligned: 80.0% (75.0–85.0)"
