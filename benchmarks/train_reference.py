"""The reference pair's training after the dense stage: text stage on cached features, and a joint stage if wanted.

    python -m mpa_edge.benchmarks.train_vision teacher --minutes 22
    python -m mpa_edge.benchmarks.train_reference teacher --text-minutes 40 --out benchmarks/reference/teacher

The tower comes from `WORK/NAME-tower.pt`; an earlier `WORK/NAME.pt` is the starting point of what follows.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from mpa_edge.benchmarks.reference_models import make_model, make_processor, make_tokenizer
from mpa_edge.benchmarks.train_pack import Item, Mix, Spelling, make_items, pack
from mpa_edge.benchmarks.train_vision import dense_loss, normalise, plain_attention, say, schedule
from mpa_edge.benchmarks.world import TRAIN_SEEDS, World, draw_picture
from mpa_edge.benchmarks.world_canvas import Mark
from mpa_edge.benchmarks.world_dense import HEADS, dense_labels
from mpa_edge.benchmarks.world_facts import Fact
from mpa_edge.benchmarks.world_questions import ask

MIXES = {"teacher": Mix(questions=8, annotate=0.12, hard=0.3), "student": Mix(questions=8, text_only=0.05)}
WORLDS = {"teacher": (World.BROAD, World.TARGET, World.TARGET), "student": (World.NARROW,)}
TEXT_SEEDS = 3_000_000
JOINT_SEEDS = 5_000_000
CHECK_SEEDS = 9_000_000
DENSE_SHARE = 0.25
"""Weight of the dense loss in the joint stage."""


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """`plain_attention` with grouped keys and a boolean mask."""
    groups = getattr(module, "num_key_value_groups", 1)
    if groups == 1 and attention_mask is None:
        return plain_attention(module, query, key, value, None, rest["scaling"])
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = (query * rest["scaling"]) @ key.transpose(-1, -2)
    weights = torch.softmax(scores.masked_fill(~attention_mask, -1e4), -1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)


class Trainee:
    """A model in training, with its tower's output apart from the rest, so that it can be cached."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer = make_tokenizer()
        self.spelling = Spelling(self.tokenizer)
        self.model = make_model(name, self.tokenizer)
        self.model.set_attn_implementation("grouped")
        self.dense = torch.nn.Linear(1, 1)
        self.stage = "new"

    def load_tower(self, path: Path) -> None:
        """Take the tower of the dense stage."""
        state = torch.load(path, weights_only=True)["model"]
        tower = {key.removeprefix("tower."): value for key, value in state.items() if key.startswith("tower.")}
        self.model.model.vision_model.load_state_dict(tower)
        self._take_dense(state["heads.weight"], state["heads.bias"])

    def _take_dense(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """The heads of the dense stage; the joint stage goes on using them."""
        self.dense = torch.nn.Linear(weight.shape[1], weight.shape[0])
        self.dense.load_state_dict({"weight": weight, "bias": bias})

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pictures to the tower's features [batch, 144, vision width]."""
        tower = self.model.model.vision_model
        mask = torch.ones(len(pixels), 12, 12, dtype=torch.bool)
        hidden = tower.embeddings(pixel_values=normalise(pixels), patch_attention_mask=mask)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        hidden = tower.post_layernorm(hidden)
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def scores(self, features: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and labels of all positions that have a label."""
        inner = self.model.model
        embeds = inner.text_model.embed_tokens(batch["input_ids"])
        image = inner.connector(features)
        where = batch["input_ids"] == self.model.config.image_token_id
        embeds = embeds.masked_scatter(where[..., None], image.to(embeds.dtype))
        hidden = inner.text_model(
            inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        wanted = labels != -100
        return self.model.lm_head(hidden[wanted]).float(), labels[wanted]

    def save(self, work: Path, stage: str) -> None:
        """Keep the weights."""
        path = work / f"{self.name}.pt"
        torch.save(
            {"model": self.model.state_dict(), "dense": self.dense.state_dict(), "stage": stage},
            path.with_suffix(".tmp"),
        )
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Continue from kept weights."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._take_dense(**state["dense"])
        self.stage = state["stage"]


Row = tuple[torch.Tensor, tuple[Fact, ...], str, tuple[Mark, ...]]
"""Features or pixels of a picture, its facts, its world, and its marks."""


def render(seeds: range, worlds: tuple[World, ...]) -> list[Row]:
    """Pictures of the seeds, the worlds in turn, with pixels as uint8."""
    rows = []
    for seed in seeds:
        world = worlds[seed % len(worlds)]
        picture = draw_picture(TRAIN_SEEDS.start + seed, world)
        rows.append((torch.from_numpy(np.array(picture.image)), picture.facts, world.value, picture.marks))
    return rows


@torch.no_grad()
def cache_features(trainee: Trainee, count: int, first: int, worlds: tuple[World, ...]) -> list[Row]:
    """`count` pictures with their features in half precision instead of pixels."""
    rows: list[Row] = []
    begin = time.time()
    for start in range(first, first + count, 32):
        part = render(range(start, min(start + 32, first + count)), worlds)
        with torch.autocast("cpu", torch.bfloat16):
            features = trainee.see(torch.stack([pixels for pixels, *_ in part])).to(torch.bfloat16)
        rows += [(seen, facts, world, ()) for seen, (_, facts, world, _) in zip(features.unbind(0), part, strict=True)]
    say(f"{trainee.name} cached {count} pictures in {time.time() - begin:.0f} s")
    return rows


def optimizers_for(trainee: Trainee, rate: float, joint: bool) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates: Muon for the layers' matrices, AdamW for the rest; the tower at half."""
    found = []
    for tower in (False, True) if joint else (False,):
        named = [(n, p) for n, p in trainee.model.named_parameters() if ("vision_model" in n) == tower]
        matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        rest = [p for n, p in named if not (p.ndim == 2 and ".layers." in n)]
        peak = rate * (0.5 if tower else 1.0)
        muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        found += [(muon, peak), (torch.optim.AdamW(rest, lr=peak, weight_decay=0.0, betas=(0.9, 0.98)), peak)]
    return found


def dense_part(trainee: Trainee, features: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """The dense stage's loss on the pictures of a joint batch: it keeps the tower's letters sharp."""
    labels = [dense_labels(list(marks)) for *_, marks in rows]
    batch = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in HEADS}
    return dense_loss(trainee.dense(features.float()), batch)[0]


def train_stage(
    trainee: Trainee, minutes: float, rate: float, batch: int, work: Path, cached: list[Row] | None, seed: int
) -> None:
    """Train on cached features, or jointly on fresh pictures where `cached` is None."""
    rng, mix, stage = random.Random(seed), MIXES[trainee.name], "text" if cached is not None else "joint"
    trainee.model.model.vision_model.requires_grad_(cached is None)
    optimizers = optimizers_for(trainee, rate, cached is None)
    begin = saved = time.time()
    if cached is None:
        optimizers.append((torch.optim.AdamW(trainee.dense.parameters(), lr=rate), rate))
    questions, step, next_seed, losses = 0, 0, JOINT_SEEDS + 1_000_000 * seed % 3_000_000, []
    while True:
        elapsed = time.time() - begin
        share = schedule(elapsed, 60 * minutes)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        if cached is not None:
            rows = rng.sample(cached, batch)
        else:
            rows = render(range(next_seed, next_seed + batch), WORLDS[trainee.name])
            next_seed += batch
        items = [make_items(facts, world, trainee.spelling, mix, rng) for _, facts, world, _ in rows]
        data = pack(items, trainee.spelling)
        with torch.autocast("cpu", torch.bfloat16):
            seen = torch.stack([row[0] for row in rows])
            features = seen if cached is not None else trainee.see(seen)
            scores, labels = trainee.scores(features, data)
        loss = F.cross_entropy(scores, labels)
        extra = 0.0 if cached is not None else DENSE_SHARE * dense_part(trainee, features, rows)
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        questions += sum(len(row) for row in items)
        losses.append(loss.item())
        over = elapsed > 60 * minutes
        if step % 100 == 0 or over:
            mean, speed = sum(losses[-100:]) / len(losses[-100:]), questions / max(elapsed, 1e-9)
            say(f"{stage} {trainee.name} {questions} turns, {elapsed:.0f} s, {speed:.0f}/s, loss {mean:.4f}")
        if over or time.time() - saved > 150:
            saved = time.time()
            trainee.save(work, stage if over else f"{stage}-unfinished")
        step += 1
        if over:
            return


@torch.no_grad()
def check(trainee: Trainee, world: World, count: int = 600) -> dict[str, float]:
    """Share of exactly right answers by kind on pictures that were never trained on, with the answer's own words as
    context: greedy decoding gives the same share."""
    rng = random.Random(5)
    hits: dict[str, list[bool]] = {}
    for start in range(CHECK_SEEDS, CHECK_SEEDS + count, 50):
        rows = render(range(start, start + 50), (world,))
        asked = [ask(facts, rng, world.value) for _, facts, *_ in rows]
        items = [[Item(*trainee.spelling.exchange(question.text, question.answer))] for question in asked]
        data = pack(items, trainee.spelling)
        with torch.autocast("cpu", torch.bfloat16):
            scores, labels = trainee.scores(trainee.see(torch.stack([row[0] for row in rows])), data)
        right = (scores.argmax(-1) == labels).tolist()
        for question, item in zip(asked, items, strict=True):
            length = sum(label != -100 for label in item[0].labels)
            hits.setdefault(question.kind, []).append(all(right[:length]))
            right = right[length:]
    result = {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}
    result["all"] = sum(sum(found) for found in hits.values()) / count
    return result


def report(trainee: Trainee, worlds: tuple[World, ...]) -> None:
    """Print `check` for some worlds."""
    for world in worlds:
        found = check(trainee, world)
        text = " ".join(f"{kind} {value:.2f}" for kind, value in found.items() if kind != "all")
        say(f"check {trainee.name} on {world.value}: {found['all']:.3f} | {text}")


def save_checkpoint(trainee: Trainee, folder: Path) -> None:
    """The folder that `from_pretrained` loads: float16 weights, processor, tokenizer, template."""
    trainee.model.set_attn_implementation("sdpa")
    half = make_model(trainee.name, trainee.tokenizer)
    half.load_state_dict(trainee.model.state_dict())
    half.half().save_pretrained(folder)
    make_processor(trainee.tokenizer).save_pretrained(folder)
    trainee.model.set_attn_implementation("grouped")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("name", choices=sorted(MIXES))
    parser.add_argument("--text-minutes", type=float, default=20.0)
    parser.add_argument("--joint-minutes", type=float, default=0.0)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--joint-rate", type=float, default=6e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/reference"))
    parser.add_argument("--out", type=Path, help="write the checkpoint folder here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trainee = Trainee(options.name)
    kept = options.work / f"{options.name}.pt"
    if kept.exists():
        trainee.load(kept)
    if options.text_minutes:
        trainee.load_tower(options.work / f"{options.name}-tower.pt")
        cached = cache_features(trainee, options.pictures, TEXT_SEEDS + 100_000 * options.seed, WORLDS[options.name])
        train_stage(trainee, options.text_minutes, options.rate, options.batch, options.work, cached, options.seed)
        report(trainee, (WORLDS[options.name][0], World.TARGET))
        del cached
    if options.joint_minutes:
        train_stage(trainee, options.joint_minutes, options.joint_rate, options.batch, options.work, None, options.seed)
        report(trainee, (WORLDS[options.name][0], World.TARGET))
    if options.out:
        save_checkpoint(trainee, options.out)


if __name__ == "__main__":
    main()
