"""The JSON schema of `bundle.json`, for tools that are not ours: `bundle.schema.json` beside this file.

    python -m mpa_edge.bundle_schema    writes it anew, after the models in `mpa_edge.bundle` have changed

It describes a manifest as this version writes it. What it cannot say, `read_bundle` checks: that no file is named
twice, that the files an engine needs are there with their sizes and digests, that the engine would load no other
weights, that names can be printed, that a question is put once, and that an answer fits into the context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpa_edge.bundle import Bundle
from mpa_edge.records import write_atomic

PATH = Path(__file__).with_name("bundle.schema.json")


def bundle_schema() -> dict[str, Any]:
    """The schema, made from the models."""
    schema = Bundle.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def as_text() -> str:
    """The content of the file."""
    return json.dumps(bundle_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_atomic(PATH, as_text())
