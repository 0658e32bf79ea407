"""The alignment of a student to a teacher: the training set, the training, and what came of it.

align(config)                               loads the models
align_models(config, teacher, student)      works on loaded ones
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpa_edge.asked import check_bundle, require_bundle
from mpa_edge.askers import Engine
from mpa_edge.audit import audit_run
from mpa_edge.config import AlignConfig
from mpa_edge.errors import ExportError, FingerprintMismatch, InputError, RunError, UnknownFamily, require
from mpa_edge.mirror import require_mirror
from mpa_edge.models import ADAPTER, kind_of
from mpa_edge.opening import open_models, open_student
from mpa_edge.progress import progress, say
from mpa_edge.run_events import recorded
from mpa_edge.run_folder import RoundFolder, RunFolder, delete, set_aside
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.tasks import task_named
from mpa_edge.training_set import RoundCounts, Scanned, TrainingSetMaker, describe, stage_name

if TYPE_CHECKING:
    from mpa_edge.ranks import Ranks
    from mpa_edge.transformers_vlm import TransformersVlm

# What the last stage needs is asked for before the first one starts.
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "rapidfuzz")


Round = tuple[RoundCounts, dict[str, Any]]  # with the training's metrics


@dataclass(frozen=True)
class AlignResult:
    """What a run kept and dropped. Counts are rows: files, annotations, cases, training rows; `verdicts`, `training`
    and `metrics` are those of the last round, `earlier` holds the same of the rounds before it. `test_pictures` counts
    the pictures of `--test` that could be looked at, and all."""

    run: Path
    pictures: int
    skipped: dict[str, int]
    annotations: int
    rejected: dict[str, int]
    verdicts: dict[str, int]
    training: dict[str, int]
    collapsed: int = 0
    shared: int | None = None
    test_pictures: tuple[int, int] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[Round, ...] = ()

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
        skipped = _counts("skipped", self.skipped)
        shared = "" if self.shared is None else f", {self.shared} shared with --test"
        if self.test_pictures and self.test_pictures[0] < self.test_pictures[1]:
            shared += " ({} of its {} pictures looked at)".format(*self.test_pictures)
        usable = self.annotations - sum(self.rejected.values())
        lines = [
            f"pictures     {self.pictures} used, {skipped}{shared}",
            f"annotations  {usable} usable of {self.annotations}, {_counts('rejected', self.rejected)}",
        ]
        last = RoundCounts(self.verdicts, self.collapsed, self.training)
        rounds = [*self.earlier, (last, self.metrics)]
        for number, (counts, metrics) in enumerate(rounds, 1):
            lines += [f"round        {number} of {len(rounds)}"] if len(rounds) > 1 else []
            lines += _round_lines(counts, metrics)
        return "\n".join(
            (
                *lines,
                f"adapter      {self.adapter}",
                f"to look at   {RunFolder(self.run).audit}",
                f"next         {self.next_command}",
            )
        )


def align(config: AlignConfig) -> AlignResult:
    """Align as the settings say; going on where an earlier run with the same settings stopped.

    An earlier run with other settings of training or selection is gone on with too: what it asked is kept, a student
    that it had finished is put aside, with a line that says so.

    Raises `InputError` for settings, paths and models that cannot be, `RunLocked` when another process works in the
    run's folder, `FingerprintMismatch` when that holds what other settings or models were asked, and `RunError` when
    the models leave too little to train on, or a mirror cannot be reached.
    """
    meet(config)
    task_named(config.task)
    if config.mirror:
        require_mirror(config.mirror)
    warn_without_export(config.student)
    run = RunFolder(config.run)
    with run.lock(), recorded(run.path, config.metrics_file):
        if config.engine == "ray":
            return _align_on_ray(config)
        return _align(config, *open_models(config), close=True)


def _align_on_ray(config: AlignConfig) -> AlignResult:
    """The student is opened here too: it is trained here."""
    from mpa_edge.ray_engine import RayPool

    student = open_student(config, config.student)
    if config.ask:
        check_bundle(config.ask, student, config.student)
    pool = RayPool(config)
    try:
        return _align(config, pool.models["teacher"], student, pool.models["asked"], engine=pool, close=True)
    finally:
        pool.close()


def align_models(config: AlignConfig, teacher: Vlm, student: Vlm, *, asked: Vlm | None = None) -> AlignResult:
    """As `align`, with models that are loaded. The student must be a transformers model; it is trained in place.
    `asked` is asked in its place: the bundle of `config.ask`, or anything that answers as the student does."""
    run = RunFolder(config.run)
    with run.lock(), recorded(run.path, config.metrics_file):
        return _align(config, teacher, student, asked)


def help_to_train(config: AlignConfig) -> None:
    """What all processes but the main one do, where several were started: their share of each round's training, in the
    run folder of the main one."""
    from mpa_edge.level import level
    from mpa_edge.training_data import read_examples

    ranks, run = meet(config), RunFolder(config.run)
    student = _trainable(open_student(config, config.student), config)
    start: Path | None = None
    for number in range(1, config.rounds + 1):
        ranks.wait()  # until the main process has chosen the rows
        if number > 1 and ranks.sharded:
            student = _trainable(open_student(config, config.student), config)
        folder = run.round(number, config.rounds)
        level(student, read_examples(folder.parity), folder.student, config, start=start)
        start = folder.student


def meet(config: AlignConfig) -> Ranks:
    """Refuse what cannot be trained before anything is loaded, and meet the other processes, if there are any."""
    require("align", LIBRARIES)
    if config.engine == "ray":
        require("ray", ["ray"])
    from mpa_edge.methods import refuse_untrainable
    from mpa_edge.ranks import Ranks

    _check_student(config.student)
    if config.ask:
        require_bundle(config.ask)
    refuse_untrainable(config)
    return Ranks.of(config.device)


def warn_without_export(student: str) -> None:
    """One line on the error stream where a transformers model can be aligned but not exported, which `family_of` says
    of its configuration alone. Where that cannot be read, whoever opens the model says why."""
    if kind_of(student) != "transformers":
        return
    from transformers import PreTrainedConfig

    from mpa_edge.export.families import family_of

    folder = Path(student).expanduser()
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder if folder.is_dir() else student)
    except Exception:  # the hub's client raises errors of several libraries
        return
    try:
        family_of(config)
    except (UnknownFamily, ExportError) as error:
        say(f"warning: --student {student}: {error}")


def _align(
    config: AlignConfig,
    teacher: Vlm,
    student: Vlm,
    asked: Vlm | None,
    *,
    engine: Engine | None = None,
    close: bool = False,
) -> AlignResult:
    """`close` gives the memory of the models that are only asked back before training."""
    run, trainable = RunFolder(config.run), _trainable(student, config)
    models = describe(teacher=teacher, student=student, ask=asked if config.ask else None)
    maker = TrainingSetMaker(config, run, models)
    scanned = maker.scan()
    annotations, rejected = maker.ask(teacher, asked or student, engine)
    for vlm in (teacher, asked) if close else ():
        if vlm is not None:
            vlm.close()
    rounds: list[Round] = []
    for number in range(1, config.rounds + 1):
        if number > 1:
            _ask_again(config, maker, number)
        rounds.append((maker.select(number), {}))
        result = _result(run, scanned, annotations, rejected, rounds)
        audit_run(run.path, rounds=number)
        result.metrics.update(_level(config, maker, number, trainable, result))
    audit_run(run.path)
    return result


def _ask_again(config: AlignConfig, maker: TrainingSetMaker, number: int) -> None:
    """Ask the student as the round before left it, read from its files: whoever trained it, and in which process."""
    folder = maker.round(number - 1).student
    if config.engine == "ray":
        from mpa_edge.ray_engine import RayPool

        pool = RayPool(config, str(folder))
        try:
            return maker.ask_again(number, pool.models["asked"], pool)
        finally:
            pool.close()
    student = open_student(config, str(folder))
    try:
        maker.ask_again(number, student)
    finally:
        student.close()


def _level(
    config: AlignConfig, maker: TrainingSetMaker, number: int, student: TransformersVlm, result: AlignResult
) -> dict[str, Any]:
    from mpa_edge.level import MINIMUM, level, steps_of
    from mpa_edge.ranks import Ranks
    from mpa_edge.training_data import read_examples

    folder = maker.round(number)
    examples = read_examples(folder.parity)
    if len(examples) < MINIMUM:
        raise RunError(_too_few(result, len(examples), MINIMUM))
    start, ranks = maker.round(number - 1).student if number > 1 else None, Ranks.of(config.device)
    if number > 1 and ranks.sharded:  # what training leaves of it is spread
        student = _trainable(open_student(config, config.student), config)
    ranks.wait()

    def train() -> dict[str, Any]:
        with progress(stage_name("level", number), steps_of(examples, config)) as advance:
            return level(student, examples, folder.student, config, advance=advance, start=start)

    with maker.log.stage(stage_name("level", number)) as facts:
        try:
            metrics = train()
        except FingerprintMismatch as mismatch:
            _make_room(folder, mismatch)
            metrics = train()
        facts |= {key: metrics[key] for key in ("examples", "parameters", "before", "best")}
    return metrics


def _make_room(folder: RoundFolder, mismatch: FingerprintMismatch) -> None:
    """Put a finished student of other settings aside, and drop one that was not finished."""
    from mpa_edge.level import METRICS

    what = f"{folder.student} was trained with other settings or rows ({', '.join(sorted(mismatch.differences))})"
    if (folder.student / METRICS).exists():
        say(f"{what}; it is kept as {set_aside(folder.student)}, and a new one is trained")
    else:
        say(f"{what} and not finished; training starts over")
        delete(folder.student)


def _result(
    run: RunFolder,
    scanned: Scanned,
    annotations: int,
    rejected: dict[str, int],
    rounds: Sequence[Round],
) -> AlignResult:
    *earlier, (counts, metrics) = rounds
    return AlignResult(
        run=run.path,
        pictures=scanned.pictures,
        skipped=scanned.skipped,
        shared=scanned.shared,
        test_pictures=scanned.test_pictures,
        annotations=annotations,
        rejected=rejected,
        verdicts=counts.verdicts,
        collapsed=counts.collapsed,
        training=counts.training,
        metrics=metrics,
        earlier=tuple(earlier),
    )


def _too_few(result: AlignResult, rows: int, needed: int) -> str:
    """Why there is nothing to train on, with the cure that fits."""
    if result.annotations == sum(result.rejected.values()):
        cure = "No annotation could be used: look at the teacher's texts in the audit page."
    elif not result.earlier and not result.verdicts.get("parity") and result.verdicts.get("agree"):
        cure = "The student already gives the teacher's answers on these pictures."
    elif result.earlier:
        cure = f"The rounds before this one are kept: use --rounds {len(result.earlier)}."
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


def _round_lines(counts: RoundCounts, metrics: dict[str, Any]) -> list[str]:
    from mpa_edge.trainable import in_words

    before, best = metrics["before"], metrics["best"]
    dropped = f"; {len(metrics['dropped'])} dropped (see metrics.json)" if metrics["dropped"] else ""
    collapsed = f"; {counts.collapsed} collapsed" if counts.collapsed else ""
    return [
        f"verdicts     {_listed(counts.verdicts) or 'none'}",
        f"training     {sum(counts.training.values())} rows ({_listed(counts.training)}){collapsed}{dropped}",
        f"held out     {before['holdout_exact']:.1%} -> {best['holdout_exact']:.1%} right to the letter "
        f"(epoch {metrics['best_epoch']}, {metrics['examples']['holdout']} rows)",
        f"trained      {in_words(metrics['parameters'])}",
    ]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _counts(verb: str, counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return f"{total} {verb} ({_listed(counts)})" if total else f"none {verb}"
