"""A task: what the teacher is asked to write, how a question is put, and what counts as right.

One place defines the inference prompt. Identification, training, the bundle's manifest, the runtime and the benchmark
all take it from here, so that nobody asks the student a question it was not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpa_edge.errors import InputError


@dataclass(frozen=True)
class Task:
    """A task. `question_template` is the user's turn at inference, with `{question}` in it; `metric` names a function
    of `mpa_edge.answers`; answers of more than `max_answer_words` words are rejected at annotation."""

    name: str
    annotate_prompt: str
    question_template: str
    metric: str
    max_new_tokens: int
    max_answer_words: int

    def prompt(self, question: str) -> str:
        """The user's turn for a question."""
        return self.question_template.replace("{question}", question)


SHORT = "{question}\nAnswer the question using a single word or phrase."
FORM = "Reply in the form:\nQuestion: ...\nAnswer: ..."

TASKS = {
    task.name: task
    for task in (
        Task(
            name="reference",
            annotate_prompt="Write a question about this picture and answer it.",
            question_template="{question}",
            metric="exact_match",
            max_new_tokens=12,
            max_answer_words=4,
        ),
        Task(
            name="textvqa",
            annotate_prompt="Write one question that can only be answered by reading text in this picture (a sign, a "
            f"label, a screen, a number), and its answer in at most three words, as printed. {FORM}",
            question_template=SHORT,
            metric="vqa_accuracy",
            max_new_tokens=32,
            max_answer_words=5,
        ),
        Task(
            name="stvqa",
            annotate_prompt="Write one question about a text that is visible in this scene, such that the text itself "
            f"is the answer, and give that text letter by letter. {FORM}",
            question_template=SHORT,
            metric="anls",
            max_new_tokens=32,
            max_answer_words=8,
        ),
        Task(
            name="chartqa",
            annotate_prompt="Write one question about this chart: look up a value, compare two, find the highest or "
            f"the lowest, describe a trend, or compute a difference. Answer with a number or a label only. {FORM}",
            question_template=SHORT,
            metric="relaxed_accuracy",
            max_new_tokens=32,
            max_answer_words=5,
        ),
        Task(
            name="okvqa",
            annotate_prompt="Write one question about this picture whose answer needs knowledge of the world that the "
            f"picture does not show, and its answer in one to three words. {FORM}",
            question_template=SHORT,
            metric="vqa_accuracy",
            max_new_tokens=32,
            max_answer_words=3,
        ),
    )
}


def task_named(name: str) -> Task:
    """The task of this name; `InputError` names the known ones."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"--task {name}: no such task; known: {', '.join(sorted(TASKS))}") from None
