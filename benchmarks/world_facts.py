"""What the picture families share: a `Fact` that can be asked for, and the `Look` of a world."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fact:
    """Something true of a picture: the kind of question it answers, the answer, and the words to fill in."""

    kind: str
    answer: str
    slots: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """How the pictures of a world look.

    `spelled` is the share of words that are random letters, so that words cannot be known by heart; `ground` is drawn
    anew for every picture.
    """

    fonts: tuple[str, ...]
    advances: tuple[float, float]
    backgrounds: tuple[str, ...]
    grounds: tuple[str, ...]
    boards: tuple[str, ...]
    charts: tuple[str, ...]
    shapes: tuple[str, ...]
    things: tuple[str, ...]
    words: tuple[str, ...]
    noise: float
    spelled: float = 0.0
    ground: str = "white"
