"""A model without weights, so that a whole run can be rehearsed in seconds.

    fake:                              answers every question with a word drawn from the picture and the question
    fake:?known=test.jsonl&right=0.8   knows a labelled file and is right on 80% of it; which ones, `seed` decides
    fake:?vision=20&decode=5           takes 20 ms to see and 5 ms to write, for real
    fake:?refuse=0.01                  gives no answer to 1% of the questions
    fake:?broken=out+of+memory         cannot be opened, for the reason given
    fake:?die=0.01                     takes its process with it at 1% of the questions

Two fakes with one `seed` are right on nested sets of questions, as models of one family tend to be.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from mpa_edge.errors import InputError, ModelError
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Timings

PREFIX = "fake:"
WORDS = ("red", "blue", "three", "yes", "no", "left", "open", "12.50")
Known = Mapping[str, Mapping[str, str]]  # picture digest -> question -> answer


@dataclass(frozen=True)
class FakeSettings:
    """What a fake does. Shares lie in [0, 1], phases are milliseconds that really pass."""

    known: str = ""
    right: float = 1.0
    refuse: float = 0.0
    seed: int = 0
    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    broken: str = ""
    die: float = 0.0


@dataclass
class FakeVlm:
    """A `Vlm` whose answers depend on the picture, the prompt and the settings alone."""

    name: str = "fake"
    settings: FakeSettings = field(default_factory=FakeSettings)
    known: Known = field(default_factory=dict)
    engine: str = "fake"

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer one prompt per picture, in order."""
        return [self._answer(image, prompt, decoding) for image, prompt in zip(images, prompts, strict=True)]

    def describe(self) -> dict[str, Any]:
        """The settings that shape answers, and a digest of what is known."""
        known = hashlib.sha256(json.dumps(self.known, sort_keys=True).encode()).hexdigest()
        shaping = {name: value for name, value in vars(self.settings).items() if name != "die"}
        return {"engine": self.engine, **shaping, "known": known}

    def close(self) -> None:
        """Nothing to release."""

    def _answer(self, image: Image.Image, prompt: str, decoding: Decoding) -> Answer:
        started = time.perf_counter()
        phases = {
            phase: _pass(getattr(self.settings, phase)) for phase in ("preprocess", "vision", "prefill", "decode")
        }
        digest = picture_digest(image)
        key = (digest, prompt)
        timings = Timings(**phases, total=_since(started))
        if self._draw("die", key) < self.settings.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._draw("refuse", key) < self.settings.refuse:
            return Answer("", finish_reason="error", timings=timings, error="the fake refuses this one")
        text = self._right_answer(digest, prompt) if self._draw("right", key) < self.settings.right else ""
        text = text or WORDS[int(self._draw("word", key) * len(WORDS))]
        tokens = tuple(text.encode()[: decoding.max_new_tokens])
        return Answer(bytes(tokens).decode(errors="ignore"), tokens, len(prompt), timings=timings)

    def _right_answer(self, digest: str, prompt: str) -> str:
        """The answer to the longest known question that the prompt holds; tasks put other words around it."""
        known = self.known.get(digest, {})
        question = max((question for question in known if question in prompt), key=len, default="")
        return known.get(question, "")

    def _draw(self, what: str, key: tuple[str, str]) -> float:
        """A number in [0, 1) that this question always gets."""
        digest = hashlib.sha256(repr((self.settings.seed, what, key)).encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56


def open_fake(spec: str, *, name: str | None = None) -> FakeVlm:
    """The fake of a spec as above; `InputError` for a setting that is not there, `ModelError` where it is broken."""
    known_names = {name: type(value) for name, value in vars(FakeSettings()).items()}
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(spec.removeprefix(PREFIX).removeprefix("?"), keep_blank_values=True):
        if key not in known_names:
            raise InputError(f"{spec}: a fake has no setting {key!r}; known: {', '.join(known_names)}")
        try:
            settings[key] = known_names[key](value)
        except ValueError:
            raise InputError(f"{spec}: {key} must be a number, not {value!r}") from None
    fake = FakeVlm(name or "fake", FakeSettings(**settings))
    if fake.settings.broken:
        raise ModelError(f"{spec}: {fake.settings.broken}")
    if fake.settings.known:
        fake.known = read_known(Path(fake.settings.known))
    return fake


def read_known(path: Path) -> dict[str, dict[str, str]]:
    """The first answer of each row of a labelled JSONL file, by picture and question."""
    known: dict[str, dict[str, str]] = {}
    try:
        for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            digest = picture_digest(open_image(path.parent / row["image"]))
            known.setdefault(digest, {})[row["question"]] = row["answers"][0]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"fake:?known={path}: {error}") from error
    return known


def picture_digest(image: Image.Image) -> str:
    """Names a picture by its pixels."""
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()


def _pass(milliseconds: float) -> float:
    started = time.perf_counter()
    if milliseconds > 0:
        time.sleep(milliseconds / 1000)
    return _since(started)


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
