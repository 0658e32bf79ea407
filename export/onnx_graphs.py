"""The float32 graphs of a merged model, each compared with its origin: vision encoder, token embedding, decoder.

The model is loaded in its own dtype and let go of part by part: peak memory stays near twice its size there, though the
graphs are float32.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mpa_edge.export.families import family_of, read_config
from mpa_edge.export.float32_graphs import check_differences, scratch_in
from mpa_edge.export.halves import vision_half
from mpa_edge.export.merge_weights import in_float32, load_model
from mpa_edge.export.onnx_decoder import decoder_graph, mrope_sections, save_text_model, text_model
from mpa_edge.export.onnx_save import IR_VERSION, OPSET, open_graph, save_graph
from mpa_edge.export.onnx_vision import VISION_ENCODERS, reference_features, vision_graph
from mpa_edge.export.quiet import quiet

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Sample:
    """Inputs of a graph and what transformers makes of them in float32."""

    inputs: Arrays
    wanted: NDArray[np.float32]


def export_graphs(merged: Path, folder: Path) -> dict[str, float]:
    """Write the float32 graphs of a model folder as `<name>.onnx` (with `<name>.onnx_data` where they are large).

    Returns each graph's largest difference from transformers' float32 outputs on random input, as a fraction of the
    largest output. Raises `UnknownFamily`, and `ExportError` when a graph differs.
    """
    family = family_of(read_config(merged)).name
    paths = {name: folder / f"{name}.onnx" for name in (VISION, EMBED, DECODER)}
    with scratch_in(folder) as scratch, torch.inference_mode(), quiet():
        samples = _save_decoder(merged, Path(scratch), paths)
        samples[VISION] = _save_vision(merged, family, paths[VISION])
        differences = {
            VISION: difference(paths[VISION], samples[VISION]),
            EMBED: difference(paths[EMBED], samples[EMBED]),
            DECODER: decoder_difference(paths[DECODER], samples[DECODER]),
        }
    check_differences(differences, "{}.onnx")
    return differences


def embedding_graph(weight: torch.Tensor) -> ir.Model:
    """`input_ids` int64 (batch, sequence) -> `inputs_embeds` (batch, sequence, hidden): one Gather."""
    shape = ["batch_size", "sequence_length"]
    rows = ir.tensor(weight.detach().float().numpy(), name="embed_tokens.weight")
    table = ir.Value(name=rows.name, shape=ir.Shape(weight.shape), type=ir.TensorType(rows.dtype), const_value=rows)
    ids = ir.Value(name="input_ids", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))
    embeds = ir.Value(
        name="inputs_embeds", shape=ir.Shape([*shape, weight.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    gather = ir.Node("", "Gather", [table, ids], outputs=[embeds], name="/embed_tokens/Gather")
    graph = ir.Graph(
        [ids], [embeds], nodes=[gather], initializers=[table], opset_imports={"": OPSET}, name="main_graph"
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def embedding_sample(model: Any) -> Sample:
    """Tokens from all of the vocabulary."""
    weight = model.get_input_embeddings().weight
    ids = np.linspace(0, len(weight) - 1, 64, dtype=np.int64)[None]
    return Sample({"input_ids": ids}, weight[torch.from_numpy(ids)].float().numpy())


def decoder_sample(model: Any) -> Sample:
    """A prompt of random tokens; positions in three axes, where the model has them, as of a picture of 4 x 3 tokens."""
    config = model.config.text_config
    ids = torch.randint(0, config.vocab_size, (1, 27), generator=torch.Generator().manual_seed(0))
    embeds = model.get_input_embeddings()(ids).float()
    positions = torch.arange(27)[None]
    if mrope_sections(config):
        positions = positions.repeat(3, 1, 1)
        positions[:, 0, 5:17] = 5 + torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(3)).T
        positions[:, 0, 17:] -= 8
    text = text_model(model)
    with in_float32(model):
        states = text(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        logits = model.lm_head(states)
    return Sample({"inputs_embeds": embeds.numpy(), "position_ids": positions.numpy()}, logits.numpy())


def difference(path: Path, sample: Sample) -> float:
    """The largest difference of a graph's output from the wanted one, as a fraction of the largest wanted value."""
    got = open_graph(path).run(None, dict(sample.inputs))[0]
    return _relative(got.reshape(sample.wanted.shape), sample.wanted)


def decoder_difference(path: Path, sample: Sample) -> float:
    """As `difference`: the prompt but for three tokens in one go, then those on top of its cache."""
    session = open_graph(path)
    names = [output.name for output in session.get_outputs()]
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    embeds, positions = sample.inputs["inputs_embeds"], sample.inputs["position_ids"]
    got, count = [], embeds.shape[1]
    for start, end in ((0, count - 3), (count - 3, count)):
        feed = {
            "inputs_embeds": embeds[:, start:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": positions[..., start:end],
        }
        outputs = dict(zip(names, session.run(None, feed | past), strict=True))
        got.append(outputs.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return _relative(np.concatenate(got, axis=1), sample.wanted)


def _save_decoder(merged: Path, scratch: Path, paths: Mapping[str, Path]) -> dict[str, Sample]:
    """Write the token embedding and the decoder; the model is gone before another process builds the latter."""
    model = load_model(merged)
    config = model.config.text_config
    samples = {DECODER: decoder_sample(model), EMBED: embedding_sample(model)}
    save_graph(embedding_graph(model.get_input_embeddings().weight), paths[EMBED])
    save_text_model(model, merged, scratch / "text")
    del model
    gc.collect()
    save_graph(decoder_graph(scratch / "text", config, scratch / "built"), paths[DECODER])
    return samples


def _save_vision(merged: Path, family: str, path: Path) -> Sample:
    """Write the vision encoder. Last of all: torch holds on to the weights of what it has exported."""
    model = vision_half(merged)
    encoder = VISION_ENCODERS[family](model)
    wanted = reference_features(model, encoder).numpy()
    save_graph(vision_graph(encoder), path)
    return Sample({name: tensor.numpy() for name, tensor in encoder.inputs.items()}, wanted)


def _relative(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
