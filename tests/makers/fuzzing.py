"""How long the parsers are fuzzed: a moment in the suite, always the same one; as long as wanted by hand.

MPA_EDGE_FUZZ=20000 pytest tests/mpa_edge/test_fuzz.py      so many examples a parser, other ones each time
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mpa_edge.errors import MpaEdgeError

LONG = int(os.environ.get("MPA_EDGE_FUZZ", "0"))


def fuzzed(examples: int) -> Any:
    """The settings of a fuzz test that takes `examples` in the suite."""
    return settings(
        max_examples=LONG or examples,
        derandomize=not LONG,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refused_in_one_line(work: Callable[[], object], kind: type[MpaEdgeError]) -> None:
    """Do it; whatever it raises is an error of this kind, whose message is short."""
    said = ""
    try:
        work()
    except kind as error:
        said = str(error)
    assert len(said) < 2000


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


def places_of(tree: Any, place: tuple[Any, ...] = (), *, most: int | None = None) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value of a JSON tree, of lists to the first `most`; none lead to the tree itself."""
    yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:most]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places_of(value, (*place, key), most=most)


ODD = st.sampled_from([[], {}, "", 0, -1, 1e308, 10**30])


@st.composite
def other(draw: st.DrawFn, content: Any) -> Any:
    """JSON content in which one value is another one, or gone."""
    changed = json.loads(json.dumps(content))
    *above, last = draw(st.sampled_from([place for place in places_of(content) if place]))
    place = changed
    for key in above:
        place = place[key]
    if draw(st.booleans()):
        place[last] = draw(json_of(["a"], scalars | ODD))
    else:
        del place[last]
    return changed


def written(content: Any) -> st.SearchStrategy[bytes]:
    """A file of JSON content: one value is another one, or some bytes are."""
    return other(content).map(lambda tree: json.dumps(tree).encode()) | mutated(json.dumps(content).encode())
