"""From pictures to the training set: scan, annotate and identify part by part, select.

make_training_set(config, teacher, student)     all of it, with models of any kind; nothing is trained

Rows pass through memory some pictures at a time, however many there are; of the others ids and keys are kept at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mpa_edge.askers import Asker, Asks, Engine, Here, Part, Work, annotator_of, identifier_of, reidentifier_of
from mpa_edge.bundle import sha256_of
from mpa_edge.config import AlignConfig
from mpa_edge.errors import FingerprintMismatch
from mpa_edge.listing import listing_of, stored_in
from mpa_edge.mirror import Mirror
from mpa_edge.parts import STAGE, Parts, digest_of_stage, drop_stage, open_parts, read_parts
from mpa_edge.progress import progress, say
from mpa_edge.records import Annotation, Case, Sample, read_rows, rows_in, write_rows
from mpa_edge.remember import remembered
from mpa_edge.run_events import recorded
from mpa_edge.run_folder import RUN, RoundFolder, RunFolder, RunLog
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.same_run import move_rounds, refuse_other_pictures, refuse_other_settings, refuse_small_parts
from mpa_edge.saving import save_for_trainers
from mpa_edge.scan import Pictures, find_pictures
from mpa_edge.selection import Choice, choose, training_row
from mpa_edge.tasks import task_named
from mpa_edge.watching import tell_rejected

# One question with one answer may make up this share of a run's questions; rarer ones are never too many.
PAIR_SHARE = 0.05
# Raise it when what becomes training data changes: what was chosen by older rules is chosen anew.
RULES = 1


@dataclass(frozen=True)
class Scanned:
    """What the scan found: `skipped` counts by reason, `shared` those that `--test` has too (None without one), and
    `digest` names the pictures by their contents. `test_pictures`: how many of `--test` were looked at, of all.
    `again`: there are files that the system did not give this time."""

    pictures: int
    skipped: dict[str, int]
    shared: int | None
    digest: str
    test_pictures: tuple[int, int] | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if self.test_pictures:
            object.__setattr__(self, "test_pictures", tuple(self.test_pictures))  # JSON has lists only


@dataclass(frozen=True)
class RoundCounts:
    """What a round asked and chose. Counts are rows."""

    verdicts: dict[str, int]
    collapsed: int
    training: dict[str, int]


@dataclass(frozen=True)
class TrainingSet:
    """A training set and how it came about."""

    path: Path
    scanned: Scanned
    annotations: int
    rejected: dict[str, int]
    counts: RoundCounts


def make_training_set(config: AlignConfig, teacher: Vlm, student: Vlm, engine: Engine | None = None) -> TrainingSet:
    """Write the training set of a run folder from pictures and two models; resumes. `student` is any model that is
    asked in the student's place; `engine` asks, if not this process.

    Raises as `mpa_edge.align.align` does, but for what concerns training.
    """
    run = RunFolder(config.run)
    with run.lock(), recorded(run.path, config.metrics_file):
        maker = TrainingSetMaker(config, run, describe(teacher=teacher, student=student))
        scanned = maker.scan()
        annotations, rejected = maker.ask(teacher, student, engine)
        counts = maker.select(1)
    return TrainingSet(maker.round(1).parity, scanned, annotations, rejected, counts)


def describe(**models: Vlm | None) -> dict[str, dict[str, Any]]:
    """What `run.json` says of models."""
    return {side: {"name": vlm.name, **vlm.describe()} for side, vlm in models.items() if vlm is not None}


class TrainingSetMaker:
    """The stages of one run up to its training sets, in the order in which they are called.

    `models` are the descriptions by side: `teacher`, `student`, and `ask` where a bundle is asked in the student's
    place. Raises `FingerprintMismatch` when the folder holds annotations or cases of other settings or models.
    """

    def __init__(self, config: AlignConfig, run: RunFolder, models: dict[str, Any]) -> None:
        self._config, self._run, self._task = config, run, task_named(config.task)
        content = {"config": config.to_json(), "task": self._task.to_json(), **models}
        self._content: dict[str, Any] = json.loads(json.dumps(content))  # as it will read back: tuples become lists
        if not config.fresh:
            refuse_other_settings(run, self._content)
        self._log: RunLog | None = None
        self._scanned = Scanned(0, {}, None, "")

    @property
    def log(self) -> RunLog:
        """The run's log; there is one from the scan on."""
        assert self._log is not None
        return self._log

    def scan(self) -> Scanned:
        """Find the usable pictures: what the last scan found, where its source is as it was."""
        config, run = self._config, self._run
        note = run.path / ".samples.json"
        if config.fresh:
            note.unlink(missing_ok=True)
        self._log = RunLog(run.path / RUN, **self._content)
        with self._log.stage("samples") as facts:
            files, stored = (run.samples, run.skipped), lambda: stored_in(run.images)
            key, settled = listing_of(config), lambda found: not found["again"]
            found = remembered(note, key, lambda: asdict(self._scan()), *files, others=stored, keep=settled)
            self._scanned = scanned = Scanned(**found)
            move_rounds(run, config.rounds)
            facts |= {"used": scanned.pictures, "skipped": scanned.skipped}
            if scanned.test_pictures:
                facts |= {"shared": scanned.shared, "test_pictures": scanned.test_pictures}
        return self._scanned

    def _scan(self) -> Scanned:
        """Nothing of an earlier run is deleted before there are pictures."""
        config, run = self._config, self._run
        with find_pictures(config, run) as pictures:
            if config.fresh:
                if mirror := self._mirror(*self._homes):
                    mirror.clear()
                run.clear()
            else:
                refuse_other_pictures(config, run, pictures)
            return self._write_samples(pictures)

    def _write_samples(self, pictures: Pictures) -> Scanned:
        write_rows(self._run.samples, pictures.samples())
        write_rows(self._run.skipped, pictures.skipped())
        looked_at = (pictures.overlap.looked_at, pictures.overlap.pictures) if pictures.overlap else None
        skipped = count_by(item.reason for item in pictures.skipped())
        again = pictures.index.unread or (looked_at is not None and looked_at[0] < looked_at[1])
        return Scanned(pictures.count, skipped, pictures.shared, pictures.digest, looked_at, again)

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, teacher: Vlm, student: Vlm, engine: Engine | None = None) -> tuple[int, dict[str, int]]:
        """Annotate and identify, part by part: what a model computed of a part's pictures is still at hand when they
        come again. Returns the number of annotations, and those rejected by reason."""
        config = self._config
        annotator, identifier = annotator_of(config, teacher), identifier_of(config, teacher, student)
        refuse_small_parts(config, teacher, min(config.chunk_size, self._scanned.pictures))
        shaped = annotator.fingerprint() | {"input": self._scanned.digest, "chunk_size": config.chunk_size}
        both = {"annotations": shaped}
        both["cases"] = identifier.fingerprint() | {"annotations": _digest(json.dumps(shaped))}
        # Both copies are seen to be of these settings before one is copied over the other.
        if mirror := self._mirror(*both):
            mirror.check(both)
        annotations = open_parts(self._run.annotations, Annotation, both["annotations"], self._parts)
        cases = open_parts(self._first.cases, Case, both["cases"], self._parts)
        self._fetch(mirror)
        # Another answer would make another training set, and the training so far would be lost.
        annotations.again = cases.again = not self._training_began()

        def work(asker: Asker, part: Part) -> None:
            self._ask_part(asker, part, annotations, cases)

        self._each("ask", engine, Asks(annotator, identifier), work, mirror)
        rejected: dict[str, int]
        total, rejected = remembered(
            self._run.path / ".annotations.json", digest_of_stage(annotations.folder), lambda: _rejected(annotations)
        )
        self.log.note("annotate", rows=total, rejected=rejected)
        return total, rejected

    def _each(self, label: str, engine: Engine | None, asks: Asks, work: Work, mirror: Mirror | None) -> None:
        """Do the work on all parts, and keep each in the mirror."""
        each = (engine or Here()).each(asks, self._chunks(), work)
        with progress(label, self._scanned.pictures) as advance, closing(each):  # Ctrl-C may come here too
            for number, lines in each:
                advance(len(lines))
                if mirror:
                    mirror.keep(number)
        if mirror:
            mirror.settle(self._parts)

    @property
    def _homes(self) -> dict[str, Path]:
        """The folders of the stages that a mirror keeps, by their names there."""
        later = {_mirrored(number): self.round(number).cases for number in range(2, self._config.rounds + 1)}
        return {"annotations": self._run.annotations, "cases": self._first.cases, **later}

    def _mirror(self, *stages: str) -> Mirror | None:
        """The second home of the parts of these stages."""
        if self._config.mirror is None:
            return None
        return Mirror(self._config.mirror, {stage: self._homes[stage] for stage in stages})

    def _fetch(self, mirror: Mirror | None) -> None:
        if mirror and (count := mirror.fetch()):
            say(f"{count} files were fetched from {self._config.mirror}")

    def _training_began(self) -> bool:
        return any((self.round(number).student / STAGE).exists() for number in range(1, self._config.rounds + 1))

    def _ask_part(self, asker: Asker, part: Part, annotations: Parts[Annotation], cases: Parts[Case]) -> None:
        number = part[0]
        if not annotations.due(number) and not cases.due(number):
            return
        samples = self._samples(part)
        if annotations.due(number):
            cases.reopen(number)
            with self.log.clock("annotate"):
                annotations.fill(number, lambda known: asker.annotations(samples, known))
        if cases.due(number):
            rows = annotations.read(number)
            usable = [row for row in rows if row.reason is None]
            tell_rejected(row.reason for row in rows)
            with self.log.clock("identify"):
                cases.fill(number, lambda known: asker.cases(usable, _paths(samples), known))

    def ask_again(self, number: int, student: Vlm, engine: Engine | None = None) -> None:
        """Identify round `number`, from 2: ask what the student has become."""
        again = reidentifier_of(self._config, student)
        first, folder = Parts(self._first.cases, Case), self.round(number).cases
        fingerprint = again.fingerprint() | {"cases": digest_of_stage(self._first.cases)}
        # The round before may have been trained anew, to another student, since the mirror was written.
        if mirror := self._mirror(_mirrored(number)):
            mirror.check({_mirrored(number): fingerprint}, drop=True)
        try:
            cases = open_parts(folder, Case, fingerprint, self._parts)
        except FingerprintMismatch:
            say(f"round {number}: the student of the round before is another one now; it is asked again")
            drop_stage(folder)
            cases = open_parts(folder, Case, fingerprint, self._parts)
        self._fetch(mirror)

        def work(asker: Asker, part: Part) -> None:
            if cases.due(part[0]):
                before, paths = first.read(part[0]), _paths(self._samples(part))
                with self.log.clock(stage_name("identify", number)):
                    cases.fill(part[0], lambda known: asker.cases(before, paths, known))

        self._each(f"ask, round {number}", engine, Asks(None, again), work, mirror)

    # --- selecting ---------------------------------------------------------------------------------------------------

    def select(self, number: int) -> RoundCounts:
        """Write the training set of round `number`, from 1."""
        config, folder = self._config, self.round(number)
        shaping = ("select", "mix", "seed", "question_share", "target")
        key = {
            "rules": RULES,
            "cases": digest_of_stage(folder.cases),
            "pictures": [sha256_of(self._run.samples), self._relative()],
            "task": self._task.to_json(),
            **{name: getattr(config, name) for name in shaping},
        }
        note = self._run.path / f".{folder.parity.stem}.json"
        with self.log.clock(stage_name("select", number)):
            found = remembered(note, key, lambda: asdict(self._select(folder)), folder.parity, folder.collapsed)
            counts = RoundCounts(**found)
            save_for_trainers(folder.parity, config.save_as)
        rows, kept = sum(counts.verdicts.values()), sum(counts.training.values())
        self.log.note(stage_name("identify", number), rows=rows, verdicts=counts.verdicts)
        self.log.note(stage_name("select", number), rows=kept, verdicts=counts.training, collapsed=counts.collapsed)
        return counts

    def _select(self, folder: RoundFolder) -> RoundCounts:
        config = self._config
        choice = choose(
            read_parts(folder.cases, Case),
            config.select,
            mix=config.mix,
            seed=config.seed,
            question_share=config.question_share,
            pair_share=PAIR_SHARE,
        )
        training: Counter[str] = Counter()
        write_rows(folder.parity, self._training_rows(folder, choice, training))
        ids = (case.id for case, over in zip(read_parts(folder.cases, Case), choice.collapsed, strict=True) if over)
        collapsed = write_rows(folder.collapsed, ({"id": name} for name in ids) if any(choice.collapsed) else ())
        return RoundCounts(choice.verdicts, collapsed, dict(sorted(training.items())))

    def _training_rows(self, folder: RoundFolder, choice: Choice, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        place, home = 0, folder.path.resolve()
        for part, cases in zip(self._chunks(), Parts(folder.cases, Case), strict=True):
            paths = _paths(self._samples(part))
            for case in cases:
                if choice.chosen[place]:
                    counts[case.verdict] += 1
                    yield training_row(case, paths[case.sample_id], self._task, home, self._config.target)
                place += 1

    # --- folders and pictures ----------------------------------------------------------------------------------------

    @property
    def _first(self) -> RoundFolder:
        return self.round(1)

    def round(self, number: int) -> RoundFolder:
        """The folder of a round, from 1."""
        return self._run.round(number, self._config.rounds)

    def _relative(self) -> str:
        """How the pictures lie to the run: rows of the training set name them so."""
        first = next(read_rows(self._run.samples, Sample))
        return os.path.relpath(first.path, self._run.path.resolve())

    @property
    def _parts(self) -> int:
        return -(-self._scanned.pictures // self._config.chunk_size)

    def _chunks(self) -> Iterator[Part]:
        with self._run.samples.open("rb") as lines:
            for number in range(self._parts):
                yield number, list(islice(lines, self._config.chunk_size))

    def _samples(self, part: Part) -> list[Sample]:
        number, lines = part
        return list(rows_in(lines, Sample, self._run.samples, number * self._config.chunk_size + 1))


def stage_name(name: str, number: int) -> str:
    """What `run.json` calls a stage of round `number`: identify, select, level, then identify-2 and so on."""
    return name if number == 1 else f"{name}-{number}"


def _mirrored(number: int) -> str:
    """What a mirror calls the cases of round `number`, from 2, however many rounds there are."""
    return f"cases-round-{number}"


def count_by(values: Iterable[str | None]) -> dict[str, int]:
    """How often each value comes, None aside, sorted by value."""
    return dict(sorted(Counter(value for value in values if value is not None).items()))


def _rejected(annotations: Parts[Annotation]) -> tuple[int, dict[str, int]]:
    """The number of annotations, and those rejected by reason."""
    total, rejected = 0, Counter[str]()
    for rows in annotations:
        total += len(rows)
        rejected.update(row.reason for row in rows if row.reason is not None)
    return total, dict(sorted(rejected.items()))


def _paths(samples: Sequence[Sample]) -> dict[str, Path]:
    return {sample.id: Path(sample.path) for sample in samples}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode() + b"\n").hexdigest()
