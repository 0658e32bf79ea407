"""A bundle that answers: prompts and pixels, one engine, and the choice of tokens, behind the `Vlm` interface."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL.Image import Image
from tokenizers import Tokenizer

from mpa_edge.bundle import Bundle
from mpa_edge.errors import InputError, ModelError
from mpa_edge.runtime.engine import Engine, Features, Logits, Tiles
from mpa_edge.runtime.images import Source, open_image, tiles_of
from mpa_edge.runtime.prompts import Prompts, TextStream
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Timings


class BundleVlm:
    """One loaded bundle. Not thread-safe: one question at a time; a new question ends an unfinished stream."""

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self.name = bundle.name
        self.engine: str = engine.name
        self.prompts = Prompts(tokenizer, bundle.prompt, bundle.family, bundle.image.tokens_per_tile)
        self._engine: Engine | None = engine
        self._turn = 0

    def answer(self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        """See `Vlm.answer`; pairs are answered one after the other."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
        return [self._answer_or_error(image, prompt, decoding) for image, prompt in zip(images, prompts, strict=True)]

    def ask(
        self,
        image: Source,
        question: str,
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Answer a question about a picture, put with the task's question template.

        `image` is anything that `open_image` takes. Without `decoding` the answer is greedy and as long as the task
        has it, or `max_new_tokens`. Raises `ImageError` for a picture that cannot be used and `InputError` for a prompt
        that exceeds the context.
        """
        return self.stream(image, question, decoding, max_new_tokens=max_new_tokens).result()

    def stream(
        self,
        image: Source,
        question: str,
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> AnswerStream:
        """Like `ask`, as an iterator of pieces of text; after the last one `.answer` holds the whole answer."""
        prompt = self.bundle.prompt.question_template.replace("{question}", question)
        decoding = decoding or Decoding(max_new_tokens=self.bundle.prompt.max_new_tokens)
        if max_new_tokens is not None:
            decoding = replace(decoding, max_new_tokens=max_new_tokens)
        return AnswerStream(self, open_image(image), prompt, decoding)

    def prepare(self, image: Image, prompt: str) -> tuple[list[int], Tiles]:
        """The token ids of the whole prompt, image tokens included, and the tiles that those stand for.

        Raises `InputError` when the prompt leaves no room for an answer.
        """
        tiles, rows, columns = tiles_of(image, self.bundle.image)
        tokens = self.prompts.tokens(prompt, rows, columns)
        context = self.bundle.prompt.context_length
        if len(tokens) >= context:
            raise InputError(
                f"the prompt takes {len(tokens)} of {context} tokens ({len(tiles)} tiles of "
                f"{self.bundle.image.tokens_per_tile}) and leaves no room for an answer; ask a shorter question, "
                "or export with a smaller longest edge"
            )
        return tokens, tiles

    def logits(self, image: Image, prompt: str) -> Logits:
        """Logits (positions, vocabulary) at every position of the prompt, for comparison with another engine."""
        tokens, tiles = self.prepare(image, prompt)
        engine = self._open_engine()
        self._turn += 1
        return engine.prefill(tokens, engine.encode(tiles), all_logits=True)

    def describe(self) -> dict[str, Any]:
        """The bundle's identity: engine, quantization, digests of its files, image and prompt settings."""
        shaping = {"name", "family", "engine", "quantization", "image", "prompt"}
        told = self.bundle.model_dump(mode="json", include=shaping)
        return {**told, "files": {file.path: file.sha256 for file in self.bundle.files}}

    def close(self) -> None:
        """Release the engine's memory. Further questions raise `ModelError`."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> BundleVlm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer_or_error(self, image: Image, prompt: str, decoding: Decoding) -> Answer:
        self._open_engine()
        try:
            return AnswerStream(self, image, prompt, decoding).result()
        except InputError as error:
            return Answer(text="", finish_reason="error", error=str(error))

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise ModelError(f"{self.name} is closed")
        return self._engine

    def _steps(self, features: Features, tokens: Sequence[int], decoding: Decoding) -> Iterator[int]:
        """Prefill (before the first yield), then new tokens; a stop token is yielded too and ends the iteration."""
        engine = self._open_engine()
        self._turn = turn = self._turn + 1
        choose = Chooser(decoding)
        logits = engine.prefill(tokens, features)
        room = self.bundle.prompt.context_length - len(tokens)
        for left in reversed(range(min(decoding.max_new_tokens, room))):
            token = choose(logits)
            yield token
            if self._turn != turn:
                raise ModelError(f"{self.name}: another question was asked before this stream ended")
            if left == 0 or token in self.bundle.prompt.stop_token_ids:
                return
            logits = self._open_engine().decode(token)


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they come. `answer` is None until the iterator is exhausted."""

    def __init__(self, vlm: BundleVlm, image: Image, prompt: str, decoding: Decoding) -> None:
        self.answer: Answer | None = None
        self._vlm = vlm
        self._pieces = self._run(image, prompt, decoding)

    def __next__(self) -> str:
        return next(self._pieces)

    def result(self) -> Answer:
        """Run to the end and return the answer."""
        for _ in self:
            pass
        if self.answer is None:
            raise ModelError(f"{self._vlm.name}: the stream broke off")
        return self.answer

    def _run(self, image: Image, prompt: str, decoding: Decoding) -> Iterator[str]:
        vlm, clock = self._vlm, _Clock()
        prompt_tokens, tiles = vlm.prepare(image, prompt)
        clock.lap("preprocess")
        features = vlm._open_engine().encode(tiles)
        clock.lap("vision")
        tokens: list[int] = []
        text = TextStream(vlm.prompts)
        finish_reason = "length"
        for token in vlm._steps(features, prompt_tokens, decoding):
            clock.lap("decode" if clock.has("prefill") else "prefill")
            if token in vlm.bundle.prompt.stop_token_ids:
                finish_reason = "stop"
                break
            tokens.append(token)
            if piece := text.push(token):
                yield piece
                clock.restart()
        if piece := text.finish():
            yield piece
        self.answer = Answer(
            text=vlm.prompts.text(tokens),
            tokens=tuple(tokens),
            prompt_tokens=len(prompt_tokens),
            finish_reason=finish_reason,
            timings=clock.timings(),
        )


class Chooser:
    """Logits to a token: greedy at temperature 0, else nucleus sampling with its own seeded generator."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._random = np.random.default_rng(decoding.seed)

    def __call__(self, logits: Logits) -> int:
        """The chosen token of logits (vocabulary,). Raises `ModelError` when they are not numbers."""
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise ModelError("the engine's logits are not finite: the weights, or their quantization, are broken")
        if self._decoding.temperature <= 0:
            return best
        scaled = logits.astype(np.float64) / self._decoding.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        # The smallest set whose mass reaches top_p; the token that crosses the line belongs to it.
        kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), self._decoding.top_p)) + 1]
        return int(self._random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


class _Clock:
    """Milliseconds by phase; the time that a reader of the stream takes between two pieces is counted nowhere."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + (now - self._last) * 1000
        self._last = now

    def restart(self) -> None:
        self._last = time.perf_counter()

    def has(self, phase: str) -> bool:
        return phase in self._phases

    def timings(self) -> Timings:
        return Timings(**self._phases, total=sum(self._phases.values()))
