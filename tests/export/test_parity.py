"""Every family in every format and precision against transformers: logits at every position, then greedy tokens.

The models are random, with logits spread so that an argmax means something, and see pictures of several sizes, one and
two at a time, with short and long questions. Errors are given as a fraction of the logits' standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mpa_edge.export.families import FAMILIES
from mpa_edge.export.merged import Names
from mpa_edge.export.quants import QUANTS
from mpa_edge.export.tolerance import TOLERANCE, logit_error
from mpa_edge.processors import load_processor
from mpa_edge.runtime import BundleVlm, open_bundle
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding
from tiny_bundles import manifest_of
from tiny_pictures import upright_rgb

MODELS = [
    *("tiny_idefics3", "tiny_qwen2_vl", "tiny_qwen2_5_vl"),
    *("tiny_llava_16_bit", "tiny_llava_siglip", "tiny_internvl"),
]
FORMATS = {"gguf": "llama.cpp", "onnx": "onnxruntime", "openvino": "openvino"}
FULL = {"gguf": "f32", "onnx": "fp32", "openvino": "fp32"}
# Pictures by their sizes: smaller than a tile, one tile, many tiles, very wide, very tall, and two in one prompt.
ASKED = [
    ([(20, 30)], "?"),
    ([(64, 64)], "What does the sign say?"),
    ([(190, 170)], "Wie viel kostet das, in €? " * 8),
    ([(400, 37)], "How many?"),
    ([(31, 390)], ""),
    ([(150, 40), (64, 100)], "Which is larger?"),
]


class Original:
    """A model in transformers, asked through its own processor."""

    def __init__(self, folder: Path, make_picture: Any, files: Iterable[Path]) -> None:
        self.folder, self.files = folder, files
        self.processor = load_processor(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.asked = [
            ([make_picture(*size, seed=seed) for seed, size in enumerate(sizes)], text) for sizes, text in ASKED
        ]
        self.logits = [self._logits(images, text) for images, text in self.asked]

    @cached_property
    def of_files(self) -> dict[Path, Any]:
        """Logits of each file, turned and made RGB without our runtime."""
        return {file: self._logits([upright_rgb(file)], "What is it?") for file in self.files}

    @cached_property
    def tokens(self) -> list[list[int]]:
        return [self._tokens(images, text) for images, text in self.asked]

    def _tokens(self, images: Sequence[Image.Image], text: str) -> list[int]:
        inputs = self._inputs(images, text)
        with torch.inference_mode():
            found = self.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        new: list[int] = found[0, inputs["input_ids"].shape[1] :].tolist()
        return new

    def _logits(self, images: Sequence[Image.Image], text: str) -> Any:
        with torch.inference_mode():
            return self.model(**self._inputs(images, text)).logits[0].numpy()

    def _inputs(self, images: Sequence[Image.Image], text: str) -> Any:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **given)


class Exported:
    """The bundles of one model in one format."""

    def __init__(self, original: Original, format: str, root: Path, graphs: Path) -> None:
        self.format, self.root, self.original = format, root, original
        self._made = self._convert(graphs)

    def open(self, quant: str) -> BundleVlm:
        bundle = manifest_of(self.original.folder, FORMATS[self.format], quant, self._made[quant][0])
        return open_bundle(self.root / quant, bundle, threads=1)

    def _convert(self, graphs: Path) -> dict[str, Any]:
        folders = {quant: self.root / quant for quant in QUANTS[self.format]}
        for folder in folders.values():
            folder.mkdir(parents=True)
        if self.format == "gguf":
            from mpa_edge.export.to_gguf import to_gguf

            return to_gguf(self.original.folder, folders, Names(self.root.name))
        if self.format == "openvino":
            from mpa_edge.export.to_openvino import to_openvino

            return {quant: to_openvino(self.original.folder, folders[quant], quant, graphs=graphs) for quant in folders}
        from mpa_edge.export.to_onnx import to_onnx

        return {quant: to_onnx(self.original.folder, folder, quant, graphs=graphs) for quant, folder in folders.items()}


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest, picture: Any, every_kind: dict[str, Path]) -> Original:
    return Original(request.getfixturevalue(request.param), picture, every_kind.values())


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, original: Original, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("parity") / original.folder.name
    graphs = request.getfixturevalue("openvino_graphs" if request.param == "openvino" else "onnx_graphs")
    return Exported(original, request.param, root, graphs(original.folder))


def test_logits_at_every_position(exported: Exported) -> None:
    """All precisions, from the most precise down; one failure tells them all."""
    errors: dict[str, float] = {}
    for quant in QUANTS[exported.format]:
        with exported.open(quant) as vlm:
            pairs = zip(exported.original.asked, exported.original.logits, strict=True)
            errors[quant] = max(logit_error(vlm.logits(images, text), wanted) for (images, text), wanted in pairs)
    allowed = TOLERANCE[FORMATS[exported.format]]
    assert errors == {quant: pytest.approx(0, abs=allowed[quant]) for quant in errors}


def test_greedy_tokens(exported: Exported) -> None:
    with exported.open(FULL[exported.format]) as vlm:
        for (images, text), wanted in zip(exported.original.asked, exported.original.tokens, strict=True):
            answer = vlm.ask(images, text, Decoding(max_new_tokens=10))
            assert list(answer.tokens) == [token for token in wanted if token not in vlm.bundle.prompt.stop_token_ids]


def test_every_kind_of_picture(exported: Exported) -> None:
    """Files that are grey, transparent, of a palette or lie on their side: the runtime opens them by itself."""
    allowed = TOLERANCE[FORMATS[exported.format]][FULL[exported.format]]
    with exported.open(FULL[exported.format]) as vlm:
        found = {file: vlm.logits([open_image(file)], "What is it?") for file in exported.original.files}
    errors = {file.name: logit_error(found[file], wanted) for file, wanted in exported.original.of_files.items()}
    assert errors == {name: pytest.approx(0, abs=allowed) for name in errors}


def test_every_family_is_here() -> None:
    assert len(MODELS) == len(FAMILIES) + 1  # LLaVA has two kinds of towers
    for format, engine in FORMATS.items():
        assert TOLERANCE[engine].keys() == set(QUANTS[format])
        assert np.all(np.diff(list(TOLERANCE[engine].values())) >= 0) or format == "onnx"
