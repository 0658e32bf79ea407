"""Parity Leveler: fine-tune the student on the training set with LoRA, loss on the answer tokens only.

A plain loop rather than transformers' or trl's trainer: it resumes to the same weights bit for bit from one checkpoint
file without pickle (both trainers store optimizer and random state through `torch.save`), trains on image features that
were computed once, and takes its prompts from the very code that asks the student.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mpa_edge.config import AlignConfig
from mpa_edge.errors import RunError
from mpa_edge.lora import add_lora, count_parameters, name_of_base, save_adapter, width_of
from mpa_edge.parts import Advance, open_stage
from mpa_edge.records import write_atomic
from mpa_edge.training_data import Example, TrainingData, in_batches, loss_and_exact, split_by_group
from mpa_edge.transformers_vlm import TransformersVlm

METRICS = "metrics.json"
CHECKPOINT = "checkpoint.safetensors"
# Fewer rows than this are no training set.
MINIMUM = 8
# A killed run repeats at most so many steps.
STEPS_PER_CHECKPOINT = 100
WARMUP = 0.05
CLIP = 1.0


@dataclass
class State:
    """How far training is; what a checkpoint holds besides the tensors. Floats survive JSON exactly."""

    step: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-1.0, -math.inf)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epochs_without_gain(self) -> int:
        """Epochs since the best one."""
        return len(self.history) - 1 - self.best_epoch


def level(
    student: TransformersVlm,
    examples: Sequence[Example],
    folder: Path,
    config: AlignConfig,
    *,
    advance: Advance = lambda count: None,
) -> dict[str, Any]:
    """Train an adapter and write it to `folder` with `metrics.json`; resumes. Returns the metrics.

    After each epoch the held-out pictures are asked; the weights of the best epoch are kept (most answers to the
    letter, then lowest loss; epoch 0 is the student as it was) and training stops after `--patience` epochs without
    gain. `advance` is called after each step. Changes the student: it answers with the adapter's last weights then.

    Raises `RunError` when there are too few examples.
    """
    if len(examples) < MINIMUM:
        raise RunError(f"{len(examples)} training rows are too few, at least {MINIMUM} are needed")
    rate = config.learning_rate or default_rate(student.model)
    open_stage(folder, _fingerprint(student, examples, config, rate))
    metrics = folder / METRICS
    if not metrics.exists():
        _Training(student, examples, folder, config, rate).run(advance)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    result: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    return result


def default_rate(model: Any) -> float:
    """The learning rate where none is given: 2e-4, usual for LoRA at a width of 2048, in inverse proportion to the
    language model's width (as in maximal update parametrisation, arXiv 2203.03466), at most 2e-3."""
    return min(2e-3, 2e-4 * 2048 / width_of(model))


def steps_of(examples: int, config: AlignConfig) -> int:
    """The optimizer steps of training on so many examples, were none held out and did it not stop early."""
    return math.ceil(examples / config.train_batch_size) * config.epochs


class _Training:
    """One training; everything random in it depends on the seed and the step alone."""

    def __init__(
        self, student: TransformersVlm, examples: Sequence[Example], folder: Path, config: AlignConfig, rate: float
    ) -> None:
        self._student, self._examples, self._folder, self._config, self._rate = student, examples, folder, config, rate
        self._train, self._held = split_by_group(examples, config.holdout, config.seed)
        if not self._train:
            raise RunError(
                "the training set shows one picture only: nothing is left to train on beside the held-out one"
            )
        torch.manual_seed(config.seed)
        self._data = TrainingData(student, examples)
        self._data.prepare()
        base = name_of_base(config.student, folder)
        self._adapted = add_lora(student.model, rank=config.rank, alpha=config.alpha, base=base)
        self._weights = {name: p for name, p in self._adapted.named_parameters() if p.requires_grad}
        self._best = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._optimizer = torch.optim.AdamW(self._weights.values(), lr=rate, weight_decay=0.0)
        self._steps_per_epoch = math.ceil(len(self._train) / config.train_batch_size)
        self._state = State()

    def run(self, advance: Advance) -> None:
        """Train from where the checkpoint stands to the end, and write adapter and metrics."""
        self._load_checkpoint()
        if not self._state.history:
            self._close_epoch()
        advance(self._state.step)
        for batch in self._batches():
            self._step(batch)
            advance(1)
            if self._state.step % self._steps_per_epoch == 0:
                self._close_epoch()
                self._save_checkpoint()
            elif self._state.step % STEPS_PER_CHECKPOINT == 0:
                self._save_checkpoint()
        self._finish()

    def _batches(self) -> Iterator[list[int]]:
        """The batches that remain; ends early when held-out answers gain no more."""
        config, state = self._config, self._state
        for epoch in range(state.step // self._steps_per_epoch, config.epochs):
            if state.epochs_without_gain >= config.patience:
                return
            batches = self._data.batches(self._train, config.train_batch_size, f"{config.seed} {epoch}")
            yield from batches[state.step % self._steps_per_epoch :]

    def _step(self, batch: list[int]) -> None:
        state = self._state
        self._student.model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * self._schedule(state.step)
        # Dropout, where a model has it, must not depend on whether the run was resumed.
        torch.manual_seed(self._config.seed * 1_000_003 + state.step)
        inputs, labels = self._data.batch(batch)
        loss, _ = loss_and_exact(self._student.model, inputs, labels)
        tokens = int((labels >= 0).sum())
        self._optimizer.zero_grad()
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._weights.values(), CLIP)
        self._optimizer.step()
        state.step += 1
        state.loss_sum += loss.item()
        state.tokens += tokens

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then a half cosine to zero."""
        total = self._steps_per_epoch * self._config.epochs
        warmup = max(1, round(WARMUP * total))
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
            self._best = {name: weight.detach().clone() for name, weight in self._weights.items()}
        state.loss_sum, state.tokens = 0.0, 0

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self._student.model.eval()
        loss, exact, tokens = 0.0, 0, 0
        for places in in_batches(self._held, self._config.train_batch_size):
            inputs, labels = self._data.batch(places)
            batch_loss, batch_exact = loss_and_exact(self._student.model, inputs, labels)
            loss, exact, tokens = loss + batch_loss.item(), exact + batch_exact, tokens + int((labels >= 0).sum())
        return {"holdout_loss": loss / tokens, "holdout_exact": exact / len(self._held)}

    def _save_checkpoint(self) -> None:
        tensors = {}
        for name, weight in self._weights.items():
            moments = self._optimizer.state[weight]
            for kind, tensor in (
                ("weight", weight),
                ("best", self._best[name]),
                ("first", moments["exp_avg"]),
                ("second", moments["exp_avg_sq"]),
            ):
                tensors[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()
        state = {"state": json.dumps(asdict(self._state))}
        write_atomic(self._folder / CHECKPOINT, save(tensors, metadata=state))

    def _load_checkpoint(self) -> None:
        path = self._folder / CHECKPOINT
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file, torch.no_grad():
                state = json.loads(file.metadata()["state"])
                for name, weight in self._weights.items():
                    weight.copy_(file.get_tensor(f"weight/{name}"))
                    self._best[name].copy_(file.get_tensor(f"best/{name}"))
                    self._optimizer.state[weight] = {
                        "step": torch.tensor(float(state["step"])),
                        "exp_avg": file.get_tensor(f"first/{name}").to(weight.device),
                        "exp_avg_sq": file.get_tensor(f"second/{name}").to(weight.device),
                    }
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}). Delete it to train from the start.") from error
        self._state = State(**{**state, "best_score": tuple(state["best_score"])})

    def _finish(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._best[name])
        self._student.model.eval()
        save_adapter(self._adapted, self._folder)
        state = self._state
        verdicts = [self._examples[place].verdict for place in self._train]
        metrics = {
            "examples": {"train": len(self._train), "holdout": len(self._held)},
            "train_verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
            "learning_rate": self._rate,
            "steps": state.step,
            "parameters": count_parameters(self._adapted),
            "best_epoch": state.best_epoch,
            "before": state.history[0],
            "best": state.history[state.best_epoch],
            "history": state.history,
        }
        # Last: a folder with metrics is a finished one.
        write_atomic(self._folder / METRICS, json.dumps(metrics, indent=2) + "\n")


def _fingerprint(
    student: TransformersVlm, examples: Sequence[Example], config: AlignConfig, rate: float
) -> dict[str, Any]:
    rows = [[item.id, item.prompt, item.answer] for item in examples]
    shaping = ("rank", "alpha", "epochs", "train_batch_size", "patience", "holdout", "seed")
    return {
        "stage": "level",
        "student": student.describe(),
        "examples": _digest(rows),
        "learning_rate": rate,
        **{name: getattr(config, name) for name in shaping},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
