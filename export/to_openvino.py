"""A merged model to the OpenVINO layout of optimum-intel: graphs and weights side by side, the processor's files too.

    config.json generation_config.json preprocessor_config.json … tokenizer.json
    openvino_{language,text_embeddings,vision_embeddings}_model.{xml,bin}
    openvino_vision_embeddings_merger_model.{xml,bin}                        (Qwen-VL)

The names are the same in every precision. optimum-intel's `OVModelForVisualCausalLM` opens the folder.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpa_edge.bundle import Bundle, File, Role, describe_file
from mpa_edge.errors import ExportError, InputError
from mpa_edge.export.apart import export_apart
from mpa_edge.export.float32_graphs import graphs_once, scratch_in
from mpa_edge.export.model_files import CONFIG, read_json, write_json
from mpa_edge.export.onnx_processor import write_processor
from mpa_edge.export.openvino_graphs import EMBED, LANGUAGE, graph_path
from mpa_edge.export.openvino_vision import MERGER, VISION
from mpa_edge.export.quiet import quiet
from mpa_edge.runtime.openvino_library import ov

ROLES: dict[str, Role] = {
    LANGUAGE: "language_model",
    EMBED: "embed_tokens",
    VISION: "vision_encoder",
    MERGER: "vision_merger",
}


@dataclass(frozen=True)
class Precision:
    """How weights are stored: `half` those of all graphs as float16; `mode` is NNCF's name for the language model's,
    with `group` weights to a scale, -1 for one scale per row."""

    half: bool = True
    mode: str | None = None
    group: int = -1


PRECISIONS = {
    "fp32": Precision(half=False),
    "fp16": Precision(),
    "int8": Precision(mode="INT8_ASYM"),
    # The output head stays at 8 bits. 32 divides the rows of every known model; fewer weights to a scale lose less.
    "int4": Precision(mode="INT4_ASYM", group=32),
}


def to_openvino(
    merged: Path, folder: Path, quant: str, *, graphs: Path | None = None
) -> tuple[list[File], dict[str, Any]]:
    """Write one OpenVINO bundle's files into `folder`; the manifest is the caller's.

    `quant` is the language model's precision: fp32, fp16, int8 or int4. Vision encoder and token embedding are float16
    with all but fp32. `graphs` is a folder that keeps the float32 graphs between calls for the same merged model: they
    are made there once.

    Returns the files for the manifest, and the checks: the float32 graphs' difference from transformers, and how many
    bytes of weights each graph has by type. Raises `InputError`, `UnknownFamily`, `ExportError`.
    """
    if quant not in PRECISIONS:
        raise InputError(f"--quant {quant}: OpenVINO bundles come as {', '.join(PRECISIONS)}")
    with ExitStack() as stack:
        if graphs is None:
            graphs = Path(stack.enter_context(scratch_in(folder)))
        differences = graphs_once(merged, graphs, partial(export_apart, "mpa_edge.export.openvino_graphs"))
        names = [name for name in ROLES if graph_path(graphs, name).is_file()]
        for name in names:
            _write_graph(graphs, folder, name, PRECISIONS[quant])
    checks = {
        "relative_difference_fp32": differences,
        "weight_bytes": {name: _weight_bytes(graph_path(folder, name)) for name in names},
    }
    files = [described for name in names for described in _describe(folder, name)]
    files += write_processor(merged, folder)
    write_json(folder / CONFIG, read_json(merged / CONFIG))
    files.append(describe_file(folder, CONFIG, "config"))
    return files, checks


def openvino_commands(bundle: Bundle) -> str:
    """The part of an OpenVINO bundle's README that says how to run it, in Markdown."""
    asked = bundle.prompt.question_template.replace("{question}", "What does the sign say?")
    others = f"""\

Other programs scale and cut pictures in their own way, so that answers may differ. optimum-intel, in an environment of
its own (`pip install "optimum-intel[openvino]"`; it wants another transformers than mpa-edge):

    from optimum.intel.openvino import OVModelForVisualCausalLM
    from PIL import Image
    from transformers import AutoProcessor

    model, processor = OVModelForVisualCausalLM.from_pretrained("."), AutoProcessor.from_pretrained(".")
    content = [{{"type": "image"}}, {{"type": "text", "text": {asked!r}}}]
    prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open("photo.jpg")], return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens={bundle.prompt.max_new_tokens})
    print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
    # optimum-intel knows InternVL with its authors' own code only.
    return '    mpa-edge ask . photo.jpg "What does the sign say?"\n' + ("" if bundle.family == "internvl" else others)


def _write_graph(graphs: Path, folder: Path, name: str, precision: Precision) -> None:
    source, target = graph_path(graphs, name), graph_path(folder, name)
    if not precision.half:
        for path in (source, source.with_suffix(".bin")):
            shutil.copyfile(path, target.with_name(path.name))
        return
    graph = ov.Core().read_model(source)
    quantized = name == LANGUAGE and precision.mode is not None
    if quantized:
        graph = _compressed(graph, precision)
    # What is left of a quantized language model is norms: too small to be worth rounding.
    ov.save_model(graph, target, compress_to_fp16=not quantized)


def _compressed(graph: ov.Model, precision: Precision) -> ov.Model:
    with quiet():
        import nncf

        settings = {} if precision.group < 0 else {"group_size": precision.group, "ratio": 1.0}
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode[precision.mode], **settings)
    left = [
        node.get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() == "Constant"
    ]
    if left:
        raise ExportError(f"{len(left)} of the language model's weights were not quantized, among them {left[0]}")
    return graph


def _describe(folder: Path, name: str) -> list[File]:
    graph = graph_path(folder, name).name
    weights = Path(graph).with_suffix(".bin").name
    return [describe_file(folder, graph, ROLES[name]), describe_file(folder, weights, "external_data")]


def _weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of constants by element type: u4, u8, f16, f32, …"""
    total: Counter[str] = Counter()
    for node in ov.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            total[node.get_element_type().get_type_name()] += node.get_byte_size()
    return dict(total)
