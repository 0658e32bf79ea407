from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mpa_edge.bundle import read_bundle
from mpa_edge.errors import ExportError, InputError, MissingExtra
from mpa_edge.export import openvino_graphs as graphs_module
from mpa_edge.export.build import export
from mpa_edge.export.to_openvino import to_openvino
from mpa_edge.processors import load_processor
from mpa_edge.runtime import load
from mpa_edge.runtime.openvino_library import ov

MakeBundle = Callable[[Path, str], Path]
QUESTION = "What does the sign say?"
REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference" / "student"
# A Python of its own: optimum-intel wants another transformers than ours. See the README.
OPTIMUM = os.environ.get("OPTIMUM_INTEL_PYTHON")
GRAPHS = ("language_model", "text_embeddings_model", "vision_embeddings_model")


def graph_names(folder: Path) -> set[str]:
    return {path.stem.removeprefix("openvino_") for path in folder.glob("openvino_*.xml")}


def test_the_layout_is_that_of_optimum_intel(
    openvino_bundle: MakeBundle, tiny_idefics3: Path, tiny_qwen2_5_vl: Path
) -> None:
    folder = openvino_bundle(tiny_idefics3, "fp32")
    there = {path.name for path in folder.iterdir()}
    assert there == {
        "bundle.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        *(f"openvino_{name}.{suffix}" for name in GRAPHS for suffix in ("xml", "bin")),
    } | ({"chat_template.json"} & there)
    files = read_bundle(folder, check_digests=True).files
    assert {file.path for file in files} == there - {"bundle.json"}
    roles = Counter(file.role for file in files)
    assert (roles["language_model"], roles["embed_tokens"], roles["vision_encoder"], roles["external_data"]) == (
        1,
        1,
        1,
        3,
    )
    assert graph_names(openvino_bundle(tiny_qwen2_5_vl, "fp32")) == {*GRAPHS, "vision_embeddings_merger_model"}


def test_inputs_and_outputs_are_those_of_optimum_intel(
    openvino_bundle: MakeBundle, tiny_idefics3: Path, tiny_qwen2_5_vl: Path
) -> None:
    def ports(model: Path, name: str) -> tuple[set[str], set[str]]:
        graph = ov.Core().read_model(openvino_bundle(model, "fp32") / f"openvino_{name}.xml")
        return {port.get_any_name() for port in graph.inputs}, {port.get_any_name() for port in graph.outputs}

    language = {"inputs_embeds", "attention_mask", "position_ids", "beam_idx"}
    for model in (tiny_idefics3, tiny_qwen2_5_vl):
        assert ports(model, "language_model") == (language, {"logits"})
        assert ports(model, "text_embeddings_model") == ({"input"}, {"inputs_embeds"})
    assert ports(tiny_idefics3, "vision_embeddings_model") == ({"pixel_values"}, {"last_hidden_state"})
    assert ports(tiny_qwen2_5_vl, "vision_embeddings_model") == ({"hidden_states"}, {"last_hidden_state"})
    merger = {"hidden_states", "attention_mask", "window_attention_mask", "window_index", "rotary_pos_emb"}
    assert ports(tiny_qwen2_5_vl, "vision_embeddings_merger_model") == (merger, {"last_hidden_state"})


def test_openvino_alone_gives_the_logits_of_transformers(
    openvino_bundle: MakeBundle, tiny_llava_16_bit: Path, picture: Callable[..., Any]
) -> None:
    """None of our runtime: the processor's inputs through the three graphs."""
    folder = openvino_bundle(tiny_llava_16_bit, "fp32")
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_llava_16_bit, dtype=torch.float32).eval()
    processor = load_processor(tiny_llava_16_bit)
    inputs = processor(text=[f"USER: <image>\n{QUESTION}"], images=[picture(90, 60)], return_tensors="pt")
    with torch.inference_mode():
        wanted = model(**inputs).logits[0].numpy()
    core = ov.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    language, embedding, vision = (core.compile_model(folder / f"openvino_{name}.xml", "CPU", exact) for name in GRAPHS)
    ids = inputs["input_ids"].numpy()
    embeds = embedding(ids)[0]
    embeds[ids == model.config.image_token_id] = vision(inputs["pixel_values"].numpy())[0].reshape(-1, embeds.shape[-1])
    feed = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    got = language.create_infer_request().infer(feed)["logits"][0]
    assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_a_tower_whose_fractions_float16_cannot_hold_keeps_its_positions(
    openvino_bundle: MakeBundle, picture: Callable[..., Any]
) -> None:
    """Twelve patches to an edge: a twelfth in float16 lies on the wrong side of its neighbour."""
    image, features = picture(96, 96), {}
    for quant in ("fp32", "fp16"):
        with load(openvino_bundle(REFERENCE, quant), threads=1) as vlm:
            _, seen = vlm.prepare([image], QUESTION)
            features[quant] = vlm._engine.encode(seen.cuts[0])  # type: ignore[union-attr]
    difference = features["fp16"] - features["fp32"]
    assert np.sqrt(np.mean(difference**2)) < 2e-3 * features["fp32"].std()


@pytest.mark.parametrize(("quant", "kinds"), [("int8", {"u8"}), ("int4", {"u4", "u8"})])
def test_all_weights_of_the_language_model_are_quantized(
    openvino_bundle: MakeBundle, tiny_idefics3: Path, quant: str, kinds: set[str]
) -> None:
    told = read_bundle(openvino_bundle(tiny_idefics3, quant)).checks["openvino"]["weight_bytes"]
    weights = told["language_model"]
    assert kinds <= weights.keys()
    # Scales and norms.
    assert weights.get("f32", 0) + weights.get("f16", 0) < 0.1 * sum(weights.values())
    assert "f16" in told["vision_embeddings_model"]
    assert (
        max(read_bundle(openvino_bundle(tiny_idefics3, "fp32")).checks["openvino"]["relative_difference_fp32"].values())
        < 1e-5
    )


def test_what_quantization_leaves_is_an_error(
    openvino_graphs: Callable[[Path], Path],
    openvino_bundle: MakeBundle,
    tiny_idefics3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nncf

    openvino_bundle(tiny_idefics3, "fp32")
    monkeypatch.setattr(nncf, "compress_weights", lambda graph, **settings: graph)
    with pytest.raises(ExportError, match="weights were not quantized, among them"):
        to_openvino(tiny_idefics3, tmp_path, "int8", graphs=openvino_graphs(tiny_idefics3))


def test_a_graph_that_differs_is_refused(tiny_idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = graphs_module.LanguageModel.forward

    def shifted(self: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        return forward(self, inputs_embeds, attention_mask, position_ids * 2, *past)

    monkeypatch.setattr(graphs_module.LanguageModel, "forward", shifted)
    with pytest.raises(ExportError, match=r"openvino_language_model.xml differs from the model by 0\.\d+ of its"):
        graphs_module.export_graphs(tiny_idefics3, tmp_path)


def test_attention_in_a_sliding_window_is_refused(tiny_idefics3: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_idefics3)
    assert graphs_module.text_model(model) is model.model.text_model
    model.model.text_model.config.sliding_window = 256
    with pytest.raises(ExportError, match="sliding window"):
        graphs_module.text_model(model)


def test_an_unknown_precision_is_named(tiny_idefics3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--quant q4: OpenVINO bundles come as fp32, fp16, int8, int4"):
        to_openvino(tiny_idefics3, tmp_path, "q4")


def test_without_its_converter_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpa_edge.export import build

    monkeypatch.setitem(build.LIBRARIES, "openvino", ("no_such_library",))
    with pytest.raises(MissingExtra, match=r'pip install "mpa-edge\[export-openvino\]"'):
        export(tmp_path, "openvino", ["int8"])


def test_a_whole_export_is_verified_and_answers(
    tiny_qwen2_vl: Path, tmp_path: Path, picture: Callable[..., Any]
) -> None:
    (folder,) = export(tiny_qwen2_vl, "openvino", ["fp16"], tmp_path, samples=4)
    assert folder == tmp_path / "openvino-fp16"
    bundle = read_bundle(folder, check_digests=True)
    assert bundle.engine == "openvino"
    assert bundle.checks["verify"]["token_agreement"] == 1
    assert not [path for path in folder.iterdir() if str(tmp_path) in path.read_bytes().decode(errors="replace")]
    with load(folder, threads=1) as vlm:
        assert vlm.ask(picture(90, 60), QUESTION).tokens


@pytest.mark.skipif(not OPTIMUM, reason="OPTIMUM_INTEL_PYTHON names no Python that has optimum-intel; see the README")
@pytest.mark.parametrize("model", ["tiny_idefics3", "tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava"])
def test_optimum_intel_opens_the_folder_and_answers_the_same(
    request: pytest.FixtureRequest, model: str, openvino_bundle: MakeBundle, tmp_path: Path, picture: Callable[..., Any]
) -> None:
    folder = openvino_bundle(request.getfixturevalue(model), "fp32")
    pictures = [picture(*size) for size in ((40, 30), (190, 170), (300, 60))]
    paths = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for image, path in zip(pictures, paths, strict=True):
        image.save(path)
    command = [str(OPTIMUM), str(Path(__file__).with_name("ask_optimum.py")), str(folder), QUESTION, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    with load(folder, threads=1) as vlm:
        stop = vlm.bundle.prompt.stop_token_ids
        ours = [list(vlm.ask(image, QUESTION, max_new_tokens=10).tokens) for image in pictures]
    assert ours == [[token for token in tokens if token not in stop] for tokens in theirs]
