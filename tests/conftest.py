"""Shared fixtures: small randomly initialised models of every family, made on the spot by `makers/tiny_models.py`."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import warm
from tiny_models import (
    make_adapter,
    make_idefics3,
    make_internvl,
    make_llava,
    make_picture,
    make_qwen2_5_vl,
    make_qwen2_vl,
)

# The smallest machine that the suite must run on has two cores; one thread each keeps runs comparable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Exact comparisons are for the CPU. For what only a GPU shows: CUDA_VISIBLE_DEVICES=0 pytest tests/gpu
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# They take a quarter of a minute and more. A long file that comes last keeps one core idle, so they come first.
LONGEST = (
    *("test_parity.py", "test_kill.py", "test_packaging.py", "test_demo.py", "test_sharding.py", "test_ranks.py"),
    *("test_memory.py", "test_ray_engine.py", "test_align.py", "test_build.py", "test_onnx_graphs.py"),
    *("test_onnx_readme.py", "test_to_openvino.py", "test_faults.py", "test_chat_stock.py", "test_training.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist hands out files with many tests first; here those take longest that have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: pictures become up to 3 x 3 tiles of 64 pixels plus the overview."""
    return make_idefics3(tmp_path_factory.mktemp("tiny") / "tiny-idefics3")


@pytest.fixture(scope="session")
def tiny_one_tile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_idefics3`, but every picture is one tile, untied output weights."""
    return make_idefics3(tmp_path_factory.mktemp("tiny") / "tiny-one-tile", longest_edge=64, tied=False, seed=1)


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL: pictures of 4 to 36 image tokens, positions in three axes."""
    return make_qwen2_vl(tmp_path_factory.mktemp("tiny") / "tiny-qwen2-vl")


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL: pictures of 4 to 48 image tokens, attention in windows of 4 x 4 and over all of them."""
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny") / "tiny-qwen2.5-vl")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with a CLIP tower: every picture is cropped to a square of 16 image tokens."""
    return make_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_llava_16_bit(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    """`tiny_llava` with weights in bfloat16, as most models are published."""
    import torch
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llava-16-bit"
    shutil.copytree(tiny_llava, folder)
    AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with a SigLIP tower: every picture is squeezed to a square of 16 image tokens."""
    return make_llava(tmp_path_factory.mktemp("tiny") / "tiny-llava-siglip", tower="siglip", seed=1)


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random InternVL: up to 6 tiles of 64 pixels and a thumbnail, 16 image tokens each."""
    return make_internvl(tmp_path_factory.mktemp("tiny") / "tiny-internvl")


@pytest.fixture(scope="session")
def onnx_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`onnx_graphs(model)`: where `to_onnx` keeps the float32 graphs of a model folder; see `made_once`. One of the
    models keeps its weights beside its graphs, as those do that are too large for one file."""
    from mpa_edge.export import onnx_decoder, onnx_graphs, onnx_tensors

    def export_graphs(model: Path, folder: Path) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_decoder, "subprocess", warm)  # for the builder
            if model.name == "tiny-llava-16-bit":
                patch.setattr(onnx_tensors, "INLINE_BYTES", 1000)
            return onnx_graphs.export_graphs(model, folder)

    return made_once(tmp_path_factory, "onnx-graphs", export_graphs)


@pytest.fixture(scope="session")
def openvino_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`openvino_graphs(model)`: where `to_openvino` keeps the float32 graphs of a model folder; see `made_once`."""
    from mpa_edge.export.openvino_graphs import export_graphs

    return made_once(tmp_path_factory, "openvino-graphs", export_graphs)


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, export_graphs: Callable[[Path, Path], dict[str, float]]
) -> Callable[[Path], Path]:
    """A function from a model folder to its graphs, which the first of pytest's processes makes for all of them: an
    export takes seconds, and models of one name are the same in every process."""
    from filelock import FileLock

    from mpa_edge.export.float32_graphs import graphs_once

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    root.mkdir(exist_ok=True)

    def graphs_of(model: Path) -> Path:
        with FileLock(root / f"{model.name}.lock"):
            gc.freeze()  # what tests hold by now is not walked through at each of an export's collections of garbage
            try:
                graphs_once(model, root / model.name, export_graphs)
            finally:
                gc.unfreeze()
        return root / model.name

    return graphs_of


@pytest.fixture(scope="session")
def openvino_bundle(
    tmp_path_factory: pytest.TempPathFactory, openvino_graphs: Callable[[Path], Path]
) -> Callable[[Path, str], Path]:
    """`openvino_bundle(model, quant)`: the folder of an OpenVINO bundle, made once."""
    root = tmp_path_factory.mktemp("openvino")

    def make(model: Path, quant: str) -> Path:
        from mpa_edge.bundle import write_bundle
        from mpa_edge.export.to_openvino import to_openvino
        from tiny_bundles import manifest_of

        folder = root / f"{model.name}-{quant}"
        if folder.exists():
            return folder
        folder.mkdir()
        files, checks = to_openvino(model, folder, quant, graphs=openvino_graphs(model))
        write_bundle(folder, manifest_of(model, "openvino", quant, files, checks={"openvino": checks}))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_idefics3: Path) -> Path:
    """A LoRA adapter with random, non-zero weights on `tiny_idefics3`."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "student", tiny_idefics3)


@pytest.fixture
def adapter_on(tmp_path: Path) -> Callable[..., Path]:
    """`adapter_on(base, scale=…, **LoraConfig options)`: a fresh adapter folder on a base of the test's choice."""
    return lambda base, **options: make_adapter(tmp_path / "adapter", base, **options)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Any]:
    """`picture(width, height, seed)`: a deterministic RGB picture with edges and noise."""
    return make_picture


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Picture files by what is special in them: see `save_every_kind`."""
    from tiny_pictures import save_every_kind

    return save_every_kind(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def gguf_bundle() -> Callable[..., Any]:
    """`gguf_bundle(model, folder, quant, name=…, template=…, tokens=…)` converts a model into `folder` and returns its
    manifest, without the checks that an export makes; it is not written."""

    def make(
        model: Path, folder: Path, quant: str = "f16", *, name: str = "tiny", template: str = "{question}", tokens: int
    ) -> Any:
        from mpa_edge.export.merged import Names
        from mpa_edge.export.to_gguf import to_gguf
        from tiny_bundles import manifest_of

        files, _ = to_gguf(model, {quant: folder}, Names(name))[quant]
        return manifest_of(model, "llama.cpp", quant, files, name=f"{name}-{quant}", template=template, tokens=tokens)

    return make
