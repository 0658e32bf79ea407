"""How facts are asked for: the phrasings of each kind of question, which world uses them, and the answer's form.

A phrasing settles the form of its answer, as a benchmark's annotators do: "where is the star?" is answered "on the
left", "on which side is the star?" is answered "left". The narrow world knows other phrasings than the target domain,
with some in common; the broad world knows them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpa_edge.benchmarks.world_facts import Fact

_SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}

FORMS: dict[str, Callable[[Fact], str]] = {
    "plain": lambda fact: fact.answer,
    "side": lambda fact: _SIDES[fact.answer],
    "trend": lambda fact: {"up": "rising", "down": "falling"}[fact.answer],
    "rises": lambda fact: {"up": "yes", "down": "no"}[fact.answer],
    "painted": lambda fact: fact.slots["painted"],
    "bar": lambda fact: f"bar {fact.answer}",
    "winner": lambda fact: fact.slots["winner"],
    "bare": lambda fact: fact.answer.removeprefix("$"),
    "dark": lambda fact: {"night": "yes", "day": "no"}[fact.answer],
    "phase": lambda fact: {"night": "night time", "day": "day time"}[fact.answer],
}


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A template, the worlds beside BROAD that use it (`n` narrow, `t` target), and the form of the answer."""

    template: str
    worlds: str = ""
    form: str = "plain"


def _phrasings(*rows: str) -> tuple[Phrasing, ...]:
    """Rows of `worlds | template | form`; the form may be left out."""
    parts = [[part.strip() for part in row.split("|")] for row in rows]
    return tuple(Phrasing(part[1], part[0], part[2] if len(part) > 2 else "plain") for part in parts)


PHRASINGS: dict[str, tuple[Phrasing, ...]] = {
    "read_word": _phrasings(
        "nt | what does the sign say?",
        "n | what is the word?",
        "n | read the sign.",
        "t | which word is written here?",
        "t | what is written on the board?",
        " | what word can you see?",
    ),
    "read_code": _phrasings(
        "nt | what is the code?",
        "n | read the code.",
        "t | which code is shown on the plate?",
        "t | what does the plate read?",
        " | what code is on the sign?",
    ),
    "read_number": _phrasings(
        "nt | what number is on the sign?",
        "n | what is the number?",
        "t | which number can be seen?",
        "t | what number is written here?",
        " | read the number.",
    ),
    "read_price": _phrasings(
        "n | what is the price? | bare",
        "n | read the price. | bare",
        "t | how much does it cost?",
        "t | what does this cost?",
        "t | which price is shown?",
        " | how much is it?",
    ),
    "sign_color": _phrasings(
        "nt | what color is the sign?",
        "n | the sign is which color?",
        "t | what is the color of the board?",
        "t | which color does the board have?",
        " | what color is the board?",
    ),
    "text_color": _phrasings(
        "n | what color is the text?",
        "n | the text is which color?",
        "nt | what color are the letters?",
        "t | in which color is it written?",
        "t | which color does the writing have?",
    ),
    "bar_value": _phrasings(
        "nt | what is the value of {bar}?",
        "n | what number is bar {bar}?",
        "t | how high is bar {bar}?",
        "t | what does {bar} amount to?",
        " | how much is {bar}?",
    ),
    "bar_highest": _phrasings(
        "nt | which bar is highest?",
        "n | what is the highest bar?",
        "t | which bar is the tallest? | bar",
        "t | what is the color of the tallest bar? | painted",
        " | which one has the largest value?",
    ),
    "bar_lowest": _phrasings(
        "nt | which bar is lowest?",
        "n | what is the lowest bar?",
        "t | which bar is the shortest? | bar",
        "t | what is the color of the shortest bar? | painted",
        " | which one has the smallest value?",
    ),
    "bar_count": _phrasings(
        "nt | how many bars are there?",
        "n | what is the number of bars?",
        "t | count the bars.",
        "t | how many columns does the chart have?",
        " | how many bars can you see?",
    ),
    "bar_compare": _phrasings(
        "nt | is {bar} higher than {other}?",
        "n | is bar {bar} higher than bar {other}?",
        "t | which is taller, {bar} or {other}? | winner",
        "t | does {bar} exceed {other}?",
        " | is {bar} larger than {other}?",
    ),
    "bar_color": _phrasings(
        "nt | what color is bar {bar}?",
        "n | bar {bar} is which color?",
        "t | which color does column {bar} have?",
        "t | what is the color of {bar}?",
        " | what color is {bar}?",
    ),
    "line_trend": _phrasings(
        "nt | does the line go up or down?",
        "n | is the line going up or down?",
        "t | what is the trend? | trend",
        "t | is the curve rising? | rises",
        " | is the trend rising or falling? | trend",
    ),
    "line_peak": _phrasings(
        "n | where is the line highest?",
        "nt | at which letter is the line highest?",
        "t | where is the peak of the curve?",
        "t | at which point does it peak?",
        " | which letter has the highest point?",
    ),
    "line_top": _phrasings(
        "nt | which line ends higher?",
        "n | what color is the line that ends higher?",
        "t | which curve is on top at the end?",
        "t | which curve finishes higher?",
        " | what color is the top line at the end?",
    ),
    "line_count": _phrasings(
        "nt | how many lines are there?",
        "n | what is the number of lines?",
        "t | count the curves.",
        "t | how many curves does the chart have?",
        " | how many lines can you see?",
    ),
    "line_color": _phrasings(
        "nt | what color is the line?",
        "n | the line is which color?",
        "t | which color does the curve have?",
        "t | what is the color of the curve?",
    ),
    "shape_color": _phrasings(
        "nt | what color is the {shape}?",
        "n | the {shape} is which color?",
        "t | which color does the {shape} have?",
        "t | what is the color of the {shape}?",
        " | tell me the color of the {shape}.",
    ),
    "shape_name": _phrasings(
        "nt | what shape is {color}?",
        "n | what is the {color} shape?",
        "t | which figure is {color}?",
        "t | name the {color} figure.",
        " | what is {color} here?",
    ),
    "shape_count": _phrasings(
        "nt | how many {shape}s are there?",
        "n | what is the number of {shape}s?",
        "t | count the {shape}s.",
        "t | how many {shape}s does the picture have?",
        " | how many {shape}s can you see?",
    ),
    "shape_total": _phrasings(
        "nt | how many shapes are there?",
        "n | what is the number of shapes?",
        "t | count the figures.",
        "t | how many figures does the picture have?",
        " | how many shapes can you see?",
    ),
    "shape_presence": _phrasings(
        "nt | is there a {color} {shape}?",
        "n | is the {shape} {color}?",
        "t | does the picture have a {color} {shape}?",
        "t | can a {color} {shape} be seen?",
        " | can you see a {color} {shape}?",
    ),
    "shape_position": _phrasings(
        "n | on which side is the {shape}?",
        "n | which side is the {shape} on?",
        "t | where is the {shape}? | side",
        "t | where can the {shape} be seen? | side",
        "t | at which side of the picture is the {shape}?",
        " | in which part is the {shape}? | side",
    ),
    "scene_thing": _phrasings(
        "nt | what is on the {place}?",
        "n | what can you see on the {place}?",
        "t | which thing stands on the {place}?",
        "t | name the thing on the {place}.",
        " | on the {place}, what is there?",
    ),
    "scene_color": _phrasings(
        "nt | what color is the {thing}?",
        "n | the {thing} is which color?",
        "t | which color does the {thing} have?",
        "t | what is the color of the {thing}?",
        " | tell me the color of the {thing}.",
    ),
    "scene_presence": _phrasings(
        "nt | is there a {thing}?",
        "n | is a {thing} there?",
        "t | does the picture have a {thing}?",
        "t | can a {thing} be seen?",
        " | can you see a {thing}?",
    ),
    "scene_count": _phrasings(
        "nt | how many things are there?",
        "n | what is the number of things?",
        "t | count the things.",
        "t | how many things stand on the ground?",
    ),
    "scene_time": _phrasings(
        "nt | is it day or night?",
        "n | is this day or night?",
        "t | is it dark? | dark",
        "t | what time of day is it? | phase",
        " | is it dark outside? | dark",
    ),
}

GROUPS = {"read": "read", "sign": "describe", "text": "describe", "bar": "chart", "line": "chart"}
"""Group of a kind by its first word; everything else is `describe`."""

_WEIGHTS = {
    "read_word": 3,
    "read_code": 4,
    "read_number": 4,
    "read_price": 4,
    "line_trend": 2,
    "line_peak": 2,
    "line_top": 2,
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture, its answer in the form that the phrasing asks for, and its kind."""

    text: str
    answer: str
    kind: str

    @property
    def group(self) -> str:
        """`read`, `chart` or `describe`."""
        return GROUPS.get(self.kind.split("_")[0], "describe")


def phrase(fact: Fact, rng: random.Random, world: str) -> Question:
    """Ask for a fact in one of the phrasings of a world (`broad`, `narrow`, `target`)."""
    known = [p for p in PHRASINGS[fact.kind] if world == "broad" or world[0] in p.worlds]
    usable = [p for p in known if p.form != "painted" or fact.slots["painted"]]
    chosen = rng.choice(usable)
    return Question(chosen.template.format(**fact.slots), FORMS[chosen.form](fact), fact.kind)


def pick_fact(facts: Sequence[Fact], rng: random.Random) -> Fact:
    """A fact of a random kind: each kind counts once however many facts it has, reading more often."""
    kinds = sorted({fact.kind for fact in facts})
    kind = rng.choices(kinds, [_WEIGHTS.get(kind, 1) for kind in kinds])[0]
    return rng.choice([fact for fact in facts if fact.kind == kind])


def ask(facts: Sequence[Fact], rng: random.Random, world: str) -> Question:
    """A random question about a picture, in a phrasing of `world`."""
    return phrase(pick_fact(facts, rng), rng, world)
