"""A chat completion request of OpenAI's API, checked and reduced to what a bundle answers: a picture and some turns."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mpa_edge.errors import InputError
from mpa_edge.runtime.prompts import Turn
from mpa_edge.runtime.vlm import Decoding

# What would change the answer and is not done here is refused rather than ignored; the values that change nothing pass.
IDLE: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "stop": (None, [], ""),
    "logprobs": (None, False),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}

# Braces, brackets and commas of a body; each may become an object that takes hundreds of bytes.
MOST_ITEMS = 200_000


class ImageUrl(BaseModel):
    """Where a picture is."""

    url: str


class Part(BaseModel):
    """A piece of a message: text, or a picture (an object with a URL, or the bare URL that some clients send)."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | str | None = None


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def text(self) -> str:
        """The texts of its parts, a line each."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""

    def pictures(self) -> list[str]:
        """The URLs of its pictures."""
        parts = self.content if isinstance(self.content, list) else []
        urls = [part.image_url for part in parts if part.type == "image_url"]
        if None in urls:
            raise InputError("a part of type image_url has no image_url")
        return [url.url if isinstance(url, ImageUrl) else str(url) for url in urls]


class StreamOptions(BaseModel):
    """What a stream tells besides its text."""

    include_usage: bool = False


class ChatRequest(BaseModel, extra="allow"):
    """The body of POST /v1/chat/completions. Fields that are not named here are ignored, see `IDLE` for exceptions."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def decoding(self, max_new_tokens: int) -> Decoding:
        """Greedy unless a temperature is given; `max_new_tokens` where the client sets no limit.

        Without a seed, each sampled answer is another one.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return Decoding(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or max_new_tokens,
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            seed=abs(seed),
        )

    def conversation(self) -> tuple[str, list[Turn]]:
        """The one picture's URL and the turns. A picture that is attached again, the very same, counts once."""
        urls = list(dict.fromkeys(url for message in self.messages for url in message.pictures()))
        if len(urls) != 1:
            raise InputError(f"{len(urls)} pictures in the conversation: send one, as a part of type image_url")
        first = next(place for place, message in enumerate(self.messages) if message.pictures())
        turns = [
            Turn("system" if message.role == "developer" else message.role, message.text(), int(place == first))
            for place, message in enumerate(self.messages)
        ]
        if turns[-1].role != "user" or turns[first].role != "user":
            raise InputError("the picture and the last message must be the user's")
        return urls[0], turns


def parse(body: bytes) -> ChatRequest:
    """The request in a body; `InputError` names the field and what is wrong with it."""
    if sum(body.count(mark) for mark in (b"{", b"[", b",")) > MOST_ITEMS:
        raise InputError(f"body: it holds more than {MOST_ITEMS:,} items")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise InputError(f"{place}: {first['msg']}") from error
    for name, value in (request.model_extra or {}).items():
        if name in IDLE and value not in IDLE[name]:
            raise InputError(f"{name}: this server does not do that; leave it out")
    return request
