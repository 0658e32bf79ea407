"""What a run would take, before any of it is done: pictures, requests, time and disk, from a measured sample.

plan_align(config)                         opens the models
plan_models(config, teacher, student)      works on loaded ones; the student may be trained on some rows

The sample goes the road of the run, through the same code, in a temporary folder: nothing is written into the run's.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mpa_edge.align import meet
from mpa_edge.amounts import Range, spoken_bytes, spoken_seconds
from mpa_edge.annotate import Annotator
from mpa_edge.config import AlignConfig
from mpa_edge.datasets import table_named
from mpa_edge.errors import MpaEdgeError
from mpa_edge.identify import Identifier, Reidentifier
from mpa_edge.opening import open_models
from mpa_edge.records import Annotation, Case, Record, Sample, write_rows
from mpa_edge.run_folder import RunFolder
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.scan import SCANNED, SHARED, find_pictures
from mpa_edge.scan_index import copy_cache
from mpa_edge.selection import choose, training_row
from mpa_edge.tables import Table
from mpa_edge.tasks import Task, task_named
from mpa_edge.training_set import count_by

# Pictures that warm the models up, and that are measured at once; where that is quick, a batch as large as the run's
# follows, else one more of these.
WARM_UP, FEW = 2, 8
QUICK_SECONDS = 15.0
# Two batches know the mean no better than that.
MARGIN = 0.25
RAY = (
    "asking was measured in this process, with one copy of the models; N actors of --engine ray take about an Nth of it"
)


@dataclass(frozen=True)
class Stage:
    """A stage of the run: `counts` says how often what is done, `seconds` from and to (None: not measured)."""

    name: str
    counts: dict[str, int]
    seconds: Range | None = None


@dataclass(frozen=True)
class Plan:
    """What a run would take. `pictures` are those to ask about, `skipped` counts the others by reason, `shared` those
    that `--test` has too (None: not looked at); `disk` is the most bytes in the run's folder, by what they are for:
    checkpoints go when training is done."""

    pictures: int
    skipped: dict[str, int]
    shared: int | None
    sampled: int
    stages: tuple[Stage, ...]
    disk: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> Range:
        """From and to, over all stages that were measured."""
        known = [stage.seconds for stage in self.stages if stage.seconds]
        return sum(low for low, _ in known), sum(high for _, high in known)

    def summary(self) -> str:
        """The plan in some lines, for people."""
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        shared = f", {self.shared} shared with --test" if self.shared is not None else ""
        lines = [f"pictures     {self.pictures:,} to ask about; {skipped or 'none'} skipped{shared}"]
        for stage in self.stages:
            counts = ", ".join(f"{count:,} {what}" for what, count in stage.counts.items())
            lines.append(f"{stage.name:<12} {counts}: {spoken_seconds(stage.seconds)}")
        left_out = "" if all(stage.seconds for stage in self.stages) else ", without what was not measured"
        lines.append(f"time         {spoken_seconds(self.seconds)}{left_out}; measured on {self.sampled} pictures")
        disk = ", ".join(f"{what} {spoken_bytes(size)}" for what, size in self.disk.items())
        lines.append(f"disk         {spoken_bytes(sum(self.disk.values()))} ({disk})")
        return "\n".join([*lines, *(f"note         {note}" for note in self.notes)])


def plan_align(config: AlignConfig) -> Plan:
    """What `align(config)` would take, were its folder empty. Opens the models and asks about some pictures; on a chat
    server these requests count as any others. Raises as `align` does for what it would refuse at once."""
    meet(config)
    task_named(config.task)
    with tempfile.TemporaryDirectory() as folder:
        found = _look(config, Path(folder))
        models = open_models(config)
        try:
            return _plan(config, found, *models, Path(folder))
        finally:
            for vlm in models:
                if vlm is not None:
                    vlm.close()


def plan_models(config: AlignConfig, teacher: Vlm, student: Vlm, *, asked: Vlm | None = None) -> Plan:
    """As `plan_align`, with models that are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        return _plan(config, _look(config, Path(folder)), teacher, student, asked, Path(folder))


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """`samples` are as many as are asked about at most; `count` is how many pictures there would be."""

    samples: list[Sample]
    skipped: dict[str, int]
    shared: int | None
    count: int
    stored: int = 0
    notes: list[str] = field(default_factory=list)


def _look(config: AlignConfig, folder: Path) -> _Found:
    table = table_named(config.images)
    if table:
        return _look_at_table(config, table, folder)
    _copy_caches(config.run, folder)
    with find_pictures(config, RunFolder(folder)) as pictures:
        skipped = count_by(item.reason for item in pictures.skipped())
        found, notes = pictures.overlap, list[str]()
        if found and found.looked_at < found.pictures:
            notes.append(f"of --test only {found.looked_at} of {found.pictures} pictures could be looked at")
        samples = _spread(pictures.samples(), pictures.count, _wanted(config))
        return _Found(samples, skipped, pictures.shared, pictures.count, notes=notes)


def _look_at_table(config: AlignConfig, table: Table, folder: Path) -> _Found:
    """A table is read no further than the sample takes."""
    part = config.model_copy(update={"limit": min(_wanted(config), config.limit or max(table.count, 1)), "test": None})
    with find_pictures(part, RunFolder(folder)) as pictures:
        samples, skipped = list(pictures.samples()), count_by(item.reason for item in pictures.skipped())
    count = min(table.count, config.limit or table.count)
    size = sum(Path(sample.path).stat().st_size for sample in samples) * count // len(samples)
    notes = [f"the pictures of {config.images} were not looked at but for {len(samples)}: some may be skipped"]
    if config.test is not None and not config.keep_shared:
        notes.append("those that --test has too are still counted: the run looks for them, and leaves them out")
    return _Found(samples, skipped, None, count, size, notes)


def _copy_caches(run: Path, folder: Path) -> None:
    """What an earlier scan of the run remembers is taken, and left as it is."""
    if (run / SHARED).is_file():
        shutil.copy(run / SHARED, folder / SHARED)
    if (run / SCANNED).is_file():
        with suppress(sqlite3.DatabaseError):  # it is damaged; what came of it nevertheless, the scan looks through
            copy_cache(run / SCANNED, folder / SCANNED)


def _spread(samples: Iterable[Sample], of: int, count: int) -> list[Sample]:
    """So many samples, from all over: neighbours are often of one kind."""
    count = min(count, of)
    wanted = {place * of // count for place in range(count)}
    return [sample for place, sample in enumerate(samples) if place in wanted]


# --- the sample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Some pictures that went the road of the run: the rows, and the seconds of each stage."""

    pictures: int
    annotations: list[Annotation]
    cases: list[Case]
    annotate: float
    identify: float
    again: float = 0.0


@dataclass(frozen=True)
class _Measured:
    """What the sample showed."""

    batches: tuple[_Batch, ...]

    @property
    def pictures(self) -> int:
        """How many pictures were measured."""
        return sum(batch.pictures for batch in self.batches)

    @property
    def annotations(self) -> list[Annotation]:
        """All annotations, rejected ones too."""
        return [row for batch in self.batches for row in batch.annotations]

    @property
    def cases(self) -> list[Case]:
        """One per annotation that can be used."""
        return [case for batch in self.batches for case in batch.cases]

    def annotate(self, pictures: int) -> Range | None:
        """Seconds to annotate so many pictures."""
        return _range([batch.annotate / batch.pictures for batch in self.batches], pictures)

    def identify(self, questions: int) -> Range | None:
        """Seconds to put so many questions to both models."""
        return _range([batch.identify / len(batch.cases) for batch in self.batches if batch.cases], questions)

    def again(self, questions: int) -> Range | None:
        """Seconds to put them to the student alone."""
        return _range([batch.again / len(batch.cases) for batch in self.batches if batch.cases], questions)


def _plan(config: AlignConfig, found: _Found, teacher: Vlm, student: Vlm, asked: Vlm | None, folder: Path) -> Plan:
    task, notes = task_named(config.task), list(found.notes)
    if config.engine == "ray":
        notes.append(RAY)
    samples = _spread(found.samples, len(found.samples), _affordable(config, teacher))
    measured = _measure(config, task, samples, teacher, asked or student)
    if teacher.engine == "chat":
        sent, most = getattr(teacher, "sent", 0), config.max_requests
        notes.append(f"the sample took {sent} requests" + (f" of the {most} of --max-requests" if most else ""))
    if measured.pictures and not measured.cases:
        notes.append("no annotation of the sample could be used: look at what the teacher writes")
    per_picture = len(measured.cases) / measured.pictures if measured.pictures else config.questions
    questions = round(per_picture * found.count)
    paths = {sample.id: Path(sample.path) for sample in samples}
    rows = _training_rows(config, measured.cases, questions)
    training, trained, why = _train_some(config, task, measured.cases, paths, student, folder, rows)
    notes += [why] if why else []
    stages = [
        Stage(
            "annotate",
            {"questions to the teacher": found.count * config.questions},
            measured.annotate(found.count),
        ),
        Stage(
            "identify",
            {
                f"{'votes' if config.votes > 1 else 'self-checks'} of the teacher": questions * config.votes,
                **({"blind questions": questions} if config.blind else {}),
                "questions to the student": questions,
            },
            measured.identify(questions),
        ),
    ]
    if config.rounds > 1:
        more = questions * (config.rounds - 1)
        stages.append(Stage("rounds", {"questions to the student": more}, measured.again(more)))
    stages.append(Stage("train", {"rows": rows * config.rounds}, training))
    return Plan(
        pictures=found.count,
        skipped=found.skipped,
        shared=found.shared,
        sampled=measured.pictures,
        stages=tuple(stages),
        disk=_disk(config, task, found, measured, paths, rows) | trained,
        notes=tuple(notes),
    )


def _wanted(config: AlignConfig) -> int:
    """How many pictures are asked about at most."""
    return WARM_UP + FEW + max(FEW, config.batch_size)


def _affordable(config: AlignConfig, teacher: Vlm) -> int:
    """How many pictures may be asked about: few on a server, and no more than its budget allows."""
    if teacher.engine != "chat":
        return _wanted(config)
    if config.max_requests is None:
        return WARM_UP + 2 * FEW
    # A text may hold several pairs; twice as many as were asked for is more than was ever seen.
    return min(WARM_UP + 2 * FEW, config.max_requests // (config.questions * (1 + 2 * (config.votes + config.blind))))


def _measure(config: AlignConfig, task: Task, samples: list[Sample], teacher: Vlm, asked: Vlm) -> _Measured:
    annotator = Annotator(teacher, task, config.questions, config.temperature, config.seed)
    identifier = Identifier(teacher, asked, task, config.match, config.votes, config.blind, config.seed)
    reidentifier = Reidentifier(asked, task, config.match)

    def run(batch: list[Sample]) -> _Batch:
        paths = {sample.id: Path(sample.path) for sample in batch}
        rows, annotate = _timed(lambda: annotator.annotations(batch))
        usable = [row for row in rows if row.reason is None]
        cases, identify = _timed(lambda: identifier.cases(usable, paths))
        again = _timed(lambda: reidentifier.cases(cases, paths))[1] if config.rounds > 1 else 0.0
        return _Batch(len(batch), rows, cases, annotate, identify, again)

    warm = min(WARM_UP, len(samples) // 3)
    if warm:
        run(samples[:warm])
    few, rest = samples[warm : warm + FEW], samples[warm + FEW :]
    if not few:
        return _Measured(())
    first = run(few)
    if first.annotate + first.identify > QUICK_SECONDS:
        rest = rest[:FEW]
    return _Measured((first, run(rest)) if rest else (first,))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _range(each: Sequence[float], count: int) -> Range | None:
    """From the fastest to the slowest batch, with a margin; None where there was none."""
    return (min(each) * count * (1 - MARGIN), max(each) * count * (1 + MARGIN)) if each else None


# --- training and disk -----------------------------------------------------------------------------------------------


def _training_rows(config: AlignConfig, cases: Sequence[Case], questions: int) -> int:
    if not cases:
        return 0
    choice = choose(list(cases), config.select, mix=config.mix, seed=config.seed)
    return round(sum(choice.chosen) * questions / len(cases))


def _train_some(
    config: AlignConfig,
    task: Task,
    cases: Sequence[Case],
    paths: dict[str, Path],
    student: Vlm,
    folder: Path,
    rows: int,
) -> tuple[Range | None, dict[str, int], str]:
    """(seconds of training on so many rows, bytes that it writes by what, why it was not measured)."""
    answered = [case for case in cases if case.verdict != "error"]
    if student.engine != "transformers":
        return None, {}, f"training was not measured: the student runs on {student.engine}"
    from mpa_edge.checkpoints import most_bytes
    from mpa_edge.level import MINIMUM, level
    from mpa_edge.training_data import read_examples

    if len({case.sample_id for case in answered}) < 2 or len(answered) < MINIMUM:
        return None, {}, "training was not measured: the sample gave too few rows"
    parity, out = folder / "parity.jsonl", folder / "student"
    write_rows(parity, (training_row(case, paths[case.sample_id], task, folder, config.target) for case in answered))
    once = config.model_copy(update={"epochs": 1})
    try:
        metrics, seconds = _timed(lambda: level(cast(Any, student), read_examples(parity), out, once))
    except MpaEdgeError as error:
        return None, {}, f"training was not measured: {error}"
    # One epoch took half of it at least: rows are also prepared, and the held-out ones are asked twice.
    each, epochs = seconds / len(answered), config.epochs
    low = each / 2 * rows * min(epochs, config.patience + 1) * config.rounds
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    disk = {
        "student": size * config.rounds,
        "checkpoints of training": most_bytes(sum(metrics["parameters"]["trainable"].values())),
    }
    return (low, each * rows * epochs * config.rounds), disk, ""


def _disk(
    config: AlignConfig,
    task: Task,
    found: _Found,
    measured: _Measured,
    paths: dict[str, Path],
    rows: int,
) -> dict[str, int]:
    written = _bytes(measured.annotations) + config.rounds * _bytes(measured.cases)
    each = _bytes([training_row(case, paths[case.sample_id], task, config.run) for case in measured.cases[:1]])
    disk = {
        "pictures": found.stored,
        "rows": written * found.count // max(1, measured.pictures),
        "training set": each * rows * (1 + len(set(config.save_as))),
    }
    return {what: size for what, size in disk.items() if size}


def _bytes(rows: Sequence[Record | dict[str, Any]]) -> int:
    contents = (row if isinstance(row, dict) else row.to_json() for row in rows)
    return sum(len(json.dumps(content, ensure_ascii=False).encode()) + 1 for content in contents)
