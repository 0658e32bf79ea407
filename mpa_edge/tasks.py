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
    )
}


def task_named(name: str) -> Task:
    """The task of this name; `InputError` names the known ones."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"--task {name}: no such task; known: {', '.join(sorted(TASKS))}") from None
