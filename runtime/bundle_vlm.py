"""A bundle that answers: prompts and pixels, one engine, and the choice of tokens, behind the `Vlm` interface."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from PIL.Image import Image
from tokenizers import Tokenizer

from mpa_edge.bundle import Bundle
from mpa_edge.errors import InputError, ModelError
from mpa_edge.runtime.answering import AnswerStream, Clock
from mpa_edge.runtime.engine import Engine, Logits
from mpa_edge.runtime.families import family_of_bundle
from mpa_edge.runtime.images import Source, open_image
from mpa_edge.runtime.look import Picture, Reader, View
from mpa_edge.runtime.prompts import Prompts, Turn
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding

Sources: TypeAlias = "list[Source] | tuple[Source, ...]"

# A tile's features take 0.25 MB in a model of SmolVLM-500M's size: some fifteen pictures of 17 tiles.
CACHE_MB = 64


class BundleVlm:
    """One loaded bundle.

    Threads may share it: one question is answered at a time, from its first step to its last, and the others wait.
    Only streams give the model free between two pieces, see `AnswerStream`. `close` waits for a running answer.

    The vision features of the last 32 pictures, up to `cache_mb` megabytes, and the last picture's place in the
    key-value cache are kept for further questions; answers are the same to the bit. 0 keeps nothing, so that every
    question takes its full time: benchmarks of latency want that.
    """

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer, *, cache_mb: int = CACHE_MB) -> None:
        self.bundle = bundle
        self.name = bundle.name
        self.engine: str = engine.name
        self.family = family_of_bundle(bundle)
        self.prompts = Prompts(tokenizer, bundle.prompt)
        self.lock = threading.RLock()
        self._engine: Engine | None = engine
        self._reader = Reader(engine, self.family, bundle.image, self.prompts.image_token_id, cache_mb * 1_000_000)

    def answer(self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        """See `Vlm.answer`; pairs are answered one after the other."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
        return [self._answer_or_error(image, prompt, decoding) for image, prompt in zip(images, prompts, strict=True)]

    def ask(
        self,
        image: Source | Sources,
        question: str,
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Answer a question about a picture, put with the task's question template.

        `image` is anything that `open_image` takes, or a list of such for a question about several pictures, which
        models that were trained on single ones may not be good at. Without `decoding` the answer is greedy and as
        long as the task has it, or `max_new_tokens`. Raises `ImageError` for a picture that cannot be used and
        `InputError` for a prompt that exceeds the context.
        """
        return self.stream(image, question, decoding, max_new_tokens=max_new_tokens).result()

    def ask_many(
        self,
        pairs: Iterable[tuple[Source | Sources, str]],
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """Answer (image, question) pairs in order, each as `ask` does; put questions about one picture side by side.

        A pair that `ask` would refuse gives an answer with `finish_reason="error"` and the reason in `error`.
        """
        answers = []
        for image, question in pairs:
            try:
                answers.append(self.ask(image, question, decoding, max_new_tokens=max_new_tokens))
            except InputError as error:
                answers.append(_refused(error))
        return answers

    def stream(
        self,
        image: Source | Sources,
        question: str,
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> AnswerStream:
        """Like `ask`, as an iterator of pieces of text; after the last one `.answer` holds the whole answer."""
        turns = [_turn(question, len(_listed(image)))]
        return self.chat(image, turns, decoding, max_new_tokens=max_new_tokens)

    def chat(
        self,
        image: Source | Sources,
        turns: Sequence[Turn],
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int | None = None,
        raw: bool = False,
    ) -> AnswerStream:
        """Like `stream`, for a conversation: turns with `pictures` show that many of `image`, the last one asks.

        The user's texts are put with the task's question template, unless `raw`. A conversation of several turns is
        something that models trained on single questions may not be good at.
        """
        images = _listed(image)
        shown = sum(turn.pictures for turn in turns)
        if not images or shown != len(images):
            raise InputError(f"the turns show {shown} pictures, {len(images)} are given")
        if not raw:
            turns = [replace(turn, text=self.put(turn.text)) if turn.role == "user" else turn for turn in turns]
        pictures = [open_image(source) for source in images]
        return AnswerStream(self, lambda: self.see(pictures), turns, self.decoding(decoding, max_new_tokens))

    def look(self, image: Source | Sources) -> View:
        """Encode and read a picture now, for any number of questions: `with vlm.look(image) as view: view.ask(…)`."""
        opened, clock = [open_image(source) for source in _listed(image)], Clock()
        with self.lock:
            picture = self.see(opened)
            picture.kept = True
            prefix, _ = self.reader.split(self.tokens([_turn("", len(opened))], picture))
            clock.lap("preprocess")
            self.reader.encode(picture, prefix)
            clock.lap("vision")
            self.reader.hold(picture, prefix)
            clock.lap("prefill")
        return View(self, picture, clock.timings())

    def put(self, question: str) -> str:
        """The question in the task's template."""
        return self.bundle.prompt.question_template.replace("{question}", question)

    def decoding(self, decoding: Decoding | None, max_new_tokens: int | None) -> Decoding:
        """How an answer is decoded where the caller leaves something open."""
        decoding = decoding or Decoding(max_new_tokens=self.bundle.prompt.max_new_tokens)
        return decoding if max_new_tokens is None else replace(decoding, max_new_tokens=max_new_tokens)

    def see(self, images: Sequence[Image]) -> Picture:
        """Upright RGB pictures as the model gets them."""
        return Picture(tuple(self.family.cut(image, self.bundle.image) for image in images))

    def tokens(self, turns: Sequence[Turn], picture: Picture) -> list[int]:
        """The token ids of the whole prompt; `InputError` when it leaves no room for an answer."""
        image, context = self.bundle.image, self.bundle.prompt.context_length
        seen = sum(self.family.image_tokens(cut.rows, cut.columns, image) for cut in picture.cuts)
        # What does not fit is not even written out: that could take memory without end.
        fits = seen < context and not self.prompts.exceeds(turns, context)
        tokens = self.prompts.conversation(turns, self._layouts(picture)) if fits else None
        if tokens is None or self.room(tokens) <= 0:
            taken = f"{len(tokens)} of {context}" if tokens else f"more than the {context}"
            raise InputError(
                f"the prompt takes {taken} tokens ({seen} of them image tokens) and leaves no room for an answer; ask "
                "a shorter question, or export with a smaller longest edge"
            )
        return tokens

    def room(self, tokens: Sequence[int]) -> int:
        """How many tokens the context still takes after this prompt."""
        return self.bundle.prompt.context_length - len(tokens)

    def prepare(self, images: Sequence[Image], prompt: str) -> tuple[list[int], Picture]:
        """The token ids of the whole prompt, image tokens included, and the pictures that those stand for.

        Raises `InputError` when the prompt leaves no room for an answer.
        """
        picture = self.see(images)
        return self.tokens([_turn(prompt, len(images))], picture), picture

    def logits(self, images: Sequence[Image], prompt: str, begun: Sequence[int] = ()) -> Logits:
        """Logits (positions, vocabulary) at every position of the prompt and of an answer that has `begun`, for
        comparison with another engine."""
        tokens, picture = self.prepare(images, prompt)
        with self.lock:
            return self.reader.read_all([*tokens, *begun], picture)

    @property
    def reader(self) -> Reader:
        """What reads prompts into the engine; `ModelError` once the model is closed."""
        if self._engine is None:
            raise ModelError(f"{self.name} is closed")
        return self._reader

    def forget(self, picture: Picture) -> None:
        """Let go of what was kept for a view."""
        self._reader.forget(picture)

    def describe(self) -> dict[str, Any]:
        """The bundle's identity: engine, quantization, digests of its files, image and prompt settings."""
        shaping = {"name", "family", "engine", "quantization", "image", "prompt"}
        told = self.bundle.model_dump(mode="json", include=shaping)
        return {**told, "files": {file.path: file.sha256 for file in self.bundle.files}}

    def close(self) -> None:
        """Release the engine's memory. Further questions raise `ModelError`."""
        with self.lock:
            if self._engine is not None:
                self._engine.close()
                self._reader.forget_all()
                self._engine = None

    def __enter__(self) -> BundleVlm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer_or_error(self, image: Image, prompt: str, decoding: Decoding) -> Answer:
        try:
            return AnswerStream(self, lambda: self.see([image]), [_turn(prompt)], decoding).result()
        except InputError as error:
            return _refused(error)

    def _layouts(self, picture: Picture) -> list[str]:
        image, token = self.bundle.image, self.bundle.prompt.image_token
        return [self.family.layout(cut.rows, cut.columns, token, image) for cut in picture.cuts]


def _listed(image: Source | Sources) -> Sequence[Source]:
    return image if isinstance(image, (list, tuple)) else [image]


def _turn(text: str, pictures: int = 1) -> Turn:
    return Turn("user", text, pictures=pictures)


def _refused(error: InputError) -> Answer:
    return Answer(text="", finish_reason="error", error=str(error))
