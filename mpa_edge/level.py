"""Parity Leveler: fine-tune the student on the training set, loss on the answer tokens only.

A plain loop rather than transformers' or trl's trainer: it resumes to the same weights bit for bit from one checkpoint
file without pickle (both trainers store optimizer and random state through `torch.save`), trains on image features that
were computed once, and takes its prompts from the very code that asks the student. peft makes the adapters, accelerate
connects the processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mpa_edge.checkpoints import CHECKPOINT, State, load_checkpoint, save_checkpoint
from mpa_edge.config import AlignConfig
from mpa_edge.digests import digest_of_trained
from mpa_edge.errors import RunError
from mpa_edge.methods import autocast, default_rate, make_trainable, refuse_untrainable, set_checkpointing
from mpa_edge.parts import Advance, open_stage
from mpa_edge.ranks import Ranks
from mpa_edge.records import write_atomic
from mpa_edge.sharding import kept, reshard, shard
from mpa_edge.sums import refuse_damaged, write_sums
from mpa_edge.trainable import count_parameters
from mpa_edge.training_data import Example, TrainingData, in_batches, loss_and_exact, split_by_group
from mpa_edge.transformers_vlm import TransformersVlm
from mpa_edge.zero import Zero

METRICS = "metrics.json"
# Fewer rows than this are no training set.
MINIMUM = 8
# A few rows that cannot be trained on are dropped; more of them than this share are a wrong setting.
MOST_DROPPED = 0.05
# A killed run repeats at most so many steps.
STEPS_PER_CHECKPOINT = 100
CLIP = 1.0
# What shapes the result, of the settings; the student's type and the learning rate are taken as they turn out.
SHAPING = (
    *("method", "train", "rank", "alpha", "epochs", "warmup", "train_batch_size", "accumulate"),
    *("patience", "holdout", "seed"),
)


def level(
    student: TransformersVlm,
    examples: Sequence[Example],
    folder: Path,
    config: AlignConfig,
    *,
    start: Path | None = None,
    advance: Advance = lambda count: None,
) -> dict[str, Any]:
    """Train the student and write what was trained to `folder` with `metrics.json`; resumes. Returns the metrics.

    After each epoch the held-out pictures are asked; the weights of the best epoch are kept (most answers to the
    letter, then lowest loss; epoch 0 is the student as it was) and training stops after `--patience` epochs without
    gain. `start` is the folder of an earlier round, whose adapter or weights are trained on; otherwise an adapter that
    the student carries is taken off. `advance` is called after each step. Changes the student: it answers as the
    trained one afterwards.

    A step is over `train_batch_size * accumulate` rows, however many processes share them; its loss is the mean over
    all their target tokens. In several processes, all must call this with the same arguments; a training goes on from
    its checkpoint in any number of them. A student that is spread over them answers nothing afterwards: it lies in the
    folder.

    Raises `InputError` for a method that this machine lacks the means for, and `RunError` when there are too few
    examples, or too many that cannot be trained on.
    """
    refuse_untrainable(config)
    if len(examples) < MINIMUM:
        raise RunError(f"{len(examples)} training rows are too few, at least {MINIMUM} are needed")
    ranks = Ranks(cpu=student.model.device.type == "cpu")
    rate = config.learning_rate or default_rate(student.model, config.method)
    if ranks.number == 0:
        open_stage(folder, _fingerprint(student, examples, config, rate, start))
    ranks.wait()
    metrics = folder / METRICS
    if metrics.exists():
        refuse_damaged(folder)
        make_trainable(student, config, folder, start=folder).close()
    else:
        _Training(student, examples, folder, config, rate, start, ranks).run(advance)
    ranks.wait()
    if ranks.number == 0:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    student.model.eval()
    result: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    return result


def steps_of(examples: Sequence[Example], config: AlignConfig) -> int:
    """The optimizer steps of training on these examples, if it does not stop early and drops none."""
    train, _ = split_by_group(examples, config.holdout, config.seed)
    return math.ceil(len(train) / _rows_per_step(config)) * config.epochs


class _Training:
    """One training; everything random in it depends on the seed and the step alone."""

    def __init__(
        self,
        student: TransformersVlm,
        examples: Sequence[Example],
        folder: Path,
        config: AlignConfig,
        rate: float,
        start: Path | None,
        ranks: Ranks,
    ) -> None:
        self._student, self._folder, self._config, self._rate, self._ranks = student, folder, config, rate, ranks
        self._data = TrainingData(student, examples, frozen_features=set(config.train) == {"language"})
        self._data.prepare()
        _refuse_many_dropped(self._data.dropped, len(examples))
        self._train, self._held = split_by_group(self._data.examples, config.holdout, config.seed)
        if not self._train:
            raise RunError(
                "the training set shows one picture only: nothing is left to train on beside the held-out one"
            )
        self._dtype = student.model.dtype
        torch.manual_seed(config.seed)
        self._trainee = make_trainable(student, config, folder, start)
        set_checkpointing(student.model, config)
        self._weights = self._trainee.weights
        if ranks.sharded:
            self._weights = shard(student.model, self._weights, offload=ranks.offload)
        self._best = {name: kept(weight) for name, weight in self._weights.items()}
        self._zero: Zero | None = None
        if ranks.zero:
            self._zero = Zero(student.model, self._weights.values(), self._loss_and_exact, rate=rate, clip=CLIP)
        self._optimizer = self._zero or torch.optim.AdamW(self._weights.values(), lr=rate, weight_decay=0.0)
        self._steps_per_epoch = math.ceil(len(self._train) / _rows_per_step(config))
        self._state = State()

    def run(self, advance: Advance) -> None:
        """Train from where the checkpoint stands to the end, and write what was trained, and the metrics."""
        self._state = load_checkpoint(self._folder, self._weights, self._best, self._optimizer)
        if not self._state.history:
            self._close_epoch()
        advance(self._state.step)
        for rows in self._steps():
            self._step(rows)
            advance(1)
            if self._state.step % self._steps_per_epoch == 0:
                self._close_epoch()
                self._save_checkpoint()
            elif self._state.step % STEPS_PER_CHECKPOINT == 0:
                self._save_checkpoint()
        self._finish()

    def _steps(self) -> Iterator[list[int]]:
        """The rows of each step that remains; ends early when held-out answers gain no more."""
        config, state = self._config, self._state
        for epoch in range(state.step // self._steps_per_epoch, config.epochs):
            if state.epochs_without_gain >= config.patience:
                return
            steps = self._data.batches(self._train, _rows_per_step(config), f"{config.seed} {epoch}")
            yield from islice(steps, state.step % self._steps_per_epoch, None)

    def _step(self, rows: list[int]) -> None:
        state = self._state
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * self._schedule(state.step)
        # Dropout, where a model has it, must not depend on whether the run was resumed.
        torch.manual_seed(self._config.seed * 1_000_003 + state.step)
        tokens = self._data.target_tokens(rows)
        loss = self._accumulate(rows, tokens)
        torch.nn.utils.clip_grad_norm_(self._weights.values(), CLIP)
        self._optimizer.step()
        state.step += 1
        state.loss_sum += loss
        state.tokens += tokens

    def _accumulate(self, rows: list[int], tokens: int) -> float:
        """Leave the gradient of the rows' loss per token in the weights, the same in each process; DeepSpeed keeps it
        to itself. Returns the loss's sum over the tokens."""
        self._student.model.train()
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._student.model.device)
        size, ranks = self._config.train_batch_size, self._ranks
        mine = list(in_batches(ranks.share(rows), size))
        # FSDP and DeepSpeed sum gradients themselves, and divide by the number of processes.
        scale = (ranks.count if ranks.together else 1) / tokens
        most = math.ceil(math.ceil(len(rows) / ranks.count) / size)
        for number, (places, counts) in enumerate(self._together(mine, most, rows[:1]), 1):
            if self._zero:
                loss = self._zero.backward(places, scale=counts * scale, last=number == most)
            else:
                loss, _ = self._loss_and_exact(places)
                (loss * (counts * scale)).backward()
            total += counts * loss.detach()
        if self._zero:
            return float(ranks.sum([total])[0])
        # A weight that no output depends on has no gradient: towers may have layers whose output is not used.
        gradients = [weight.grad if weight.grad is not None else weight * 0 for weight in self._weights.values()]
        if ranks.sharded:
            total = ranks.sum([total])[0]
        else:
            total, *gradients = ranks.sum([total, *gradients])
        for weight, gradient in zip(self._weights.values(), gradients, strict=True):
            weight.grad = gradient.detach()
        return float(total)

    def _together(
        self, mine: Sequence[Sequence[int]], passes: int, other: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], int]]:
        """This process's batches, which count. Where all processes must make as many passes, those that have fewer
        batches make the rest with another one, which does not count."""
        yield from ((places, 1) for places in mine)
        if self._ranks.together:
            yield from ((other, 0) for _ in range(passes - len(mine)))

    def _loss_and_exact(self, places: Sequence[int]) -> tuple[torch.Tensor, int]:
        inputs, labels = self._data.batch(places)
        with autocast(self._student.model, self._dtype):
            return loss_and_exact(self._student.model, inputs, labels)

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then a half cosine to zero."""
        total = self._steps_per_epoch * self._config.epochs
        warmup = max(1, round(self._config.warmup * total))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def _close_epoch(self) -> None:
        """Ask the held-out pictures, note the figures, keep the weights when they are the best so far."""
        state, figures = self._state, self._evaluate()
        train_loss = state.loss_sum / state.tokens if state.tokens else None
        state.history.append({"epoch": len(state.history), "train_loss": train_loss, **figures})
        score = (figures["holdout_exact"], -figures["holdout_loss"])
        if score > state.best_score:
            state.best_score, state.best_epoch = score, len(state.history) - 1
            for name, weight in self._weights.items():
                self._best[name].copy_(weight.detach())
        state.loss_sum, state.tokens = 0.0, 0

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self._student.model.eval()
        loss, exact = 0.0, 0
        batches = list(in_batches(self._held, self._config.train_batch_size))
        passes = math.ceil(len(batches) / self._ranks.count)
        for places, counts in self._together(self._ranks.share(batches), passes, batches[0]):
            batch_loss, batch_exact = self._loss_and_exact(places)
            loss, exact = loss + counts * batch_loss.item(), exact + counts * batch_exact
        if self._ranks.count > 1:
            device = self._student.model.device
            loss, exact = (
                value.item()
                for value in self._ranks.sum([torch.tensor(loss, device=device), torch.tensor(exact, device=device)])
            )
        return {"holdout_loss": loss / self._data.target_tokens(self._held), "holdout_exact": exact / len(self._held)}

    def _save_checkpoint(self) -> None:
        write = self._ranks.number == 0
        if write or self._ranks.together:
            save_checkpoint(self._folder, self._weights, self._best, self._optimizer, self._state, write=write)

    def _finish(self) -> None:
        if self._zero:
            self._zero.close()
        if self._ranks.sharded:
            reshard(self._student.model)
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._best[name])
        counted = count_parameters(self._student.model)
        self._trainee.close()
        write = self._ranks.number == 0
        if write or self._ranks.sharded:
            self._trainee.save(self._folder, write=write)
        if write:
            metrics = json.dumps(self._metrics(counted), indent=2) + "\n"
            write_sums(self._folder, **{METRICS: metrics})
            # Last: a folder with metrics is a finished one.
            write_atomic(self._folder / METRICS, metrics)

    def _metrics(self, counted: dict[str, dict[str, int]]) -> dict[str, Any]:
        state = self._state
        return {
            "examples": {"train": len(self._train), "holdout": len(self._held)},
            "dropped": self._data.dropped,
            "train_verdicts": dict(
                sorted(Counter(self._data.examples[place].verdict for place in self._train).items())
            ),
            "learning_rate": self._rate,
            "steps": state.step,
            "parameters": counted,
            "best_epoch": state.best_epoch,
            "before": state.history[0],
            "best": state.history[state.best_epoch],
            "history": state.history,
        }


def _rows_per_step(config: AlignConfig) -> int:
    return config.train_batch_size * config.accumulate


def _refuse_many_dropped(dropped: dict[str, str], rows: int) -> None:
    if len(dropped) > MOST_DROPPED * rows:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(dropped.items())[:3])
        raise RunError(
            f"{len(dropped)} of {rows} training rows cannot be trained on ({first}). Nothing of a prompt is ever cut "
            "off; where rows are too long, make the pictures smaller with --longest-edge"
        )


def _fingerprint(
    student: TransformersVlm, examples: Sequence[Example], config: AlignConfig, rate: float, start: Path | None
) -> dict[str, Any]:
    facts = student.describe()
    if start is not None:
        # Which weights it carries at the moment does not matter: it gets those of `start`.
        facts = {key: value for key, value in facts.items() if key not in ("weights", "hub_id", "revision")}
    return {
        "stage": "level",
        "student": {key: value for key, value in facts.items() if key != "adapter"},
        "start": digest_of_trained(start) if start is not None else None,
        "examples": _digest(examples),
        "learning_rate": rate,
        **{name: getattr(config, name) for name in SHAPING},
    }


def _digest(examples: Sequence[Example]) -> str:
    """The SHA-256 of the rows as one JSON list, of which one row is in memory at a time."""
    digest, between = hashlib.sha256(b"["), b""
    for item in examples:
        digest.update(between + json.dumps([item.id, item.prompt, item.answer]).encode())
        between = b", "
    digest.update(b"]")
    return digest.hexdigest()
