"""Who asks about a part of the pictures, and where: the small interface that both engines share.

    Here      in this process, one part after the other
    RayPool   on the workers of a Ray cluster, several parts at once (`mpa_edge.ray_engine`)

Parts are written by this process in both cases, so that files, resume and Ctrl-C are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mpa_edge.annotate import Annotator
from mpa_edge.config import AlignConfig
from mpa_edge.identify import Identifier, Reidentifier
from mpa_edge.records import Annotation, Case, Sample
from mpa_edge.runtime.vlm import Answer, Vlm
from mpa_edge.tasks import task_named

# Number, from 0, and pictures, as lines of `samples.jsonl`: a resume passes over most of them.
Part = tuple[int, list[bytes]]


class Asker(Protocol):
    """Somebody who has the models at hand. `known` are rows of an earlier attempt; those that did not fail stay."""

    def annotations(self, samples: Sequence[Sample], known: Sequence[Annotation]) -> list[Annotation]:
        """As `Annotator.annotations`."""
        ...

    def cases(self, rows: Sequence[Any], pictures: Mapping[str, Path], known: Sequence[Case]) -> list[Case]:
        """As `Identifier.cases` of annotations, or `Reidentifier.cases` of the first round's cases."""
        ...


Work = Callable[[Asker, Part], None]


class Engine(Protocol):
    """Where asking is done."""

    def each(self, asks: Asks, parts: Iterable[Part], work: Work) -> Generator[Part, None, None]:
        """Call `work` with each part and somebody who asks as `asks` would; yield parts as they are done, in any order.

        A part whose `work` raises ends the iteration with that error. Whoever ends it sooner closes it: then nothing is
        asked any more."""
        ...


@dataclass(frozen=True)
class Asks:
    """The asker of this process. Later rounds only identify, and have no annotator."""

    annotator: Annotator | None
    identifier: Identifier | Reidentifier

    def annotations(self, samples: Sequence[Sample], known: Sequence[Annotation]) -> list[Annotation]:
        """As `Annotator.annotations`."""
        assert self.annotator is not None
        return self.annotator.annotations(samples, known)

    def cases(self, rows: Sequence[Any], pictures: Mapping[str, Path], known: Sequence[Case]) -> list[Case]:
        """As the identifier's."""
        return self.identifier.cases(rows, pictures, known)

    @property
    def models(self) -> dict[str, Vlm]:
        """The models by side: `teacher` where there is one, and who is `asked` in the student's place."""
        teacher = {"teacher": self.annotator.teacher} if self.annotator else {}
        return {**teacher, "asked": self.identifier.student}

    def unanswered(self, reason: str) -> Asks:
        """The same without models and without opening pictures: every answer failed, for this reason."""

        def ask(_: Any, paths: Sequence[Path], *__: Any, **___: Any) -> list[Answer]:
            return [Answer("", finish_reason="error", error=reason)] * len(paths)

        annotator = self.annotator and replace(self.annotator, ask=ask)
        return Asks(annotator, replace(self.identifier, ask=ask))


def annotator_of(config: AlignConfig, teacher: Vlm) -> Annotator:
    """The annotator of a run."""
    return Annotator(teacher, task_named(config.task), config.questions, config.temperature, config.seed)


def identifier_of(config: AlignConfig, teacher: Vlm, student: Vlm) -> Identifier:
    """The identifier of a run's first round."""
    task = task_named(config.task)
    return Identifier(teacher, student, task, config.match, config.votes, config.blind, config.seed)


def reidentifier_of(config: AlignConfig, student: Vlm) -> Reidentifier:
    """The identifier of its later rounds."""
    return Reidentifier(student, task_named(config.task), config.match)


class Here:
    """The local engine."""

    def each(self, asks: Asks, parts: Iterable[Part], work: Work) -> Generator[Part, None, None]:
        """As `Engine.each`, in order."""
        for part in parts:
            work(asks, part)
            yield part
