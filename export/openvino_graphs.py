"""A model's float32 graphs for OpenVINO, in the layout of optimum-intel, each compared with its origin.

    openvino_text_embeddings_model.xml            input -> inputs_embeds
    openvino_vision_embeddings_model.xml          pixel_values -> last_hidden_state; of Qwen-VL only the first layer
    openvino_vision_embeddings_merger_model.xml   the rest of Qwen-VL's tower
    openvino_language_model.xml                   inputs_embeds, attention_mask, position_ids, beam_idx -> logits

Weights lie in a `.bin` beside each. The key-value cache is the language model's own state. optimum-intel itself (2.2.0)
converts SmolVLM and Idefics3 with transformers 4 only, Qwen-VL with 5.0 at most and transformers' InternVL not at all;
so its layout is kept, and OpenVINO's own converter does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicLayer

from mpa_edge.errors import ExportError
from mpa_edge.export.families import family_of, read_config
from mpa_edge.export.float32_graphs import check_differences
from mpa_edge.export.halves import text_half, vision_half
from mpa_edge.export.memory import give_back_memory
from mpa_edge.export.openvino_vision import MERGER, VISION, VISION_PARTS, Part, QwenPatches
from mpa_edge.export.quiet import quiet
from mpa_edge.runtime.openvino import EXACT, WINDOW
from mpa_edge.runtime.openvino_library import opset13, ov
from mpa_edge.runtime.openvino_vision import merger_inputs

LANGUAGE, EMBED = "language_model", "text_embeddings_model"
# Positions in the cache of the example that the language model is traced with, and new ones.
PAST, NEW = 5, 4

# From the folder of the graphs to the difference of one from its origin.
Check = Callable[[Path], float]


def export_graphs(merged: Path, folder: Path) -> dict[str, float]:
    """Write the float32 graphs of a model folder as `openvino_<name>.xml` and `.bin`.

    Returns each graph's largest difference from transformers' float32 outputs on random input, as a fraction of the
    largest output. Raises `UnknownFamily`, and `ExportError` when a graph differs or the model cannot be converted.
    """
    family = family_of(read_config(merged)).name
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), quiet():
        # What tracing a tower took is given back before the text model comes, and the model is gone before its graphs
        # are opened: they take as much again.
        checks = _export_vision(merged, family, folder)
        give_back_memory()
        checks |= _export_text(merged, folder)
        differences = {}
        for name, check in checks.items():
            give_back_memory()
            differences[name] = check(folder)
    check_differences(differences, "openvino_{}.xml")
    return differences


def graph_path(folder: Path, name: str) -> Path:
    """Where a graph lies in a bundle; its weights lie beside it."""
    return folder / f"openvino_{name}.xml"


class LanguageModel(torch.nn.Module):
    """The text half of a vision-language model with its cache as inputs and outputs: key and value of each layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text, self.head = text_model(model), model.lm_head

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Float (batch, new, hidden), int64 (batch, past + new) and ([axes,] batch, new) -> logits, then the cache."""
        cache = Cache(layers=[_layer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)])
        places = torch.arange(attention_mask.shape[1])
        new = places[attention_mask.shape[1] - inputs_embeds.shape[1] :]
        seen = (places[None] <= new[:, None])[None, None] & attention_mask[:, None, None].bool()
        hidden = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=seen,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        layers: list[Any] = list(cache.layers)
        return self.head(hidden), *(part for layer in layers for part in (layer.keys, layer.values))


def text_model(model: Any) -> Any:
    """The text model without its output head; `ExportError` for attention that does not see the whole context."""
    text = model.model.get_decoder()
    config = text.config
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []) or (
        window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings
    ):
        raise ExportError("this text model's attention sees a sliding window only; export it with --format gguf")
    return text


def _layer(key: torch.Tensor, value: torch.Tensor) -> DynamicLayer:
    """A layer of the cache that holds these already. Left to itself it would begin with an empty one of no shape."""
    layer = DynamicLayer()
    layer.dtype, layer.device = key.dtype, key.device
    layer.keys, layer.values, layer.is_initialized = key, value, True
    return layer


def _language_model(model: Any) -> ov.Model:
    config = text_model(model).config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    axes = [3] if "mrope_section" in _rope(config) else []
    inputs = {
        "inputs_embeds": torch.zeros(2, NEW, config.hidden_size),
        "attention_mask": torch.ones(2, PAST + NEW, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + NEW).expand(*axes, 2, NEW).contiguous(),
    }
    shapes: dict[str, Sequence[int]] = {
        "inputs_embeds": (-1, -1, config.hidden_size),
        "attention_mask": (-1, -1),
        "position_ids": (*axes, -1, -1),
    }
    cache = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    for name in cache:
        inputs[f"past_key_values.{name}"] = torch.zeros(2, heads, PAST, size)
        shapes[f"past_key_values.{name}"] = (-1, heads, -1, size)
    outputs = ["logits", *(f"present.{name}" for name in cache)]
    graph = _converted(Part(LanguageModel(model), inputs, shapes), outputs)
    _make_stateful(graph, cache)
    return graph


def _make_stateful(graph: ov.Model, cache: Sequence[str]) -> None:
    """Turn the cache's inputs and outputs into state, empty at first, whose rows `beam_idx` picks. Source:
    `patch_stateful` in optimum-intel."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = opset13.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    for name in cache:
        past = graph.input(f"past_key_values.{name}")
        users = past.get_target_inputs()
        picked = opset13.gather(past, beams, np.int64(0))
        for user in users:
            user.replace_source_output(picked.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {f"past_key_values.{name}": f"present.{name}" for name in cache})
    shape = opset13.shape_of(graph.input("inputs_embeds"), output_type="i64")
    batch = opset13.gather(shape, np.array([0]), np.int64(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = (dimension.get_min_length() for dimension in node.get_output_partial_shape(0))
            empty = opset13.concat([batch, *(np.array([number]) for number in (heads, 0, size))], axis=0)
            node.set_arguments([opset13.broadcast(np.float32(0), empty)])
    graph.validate_nodes_and_infer_types()


def _embedding(model: Any) -> ov.Model:
    table = model.get_input_embeddings()
    part = Part(table, {"input": torch.zeros(1, 2, dtype=torch.int64)}, {"input": (-1, -1)})
    return _converted(part, ["inputs_embeds"])


def _converted(part: Part, outputs: Sequence[str]) -> ov.Model:
    try:
        graph = ov.convert_model(part.module.eval(), example_input=tuple(part.inputs.values()))
    except Exception as error:  # whatever tracing trips over
        raise ExportError(f"OpenVINO cannot convert {type(part.module).__name__}: {error}") from error
    for port, name in zip(graph.inputs, part.inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(list(part.shapes[name])))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def _save(graph: ov.Model, folder: Path, name: str, notes: Mapping[str, int] | None = None) -> None:
    for key, value in (notes or {}).items():
        graph.set_rt_info(value, [WINDOW[0], key])
    ov.save_model(graph, graph_path(folder, name), compress_to_fp16=False)


def open_graph(folder: Path, name: str) -> ov.CompiledModel:
    """A graph on the CPU, computed in float32."""
    return ov.Core().compile_model(graph_path(folder, name), "CPU", EXACT)


def _export_vision(merged: Path, family: str, folder: Path) -> dict[str, Check]:
    """Write the vision graphs; their check holds no more of the model than some outputs."""
    model = vision_half(merged)
    parts = VISION_PARTS[family](model)
    check = _qwen_vision_check(model, parts[MERGER]) if MERGER in parts else _tiles_check(model, parts[VISION])
    for name, part in parts.items():
        _save(_converted(part, ["last_hidden_state"]), folder, name, part.notes)
    return {VISION: check}


def _export_text(merged: Path, folder: Path) -> dict[str, Check]:
    """As `_export_vision`, the token embedding and the language model."""
    model = text_half(merged)
    checks = {EMBED: _embedding_check(model), LANGUAGE: _language_check(model)}
    _save(_embedding(model), folder, EMBED)
    _save(_language_model(model), folder, LANGUAGE)
    return checks


def _tiles_check(model: Any, part: Part) -> Check:
    first = part.inputs["pixel_values"]
    pixels = torch.cat([first, first.flip(-1), first.flip(-2)])  # more tiles than the graph is traced with
    in_one_picture = pixels[None] if model.config.model_type in ("idefics3", "smolvlm") else pixels
    wanted = _features(model.model.get_image_features(in_one_picture))

    def check(folder: Path) -> float:
        got = open_graph(folder, VISION)(pixels.numpy())[0]
        return _difference(got.reshape(wanted.shape), wanted)

    return check


def _qwen_vision_check(model: Any, merger: Part) -> Check:
    """A picture of 5 x 7 image tokens: more than a window of Qwen2.5-VL, and no whole number of them."""
    rows, columns, merge = 5, 7, model.config.vision_config.spatial_merge_size
    values = QwenPatches(model.model.visual).weight.shape[1]
    pixels = torch.rand(rows * columns * merge**2, values, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    wanted = _features(model.model.get_image_features(pixels, image_grid_thw=grid))
    width, window = merger.inputs["rotary_pos_emb"].shape[1], merger.notes.get(WINDOW[1], 0)

    def check(folder: Path) -> float:
        patches = open_graph(folder, VISION)(pixels.numpy())[0]
        feed = merger_inputs(patches, rows, columns, merge, width, window)
        return _difference(open_graph(folder, MERGER)(feed)[0], wanted)

    return check


def _features(outputs: Any) -> NDArray[np.float32]:
    features: NDArray[np.float32] = torch.cat([part.flatten(0, -2) for part in outputs.pooler_output]).numpy()
    return features


def _embedding_check(model: Any) -> Check:
    weight = model.get_input_embeddings().weight
    ids = np.linspace(0, len(weight) - 1, 64, dtype=np.int64)[None]
    wanted = weight[torch.from_numpy(ids[0])].numpy()
    return lambda folder: _difference(open_graph(folder, EMBED)(ids)[0][0], wanted)


def _language_check(model: Any) -> Check:
    """A prompt of random embeddings in one go, then one token, then three on top of its cache."""
    text = text_model(model)
    embeds = torch.randn(1, 28, text.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.1
    positions = torch.arange(28)[None]
    if "mrope_section" in _rope(text.config):  # axes that do not run alike
        positions = torch.stack([positions, positions // 2, positions // 3])
    wanted = model.lm_head(text(inputs_embeds=embeds, position_ids=positions).last_hidden_state)[0].numpy()

    def check(folder: Path) -> float:
        request = open_graph(folder, LANGUAGE).create_infer_request()
        got = []
        for start, end in ((0, 24), (24, 25), (25, 28)):
            feed = {
                "inputs_embeds": embeds[:, start:end].numpy(),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": positions[..., start:end].numpy(),
                "beam_idx": np.zeros(1, np.int32),
            }
            got.append(request.infer(feed)["logits"][0])
        return _difference(np.concatenate(got), wanted)

    return check


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _difference(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
