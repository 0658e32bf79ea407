"""A graph that an exporter made, cleaned and on disk, and opened without help from us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from mpa_edge.export.onnx_tensors import write_graph

OPSET, IR_VERSION = 20, 10


def save_graph(model: ir.Model, path: Path) -> None:
    """As `write_graph`, without what exporters note about their own source files: it names paths of the machine."""
    for part in _with_notes(model):
        part.doc_string = None
        part.metadata_props.clear()
    write_graph(model, path)


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    """A graph under plain ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; inputs with a default are warned about otherwise
    # A second copy of all weights, laid out for speed, is not worth its memory for a few calls.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _with_notes(model: ir.Model) -> Iterator[Any]:
    yield model
    graphs: list[Any] = [model.graph, *model.functions.values()]
    for graph in graphs:
        yield graph
        yield from graph.inputs
        for node in graph:
            yield node
            yield from node.outputs
    yield from model.graph.initializers.values()
