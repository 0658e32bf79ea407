"""A merged model to the ONNX layout of transformers.js: three graphs in `onnx/`, the processor's files beside it.

    config.json generation_config.json preprocessor_config.json processor_config.json
    tokenizer.json tokenizer_config.json chat_template.jinja
    onnx/vision_encoder.onnx  onnx/embed_tokens.onnx  onnx/decoder_model_merged{,_int8,_q4}.onnx

The suffix of a graph is its own precision; `config.json` tells transformers.js which to load under
`transformers.js_config`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnx

from mpa_edge.bundle import File, Role, describe_file
from mpa_edge.errors import ExportError, InputError
from mpa_edge.export.onnx_graphs import DECODER, EMBED, VISION, export_graphs
from mpa_edge.export.onnx_quantize import QUANTIZATIONS, Quantization, quantize_decoder

CONFIG = "config.json"
ROLES: dict[str, Role] = {VISION: "vision_encoder", EMBED: "embed_tokens", DECODER: "decoder"}
# Taken over as they are; those that transformers no longer writes are optional.
TOKENIZER = "tokenizer.json"
OTHERS = (
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
PREPROCESSOR = "preprocessor_config.json"


def to_onnx(merged: Path, folder: Path, quant: str, *, graphs: Path | None = None) -> tuple[list[File], dict[str, Any]]:
    """Write one ONNX bundle's files into `folder`; the manifest is the caller's.

    `quant` is fp32, int8 or q4. `graphs` is a folder that keeps the float32 graphs between calls for the same merged
    model: they are made there once. Returns the files for the manifest, and the checks: each graph's opset, number of
    nodes, quantized nodes, and difference from transformers. Raises `InputError`, `UnknownFamily`, `ExportError`.
    """
    if quant not in QUANTIZATIONS:
        raise InputError(f"--quant {quant}: ONNX bundles come as {', '.join(QUANTIZATIONS)}")
    with ExitStack() as stack:
        if graphs is None:
            graphs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpa-edge-")))
        differences = _graphs_once(merged, graphs)
        quantized = _write_graphs(graphs, folder / "onnx", QUANTIZATIONS[quant])
    files = _describe_graphs(folder, QUANTIZATIONS[quant])
    files += _write_processor(merged, folder)
    files.append(_write_config(merged, folder, QUANTIZATIONS[quant], files))
    checks = {
        "graphs": {Path(file.path).stem: _facts(folder / file.path) for file in files if file.path.endswith(".onnx")},
        "quantized_nodes": quantized,
        "relative_difference_fp32": differences,
    }
    return files, checks


def _graphs_once(merged: Path, graphs: Path) -> dict[str, float]:
    """The float32 graphs in `graphs`, made unless they are there; the notes are written last and vouch for them."""
    notes = graphs / "differences.json"
    if not notes.is_file():
        notes.write_text(json.dumps(export_graphs(merged, graphs)))
    differences: dict[str, float] = json.loads(notes.read_text())
    return differences


def _write_graphs(graphs: Path, folder: Path, quantization: Quantization) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [VISION, EMBED] if quantization.bits else [VISION, EMBED, DECODER]
    for name in names:
        for source in (graphs / f"{name}.onnx", graphs / f"{name}.onnx_data"):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
    if not quantization.bits:
        return []
    return quantize_decoder(graphs / f"{DECODER}.onnx", folder / f"{DECODER}{quantization.suffix}.onnx", quantization)


def _describe_graphs(folder: Path, quantization: Quantization) -> list[File]:
    files = []
    for name, role in ROLES.items():
        path = f"onnx/{name}{quantization.suffix if name == DECODER else ''}.onnx"
        files.append(describe_file(folder, path, role))
        if (folder / f"{path}_data").is_file():
            files.append(describe_file(folder, f"{path}_data", "external_data"))
    return files


def _write_processor(merged: Path, folder: Path) -> list[File]:
    if not (merged / TOKENIZER).is_file():
        raise ExportError(f"{merged} has no {TOKENIZER}")
    names = [TOKENIZER, *(name for name in OTHERS if (merged / name).is_file())]
    for name in names:
        shutil.copyfile(merged / name, folder / name)
    _write_json(folder / PREPROCESSOR, _preprocessor(merged))
    names.append(PREPROCESSOR)
    _add_chat_template(folder)
    return [describe_file(folder, name, "tokenizer" if name == TOKENIZER else "config") for name in names]


def _preprocessor(merged: Path) -> dict[str, Any]:
    """The image processor's settings in a file of their own, where transformers.js and transformers 4 look for them."""
    if (merged / PREPROCESSOR).is_file():
        settings: dict[str, Any] = json.loads((merged / PREPROCESSOR).read_bytes())
        return settings
    processor = json.loads((merged / "processor_config.json").read_bytes())
    settings = dict(processor["image_processor"])
    # transformers 5 appends its backend to the class name, which only it knows.
    kind = str(settings.get("image_processor_type", ""))
    settings["image_processor_type"] = kind.removesuffix("Pil").removesuffix("Fast")
    settings["processor_class"] = processor.get("processor_class")
    return settings


def _add_chat_template(folder: Path) -> None:
    """transformers.js reads the template from `tokenizer_config.json`, where transformers 5 no longer writes it."""
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file() and config.is_file():
        settings = json.loads(config.read_bytes())
        _write_json(config, {**settings, "chat_template": template.read_text(encoding="utf-8")})


def _write_config(merged: Path, folder: Path, quantization: Quantization, files: list[File]) -> File:
    config = json.loads((merged / CONFIG).read_bytes())
    config.pop("_name_or_path", None)  # a path of the machine that trained it
    if config["model_type"] == "qwen2_vl":
        # For this family transformers.js counts the layers of the cache at the top level.
        config["num_hidden_layers"] = config["text_config"]["num_hidden_layers"]
    config["transformers.js_config"] = {
        "dtype": {VISION: "fp32", EMBED: "fp32", DECODER: quantization.dtype},
        "use_external_data_format": {
            Path(file.path).name.removesuffix("_data"): 1 for file in files if file.role == "external_data"
        },
    }
    _write_json(folder / CONFIG, config)
    return describe_file(folder, CONFIG, "config")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _facts(path: Path) -> dict[str, Any]:
    model = onnx.load(path, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": sum(operators.values()),
        "matmul": {name: operators[name] for name in ("MatMul", "Gemm", "MatMulNBits") if operators[name]},
    }
