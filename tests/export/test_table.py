"""The table of families: what it says is what the code knows, and what the README shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from mpa_edge.errors import InputError
from mpa_edge.export.families import FAMILIES
from mpa_edge.export.onnx_readme import UNKNOWN_TO_JS
from mpa_edge.export.quants import DEFAULTS, QUANTS, Format
from mpa_edge.export.table import ABOUT, RUNS_ON, as_json, as_markdown, as_text, between_marks, families_table
from mpa_edge.export.tolerance import TOLERANCE
from mpa_edge.runtime.families import family_named

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_readme_has_the_table_of_today() -> None:
    text = README.read_text(encoding="utf-8")
    assert between_marks(text) == text, "run: python -m mpa_edge.export.table"
    assert as_markdown() in text


def test_a_text_without_its_place_is_refused() -> None:
    with pytest.raises(InputError, match="families"):
        between_marks("# A readme")


def test_every_family_is_told_of_and_known_to_the_runtime() -> None:
    assert set(ABOUT) == {family.name for family in FAMILIES}
    for row in families_table():
        assert family_named(row.family).name == row.family
        assert all(example.count("/") == 1 for example in row.examples)


def test_every_format_is_told_of() -> None:
    assert set(QUANTS) == set(DEFAULTS) <= set(get_args(Format))
    assert set(QUANTS) <= set(RUNS_ON)
    assert all(set(DEFAULTS[name]) <= set(QUANTS[name]) for name in QUANTS)


def test_no_precision_is_promised_without_a_tolerance() -> None:
    """Each has its parity test with one: see test_parity.py."""
    engines = {"gguf": "llama.cpp", "onnx": "onnxruntime", "openvino": "openvino"}
    for name, quants in QUANTS.items():
        assert not quants or set(quants) == set(TOLERANCE[engines[name]])


def test_the_formats_of_a_family_have_converters_for_all_its_model_types() -> None:
    from mpa_edge.export.gguf_vision import CONVERTERS
    from mpa_edge.export.onnx_vision import VISION_ENCODERS
    from mpa_edge.export.openvino_vision import VISION_PARTS

    for row in families_table():
        converted = {
            "gguf": set(row.model_types) <= set(CONVERTERS),
            "onnx": row.family in VISION_ENCODERS,
            "openvino": row.family in VISION_PARTS,
            "hf": True,
        }
        assert set(row.formats) == {name for name, is_there in converted.items() if is_there}
    assert set(CONVERTERS) == {name for row in families_table() for name in row.model_types}


def test_the_browser_is_promised_to_families_that_transformers_js_knows() -> None:
    assert [row.family for row in families_table() if "transformers.js does not know" in row.notes] == [*UNKNOWN_TO_JS]


def test_all_forms_say_the_same() -> None:
    content: dict[str, Any] = json.loads(as_json())
    assert [family["family"] for family in content["families"]] == [family.name for family in FAMILIES]
    assert content["formats"]["gguf"]["default"] == list(DEFAULTS["gguf"])
    text, markdown = as_text(), as_markdown()
    for row in families_table():
        for part in (row.family, *row.model_types, *row.examples, row.picture, row.positions, row.notes):
            assert part in text
            assert part in markdown
    for name, quants in QUANTS.items():
        for part in (name, *quants):
            assert part in text
            assert part in markdown


def test_the_table_needs_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "onnxruntime", "llama_cpp", "openvino")
    code = f"import sys, mpa_edge.export.table; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
