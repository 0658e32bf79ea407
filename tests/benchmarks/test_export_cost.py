"""The cost of an export: what is measured, and that the models have the dimensions of the true ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mpa_edge.benchmarks.export_cost import OUT, QUANTS, watch
from mpa_edge.benchmarks.export_models import MODELS

linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells anonymous memory apart")

CODE = """
import mmap, subprocess, sys, time
print("map …")
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
total = sum(mapped[place] for place in range(0, len(mapped), 4096))
time.sleep(0.3)
print("map: 1.5 s")
print("make …")
mapped.close()
subprocess.run([sys.executable, "-c", "import time; made = b'x' * 80_000_000; time.sleep(0.5)"])
print("make: 2.5 s")
print("whole")
"""


@linux
def test_memory_is_told_by_step_and_kind_with_that_of_children(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * 60_000_000)
    found = watch([sys.executable, "-c", CODE, str(file)])
    mapped, made = found["steps"]["map"], found["steps"]["make"]
    assert mapped["rss"] > 60 > 30 > mapped["anonymous"]
    assert made["rss"] > made["anonymous"] > 80
    assert found["peak_mb"] == {kind: max(mapped[kind], made[kind]) for kind in ("rss", "anonymous")}
    assert (mapped["seconds"], made["seconds"], found["outcome"]) == (1.5, 2.5, "whole")


@pytest.mark.parametrize(("name", "weights"), [("smolvlm-500m", 507_482_304), ("qwen2-vl-2b", 2_208_985_600)])
def test_models_have_the_true_dimensions(name: str, weights: int) -> None:
    with torch.device("meta"):
        model, processor = MODELS[name]()
    assert sum(weight.numel() for weight in model.parameters()) == weights
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size


def test_the_result_tells_the_ratio_of_every_export() -> None:
    report = json.loads(OUT.read_bytes())
    assert report["ratios"].keys() == report["models"].keys() <= MODELS.keys()
    for name, model in report["models"].items():
        for format, made in model["exports"].items():
            assert made["quants"] == QUANTS[format]
            assert report["ratios"][name][format] == {
                kind: round(peak / model["source_mb"], 2) for kind, peak in made["peak_mb"].items()
            }
