"""The float32 graphs of a merged model, each compared with its origin: vision encoder, token embedding, decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForImageTextToText

from mpa_edge.errors import ExportError
from mpa_edge.export.families import family_of, read_config
from mpa_edge.export.onnx_decoder import decoder_graph, text_model
from mpa_edge.export.quiet import quiet

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
OPSET, IR_VERSION = 20, 10
# A protobuf file ends at 2 GiB; beyond this the weights go into a file of their own.
INLINE_BYTES = 1_800_000_000
# Float32 on both sides, so only the order of additions differs; 1e-4 of the largest value is far above that (1e-6 seen)
# and far below what a lost RoPE base, a transposed weight or a wrong epsilon does.
TOLERANCE = 1e-4


def export_graphs(merged: Path, folder: Path) -> dict[str, float]:
    """Write the float32 graphs of a model folder as `<name>.onnx` (with `<name>.onnx_data` where they are large).

    Returns each graph's largest difference from transformers' float32 outputs on random input, as a fraction of the
    largest output. Raises `UnknownFamily`, and `ExportError` when a graph differs.
    """
    family = family_of(read_config(merged)).name
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), quiet():
        model = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32, local_files_only=True).eval()
        save_graph(VISION_GRAPHS[family](model), folder / f"{VISION}.onnx")
        save_graph(embedding_graph(model.get_input_embeddings().weight), folder / f"{EMBED}.onnx")
        save_graph(decoder_graph(model, merged), folder / f"{DECODER}.onnx")
        differences = {
            VISION: _vision_difference(model, folder / f"{VISION}.onnx"),
            EMBED: _embedding_difference(model, folder / f"{EMBED}.onnx"),
            DECODER: _decoder_difference(model, folder / f"{DECODER}.onnx"),
        }
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # NaN fails too
            raise ExportError(f"{name}.onnx differs from the model by {difference:.2g} of its largest output")
    return differences


class Idefics3Vision(torch.nn.Module):
    """Tiles to image features, as `Idefics3Model.get_image_features`; tiles of zeros are padding and left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        self.patch = model.config.vision_config.patch_size

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """Float (batch, tiles, 3, height, width) and bool (batch, tiles, height, width) -> (tiles, tokens, hidden)."""
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        real = (pixels != 0).flatten(1).any(-1)
        pixels, mask = pixels[real], mask[real]
        patches = mask.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).sum(dim=(-1, -2)) > 0
        hidden = self.tower(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state
        features: torch.Tensor = self.connector(hidden)
        return features


def idefics3_vision_graph(model: Any) -> onnx.ModelProto:
    """`pixel_values`, `pixel_attention_mask` -> `image_features`, with any number of pictures and tiles."""
    pixels, mask = _vision_inputs(model, 2, 3)
    dimensions = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("num_tiles")}
    program = torch.onnx.export(
        Idefics3Vision(model).eval(),
        (pixels, mask),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["pixel_values", "pixel_attention_mask"],
        output_names=["image_features"],
        dynamic_shapes={"pixel_values": dimensions, "pixel_attention_mask": dimensions},
    )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    return program.model_proto


VISION_GRAPHS: dict[str, Callable[[Any], onnx.ModelProto]] = {"idefics3": idefics3_vision_graph}


def embedding_graph(weight: torch.Tensor) -> onnx.ModelProto:
    """`input_ids` int64 (batch, sequence) -> `inputs_embeds` (batch, sequence, hidden): one Gather."""
    shape = ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["embed_tokens.weight", "input_ids"], ["inputs_embeds"], "/embed_tokens/Gather")],
        "main_graph",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, [*shape, weight.shape[1]])],
        [numpy_helper.from_array(weight.detach().float().numpy(), "embed_tokens.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write and check a graph; a large one keeps its weights in `<name>.onnx_data`, where transformers.js looks.

    What exporters note about their own source files is dropped: it names paths of the machine.
    """
    for part in _with_notes(model):
        part.doc_string = ""
        del part.metadata_props[:]
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_BYTES
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save_model(model, path, save_as_external_data=large, location=data.name)
    onnx.checker.check_model(path)


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    """A graph under plain ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; inputs with a default are warned about otherwise
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _with_notes(model: onnx.ModelProto) -> Iterator[Any]:
    graph = model.graph
    yield from (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for function in model.functions:
        yield from (function, *function.node)


def _vision_inputs(model: Any, batch: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    edge = model.config.vision_config.image_size
    pixels = torch.rand(batch, tiles, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return pixels, torch.ones(batch, tiles, edge, edge, dtype=torch.bool)


def _vision_difference(model: Any, path: Path) -> float:
    """Two pictures, the second with one tile of padding."""
    pixels, mask = _vision_inputs(model, 2, 2)
    pixels[1, 1], mask[1, 1] = 0, False
    wanted = torch.cat(list(model.model.get_image_features(pixels, mask).pooler_output)).numpy()
    feed = {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()}
    return _difference(open_graph(path).run(None, feed)[0].reshape(wanted.shape), wanted)


def _embedding_difference(model: Any, path: Path) -> float:
    weight = model.get_input_embeddings().weight.float().numpy()
    ids = np.linspace(0, len(weight) - 1, 64, dtype=np.int64)[None]
    return _difference(open_graph(path).run(None, {"input_ids": ids})[0][0], weight[ids[0]])


def _decoder_difference(model: Any, path: Path) -> float:
    """A prompt of random tokens in one go, then three tokens on top of its cache."""
    language, config = text_model(model), model.config.text_config
    ids = torch.randint(0, config.vocab_size, (1, 27), generator=torch.Generator().manual_seed(0))
    embeds = model.get_input_embeddings()(ids)
    wanted = language(inputs_embeds=embeds).logits[0].numpy()
    session = open_graph(path)
    names = [output.name for output in session.get_outputs()]
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    got = []
    for start, end in ((0, 24), (24, 27)):
        feed = {"inputs_embeds": embeds[:, start:end].numpy(), "attention_mask": np.ones((1, end), np.int64)}
        outputs = dict(zip(names, session.run(None, feed | past | _positions(start, end)), strict=True))
        got.append(outputs.pop("logits")[0])
        past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return _difference(np.concatenate(got), wanted)


def _positions(start: int, end: int) -> dict[str, NDArray[np.int64]]:
    return {"position_ids": np.arange(start, end, dtype=np.int64)[None]}


def _difference(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
