"""The one interface behind which every model stands: transformers, chat server, exported bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image


@dataclass(frozen=True)
class Timings:
    """Milliseconds by phase for one answer. None where the engine does not tell.

    `preprocess`: picture to pixels and prompt to tokens. `vision`: pixels to image features. `prefill`: the prompt,
    image tokens included, up to the logits of the first new token. `decode`: all further tokens.
    """

    preprocess: float | None = None
    vision: float | None = None
    prefill: float | None = None
    decode: float | None = None
    total: float | None = None

    def line(self) -> str:
        """The phases that are known, for people: `preprocess 1.2 ms, vision 8.0 ms, …, total 20.4 ms`."""
        known = ((phase.name, getattr(self, phase.name)) for phase in fields(self))
        return ", ".join(f"{name} {value:.1f} ms" for name, value in known if value is not None)


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` are the new token ids without the stop token; `finish_reason` is stop, length or error.

    `logprob` is the natural logarithm of the probability that the model gives to this very answer: the sum over the new
    tokens and the stop token that ended it, under the model's own distribution (temperature 1, whole vocabulary),
    however the tokens were chosen. None where the engine does not tell. `cached_tokens` of the `prompt_tokens` were
    held from an earlier question about the same picture and not read again.
    """

    text: str
    tokens: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    finish_reason: str = "stop"
    timings: Timings = field(default_factory=Timings)
    error: str | None = None
    logprob: float | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens. Temperature 0 is greedy; `seed` and `top_p` matter only above it."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Decoding()


@runtime_checkable
class Vlm(Protocol):
    """A model that answers questions about pictures.

    `name` says which model in a report's words, `engine` what runs it (`transformers`, `chat`, `llama.cpp`,
    `onnxruntime`).
    """

    name: str
    engine: str

    def answer(self, images: Sequence[Image], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        """Answer one prompt per picture, in order.

        `images` are RGB pictures as `mpa_edge.runtime.images.open_image` returns them, `prompts` the text of the
        user's turn (the model adds its chat template and image tokens). The two have one length. The result does not
        depend on how a caller batches. A pair that this model cannot answer gives `finish_reason="error"` with the
        reason in `error`; a model that cannot answer at all raises `ModelError`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What shapes the answers (model, revision, dtype, image settings, …), as JSON; goes into fingerprints."""
        ...

    def close(self) -> None:
        """Release the model's memory; the object is unusable afterwards."""
        ...
