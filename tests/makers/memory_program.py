"""What stays in memory when a bundle is opened and closed, and when it is asked: `python memory_program.py BUNDLE
openings questions`.

Prints as JSON how many bytes the process's resident memory grew by in some openings and in some questions, or in one of
the two, each after a warm-up. What allocators keep for a while comes and goes by a megabyte: of each hundred questions
the least is taken that is held meanwhile. An engine's pool grows now and then by one step of megabytes, a leak as much
in each hundred: what counts is the median growth from one hundred to the next, as often as there was one.
"""

from __future__ import annotations

import gc
import json
import sys
from itertools import pairwise
from statistics import median

from mpa_edge.benchmarks.host import resident_bytes
from mpa_edge.runtime import load
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.selfcheck import picture

OPENINGS = (6, 12)
QUESTIONS = [range(start, start + 100) for start in range(0, 500, 100)]
EVERY = 20


def held() -> int:
    """Resident bytes without Python's own garbage."""
    gc.collect()
    return resident_bytes() or 0


def opened(bundle: str, times: int) -> int:
    """Open, ask and close; what is held afterwards."""
    for _ in range(times):
        with load(bundle, threads=1) as vlm:
            vlm.ask(picture(0), "What?", max_new_tokens=2)
    return held()


def asked(vlm: BundleVlm, numbers: range) -> int:
    """Ask about pictures that change; the least that is held meanwhile."""
    least = []
    for number in numbers:
        vlm.ask(picture(number), f"What is number {number}?", max_new_tokens=2)
        if number % EVERY == EVERY - 1:
            least.append(held())
    return min(least)


def main(bundle: str, *wanted: str) -> dict[str, int]:
    """The growth by what is wanted: `openings`, `questions`."""
    found = {}
    if "openings" in wanted:
        before, after = (opened(bundle, times) for times in OPENINGS)
        found["openings"] = after - before
    if "questions" in wanted:
        with load(bundle, threads=1, cache_mb=0) as vlm:
            least = [asked(vlm, numbers) for numbers in QUESTIONS]
        grown = [after - before for before, after in pairwise(least)]
        found["questions"] = round(median(grown) * len(grown))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
