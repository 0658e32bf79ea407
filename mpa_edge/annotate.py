"""Pseudo Annotator: the teacher writes questions with answers about unlabeled pictures, (Q, A) = L(I, p_T)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpa_edge.asking import ask
from mpa_edge.collapse import mark_duplicates
from mpa_edge.records import Annotation, Sample
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm
from mpa_edge.tasks import Task
from mpa_edge.teacher_text import judge, parse

# Raise it when parser or rejection rules change: rows of the old rules must not be mixed with new ones.
RULES = 1
# A question is longer than an answer: what the teacher may write beyond an answer's tokens. The paper has 128 in all.
QUESTION_TOKENS = 116


@dataclass(frozen=True)
class Annotator:
    """A teacher that is asked `questions` times about each picture, with another seed and the next of the task's
    prompts each time: with one prompt and at temperature 0 it would write the same again."""

    teacher: Vlm
    task: Task
    questions: int = 1
    temperature: float = 1.0
    seed: int = 0
    ask: Callable[..., list[Answer]] = ask

    @property
    def decodings(self) -> list[Decoding]:
        """How the teacher's texts are sampled, one by one."""
        longest = QUESTION_TOKENS + self.task.max_new_tokens
        return [Decoding(longest, self.temperature, seed=self.seed + number) for number in range(self.questions)]

    def fingerprint(self) -> dict[str, Any]:
        """What shapes the annotations, as JSON."""
        return {
            "stage": "annotate",
            "rules": RULES,
            "teacher": self.teacher.describe(),
            "prompts": self.task.annotate_prompts,
            "max_answer_words": self.task.max_answer_words,
            "decodings": [asdict(decoding) for decoding in self.decodings],
        }

    def annotations(self, samples: Sequence[Sample], known: Sequence[Annotation] = ()) -> list[Annotation]:
        """The annotations of some pictures, picture by picture. Rejected texts are rows too, with the reason.

        `known` are rows of an earlier attempt: only pictures of which one failed are asked again."""
        failed = {row.sample_id for row in known if row.failed}
        found: dict[str, list[Annotation]] = defaultdict(list)
        for row in known:
            if row.sample_id not in failed:
                found[row.sample_id].append(row)
        new = [sample for sample in samples if sample.id not in found]
        paths = [Path(sample.path) for sample in new]
        rounds = [
            self.ask(self.teacher, paths, self._prompts(new, number), decoding, again=bool(known))
            for number, decoding in enumerate(self.decodings)
        ]
        for sample, *texts in zip(new, *rounds, strict=True):
            found[sample.id] = annotations_of(sample, texts, self.task)
        return [row for sample in samples for row in found[sample.id]]

    def _prompts(self, samples: Sequence[Sample], number: int) -> list[str]:
        return [self.task.prompt_about(sample.id, number) for sample in samples]


def annotations_of(sample: Sample, texts: Sequence[Answer], task: Task) -> list[Annotation]:
    """The rows of one picture: each pair that the teacher's texts hold, repeated questions rejected. Where the teacher
    failed, the raw text is why."""
    return mark_duplicates(
        Annotation(f"{sample.id}-{number}.{place}", sample.id, question, answer, text.error or text.text, reason)
        for number, text in enumerate(texts)
        for place, (question, answer, reason) in enumerate(_pairs(text, task))
    )


def _pairs(text: Answer, task: Task) -> list[tuple[str, str, str | None]]:
    if text.error is not None:
        return [("", "", "teacher_error")]
    if text.finish_reason == "length":
        return [("", "", "unfinished")]
    pairs = [(question, answer, judge(question, answer, task)) for question, answer in parse(text.text)]
    return pairs or [("", "", "no_question")]
