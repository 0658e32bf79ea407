"""The float32 graphs of every family under plain ONNX Runtime, fed with what transformers' own processor makes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from mpa_edge.errors import ExportError
from mpa_edge.export.float32_graphs import graphs_once
from mpa_edge.export.onnx_decoder import text_model
from mpa_edge.export.onnx_graphs import (
    DECODER,
    EMBED,
    VISION,
    decoder_sample,
    export_graphs,
)
from mpa_edge.export.onnx_qwen_vision import QwenVision, places_of
from mpa_edge.export.onnx_vision import qwen2_5_vl, reference_features
from mpa_edge.processors import load_processor
from tiny_models import make_picture

# Prompts with pictures by size: smaller than a tile, many tiles, wide, tall, and two in one prompt.
ASKED = [
    ([(30, 20)], "?"),
    ([(190, 170)], "What does the sign say?"),
    ([(400, 37)], "How many?"),
    ([(31, 390)], "Is it?"),
    ([(150, 140), (64, 200)], "Which is larger?"),
]
FLOAT, INT64, BOOL = "tensor(float)", "tensor(int64)", "tensor(bool)"
BESIDE = "tiny_llava_16_bit"
VISION_INPUTS: dict[str, dict[str, tuple[list[Any], str]]] = {
    "tiny_idefics3": {
        "pixel_values": (["batch_size", "num_tiles", 3, 64, 64], FLOAT),
        "pixel_attention_mask": (["batch_size", "num_tiles", 64, 64], BOOL),
    },
    "tiny_qwen2_vl": {
        "pixel_values": (["num_patches", 3 * 2 * 8 * 8], FLOAT),
        "grid_thw": (["num_images", 3], INT64),
    },
    "tiny_qwen2_5_vl": {
        "pixel_values": (["num_patches", 3 * 2 * 14 * 14], FLOAT),
        "image_grid_thw": (["num_images", 3], INT64),
    },
    "tiny_llava_16_bit": {"pixel_values": (["batch_size", 3, 56, 56], FLOAT)},
    "tiny_llava_siglip": {"pixel_values": (["batch_size", 3, 56, 56], FLOAT)},
    "tiny_internvl": {"pixel_values": (["num_tiles", 3, 64, 64], FLOAT)},
}


class Graphs:
    """A model in transformers and its three graphs in ONNX Runtime, nothing of our runtime between."""

    def __init__(self, name: str, model: Path, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.differences = graphs_once(model, folder, export_graphs)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        self.processor = load_processor(model)
        self.vision, self.embed, self.decoder = (self._open(graph) for graph in (VISION, EMBED, DECODER))
        self.outputs = [output.name for output in self.decoder.get_outputs()]

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(self.folder / f"{graph}.onnx", options, providers=["CPUExecutionProvider"])

    def inputs(self, sizes: Sequence[tuple[int, int]], text: str) -> Any:
        images = [make_picture(*size, seed=seed) for seed, size in enumerate(sizes)]
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], **how)

    def features(self, inputs: Any) -> Any:
        given = {"grid_thw": inputs.get("image_grid_thw"), **inputs}
        feed = {value.name: given[value.name].numpy() for value in self.vision.get_inputs()}
        if "pixel_attention_mask" in feed:
            feed["pixel_attention_mask"] = feed["pixel_attention_mask"].astype(bool)
        features = self.vision.run(None, feed)[0]
        return features.reshape(-1, features.shape[-1])

    def embeds(self, inputs: Any) -> Any:
        ids = inputs["input_ids"].numpy()
        embeds = self.embed.run(None, {"input_ids": ids})[0]
        embeds[ids == self.model.config.image_token_id] = self.features(inputs)
        return embeds

    def positions(self, inputs: Any) -> Any:
        ids = inputs["input_ids"]
        if "image_grid_thw" in inputs:
            kinds = inputs["mm_token_type_ids"]
            return self.model.model.get_rope_index(ids, kinds, inputs["image_grid_thw"])[0].numpy()
        return np.arange(ids.shape[1])[None]

    def empty_past(self) -> dict[str, Any]:
        past = [value for value in self.decoder.get_inputs() if value.name.startswith("past_key_values.")]
        return {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in past}

    def step(self, embeds: Any, positions: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Logits of these tokens, and the cache with them."""
        before = next(iter(past.values())).shape[2]
        mask = np.ones((1, before + embeds.shape[1]), np.int64)
        feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **past}
        outputs = dict(zip(self.outputs, self.decoder.run(None, feed), strict=True))
        logits = outputs.pop("logits")[0]
        return logits, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


@pytest.fixture(scope="module", params=VISION_INPUTS)
def graphs(request: pytest.FixtureRequest, onnx_graphs: Callable[[Path], Path]) -> Graphs:
    model = request.getfixturevalue(request.param)
    return Graphs(request.param, model, onnx_graphs(model))


def test_logits_at_every_position_equal_those_of_transformers(graphs: Graphs) -> None:
    for sizes, text in ASKED:
        inputs = graphs.inputs(sizes, text)
        with torch.inference_mode():
            wanted = graphs.model(**inputs).logits[0].numpy()
        got, _ = graphs.step(graphs.embeds(inputs), graphs.positions(inputs), graphs.empty_past())
        # Float32 on both sides; sums are taken in another order.
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_greedy_tokens_on_top_of_the_cache_equal_those_of_transformers(graphs: Graphs) -> None:
    inputs = graphs.inputs(*ASKED[-1])
    with torch.inference_mode():
        wanted = graphs.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    wanted = wanted[0, inputs["input_ids"].shape[1] :].tolist()
    positions = graphs.positions(inputs)
    logits, past = graphs.step(graphs.embeds(inputs), positions, graphs.empty_past())
    # What generate was told not to say before the sixth token.
    stop = graphs.model.generation_config.eos_token_id
    got: list[int] = []
    for place in range(len(wanted)):
        got.append(int(np.argmax(np.where(np.arange(logits.shape[-1]) == stop, -np.inf, logits[-1]))))
        next_position = np.full_like(positions[..., :1], positions.max() + 1 + place)
        embeds = graphs.embed.run(None, {"input_ids": np.array([[got[-1]]])})[0]
        logits, past = graphs.step(embeds, next_position, past)
    assert got == wanted


def test_inputs_and_outputs_are_those_of_transformers_js(graphs: Graphs) -> None:
    assert {value.name: (value.shape, value.type) for value in graphs.vision.get_inputs()} == VISION_INPUTS[graphs.name]
    assert [(value.name, value.shape[-1]) for value in graphs.vision.get_outputs()] == [("image_features", 64)]
    axes = [3] if "qwen" in graphs.name else []
    inputs = {value.name: (value.shape, value.type) for value in graphs.decoder.get_inputs()}
    assert inputs["position_ids"] == ([*axes, "batch_size", "sequence_length"], INT64)
    assert inputs["past_key_values.0.key"] == (["batch_size", 2, "past_sequence_length", 16], FLOAT)
    assert inputs.keys() - {"inputs_embeds", "attention_mask", "position_ids"} == graphs.empty_past().keys()


def test_graphs_pass_the_checker_and_name_no_path_of_this_machine(graphs: Graphs) -> None:
    for name in (VISION, EMBED, DECODER):
        path = graphs.folder / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path.home()).encode() not in content
    operators = [node.op_type for node in onnx.load(graphs.folder / f"{DECODER}.onnx").graph.node]
    assert operators.count("GroupQueryAttention") == 2


def test_large_weights_lie_beside_their_graph(graphs: Graphs) -> None:
    names = {f"{name}.onnx" for name in (VISION, EMBED, DECODER)} | {"differences.json"}
    if graphs.name == BESIDE:
        names |= {f"{name}.onnx_data" for name in (VISION, EMBED, DECODER)}
    assert {file.name for file in graphs.folder.iterdir()} == names


def test_differences_are_those_of_float32(graphs: Graphs) -> None:
    assert graphs.differences.keys() == {VISION, EMBED, DECODER}
    assert graphs.differences[EMBED] == 0
    assert all(0 < graphs.differences[name] < 1e-5 for name in (VISION, DECODER))


def test_pictures_together_give_what_each_gives_alone(graphs: Graphs) -> None:
    sizes = [(150, 140), (300, 90), (64, 200)]
    alone = [graphs.features(graphs.inputs([size], "?")) for size in sizes]
    # The same picture has another seed where it is not the first.
    together = graphs.features(graphs.inputs(sizes, "?"))
    np.testing.assert_allclose(together[: len(alone[0])], alone[0], atol=1e-5 * np.abs(alone[0]).max())
    assert len(together) == sum(len(features) for features in alone)


def test_each_axis_of_positions_counts(graphs: Graphs) -> None:
    inputs = graphs.inputs(*ASKED[1])
    embeds, positions = graphs.embeds(inputs), graphs.positions(inputs)
    # One axis is counted by attention itself where the cache is empty, so there has to be one.
    _, past = graphs.step(embeds[:, :10], positions[..., :10], graphs.empty_past())
    logits, _ = graphs.step(embeds[:, 10:], positions[..., 10:], past)
    for axis in range(3) if positions.ndim == 3 else (0,):
        moved = positions[..., 10:].copy()
        moved.reshape(-1, moved.shape[-1])[axis] += 40
        assert np.abs(graphs.step(embeds[:, 10:], moved, past)[0] - logits).max() > 1e-2


grids = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


@given(grids=grids, merge=st.sampled_from([1, 2, 3]), across=st.integers(1, 4))
def test_places_are_those_of_transformers(grids: list[tuple[int, int, int]], merge: int, across: int) -> None:
    grid = torch.tensor([[frames, rows * merge, columns * merge] for frames, rows, columns in grids])
    count = int(grid.prod(-1).sum())
    places = places_of(count, grid, merge)
    assert torch.equal(torch.stack([places.row, places.column], -1), get_vision_position_ids(grid, merge))
    frames = get_vision_cu_seqlens(grid)
    assert torch.equal(places.frame, frames[:-1].repeat_interleave(frames.diff()))
    # Two patches share a window where transformers puts them into one.
    vision = QwenVision.__new__(QwenVision)
    torch.nn.Module.__init__(vision)
    vision.window = across * merge
    order, ends = get_vision_window_index(grid, merge, window_size=across * merge * 14, patch_size=14)
    number = torch.empty(count, dtype=torch.long)
    sizes = ends.diff()
    patches = (order[:, None] * merge**2 + torch.arange(merge**2)).flatten()
    number[patches] = torch.arange(len(sizes)).repeat_interleave(sizes)
    ours = vision._window_of(places)
    assert torch.equal(ours[:, None] == ours[None], number[:, None] == number[None])


def test_windows_matter_and_so_does_their_size(tiny_qwen2_5_vl: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_qwen2_5_vl, dtype=torch.float32).eval()
    with torch.inference_mode():
        encoder = qwen2_5_vl(model)
        wanted = reference_features(model, encoder)
        found = {}
        for window in (8, None, 6):
            encoder.module.window = window
            found[window] = float((encoder.module(*encoder.inputs.values()) - wanted).abs().max() / wanted.abs().max())
    assert found[8] < 1e-5
    assert min(found[None], found[6]) > 1e-2


def test_weights_in_16_bit_are_compared_in_float32_and_stay_as_they_are(tiny_llava_16_bit: Path) -> None:
    narrow: Any = AutoModelForImageTextToText.from_pretrained(tiny_llava_16_bit, dtype="auto").eval()
    wide: Any = AutoModelForImageTextToText.from_pretrained(tiny_llava_16_bit, dtype=torch.float32).eval()
    before = {name: parameter.clone() for name, parameter in narrow.named_parameters()}
    with torch.inference_mode():
        np.testing.assert_array_equal(decoder_sample(narrow).wanted, decoder_sample(wide).wanted)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert all(torch.equal(parameter, before[name]) for name, parameter in narrow.named_parameters())


@pytest.mark.parametrize(("name", "tensor"), [(DECODER, "cos_cache"), (VISION, None)])
def test_a_graph_that_differs_from_the_model_fails_the_export(
    tiny_idefics3: Path,
    onnx_graphs: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tensor: str | None,
) -> None:
    whole = onnx_graphs(tiny_idefics3)

    def graph(wanted: str) -> ir.Model:
        model = onnx.load(whole / f"{wanted}.onnx")
        if wanted == name:
            weights = [item for item in model.graph.initializer if item.name == tensor or len(item.raw_data) > 4000]
            damaged = next(item for item in weights if tensor in (None, item.name))
            damaged.raw_data = (onnx.numpy_helper.to_array(damaged) * 0.99).astype(np.float32).tobytes()
        return ir.serde.deserialize_model(model)

    # The real graphs, one weight of one of them off by a hundredth.
    module = "mpa_edge.export.onnx_graphs"
    monkeypatch.setattr(f"{module}.vision_graph", lambda encoder: graph(VISION))
    monkeypatch.setattr(f"{module}.decoder_graph", lambda text, config, scratch: graph(DECODER))
    (tmp_path / "graphs").mkdir()
    # Nothing of it is in the system's temporary folder.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ExportError, match=f"{name}.onnx differs"):
        graphs_once(tiny_idefics3, tmp_path / "graphs", export_graphs)
    assert not (tmp_path / "graphs" / "differences.json").exists()


def test_a_text_model_that_is_nowhere_known_is_named(tiny_idefics3: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_idefics3)
    model.model.words = model.model.text_model
    del model.model.text_model
    with pytest.raises(ExportError, match="Idefics3ForConditionalGeneration keeps its text model under none of"):
        text_model(model)
