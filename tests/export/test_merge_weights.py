"""Weights by name, for every family and for the names that checkpoints had before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpa_edge.errors import ExportError
from mpa_edge.export import merge_weights
from mpa_edge.export.merge import merge
from mpa_edge.export.merge_checks import logits_of, probe_of
from mpa_edge.export.merge_weights import in_float32, load_model, names_on_disk, stored_dtype
from mpa_edge.trainable import Anatomy
from tiny_checkpoints import change_tensor, edit_tensors, hub_name

FAMILIES = ["tiny_idefics3", "tiny_qwen2_vl", "tiny_qwen2_5_vl", "tiny_llava", "tiny_internvl"]
# As on the hub.
STORED = {
    "idefics3": {"model.text_model.norm.weight", "model.connector.modality_projection.proj.weight"},
    "qwen2_vl": {"model.norm.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.bias"},
    "qwen2_5_vl": {"model.embed_tokens.weight", "visual.blocks.0.mlp.gate_proj.weight"},
    "llava": {
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
    },
    "internvl": {
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.embeddings.cls_token",
        "multi_modal_projector.linear_1.weight",
    },
}


def with_names(model: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a model whose tensors are stored under other names; `rename` takes those of the loaded model."""
    shutil.copytree(model, folder)
    there = {stored: name for name, stored in names_on_disk(model, load_model(model)).items()}
    edit_tensors(folder, lambda tensors: {rename(there[stored]): tensor for stored, tensor in tensors.items()})
    return folder


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, "hub") for family in FAMILIES), ("tiny_qwen2_vl", "modules"), ("tiny_llava", "modules")],
)
def test_every_family_merges_under_the_names_on_disk(
    family: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest, adapter_on: Callable[..., Path]
) -> None:
    model: Path = request.getfixturevalue(family)
    kind = json.loads((model / "config.json").read_bytes())["model_type"]
    base = with_names(model, tmp_path / "base", (lambda name: hub_name(kind, name)) if layout == "hub" else str)
    before = load_file(base / "model.safetensors")
    assert (STORED[kind] <= before.keys()) == (layout == "hub" or kind == "idefics3")

    loaded = load_model(base)
    names = names_on_disk(base, loaded)
    for name, stored in names.items():
        assert torch.equal(loaded.state_dict()[name], before[stored])
    linears = Anatomy(loaded).linears(["language", "connector", "vision"])
    outcome = merge(adapter_on(base, target_modules=linears), tmp_path / "merged")

    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {names[f"{linear}.weight"] for linear in linears}
    assert outcome["changed"] == outcome["targeted"] == len(changed)
    assert outcome["logit_error"] < 1e-3 * outcome["adapter_effect"]


def test_a_fine_tuned_model_merges_into_a_base_with_other_names(tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    base = with_names(tiny_qwen2_vl, tmp_path / "base", str)
    model = load_model(tiny_qwen2_vl)
    names = ["model.language_model.embed_tokens.weight", "model.visual.merger.mlp.0.weight"]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    facts = {"base_model_name_or_path": str(base), "tensors": names}
    (tmp_path / "tuned" / "trained.json").write_text(json.dumps(facts))
    assert "visual.merger.mlp.0.weight" in load_file(tmp_path / "tuned" / "model.safetensors")
    merge(tmp_path / "tuned", tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)


def test_an_embedding_that_is_stored_twice_changes_in_both_places(tiny_idefics3: Path, tmp_path: Path) -> None:
    """Checkpoints may hold the tied output layer all the same; transformers unties the two when they differ."""
    base, name = Path(shutil.copytree(tiny_idefics3, tmp_path / "base")), "model.text_model.embed_tokens.weight"
    edit_tensors(base, lambda tensors: {**tensors, "lm_head.weight": tensors[name].clone()})
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    edit_tensors(tuned, lambda tensors: {**tensors, name: tensors[name] * 1.1, "lm_head.weight": tensors[name] * 1.1})
    (tuned / "trained.json").write_text(json.dumps({"base_model_name_or_path": str(base), "tensors": [name]}))
    outcome = merge(tuned, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after[name])
    assert outcome["changed"] == 2


def test_weights_that_are_stored_fused_are_refused(
    tiny_idefics3: Path, tmp_path: Path, adapter_on: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    base = Path(shutil.copytree(tiny_idefics3, tmp_path / "base"))
    adapter = adapter_on(base, target_modules=r".*text_model.*\.gate_proj")
    mlp = "model.text_model.layers.{}.mlp.{}.weight"

    def fuse(tensors: dict[str, Any]) -> dict[str, Any]:
        for layer in range(2):
            gate, up = (tensors.pop(mlp.format(layer, part)) for part in ("gate_proj", "up_proj"))
            tensors[mlp.format(layer, "gate_up")] = torch.cat([gate, up])
        return tensors

    edit_tensors(base, fuse)
    split = WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    for module in ("transformers.modeling_utils", merge_weights.__name__):
        monkeypatch.setattr(f"{module}.get_model_conversion_mapping", lambda *_, **__: [split])
    assert "model.text_model.layers.0.mlp.gate_proj.weight" not in names_on_disk(base, load_model(base))
    with pytest.raises(ExportError, match="2 tensors that the checkpoint does not hold as such"):
        merge(adapter, tmp_path / "merged")


def test_a_base_in_several_files_stays_in_several_files(tmp_path: Path, tiny_qwen2_vl: Path, adapter_on: Any) -> None:
    base = Path(shutil.copytree(tiny_qwen2_vl, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    load_model(tiny_qwen2_vl).save_pretrained(base, max_shard_size="100KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    outcome = merge(adapter_on(base), tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    assert outcome["changed"] == 4
    (tmp_path / "merged" / shards[1]).unlink()
    with pytest.raises(ExportError, match=f"lacks {shards[1]}"):
        load_model(tmp_path / "merged")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bit_computes_in_float32(
    dtype: torch.dtype, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "copy"))
    edit_tensors(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    probe = probe_of(folder)
    expected = logits_of(load_model(folder).float(), probe)
    assert stored_dtype(folder) == dtype
    found = logits_of(model := load_model(folder), probe)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    # Pictures are rounded as the weights are, in models that cast them: some 1e-3 of the logits, not 1e-2.
    np.testing.assert_allclose(found, expected, atol=3e-3 * np.abs(expected).max())


def test_weights_are_not_copied(tiny_idefics3: Path) -> None:
    model = load_model(tiny_idefics3)
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with in_float32(model, rounded=["lm_head.weight"]):
        pass
    assert {weight.untyped_storage().data_ptr() for weight in model.parameters()} == storages


def test_files_of_mixed_types_are_float32(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_idefics3, tmp_path / "copy"))
    change_tensor(folder, "model.text_model.norm.weight", lambda tensor: tensor.bfloat16())
    assert stored_dtype(folder) == torch.float32
    assert {weight.dtype for weight in load_model(folder).parameters()} == {torch.float32}
