"""The vision towers' first stage: for every patch of 8×8 pixels, which character, thing and colour it shows.

Per-patch labels say much more about a picture than an answer does, so a tower learns to read in minutes where answers
alone would take days. The heads are thrown away afterwards.

    python -m mpa_edge.benchmarks.train_vision teacher --minutes 40 --work build/reference
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AttentionInterface
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from mpa_edge.benchmarks.reference_models import SIZES, Size
from mpa_edge.benchmarks.world import TRAIN_SEEDS, World, draw_picture
from mpa_edge.benchmarks.world_dense import GRID, HEADS, dense_labels, draw_soup

OFFSETS = ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1), (0, -2), (0, 2), (-2, 0), (2, 0))
"""Neighbours (rows, columns) that the heads of the first layers look at before training."""

MICRO = 32
"""Pictures per backward pass: a larger one leaves the CPU's caches and is slower."""

_FREQUENCIES = (0.26, 0.5, 0.75, 1.0, 1.3, 1.6, 1.9, 2.2)


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as two products: on the CPU its backward pass in bfloat16 is ten times faster than the fused one's."""
    weights = torch.softmax((query * scaling) @ key.transpose(-1, -2), -1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)


def tower_config(size: Size) -> Idefics3VisionConfig:
    """The vision configuration of one of `SIZES`."""
    return Idefics3VisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // 32,
        image_size=96,
        patch_size=8,
    )


def _waves(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """32 sine and cosine features of a place; a shift of the place is a rotation of these."""
    angles = torch.cat([row[:, None] * torch.tensor(_FREQUENCIES), column[:, None] * torch.tensor(_FREQUENCIES)], 1)
    return torch.stack([angles.cos(), angles.sin()], 2).flatten(1)


def _rotation(rows: int, columns: int) -> torch.Tensor:
    """The matrix that turns the features of a place into those of the place `rows` and `columns` further on."""
    turn = torch.zeros(32, 32)
    for index, frequency in enumerate(_FREQUENCIES):
        for half, shift in ((0, rows), (16, columns)):
            cos, sin = math.cos(frequency * shift), math.sin(frequency * shift)
            at = half + 2 * index
            turn[at : at + 2, at : at + 2] = torch.tensor([[cos, -sin], [sin, cos]])
    return turn


@torch.no_grad()
def start_local(tower: Any) -> None:
    """Start the tower near a convolution: places as waves in 32 dimensions, heads that look at their neighbours.

    All of it remains trainable; it saves the tower from learning on its own what "next to" means.
    """
    place = torch.arange(GRID * GRID)
    positions = tower.embeddings.position_embedding.weight
    positions.normal_(0, 0.02)
    positions[:, :32] = _waves((place // GRID).float(), (place % GRID).float())
    tower.embeddings.patch_embedding.weight[:32] = 0
    tower.embeddings.patch_embedding.bias[:32] = 0
    used = 0
    for layer in tower.encoder.layers[:-1]:
        attention, heads = layer.self_attn, layer.self_attn.num_heads
        attention.out_proj.weight[:32] = 0
        layer.mlp.fc2.weight[:32] = 0
        for head in range(min(4, heads)):
            rows, columns = OFFSETS[used % len(OFFSETS)]
            used += 1
            span = slice(32 * head, 32 * head + 32)
            attention.q_proj.weight[span, :32] = 1.15 * _rotation(rows, columns)
            attention.k_proj.weight[span, :32] = 1.15 * torch.eye(32)


class DenseReader(torch.nn.Module):
    """A tower with one linear head per entry of `HEADS`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tower: Any = Idefics3VisionTransformer(tower_config(size))
        self.tower.set_attn_implementation("plain")
        self.heads = torch.nn.Linear(size.vision_width, sum(per * classes for per, classes in HEADS.values()))

    def take(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from kept weights; heads of another set of labels start anew."""
        same = state["heads.weight"].shape == self.heads.weight.shape
        self.load_state_dict(
            {key: value for key, value in state.items() if same or key.startswith("tower.")}, strict=same
        )

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scores of all heads side by side: [batch, 144, classes]."""
        hidden = self.tower.embeddings(pixel_values=pixels, patch_attention_mask=mask)
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, None)
        scores: torch.Tensor = self.heads(self.tower.post_layernorm(hidden))
        return scores


class DensePictures(IterableDataset[dict[str, torch.Tensor]]):
    """Endless batches of pictures with dense labels: one in `soup` is soup, the rest are pictures of `worlds`."""

    def __init__(self, batch: int, start: int, worlds: tuple[World, ...], soup: int = 2) -> None:
        self.soup = soup
        self.batch, self.start, self.worlds = batch, start, worlds

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        seed = TRAIN_SEEDS.start + self.start
        while True:
            pictures = []
            for _ in range(self.batch):
                seed += 1
                pictures.append(
                    draw_soup(seed)
                    if seed % self.soup == 1
                    else draw_picture(seed, self.worlds[seed // 2 % len(self.worlds)])
                )
            labels = [dense_labels(list(picture.marks)) for picture in pictures]
            batch = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in HEADS}
            batch["pixels"] = torch.from_numpy(np.stack([np.asarray(picture.image) for picture in pictures]))
            yield batch


def say(text: str) -> None:
    """A line of the training log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [batch, 96, 96, 3] to what the image processor gives: floats from -1 to 1, [batch, 3, 96, 96]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def dense_loss(scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the heads' cross entropies (class 0, "nothing", counts a fifth), and the accuracy on what is something."""
    total, hits, at = scores.new_zeros(()), {}, 0
    for name, (per, classes) in HEADS.items():
        part = scores[..., at : at + per * classes].reshape(-1, classes)
        at += per * classes
        label = batch[name].flatten().long()
        weight = torch.ones(classes)
        weight[0] = 0.2
        total = total + F.cross_entropy(part, label, weight)
        shown = label > 0
        hits[name] = float((part.argmax(-1) == label)[shown].float().mean()) if bool(shown.any()) else math.nan
    return total, hits


def make_optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the encoder's matrices, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".encoder." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".encoder." in name)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def schedule(elapsed: float, budget: float) -> float:
    """Share of the peak rate: a short warm-up, then constant, then linearly to zero over the last third."""
    done = elapsed / budget
    return min(1.0, done / 0.02 + 0.05, max(0.0, (1.0 - done) / 0.33) + 0.01)


def train_tower(name: str, minutes: float, work: Path, batch: int, rate: float, seed: int, soup: int = 2) -> None:
    """Train one tower for `minutes` and keep it as `work/NAME-tower.pt`; an earlier one there is the starting point."""
    torch.manual_seed(seed)
    path = work / f"{name}-tower.pt"
    model = DenseReader(SIZES[name])
    start_local(model.tower)
    seen = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.take(state["model"])
        seen = int(state["seen"])
    optimizers = make_optimizers(model, rate)
    source = DensePictures(
        batch, seen, (World.BROAD, World.TARGET) if name == "teacher" else (World.BROAD, World.NARROW), soup
    )
    mask = torch.ones(MICRO, GRID, GRID, dtype=torch.bool)
    begin = saved = time.time()
    first = seen
    for step, data in enumerate(DataLoader(source, batch_size=None, num_workers=1, prefetch_factor=4)):
        elapsed = time.time() - begin
        share = schedule(elapsed, 60 * minutes)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        for part in range(0, batch, MICRO):
            share_of = {key: value[part : part + MICRO] for key, value in data.items()}
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(normalise(share_of["pixels"]), mask)
            loss, hits = dense_loss(scores.float(), share_of)
            (loss * MICRO / batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += batch
        over = elapsed > 60 * minutes
        if step % 50 == 0 or over:
            text = " ".join(f"{key} {value:.3f}" for key, value in hits.items())
            speed = (seen - first) / max(elapsed, 1e-9)
            say(f"tower {name} {seen} pictures, {elapsed:.0f} s, {speed:.0f}/s, loss {loss.item():.3f}, {text}")
        if over or time.time() - saved > 120:
            saved = time.time()
            torch.save({"model": model.state_dict(), "seen": seen}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        if over:
            return


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("name", choices=sorted(SIZES))
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--work", type=Path, default=Path("build/reference"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--soup", type=int, default=2, help="one picture in so many is soup")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    train_tower(options.name, options.minutes, options.work, options.batch, options.rate, options.seed, options.soup)


if __name__ == "__main__":
    main()
