"""A small labelled test set of coloured squares, for fakes that know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

KINDS = ("colour", "count", "reading")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions about 30 pictures: three kinds, two groups."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = []
    for number in range(30):
        Image.new("RGB", (16, 16 + 4 * (number % 2)), (8 * number, 100, 50)).save(folder / f"{number}.png")
        for part in ("top", "bottom"):
            rows.append(
                {
                    "id": f"{number}-{part}",
                    "image": f"{number}.png",
                    "question": f"What is at the {part}?",
                    "answers": [f"{part} {number}"],
                    "kind": KINDS[number % 3],
                    "group": "signs" if number < 20 else "charts",
                }
            )
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tiny_one_tile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF bundle of random weights."""
    from mpa_edge.benchmarks.runtime_bundles import write_bundles

    return write_bundles(tiny_one_tile, tmp_path_factory.mktemp("bundles"), {"gguf": ["f16"]})["gguf-f16"]
