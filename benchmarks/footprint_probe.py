"""What a bundle takes in an environment: imports, loading, memory, and what got imported. It needs the light install
only, and imports nothing itself that could spoil the figures.

    python -m mpa_edge.benchmarks.footprint_probe BUNDLE PICTURE      one JSON object
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any

QUESTION = "what is written on the sign?"
# Nothing of this belongs on a device.
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "onnx", "gguf")


def probe(bundle: str, picture: str) -> dict[str, Any]:
    """Seconds of each step and the resident memory after it, in megabytes of 1,000,000 bytes; `heavy` names the
    training side's modules that are loaded at the end."""
    seconds: dict[str, float] = {}
    rss_mb: dict[str, float | None] = {}
    last = time.perf_counter()

    def done(step: str) -> None:
        nonlocal last
        seconds[step] = round(time.perf_counter() - last, 4)
        from mpa_edge.benchmarks.host import resident_bytes

        held = resident_bytes()
        rss_mb[step] = None if held is None else round(held / 1e6, 1)
        last = time.perf_counter()

    runtime = import_module("mpa_edge.runtime")
    done("import")
    from pathlib import Path

    from mpa_edge.bundle import read_bundle

    library = runtime.ENGINES[read_bundle(Path(bundle)).engine][1]
    last = time.perf_counter()
    import_module(library)
    done("import_engine")
    with runtime.load(bundle) as vlm:
        done("load")
        vlm.ask(picture, QUESTION)
        done("answer")
    return {"seconds": seconds, "rss_mb": rss_mb, "heavy": sorted(set(HEAVY) & sys.modules.keys())}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(sys.argv[1], sys.argv[2])) + "\n")
