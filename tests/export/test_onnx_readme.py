"""The README of an ONNX bundle: what it names is there, and its lines run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import warm
from mpa_edge.bundle import Bundle, File
from mpa_edge.export.onnx_readme import onnx_commands
from mpa_edge.export.to_onnx import to_onnx
from mpa_edge.runtime import open_bundle
from tiny_bundles import manifest_of

Make = Callable[[Path, Path], Bundle]


@pytest.fixture
def bundle_in(onnx_graphs: Callable[[Path], Path]) -> Make:
    """`bundle_in(folder, model)`: an ONNX bundle's files in the folder, and its manifest."""

    def make(folder: Path, model: Path) -> Bundle:
        folder.mkdir()
        files: list[File] = to_onnx(model, folder, "fp32", graphs=onnx_graphs(model))[0]
        asked = 'Say "briefly": {question}'
        return manifest_of(model, "onnxruntime", "fp32", files, template=asked, tokens=8)

    return make


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_lines_give_the_runtimes_answer(
    bundle_in: Make, tiny_one_tile: Path, picture: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    bundle = bundle_in(folder, tiny_one_tile)
    text = onnx_commands(folder, bundle)
    picture(64, 64).save(folder / "photo.jpg")  # a size that nobody has to scale
    (code,) = blocks(text, "python")
    done = warm.run([sys.executable, "-c", code], cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    with open_bundle(folder, bundle, threads=1) as vlm:
        assert done.stdout.strip() == vlm.ask(folder / "photo.jpg", "What does the sign say?").text != ""


def test_files_and_inputs_are_named_as_they_are(bundle_in: Make, tiny_one_tile: Path, tmp_path: Path) -> None:
    text = onnx_commands(tmp_path / "bundle", bundle_in(tmp_path / "bundle", tiny_one_tile))
    assert "| `onnx/embed_tokens.onnx` | `input_ids` int64 (batch_size, sequence_length) |" in text
    assert "`past_key_values.*` float (batch_size, 2, past_sequence_length, 16)" in text
    assert "`pixel_values` float (batch_size, num_tiles, 3, 64, 64)" in text
    assert all((tmp_path / "bundle" / path).is_file() for path in re.findall(r"`(onnx/\S+)`", text))


@pytest.mark.parametrize("name", ["tiny_one_tile", "tiny_qwen2_vl", "tiny_llava"])
def test_the_javascript_is_javascript_and_gives_an_answer_where_the_library_is(
    name: str,
    bundle_in: Make,
    request: pytest.FixtureRequest,
    picture: Callable[..., Any],
    tmp_path: Path,
) -> None:
    library = Path(__file__).parents[1] / "node" / "node_modules"
    if not shutil.which("node") or not (library / "@huggingface" / "transformers").is_dir():
        pytest.skip("needs node and `npm install --prefix tests/node`")
    folder = tmp_path / "bundle"
    (code,) = blocks(onnx_commands(folder, bundle_in(folder, request.getfixturevalue(name))), "js")
    (folder / "ask.mjs").write_text(code)
    (folder / "node_modules").symlink_to(library)
    picture(64, 64).save(folder / "photo.jpg")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ["node", "ask.mjs"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_a_family_that_transformers_js_does_not_know_gets_no_javascript(
    bundle_in: Make, tiny_internvl: Path, tmp_path: Path
) -> None:
    text = onnx_commands(tmp_path / "bundle", bundle_in(tmp_path / "bundle", tiny_internvl))
    assert "transformers.js does not know this family" in text
    assert not blocks(text, "js")
    assert blocks(text, "python")
