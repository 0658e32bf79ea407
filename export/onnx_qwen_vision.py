"""Qwen2-VL's and Qwen2.5-VL's vision tower without shapes that depend on data, so that one graph takes any pictures.

transformers cuts the patches of all pictures into sequences (and Qwen2.5-VL sorts them by window first). Here each
patch's picture, row and column follow from its number and the grids, and what may attend to what is a mask over all
patches: the same sums, with others weighted zero. Memory grows with the square of the number of patches (4,096 of them,
a picture of 1,024 image tokens, take 0.7 GB); whoever has several large pictures runs them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

# From queries, keys, values, mask and scale to what attention makes of them.
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
# Added to a score it leaves a weight of 0, and it fits into float16.
AWAY = -30_000.0
HEADS = 2


@dataclass(frozen=True)
class Places:
    """Where patches lie, int64 (patches,) each: `frame` is the number of the first patch of a patch's picture or frame,
    `row` and `column` count patches in it, `columns` is its width."""

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    columns: torch.Tensor


def places_of(count: int, grid: torch.Tensor, merge: int) -> Places:
    """The places of `count` patches of pictures with these grids (frames, rows, columns), int64 (pictures, 3).

    Patches of one image token (`merge` x `merge`) are neighbours in the sequence; tokens go row by row.
    """
    number = torch.arange(count, device=grid.device)
    ends = grid.prod(-1).cumsum(0)
    picture = (number[:, None] >= ends[None]).sum(-1)
    rows, columns = grid[picture, 1], grid[picture, 2]
    within = number - (ends - grid.prod(-1))[picture]
    place = within % (rows * columns)
    token, inner = place // merge**2, place % merge**2
    tokens_per_row = columns // merge
    return Places(
        frame=number - place,
        row=token // tokens_per_row * merge + inner // merge,
        column=token % tokens_per_row * merge + inner % merge,
        columns=columns,
    )


class QwenVision(torch.nn.Module):
    """Patches to image features, as the visual part of `Qwen2VLModel` and `Qwen2_5_VLModel`, with its weights."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        config = visual.config
        self.rotary, self.blocks, self.merger = visual.rotary_pos_emb, visual.blocks, visual.merger
        # A convolution whose kernel is a whole patch is a product.
        self.embedding = torch.nn.Parameter(visual.patch_embed.proj.weight.detach().flatten(1), requires_grad=False)
        self.merge = config.spatial_merge_size
        self.full = getattr(config, "fullatt_block_indexes", range(len(self.blocks)))
        window = getattr(config, "window_size", None)
        self.window = window and window // config.patch_size // self.merge * self.merge

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Float (patches, channels * frames * height * width) and int64 (pictures, 3) -> (image tokens, hidden)."""
        places = places_of(pixel_values.shape[0], grid_thw, self.merge)
        # Of three axes on purpose: a linear layer on two becomes a Gemm, which weight quantization leaves out.
        hidden = functional.linear(pixel_values[None], self.embedding)
        cos, sin = self.rotary(hidden, torch.stack([places.row, places.column], -1))
        picture = _others_away(places.frame)
        near = _others_away(self._window_of(places)) if self.window else picture
        for layer, block in enumerate(self.blocks):
            mask = picture if layer in self.full else near
            hidden = hidden + attend(block.attn, block.norm1(hidden), cos, sin, mask, mix_by_heads)
            hidden = hidden + block.mlp(block.norm2(hidden))
        tokens = self.merger.ln_q(hidden).reshape(1, -1, self.merger.hidden_size)
        features: torch.Tensor = self.merger.mlp(tokens)[0]
        return features

    def _window_of(self, places: Places) -> torch.Tensor:
        """A number for each window: its place in the picture counted from the picture's first patch. A picture has
        more patches than windows, so those of two pictures never meet."""
        window: int = self.window or 1
        across = (places.columns + window - 1) // window
        return places.frame + places.row // window * across + places.column // window


def _others_away(numbers: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of two patches: 0 for those with the same number."""
    return torch.where(numbers[:, None] == numbers[None], 0.0, AWAY)


def attend(
    attention: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, mix: Mix
) -> torch.Tensor:
    """`VisionAttention.forward` of (1, patches, width) with a mask in the place of lengths, which is added to scores:
    (patches, patches) or, with axes for pictures and heads, (1, 1, patches, patches). `cos` and `sin` are (patches,
    width of a head); `mix(query, key, value, mask, scale)` of (1, heads, patches, width of a head) is the attention."""
    count = hidden.shape[1]
    parts = attention.qkv(hidden).reshape(count, 3, attention.num_heads, -1).permute(1, 2, 0, 3)
    query, key, value = parts.unsqueeze(1).unbind(0)
    query, key = (part * cos + _rotate_half(part) * sin for part in (query, key))
    mixed = mix(query, key, value, mask, attention.scaling)
    projected: torch.Tensor = attention.proj(mixed.transpose(1, 2).reshape(1, count, -1))
    return projected


def mix_by_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention out of plain operators, for two heads at a time: of 4,096 patches the scores of one are 67 MB, and ONNX
    Runtime holds them some five times over."""
    parts = zip(query.split(HEADS, 1), key.split(HEADS, 1), value.split(HEADS, 1), strict=True)
    mixed = [((some * scale) @ keys.transpose(-1, -2) + mask).softmax(-1) @ values for some, keys, values in parts]
    return torch.cat(mixed, 1)


def _rotate_half(values: torch.Tensor) -> torch.Tensor:
    first, second = values.chunk(2, -1)
    return torch.cat([-second, first], -1)
