"""How often a bundle gives the very answer of the model that it was made from, on labelled data's pictures.

    python -m mpa_edge.benchmarks.agreement runs/demo/merged runs/demo/bundles/* \\
        --data runs/demo/test/test.jsonl --limit 300

Prints one JSON object: per bundle the share of equal answers, and the accuracies. Only these look at the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.answers import metric_named
from mpa_edge.labelled import Question, read_questions, stratified
from mpa_edge.models import open_vlm
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Decoding, Vlm
from mpa_edge.tasks import Task, task_named


def answers_of(vlm: Vlm, questions: Sequence[Question], task: Task) -> list[str]:
    """The model's answers, in order."""
    images = [open_image(question.image) for question in questions]
    prompts = [task.prompt(question.question) for question in questions]
    return [answer.text for answer in vlm.answer(images, prompts, Decoding(max_new_tokens=task.max_new_tokens))]


def agreement(merged: Vlm, bundles: Sequence[Vlm], questions: Sequence[Question], task: Task) -> dict[str, Any]:
    """Shares in [0, 1] by the bundle's name."""
    metric = metric_named(task.metric)

    def accuracy(answers: Sequence[str]) -> float:
        scores = [metric(answer, item.answers) for answer, item in zip(answers, questions, strict=True)]
        return round(sum(scores) / len(scores), 4)

    expected = answers_of(merged, questions, task)
    result: dict[str, Any] = {"questions": len(questions), "merged": {"accuracy": accuracy(expected)}}
    for bundle in bundles:
        got = answers_of(bundle, questions, task)
        equal = sum(a == b for a, b in zip(got, expected, strict=True)) / len(questions)
        result[bundle.name] = {"same_answer": round(equal, 4), "accuracy": accuracy(got)}
    return result


def main(
    merged: Annotated[str, typer.Argument(help="The merged model.")],
    bundles: Annotated[list[str], typer.Argument(help="Bundles that were made from it.")],
    data: Annotated[Path, typer.Option(help="Labelled questions.")],
    task: Annotated[str, typer.Option(help="What the questions are put and scored as.")] = "reference",
    limit: Annotated[int | None, typer.Option(help="A stratified sample of so many.")] = 300,
) -> None:
    """Compare answers, question by question."""
    import json

    questions = stratified(read_questions(data), limit, 0)
    result = agreement(open_vlm(merged), [open_vlm(spec) for spec in bundles], questions, task_named(task))
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
