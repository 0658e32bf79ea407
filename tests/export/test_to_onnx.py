"""A model folder in the layout of transformers.js, in every precision, under plain ONNX Runtime."""

from __future__ import annotations

import json
import shutil
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

from mpa_edge.bundle import File
from mpa_edge.errors import ExportError, InputError, UnknownFamily
from mpa_edge.export import onnx_tensors
from mpa_edge.export.onnx_processor import write_processor
from mpa_edge.export.to_onnx import to_onnx

# The graph of each quantization's three parts, by the ending of its name.
SUFFIXES = {
    "fp32": ("", "", ""),
    "fp16": ("_fp16", "_fp16", "_fp16"),
    "int8": ("", "", "_int8"),
    "q4": ("", "", "_q4"),
    "q4f16": ("_fp16", "_fp16", "_q4f16"),
}
HALF = ("fp16", "q4f16")
VISION_QUANTIZED = {"int8": "_int8", "q4": "_q4", "q4f16": "_q4f16"}
NAMES = ("vision_encoder", "embed_tokens", "decoder_model_merged")
FLOAT, FLOAT16, INT64, BOOL = "tensor(float)", "tensor(float16)", "tensor(int64)", "tensor(bool)"
# Root mean square of the logits' difference from float32's, as a fraction of their deviation, on random weights.
# Float16 rounds to 11 bits at every step (0.0008 seen), int8 to blocks of 8 bits (0.015), the others to 4 (0.18).
LOGIT_ERROR = {"fp32": 1e-6, "fp16": 0.003, "int8": 0.04, "q4": 0.4, "q4f16": 0.4}
# The same of image features, where the vision encoder is quantized (0.01 and 0.13 seen), or in half precision (0.0007).
FEATURE_ERROR = {"fp16": 0.003, "int8": 0.03, "q4": 0.3, "q4f16": 0.3}

Exported = dict[str, tuple[Path, list[File], dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_idefics3: Path, onnx_graphs: Callable[[Path], Path]
) -> Exported:
    """One export per quantization of the same model; the float32 graphs are made once."""
    root = tmp_path_factory.mktemp("onnx")
    return {
        quant: (root / quant, *to_onnx(tiny_idefics3, root / quant, quant, graphs=onnx_graphs(tiny_idefics3)))
        for quant in SUFFIXES
    }


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def signature(values: Any) -> dict[str, tuple[list[Any], str]]:
    return {value.name: (value.shape, value.type) for value in values}


def paths_of(exported: Exported, quant: str) -> list[Path]:
    return [
        exported[quant][0] / "onnx" / f"{name}{suffix}.onnx"
        for name, suffix in zip(NAMES, SUFFIXES[quant], strict=True)
    ]


def error(got: Any, wanted: Any) -> float:
    return float(np.sqrt(np.square(got - wanted).mean()) / wanted.std())


@pytest.mark.parametrize("quant", SUFFIXES)
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
        *(path.relative_to(folder).as_posix() for path in paths_of(exported, quant)),
    }
    assert {file.path for file in files} == there
    roles = Counter(file.role for file in files)
    assert (roles["vision_encoder"], roles["embed_tokens"], roles["decoder"], roles["tokenizer"]) == (1, 1, 1, 1)
    hints = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    # transformers.js makes the file's name from the hint.
    dtypes = zip(NAMES, SUFFIXES[quant], strict=True)
    assert hints["dtype"] == {name: suffix.removeprefix("_") or "fp32" for name, suffix in dtypes}
    assert hints["kv_cache_dtype"] == {"fp16": "float16", "q4f16": "float16"}
    assert hints["use_external_data_format"] == {}


@pytest.mark.parametrize("quant", SUFFIXES)
def test_the_graphs_take_and_give_what_transformers_js_names(exported: Exported, quant: str) -> None:
    vision, embed, decoder = (session(path) for path in paths_of(exported, quant))
    assert signature(vision.get_inputs()) == {
        "pixel_values": (["batch_size", "num_tiles", 3, 64, 64], FLOAT),
        "pixel_attention_mask": (["batch_size", "num_tiles", 64, 64], BOOL),
    }
    assert [(value.name, value.shape[1:], value.type) for value in vision.get_outputs()] == [
        ("image_features", [16, 64], FLOAT)
    ]
    sequence = ["batch_size", "sequence_length"]
    assert signature(embed.get_inputs()) == {"input_ids": (sequence, INT64)}
    assert signature(embed.get_outputs()) == {"inputs_embeds": ([*sequence, 64], FLOAT)}
    layers = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    cache = FLOAT16 if quant in HALF else FLOAT
    assert signature(decoder.get_inputs()) == {
        "inputs_embeds": ([*sequence, 64], FLOAT),
        "attention_mask": (["batch_size", "total_sequence_length"], INT64),
        "position_ids": (sequence, INT64),
        **{f"past_key_values.{name}": (["batch_size", 2, "past_sequence_length", 16], cache) for name in layers},
    }
    outputs = signature(decoder.get_outputs())
    vocabulary = json.loads((exported[quant][0] / "config.json").read_text())["text_config"]["vocab_size"]
    assert (outputs["logits"][0][2], outputs["logits"][1]) == (vocabulary, FLOAT)
    assert {name: kind for name, (_, kind) in outputs.items() if name != "logits"} == {
        f"present.{name}": cache for name in layers
    }
    # Callers that do not know this input may leave it out.
    assert signature(decoder.get_overridable_initializers()) == {"num_logits_to_keep": ([], INT64)}


@pytest.mark.parametrize("quant", SUFFIXES)
def test_the_graphs_pass_the_checker_and_name_no_path_of_this_machine(exported: Exported, quant: str) -> None:
    for path in paths_of(exported, quant):
        # Shape inference knows no operator of ONNX Runtime's own.
        onnx.checker.check_model(path, full_check=quant in ("fp32", "fp16"))
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path.home()).encode() not in content


def prompt_in_two_pieces(decoder: Path, embeds: Any) -> Any:
    """Logits of a prompt whose last five tokens come on top of the cache of the others."""
    opened = session(decoder)
    names, count, found = [output.name for output in opened.get_outputs()], embeds.shape[1], []
    inputs = [value for value in opened.get_inputs() if value.name.startswith("past_key_values.")]
    kind = np.float16 if inputs[0].type == FLOAT16 else np.float32
    past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), kind) for value in inputs}
    for start, end in ((0, count - 5), (count - 5, count)):
        feed = {"inputs_embeds": embeds[:, start:end], "attention_mask": np.ones((1, end), np.int64), **past}
        feed["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        outputs = dict(zip(names, opened.run(None, feed), strict=True))
        found.append(outputs.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("quant", SUFFIXES)
def test_logits_at_every_position_are_as_far_from_float32_as_the_precision_explains(
    exported: Exported, quant: str
) -> None:
    ids = np.random.default_rng(0).integers(0, 400, (1, 60))
    (_, rows, decoder), (_, full_rows, full_decoder) = (paths_of(exported, name) for name in (quant, "fp32"))
    wanted = prompt_in_two_pieces(full_decoder, session(full_rows).run(None, {"input_ids": ids})[0])
    embeds = session(rows).run(None, {"input_ids": ids})[0]
    assert embeds.dtype == np.float32
    got = prompt_in_two_pieces(decoder, embeds)
    assert got.dtype == np.float32
    assert error(got, wanted) <= LOGIT_ERROR[quant]
    if quant != "fp32":
        assert error(got, wanted) > LOGIT_ERROR[quant] / 20  # that precision was really used


def test_quantized_decoders_are_smaller_and_hold_quantized_nodes(exported: Exported) -> None:
    sizes = {quant: paths_of(exported, quant)[2].stat().st_size for quant in SUFFIXES}
    assert sizes["q4f16"] < sizes["q4"] < sizes["int8"] < sizes["fp16"] < 0.6 * sizes["fp32"]
    for quant, bits in (("int8", 8), ("q4", 4), ("q4f16", 4)):
        model = onnx.load(paths_of(exported, quant)[2])
        operators = Counter(node.op_type for node in model.graph.node)
        # Per layer: queries, keys and values in one, output, gate, up, down; and the head.
        assert (operators["MatMulNBits"], operators["MatMul"]) == (2 * 5 + 1, 0)
        quantized = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        settings = [{item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in quantized]
        assert {(setting["bits"], setting["block_size"]) for setting in settings} == {(bits, 32)}


def test_the_checks_state_precision_opset_and_external_data_of_every_graph(exported: Exported) -> None:
    for quant, suffixes in SUFFIXES.items():
        facts = exported[quant][2]["graphs"]
        assert list(facts) == [f"{name}{suffix}" for name, suffix in zip(NAMES, suffixes, strict=True)]
        assert [fact["precision"] for fact in facts.values()] == [suffix[1:] or "fp32" for suffix in suffixes]
        assert all(fact["opset"]["ai.onnx"] >= 20 and fact["external_data_bytes"] == 0 for fact in facts.values())
        matmul = facts[f"{NAMES[2]}{suffixes[2]}"]["matmul"]
        assert matmul == ({"MatMul": 11} if quant in ("fp32", "fp16") else {"MatMulNBits": 11})
    differences = exported["q4"][2]["relative_difference_fp32"]
    assert set(differences) == set(NAMES)
    assert 0 < differences["decoder_model_merged"] < 1e-5


def test_vision_and_embedding_stay_as_they_are_beside_a_quantized_decoder(exported: Exported) -> None:
    for part in (0, 1):
        for quants in (("fp32", "int8", "q4"), HALF):
            assert len({paths_of(exported, quant)[part].read_bytes() for quant in quants}) == 1
    assert {quant for quant in SUFFIXES if "image_feature_error" in exported[quant][2]} == set(HALF)
    assert 0 < exported["fp16"][2]["image_feature_error"] < FEATURE_ERROR["fp16"]


@pytest.mark.parametrize("quant", VISION_QUANTIZED)
def test_a_quantized_vision_encoder_has_its_own_name_and_a_measured_error(
    quant: str, tiny_idefics3: Path, onnx_graphs: Callable[[Path], Path], tmp_path: Path
) -> None:
    graphs = onnx_graphs(tiny_idefics3)
    files, checks = to_onnx(tiny_idefics3, tmp_path, quant, graphs=graphs, quantize_vision=True)
    name = f"vision_encoder{VISION_QUANTIZED[quant]}"
    assert [file.path for file in files if file.role == "vision_encoder"] == [f"onnx/{name}.onnx"]
    hints = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]["dtype"]
    assert hints["vision_encoder"] == hints["decoder_model_merged"] == quant
    # Per layer: queries, keys, values, output and two of the MLP; and the connector. What is left is attention.
    assert checks["graphs"][name]["matmul"] == {"MatMulNBits": 2 * 6 + 1, "MatMul": 2 * 2}
    assert FEATURE_ERROR[quant] / 10 < checks["image_feature_error"] < FEATURE_ERROR[quant]
    onnx.checker.check_model(tmp_path / "onnx" / f"{name}.onnx")


@pytest.mark.parametrize("quant", ["fp32", "fp16"])
def test_a_vision_encoder_cannot_be_quantized_where_nothing_is(quant: str, tiny_idefics3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--quantize-vision: --quant {quant} .*; it goes with int8, q4, q4f16"):
        to_onnx(tiny_idefics3, tmp_path, quant, quantize_vision=True)


def test_large_graphs_keep_their_weights_beside_them(
    exported: Exported,
    tiny_idefics3: Path,
    onnx_graphs: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_tensors, "INLINE_BYTES", 1000)
    files, checks = to_onnx(tiny_idefics3, tmp_path, "q4f16", graphs=onnx_graphs(tiny_idefics3))
    graphs = [f"{name}{suffix}" for name, suffix in zip(NAMES, SUFFIXES["q4f16"], strict=True)]
    beside = [f"onnx/{name}.onnx_data" for name in graphs]
    assert [file.path for file in files if file.role == "external_data"] == beside
    hints = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    assert hints["use_external_data_format"] == {f"{name}.onnx": 1 for name in graphs}
    sizes = [(tmp_path / path).stat().st_size for path in beside]
    assert [fact["external_data_bytes"] for fact in checks["graphs"].values()] == sizes
    embeds = np.random.default_rng(0).normal(0, 0.1, (1, 12, 64)).astype(np.float32)
    got, wanted = (
        prompt_in_two_pieces(path, embeds)
        for path in (tmp_path / "onnx" / f"{graphs[2]}.onnx", paths_of(exported, "q4f16")[2])
    )
    np.testing.assert_array_equal(got, wanted)


def test_the_folder_is_still_a_processor_for_transformers(exported: Exported, tiny_idefics3: Path) -> None:
    from transformers import AutoConfig, AutoProcessor

    folder = exported["fp32"][0]
    ours, theirs = (AutoProcessor.from_pretrained(path) for path in (folder, tiny_idefics3))
    assert ours.image_processor.size == theirs.image_processor.size
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert AutoConfig.from_pretrained(folder).text_config.vocab_size == len(theirs.tokenizer)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"longest_edge": 192}


@pytest.mark.parametrize(
    ("model", "images", "processor"),
    [
        ("tiny_idefics3", "Idefics3ImageProcessor", "Idefics3Processor"),
        ("tiny_qwen2_vl", "Qwen2VLImageProcessor", "Qwen2VLProcessor"),
        ("tiny_qwen2_5_vl", "Qwen2VLImageProcessor", "Qwen2_5_VLProcessor"),
        ("tiny_llava", "CLIPImageProcessor", "LlavaProcessor"),
        ("tiny_llava_siglip", "SiglipImageProcessor", "LlavaProcessor"),
        ("tiny_internvl", "GotOcr2ImageProcessor", "InternVLProcessor"),  # transformers.js knows neither
    ],
)
def test_processors_have_the_names_and_settings_that_transformers_js_looks_for(
    model: str, images: str, processor: str, request: pytest.FixtureRequest, tmp_path: Path, picture: Any
) -> None:
    from mpa_edge.processors import load_processor

    source = request.getfixturevalue(model)
    write_processor(source, tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (settings["image_processor_type"], settings["processor_class"]) == (images, processor)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert template == (tmp_path / "chat_template.jinja").read_text()
    # transformers makes the same of it as of the original.
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    text = f"{load_processor(source).image_token} How many?"
    ours, theirs = (
        load_processor(folder)(images=[picture(90, 70)], text=[text], return_tensors="np")
        for folder in (source, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    if "merge_size" in settings:
        assert (settings["min_pixels"], settings["max_pixels"]) == tuple(
            settings["size"][edge] for edge in ("shortest_edge", "longest_edge")
        )


def test_transformers_js_counts_the_image_tokens_of_a_clip_tower_as_transformers_does(
    tiny_llava: Path, tmp_path: Path, picture: Any
) -> None:
    from mpa_edge.processors import load_processor

    processor = load_processor(tiny_llava)
    ids = processor(images=[picture(90, 70)], text=["<image>"])["input_ids"][0]
    write_processor(tiny_llava, tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    crop = json.loads((tmp_path / "preprocessor_config.json").read_text())["crop_size"]
    # LlavaProcessor._call in transformers.js, which knows no vision_feature_select_strategy.
    patches = (crop["height"] // settings["patch_size"]) * (crop["width"] // settings["patch_size"])
    assert patches + settings["num_additional_image_tokens"] == ids.count(processor.image_token_id)


def test_a_processor_of_llavas_own_is_called_by_the_name_that_transformers_js_knows(
    tiny_llava: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    settings = {"image_processor_type": "LlavaImageProcessorFast", "processor_class": "LlavaProcessor"}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "bundle").mkdir()
    write_processor(source, tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle" / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "CLIPImageProcessor"


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no tokenizer\.json"):
        write_processor(tmp_path, tmp_path)


def test_a_quantized_export_leaves_terminal_and_logging_alone(exported: Exported, tmp_path: Path) -> None:
    program = (
        "import logging; from pathlib import Path; from mpa_edge.export.onnx_quantize import *\n"
        f"source = Path({str(paths_of(exported, 'fp32')[2])!r})\n"
        f"convert(source, Path({str(tmp_path)!r}, 'q4.onnx'), PRECISIONS['q4f16'])\n"
        "assert not logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_an_unknown_quantization_is_named_with_the_known_ones(tiny_idefics3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--quant q8_0: ONNX bundles come as fp32, fp16, int8, q4, q4f16"):
        to_onnx(tiny_idefics3, tmp_path, "q8_0")


def test_an_unknown_family_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "kosmos-2"}')
    with pytest.raises(UnknownFamily, match="kosmos-2"):
        to_onnx(tmp_path, tmp_path / "bundle", "fp32")
