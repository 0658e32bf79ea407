"""Training batches of the reference pair: several questions per picture in one sequence.

A row is the picture's prefix followed by questions with answers, each of which sees the prefix and itself only, at the
positions that it would have alone. It computes the same as one sequence per question, without repeating the prefix.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mpa_edge.benchmarks.reference_models import IMAGE_TOKENS
from mpa_edge.benchmarks.world_facts import Fact
from mpa_edge.benchmarks.world_questions import Question, ask, phrase
from mpa_edge.tasks import task_named

ANNOTATE = task_named("reference").annotate_prompt


class Spelling:
    """Token pieces of the chat template, as the processor would give them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        marker = "<fake_token_around_image>"
        image = f"{marker}<global-img>{'<image>' * IMAGE_TOKENS}{marker}"
        self.prefix = self.encode(f"<|im_start|>User:{image}")
        self.middle = self.encode("<end_of_utterance>\nAssistant:")
        self.end = [tokenizer.eos_token_id]
        self.start = self.encode("<|im_start|>User:")
        self.cached = lru_cache(maxsize=100_000)(self.encode)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens are found in it and none are added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def exchange(self, prompt: str, reply: str) -> tuple[list[int], list[int]]:
        """A turn after the picture: its ids, and its labels (-100 up to the reply)."""
        asked = self.cached(prompt) + self.middle
        reply_ids = self.encode(f" {reply}") + self.end
        return asked + reply_ids, [-100] * len(asked) + reply_ids

    def text_only(self, text: str) -> tuple[list[int], list[int]]:
        """A text without a picture, to be read, not answered: its ids, and labels on the text."""
        ids = self.cached(text) + self.end
        return self.start + ids, [-100] * len(self.start) + ids


@dataclass(frozen=True, slots=True)
class Mix:
    """What a row holds: questions per picture, shares of annotator turns (always in the target domain's phrasings), of
    texts without the picture, and of questions about `HARD` kinds."""

    questions: int = 4
    annotate: float = 0.0
    text_only: float = 0.0
    hard: float = 0.0


HARD = ("bar_value", "bar_compare", "bar_color", "shape_count", "shape_presence", "read_code", "read_number")
"""Kinds that are learned last; a share `hard` of the questions is about them where the picture allows."""


@dataclass(slots=True)
class Item:
    """A turn of a row."""

    ids: list[int]
    labels: list[int]
    sees_picture: bool = True


def _study(facts: tuple[Fact, ...], rng: random.Random, world: str, hard: float) -> Question:
    """A question to train on: more often about hard kinds than the world asks them."""
    found = [fact for fact in facts if fact.kind in HARD]
    return phrase(rng.choice(found), rng, world) if found and rng.random() < hard else ask(facts, rng, world)


def make_items(facts: tuple[Fact, ...], world: str, spelling: Spelling, mix: Mix, rng: random.Random) -> list[Item]:
    """Random turns about a picture of `world`."""
    items = []
    for _ in range(mix.questions):
        draw = rng.random()
        if draw < mix.text_only:
            items.append(Item(*spelling.text_only(ask(facts, rng, "broad").text), sees_picture=False))
            continue
        writes = draw < mix.text_only + mix.annotate
        question = _study(facts, rng, "target" if writes else world, 0.0 if writes else mix.hard)
        if writes:
            items.append(Item(*spelling.exchange(ANNOTATE, f"Question: {question.text} Answer: {question.answer}")))
        else:
            items.append(Item(*spelling.exchange(question.text, question.answer)))
    return items


def pack(rows: list[list[Item]], spelling: Spelling) -> dict[str, torch.Tensor]:
    """Rows of items as `input_ids`, `labels`, `position_ids` and a boolean `mask` [batch, 1, length, length]."""
    prefix = len(spelling.prefix)
    length = prefix + max(sum(len(item.ids) for item in row) for row in rows)
    ids = torch.full((len(rows), length), spelling.tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    block = torch.full((len(rows), length), -1)  # which item a token belongs to; 0 is the prefix
    blind = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, :prefix] = torch.tensor(spelling.prefix)
        positions[index, :prefix] = torch.arange(prefix)
        block[index, :prefix] = 0
        at = prefix
        for number, item in enumerate(row, start=1):
            span = slice(at, at + len(item.ids))
            ids[index, span] = torch.tensor(item.ids)
            labels[index, span] = torch.tensor(item.labels)
            first = prefix if item.sees_picture else 0
            positions[index, span] = torch.arange(first, first + len(item.ids))
            block[index, span] = number
            blind[index, span] = not item.sees_picture
            at = span.stop
    same = block[:, :, None] == block[:, None, :]
    of_picture = (block == 0)[:, None, :] & ~blind[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "mask": ((same | of_picture) & causal)[:, None],
    }
