"""Score a checkpoint folder on the labelled test and print the table of its model card.

python -m mpa_edge.benchmarks.train_card benchmarks/reference/teacher --annotate 500
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpa_edge.answers import exact_match
from mpa_edge.benchmarks.reference import write_pool, write_test
from mpa_edge.benchmarks.world_questions import PHRASINGS
from mpa_edge.tasks import task_named

BATCH = 50


class Answerer:
    """A checkpoint that answers prompts about pictures in batches."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str], tokens: int, **settings: Any) -> list[str]:
        """A reply per picture and prompt."""
        replies = []
        for start in range(0, len(images), BATCH):
            turns = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
                for prompt in prompts[start : start + BATCH]
            ]
            texts = [self.processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
            pictures = [[image] for image in images[start : start + BATCH]]
            inputs = self.processor(text=texts, images=pictures, return_tensors="pt", padding=True)
            output = self.model.generate(**inputs, max_new_tokens=tokens, **settings)
            fresh = output[:, inputs["input_ids"].shape[1] :]
            replies += [text.strip() for text in self.processor.batch_decode(fresh, skip_special_tokens=True)]
        return replies


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share, z = right / n, 1.96
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def kind_of(question: str) -> str:
    """The kind that a question's phrasing belongs to, or an empty text."""
    for kind, pattern in _patterns():
        if pattern.fullmatch(question):
            return kind
    return ""


def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """A pattern per phrasing; those with fewer slots first."""
    rows = [(kind, phrasing.template) for kind, phrasings in PHRASINGS.items() for phrasing in phrasings]
    rows.sort(key=lambda row: (row[1].count("{"), -len(row[1])))
    return [(kind, re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template)))) for kind, template in rows]


def score(answerer: Answerer, rows: list[dict[str, Any]], folder: Path) -> dict[str, list[float]]:
    """Scores by kind, by group and in all."""
    images: list[Image.Image] = [Image.open(folder / row["image"]) for row in rows]
    replies = answerer(images, [row["question"] for row in rows], 12)
    found: dict[str, list[float]] = defaultdict(list)
    for row, reply in zip(rows, replies, strict=True):
        value = exact_match(reply, row["answers"])
        for key in ("**all**", f"*{row['group']}*", row["kind"]):
            found[key].append(value)
    return found


def annotator_facts(answerer: Answerer, count: int) -> str:
    """How the annotator's questions spread over the kinds, and how many of its answers the model confirms."""
    torch.manual_seed(0)
    task = task_named("reference")
    with tempfile.TemporaryDirectory() as folder:
        images = [Image.open(path).copy() for path in write_pool(folder, count)]
    begin = time.perf_counter()
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    texts = answerer(images, [task.annotate_prompt] * count, 40, **sampling)
    speed = count / (time.perf_counter() - begin)
    pairs = [
        (i, m[1], m[2]) for i, text in enumerate(texts) if (m := re.fullmatch("Question: (.*) Answer: (.*)", text))
    ]
    replies = answerer([images[i] for i, *_ in pairs], [question for _, question, _ in pairs], 12)
    agreed = sum(exact_match(reply, [pair[2]]) for reply, pair in zip(replies, pairs, strict=True))
    kinds = Counter(kind_of(question) or "other" for _, question, _ in pairs)
    shares = ", ".join(f"{kind} {number / len(pairs):.1%}" for kind, number in kinds.most_common())
    return (
        f"{count} pictures: {len(pairs)} well-formed replies, {agreed / len(pairs):.1%} confirmed by the model's own "
        f"answer, {speed:.0f} annotations/s.\nKinds ({len(kinds)}): {shares}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--annotate", type=int, default=0, help="also measure the annotator on so many pool pictures")
    options = parser.parse_args()
    answerer = Answerer(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        path = write_test(folder, options.n)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = score(answerer, rows, path.parent)
    lines = ["| questions | n | exact match | 95% interval |", "|---|---|---|---|"]
    for key in sorted(found, key=lambda key: (not key.startswith("**"), not key.startswith("*"), key)):
        right, n = int(sum(found[key])), len(found[key])
        low, high = interval(right, n)
        lines.append(f"| {key} | {n} | {right / n:.1%} | {low:.1%} to {high:.1%} |")
    if options.annotate:
        lines += ["", annotator_facts(answerer, options.annotate)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
