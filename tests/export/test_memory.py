"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

import pytest

# In a process of its own: the heap of one that has done other things has room for all of this already.
PROGRAM = """
from pathlib import Path
from mpa_edge.export.memory import give_back_memory

def anonymous_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

before = anonymous_mb()
blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]
del blocks[:-1]  # the last, at the heap's end, keeps the others' room from going back by itself
kept = anonymous_mb()
give_back_memory()
print(kept - before, anonymous_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or ctypes.util.find_library("c") != "libc.so.6", reason="glibc only")
def test_what_is_freed_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    kept, left = map(float, done.stdout.split())
    assert kept > 150
    assert left < 30
