"""Memory does not grow with questions, and comes back on closing: each engine in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import memory_program
from mpa_edge.bundle import Bundle, write_bundle
from mpa_edge.export.to_onnx import to_onnx
from tiny_bundles import manifest_of

# Allocators keep up to 12 MB for later; twelve leaked openings of the reference student take 140. 400 leaked questions
# take 1.6 MB at the least: features are 4 kB a tile.
OPENING_BYTES, QUESTION_BYTES = 30_000_000, 1_000_000
PROGRAM = Path(memory_program.__file__)


def growth(bundle: Path, *wanted: str) -> dict[str, int]:
    command = [sys.executable, str(PROGRAM), str(bundle), *wanted]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_llamacpps_memory(served: tuple[Path, Bundle]) -> None:
    write_bundle(*served)
    check(growth(served[0], "openings", "questions"))


def test_onnx_runtimes_memory(tiny_idefics3: Path, onnx_graphs: Callable[[Path], Path], tmp_path: Path) -> None:
    files, checks = to_onnx(tiny_idefics3, tmp_path, "fp32", graphs=onnx_graphs(tiny_idefics3))
    write_bundle(tmp_path, manifest_of(tiny_idefics3, "onnxruntime", "fp32", files, checks=checks))
    check(growth(tmp_path, "openings", "questions"))


def test_openvinos_memory(tiny_idefics3: Path, openvino_bundle: Callable[[Path, str], Path]) -> None:
    """Of openings OpenVINO itself keeps something: half a megabyte of each `compile_model`, whatever is freed."""
    found = growth(openvino_bundle(tiny_idefics3, "fp32"), "questions")
    assert found["questions"] < QUESTION_BYTES


def check(found: dict[str, int]) -> None:
    assert found["openings"] < OPENING_BYTES
    assert found["questions"] < QUESTION_BYTES
