"""The decoder graph: onnxruntime-genai's model builder, then what transformers.js and plain ONNX Runtime expect of it.

Inputs `inputs_embeds, attention_mask, position_ids, past_key_values.{i}.key|value`, outputs `logits,
present.{i}.key|value`; the past is empty at prefill. `position_ids` are (batch, sequence), and (3, batch, sequence) for
Qwen2-VL and its kin. One more input has a default and may be left out:
`num_logits_to_keep` (transformers.js' name), the number of last positions whose logits are wanted, 0 for all. Attention
is one fused `com.microsoft.GroupQueryAttention` per layer, which reads the mask as a length: prompts of one batch must
have no padding; positions of one axis count from 0 where the cache is empty, whatever `position_ids` say.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM, Qwen2Config

from mpa_edge.errors import ExportError
from mpa_edge.export.onnx_mrope import Heads, use_three_axes

POSITION_IDS, LOGITS_TO_KEEP = "position_ids", "num_logits_to_keep"
# Positions of GroupQueryAttention's inputs and outputs, from the operator's specification.
GQA_PAST_KEY, GQA_POSITION_IDS = 3, 9
# Where vision-language models of transformers keep their text model.
TEXT_MODELS = ("language_model", "text_model")
MROPE = "mrope_section"
# Weights are copied on their way to a file, a shard at a time.
SHARD = "500MB"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INT64_MAX = 2**63 - 1


def text_model(model: Any) -> Any:
    """The text half of a vision-language model, without its output head: (inputs_embeds, position_ids) -> states."""
    name = next((name for name in TEXT_MODELS if hasattr(model.model, name)), None)
    if name is None:
        raise ExportError(f"{type(model).__name__} keeps its text model under none of {', '.join(TEXT_MODELS)}")
    return getattr(model.model, name)


def save_text_model(model: Any, merged: Path, folder: Path) -> None:
    """Write the text half of a vision-language model as a causal language model, with the tokenizer of `merged`, the
    folder that it was loaded from."""
    config = causal_config(model.config)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config)
    setattr(language, language.base_model_prefix, text_model(model))
    language.lm_head = model.lm_head
    language.config.architectures = [type(language).__name__]
    language.save_pretrained(folder, max_shard_size=SHARD)
    for name in TOKENIZER_FILES:
        if (merged / name).is_file():
            shutil.copyfile(merged / name, folder / name)


def causal_config(config: Any) -> Any:
    """The configuration of the text half alone. That of Qwen2-VL and Qwen2.5-VL is Qwen2 but for its positions."""
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    if not mrope_sections(text):
        return text
    rope = {key: value for key, value in text.rope_parameters.items() if key != MROPE}
    return Qwen2Config.from_dict({**text.to_dict(), "model_type": "qwen2", "rope_parameters": rope})


def mrope_sections(text: Any) -> list[int]:
    """How many pairs of a head's dimensions turn by each axis in turn; empty for positions of one axis."""
    return list((getattr(text, "rope_parameters", None) or {}).get(MROPE, []))


def decoder_graph(text: Path, config: Any, scratch: Path) -> ir.Model:
    """The float32 decoder of the text model in the folder `text`, with its output head and without its token embedding.

    `config` is the vision-language model's `text_config`. The weights stay in a file in the folder `scratch`, which has
    to live until the graph is saved. Raises `ExportError` where the builder does not know the text model, with its last
    words.
    """
    _run_builder(text, scratch)
    graph = onnx.load(scratch / "decoder.onnx", load_external_data=False)
    _check_attention(graph)
    sections = mrope_sections(config)
    _add_position_ids(graph, axes=3 if sections else 1)
    if sections:
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, _head_dim(config))
        use_three_axes(graph, POSITION_IDS, sections, heads)
    else:
        _give_position_ids(graph)
    _fix_cache_shape(graph, _head_dim(config))
    _keep_last_logits(graph)
    _use_standard_norms(graph)
    # What the builder says of the shapes in between is wrong in places; ONNX Runtime infers them itself.
    del graph.graph.value_info[:]
    model = ir.serde.deserialize_model(graph)
    ir.external_data.set_base_dir(model.graph, scratch)
    return model


def _run_builder(text: Path, built: Path) -> None:
    """Run the builder in a process of its own: imported, it adds modules named `builders`, `quantization` … to ours."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(text), "-o", str(built)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(built / "cache")]
    command += ["--extra_options", "exclude_embeds=true", "filename=decoder.onnx", "hf_token=false"]
    offline = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ExportError(f"onnxruntime-genai's model builder cannot build this text model: {words[-1].strip()}")


def _add_position_ids(model: onnx.ModelProto, axes: int) -> None:
    shape: list[str | int | None] = ["batch_size", "sequence_length"]
    if axes == 3:
        shape.insert(0, axes)
    model.graph.input.append(helper.make_tensor_value_info(POSITION_IDS, TensorProto.INT64, shape))


def _give_position_ids(model: onnx.ModelProto) -> None:
    """Feed `position_ids` to the rotary embedding inside attention; the builder lets it count by itself."""
    for node in _attention_nodes(model):
        inputs = [*node.input, *[""] * (GQA_POSITION_IDS + 1 - len(node.input))]
        inputs[GQA_POSITION_IDS] = POSITION_IDS
        while not inputs[-1]:  # inputs that only newer versions of ONNX Runtime know are refused, even when empty
            inputs.pop()
        del node.input[:]
        node.input.extend(inputs)


def _fix_cache_shape(model: onnx.ModelProto, head_dim: int) -> None:
    """Write the head's size into the cache's shapes; transformers.js reads a symbolic size as 0."""
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_dim


def _keep_last_logits(model: onnx.ModelProto) -> None:
    """Let a caller ask for the last positions' logits only; of a long prompt the others cost more than the rest."""
    graph = model.graph
    head = next((node for node in graph.node if "logits" in node.output and node.op_type == "MatMul"), None)
    if head is None:
        raise ExportError("the decoder's logits do not come from a MatMul; this text model's head is not known")
    graph.input.append(helper.make_tensor_value_info(LOGITS_TO_KEEP, TensorProto.INT64, []))
    # An initializer with an input's name is that input's default.
    graph.initializer.append(helper.make_tensor(LOGITS_TO_KEEP, TensorProto.INT64, [], [0]))
    graph.initializer.append(helper.make_tensor("keep.shape", TensorProto.INT64, [1], [1]))
    graph.initializer.append(helper.make_tensor("keep.ends", TensorProto.INT64, [1], [INT64_MAX]))
    nodes = [
        helper.make_node("Reshape", [LOGITS_TO_KEEP, "keep.shape"], ["keep.count"], "/lm_head/keep/Reshape"),
        helper.make_node("Neg", ["keep.count"], ["keep.starts"], "/lm_head/keep/Neg"),
        helper.make_node(
            "Slice", [head.input[0], "keep.starts", "keep.ends", "keep.shape"], ["keep.hidden"], "/lm_head/keep/Slice"
        ),
    ]
    head.input[0] = "keep.hidden"
    place = list(graph.node).index(head)
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)
    logits = next(value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "num_logits"


def _use_standard_norms(model: onnx.ModelProto) -> None:
    """Spell out RMS norms that the builder writes as an operator which only ONNX Runtime knows in ONNX' own domain.

    `onnx.checker` refuses that operator. ONNX Runtime fuses the six back into one.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_norm_nodes(node) if node.op_type == "SimplifiedLayerNormalization" else [node])
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _norm_nodes(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis."""
    (source, weight), name = node.input, node.name
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if len(node.output) != 1 or attributes.get("axis", -1) != -1:
        raise ExportError(f"the decoder's {name} is a norm over other axes, or with further outputs")

    def step(operator: str, inputs: list[str], output: str, **settings: Any) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [output], f"{name}/{operator}", **settings)

    return [
        helper.make_node("Constant", [], [f"{name}.two"], value_float=2.0),
        helper.make_node("Constant", [], [f"{name}.axes"], value_ints=[-1]),
        helper.make_node("Constant", [], [f"{name}.epsilon"], value_float=attributes["epsilon"]),
        step("Pow", [source, f"{name}.two"], f"{name}.square"),
        step("ReduceMean", [f"{name}.square", f"{name}.axes"], f"{name}.mean", keepdims=1),
        step("Add", [f"{name}.mean", f"{name}.epsilon"], f"{name}.shifted"),
        step("Sqrt", [f"{name}.shifted"], f"{name}.root"),
        step("Div", [source, f"{name}.root"], f"{name}.normal"),
        step("Mul", [f"{name}.normal", weight], node.output[0]),
    ]


def _attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def _check_attention(model: onnx.ModelProto) -> None:
    nodes = _attention_nodes(model)
    if not nodes or any(not node.input[GQA_PAST_KEY].startswith("past_key_values.") for node in nodes):
        raise ExportError("the decoder's graph has no GroupQueryAttention with a past; another version of the builder?")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
