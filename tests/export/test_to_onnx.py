from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mpa_edge.bundle import File
from mpa_edge.errors import ExportError, InputError, UnknownFamily
from mpa_edge.export import onnx_graphs as graphs_module
from mpa_edge.export.to_onnx import to_onnx

QUANTS = ("fp32", "int8", "q4")
DECODERS = {"fp32": "decoder_model_merged", "int8": "decoder_model_merged_int8", "q4": "decoder_model_merged_q4"}
FLOAT, INT64, BOOL = "tensor(float)", "tensor(int64)", "tensor(bool)"

Exported = dict[str, tuple[Path, list[File], dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_idefics3: Path, onnx_graphs: Callable[[Path], Path]
) -> Exported:
    """One export per quantization of the same model; the float32 graphs are made once."""
    root = tmp_path_factory.mktemp("onnx")
    return {
        quant: (root / quant, *to_onnx(tiny_idefics3, root / quant, quant, graphs=onnx_graphs(tiny_idefics3)))
        for quant in QUANTS
    }


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def signature(values: Any) -> dict[str, tuple[list[Any], str]]:
    return {value.name: (value.shape, value.type) for value in values}


@pytest.mark.parametrize("quant", QUANTS)
def test_the_layout_is_that_of_transformers_js(exported: Exported, quant: str) -> None:
    folder, files, _ = exported[quant]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "onnx/vision_encoder.onnx",
        "onnx/embed_tokens.onnx",
        f"onnx/{DECODERS[quant]}.onnx",
    }
    assert {file.path for file in files} == there
    roles = Counter(file.role for file in files)
    assert (roles["vision_encoder"], roles["embed_tokens"], roles["decoder"], roles["tokenizer"]) == (1, 1, 1, 1)
    dtypes = json.loads((folder / "config.json").read_text())["transformers.js_config"]["dtype"]
    assert dtypes == {"vision_encoder": "fp32", "embed_tokens": "fp32", "decoder_model_merged": quant}


def test_the_folder_is_still_a_processor_for_transformers(exported: Exported, tiny_idefics3: Path) -> None:
    from transformers import AutoConfig, AutoProcessor

    folder = exported["fp32"][0]
    ours, theirs = (AutoProcessor.from_pretrained(path) for path in (folder, tiny_idefics3))
    assert ours.image_processor.size == theirs.image_processor.size
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert AutoConfig.from_pretrained(folder).text_config.vocab_size == len(theirs.tokenizer)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["image_processor_type"] == "Idefics3ImageProcessor"
    assert preprocessor["processor_class"] == "Idefics3Processor"
    assert preprocessor["size"] == {"longest_edge": 192}


@pytest.mark.parametrize("quant", QUANTS)
def test_the_graphs_take_and_give_what_transformers_js_names(exported: Exported, quant: str) -> None:
    folder = exported[quant][0] / "onnx"
    vision = session(folder / "vision_encoder.onnx")
    assert signature(vision.get_inputs()) == {
        "pixel_values": (["batch_size", "num_tiles", 3, 64, 64], FLOAT),
        "pixel_attention_mask": (["batch_size", "num_tiles", 64, 64], BOOL),
    }
    assert [(value.name, value.shape[1:]) for value in vision.get_outputs()] == [("image_features", [16, 64])]
    embed = session(folder / "embed_tokens.onnx")
    sequence = ["batch_size", "sequence_length"]
    assert signature(embed.get_inputs()) == {"input_ids": (sequence, INT64)}
    assert signature(embed.get_outputs()) == {"inputs_embeds": ([*sequence, 64], FLOAT)}
    decoder = session(folder / f"{DECODERS[quant]}.onnx")
    layers = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert signature(decoder.get_inputs()) == {
        "inputs_embeds": ([*sequence, 64], FLOAT),
        "attention_mask": (["batch_size", "total_sequence_length"], INT64),
        "position_ids": (sequence, INT64),
        **{f"past_key_values.{name}": (["batch_size", 2, "past_sequence_length", 16], FLOAT) for name in layers},
    }
    outputs = signature(decoder.get_outputs())
    assert set(outputs) == {"logits", *(f"present.{name}" for name in layers)}
    assert (
        outputs["logits"][0][2] == json.loads((folder.parent / "config.json").read_text())["text_config"]["vocab_size"]
    )
    # Callers that do not know this input may leave it out.
    assert signature(decoder.get_overridable_initializers()) == {"num_logits_to_keep": ([], INT64)}


@pytest.mark.parametrize("quant", QUANTS)
def test_the_graphs_pass_the_checker_and_name_no_path_of_this_machine(exported: Exported, quant: str) -> None:
    for path in (exported[quant][0] / "onnx").iterdir():
        onnx.checker.check_model(path, full_check=quant == "fp32")  # shape inference knows no MatMulNBits
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path.home()).encode() not in content


def test_quantized_decoders_are_smaller_and_hold_quantized_nodes(exported: Exported) -> None:
    sizes = {quant: (exported[quant][0] / "onnx" / f"{name}.onnx").stat().st_size for quant, name in DECODERS.items()}
    assert sizes["q4"] < 0.5 * sizes["fp32"]
    assert sizes["q4"] < sizes["int8"] < 0.6 * sizes["fp32"]
    for quant, bits in (("int8", 8), ("q4", 4)):
        folder, _, checks = exported[quant]
        model = onnx.load(folder / "onnx" / f"{DECODERS[quant]}.onnx")
        operators = Counter(node.op_type for node in model.graph.node)
        # Per layer: queries, keys and values in one, output, gate, up, down; and the head.
        assert (operators["MatMulNBits"], operators["MatMul"]) == (2 * 5 + 1, 0)
        quantized = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        settings = [{item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in quantized]
        assert {(setting["bits"], setting["block_size"]) for setting in settings} == {(bits, 32)}
        assert checks["quantized_nodes"] == [node.name for node in quantized]
        assert checks["graphs"][DECODERS[quant]]["matmul"] == {"MatMulNBits": 11}
    assert exported["fp32"][2]["quantized_nodes"] == []
    assert exported["fp32"][2]["graphs"]["decoder_model_merged"]["matmul"] == {"MatMul": 11}


def test_vision_and_embedding_are_the_same_bytes_in_every_quantization(exported: Exported) -> None:
    for name in ("vision_encoder", "embed_tokens"):
        assert len({(exported[quant][0] / "onnx" / f"{name}.onnx").read_bytes() for quant in QUANTS}) == 1


def test_the_checks_tell_the_float32_difference(exported: Exported) -> None:
    differences = exported["q4"][2]["relative_difference_fp32"]
    assert set(differences) == {"vision_encoder", "embed_tokens", "decoder_model_merged"}
    assert 0 < differences["decoder_model_merged"] < 1e-5
    assert differences["embed_tokens"] == 0


def test_any_number_of_tiles_gives_the_features_of_transformers(exported: Exported, tiny_idefics3: Path) -> None:
    from transformers import AutoModelForImageTextToText

    vision = session(exported["fp32"][0] / "onnx" / "vision_encoder.onnx")
    model = AutoModelForImageTextToText.from_pretrained(tiny_idefics3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for batch, tiles in ((1, 1), (1, 10), (3, 2)):
        pixels = torch.rand(batch, tiles, 3, 64, 64, generator=generator) * 2 - 1
        mask = torch.ones(batch, tiles, 64, 64, dtype=torch.bool)
        if batch > 1:
            pixels[1, 1] = 0  # the padding of a picture with fewer tiles
        with torch.inference_mode():
            wanted = torch.cat(list(model.model.get_image_features(pixels, mask).pooler_output)).numpy()
        feed = {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()}
        got = vision.run(None, feed)[0]
        assert got.shape[0] == batch * tiles - (batch > 1)
        # Float32 on both sides; sums are taken in another order.
        np.testing.assert_allclose(got.reshape(wanted.shape), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_prompt_in_pieces_and_only_the_last_logits_give_the_same_numbers(exported: Exported) -> None:
    decoder = session(exported["fp32"][0] / "onnx" / "decoder_model_merged.onnx")
    names = [output.name for output in decoder.get_outputs()]
    embeds = np.random.default_rng(0).normal(0, 0.1, (1, 12, 64)).astype(np.float32)

    def run(start: int, end: int, past: dict[str, Any], **more: Any) -> dict[str, Any]:
        feed = {"inputs_embeds": embeds[:, start:end], "attention_mask": np.ones((1, end), np.int64), **past, **more}
        feed["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        outputs = dict(zip(names, decoder.run(None, feed), strict=True))
        return {name.replace("present", "past_key_values"): value for name, value in outputs.items()}

    empty = {value.name: np.zeros((1, 2, 0, 16), np.float32) for value in decoder.get_inputs() if "past" in value.name}
    whole = run(0, 12, empty)["logits"]
    for keep in (1, 5):
        few = run(0, 12, empty, num_logits_to_keep=np.array(keep))["logits"]
        np.testing.assert_allclose(few, whole[:, -keep:], atol=1e-5)
    first = run(0, 7, empty)
    pieces = [first.pop("logits"), run(7, 12, first)["logits"]]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5)


def test_position_ids_reach_the_rotary_embedding(exported: Exported) -> None:
    decoder = session(exported["fp32"][0] / "onnx" / "decoder_model_merged.onnx")
    embeds = np.random.default_rng(0).normal(0, 0.1, (1, 4, 64)).astype(np.float32)
    past = {value.name: np.ones((1, 2, 3, 16), np.float32) for value in decoder.get_inputs() if "past" in value.name}
    feed = {"inputs_embeds": embeds, "attention_mask": np.ones((1, 7), np.int64), **past}
    near, far = (
        decoder.run(["logits"], {**feed, "position_ids": np.arange(start, start + 4)[None]})[0] for start in (3, 40)
    )
    assert np.abs(near - far).max() > 1e-3


@pytest.mark.parametrize(("name", "tensor"), [("decoder_model_merged", "cos_cache"), ("vision_encoder", None)])
def test_a_graph_that_differs_from_the_model_fails_the_export(
    exported: Exported, tiny_idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: str
) -> None:
    def graph(wanted: str) -> onnx.ModelProto:
        model = onnx.load(exported["fp32"][0] / "onnx" / f"{wanted}.onnx")
        if wanted == name:
            weights = [item for item in model.graph.initializer if item.name == tensor or len(item.raw_data) > 4000]
            damaged = next(item for item in weights if tensor in (None, item.name))
            damaged.raw_data = (onnx.numpy_helper.to_array(damaged) * 0.99).astype(np.float32).tobytes()
        return model

    # The real graphs, one weight of one of them off by a hundredth.
    monkeypatch.setitem(graphs_module.VISION_GRAPHS, "idefics3", lambda model: graph("vision_encoder"))
    monkeypatch.setattr(graphs_module, "decoder_graph", lambda model, merged: graph("decoder_model_merged"))
    with pytest.raises(ExportError, match=f"{name}.onnx differs"):
        to_onnx(tiny_idefics3, tmp_path / "bundle", "fp32", graphs=tmp_path / "graphs")
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "graphs" / "differences.json").exists()


def test_large_graphs_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "INLINE_BYTES", 1000)
    weight = torch.rand(300, 16)
    path = tmp_path / "embed_tokens.onnx"
    for _ in range(2):  # the second time over the first one's files
        graphs_module.save_graph(graphs_module.embedding_graph(weight), path)
    assert {file.name for file in tmp_path.iterdir()} == {"embed_tokens.onnx", "embed_tokens.onnx_data"}
    assert (tmp_path / "embed_tokens.onnx_data").stat().st_size == weight.nbytes
    rows = session(path).run(None, {"input_ids": np.array([[7, 299]])})[0][0]
    np.testing.assert_array_equal(rows, weight[[7, 299]].numpy())


def test_a_quantized_export_leaves_terminal_and_logging_alone(exported: Exported, tmp_path: Path) -> None:
    program = (
        "import logging; from pathlib import Path; from mpa_edge.export.onnx_quantize import *\n"
        f"source = Path({str(exported['fp32'][0])!r}, 'onnx', 'decoder_model_merged.onnx')\n"
        f"quantize_decoder(source, Path({str(tmp_path)!r}, 'q4.onnx'), QUANTIZATIONS['q4'])\n"
        "assert not logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_an_unknown_quantization_is_named_with_the_known_ones(tiny_idefics3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--quant q8_0: ONNX bundles come as fp32, int8, q4"):
        to_onnx(tiny_idefics3, tmp_path, "q8_0")


def test_an_unknown_family_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UnknownFamily, match="llava"):
        to_onnx(tmp_path, tmp_path / "bundle", "fp32")
