"""The two ways of one alignment, the plain loop and ours, and what each costs; see `benchmarks.align_speed`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mpa_edge.asking import ask
from mpa_edge.benchmarks.host import watch_others
from mpa_edge.config import AlignConfig
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer, Decoding

if TYPE_CHECKING:
    from mpa_edge.training_data import Example, TrainingData
    from mpa_edge.transformers_vlm import TransformersVlm

EPOCHS = int(AlignConfig.model_fields["epochs"].default)


@dataclass(frozen=True)
class Ask:
    """A picture file with a prompt, and how to decode."""

    path: Path
    prompt: str
    decoding: Decoding


@dataclass(frozen=True)
class Work:
    """What is to be asked: the teacher writes about pictures, then both models answer questions. Rows per training
    batch, and how often everything is measured."""

    annotate: list[Ask]
    identify: list[Ask]
    train_batch: int
    repeats: int = 3

    def some(self) -> Work:
        """A small part of it, to warm up with."""
        return Work(self.annotate[:2], self.identify[:2], self.train_batch, 1)


@dataclass
class Times:
    """Seconds of each repeat, and of the encoder in it, for both ways."""

    plain: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    plain_encoder: list[float] = field(default_factory=list)
    ours_encoder: list[float] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by the medians."""
        return median(self.plain) / median(self.ours)

    def take_turns(self, plain: Callable[[], Any], ours: Callable[[], Any], clock: EncoderClock, repeats: int) -> None:
        """Measure both ways `repeats` times, one after the other."""
        for _ in range(repeats):
            for name, way in (("plain", plain), ("ours", ours)):
                clock.reset()
                start = time.perf_counter()
                way()
                getattr(self, name).append(time.perf_counter() - start)
                getattr(self, f"{name}_encoder").append(clock.seconds)
                self.passes[name] = clock.pictures


class EncoderClock:
    """Adds up what the image encoders of some models take, and the tiles that they see."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.seconds, self.pictures, self._since = 0.0, 0, 0.0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Count this model's encoder in."""
        encoder = model.get_encoder(modality="image")

        def before(module: Any, inputs: Any, named: dict[str, Any]) -> None:
            self.pictures += len(named.get("pixel_values", inputs[0] if inputs else ()))
            self._since = time.perf_counter()

        def after(*_: Any) -> None:
            self.seconds += time.perf_counter() - self._since

        hooks = [
            encoder.register_forward_pre_hook(before, with_kwargs=True),
            encoder.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def measure(teacher: TransformersVlm, student: TransformersVlm, work: Work) -> dict[str, Any]:
    """Both comparisons on one pair of models, with raw values. The student is trained in place."""
    clock, others = EncoderClock(), watch_others()
    with ExitStack() as stack:
        for model in {id(vlm.model): vlm.model for vlm in (teacher, student)}.values():
            stack.enter_context(clock.watching(model))
        asked = measure_asking(teacher, student, work, clock)
        trained = measure_training(student, work, clock)
    return {
        "pictures": len({item.path for item in work.annotate}),
        "annotate_asks": len(work.annotate),
        "identify_asks": len(work.identify),
        "batch_size": teacher.batch_size,
        "busy": others(),
        "annotate_identify": asked,
        "train": trained,
        "ratios": {
            "annotate_identify": asked["ratio"],
            "train": trained["ratio"],
            "train_from_nothing": trained["ratio_from_nothing"],
            "train_step": trained["ratio_step"],
        },
    }


def measure_asking(
    teacher: TransformersVlm, student: TransformersVlm, work: Work, clock: EncoderClock
) -> dict[str, Any]:
    """The plain loop against ours."""
    answers: dict[str, list[Answer]] = {}

    def plain(part: Work = work) -> None:
        answers["plain"] = ask_plainly(teacher, student, part)

    def ours(part: Work = work) -> None:
        # Each time with nothing kept from the time before.
        answers["ours"] = ask_ours(fresh(teacher), fresh(student), part)

    plain(work.some())
    ours(work.some())
    times = Times()
    times.take_turns(plain, ours, clock, work.repeats)
    same = [one.tokens == other.tokens for one, other in zip(answers["plain"], answers["ours"], strict=True)]
    share = median(times.plain_encoder) / median(times.plain)
    saved = 1 - times.passes["ours"] / times.passes["plain"]
    return {
        "plain_s": _rounded(times.plain),
        "ours_s": _rounded(times.ours),
        "ratio": round(times.ratio, 2),
        "same_answers": round(sum(same) / len(same), 4),
        "encoder_share": {
            "plain": round(share, 3),
            "ours": round(median(times.ours_encoder) / median(times.ours), 3),
        },
        "encoder_passes": times.passes,
        "most_by_features": round(1 / (1 - share * saved), 2),
    }


def ask_plainly(teacher: TransformersVlm, student: TransformersVlm, work: Work) -> list[Answer]:
    """One question at a time: a call of one pair reuses nothing."""

    def answer(vlm: TransformersVlm, item: Ask) -> Answer:
        return vlm.answer([open_image(item.path)], [item.prompt], item.decoding)[0]

    return [
        *(answer(teacher, item) for item in work.annotate),
        *(answer(vlm, item) for vlm in (teacher, student) for item in work.identify),
    ]


def ask_ours(teacher: TransformersVlm, student: TransformersVlm, work: Work) -> list[Answer]:
    """As the alignment does: all that is decoded alike in one call."""
    return [
        *_ask_alike(teacher, work.annotate),
        *(answer for vlm in (teacher, student) for answer in _ask_alike(vlm, work.identify)),
    ]


def _ask_alike(vlm: TransformersVlm, items: Sequence[Ask]) -> list[Answer]:
    found: dict[int, Answer] = {}
    for decoding in dict.fromkeys(item.decoding for item in items):
        places = [place for place, item in enumerate(items) if item.decoding == decoding]
        paths, prompts = [items[place].path for place in places], [items[place].prompt for place in places]
        found.update(zip(places, ask(vlm, paths, prompts, decoding), strict=True))
    return [found[place] for place in range(len(items))]


def measure_training(student: TransformersVlm, work: Work, clock: EncoderClock) -> dict[str, Any]:
    """An epoch of LoRA steps with the encoder in every step against one with features from the cache."""
    import torch

    from mpa_edge.methods import make_trainable
    from mpa_edge.training_data import Example, TrainingData

    examples = [
        Example(str(place), item.path.name, item.path, item.prompt, "an answer", "parity")
        for place, item in enumerate(work.identify)
    ]
    config = AlignConfig(images="-", teacher="-", student="student", task="reference")
    prepared = [_prepare(student, examples) for _ in range(work.repeats)]
    data = {False: TrainingData(fresh(student), examples, frozen_features=False), True: prepared[0][0]}
    first, asked = [seconds for _, seconds, _ in prepared], [seconds for *_, seconds in prepared]
    with tempfile.TemporaryDirectory() as folder:
        trainee = make_trainable(student, config, Path(folder), None)
    optimizer = torch.optim.AdamW(trainee.weights.values(), lr=1e-4)

    def epoch(*, cached: bool, rows: int | None = None) -> None:
        train_epoch(student.model, data[cached], list(range(len(examples)))[:rows], work.train_batch, optimizer)

    for cached in (False, True):
        epoch(cached=cached, rows=work.train_batch)
    times = Times()
    times.take_turns(lambda: epoch(cached=False), lambda: epoch(cached=True), clock, work.repeats)
    share = median(times.plain_encoder) / median(times.plain)

    def whole(prepare: float) -> float:
        return round(EPOCHS * median(times.plain) / (prepare + EPOCHS * median(times.ours)), 2)

    return {
        "rows": len(examples),
        "rows_per_step": work.train_batch,
        "plain_epoch_s": _rounded(times.plain),
        "ours_epoch_s": _rounded(times.ours),
        "ours_prepare_s": {"asked_before": _rounded(asked), "from_nothing": _rounded(first)},
        "epochs": EPOCHS,
        "ratio": whole(median(asked)),
        "ratio_from_nothing": whole(median(first)),
        "ratio_step": round(times.ratio, 2),
        "encoder_share": {"plain": round(share, 3)},
        "most_by_features": round(1 / (1 - share), 2),
    }


def _prepare(student: TransformersVlm, examples: Sequence[Example]) -> tuple[TrainingData, float, float]:
    """Data with features, and the seconds that it took to make: when the student saw no picture before, and when it was
    asked about them all."""
    from mpa_edge.training_data import TrainingData

    student, seconds = fresh(student), []
    for _ in range(2):
        data = TrainingData(student, examples)
        start = time.perf_counter()
        data.prepare()
        seconds.append(time.perf_counter() - start)
    return data, seconds[0], seconds[1]


def train_epoch(model: Any, data: TrainingData, places: Sequence[int], size: int, optimizer: Any) -> None:
    """One pass over the rows, as the leveler makes it."""
    from mpa_edge.training_data import in_batches, loss_and_exact

    model.train()
    for batch in in_batches(places, size):
        loss, _ = loss_and_exact(model, *data.batch(batch))
        optimizer.zero_grad()
        (loss / data.target_tokens(batch)).backward()
        optimizer.step()
    model.eval()


def fresh(vlm: TransformersVlm) -> TransformersVlm:
    """The same model with nothing kept."""
    from mpa_edge.transformers_vlm import TransformersVlm

    return TransformersVlm(vlm.model, vlm.processor, name=vlm.name, batch_size=vlm.batch_size)


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(second, 3) for second in seconds]
