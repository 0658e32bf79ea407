"""What comes from elsewhere reaches a terminal as text."""

from __future__ import annotations

import pytest

from mpa_edge import edge
from mpa_edge.errors import InputError
from mpa_edge.progress import say
from mpa_edge.terminal import in_one_line, shown


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert shown("a\x1b[2J\x07b\u202ec\x9b1m\r") == r"a\x1b[2J\x07b\u202ec\x9b1m\r"
    assert shown("déjà vu 漢字 👩‍👩‍👧\n\tnext") == "déjà vu 漢字 👩‍👩‍👧\n\tnext"
    assert in_one_line("a\nb\x1b") == r"a\nb\x1b"


def test_a_hostile_name_reaches_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "no\x1b]0;owned\x07\nsuch\u202e.png"

    def fail() -> None:
        say(f"{hostile} comes first")
        raise InputError(f"{hostile}: unreadable")

    with pytest.raises(SystemExit):
        edge.run(fail)
    told = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\u202e"} & set(told)
    assert told.endswith("error: no\\x1b]0;owned\\x07\\nsuch\\u202e.png: unreadable\n")
