"""Every family's vision half of a GGUF pair: features equal transformers', names on disk, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpa_edge.errors import ExportError
from mpa_edge.export.gguf_vision import check_vision, feature_layers
from mpa_edge.export.merged import Names
from mpa_edge.export.to_gguf import to_gguf
from mpa_edge.processors import load_processor
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.families import family_of_bundle
from tiny_bundles import manifest_of

MODELS = ["tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava", "tiny_llava_siglip", "tiny_internvl"]
# The mmproj's error as a fraction of the features' deviation. In float32 the pixels still enter as half precision and
# GELU comes from a table of it; then 11 bits of mantissa, then 8-bit weights.
ALLOWED = {"f32": 0.003, "f16": 0.004, "q8_0": 0.05}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def features_of(model: Path, folder: Path, quant: str, made: Any, image: Any) -> Any:
    """The picture's features by llama.cpp."""
    bundle = manifest_of(model, "llama.cpp", quant, made[quant][0])
    with open_bundle(folder, bundle, threads=1) as vlm:
        return vlm._engine.encode(family_of_bundle(bundle).cut(image, bundle.image))


def original_features(model: Path, image: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    whole: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    given = load_processor(model)(text=[load_processor(model).image_token], images=[image], return_tensors="pt")
    options = {"image_grid_thw": given["image_grid_thw"]} if "image_grid_thw" in given else {}
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if hasattr(whole.config, name):
            options[name] = getattr(whole.config, name)
    with torch.inference_mode():
        found = whole.get_image_features(given["pixel_values"], **options).pooler_output
    return np.concatenate([np.asarray(part).reshape(-1, whole.config.text_config.hidden_size) for part in found])


def test_features_equal_transformers(model: Path, tmp_path: Path, picture: Any) -> None:
    image = picture(150, 90)
    wanted = original_features(model, image)
    made = {
        **to_gguf(model, {quant: tmp_path / quant for quant in ("f32", "f16")}, Names("tiny")),
        **to_gguf(model, {"q8_0": tmp_path / "q8_0"}, Names("tiny"), mmproj="q8_0"),
    }
    for quant in made:
        got = features_of(model, tmp_path / quant, quant, made, image)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() < ALLOWED[quant] * np.abs(wanted).max()
        assert made[quant][1]["tokenizer_agreement"] == 1.0


def test_llama_cpps_own_program_answers_with_the_pair(model: Path, tmp_path: Path, picture: Any) -> None:
    program = shutil.which("llama-mtmd-cli", path=os.environ.get("LLAMA_CPP_BIN", os.environ.get("PATH")))
    if program is None:
        pytest.skip("llama-mtmd-cli is not on PATH; name its folder in LLAMA_CPP_BIN")
    language, mmproj = (
        str(tmp_path / file.path) for file in to_gguf(model, {"f16": tmp_path}, Names("x"))["f16"][0][:2]
    )
    picture(80, 60).save(tmp_path / "a.png")
    command = [program, "-m", language, "--mmproj", mmproj, "--image", str(tmp_path / "a.png"), "-p", "What is it?"]
    options = ["--jinja", "-n", "4", "--temp", "0", "-t", "1"]
    run = subprocess.run([*command, *options], capture_output=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:].decode(errors="replace")


def rename(source: Path, target: Path, *pairs: tuple[str, str]) -> Path:
    """The model with its tensors' names changed at the front, as checkpoints of other versions have them."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for old, new in pairs:
        assert any(name.startswith(old) for name in tensors)
        tensors = {new + name[len(old) :] if name.startswith(old) else name: data for name, data in tensors.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def tensors_of(folder: Path, files: Any) -> dict[str, bytes]:
    return {
        f"{file.role} {tensor.name}": tensor.data.tobytes()
        for file in files[:2]
        for tensor in gguf.GGUFReader(folder / file.path).tensors
    }


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("tiny_qwen2_vl", [("visual.", "model.visual."), ("model.layers.", "model.language_model.layers.")]),
        ("tiny_llava", [("vision_tower.", "vision_tower.vision_model.")]),
        ("tiny_llava", [("vision_tower.", "model.vision_tower."), ("multi_modal", "model.multi_modal")]),
        (
            "tiny_internvl",
            [("vision_tower.", "model.vision_tower."), ("language_model.model.", "model.language_model.")],
        ),
    ],
    ids=["qwen2_vl", "llava-hub", "llava", "internvl"],
)
def test_names_of_other_checkpoints_give_the_same_files(
    name: str, pairs: list[tuple[str, str]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(name)
    other = rename(source, tmp_path / "model", *pairs)
    made = [
        to_gguf(model, {"f16": tmp_path / out}, Names("x"))["f16"][0] for model, out in ((source, "a"), (other, "b"))
    ]
    assert tensors_of(tmp_path / "a", made[0]) == tensors_of(tmp_path / "b", made[1])


def test_layers_that_are_not_looked_at_are_left_out(tiny_llava: Path, tmp_path: Path) -> None:
    files = to_gguf(tiny_llava, {"f16": tmp_path}, Names("x"))["f16"][0]
    reader = gguf.GGUFReader(tmp_path / files[1].path)
    assert reader.fields["clip.vision.block_count"].contents() == 2
    assert reader.fields["clip.vision.feature_layer"].contents() == [2]
    assert not any(tensor.name.startswith(("v.blk.2.", "v.post_ln")) for tensor in reader.tensors)


def test_feature_layers_count_from_the_first() -> None:
    vision = {"num_hidden_layers": 24}
    assert feature_layers({"vision_config": vision, "vision_feature_layer": -2}) == [23]
    assert feature_layers({"vision_config": vision, "vision_feature_layer": [3, -1]}) == [3, 24]
    with pytest.raises(ExportError, match="ascending"):
        feature_layers({"vision_config": vision, "vision_feature_layer": [-1, 3]})


def test_a_projector_without_biases_gets_zeros(tiny_llava_siglip: Path, tmp_path: Path, picture: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava_siglip, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "multimodal_projector_bias": False}))
    tensors = load_file(model / "model.safetensors")
    kept = {name: data for name, data in tensors.items() if "projector" not in name or not name.endswith(".bias")}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    made = to_gguf(model, {"f32": tmp_path / "f32"}, Names("x"))
    image = picture(80, 60)
    wanted = original_features(model, image)
    got = features_of(model, tmp_path / "f32", "f32", made, image)
    assert np.abs(got - wanted).max() < ALLOWED["f32"] * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("name", "part", "key", "value"),
    [
        ("tiny_qwen2_vl", "vision_config", "spatial_merge_size", 4),
        ("tiny_qwen2_5_vl", "vision_config", "window_size", 56),
        ("tiny_qwen2_5_vl", "vision_config", "fullatt_block_indexes", [1]),
        ("tiny_llava", None, "vision_feature_select_strategy", "full"),
        ("tiny_llava_siglip", None, "vision_feature_select_strategy", "default"),
        ("tiny_llava", "vision_config", "hidden_act", "relu"),
        ("tiny_llava", "vision_config", "intermediate_size", 32),
        ("tiny_internvl", "vision_config", "use_qk_norm", True),
        ("tiny_internvl", "vision_config", "norm_type", "rms_norm"),
        ("tiny_idefics3", "vision_config", "hidden_act", "quick_gelu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, part: str | None, key: str, value: Any, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(request.getfixturevalue(name)).to_dict()
    check_vision(config)
    (config[part] if part else config)[key] = value
    with pytest.raises(ExportError, match=f"{key}.*--format onnx"):
        check_vision(config)
