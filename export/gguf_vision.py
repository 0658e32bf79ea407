"""The vision half of a GGUF pair, per family: llama.cpp's converters, with what they lack for transformers' files.

llama.cpp's `clip.cpp` leaves some choices of a model no room; `check_vision` refuses those before anything is written,
because the file would load and see something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gguf
import torch
from conversion.base import MmprojModel
from conversion.internvl import InternVisionModel
from conversion.qwenvl import Qwen2VLVisionModel
from conversion.smolvlm import SmolVLMModel

from mpa_edge.errors import ExportError

Named = tuple[str, Callable[[], torch.Tensor]]

# What clip.cpp computes where transformers has these; its GELU is the tanh form, also for the exact one.
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")
PROJECTOR = {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}


class Llava(MmprojModel):  # type: ignore[misc]
    """LLaVA with a CLIP or a SigLIP tower, clip.cpp's projector type `mlp`; the converter itself knows Pixtral only."""

    model_arch = gguf.MODEL_ARCH.MMPROJ

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feature_layers = feature_layers(self.global_config)
        # The layers after the deepest one that is taken are dead weight.
        self.block_count = self.hparams_vision["num_hidden_layers"] = self.feature_layers[-1]

    def set_gguf_parameters(self) -> None:
        super().set_gguf_parameters()
        self.gguf_writer.add_clip_projector_type("mlp")
        self.gguf_writer.add_vision_attention_layernorm_eps(self.hparams["layer_norm_eps"])
        self.gguf_writer.add_vision_use_gelu(self.hparams["hidden_act"] in GELU)
        self.gguf_writer.add_vision_feature_layers(self.feature_layers)

    @classmethod
    def filter_tensors(cls, item: Named) -> Named | None:
        name, data = item
        name = name.removeprefix("model.")
        if not name.startswith(("vision_tower.", "multi_modal_projector.")):
            return None
        # transformers 5 writes the tower's tensors without this step of their path.
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        if name.startswith(("vision_tower.head.", "vision_tower.post_layernorm.")) or "position_ids" in name:
            return None
        kept: Named | None = super().filter_tensors((name.replace("vision_tower.", "vision_tower.vision_model."), data))
        return kept

    def generate_extra_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """clip.cpp adds the projector's biases without looking whether there are any."""
        if not self.global_config["multimodal_projector_bias"]:
            for layer in PROJECTOR:
                yield f"{layer}.bias", torch.zeros(self.n_embd_text)

    def modify_tensors(
        self, data_torch: torch.Tensor, name: str, bid: int | None
    ) -> Iterable[tuple[str, torch.Tensor]]:
        layer, _, kind = name.rpartition(".")
        if layer in PROJECTOR:
            yield f"{PROJECTOR[layer]}.{kind}", data_torch
        elif bid is None or bid < self.block_count:
            yield from super().modify_tensors(data_torch, name, bid)


class InternVl(InternVisionModel):  # type: ignore[misc]
    """InternVL in transformers' format."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_dynamic_tiles = self.preprocessor_config.get("min_patches", 0)
        self.max_dynamic_tiles = self.preprocessor_config.get("max_patches", 0)
        self.tensor_map = _tensor_map(self.block_count)

    @classmethod
    def filter_tensors(cls, item: Named) -> Named | None:
        name, data = item
        name = name.removeprefix("model.")
        if not name.startswith(("vision_tower.", "multi_modal_projector.")) or name.endswith(".mask_token"):
            return None
        kept: Named | None = super().filter_tensors((f"model.{name}", data))
        return kept

    def modify_tensors(
        self, data_torch: torch.Tensor, name: str, bid: int | None
    ) -> Iterable[tuple[str, torch.Tensor]]:
        if "position_embeddings" in name:
            # clip.cpp puts the class token behind the patches, transformers before them: so do the rows here.
            data_torch = torch.cat((data_torch[:, 1:], data_torch[:, :1]), dim=1)
        yield from super().modify_tensors(data_torch, name, bid)


class QwenVl(Qwen2VLVisionModel):  # type: ignore[misc]
    """Qwen2-VL and Qwen2.5-VL, whatever prefix the tensors were saved with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tensor_map = _tensor_map(self.block_count)

    @classmethod
    def filter_tensors(cls, item: Named) -> Named | None:
        name, data = item
        kept: Named | None = super().filter_tensors((name.removeprefix("model."), data))
        return kept


def _tensor_map(layers: int) -> gguf.TensorNameMap:
    """The names of tensors. The map has room for as many projector layers as the tower has, which can be too few."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(layers, 4))


CONVERTERS: dict[str, type[MmprojModel]] = {
    "idefics3": SmolVLMModel,
    "smolvlm": SmolVLMModel,
    "qwen2_vl": QwenVl,
    "qwen2_5_vl": QwenVl,
    "llava": Llava,
    "internvl": InternVl,
}


def vision_converter(config: Mapping[str, Any]) -> type[MmprojModel]:
    """The class that writes a model's mmproj; raises `ExportError` for what clip.cpp would compute otherwise."""
    model_type = str(config.get("model_type"))
    if model_type not in CONVERTERS:
        raise ExportError(f"no GGUF converter for {model_type}; known: {', '.join(CONVERTERS)}")
    check_vision(config)
    return CONVERTERS[model_type]


def check_vision(config: Mapping[str, Any]) -> None:
    """Raise `ExportError` where a model's vision differs from what clip.cpp takes for granted."""
    vision, checks = config["vision_config"], _CHECKS[config["model_type"]]
    problems = [
        f"{name} is {found!r}, needed is {needed}" for name, found, needed in checks(config) if found not in needed
    ]
    widths = {vision.get("intermediate_size"), vision.get("hidden_size")}
    if config["model_type"] in ("idefics3", "smolvlm", "llava", "qwen2_5_vl") and len(widths) == 1:
        # clip.cpp tells files of an old converter by this, and swaps the two halves of the feed-forward part.
        problems.append(f"vision_config's intermediate_size equals its hidden_size, {widths.pop()}")
    if problems:
        raise ExportError(f"llama.cpp cannot run this model's vision tower: {'; '.join(problems)}; --format onnx can")


def feature_layers(config: Mapping[str, Any]) -> list[int]:
    """The hidden states that LLaVA projects, ascending; 0 is what enters the first layer."""
    depth, asked = config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]
    layers = [layer % (depth + 1) for layer in (asked if isinstance(asked, list) else [asked])]
    if layers != sorted(set(layers)):
        raise ExportError(f"vision_feature_layer {asked}: llama.cpp joins the layers in ascending order only")
    return layers


Check = tuple[str, Any, tuple[Any, ...]]


def _llava_checks(config: Mapping[str, Any]) -> list[Check]:
    vision = config["vision_config"]
    clip = vision["model_type"] == "clip_vision_model"
    return [
        ("vision_config.model_type", vision["model_type"], ("clip_vision_model", "siglip_vision_model")),
        # A class token is dropped where there is one, and every patch is kept.
        (
            "vision_feature_select_strategy",
            config["vision_feature_select_strategy"],
            ("default",) if clip else ("full",),
        ),
        ("vision_config.hidden_act", vision["hidden_act"], (*GELU, "quick_gelu")),
        ("projector_hidden_act", config["projector_hidden_act"], GELU),
    ]


def _internvl_checks(config: Mapping[str, Any]) -> list[Check]:
    vision = config["vision_config"]
    # clip.cpp has RMS norms, also of queries and keys, for the tower of this size and for no other.
    largest = (vision["hidden_size"], vision["num_hidden_layers"]) == (3200, 45)
    return [
        ("vision_config.norm_type", vision["norm_type"], ("rms_norm",) if largest else ("layer_norm",)),
        ("vision_config.use_qk_norm", vision["use_qk_norm"], (largest,)),
        ("vision_config.use_mean_pooling", vision["use_mean_pooling"], (True,)),
        ("vision_config.use_absolute_position_embeddings", vision["use_absolute_position_embeddings"], (True,)),
        ("vision_config.hidden_act", vision["hidden_act"], GELU),
        ("vision_feature_layer", config["vision_feature_layer"], (-1,)),
        ("vision_feature_select_strategy", config["vision_feature_select_strategy"], ("default",)),
        ("projector_hidden_act", config["projector_hidden_act"], GELU),
    ]


def _qwen_checks(config: Mapping[str, Any]) -> list[Check]:
    vision = config["vision_config"]
    checks = [
        ("vision_config.spatial_merge_size", vision["spatial_merge_size"], (2,)),
        ("vision_config.temporal_patch_size", vision["temporal_patch_size"], (2,)),
    ]
    if config["model_type"] == "qwen2_vl":
        return [*checks, ("vision_config.hidden_act", vision["hidden_act"], ("quick_gelu",))]
    whole, depth = vision["fullatt_block_indexes"], vision["depth"]
    pattern = list(range(whole[0], depth, whole[0] + 1)) if whole else []
    return [
        *checks,
        ("vision_config.hidden_act", vision["hidden_act"], ("silu",)),
        ("vision_config.window_size", vision["window_size"], (112,)),
        ("vision_config.fullatt_block_indexes", whole, (pattern,) if pattern else ()),
    ]


def _idefics3_checks(config: Mapping[str, Any]) -> list[Check]:
    return [("vision_config.hidden_act", config["vision_config"]["hidden_act"], GELU)]


_CHECKS: dict[str, Callable[[Mapping[str, Any]], list[Check]]] = {
    "idefics3": _idefics3_checks,
    "smolvlm": _idefics3_checks,
    "qwen2_vl": _qwen_checks,
    "qwen2_5_vl": _qwen_checks,
    "llava": _llava_checks,
    "internvl": _internvl_checks,
}
