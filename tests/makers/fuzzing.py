"""How long the parsers are fuzzed: a moment in the suite, always the same one; as long as wanted by hand.

MPA_EDGE_FUZZ=20000 pytest tests/mpa_edge/test_fuzz.py      so many examples a parser, other ones each time
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = int(os.environ.get("MPA_EDGE_FUZZ", "0"))


def fuzzed(examples: int) -> Any:
    """The settings of a fuzz test that takes `examples` in the suite."""
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


texts = st.text(max_size=40) | st.text(
    alphabet="<>|/\\\"'{}[]:,.?!-*#_ \n\r\t0123456789\x00\x1b\ud800é漢🦙QA", max_size=60
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts


def json_of(keys: list[str], values: st.SearchStrategy[Any] = scalars) -> st.SearchStrategy[Any]:
    """JSON values whose objects have some of these keys."""
    return st.recursive(
        values,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(keys) | texts, inner, max_size=6),
        max_leaves=20,
    )


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """A sound file with some of its bytes changed, cut out or doubled."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 16))
        content[place : place + length] = draw(
            st.binary(max_size=16) | st.just(bytes(content[place : place + length]) * 2)
        )
    return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])
