"""Questions to tokens and tokens to text, equal to the training processor's.

One difference is meant: text that the user typed never becomes a special token. `<image>` in a question is seven
characters, not a picture, and `<end_of_utterance>` does not end the turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mpa_edge.bundle import PromptSettings
from mpa_edge.errors import BundleError

# A private-use character stands for the user's text while the template is rendered.
SLOT = "\ue000"

Layout = Callable[[int, int, str], str]


def idefics3_layout(rows: int, columns: int, tile: str) -> str:
    """What one picture is in the text: `tile` is the run of image tokens of one tile; the overview comes last.

    Source: `Idefics3Processor.replace_image_token` in transformers.
    """
    fake = "<fake_token_around_image>"
    overview = f"{fake}<global-img>{tile}{fake}"
    if rows == 0 and columns == 0:
        return overview
    grid = "".join(
        "".join(f"{fake}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return f"{grid}\n{overview}"


LAYOUTS: dict[str, Layout] = {"idefics3": idefics3_layout}


class Prompts:
    """The prompts of one bundle. Thread-safe once built."""

    def __init__(self, tokenizer: Tokenizer, settings: PromptSettings, family: str, tokens_per_tile: int) -> None:
        """Render the template once; `BundleError` when it cannot hold one picture and one question."""
        if family not in LAYOUTS:
            raise BundleError(f"family {family!r} is not known to this version; known: {', '.join(sorted(LAYOUTS))}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._plain = _without_added_tokens(tokenizer)
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        self._layout = LAYOUTS[family]
        self._tile = settings.image_token * tokens_per_tile
        self._image_token = settings.image_token
        self.image_token_id = _id_of(tokenizer, settings.image_token)
        self._head, self._tail, self._trims = _split_template(settings)

    def tokens(self, text: str, rows: int, columns: int) -> list[int]:
        """The token ids of one turn: a picture of rows x columns tiles (0 x 0: one tile) and the user's text."""
        text = text.strip() if self._trims else text
        picture = self._layout(rows, columns, self._tile)
        head, tail = (part.replace(self._image_token, picture) for part in (self._head, self._tail))
        ids = self._encode(head + text + tail)
        if self._added_tokens(ids) == self._added_tokens(self._encode(head + SLOT + tail)):
            return ids
        # The text holds, or forms with its surroundings, a special token: encode it by itself, as plain text.
        return [*self._encode(head), *self._plain.encode(text, add_special_tokens=False).ids, *self._encode(tail)]

    def text(self, ids: Sequence[int]) -> str:
        """The answer that the new tokens spell, without special tokens and outer white space."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _added_tokens(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._added]


class TextStream:
    """New tokens to pieces of text as soon as they are certain; the pieces together are the answer's text.

    Held back: an incomplete UTF-8 character, and white space that may turn out to be the answer's end.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self._ids.append(token)
        return self._new(self._prompts.text(self._ids).rstrip("\ufffd").rstrip())

    def finish(self) -> str:
        """What was held back."""
        return self._new(self._prompts.text(self._ids))

    def _new(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece


def _split_template(settings: PromptSettings) -> tuple[str, str, bool]:
    """The rendered turn before and after the user's text, and whether the template trims that text."""
    content = [{"type": "image"}, {"type": "text", "text": f" {SLOT} "}]
    try:
        turn = _environment().from_string(settings.chat_template)
        rendered = turn.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise BundleError(f"the chat template cannot be rendered: {error}") from error
    if rendered.count(SLOT) != 1 or rendered.count(settings.image_token) != 1:
        raise BundleError("the chat template does not hold one picture and the user's text, each once")
    trims = f" {SLOT} " not in rendered
    head, tail = rendered.split(SLOT if trims else f" {SLOT} ")
    return head, tail, trims


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates: a template is text from elsewhere and stays in the box."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with no added token, special or not: everything is text to it."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    # A post-processor may name special tokens that are gone now; nothing is added to a piece of text anyway.
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise BundleError(f"the tokenizer has no token {token!r}")
    return int(number)
