"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes.util
import sys
from pathlib import Path

import pytest

from mpa_edge.export.memory import give_back_memory


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux" or ctypes.util.find_library("c") != "libc.so.6", reason="glibc only")
def test_what_is_freed_goes_back() -> None:
    before = anonymous_mb()
    blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]
    del blocks[:-1]  # the last, at the heap's end, keeps the others' room from going back by itself
    assert anonymous_mb() > before + 150
    give_back_memory()
    assert anonymous_mb() < before + 30
