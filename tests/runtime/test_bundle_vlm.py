"""The loop around an engine: choice of tokens, stops, limits, streaming; with a small engine that plays a script."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import mpa_edge.runtime as runtime
from mpa_edge.bundle import Bundle, Source
from mpa_edge.errors import BundleError, ImageError, InputError, MissingExtra, ModelError
from mpa_edge.export.families import family_of, read_config
from mpa_edge.runtime.bundle_vlm import BundleVlm, Chooser
from mpa_edge.runtime.engine import Features, Logits, Tiles
from mpa_edge.runtime.vlm import Decoding, Timings, Vlm


class Script:
    """An engine that wants to say the same tokens whatever it is asked."""

    name = "script"

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self.tokens, self.vocabulary, self.place, self.closed = list(tokens), vocabulary, 0, False

    def encode(self, tiles: Tiles) -> Features:
        return np.zeros((len(tiles), 16, 4), np.float32)

    def prefill(self, token_ids: Sequence[int], features: Features, *, all_logits: bool = False) -> Logits:
        self.place = 0
        return self._next()

    def decode(self, token_id: int) -> Logits:
        return self._next()

    def close(self) -> None:
        self.closed = True

    def _next(self) -> Logits:
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.tokens[self.place]] = 5
        self.place += 1
        return logits


@pytest.fixture(scope="module")
def manifest(tiny_one_tile: Path) -> Bundle:
    from transformers import AutoProcessor

    config, processor = read_config(tiny_one_tile), AutoProcessor.from_pretrained(tiny_one_tile)
    family = family_of(config)
    return Bundle(
        name="script",
        family=family.name,
        engine="llama.cpp",
        quantization="f16",
        files=(),
        image=family.image_settings(config, processor),
        prompt=family.prompt_settings(config, processor, "Q: {question}", 6),
        source=Source(student="tiny", tool_version="0"),
    )


@pytest.fixture
def tokenizer(tiny_one_tile: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_one_tile / "tokenizer.json"))


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (40, 30), "red")


def scripted(manifest: Bundle, tokenizer: Tokenizer, text: str, *, stop: bool = True) -> BundleVlm:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    filler = [manifest.prompt.stop_token_ids[0]] if stop else [tokenizer.encode("a").ids[0]] * 2000
    return BundleVlm(manifest, Script([*tokens, *filler], tokenizer.get_vocab_size()), tokenizer)


def test_it_is_a_vlm(manifest: Bundle, tokenizer: Tokenizer) -> None:
    vlm = scripted(manifest, tokenizer, "red")
    assert isinstance(vlm, Vlm)
    assert (vlm.name, vlm.engine) == ("script", "script")


def test_an_answer_ends_at_the_stop_token(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    vlm = scripted(manifest, tokenizer, " red")
    answer = vlm.ask(image, "Which colour?", Decoding(max_new_tokens=50))
    assert (answer.text, answer.finish_reason) == ("red", "stop")
    assert list(answer.tokens) == tokenizer.encode(" red").ids
    assert answer.prompt_tokens == len(vlm.prepare(image, "Q: Which colour?")[0])


def test_an_answer_ends_at_the_limit(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    vlm = scripted(manifest, tokenizer, "", stop=False)
    answer = vlm.ask(image, "?")
    assert (len(answer.tokens), answer.finish_reason) == (6, "length")
    assert len(vlm.ask(image, "?", max_new_tokens=3).tokens) == 3
    assert vlm._engine.place == 3  # the last token is not evaluated for nothing


def test_the_stop_token_at_the_limit_still_counts(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    words = tokenizer.encode("red").ids
    answer = scripted(manifest, tokenizer, "red").ask(image, "?", Decoding(max_new_tokens=len(words) + 1))
    assert answer.finish_reason == "stop"


def test_no_new_tokens_at_all(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    assert scripted(manifest, tokenizer, "red").ask(image, "?", Decoding(max_new_tokens=0)).text == ""


def test_the_context_ends_an_answer(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    vlm = scripted(manifest, tokenizer, "", stop=False)
    answer = vlm.ask(image, "?", Decoding(max_new_tokens=5000))
    assert answer.prompt_tokens + len(answer.tokens) == manifest.prompt.context_length
    assert answer.finish_reason == "length"


def test_a_prompt_beyond_the_context_is_a_clear_error(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = scripted(manifest, tokenizer, "red")
    with pytest.raises(InputError, match="of 1024 tokens"):
        vlm.ask(image, "why? " * 1000)
    answers = vlm.answer([image, image], ["why? " * 1000, "short"])
    assert [answer.finish_reason for answer in answers] == ["error", "stop"]
    assert "1024" in str(answers[0].error)


def test_pieces_join_to_the_answer(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    vlm = scripted(manifest, tokenizer, " Straße 🦙\n\nzwei  ")
    stream = vlm.stream(image, "?", Decoding(max_new_tokens=80))
    assert stream.answer is None
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == "Straße 🦙\n\nzwei"
    assert len(pieces) > 3


def test_timings_are_by_phase(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    timings = scripted(manifest, tokenizer, "red").ask(image, "?").timings
    phases = [timings.preprocess, timings.vision, timings.prefill, timings.decode]
    assert all(phase >= 0 for phase in phases)
    assert timings.total == pytest.approx(sum(phases))


def test_timings_are_told_in_one_line() -> None:
    assert Timings(vision=8.04, total=20).line() == "vision 8.0 ms, total 20.0 ms"


def test_a_new_question_ends_an_open_stream(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    vlm = scripted(manifest, tokenizer, "one two three four")
    stream = vlm.stream(image, "?")
    next(stream)
    assert vlm.ask(image, "?").text
    with pytest.raises(ModelError, match="another question"):
        list(stream)


def test_a_closed_model_says_so(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    with scripted(manifest, tokenizer, "red") as vlm:
        engine = vlm._engine
    assert engine.closed
    vlm.close()
    with pytest.raises(ModelError, match="closed"):
        vlm.ask(image, "?")
    with pytest.raises(ModelError, match="closed"):
        vlm.answer([image], ["?"])


def test_a_bad_picture_is_an_image_error(manifest: Bundle, tokenizer: Tokenizer) -> None:
    with pytest.raises(ImageError):
        scripted(manifest, tokenizer, "red").ask(b"no picture", "?")


def test_lengths_must_match(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    with pytest.raises(ValueError, match="1 pictures"):
        scripted(manifest, tokenizer, "red").answer([image], [])


def test_describe_is_json_and_names_the_settings(manifest: Bundle, tokenizer: Tokenizer) -> None:
    told = scripted(manifest, tokenizer, "red").describe()
    assert told["image"]["tile_size"] == 64
    assert told["quantization"] == "f16"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        Chooser(Decoding())(np.full(5, bad, np.float32))


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    draws = [Chooser(Decoding(temperature=1.0, seed=seed))(logits) for seed in range(600)]
    shares = np.bincount(draws, minlength=3) / 600
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.07)
    assert draws == [Chooser(Decoding(temperature=1.0, seed=seed))(logits) for seed in range(600)]


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    drawn = {Chooser(Decoding(temperature=1.0, top_p=0.7, seed=seed))(logits) for seed in range(200)}
    assert drawn == {0, 1}
    assert {Chooser(Decoding(temperature=1.0, top_p=0.01, seed=s))(logits) for s in range(50)} == {0}


def test_a_low_temperature_is_greedy() -> None:
    logits = np.array([1.0, 1.2, 0.3], np.float32)
    assert {Chooser(Decoding(temperature=1e-3, seed=seed))(logits) for seed in range(50)} == {1}


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "llama_cpp", "onnxruntime")
    code = f"import sys, mpa_edge.runtime; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_exports_are_complete_and_sorted() -> None:
    assert list(runtime.__all__) == sorted(runtime.__all__)
    assert all(hasattr(runtime, name) for name in runtime.__all__)


def test_a_missing_engine_names_the_pip_line(manifest: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match=r'pip install "mpa-edge\[gguf\]"'):
        runtime.open_bundle(tmp_path, manifest)


def test_an_unknown_family_is_a_bundle_error(manifest: Bundle, tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="family 'later'"):
        BundleVlm(manifest.model_copy(update={"family": "later"}), Script([0], 5), tokenizer)


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime.usable_cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert runtime.usable_cores() >= 1


def test_a_file_that_is_no_tokenizer(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="no tokenizer"):
        runtime._tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "cores"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)]
)
def test_a_containers_quota_bounds_the_threads(content: str, cores: int | None, tmp_path: Path) -> None:
    from mpa_edge.runtime import _quota

    (tmp_path / "cpu.max").write_text(content)
    assert _quota(tmp_path / "cpu.max") == cores
    assert _quota(tmp_path / "gone") is None
