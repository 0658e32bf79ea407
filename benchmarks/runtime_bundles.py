"""Bundles to measure: converted as export does it, without comparing answers, which mean nothing of random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpa_edge.bundle import Bundle, File, Source, write_bundle

ENGINES: Mapping[str, Any] = {"gguf": "llama.cpp", "onnx": "onnxruntime"}


def write_bundles(model: Path, out: Path, quants: Mapping[str, Sequence[str]], *, tokens: int = 32) -> dict[str, Path]:
    """Convert a model folder to one bundle per format ("gguf", "onnx") and quantization; folders by name."""
    folders = {f"{kind}-{quant}": out / f"{kind}-{quant}" for kind, names in quants.items() for quant in names}
    for kind, names in quants.items():
        for quant, files in _converted(kind, model, {quant: folders[f"{kind}-{quant}"] for quant in names}).items():
            write_bundle(folders[f"{kind}-{quant}"], _manifest(model, kind, quant, files, tokens))
    return folders


def _converted(kind: str, model: Path, folders: Mapping[str, Path]) -> dict[str, list[File]]:
    if kind == "gguf":
        from mpa_edge.export.merged import Names
        from mpa_edge.export.to_gguf import to_gguf

        return {quant: files for quant, (files, _) in to_gguf(model, folders, Names(model.name)).items()}
    from mpa_edge.export.to_onnx import to_onnx

    parent = next(iter(folders.values())).parent
    parent.mkdir(parents=True, exist_ok=True)
    # The float32 graphs are as large as the model: beside the bundles, where there is room for that.
    with tempfile.TemporaryDirectory(dir=parent, prefix="graphs-") as graphs:
        return {quant: to_onnx(model, folder, quant, graphs=Path(graphs))[0] for quant, folder in folders.items()}


def _manifest(model: Path, kind: str, quant: str, files: list[File], tokens: int) -> Bundle:
    from mpa_edge import __version__
    from mpa_edge.export.families import family_of, prompt_settings, read_config
    from mpa_edge.processors import load_processor

    config, processor = read_config(model), load_processor(model)
    family = family_of(config)
    return Bundle(
        name=f"{model.name}-{kind}-{quant}",
        family=family.name,
        engine=ENGINES[kind],
        quantization=quant,
        files=tuple(files),
        image=family.image_settings(config, processor),
        prompt=prompt_settings(config, processor, "{question}", tokens),
        source=Source(student=model.name, tool_version=__version__),
    )
