"""One answer as it comes: phases on a clock, tokens from the chooser, text in pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mpa_edge.errors import ModelError
from mpa_edge.runtime.choosing import Chooser, log_probability
from mpa_edge.runtime.prompts import TextStream, Turn
from mpa_edge.runtime.vlm import Answer, Decoding, Timings

if TYPE_CHECKING:
    from mpa_edge.runtime.bundle_vlm import BundleVlm
    from mpa_edge.runtime.look import Picture


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they come. `answer` is None until the iterator is exhausted.

    The model is locked while a piece is computed and free between two pieces. A question that is asked in between ends
    this stream: its next piece raises `ModelError`.
    """

    def __init__(self, vlm: BundleVlm, see: Callable[[], Picture], turns: Sequence[Turn], decoding: Decoding) -> None:
        """`see` gives the picture; what it takes counts as preprocessing."""
        self.answer: Answer | None = None
        self._vlm = vlm
        self._cancelled = False
        self._pieces = self._run(see, turns, decoding)

    def __next__(self) -> str:
        with self._vlm.lock:
            return next(self._pieces)

    def result(self) -> Answer:
        """Run to the end, with the model locked all the while, and return the answer."""
        with self._vlm.lock:
            for _ in self:
                pass
        if self.answer is None:
            raise ModelError(f"{self._vlm.name}: the stream broke off")
        return self.answer

    def cancel(self) -> None:
        """End the stream before its next token, without an answer. May be called from any thread."""
        self._cancelled = True

    def _run(self, see: Callable[[], Picture], turns: Sequence[Turn], decoding: Decoding) -> Iterator[str]:
        vlm, clock, choose = self._vlm, Clock(), Chooser(decoding)
        reader, stops = vlm.reader, vlm.bundle.prompt.stop_token_ids
        picture = see()
        prompt_tokens = vlm.tokens(turns, picture)
        prefix, rest = reader.split(prompt_tokens)
        clock.lap("preprocess")
        reader.encode(picture, prefix)
        clock.lap("vision")
        logits, cached = reader.read(picture, prefix, rest)
        turn, phase = reader.turn, "prefill"
        tokens: list[int] = []
        logprob, finish_reason = 0.0, "length"
        text = TextStream(vlm.prompts)
        for left in reversed(range(min(decoding.max_new_tokens, vlm.room(prompt_tokens)))):
            if self._cancelled:
                return
            token = choose(logits)
            logprob += log_probability(logits, token)
            clock.lap(phase)
            phase = "decode"
            if token in stops:
                finish_reason = "stop"
                break
            tokens.append(token)
            if piece := text.push(token):
                yield piece
                clock.restart()
            if left:
                logits = vlm.reader.next(turn, token)
        if piece := text.finish():
            yield piece
        self.answer = Answer(
            text=vlm.prompts.text(tokens),
            tokens=tuple(tokens),
            prompt_tokens=len(prompt_tokens),
            finish_reason=finish_reason,
            timings=clock.timings(),
            logprob=logprob,
            cached_tokens=cached,
        )


class Clock:
    """Milliseconds by phase; the time that a reader of the stream takes between two pieces is counted nowhere."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap to a phase."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + (now - self._last) * 1000
        self._last = now

    def restart(self) -> None:
        """Count the time since the last lap to no phase."""
        self._last = time.perf_counter()

    def timings(self) -> Timings:
        """The sums so far."""
        return Timings(**self._phases, total=sum(self._phases.values()))
