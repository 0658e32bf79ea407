"""The decoder graph: onnxruntime-genai's model builder, then what transformers.js and plain ONNX Runtime expect of it.

Inputs `inputs_embeds, attention_mask, position_ids, past_key_values.{i}.key|value`, outputs `logits,
present.{i}.key|value`; the past is empty at prefill. One more input has a default and may be left out:
`num_logits_to_keep` (transformers.js' name), the number of last positions whose logits are wanted, 0 for all. Attention
is one fused `com.microsoft.GroupQueryAttention` per layer, which reads the mask as a length: prompts of one batch must
have no padding.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM

from mpa_edge.errors import ExportError

POSITION_IDS, LOGITS_TO_KEEP = "position_ids", "num_logits_to_keep"
# Positions of GroupQueryAttention's inputs and outputs, from the operator's specification.
GQA_PAST_KEY, GQA_POSITION_IDS = 3, 9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INT64_MAX = 2**63 - 1


def decoder_graph(model: Any, merged: Path) -> onnx.ModelProto:
    """The float32 decoder of a vision-language model, with its output head and without its token embedding.

    `merged` is the folder that `model` was loaded from. Raises `ExportError` where the builder does not know the text
    model, with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="mpa-edge-") as scratch:
        text, built = Path(scratch, "text"), Path(scratch, "built")
        _save_text_model(model, merged, text)
        _run_builder(text, built)
        graph = onnx.load(built / "decoder.onnx")
    _give_position_ids(graph)
    _fix_cache_shape(graph, _head_dim(model.config.text_config))
    _keep_last_logits(graph)
    _use_standard_norms(graph)
    # What the builder says of the shapes in between is wrong in places; ONNX Runtime infers them itself.
    del graph.graph.value_info[:]
    return graph


def text_model(model: Any) -> Any:
    """The text half of a vision-language model as a causal language model that shares its weights."""
    config = model.config.text_config
    config.tie_word_embeddings = model.config.tie_word_embeddings
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config)
    setattr(language, language.base_model_prefix, model.model.text_model)
    language.lm_head = model.lm_head
    language.config.architectures = [type(language).__name__]
    return language.eval()


def _save_text_model(model: Any, merged: Path, folder: Path) -> None:
    text_model(model).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (merged / name).is_file():
            shutil.copyfile(merged / name, folder / name)


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


def _give_position_ids(model: onnx.ModelProto) -> None:
    """Feed a `position_ids` input to the rotary embedding inside attention; the builder lets it count by itself."""
    shape = ["batch_size", "sequence_length"]
    model.graph.input.append(helper.make_tensor_value_info(POSITION_IDS, TensorProto.INT64, shape))
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
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if not nodes or any(not node.input[GQA_PAST_KEY].startswith("past_key_values.") for node in nodes):
        raise ExportError("the decoder's graph has no GroupQueryAttention with a past; another version of the builder?")
    return nodes


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
