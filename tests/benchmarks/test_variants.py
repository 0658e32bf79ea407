from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mpa_edge.benchmarks.measure import Measured
from mpa_edge.benchmarks.score import digests_of
from mpa_edge.benchmarks.variants import Variant, baseline_of, content_digest, place_on_road, size_bytes, variants_of
from mpa_edge.errors import BundleError, InputError, ModelError


def model(folder: Path, weights: bytes = b"12345678") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def adapter(folder: Path, base: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"123")
    return folder


def test_a_role_names_the_variant_and_its_place(tmp_path: Path) -> None:
    folder = model(tmp_path / "some=model")
    assert baseline_of(f"teacher={folder}") == Variant("teacher", str(folder), "teacher", "transformers")
    assert baseline_of(str(folder)) == Variant("some=model", str(folder), "other", "transformers")
    assert baseline_of("org/model-500M").name == "model-500M"
    assert baseline_of("merged=org/model").role == "aligned"
    assert baseline_of("org/model").role is None


def test_the_order_is_the_roads_and_names_are_unique(tmp_path: Path) -> None:
    one, two = model(tmp_path / "m"), model(tmp_path / "n")
    found = variants_of([], [str(one), f"aligned={two}", f"student={one}", "other/m", f"teacher={two}"])
    assert [variant.name for variant in found] == ["teacher", "student", "aligned", "m", "m-2"]


def test_quantized_bundles_follow_their_engines_full_precision() -> None:
    names = ("q8 llama.cpp", "int8 onnxruntime", "fp32 onnxruntime", "f16 llama.cpp")
    found = [
        Variant(name, "", "full" if name[0] == "f" else "quantized", name.partition(" ")[2], name.partition(" ")[0])
        for name in names
    ]
    order = sorted(found, key=lambda variant: place_on_road(variant, ["llama.cpp", "onnxruntime"]))
    assert [variant.quantization for variant in order] == ["f16", "q8", "fp32", "int8"]


def test_an_adapter_counts_with_its_base(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    student = adapter(tmp_path / "student", "../base")
    assert (size_bytes(str(base)), size_bytes(str(student))) == (8, 11)
    before = content_digest(str(student))
    (student / "metrics.json").write_text("{}")
    assert content_digest(str(student)) == before
    (base / "model.safetensors").write_bytes(b"87654321")
    assert content_digest(str(student)) != before


def test_a_report_names_what_was_measured_by_digest(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    bundle = Variant("q8", str(tmp_path), "quantized", "llama.cpp")
    told = Measured({}, [], describe={"weights": "a" * 64, "adapter": "b" * 64, "dtype": "float32"})
    assert digests_of(bundle, Measured({}, [])) == {"manifest": hashlib.sha256(b"{}").hexdigest()}
    assert digests_of(Variant("aligned", "org/model", "aligned", "transformers"), told) == {
        "weights": "a" * 64, "adapter": "b" * 64,
    }  # fmt: skip
    assert digests_of(Variant("teacher", "http://x/v1", "teacher", "chat"), Measured({}, [])) == {}


def test_an_adapter_without_its_base_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    student = adapter(tmp_path / "student", "../gone")
    with pytest.raises(ModelError, match=r"names the base model .*gone, which is not there"):
        variants_of([], ["teacher=fake:", f"aligned={student}"])


def test_what_is_not_on_this_disk_is_unknown() -> None:
    assert size_bytes("fake:") is content_digest("fake:") is None


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        baseline_of(f"student={tmp_path}")
    with pytest.raises(InputError, match="no model folder"):
        baseline_of("student=./nowhere")
    with pytest.raises(BundleError):
        variants_of([str(tmp_path)], [])
