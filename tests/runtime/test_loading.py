"""What `load` can be told: engine, device, and the size that pictures are seen at."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from mpa_edge.bundle import Bundle, write_bundle
from mpa_edge.errors import InputError
from mpa_edge.runtime import load, resized
from mpa_edge.runtime import onnx as onnx_engine
from mpa_edge.runtime.families import family_of_bundle


@pytest.fixture
def folder(served: tuple[Path, Bundle]) -> Path:
    write_bundle(*served)
    return served[0]


def test_the_engine_can_be_made_sure_of(folder: Path) -> None:
    load(folder, engine="llama.cpp", threads=1).close()
    with pytest.raises(InputError, match=r"is for llama\.cpp, not for onnxruntime"):
        load(folder, engine="onnxruntime")


def test_devices_that_are_not_there_are_named_with_the_cure(folder: Path) -> None:
    load(folder, device="CPU", threads=1).close()
    with pytest.raises(InputError, match=r"--device cuda: this llama.cpp was built for the CPU only; .*GGML_CUDA=on"):
        load(folder, device="cuda")
    with pytest.raises(InputError, match=r"--device toaster: llama\.cpp knows auto, cpu"):
        load(folder, device="toaster")


def test_onnx_devices_are_execution_providers(monkeypatch: pytest.MonkeyPatch, served: tuple[Path, Bundle]) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(onnx_engine, "OnnxEngine", lambda *_, providers: opened.append(providers))
    half, whole = (served[1].model_copy(update={"quantization": name}) for name in ("fp16", "int8"))
    onnx_engine.open_engine(served[0], half, 0)
    monkeypatch.setattr(onnx_engine.ort, "get_available_providers", lambda: [onnx_engine.CUDA, onnx_engine.CPU])
    for bundle, device in ((half, "auto"), (whole, "auto"), (whole, "cuda"), (half, "tensorrt")):
        onnx_engine.open_engine(served[0], bundle, 0, device=device)
    cpu, cuda = (onnx_engine.CPU,), (onnx_engine.CUDA, onnx_engine.CPU)
    assert opened == [cpu, cuda, cpu, cuda, (onnx_engine.TENSORRT, *cuda)]
    with pytest.raises(InputError, match="--device tpu: ONNX Runtime knows auto, cpu, cuda"):
        onnx_engine.open_engine(served[0], half, 0, device="tpu")


def test_pictures_can_be_seen_smaller_and_that_is_told(folder: Path, served: tuple[Path, Bundle], picture: Any) -> None:
    image, own = picture(200, 150), served[1].image
    with load(folder, threads=1) as vlm:
        whole = vlm.ask(image, "What is it?")
    with pytest.warns(UserWarning, match="longest edge of 128"):
        vlm = load(folder, threads=1, longest_edge=128)
    with vlm:
        small = vlm.ask(image, "What is it?")
    assert small.prompt_tokens is not None
    assert whole.prompt_tokens is not None
    wanted = own.model_copy(update={"longest_edge": 128})
    family = family_of_bundle(served[1])
    tokens = [family.image_tokens(*family.grid(image.size, settings), settings) for settings in (wanted, own)]
    assert tokens[0] != tokens[1]
    assert (small.prompt_tokens < whole.prompt_tokens) == (tokens[0] < tokens[1])


def test_the_size_of_training_is_no_warning(served: tuple[Path, Bundle]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resized(served[1], served[1].image.longest_edge) == served[1]  # type: ignore[union-attr]


def test_sizes_that_cannot_be_name_the_flag(served: tuple[Path, Bundle]) -> None:
    for edge in (0, 20_000):
        with pytest.raises(InputError, match=f"--longest-edge {edge}"):
            resized(served[1], edge)
