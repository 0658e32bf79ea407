"""Image features once per picture: fewer passes of the encoder, and the very same answers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mpa_edge.features import FeatureCache, Known, digest_of
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.transformers_vlm import TransformersVlm

DECODINGS = [Decoding(max_new_tokens=6), Decoding(max_new_tokens=6, temperature=1.0, seed=3)]
SIZES = [(100, 100), (180, 60), (64, 64), (60, 190), (120, 100)]
PROMPTS = ["What?", "How many <image> are there in it?", "Say.", "Which bar is the highest of all?", "?"]


@pytest.fixture(scope="module", params=["tiny_idefics3", "tiny_qwen2_vl"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and its processor: tiles and plain positions, or patches of any grid and positions in three axes."""
    torch.set_num_threads(1)
    vlm = TransformersVlm.load(str(request.getfixturevalue(request.param)), device="cpu")
    return vlm.model, vlm.processor


@pytest.fixture
def vlm(loaded: tuple[Any, Any]) -> TransformersVlm:
    return TransformersVlm(*loaded, name="caching")


@pytest.fixture
def plain(loaded: tuple[Any, Any]) -> TransformersVlm:
    return TransformersVlm(*loaded, name="plain", cache_bytes=0)


@pytest.fixture(scope="module")
def pictures(picture: Callable[..., Image.Image]) -> list[Image.Image]:
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]


@contextmanager
def encoder_passes(vlm: TransformersVlm) -> Iterator[list[int]]:
    """Counts the forwards of the image encoder; each entry is one."""
    passes: list[int] = []
    encoder = vlm.model.get_encoder(modality="image")
    hook = encoder.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


def facts(answers: Any) -> list[Any]:
    return [(a.text, a.tokens, a.prompt_tokens, a.finish_reason, a.error) for a in answers]


@pytest.mark.parametrize("decoding", DECODINGS, ids=["greedy", "sampled"])
def test_answers_are_those_without_the_cache(
    vlm: TransformersVlm, plain: TransformersVlm, pictures: list[Image.Image], decoding: Decoding
) -> None:
    expected = facts(plain.answer(pictures, PROMPTS, decoding))
    assert len({tokens for _, tokens, *_ in expected}) > 1
    assert facts(vlm.answer(pictures, PROMPTS, decoding)) == expected
    with encoder_passes(vlm) as passes:
        assert facts(vlm.answer(pictures, PROMPTS, decoding)) == expected
        backwards = facts(vlm.answer(pictures[::-1], PROMPTS[::-1], decoding))[::-1]
        small = TransformersVlm(vlm.model, vlm.processor, name="small", batch_size=2)
        small._features = vlm._features
        assert backwards == facts(small.answer(pictures, PROMPTS, decoding)) == expected
    assert not passes
    alone = [vlm.answer([image], [prompt], decoding)[0] for image, prompt in zip(pictures, PROMPTS, strict=True)]
    assert facts(alone) == expected


def test_a_picture_is_encoded_once_for_all_its_questions(vlm: TransformersVlm, pictures: list[Image.Image]) -> None:
    with encoder_passes(vlm) as passes:
        vlm.answer(pictures * 2, PROMPTS + PROMPTS[::-1], DECODINGS[0])
        # Other objects with the same pixels are the same pictures.
        vlm.answer([image.copy() for image in pictures], PROMPTS[::-1], DECODINGS[1])
    assert len(passes) == len(pictures)


def rows_of(features: Any) -> torch.Tensor:
    """All pictures' features, shape (tokens, width): transformers before 5.21 gives Idefics3's by tile."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in features])


def test_inputs_are_the_processors_own(vlm: TransformersVlm, pictures: list[Image.Image]) -> None:
    expected = vlm.encode(pictures, PROMPTS)
    for _ in range(2):
        inputs = vlm.encode_with_features(pictures, PROMPTS)
        assert inputs is not None
        assert {key for key in expected if not key.startswith("pixel")} == inputs.keys() - {"mm_encoder_outputs"}
        assert all(torch.equal(inputs[key], expected[key]) for key in inputs if key != "mm_encoder_outputs")
        features = inputs["mm_encoder_outputs"]["image"].pooler_output
        tokens = (inputs["input_ids"] == vlm.model.config.image_token_id).sum(dim=1).tolist()
        assert len(rows_of(features)) == sum(tokens)
        assert len(set(tokens)) > 1


def test_features_are_bit_for_bit_the_same_whatever_they_are_asked_with(
    vlm: TransformersVlm, loaded: tuple[Any, Any], pictures: list[Image.Image]
) -> None:
    together = vlm.encode_with_features(pictures, PROMPTS)
    other = TransformersVlm(*loaded, name="other")
    features = rows_of(together["mm_encoder_outputs"]["image"].pooler_output)
    for image, prompt in zip(pictures, PROMPTS, strict=True):
        alone = rows_of(other.encode_with_features([image], [prompt])["mm_encoder_outputs"]["image"].pooler_output)
        assert torch.equal(alone, features[: len(alone)])
        features = features[len(alone) :]
    assert not len(features)


def test_features_serve_training(vlm: TransformersVlm, pictures: list[Image.Image]) -> None:
    """They can be backpropagated through, even if they were made while answering."""
    vlm.answer(pictures, PROMPTS, DECODINGS[0])
    inputs = vlm.encode_with_features(pictures, PROMPTS)
    logits = vlm.model(**inputs).logits[:, -1]
    with torch.no_grad():
        torch.testing.assert_close(logits, vlm.model(**vlm.encode(pictures, PROMPTS)).logits[:, -1])
    logits.sum().backward()
    assert vlm.model.get_input_embeddings().weight.grad is not None
    vlm.model.zero_grad()


def test_one_pair_is_timed_without_the_cache(vlm: TransformersVlm, pictures: list[Image.Image]) -> None:
    """Else the latency of a benchmark would leave out the encoder."""
    vlm.answer(pictures, PROMPTS, DECODINGS[0])
    with encoder_passes(vlm) as passes:
        timings = vlm.answer(pictures[:1], PROMPTS[:1], DECODINGS[0])[0].timings
    assert len(passes) == 1
    assert timings.vision is not None
    assert timings.vision > 0


def test_other_weights_make_other_features(tiny_idefics3: Path, pictures: list[Image.Image]) -> None:
    vlm = TransformersVlm.load(str(tiny_idefics3), device="cpu")

    def features() -> Any:
        inputs = vlm.encode_with_features(pictures[:1], ["?"])
        return inputs["mm_encoder_outputs"]["image"].pooler_output[0]

    before = features()
    with torch.no_grad(), encoder_passes(vlm) as passes:
        # The language model may be trained with features that were made before.
        next(vlm.model.get_decoder().parameters()).mul_(2)
        assert torch.equal(features(), before)
        assert not passes
        vlm.model.model.connector.modality_projection.proj.weight.mul_(2)
        torch.testing.assert_close(features(), before * 2)


def test_a_model_that_takes_no_features_answers_all_the_same(
    loaded: tuple[Any, Any], plain: TransformersVlm, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    original = type(model).forward

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        return original(self, *inputs, **named)

    signature = inspect.signature(original)
    older = [value for name, value in signature.parameters.items() if name != "mm_encoder_outputs"]
    forward.__signature__ = signature.replace(parameters=older)  # type: ignore[attr-defined]
    expected = facts(plain.answer(pictures, PROMPTS, DECODINGS[0]))
    described = TransformersVlm(model, processor, name="a").describe()
    monkeypatch.setattr(type(model), "forward", forward)
    vlm = TransformersVlm(model, processor, name="older")
    assert vlm.encode_with_features(pictures, PROMPTS) is None
    assert facts(vlm.answer(pictures, PROMPTS, DECODINGS[0])) == expected
    assert vlm.describe() == described


def test_a_model_that_takes_them_in_a_way_of_its_own_answers_all_the_same(
    vlm: TransformersVlm, plain: TransformersVlm, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = facts(plain.answer(pictures, PROMPTS, DECODINGS[0]))
    generate = vlm.model.generate

    def picky(**inputs: Any) -> Any:
        if "mm_encoder_outputs" in inputs:
            raise TypeError("wants last_hidden_state")
        return generate(**inputs)

    monkeypatch.setattr(vlm.model, "generate", picky)
    assert facts(vlm.answer(pictures, PROMPTS, DECODINGS[0])) == expected


def test_a_bad_picture_first_does_not_switch_the_cache_off(
    vlm: TransformersVlm, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TransformersVlm._encode

    def refuses(self: Any, processor: Any, images: Any, prompts: Any) -> Any:
        if pictures[2] in images:
            raise ValueError("this picture is cursed")
        return encode(self, processor, images, prompts)

    monkeypatch.setattr(TransformersVlm, "_encode", refuses)
    answers = vlm.answer(pictures, PROMPTS, DECODINGS[0])
    assert [answer.error for answer in answers] == [None, None, "this picture is cursed", None, None]
    monkeypatch.undo()
    with encoder_passes(vlm) as passes:
        vlm.answer(pictures, PROMPTS, DECODINGS[0])
    assert len(passes) == 1


def test_the_cache_keeps_what_was_used_last_within_its_bytes() -> None:
    def known(bytes_: int) -> Known:
        return Known(torch.zeros(bytes_, dtype=torch.uint8), {}, True)

    cache = FeatureCache(100)
    for key in (b"a", b"b", b"c"):
        cache.put(key, known(40))
    assert cache.bytes == 80
    assert cache.get(b"a") is None
    assert cache.get(b"b") is not None
    cache.put(b"d", known(40))
    assert (cache.get(b"c"), len(cache)) == (None, 2)
    cache.put(b"huge", known(101))
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_small_cache_gives_the_same_answers(
    loaded: tuple[Any, Any], plain: TransformersVlm, pictures: list[Image.Image]
) -> None:
    vlm = TransformersVlm(*loaded, name="small", cache_bytes=1)
    expected = facts(plain.answer(pictures * 2, PROMPTS * 2, DECODINGS[0]))
    assert facts(vlm.answer(pictures * 2, PROMPTS * 2, DECODINGS[0])) == expected


def test_a_picture_is_known_by_its_pixels(picture: Callable[..., Image.Image]) -> None:
    image = picture(20, 30, 1)
    same, turned, other = image.copy(), Image.frombytes("RGB", (30, 20), image.tobytes()), picture(20, 30, 2)
    assert digest_of(same) == digest_of(image)
    assert len({digest_of(item) for item in (image, turned, other)}) == 3


def test_closing_gives_the_features_back(vlm: TransformersVlm, pictures: list[Image.Image]) -> None:
    vlm.encode_with_features(pictures, PROMPTS)
    (_, known), *_ = vlm._features._items.items()
    features = weakref.ref(known.features)
    del known
    assert features() is not None
    vlm.close()
    assert features() is None
