"""The merge: base plus adapter, or the tensors of a fine-tuned model, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpa_edge.errors import ExportError
from mpa_edge.export.merge import merge
from mpa_edge.export.merge_checks import logits_of, probe_of
from mpa_edge.export.merge_trained import targeted_tensors
from tiny_checkpoints import change_tensor

QUERY = "model.text_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_idefics3, tmp_path / "copy"))


def test_a_merge_changes_what_the_adapter_targets_and_nothing_else(
    tiny_idefics3: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    outcome = merge(tiny_adapter, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_idefics3, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == targeted_tensors(tiny_adapter)
    assert outcome["changed"] == outcome["targeted"] == len(changed) == 4
    assert outcome["logit_error"] < 1e-4 < outcome["adapter_effect"]


def test_the_merged_model_is_base_plus_adapter(tiny_idefics3: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    merge(tiny_adapter, tmp_path / "merged")
    probe = probe_of(tiny_idefics3)
    base = AutoModelForImageTextToText.from_pretrained(tiny_idefics3)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    expected = logits_of(PeftModel.from_pretrained(base, str(tiny_adapter)), probe)
    np.testing.assert_allclose(logits_of(merged, probe), expected, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_connector_and_vision_tower_are_merged_too(
    use_dora: bool, tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    from transformers import AutoModelForImageTextToText

    from mpa_edge.trainable import Anatomy

    names = Anatomy(AutoModelForImageTextToText.from_pretrained(tiny_idefics3)).linears(["connector", "vision"])
    adapter = adapter_on(tiny_idefics3, target_modules=names, use_dora=use_dora)
    outcome = merge(adapter, tmp_path / "merged")
    assert targeted_tensors(adapter) == {f"{name}.weight" for name in names}
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_idefics3, tmp_path / "merged"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == targeted_tensors(adapter)
    assert outcome["logit_error"] < 1e-4 < outcome["adapter_effect"]


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}, "use_rslora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_dora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=lambda options: " ".join(options),
)
def test_whatever_peft_knows_is_merged(
    options: dict[str, Any], tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    adapter = adapter_on(tiny_idefics3, target_modules=r".*vision_model.*\.(q|v)_proj", **options)
    path = adapter / "adapter_model.safetensors"
    if "bias" in options:
        save_file({key: value + 0.1 if "bias" in key else value for key, value in load_file(path).items()}, path)
    outcome = merge(adapter, tmp_path / "merged")
    assert outcome["changed"] == (8 if {"bias", "lora_bias"} & options.keys() else 4)
    assert outcome["logit_error"] < 1e-4 < outcome["adapter_effect"]


def tuned(base: Path, folder: Path, names: list[str], dtype: torch.dtype = torch.float32) -> Path:
    """A whole model of which some tensors were trained."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight += torch.randn_like(weight) * 0.05
    model.save_pretrained(folder)
    facts = {"base_model_name_or_path": str(base), "tensors": names}
    (folder / "trained.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_model_gives_its_trained_tensors_to_the_base(
    dtype: torch.dtype, tiny_idefics3: Path, tmp_path: Path
) -> None:
    names = [QUERY, "model.text_model.embed_tokens.weight", "model.text_model.norm.weight"]
    outcome = merge(tuned(tiny_idefics3, tmp_path / "tuned", names, dtype), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_idefics3, tmp_path / "merged"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}  # the base's own
    assert outcome["changed"] == outcome["targeted"] == 3
    assert outcome["adapter_effect"] > 1e-2


def test_a_fine_tuned_model_that_differs_where_it_was_not_trained_is_refused(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    folder = tuned(tiny_idefics3, tmp_path / "tuned", [QUERY])
    change_tensor(folder, QUERY.replace("q_proj", "k_proj"), lambda tensor: -tensor)
    with pytest.raises(ExportError, match="disagree"):
        merge(folder, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_the_type_of_the_base(
    dtype: torch.dtype, copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    merge(adapter_on(copy), tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}


def test_modules_to_save_are_merged(tiny_one_tile: Path, tmp_path: Path, adapter_on: Callable[..., Path]) -> None:
    adapter = adapter_on(tiny_one_tile, modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] += 0.5
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge(adapter, tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors")["lm_head.weight"] for f in (tiny_one_tile, tmp_path / "merged"))
    torch.testing.assert_close(after, before + 0.5)


def test_a_tied_output_layer_cannot_be_merged(
    tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path]
) -> None:
    adapter = adapter_on(tiny_idefics3, modules_to_save=["lm_head"])
    with pytest.raises(ExportError, match=r"lm_head|disagree"):
        merge(adapter, tmp_path / "merged")


def test_no_path_of_this_machine_is_carried_on(copy: Path, tmp_path: Path, adapter_on: Callable[..., Path]) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/someone/checkpoints/best"}))
    merge(adapter_on(copy), tmp_path / "merged")
    for file in (tmp_path / "merged").glob("*.json"):
        assert "/home/someone" not in file.read_text()


def test_the_license_is_carried_on(tiny_adapter: Path, tmp_path: Path) -> None:
    merge(tiny_adapter, tmp_path / "merged")
    assert "license: apache-2.0" in (tmp_path / "merged" / "README.md").read_text()


def test_a_missing_base_is_a_clear_error(tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/model"}))
    with pytest.raises(ExportError, match="not there"):
        merge(adapter, tmp_path / "merged")


def test_a_run_with_a_picture_size_of_its_own_merges_into_a_model_with_it(
    tiny_idefics3: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """What the student was asked and trained with is what every later step loads."""
    from mpa_edge.export.merged import open_source
    from mpa_edge.processors import load_processor

    run = tmp_path / "run"
    shutil.copytree(tiny_adapter, run / "student")
    for longest_edge in (128, 64, None):
        config = {"task": "reference", "longest_edge": longest_edge}
        (run / "run.json").write_text(json.dumps({"config": config}))
        folder = open_source(run, None, lambda line: None).folder
        student = load_processor(tiny_idefics3, longest_edge)
        assert load_processor(folder).image_processor.to_dict() == student.image_processor.to_dict()
        saved = json.loads((folder / "processor_config.json").read_text())["image_processor"]["size"]
        assert saved == {"longest_edge": longest_edge or 192}
