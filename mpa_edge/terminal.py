"""Text from elsewhere (a file's name, a model's answer, what a server said) on a terminal: shown, never obeyed."""

from __future__ import annotations

import re

# Control characters but for tab and line feed, among them the one that begins a terminal's commands; those that turn
# the direction of writing, so that a name reads as another one; and halves of surrogate pairs, which cannot be written.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text with whatever a terminal would act on spelled out: `\x1b`, `\u202e`."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_one_line(text: str) -> str:
    r"""The same without line feeds: a file's name may hold some."""
    return shown(text).replace("\n", "\\n")
