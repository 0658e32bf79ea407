from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mpa_edge.bundle import read_bundle
from mpa_edge.errors import BundleError, InputError, MissingExtra, ModelError
from mpa_edge.runtime import load, open_bundle
from mpa_edge.runtime.openvino import OpenVinoEngine, _check_device
from mpa_edge.runtime.openvino_library import ov
from mpa_edge.runtime.openvino_vision import rotary_angles, window_mask, windows

QUESTION = "What does the sign say?"
Picture = Callable[..., Any]
MakeBundle = Callable[[Path, str], Path]


def opened(folder: Path, image: Any) -> tuple[Any, list[int], Any, Any]:
    """An engine, a prompt about a picture, the picture's features and the prompt's positions."""
    vlm = load(folder, threads=1)
    tokens, seen = vlm.prepare([image], QUESTION)
    engine: Any = vlm._engine
    features = np.concatenate([engine.encode(cut) for cut in seen.cuts])
    return engine, list(tokens), features, vlm._reader._positions(tokens, seen)


@pytest.mark.parametrize("model", ["tiny_idefics3", "tiny_qwen2_5_vl"])
def test_decoding_equals_reading_the_same_tokens_at_once(
    request: pytest.FixtureRequest, model: str, openvino_bundle: MakeBundle, picture: Picture
) -> None:
    folder = openvino_bundle(request.getfixturevalue(model), "fp32")
    engine, tokens, features, positions = opened(folder, picture(200, 180))
    more = None if positions is None else positions.max() + 1 + np.broadcast_to(np.arange(3), (3, 3))
    whole = None if positions is None else np.concatenate([positions, more], axis=1)
    wanted = engine.prefill([*tokens, 11, 12, 13], features, whole, all_logits=True)[-4:]
    got = [engine.prefill(tokens, features, positions), *(engine.extend([token]) for token in (11, 12, 13))]
    np.testing.assert_allclose(np.stack(got), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_new_prompt_forgets_the_old_one(tiny_idefics3: Path, openvino_bundle: MakeBundle, picture: Picture) -> None:
    engine, tokens, features, _ = opened(openvino_bundle(tiny_idefics3, "fp32"), picture(200, 180))
    first = engine.prefill(tokens, features)
    engine.extend([11])
    engine.prefill(tokens[::-1], features)
    np.testing.assert_array_equal(engine.prefill(tokens, features), first)


def test_rewinding_cuts_the_cache_at_the_mark(
    tiny_qwen2_5_vl: Path, openvino_bundle: MakeBundle, picture: Picture
) -> None:
    engine, tokens, features, positions = opened(openvino_bundle(tiny_qwen2_5_vl, "fp32"), picture(200, 180))
    assert not engine.rewind()
    engine.prefill(tokens, features, positions)
    engine.mark()
    assert engine.rewind()
    first = engine.extend([11, 12])
    engine.extend([13])
    assert engine.rewind()
    np.testing.assert_array_equal(engine.extend([11, 12]), first)
    engine.prefill(tokens, features, positions)
    assert not engine.rewind()


def test_a_kept_picture_gives_the_very_same_answers(
    tiny_idefics3: Path, openvino_bundle: MakeBundle, check_kept_pictures: Callable[..., None]
) -> None:
    with load(openvino_bundle(tiny_idefics3, "int8"), threads=1) as vlm:
        check_kept_pictures(vlm, QUESTION)


def test_the_engine_runs_without_torch_and_tells_nobody(
    tiny_qwen2_5_vl: Path, openvino_bundle: MakeBundle, picture: Picture, tmp_path: Path
) -> None:
    picture(200, 40).save(tmp_path / "picture.png")
    program = (
        "import json, sys\n"
        "from mpa_edge.runtime import load\n"
        f"with load({str(openvino_bundle(tiny_qwen2_5_vl, 'int8'))!r}, threads=1) as vlm:\n"
        f"    answer = vlm.ask({str(tmp_path / 'picture.png')!r}, {QUESTION!r})\n"
        "heavy = {'torch', 'transformers', 'nncf', 'onnxruntime', 'optimum', 'openvino_telemetry.main'}\n"
        "print(json.dumps([answer.tokens, sorted(heavy & set(sys.modules))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    tokens, heavy = json.loads(done.stdout)
    assert tokens
    assert heavy == []
    assert done.stderr == ""


def test_features_must_match_the_image_tokens(
    tiny_idefics3: Path, openvino_bundle: MakeBundle, picture: Picture
) -> None:
    engine, tokens, features, _ = opened(openvino_bundle(tiny_idefics3, "fp32"), picture(200, 40))
    with pytest.raises(ModelError, match="64 image tokens in the prompt for 48 image features"):
        engine.prefill(tokens, features[:48])


def test_a_damaged_graph_and_a_missing_device_are_named(
    tiny_idefics3: Path, openvino_bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(openvino_bundle(tiny_idefics3, "fp32"), folder)
    bundle = read_bundle(folder)
    with pytest.raises(InputError, match="OpenVINO sees no device NPX here: CPU"):
        OpenVinoEngine(folder, bundle, 0, device="NPX")
    damaged = folder / "openvino_language_model.xml"
    damaged.write_bytes(damaged.read_bytes()[:-400])
    with pytest.raises(BundleError, match=r"openvino_language_model.xml cannot be loaded by OpenVINO"):
        OpenVinoEngine(folder, bundle, 0, threads=1)


def test_what_the_library_refuses_to_run_is_one_line(
    tiny_idefics3: Path, openvino_bundle: MakeBundle, picture: Picture
) -> None:
    folder = openvino_bundle(tiny_idefics3, "fp32")
    bundle = read_bundle(folder)
    large = bundle.model_copy(update={"image": bundle.image.model_copy(update={"tile_size": 96})})
    with open_bundle(folder, large, threads=1) as vlm:
        with pytest.raises(ModelError, match="the vision encoder cannot be run") as error:
            vlm.ask(picture(200, 40), QUESTION)
        assert str(error.value).isprintable()


def test_devices_are_as_openvino_names_them(tiny_idefics3: Path, openvino_bundle: MakeBundle, picture: Picture) -> None:
    here = ["CPU", "GPU.0", "GPU.1"]
    for device in ("CPU", "GPU", "GPU.1", "AUTO", "AUTO:GPU,CPU", "HETERO:GPU.1,CPU"):
        _check_device(device, here)
    for device in ("GPU.2", "GP", "NPU", "G"):
        with pytest.raises(InputError, match=f"sees no device {device} here: CPU, GPU.0, GPU.1"):
            _check_device(device, here)
    folder = openvino_bundle(tiny_idefics3, "fp32")
    with load(folder, threads=1, device="hetero:cpu") as several, load(folder, threads=1) as one:
        assert several.ask(picture(64, 64), QUESTION).tokens == one.ask(picture(64, 64), QUESTION).tokens
    with pytest.raises(InputError, match=r"--device AUTO:NPX: OpenVINO .* cannot run .*No available device") as error:
        load(folder, threads=1, device="auto:npx")
    assert str(error.value).isprintable()


def test_a_language_model_of_another_kind_is_refused(
    tiny_idefics3: Path, openvino_bundle: MakeBundle, tmp_path: Path
) -> None:
    from mpa_edge.runtime.openvino import _keep_last_logits

    path = openvino_bundle(tiny_idefics3, "fp32") / "openvino_text_embeddings_model.xml"
    graph = ov.Core().read_model(path)
    graph.outputs[0].get_tensor().set_names({"logits"})
    with pytest.raises(BundleError, match="do not come from a MatMul"):
        _keep_last_logits(graph)


def test_a_missing_library_is_one_line_with_its_cure(
    tiny_idefics3: Path, openvino_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mpa_edge.runtime.openvino_library")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r'openvino is not installed. Run: pip install "mpa-edge\[openvino\]"'):
        load(openvino_bundle(tiny_idefics3, "fp32"))


GRIDS = [(1, 1), (4, 4), (5, 7), (3, 11), (9, 4)]


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_angles_are_those_of_transformers(rows: int, columns: int) -> None:
    config = Qwen2VLVisionConfig(embed_dim=64, num_heads=2)
    grid = torch.tensor([[1, rows * 2, columns * 2]])
    cos, sin = Qwen2VLVisionRotaryEmbedding(config)(torch.zeros(1), get_vision_position_ids(grid, 2))
    got = rotary_angles(rows, columns, 2, 16)
    np.testing.assert_allclose(np.cos(np.tile(got, 2)), cos.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.sin(np.tile(got, 2)), sin.numpy(), atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_windows_are_those_of_transformers(rows: int, columns: int) -> None:
    grid = torch.tensor([[1, rows * 2, columns * 2]])
    wanted, ends = get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14)
    order, counts = windows(rows, columns, 4)
    np.testing.assert_array_equal(order, wanted.numpy())
    np.testing.assert_array_equal(np.cumsum(counts * 4), np.unique(ends.numpy())[1:])
    seen = window_mask(counts, 2)[0] == 0
    assert seen.sum() == ((counts * 4) ** 2).sum()
    assert seen[0, : counts[0] * 4].all()
