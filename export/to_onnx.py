"""A merged model to the ONNX layout of transformers.js: three graphs in `onnx/`, the processor's files beside it.

    config.json generation_config.json preprocessor_config.json processor_config.json
    tokenizer.json tokenizer_config.json chat_template.jinja
    onnx/{vision_encoder,embed_tokens,decoder_model_merged}{,_fp16,_int8,_q4,_q4f16}.onnx{,_data}

The suffix of a graph is its own precision; `config.json` tells transformers.js which to load under
`transformers.js_config`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from mpa_edge.bundle import File, Role, describe_file
from mpa_edge.errors import InputError
from mpa_edge.export.apart import export_apart
from mpa_edge.export.float32_graphs import graphs_once, scratch_in
from mpa_edge.export.model_files import CONFIG, read_json, write_json
from mpa_edge.export.onnx_features import feature_error
from mpa_edge.export.onnx_graphs import DECODER, EMBED, VISION
from mpa_edge.export.onnx_processor import write_processor
from mpa_edge.export.onnx_quantize import PRECISIONS, Precision, convert

ROLES: dict[str, Role] = {VISION: "vision_encoder", EMBED: "embed_tokens", DECODER: "decoder"}
# What transformers.js 3 makes the empty cache of; version 4 asks the graph.
CACHE_TYPES = {name: "float16" for name, precision in PRECISIONS.items() if precision.half}


def to_onnx(
    merged: Path, folder: Path, quant: str, *, graphs: Path | None = None, quantize_vision: bool = False
) -> tuple[list[File], dict[str, Any]]:
    """Write one ONNX bundle's files into `folder`; the manifest is the caller's.

    `quant` is the decoder's precision: fp32, fp16, int8, q4 or q4f16. Vision encoder and token embedding are float16
    with fp16 and q4f16, and float32 with the others; `quantize_vision` gives the vision encoder the decoder's bits.
    `graphs` is a folder that keeps the float32 graphs between calls for the same merged model: they are made there
    once.

    Returns the files for the manifest, and the checks: each graph's precision, opset, number of nodes and bytes of
    external data, the float32 graphs' difference from transformers, and what the vision encoder's precision does to
    the image features (root mean square, as a fraction of the float32 features'). Raises `InputError`,
    `UnknownFamily`, `ExportError`.
    """
    precisions = graph_precisions(quant, quantize_vision)
    with ExitStack() as stack:
        if graphs is None:
            graphs = Path(stack.enter_context(scratch_in(folder)))
        differences = graphs_once(merged, graphs, partial(export_apart, "mpa_edge.export.onnx_graphs"))
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        for name, precision in precisions.items():
            _write_graph(graphs / f"{name}.onnx", folder / _path(name, precision), precision)
        checks: dict[str, Any] = {"relative_difference_fp32": differences}
        if precisions[VISION].dtype != "fp32":
            checks["image_feature_error"] = feature_error(
                merged, graphs / f"{VISION}.onnx", folder / _path(VISION, precisions[VISION])
            )
    checks["graphs"] = {Path(_path(*pair)).stem: _facts(folder / _path(*pair), pair[1]) for pair in precisions.items()}
    files = _describe_graphs(folder, precisions)
    files += write_processor(merged, folder)
    files.append(_write_config(merged, folder, precisions, files))
    return files, checks


def graph_precisions(quant: str, quantize_vision: bool = False) -> dict[str, Precision]:
    """Each graph's precision. Raises `InputError` for a name that is not known, and where nothing can be quantized."""
    if quant not in PRECISIONS:
        raise InputError(f"--quant {quant}: ONNX bundles come as {', '.join(PRECISIONS)}")
    decoder = PRECISIONS[quant]
    if quantize_vision and not decoder.bits:
        quantized = ", ".join(name for name, precision in PRECISIONS.items() if precision.bits)
        raise InputError(f"--quantize-vision: --quant {quant} quantizes nothing; it goes with {quantized}")
    beside = PRECISIONS["fp16" if decoder.half else "fp32"]
    return {VISION: decoder if quantize_vision else beside, EMBED: beside, DECODER: decoder}


def _path(name: str, precision: Precision) -> str:
    return f"onnx/{name}{precision.suffix}.onnx"


def _write_graph(source: Path, target: Path, precision: Precision) -> None:
    if precision.dtype != "fp32":
        convert(source, target, precision)
        return
    for path in (source.with_name(f"{source.name}_data"), source):  # the graph last: it vouches for its weights
        if path.is_file():
            part = target.with_name(f".{path.name}.part")
            shutil.copyfile(path, part)
            part.replace(target.with_name(path.name))


def _describe_graphs(folder: Path, precisions: Mapping[str, Precision]) -> list[File]:
    files = []
    for name, precision in precisions.items():
        path = _path(name, precision)
        files.append(describe_file(folder, path, ROLES[name]))
        if (folder / f"{path}_data").is_file():
            files.append(describe_file(folder, f"{path}_data", "external_data"))
    return files


def _write_config(merged: Path, folder: Path, precisions: Mapping[str, Precision], files: list[File]) -> File:
    config = read_json(merged / CONFIG)
    if config["model_type"] == "qwen2_vl":
        # For this family transformers.js counts the layers of the cache at the top level.
        config["num_hidden_layers"] = config["text_config"]["num_hidden_layers"]
    config["transformers.js_config"] = {
        "dtype": {name: precision.dtype for name, precision in precisions.items()},
        "kv_cache_dtype": CACHE_TYPES,
        "use_external_data_format": {
            Path(file.path).name.removesuffix("_data"): 1 for file in files if file.role == "external_data"
        },
    }
    write_json(folder / CONFIG, config)
    return describe_file(folder, CONFIG, "config")


def _facts(path: Path, precision: Precision) -> dict[str, Any]:
    model = onnx.load(path, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    data = path.with_name(f"{path.name}_data")
    return {
        "precision": precision.dtype,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "nodes": sum(operators.values()),
        "matmul": {name: operators[name] for name in ("MatMul", "Gemm", "MatMulNBits") if operators[name]},
        "external_data_bytes": data.stat().st_size if data.is_file() else 0,
    }
