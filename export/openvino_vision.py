"""The vision graphs of each family as modules that OpenVINO's converter can trace, with optimum-intel's inputs.

All take the pixels of one picture. Where optimum-intel's graph wants masks and positions that are the same for every
picture of a family, they are inside; programs that would feed them feed only what a graph asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from mpa_edge.export.onnx_qwen_vision import attend
from mpa_edge.export.onnx_vision import InternVlVision, LlavaVision

VISION, MERGER = "vision_embeddings_model", "vision_embeddings_merger_model"
# Image tokens of the example picture.
TOKENS = 6


@dataclass(frozen=True)
class Part:
    """One graph: a module, an example of its inputs in the order of `forward`, and notes to be kept in the file.

    `shapes` are those of the inputs, -1 for what may have any size.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    shapes: Mapping[str, Sequence[int]]
    notes: Mapping[str, int] = field(default_factory=dict)


class Idefics3Tiles(torch.nn.Module):
    """Whole tiles to image features, as `Idefics3Model.get_image_features` without padding.

    What a patch's position adds is computed here once: it comes from comparing fractions, and a file in float16 would
    round them to other positions.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        self.positions = _position_embeddings(self.tower, model.config.vision_config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float (tiles, 3, height, width) -> (tiles, tokens, hidden)."""
        patches = self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = self.tower.encoder(inputs_embeds=patches + self.positions, attention_mask=None).last_hidden_state
        features: torch.Tensor = self.connector(self.tower.post_layernorm(hidden))
        return features


class QwenPatches(torch.nn.Module):
    """Patches (patches, values) to their embeddings (patches, width)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        # A convolution whose kernel is a whole patch is a product.
        self.weight = visual.patch_embed.proj.weight.detach().flatten(1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """One product."""
        return functional.linear(hidden_states, self.weight)


class QwenMerger(torch.nn.Module):
    """Embedded patches of one picture through Qwen2-VL's blocks and merger to image features (image tokens, hidden)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.blocks, self.merger = visual.blocks, visual.merger
        self.full = getattr(visual.config, "fullatt_block_indexes", range(len(self.blocks)))
        self.unit = visual.config.spatial_merge_size**2

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor
    ) -> torch.Tensor:
        """`attention_mask` (1, patches, patches) is added to scores, `rotary_pos_emb` (patches, half) are angles."""
        return self.run(hidden_states, rotary_pos_emb, attention_mask, attention_mask)

    def run(
        self, hidden: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor, window_mask: torch.Tensor
    ) -> torch.Tensor:
        """`window_mask` is for the layers that see windows only."""
        turned = torch.cat([angles, angles], -1)
        cos, sin = turned.cos(), turned.sin()
        hidden = hidden[None]
        for layer, block in enumerate(self.blocks):
            seen = mask if layer in self.full else window_mask
            hidden = hidden + attend(block.attn, block.norm1(hidden), cos, sin, seen[None], _fused)
            hidden = hidden + block.mlp(block.norm2(hidden))
        features: torch.Tensor = self.merger(hidden[0])
        return features


class Qwen25Merger(QwenMerger):
    """Like `QwenMerger` for Qwen2.5-VL: image tokens are sorted by window on the way in, and back on the way out."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        window_attention_mask: torch.Tensor,
        window_index: torch.Tensor,
        rotary_pos_emb: torch.Tensor,
    ) -> torch.Tensor:
        """`window_index` int64 (image tokens,) is their order by window, which `window_attention_mask` is in."""
        hidden, angles = (self._sorted(values, window_index) for values in (hidden_states, rotary_pos_emb))
        features = self.run(hidden, angles, attention_mask, window_attention_mask)
        return features[torch.argsort(window_index)]

    def _sorted(self, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1, self.unit, values.shape[-1])[order].reshape(-1, values.shape[-1])


def idefics3(model: Any) -> dict[str, Part]:
    """Any number of tiles."""
    return _tiles(Idefics3Tiles(model), model)


def llava(model: Any) -> dict[str, Part]:
    """Any number of pictures."""
    return _tiles(LlavaVision(model), model)


def internvl(model: Any) -> dict[str, Part]:
    """Any number of tiles."""
    return _tiles(InternVlVision(model), model)


def qwen2_vl(model: Any) -> dict[str, Part]:
    """One picture of any size."""
    inputs, shapes = _merger_inputs(model.config.vision_config)
    return {VISION: _patches(model), MERGER: Part(QwenMerger(model.model.visual), inputs, shapes)}


def qwen2_5_vl(model: Any) -> dict[str, Part]:
    """One picture of any size; how many image tokens wide a window is stands in the merger's notes."""
    config = model.config.vision_config
    inputs, shapes = _merger_inputs(config)
    inputs |= {"window_attention_mask": inputs["attention_mask"], "window_index": torch.arange(TOKENS).flip(0)}
    shapes |= {"window_attention_mask": shapes["attention_mask"], "window_index": (-1,)}
    names = ("hidden_states", "attention_mask", "window_attention_mask", "window_index", "rotary_pos_emb")
    notes = {"window_tokens": config.window_size // config.patch_size // config.spatial_merge_size}
    merger = Part(Qwen25Merger(model.model.visual), {name: inputs[name] for name in names}, shapes, notes)
    return {VISION: _patches(model), MERGER: merger}


VISION_PARTS: dict[str, Callable[[Any], dict[str, Part]]] = {
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "llava": llava,
    "internvl": internvl,
}


def _position_embeddings(tower: Any, config: Any) -> torch.Tensor:
    """What the tower's own code adds to the patches of a whole tile: (1, patches, hidden)."""
    seen: list[torch.Tensor] = []
    hook = tower.embeddings.position_embedding.register_forward_hook(lambda *called: seen.append(called[-1]))
    side = config.image_size // config.patch_size
    tower.embeddings(
        pixel_values=torch.zeros(1, 3, config.image_size, config.image_size),
        patch_attention_mask=torch.ones(1, side, side, dtype=torch.bool),
    )
    hook.remove()
    return seen[0].detach()


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention as the one operator that OpenVINO has for it."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _tiles(module: torch.nn.Module, model: Any) -> dict[str, Part]:
    edge = model.config.vision_config.image_size
    height, width = (edge, edge) if isinstance(edge, int) else edge
    # One tile: tracing keeps all that is computed in between.
    part = Part(module, {"pixel_values": _random(1, 3, height, width)}, {"pixel_values": (-1, 3, height, width)})
    return {VISION: part}


def _patches(model: Any) -> Part:
    module = QwenPatches(model.model.visual)
    values = module.weight.shape[1]
    return Part(module, {"hidden_states": _random(8, values)}, {"hidden_states": (-1, values)})


def _merger_inputs(config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Sequence[int]]]:
    """Example and shapes of what both mergers take."""
    width, heads = getattr(config, "embed_dim", None) or config.hidden_size, config.num_heads
    patches = TOKENS * config.spatial_merge_size**2
    half = width // heads // 2
    inputs = {
        "hidden_states": _random(patches, width),
        "attention_mask": torch.zeros(1, patches, patches),
        "rotary_pos_emb": _random(patches, half),
    }
    return inputs, {"hidden_states": (-1, width), "attention_mask": (1, -1, -1), "rotary_pos_emb": (-1, half)}


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
