"""What lmms-eval calls for each question: `mpa_edge.benchmarks.peer` copies this file beside the task as `utils.py`.

It runs in lmms-eval's own environment, where mpa-edge need not be installed. The scores are lmms-eval's functions, not
ours: that is the point of asking a second harness.
"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps

Doc = dict[str, Any]


def pictures(doc: Doc) -> list[Image.Image]:
    """The question's picture, upright."""
    with Image.open(doc["image"]) as image:
        return [ImageOps.exif_transpose(image)]


def question(doc: Doc, lmms_eval_specific_kwargs: Doc | None = None) -> str:
    """The bare question: the served bundle puts it as it was trained."""
    return str(doc["question"])


def scores(doc: Doc, results: list[str]) -> dict[str, float]:
    """The task's metric of the answer, under its own name."""
    rules = {"vqa_accuracy": vqa, "anls": anls, "relaxed_accuracy": relaxed, "exact_match": exact}
    return {doc["metric"]: float(rules[doc["metric"]](results[0], list(doc["answers"])))}


def vqa(answer: str, references: list[str]) -> float:
    """TextVQA's; one reference stands for ten annotators of one opinion."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    references = references * 10 if len(references) == 1 else references
    return float(textvqa_process_results({"answers": references, "question_id": 0}, [answer])["exact_match"])


def anls(answer: str, references: list[str]) -> float:
    """ST-VQA's."""
    from lmms_eval.api.metrics import anls as public

    return float(public(references, [answer])["anls"])


def relaxed(answer: str, references: list[str]) -> float:
    """ChartQA's, best over the references."""
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    return float(any(relaxed_correctness(answer, reference) for reference in references))


def exact(answer: str, references: list[str]) -> float:
    """The same text after VQA's normaliser, or as it is where that leaves nothing ("A" is an article there)."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normal = EvalAIAnswerProcessor()
    said = [normal(text) or text.strip().lower() for text in (answer, *references)]
    return float(said[0] in said[1:])
