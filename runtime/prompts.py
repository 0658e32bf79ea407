"""Questions to tokens and tokens to text, equal to the training processor's.

One difference is meant: text that the user typed never becomes a special token. `<image>` in a question is seven
characters, not a picture, and `<end_of_utterance>` does not end the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mpa_edge.bundle import PromptSettings, one_line
from mpa_edge.errors import BundleError, InputError

# A private-use character stands for the user's text while the template is rendered.
SLOT = "\ue000"
# Characters that a template may make of one conversation, whose texts and pictures are single characters and words.
MOST_RENDERED = 2**20
# Characters per token of the context that are looked at before a text is encoded as a whole.
LOOKED_AT = 8


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is user, assistant or system. Pictures stand before the text."""

    role: str
    text: str
    pictures: int = 0


class Prompts:
    """The prompts of one bundle. Thread-safe once built."""

    def __init__(self, tokenizer: Tokenizer, settings: PromptSettings) -> None:
        """Render the template once; `BundleError` when it cannot hold one picture and one question."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        # White space may be an added token and is no one's control token.
        added = tokenizer.get_added_tokens_decoder()
        self._added = frozenset(place for place, token in added.items() if token.content.strip())
        self._image_token = settings.image_token
        self.image_token_id = id_of(tokenizer, settings.image_token)
        self._settings = settings
        if unknown := [token for token in settings.begin_token_ids if tokenizer.id_to_token(token) is None]:
            raise BundleError(f"the tokenizer has no token {unknown[0]}, which the manifest puts before every prompt")
        # A template is slow to render and the same conversations come again, with other texts.
        self._frame = lru_cache(maxsize=64)(self._render)
        self._frame((("user", 1),))

    def tokens(self, text: str, layouts: Sequence[str]) -> list[int]:
        """The token ids of one turn: pictures and the user's text; see `conversation`."""
        return self.conversation([Turn("user", text, pictures=len(layouts))], layouts)

    def conversation(self, turns: Sequence[Turn], layouts: Sequence[str]) -> list[int]:
        """The token ids of several turns, up to where the answer begins.

        `layouts` hold what stands for each picture, in order (see `Family.layout`). Raises `InputError` for turns that
        the model's template refuses.
        """
        try:
            pieces, trims = self._frame(tuple((turn.role, turn.pictures) for turn in turns))
        except BundleError as error:
            raise InputError(f"the model cannot hold this conversation: {error}") from error
        texts = [turn.text.strip() if trim else turn.text for turn, trim in zip(turns, trims, strict=True)]
        pieces = self._with_pictures(pieces, layouts)
        ids = self._encode(_joined(pieces, texts))
        begin = list(self._settings.begin_token_ids)
        if self._added_tokens(ids) == self._added_tokens(self._encode(_joined(pieces, [SLOT] * len(texts)))):
            return begin + ids
        # A text holds, or forms with its surroundings, a special token: encode texts by themselves, as plain text.
        ids = self._encode(pieces[0])
        for text, piece in zip(texts, pieces[1:], strict=True):
            ids += [*self._plain.encode(text, add_special_tokens=False).ids, *self._encode(piece)]
        return begin + ids

    def exceeds(self, turns: Sequence[Turn], most: int) -> bool:
        """Whether the turns' texts are sure to take more than so many tokens. Looks at the beginning of long ones only:
        a megabyte takes ten seconds to encode."""
        text = "".join(turn.text for turn in turns)
        if len(text) <= LOOKED_AT * most:
            return False
        if len(text) > self._longest * most:
            return True
        begin = self._plain.encode(text[: LOOKED_AT * most], add_special_tokens=False).ids
        # Where it is cut, a token may fall into pieces.
        return len(begin) > most + self._longest

    def text(self, ids: Sequence[int]) -> str:
        """The answer that the new tokens spell, without special tokens and outer white space."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @cached_property
    def _longest(self) -> int:
        """Characters of the vocabulary's longest token; to look through all of them takes time that few texts need."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=False)), default=1)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer for texts that hold special tokens. Few do, and to make it takes as long as reading one."""
        return _without_added_tokens(self._tokenizer)

    def _with_pictures(self, pieces: Sequence[str], layouts: Sequence[str]) -> list[str]:
        """The template's pieces with each image token replaced by what stands for that picture."""
        left = iter(layouts)
        token = re.compile(re.escape(self._image_token))
        return [token.sub(lambda _: next(left), piece) for piece in pieces]

    def _render(self, turns: tuple[tuple[str, int], ...]) -> tuple[list[str], list[bool]]:
        """The rendered template around the texts of (role, pictures) turns, and which texts it trims."""
        messages = [
            {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": f" {SLOT} "}]}
            for role, pictures in turns
        ]
        try:
            rendered = _rendered(self._settings.chat_template, messages)
        except Exception as error:  # a template is a program, and may fail as one: division by zero, memory, recursion
            reason = one_line(str(error)) or type(error).__name__
            raise BundleError(f"the chat template cannot be rendered: {reason}") from error
        if rendered.count(SLOT) != len(turns) or rendered.count(self._image_token) != sum(count for _, count in turns):
            raise BundleError("the chat template does not hold each picture and each text once")
        slots = re.compile(f" {SLOT} |{SLOT}")
        return slots.split(rendered), [slot == SLOT for slot in slots.findall(rendered)]

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


class _Generation(Extension):
    """`{% generation %}`: transformers' mark around what the assistant said; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _joined(pieces: Sequence[str], texts: Sequence[str]) -> str:
    return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))


def _rendered(chat_template: str, messages: list[dict[str, Any]]) -> str:
    template, pieces, length = _environment().from_string(chat_template), [], 0
    for piece in template.generate(messages=messages, add_generation_prompt=True):
        length += len(piece)
        if length > MOST_RENDERED:
            raise jinja2.TemplateError(f"it makes more than {MOST_RENDERED} characters of one conversation")
        pieces.append(piece)
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates: a template is text from elsewhere and stays in the box."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`; `BundleError` where the file holds none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise BundleError(f"{path} is no tokenizer: {one_line(str(error))}") from error


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with no added token, special or not: everything is text to it. `BundleError` where that is
    none."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    # A post-processor may name special tokens that are gone now; nothing is added to a piece of text anyway.
    state["post_processor"] = None
    try:
        return Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the Rust side raises plain Exception, here where the file has a token twice
        raise BundleError(f"the tokenizer cannot do without its added tokens: {one_line(str(error))}") from error


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token; `BundleError` where the tokenizer has none."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise BundleError(f"the tokenizer has no token {token!r}")
    return int(number)
