"""Names of what is trained, derived from models of four layouts: none of them is written down anywhere but here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from mpa_edge.config import Part
from mpa_edge.errors import ModelError
from mpa_edge.trainable import Anatomy, count_parameters, in_words

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Of each layout: the names of the three parts, and the leaves that LoRA goes to in vision tower and connector.
LAYOUTS: dict[str, dict[Part, tuple[str, set[str]]]] = {
    "idefics3": {
        "language": (r"model\.text_model\.", LANGUAGE),
        "connector": (r"model\.connector\.", {"proj"}),
        "vision": (r"model\.vision_model\.", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    },
    "qwen2_vl": {
        "language": (r"model\.language_model\.", LANGUAGE),
        "connector": (r"model\.visual\.merger\.", {"0", "2"}),
        "vision": (r"model\.visual\.(blocks|patch_embed)\.", {"qkv", "proj", "fc1", "fc2"}),
    },
    "llava": {
        "language": (r"model\.language_model\.", LANGUAGE),
        "connector": (r"model\.multi_modal_projector\.", {"linear_1", "linear_2"}),
        "vision": (r"model\.vision_tower\.", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    },
    "internvl": {
        "language": (r"model\.language_model\.", LANGUAGE),
        "connector": (r"model\.multi_modal_projector\.", {"linear_1", "linear_2"}),
        "vision": (r"model\.vision_tower\.", {"q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"}),
    },
}


def build(layout: str) -> Any:
    """A tiny random model in one of the layouts."""
    if layout == "idefics3":
        config: Any = transformers.Idefics3Config(vision_config=VISION, text_config={"model_type": "llama", **TEXT})
    elif layout == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
        config = transformers.Qwen2VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": rope})
    elif layout == "llava":
        vision = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}
        config = transformers.LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **TEXT})
    else:
        vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
        config = transformers.InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **TEXT})
    return transformers.AutoModelForImageTextToText.from_config(config)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {layout: build(layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_layers_are_found_part_by_part(layout: str, models: dict[str, Any]) -> None:
    model = models[layout]
    anatomy = Anatomy(model)
    for part, (prefix, leaves) in LAYOUTS[layout].items():
        names = anatomy.linears([part])
        assert all(re.match(prefix, name) for name in names), part
        assert {name.rpartition(".")[2] for name in names} == leaves, part
    # All of them, each once, but for the output layer.
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = [name for part in LAYOUTS[layout] for name in anatomy.linears([part])]
    assert sorted(found) == sorted(linears - {"lm_head"})
    assert sorted(found) == sorted(anatomy.linears(["vision", "language", "connector"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_weight_belongs_to_one_part(layout: str, models: dict[str, Any]) -> None:
    anatomy = Anatomy(models[layout])
    names = [name for name, _ in models[layout].named_parameters()]
    for part, (prefix, _) in LAYOUTS[layout].items():
        expected = [name for name in names if re.match(prefix, name)]
        if part == "language":
            expected += [name for name in names if name.startswith("lm_head")]
        assert anatomy.weights([part]) == expected, part
    assert sorted(name for part in LAYOUTS[layout] for name in anatomy.weights([part])) == sorted(names)


def test_weights_are_counted_by_module_and_told() -> None:
    model = build("qwen2_vl")
    for name, weight in model.named_parameters():
        weight.requires_grad_("merger" in name)
    counted = count_parameters(model)
    merger = {"visual.ln_q": 32, "visual.mlp": 64 * 64 + 64 + 64 * 16 + 16}
    assert counted["trainable"] == merger
    frozen = sum(weight.numel() for weight in model.parameters()) - sum(merger.values())
    assert sum(counted["frozen"].values()) == frozen
    assert set(counted["frozen"]) == {"visual", "language_model", "lm_head"}
    assert (
        in_words(counted)
        == f"{sum(merger.values()):,} of {frozen + sum(merger.values()):,} weights (visual: ln_q, mlp)"
    )


def test_what_has_no_such_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(torch.nn.Module):
        base_model = None

        def get_decoder(self) -> Any:
            return self

    with pytest.raises(ModelError, match="language model"):
        Anatomy(Odd())
    model = build("llava")
    monkeypatch.setattr(model, "get_encoder", lambda modality: model)  # as transformers answers where it finds none
    assert Anatomy(model).linears(["language"])
    with pytest.raises(ModelError, match="only --train language"):
        Anatomy(model).linears(["language", "vision"])
