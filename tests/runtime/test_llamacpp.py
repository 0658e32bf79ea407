"""The llama.cpp engine against transformers: logits at all positions, tokens, memory, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpa_edge.errors import BundleError, ModelError
from mpa_edge.export.merged import Names
from mpa_edge.export.to_gguf import to_gguf
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.transformers_vlm import TransformersVlm
from tiny_bundles import manifest_of

ONE_TILE, WIDE, NINE_TILES = (64, 64), (192, 64), (190, 190)
QUESTION = "What does the sign say?"


class Pair:
    """A model in transformers and the same as bundles."""

    def __init__(self, model: Path, root: Path, quants: list[str]) -> None:
        self.reference = TransformersVlm.load(str(model), device="cpu", dtype="float32")
        self.root = root
        made = to_gguf(model, {quant: root / quant for quant in quants}, Names("tiny"))
        self.manifests = {quant: manifest_of(model, "llama.cpp", quant, files) for quant, (files, _) in made.items()}

    def open(self, quant: str) -> BundleVlm:
        return open_bundle(self.root / quant, self.manifests[quant], threads=1)

    def logits(self, image: Any, prompt: str) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return self.reference.model(**self.reference.encode([image], [prompt])).logits[0].numpy()


@pytest.fixture(scope="module")
def tiled(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tiny_idefics3, tmp_path_factory.mktemp("tiled"), ["f32", "f16", "q8_0"])


@pytest.fixture(scope="module")
def full(tiled: Pair) -> Iterator[BundleVlm]:
    with tiled.open("f32") as vlm:
        yield vlm


@pytest.mark.parametrize(("size", "tiles"), [(WIDE, 4), (NINE_TILES, 10)], ids=["1x3", "3x3"])
def test_logits_at_all_positions_equal_transformers(
    tiled: Pair, full: BundleVlm, size: tuple[int, int], tiles: int, picture: Callable[..., Any]
) -> None:
    image = picture(*size)
    assert len(full.prepare([image], QUESTION)[1].cuts[0].tiles) == tiles
    np.testing.assert_allclose(full.logits([image], QUESTION), tiled.logits(image, QUESTION), atol=0.004)


def test_logits_of_one_tile_and_untied_weights_equal_transformers(
    tiny_one_tile: Path, tmp_path: Path, picture: Callable[..., Any]
) -> None:
    pair = Pair(tiny_one_tile, tmp_path, ["f32"])
    image = picture(100, 80)
    with pair.open("f32") as vlm:
        assert len(vlm.prepare([image], QUESTION)[1].cuts[0].tiles) == 1
        np.testing.assert_allclose(vlm.logits([image], QUESTION), pair.logits(image, QUESTION), atol=0.004)


def test_features_equal_transformers(tiled: Pair, full: BundleVlm, picture: Callable[..., Any]) -> None:
    image = picture(150, 120, seed=3)
    inputs = tiled.reference.encode([image], ["?"])
    with torch.inference_mode():
        found = tiled.reference.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
    expected = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in found.pooler_output])  # by picture, or by tile
    features = full._engine.encode(full.prepare([image], "?")[1].cuts[0])
    np.testing.assert_allclose(features.reshape(expected.shape), expected.numpy(), atol=0.004)


def test_greedy_tokens_at_f16_equal_transformers(tiled: Pair, picture: Callable[..., Any]) -> None:
    images = [picture(50 + 17 * index, 190 - 13 * index, seed=index) for index in range(8)]
    prompts = [f"{QUESTION} {index}" for index in range(8)]
    decoding = Decoding(max_new_tokens=12)
    with tiled.open("f16") as vlm:
        got = vlm.answer(images, prompts, decoding)
    expected = tiled.reference.answer(images, prompts, decoding)
    assert [answer.tokens for answer in got] == [answer.tokens for answer in expected]
    assert [answer.text for answer in got] == [answer.text for answer in expected]
    assert [answer.prompt_tokens for answer in got] == [answer.prompt_tokens for answer in expected]


def test_quantized_weights_run_and_stay_close(tiled: Pair, picture: Callable[..., Any]) -> None:
    image = picture(*WIDE)
    expected = tiled.logits(image, QUESTION)
    with tiled.open("q8_0") as vlm:
        error = np.abs(vlm.logits([image], QUESTION) - expected).max()
    assert 0 < error < expected.std()


def test_step_by_step_equals_all_at_once(full: BundleVlm, picture: Callable[..., Any]) -> None:
    tokens, seen = full.prepare([picture(*WIDE)], QUESTION)
    engine = full._engine
    features = engine.encode(seen.cuts[0])
    every = engine.prefill(tokens, features, all_logits=True)
    np.testing.assert_allclose(engine.prefill(tokens, features), every[-1], atol=1e-4)
    engine.prefill(tokens[:-3], features)
    for place, token in enumerate(tokens[-3:], len(tokens) - 3):
        np.testing.assert_allclose(engine.extend([token]), every[place], atol=2e-3)


def test_a_question_leaves_no_trace_in_the_next(full: BundleVlm, picture: Callable[..., Any]) -> None:
    first, second = picture(*WIDE, seed=1), picture(*NINE_TILES, seed=2)
    alone = full.logits([first], QUESTION)
    full.answer([second], ["Something else?"])
    np.testing.assert_array_equal(full.logits([first], QUESTION), alone)


def test_features_must_match_the_image_tokens(full: BundleVlm, picture: Callable[..., Any]) -> None:
    tokens, seen = full.prepare([picture(*WIDE)], QUESTION)
    with pytest.raises(ModelError, match="image tokens"):
        full._engine.prefill(tokens, full._engine.encode(seen.cuts[0])[:-1])


def test_a_kept_picture_gives_the_very_same_answers(tiled: Pair, check_kept_pictures: Callable[..., None]) -> None:
    with tiled.open("f16") as vlm:
        check_kept_pictures(vlm, QUESTION)


def test_nothing_is_written_to_the_terminal(
    tiled: Pair, picture: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with tiled.open("f16") as vlm:
        vlm.ask(picture(*WIDE), QUESTION)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("role", ["language_model", "mmproj"])
def test_a_damaged_file_is_a_bundle_error(tiled: Pair, tmp_path: Path, role: str) -> None:
    manifest = tiled.manifests["f16"]
    for file in manifest.files:
        data = (tiled.root / "f16" / file.path).read_bytes()
        (tmp_path / file.path).write_bytes(data[: len(data) // 3] if file.role == role else data)
    with pytest.raises(BundleError, match="cannot load it"):
        open_bundle(tmp_path, manifest, threads=1)


def test_an_image_token_that_the_vocabulary_lacks_is_a_bundle_error(tiled: Pair) -> None:
    from mpa_edge.runtime.llamacpp import LlamaCpp

    manifest, folder = tiled.manifests["f16"], tiled.root / "f16"
    prompt = manifest.prompt.model_copy(update={"image_token": "<picture>"})
    with pytest.raises(BundleError, match="<picture>"):
        LlamaCpp(folder, manifest.model_copy(update={"prompt": prompt}), 1, threads=1)
    with pytest.raises(BundleError, match=r"'<image>' is its token \d+, and token 1 of tokenizer\.json"):
        LlamaCpp(folder, manifest, 1, threads=1)
