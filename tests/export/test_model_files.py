"""What is taken out of a model folder's JSON files: what tells of a machine, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.export.model_files import without_paths


@pytest.mark.parametrize(
    "entry",
    [
        {"_name_or_path": "models/x"},
        {"name_or_path": "/home/anna/x"},
        {"tokenizer_file": "../tokenizer.json"},
        {"cache_dir": "c"},
        {"resumed_from": "/home/anna/run one/checkpoint"},
        {"resumed_from": "~/x"},
        {"resumed_from": "C:\\Users\\anna"},
    ],
)
def test_paths_go_at_any_depth(entry: dict[str, str]) -> None:
    content = {"a": 1, "b": [{"c": {"d": None}}]}
    dirty = {**content, **entry, "b": [{"c": {"d": None, **entry}, **entry}]}
    assert without_paths(dirty) == content


def test_what_is_no_path_stays() -> None:
    content = {
        "content": "</s>",
        "think": "/think",
        "slash": "/",
        "chat_template": "{% if x %}/a/b{% endif %}",
        "model": "HuggingFaceTB/SmolVLM-256M-Instruct",
        "image_token": "<image>",
        "profile": "p",
        "path": None,
        "also": ["/", "~", 1.5],
    }
    assert without_paths(content) == content


@pytest.fixture
def dirty(tiny_idefics3: Path, tmp_path: Path) -> Path:
    """A model folder as others leave it: with paths in every JSON file, on top and inside."""
    folder = Path(shutil.copytree(tiny_idefics3, tmp_path / "model"))
    names = [path.name for path in folder.glob("*.json") if path.name != "tokenizer.json"]
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"} <= set(names)
    leak = {"_name_or_path": "/home/anna/base", "name_or_path": "/home/anna/base", "tokenizer_file": "~/anna/t.json"}
    for name in names:
        content = json.loads((folder / name).read_text())
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            part.update(leak, made_in="/home/anna/base")
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_no_bundle_names_the_machine_that_made_the_model(
    format: str,
    dirty: Path,
    tiny_idefics3: Path,
    onnx_graphs: Callable[[Path], Path],
    openvino_graphs: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    from mpa_edge.export.to_onnx import to_onnx
    from mpa_edge.export.to_openvino import to_openvino

    make: Any = {"onnx": to_onnx, "openvino": to_openvino}[format]
    graphs = {"onnx": onnx_graphs, "openvino": openvino_graphs}[format](tiny_idefics3)
    # The graphs are those of the clean model: its weights are the same.
    (tmp_path / "clean").mkdir()
    (tmp_path / "bundle").mkdir()
    make(tiny_idefics3, tmp_path / "clean", "fp32", graphs=graphs)
    make(dirty, tmp_path / "bundle", "fp32", graphs=graphs)
    for path in (tmp_path / "clean").rglob("*.*"):
        if path.is_file():
            assert (tmp_path / "bundle" / path.relative_to(tmp_path / "clean")).read_bytes() == path.read_bytes()
