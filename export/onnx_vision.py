"""The vision encoder of each family as a graph: pixels as its processor makes them to features in the text's width.

Inputs have the names that transformers.js feeds; the output is `image_features`, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from mpa_edge.errors import ExportError
from mpa_edge.export.onnx_qwen_vision import QwenVision
from mpa_edge.export.onnx_save import OPSET

BATCH, TILES, PATCHES, IMAGES = "batch_size", "num_tiles", "num_patches", "num_images"


@dataclass(frozen=True)
class VisionEncoder:
    """A module whose `forward` takes `inputs` in this order, by these names.

    `inputs` are an example that shows all that may occur (several pictures, padding); `dimensions` names the axes of
    any length. `keywords` are the names of the same inputs in transformers' `get_image_features`.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    dimensions: Mapping[str, Mapping[int, str]]
    keywords: tuple[str, ...]


class Idefics3Vision(torch.nn.Module):
    """Tiles to image features, as `Idefics3Model.get_image_features`; tiles of zeros are padding and left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        self.patch = model.config.vision_config.patch_size

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """Float (batch, tiles, 3, height, width) and bool (batch, tiles, height, width) -> (tiles, tokens, hidden)."""
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        # Places and not truths: pixels and mask are then known to be equally many.
        real = (pixels != 0).flatten(1).any(-1).nonzero().squeeze(1)
        pixels, mask = pixels[real], mask[real]
        # How many there are depends on the data. Before 2.13, torch must be told that it need not look for the case of
        # one, which it would treat in another way; the graph's general way holds for one too. It must
        # be told of a limit as well, or sets one of its own, which does not fit into ONNX's integers.
        torch._check(pixels.shape[0] != 1)
        torch._check(pixels.shape[0] < 2**31)
        patches = mask.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).sum(dim=(-1, -2)) > 0
        hidden = self.tower(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state
        features: torch.Tensor = self.connector(hidden)
        return features


class LlavaVision(torch.nn.Module):
    """Pictures to image features, as `LlavaModel.get_image_features`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float (batch, 3, height, width) -> (batch, tokens, hidden)."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        features: torch.Tensor = self.projector(
            torch.cat([states[layer][:, self.first :] for layer in self.layers], -1)
        )
        return features


class InternVlVision(torch.nn.Module):
    """Tiles to image features: `InternVLModel.get_image_features`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float (tiles, 3, height, width) -> (tiles, tokens, hidden)."""
        features: torch.Tensor = self.model.get_image_features(pixel_values).pooler_output
        return features


def idefics3(model: Any) -> VisionEncoder:
    """`pixel_values`, `pixel_attention_mask`: any number of pictures and tiles; here the last tile is padding."""
    edge = model.config.vision_config.image_size
    pixels = _random(2, 3, 3, edge, edge)
    mask = torch.ones(2, 3, edge, edge, dtype=torch.bool)
    pixels[1, 2], mask[1, 2] = 0, False
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask}
    axes = {0: BATCH, 1: TILES}
    return VisionEncoder(Idefics3Vision(model), inputs, dict.fromkeys(inputs, axes), tuple(inputs))


def llava(model: Any) -> VisionEncoder:
    """`pixel_values`: any number of pictures."""
    return _square(model, LlavaVision(model), BATCH)


def internvl(model: Any) -> VisionEncoder:
    """`pixel_values`: any number of tiles, of any pictures."""
    return _square(model, InternVlVision(model), TILES)


def qwen2_vl(model: Any) -> VisionEncoder:
    """`pixel_values`, `grid_thw`: any number of pictures of any sizes."""
    return _qwen(model, "grid_thw")


def qwen2_5_vl(model: Any) -> VisionEncoder:
    """`pixel_values`, `image_grid_thw`: any number of pictures of any sizes. transformers.js renamed the second."""
    return _qwen(model, "image_grid_thw")


VISION_ENCODERS: dict[str, Callable[[Any], VisionEncoder]] = {
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "llava": llava,
    "internvl": internvl,
}


def vision_graph(encoder: VisionEncoder) -> ir.Model:
    """The encoder as an ONNX model that shares its weights."""
    shapes = {
        name: {axis: torch.export.Dim(symbol) for axis, symbol in encoder.dimensions[name].items()}
        for name in encoder.inputs
    }
    program = torch.onnx.export(
        encoder.module.eval(),
        tuple(encoder.inputs.values()),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=list(encoder.inputs),
        output_names=["image_features"],
        dynamic_shapes=tuple(shapes.values()),
    )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    return program.model


def reference_features(model: Any, encoder: VisionEncoder) -> torch.Tensor:
    """transformers' features for the encoder's example: (tokens, hidden)."""
    inputs = dict(zip(encoder.keywords, encoder.inputs.values(), strict=True))
    features = model.model.get_image_features(**inputs).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def _square(model: Any, module: torch.nn.Module, symbol: str) -> VisionEncoder:
    edge = model.config.vision_config.image_size
    height, width = (edge, edge) if isinstance(edge, int) else edge
    inputs = {"pixel_values": _random(3, 3, height, width)}
    return VisionEncoder(module, inputs, {"pixel_values": {0: symbol}}, ("pixel_values",))


def _qwen(model: Any, grid_name: str) -> VisionEncoder:
    """A wide picture and a tall one, both larger than Qwen2.5-VL's windows and no whole number of them."""
    config = model.config.vision_config
    merge = config.spatial_merge_size
    grid = torch.tensor([[1, 5 * merge, 10 * merge], [1, 9 * merge, 3 * merge]])
    patches = _random(int(grid.prod(-1).sum()), config.in_channels * config.temporal_patch_size * config.patch_size**2)
    return VisionEncoder(
        QwenVision(model.model.visual),
        {"pixel_values": patches, grid_name: grid},
        {"pixel_values": {0: PATCHES}, grid_name: {0: IMAGES}},
        ("pixel_values", "image_grid_thw"),
    )


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
