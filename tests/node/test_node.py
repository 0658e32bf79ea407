"""An ONNX bundle in transformers.js: the example `answer.mjs` answers as the bundle's own runtime does, token by token.

Optional: it needs Node and what `npm install --prefix tests/node` puts into `tests/node/node_modules`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from mpa_edge.bundle import write_bundle
from mpa_edge.export.to_onnx import to_onnx
from mpa_edge.runtime import BundleVlm, load
from mpa_edge.runtime.images import open_image
from tiny_bundles import manifest_of
from tiny_pictures import noise, save_turned

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node 20.9 or later (https://nodejs.org)"),
    pytest.mark.skipif(
        not (HERE / "node_modules" / "@huggingface" / "transformers").is_dir(),
        reason="needs transformers.js: npm install --prefix tests/node",
    ),
]

QUESTION = "What does the sign say? The price is 12.50, isn't it ?"
SIZES = {"small": (20, 30), "one tile": (64, 64), "many tiles": (190, 170), "wide": (400, 37), "tall": (31, 390)}
MODES = ("RGBA", "L", "P")
# The largest pixel value is about 2.7. transformers.js subtracts and divides in double precision, transformers in
# single: 2.4e-7 is what is seen where it does so itself.
PIXEL_TOLERANCE = 1e-6
# What resizing by transformers.js itself changes at most, in pictures that are not the tower's size: 0.3 to 3.2 seen.
LIBRARY_DIFFERENCE = 0.1

MakeBundle = Callable[[str, str], Path]


@dataclass(frozen=True)
class Said:
    """What one side made of one picture."""

    text: str
    tokens: tuple[int, ...]
    prompt: list[int]
    pixels: NDArray[np.float32]


def run_node(bundle: Path, pictures: list[Path], *options: str) -> subprocess.CompletedProcess[str]:
    pairs = [word for picture in pictures for word in (str(picture), QUESTION)]
    command = ["node", str(HERE / "answer.mjs"), str(bundle), *pairs, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def ask_node(bundle: Path, pictures: list[Path], dump: Path, *options: str) -> list[Said]:
    """`QUESTION` about each picture, by the example; `dump` is a folder for the pixel values."""
    done = run_node(bundle, pictures, "--json", "--dump", str(dump), *options)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Said(said["text"], tuple(said["tokens"]), said["prompt"], np.fromfile(dump / f"{i}.f32", np.float32))
        for i, said in enumerate(answers)
    ]


def ask_ours(vlm: BundleVlm, path: Path) -> Said:
    prompt, picture = vlm.prepare([open_image(path)], vlm.put(QUESTION))
    pixels = vlm.family.pixel_values(picture.cuts[0], vlm.bundle.image)["pixel_values"].ravel()
    answer = vlm.ask(path, QUESTION)
    return Said(answer.text, answer.tokens, prompt, pixels)


def make_bundle(model: Path, folder: Path, quant: str, graphs: Path) -> Path:
    files, _ = to_onnx(model, folder, quant, graphs=graphs)
    bundle = manifest_of(model, "onnxruntime", quant, files, template="{question} Answer briefly.", tokens=8)
    write_bundle(folder, bundle)
    return folder


@pytest.fixture(scope="module")
def bundle_of(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    onnx_graphs: Callable[[Path], Path],
) -> MakeBundle:
    """`bundle_of(fixture, quant)`: the folder of a bundle of a tiny model, made once."""
    root = tmp_path_factory.mktemp("node")

    def make(fixture: str, quant: str) -> Path:
        folder = root / f"{fixture}-{quant}"
        if not folder.exists():
            model: Path = request.getfixturevalue(fixture)
            make_bundle(model, folder, quant, onnx_graphs(model))
        return folder

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., Image.Image]) -> list[Path]:
    """A file of each size, and of what a decoder can get wrong."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{name}.png" for name in (*SIZES, *MODES)]
    images = [*(picture(*size) for size in SIZES.values()), *(noise(mode, (120, 70)) for mode in MODES)]
    for file, image in zip(files, images, strict=True):
        image.save(file)
    save_turned(folder / "turned.jpg", (120, 70))
    if int(PIL.__version__.split(".")[0]) < 13:  # Pillow 13 resizes tall pictures in another order, see pillow.mjs
        files = [file for file in files if file.stem != "tall"]
    return [*files, folder / "turned.jpg"]


def assert_equal(bundle: Path, pictures: list[Path], dump: Path) -> None:
    said = ask_node(bundle, pictures, dump)
    with load(bundle, threads=1) as vlm:
        for path, node in zip(pictures, said, strict=True):
            ours = ask_ours(vlm, path)
            assert node.prompt == ours.prompt, path.name
            assert np.abs(node.pixels - ours.pixels).max() < PIXEL_TOLERANCE, path.name
            assert node.tokens == ours.tokens, path.name
            # Random models say bytes that are no text, which the two tokenizers show differently.
            assert node.text.strip() == ours.text.strip() or "\ufffd" in ours.text, path.name


CASES = [("tiny_idefics3", quant) for quant in ("fp32", "fp16", "int8", "q4", "q4f16")] + [
    (model, quant)
    for model in ("tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava", "tiny_llava_siglip")
    for quant in ("fp32", "q4f16")
]


@pytest.mark.parametrize(("model", "quant"), CASES)
def test_node_answers_as_we_do(
    model: str, quant: str, pictures: list[Path], bundle_of: MakeBundle, tmp_path: Path
) -> None:
    assert_equal(bundle_of(model, quant), pictures, tmp_path)


def test_pictures_that_are_not_split(
    pictures: list[Path], tiny_idefics3: Path, onnx_graphs: Callable[[Path], Path], tmp_path: Path
) -> None:
    whole = shutil.copytree(tiny_idefics3, tmp_path / "whole")
    settings: dict[str, Any] = json.loads((whole / "processor_config.json").read_text())
    settings["image_processor"]["do_image_splitting"] = False
    (whole / "processor_config.json").write_text(json.dumps(settings))
    assert_equal(make_bundle(whole, tmp_path / "bundle", "fp32", onnx_graphs(tiny_idefics3)), pictures, tmp_path)


@pytest.mark.parametrize("model", ["tiny_idefics3", "tiny_qwen2_vl", "tiny_llava"])
def test_the_librarys_own_pictures_are_others(
    model: str, pictures: list[Path], bundle_of: MakeBundle, tmp_path: Path
) -> None:
    """When this fails, transformers.js resizes as Pillow does, and `pillow.mjs` can go."""
    bundle, resized = bundle_of(model, "fp32"), [path for path in pictures if path.stem in ("many tiles", "wide")]
    said = ask_node(bundle, resized, tmp_path, "--library-pictures")
    with load(bundle, threads=1) as vlm:
        for path, node in zip(resized, said, strict=True):
            ours = ask_ours(vlm, path)
            assert node.prompt == ours.prompt, path.name
            assert np.abs(node.pixels - ours.pixels).max() > LIBRARY_DIFFERENCE, path.name


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "internvl"}, "does not know models of type internvl"),
        ("bundle.json", {"engine": "llama.cpp"}, "is a bundle for llama.cpp"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    file: str, change: dict[str, Any], message: str, pictures: list[Path], bundle_of: MakeBundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle_of("tiny_idefics3", "fp32"), tmp_path / "changed")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    done = run_node(folder, pictures[:1])
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
