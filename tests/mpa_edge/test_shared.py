"""Why pictures are shared with a test, kept on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzzed, mutated
from mpa_edge.shared import Shared, read_cache, write_cache

FOUND = {"b": "the same file as x", "a": "a near-duplicate of é (distance 0.010)"}


def test_it_is_a_dictionary() -> None:
    shared = Shared(FOUND.items())
    assert dict(shared) == dict(shared.rows()) == FOUND
    assert (len(shared), "a" in shared, "c" in shared) == (2, True, False)
    shared.add([("c", "late")])
    assert len(shared) == 3


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "shared.jsonl"
    write_cache(path, "k", Shared(FOUND.items()))
    return path


def test_it_is_kept_under_its_key(kept: Path) -> None:
    found = read_cache(kept, "k")
    assert found is not None
    assert dict(found) == FOUND
    assert read_cache(kept, "other") is None
    assert read_cache(kept.with_name("none"), "k") is None


def test_a_file_that_breaks_off_is_none(kept: Path) -> None:
    whole, other = kept.read_bytes(), kept.with_name("other")
    for end in range(len(whole) - 1):
        other.write_bytes(whole[:end])
        assert read_cache(other, "k") is None
    other.write_bytes(whole + b"\n")
    assert read_cache(other, "k") is None
    other.write_text('{"key": "k", "shared": {"a": "an older version"}}')
    assert read_cache(other, "k") is None


@fuzzed(40)
@given(st.data())
def test_a_damaged_file_is_read_or_none(kept: Path, data: st.DataObject) -> None:
    other = kept.with_name("damaged")
    other.write_bytes(data.draw(mutated(kept.read_bytes())))
    assert len(read_cache(other, "k") or {}) <= 2


MANY = """
import resource, sys
from pathlib import Path
from mpa_edge.shared import Shared, read_cache, write_cache

def grown(count):
    shared = Shared((f"{n:016x}", f"a near-duplicate of /test/{n}.jpg (distance 0.010)") for n in range(count))
    write_cache(Path(sys.argv[1]), "k", shared)
    assert len(read_cache(Path(sys.argv[1]), "k")) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(grown(100), grown(100_000))
"""


def test_memory_does_not_grow_with_it(tmp_path: Path) -> None:
    """As a dictionary, and as one JSON text, these would take 40 MB."""
    done = subprocess.run([sys.executable, "-c", MANY, tmp_path / "kept"], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many < 1.3 * few
