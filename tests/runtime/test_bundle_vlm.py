"""The loop around an engine: choice of tokens, stops, limits, streaming; with a small engine that plays a script."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import mpa_edge.runtime as runtime
from mpa_edge.bundle import Bundle
from mpa_edge.errors import BundleError, ImageError, InputError, MissingExtra, ModelError
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.engine import Features, Logits
from mpa_edge.runtime.families import Cut
from mpa_edge.runtime.look import MOST_PICTURES, FeatureCache
from mpa_edge.runtime.prompts import Turn
from mpa_edge.runtime.vlm import Decoding, Timings, Vlm
from tiny_bundles import manifest_of


class Script:
    """An engine that wants to say the same tokens whatever it is asked."""

    name = "script"

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self.tokens, self.vocabulary, self.place, self.closed = list(tokens), vocabulary, 0, False
        self.encoded = 0

    def encode(self, cut: Cut) -> Features:
        self.encoded += 1
        return np.zeros((len(cut.tiles) * 16, 4), np.float32)

    def prefill(
        self, token_ids: Sequence[int], features: Features, positions: Any = None, *, all_logits: bool = False
    ) -> Logits:
        self.place = 0
        return np.zeros((len(token_ids) if all_logits else 1, self.vocabulary), np.float32)[-1]

    def extend(self, token_ids: Sequence[int]) -> Logits:
        return self._next()

    def mark(self) -> None:
        pass

    def rewind(self) -> bool:
        self.place = 0
        return True

    def close(self) -> None:
        self.closed = True

    def _next(self) -> Logits:
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.tokens[self.place]] = 5
        self.place += 1
        return logits


@pytest.fixture(scope="module")
def manifest(tiny_one_tile: Path) -> Bundle:
    return manifest_of(tiny_one_tile, "llama.cpp", "f16", name="script", template="Q: {question}", tokens=6)


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
    assert answer.prompt_tokens == len(vlm.prepare([image], "Q: Which colour?")[0])


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


def test_many_pairs_are_answered_in_order_and_a_bad_one_spoils_no_other(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = scripted(manifest, tokenizer, "red")
    answers = vlm.ask_many([(image, "?"), (b"no picture", "?"), (image, "why? " * 1000), (np.asarray(image), "?")])
    assert [answer.finish_reason for answer in answers] == ["stop", "error", "error", "stop"]
    assert "unreadable" in str(answers[1].error)
    assert vlm.ask_many([(image, "?")], max_new_tokens=1)[0].finish_reason == "length"


def test_the_log_probability_is_that_of_the_whole_answer_with_its_end(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    """The script's logits are 5 for the chosen token and 0 for all others."""
    each = 5 - np.log(np.exp(5) + tokenizer.get_vocab_size() - 1)
    vlm = scripted(manifest, tokenizer, "red")
    for limit, counted in ((50, 1), (1, 0)):
        answer = vlm.ask(image, "?", max_new_tokens=limit)
        assert answer.logprob == pytest.approx((len(answer.tokens) + counted) * each, abs=1e-5)


class Slow(Script):
    """Notices two callers at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inside = self.clashes = 0

    def extend(self, token_ids: Sequence[int]) -> Logits:
        self.clashes += self.inside
        self.inside += 1
        time.sleep(0.001)
        self.inside -= 1
        return super().extend(token_ids)


def test_threads_may_share_a_model(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    tokens = [*tokenizer.encode("one two three").ids, manifest.prompt.stop_token_ids[0]]
    engine = Slow(tokens, tokenizer.get_vocab_size())
    with BundleVlm(manifest, engine, tokenizer) as vlm, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(vlm.ask, image, "?", max_new_tokens=50) for _ in range(40)]
        assert {answer.result().text for answer in asked} == {"one two three"}
    assert engine.clashes == 0


def test_closing_waits_for_the_answer_that_runs(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    engine = Slow([tokenizer.encode("a").ids[0]] * 200, tokenizer.get_vocab_size())
    vlm = BundleVlm(manifest, engine, tokenizer)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(vlm.ask, image, "?", max_new_tokens=100)
        while not engine.place:
            time.sleep(0.001)
        vlm.close()
        assert len(asked.result().tokens) == 100


def test_a_second_question_encodes_nothing_and_reads_only_itself(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = scripted(manifest, tokenizer, "red")
    first, second = vlm.ask(image, "What?"), vlm.ask(np.asarray(image), "And what else?")
    assert (vlm._engine.encoded, first.cached_tokens) == (1, 0)
    assert 16 < second.cached_tokens < second.prompt_tokens
    other = Image.new("RGB", (40, 30), "blue")
    assert vlm.ask(other, "What?").cached_tokens == 0
    # Back at the first picture: its place in the cache is gone, its features are not.
    assert vlm.ask(image, "What?").cached_tokens == 0
    assert vlm._engine.encoded == 2


def test_without_a_cache_every_question_takes_its_full_time(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = BundleVlm(manifest, Script(tokenizer.encode("a b c d e f g").ids, 500), tokenizer, cache_mb=0)
    assert [vlm.ask(image, "?").cached_tokens for _ in range(3)] == [0, 0, 0]
    assert vlm._engine.encoded == 3
    with vlm.look(image) as view:
        assert view.ask("?").cached_tokens > 16
        vlm.ask(Image.new("RGB", (9, 9)), "?")
        assert view.ask("?").cached_tokens == 0  # read again, not encoded again
    assert vlm._engine.encoded == 5
    assert vlm.ask(image, "?").cached_tokens == 0
    with pytest.raises(ModelError, match="view"):
        view.ask("?")


def test_a_look_says_what_it_took_and_ends_an_open_stream(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = scripted(manifest, tokenizer, "one two three")
    stream = vlm.stream(Image.new("RGB", (9, 9)), "?")
    next(stream)
    with vlm.look(image) as view:
        assert view.timings.vision is not None
        assert view.timings.decode is None
        with pytest.raises(ModelError, match="another question"):
            list(stream)
        assert "".join(view.stream("?", max_new_tokens=50)) == "one two three"
    with pytest.raises(ImageError):
        vlm.look(b"no picture")


def test_a_conversation_holds_one_picture_and_reads_it_once(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = scripted(manifest, tokenizer, "red")
    turns = [Turn("user", "Which colour?", pictures=1)]
    first = vlm.chat(image, turns).result()
    assert first == replace(vlm.ask(image, "Which colour?"), timings=first.timings, cached_tokens=0)
    second = vlm.chat(image, [*turns, Turn("assistant", first.text), Turn("user", "And the frame?")]).result()
    assert second.cached_tokens > 16
    assert second.prompt_tokens > first.prompt_tokens
    assert vlm.chat(image, turns, raw=True).result().prompt_tokens < first.prompt_tokens
    for wrong in ([Turn("user", "What?")], [*turns, *turns]):
        with pytest.raises(InputError, match="picture"):
            vlm.chat(image, wrong)


def test_a_cancelled_stream_ends_without_an_answer(manifest: Bundle, tokenizer: Tokenizer, image: Image.Image) -> None:
    vlm = scripted(manifest, tokenizer, "", stop=False)
    stream = vlm.stream(image, "?", max_new_tokens=500)
    next(stream)
    stream.cancel()
    assert list(stream) == []
    assert (stream.answer, vlm._engine.place) == (None, 2)
    with pytest.raises(ModelError, match="broke off"):
        stream.result()


def test_an_engine_that_cannot_go_back_reads_anew(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = scripted(manifest, tokenizer, "red")
    monkeypatch.setattr(Script, "rewind", lambda self: False)
    answers = [vlm.ask(image, "?") for _ in range(3)]
    assert [answer.cached_tokens for answer in answers] == [0, 0, 0]
    assert {answer.text for answer in answers} == {"red"}


def test_the_feature_cache_is_bounded_in_bytes() -> None:
    cache = FeatureCache(100)
    row = np.zeros(10, np.float32)  # 40 bytes
    cache.put(b"a", row)
    cache.put(b"b", row)
    cache.get(b"a")
    cache.put(b"c", row)
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    cache.put(b"huge", np.zeros(1000, np.float32))
    assert cache.get(b"huge") is None
    assert cache.bytes == 80


def test_the_feature_cache_holds_the_last_pictures_only() -> None:
    cache, row = FeatureCache(10**9), np.zeros(1, np.float32)
    for number in range(MOST_PICTURES + 3):
        cache.put(bytes([number]), row)
    assert [cache.get(bytes([number])) is not None for number in range(5)] == [False, False, False, True, True]
    assert cache.bytes == MOST_PICTURES * row.nbytes


def test_describe_is_json_and_names_the_settings(manifest: Bundle, tokenizer: Tokenizer) -> None:
    told = scripted(manifest, tokenizer, "red").describe()
    assert told["image"]["tile_size"] == 64
    assert told["quantization"] == "f16"


def test_a_missing_engine_names_the_pip_line(manifest: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match=r'pip install "mpa-edge\[gguf\]"'):
        runtime.open_bundle(tmp_path, manifest)


def test_an_unknown_family_is_a_bundle_error(manifest: Bundle, tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="family 'later'"):
        BundleVlm(manifest.model_copy(update={"family": "later"}), Script([0], 5), tokenizer)


def with_tile_tokens(manifest: Bundle, tokens: int) -> Bundle:
    return manifest.model_copy(update={"image": manifest.image.model_copy(update={"tokens_per_tile": tokens})})


def test_pictures_beyond_the_context_are_not_even_written_out(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image
) -> None:
    vlm = scripted(with_tile_tokens(manifest, 65536), tokenizer, "red")
    reason = r"takes more than the 1024 tokens \(65536 of them image tokens\)"
    with pytest.raises(InputError, match=reason):
        vlm.ask(image, "?")
    with pytest.raises(InputError, match=reason):
        vlm.look(image)
    assert vlm._engine.encoded == 0


def test_features_must_be_as_many_as_the_manifest_says(
    manifest: Bundle, tokenizer: Tokenizer, image: Image.Image, picture: Any
) -> None:
    """Whatever the engine: the script gives 16 for a tile."""
    vlm = scripted(with_tile_tokens(manifest, 8), tokenizer, "red")
    with pytest.raises(BundleError, match="gives 16 image features where 8 are needed; it does not belong"):
        vlm.ask(picture(40, 30), "?")
    with pytest.raises(InputError, match=r"gives 16 image features where 8 are needed; .* taken for padding"):
        vlm.ask(image, "?")
