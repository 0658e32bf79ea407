"""The manifest of a bundle, as an export writes it, for files that a test has made or only names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpa_edge.bundle import Bundle, File, Source
from mpa_edge.export.families import family_of, prompt_settings, read_config
from mpa_edge.processors import load_processor


def manifest_of(
    model: Path,
    engine: Any,
    quant: str,
    files: Iterable[File] = (),
    *,
    name: str | None = None,
    template: str = "{question}",
    tokens: int = 12,
    checks: dict[str, Any] | None = None,
) -> Bundle:
    """What `bundle.json` says of a model folder in one format and precision; it is not written.

    `template` is the wording around a question and `tokens` the most that an answer has.
    """
    config, processor = read_config(model), load_processor(model)
    family = family_of(config)
    return Bundle(
        name=name or f"{model.name}-{quant}",
        family=family.name,
        engine=engine,
        quantization=quant,
        files=tuple(files),
        image=family.image_settings(config, processor),
        prompt=prompt_settings(config, processor, template, tokens),
        source=Source(student=model.name, tool_version="0"),
        checks=checks or {},
    )
