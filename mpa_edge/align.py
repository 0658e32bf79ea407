"""The alignment of a student to a teacher: samples, annotate, identify, level, and what came of it.

align(config)                               loads the models
align_models(config, teacher, student)      works on loaded ones
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpa_edge.annotate import annotate
from mpa_edge.audit import write_audit
from mpa_edge.collapse import collapse
from mpa_edge.config import AlignConfig
from mpa_edge.datasets import Skipped, scan_images
from mpa_edge.errors import FingerprintMismatch, InputError, RunError, require
from mpa_edge.identify import identify
from mpa_edge.models import ADAPTER, open_vlm
from mpa_edge.parts import compare_fingerprints, read_parts
from mpa_edge.progress import progress
from mpa_edge.records import Annotation, Case, Sample, read_rows, write_rows
from mpa_edge.run_folder import RUN, RunFolder, RunLog, read_run
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.selection import select_cases, training_row
from mpa_edge.tasks import Task, task_named

if TYPE_CHECKING:
    from mpa_edge.transformers_vlm import TransformersVlm

# One question with one answer may make up this share of a run's annotations; rarer ones are never too many.
PAIR_SHARE = 0.05
# Settings that may differ when a run goes on.
NOT_SHAPING = ("images", "teacher", "student", "task", "out", "fresh", "batch_size", "device")


# What the last stage needs is asked for before the first one starts.
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "rapidfuzz")


@dataclass(frozen=True)
class AlignResult:
    """What a run kept and dropped. Counts are rows: files, annotations, cases, training rows."""

    run: Path
    pictures: int
    skipped: dict[str, int]
    annotations: int
    rejected: dict[str, int]
    verdicts: dict[str, int]
    training: dict[str, int]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        return RunFolder(self.run).student

    @property
    def next_command(self) -> str:
        """What to type next."""
        return f"mpa-edge export {shlex.quote(str(self.run))} --format gguf"

    def summary(self) -> str:
        """The result in a few lines, for people."""
        kept = sum(self.training.values())
        before, best = self.metrics["before"], self.metrics["best"]
        return "\n".join(
            (
                f"pictures     {self.pictures} used, {_counts('skipped', self.skipped)}",
                f"annotations  {self.annotations - sum(self.rejected.values())} usable of {self.annotations}, "
                f"{_counts('rejected', self.rejected)}",
                f"verdicts     {_listed(self.verdicts) or 'none'}",
                f"training     {kept} rows ({_listed(self.training)})",
                f"held out     {before['holdout_exact']:.1%} -> {best['holdout_exact']:.1%} right to the letter "
                f"(epoch {self.metrics['best_epoch']}, {self.metrics['examples']['holdout']} rows)",
                f"adapter      {self.adapter}",
                f"to look at   {RunFolder(self.run).audit}",
                f"next         {self.next_command}",
            )
        )


def align(config: AlignConfig) -> AlignResult:
    """Align as the settings say; going on where an earlier run with the same settings stopped.

    Raises `InputError` for settings, paths and models that cannot be, `RunLocked` when another process works in the
    run's folder, `FingerprintMismatch` when that holds the work of other settings, and `RunError` when the models leave
    too little to train on.
    """
    require("align", LIBRARIES)
    task_named(config.task)
    _check_student(config.student)
    options: dict[str, Any] = {"device": config.device, "dtype": config.dtype, "batch_size": config.batch_size}
    with RunFolder(config.run).lock():
        student = open_vlm(config.student, **options)
        teacher = open_vlm(config.teacher, **options)
        return _align(config, teacher, student, teacher_done=teacher.close)


def align_models(config: AlignConfig, teacher: Vlm, student: Vlm) -> AlignResult:
    """As `align`, with models that are loaded. The student must be a transformers model; it is trained in place."""
    with RunFolder(config.run).lock():
        return _align(config, teacher, student)


def _align(
    config: AlignConfig, teacher: Vlm, student: Vlm, *, teacher_done: Callable[[], None] = lambda: None
) -> AlignResult:
    """`teacher_done` is called before training, which may need the memory."""
    run, task = RunFolder(config.run), task_named(config.task)
    trainable = _trainable(student, config)
    if config.fresh:
        run.clear()
    models = {
        "teacher": {"name": teacher.name, **teacher.describe()},
        "student": {"name": student.name, **student.describe()},
    }
    _refuse_other_settings(run, {"config": config.to_json(), "task": task.to_json(), **models})
    log = RunLog(run.path / RUN, config=config.to_json(), task=task.to_json(), **models)
    samples, skipped = _scan(config, run, log)
    annotations = _annotate(config, run, log, teacher, samples, task)
    cases = _identify(config, run, log, teacher, student, samples, annotations, task)
    teacher_done()
    chosen = _select(config, run, log, samples, cases, task)
    result = AlignResult(
        run=run.path,
        pictures=len(samples),
        skipped=_count(item.reason for item in skipped),
        annotations=len(annotations),
        rejected=_count(row.reason for row in annotations),
        verdicts=_count(case.verdict for case in cases),
        training=_count(case.verdict for case in chosen),
    )
    write_audit(run.audit, samples=samples, skipped=skipped, annotations=annotations, cases=cases, selected=chosen)
    result.metrics.update(_level(config, run, log, trainable, result))
    return result


def _refuse_other_settings(run: RunFolder, now: dict[str, Any]) -> None:
    """`FingerprintMismatch` when the folder holds a run of other settings or models; before anything is written.

    Each stage looks again at what shapes its own output; this check sees it first and names the flags.
    """
    if (run.path / RUN).exists():
        compare_fingerprints(run.path, _shaping(read_run(run.path)), _shaping(now))


def _shaping(content: dict[str, Any]) -> dict[str, Any]:
    """What of a `run.json` shapes the results. Pictures, models and the task count by what they are, not by paths."""
    config, models = content.get("config", {}), ("teacher", "student")
    flags = {f"--{name.replace('_', '-')}": value for name, value in config.items() if name not in NOT_SHAPING}
    return flags | {"--task": content.get("task")} | {side: {**content.get(side, {}), "name": None} for side in models}


def _refuse_other_pictures(run: RunFolder, samples: Sequence[Sample]) -> None:
    if run.samples.exists():
        before = [row.sha256 for row in read_rows(run.samples, Sample)]
        now = [row.sha256 for row in samples]
        if before != now:
            new = len(set(now) - set(before))
            difference = (f"{len(before)} pictures", f"{len(now)} pictures, {new} of them new")
            raise FingerprintMismatch(run.path, {"--images": difference})


def _scan(config: AlignConfig, run: RunFolder, log: RunLog) -> tuple[list[Sample], list[Skipped]]:
    with log.stage("samples") as facts:
        samples, skipped = scan_images(config.images, store=run.images, cache=run.path / ".scan.jsonl")
        samples = samples[: config.limit]
        _refuse_other_pictures(run, samples)
        write_rows(run.samples, samples)
        write_rows(run.skipped, skipped)
        facts |= {"used": len(samples), "skipped": _count(item.reason for item in skipped)}
    return samples, skipped


def _annotate(
    config: AlignConfig, run: RunFolder, log: RunLog, teacher: Vlm, samples: Sequence[Sample], task: Task
) -> list[Annotation]:
    with log.stage("annotate") as facts, progress("annotate", len(samples)) as advance:
        annotate(
            teacher,
            samples,
            task,
            run.annotations,
            questions=config.questions,
            temperature=config.temperature,
            seed=config.seed,
            chunk_size=config.chunk_size,
            advance=advance,
        )
        rows = collapse(read_parts(run.annotations, Annotation), max_pair_share=PAIR_SHARE)
        facts |= {"rows": len(rows), "rejected": _count(row.reason for row in rows)}
    return rows


def _identify(
    config: AlignConfig,
    run: RunFolder,
    log: RunLog,
    teacher: Vlm,
    student: Vlm,
    samples: Sequence[Sample],
    annotations: Sequence[Annotation],
    task: Task,
) -> list[Case]:
    usable = [row for row in annotations if row.reason is None]
    pictures = {sample.id: Path(sample.path) for sample in samples}
    with log.stage("identify") as facts, progress("identify", len(usable)) as advance:
        identify(
            teacher,
            student,
            usable,
            pictures,
            task,
            run.cases,
            match=config.match,
            chunk_size=config.chunk_size,
            advance=advance,
        )
        cases = list(read_parts(run.cases, Case))
        facts |= {"rows": len(cases), "verdicts": _count(case.verdict for case in cases)}
    return cases


def _select(
    config: AlignConfig, run: RunFolder, log: RunLog, samples: Sequence[Sample], cases: Sequence[Case], task: Task
) -> list[Case]:
    pictures = {sample.id: Path(sample.path) for sample in samples}
    with log.stage("select") as facts:
        chosen = select_cases(cases, config.select, mix=config.mix, seed=config.seed)
        folder = run.path.resolve()
        write_rows(run.parity, (training_row(case, pictures[case.sample_id], task, folder) for case in chosen))
        facts |= {"rows": len(chosen), "verdicts": _count(case.verdict for case in chosen)}
    return chosen


def _level(
    config: AlignConfig, run: RunFolder, log: RunLog, student: TransformersVlm, result: AlignResult
) -> dict[str, Any]:
    from mpa_edge.level import MINIMUM, level, steps_of
    from mpa_edge.training_data import read_examples

    examples = read_examples(run.parity)
    if len(examples) < MINIMUM:
        raise RunError(_too_few(result, len(examples), MINIMUM))
    with log.stage("level") as facts, progress("level", steps_of(len(examples), config)) as advance:
        metrics = level(student, examples, run.student, config, advance=advance)
        facts |= {key: metrics[key] for key in ("examples", "parameters", "before", "best")}
    return metrics


def _too_few(result: AlignResult, rows: int, needed: int) -> str:
    """Why there is nothing to train on, with the cure that fits."""
    if result.annotations == sum(result.rejected.values()):
        cure = "No annotation could be used: look at the teacher's texts in the audit page."
    elif not result.verdicts.get("parity") and result.verdicts.get("agree"):
        cure = "The student already gives the teacher's answers on these pictures."
    else:
        cure = "Use more pictures, or more questions per picture (--questions)."
    return (
        f"{rows} training rows from {result.pictures} pictures, at least {needed} are needed "
        f"(annotations: {result.annotations}, {_counts('rejected', result.rejected)}; "
        f"verdicts: {_listed(result.verdicts) or 'none'}). {cure} See {RunFolder(result.run).audit}"
    )


def _check_student(spec: str) -> None:
    """Say what cannot be trained before anything is loaded."""
    if (Path(spec).expanduser() / ADAPTER).is_file():
        raise InputError(
            f"--student {spec}: is an adapter. Merge it first; mpa-edge export keeps the model in RUN/merged."
        )


def _trainable(student: Vlm, config: AlignConfig) -> TransformersVlm:
    from mpa_edge.transformers_vlm import TransformersVlm

    if not isinstance(student, TransformersVlm):
        raise InputError(
            f"--student {config.student}: runs on {student.engine}; only transformers models can be trained"
        )
    return student


def _count(values: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(value for value in values if value is not None).items()))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _counts(verb: str, counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return f"{total} {verb} ({_listed(counts)})" if total else f"none {verb}"
