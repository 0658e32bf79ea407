"""LLaVA's class token under llama.cpp: the tower's features and the answer's logits are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpa_edge.runtime import class_token, open_bundle
from mpa_edge.transformers_vlm import TransformersVlm


@pytest.fixture(scope="module")
def made(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory, gguf_bundle: Any) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("class-token") / "f32"
    return folder, gguf_bundle(tiny_llava, folder, "f32", tokens=8)


def test_logits_of_a_clip_tower_equal_transformers(
    made: tuple[Path, Any], tiny_llava: Path, picture: Callable[..., Any]
) -> None:
    reference = TransformersVlm.load(str(tiny_llava), device="cpu", dtype="float32")
    image, question = picture(150, 90), "What does the sign say?"
    with torch.inference_mode():
        wanted = reference.model(**reference.encode([image], [question])).logits[0].numpy()
    with open_bundle(*made, threads=1) as vlm:
        np.testing.assert_allclose(vlm.logits([image], question), wanted, atol=0.02 * wanted.std())


def test_only_a_tower_with_a_class_token_is_watched(
    made: tuple[Path, Any], tiny_llava_siglip: Path, tmp_path: Path, gguf_bundle: Any
) -> None:
    folder, bundle = made
    other = gguf_bundle(tiny_llava_siglip, tmp_path, "f16", tokens=8)
    assert class_token.class_token_first(bundle.path_of(folder, "mmproj")) is not None
    assert class_token.class_token_first(other.path_of(tmp_path, "mmproj")) is None


def test_rows_in_the_right_order_are_left_alone() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(class_token.in_order(rows, rows[3]), rows[[3, 0, 1, 2]])
    assert class_token.in_order(rows, rows[0]) is rows
