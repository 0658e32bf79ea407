"""What stays in memory when a bundle is opened and closed, and when it is asked: `python memory_program.py BUNDLE`.

Prints as JSON how many bytes the process's resident memory grew by in some openings and in some questions, each after a
warm-up.
"""

from __future__ import annotations

import gc
import json
import sys

from mpa_edge.benchmarks.host import resident_bytes
from mpa_edge.runtime import load
from mpa_edge.runtime.bundle_vlm import BundleVlm
from mpa_edge.runtime.selfcheck import picture

OPENINGS = (6, 12)
QUESTIONS = (50, 400)


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


def asked(vlm: BundleVlm, times: int) -> int:
    """Ask about pictures that change; what is held afterwards."""
    for number in range(times):
        vlm.ask(picture(number), f"What is number {number}?", max_new_tokens=2)
    return held()


def main(bundle: str) -> dict[str, int]:
    """The growth by `openings` and by `questions`."""
    before, after = (opened(bundle, times) for times in OPENINGS)
    with load(bundle, threads=1, cache_mb=0) as vlm:
        first, last = (asked(vlm, times) for times in QUESTIONS)
    return {"openings": after - before, "questions": last - first}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
