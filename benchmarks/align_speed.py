"""How much faster the alignment asks and trains than the plain loop does, on models that run anywhere.

    python -m mpa_edge.benchmarks.align_speed

(a) `annotate_identify`: the plain loop puts one question at a time, and encodes the picture for each: annotation,
self-check, student. Ours asks in batches and encodes a picture once per model.
(b) `train`: the frozen vision tower is run for every batch, or its features come from the cache. Counted is a training
of the default number of epochs, after the student was asked about the pictures; `train_from_nothing` is one whose
pictures are new to it, `train_step` a step alone.

Both ways do the same work with the same weights in one process and take turns (A B A B); the medians are compared. The
answers must be the same: `same_answers` is their share. What reusing features can win is bounded by the share of the
plain way's time that the encoder takes: `most_by_features` is that bound (Amdahl), and what goes beyond it comes from
batches. Run it on a machine that does nothing else (`busy` tells what did); it takes about ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.annotate import Annotator
from mpa_edge.benchmarks.align_ways import Ask, Work, fresh, measure
from mpa_edge.benchmarks.host import host
from mpa_edge.benchmarks.reference import STUDENT, TEACHER, write_pool
from mpa_edge.records import Sample, write_atomic
from mpa_edge.runtime import available_cores
from mpa_edge.runtime.vlm import Decoding
from mpa_edge.tasks import task_named

OUT = Path(__file__).parent / "results" / "align_speed.json"
TASK = task_named("reference")
FIXED_QUESTIONS = ("What is written on the sign?", "How many red circles are there?")


def reference_pair(folder: Path, *, pictures: int = 32, questions: int = 4) -> dict[str, Any]:
    """The reference pair with the questions that its teacher writes about pictures of the pool."""
    from mpa_edge.transformers_vlm import TransformersVlm

    teacher, student = (TransformersVlm.load(str(path), device="cpu") for path in (TEACHER, STUDENT))
    paths = write_pool(folder / "pictures", pictures)
    samples = [Sample(path.stem, str(path), path.stem) for path in paths]
    annotator = Annotator(teacher, TASK, questions=questions)
    files = {sample.id: Path(sample.path) for sample in samples}
    usable = [row for row in annotator.annotations(samples) if row.reason is None]
    short = Decoding(max_new_tokens=TASK.max_new_tokens)
    annotate = [
        Ask(path, TASK.prompt_about(path.stem, number), decoding)
        for path in paths
        for number, decoding in enumerate(annotator.decodings)
    ]
    identify = [Ask(files[row.sample_id], TASK.prompt(row.question), short) for row in usable]
    return measure(fresh(teacher), fresh(student), Work(annotate, identify, train_batch=32))


def smolvlm_256m(folder: Path, *, pictures: int = 3, tokens: int = 16) -> dict[str, Any]:
    """Random weights of SmolVLM-256M's dimensions, as teacher and as student; they write `tokens` tokens when they
    annotate and a quarter of that when they answer."""
    from mpa_edge.benchmarks.smolvlm import write_random_smolvlm
    from mpa_edge.transformers_vlm import TransformersVlm

    teacher = TransformersVlm.load(str(write_random_smolvlm(folder / "model")), device="cpu")
    paths = write_pool(folder / "pictures", pictures)
    annotate = [
        Ask(path, TASK.prompt_about(path.stem, number), Decoding(tokens, temperature=1.0, seed=number))
        for path in paths
        for number in range(len(FIXED_QUESTIONS))
    ]
    short = Decoding(tokens // 4)
    identify = [Ask(path, TASK.prompt(question), short) for path in paths for question in FIXED_QUESTIONS]
    return measure(teacher, fresh(teacher), Work(annotate, identify, train_batch=len(identify)))


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "reference-pair": reference_pair,
    "smolvlm-256m-random": smolvlm_256m,
}


def main(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = OUT,
    only: Annotated[str, typer.Option(help="The models whose name holds this text.")] = "",
) -> None:
    """Measure and write the result."""
    import torch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(available_cores())
    models = {}
    for name, build in MODELS.items():
        if only in name:
            with tempfile.TemporaryDirectory() as folder:
                models[name] = build(Path(folder))
            typer.echo(f"{name}: {json.dumps(models[name]['ratios'])}")
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.align_speed",
        "host": host(),
        "threads": torch.get_num_threads(),
        "ratios": {name: found["ratios"] for name, found in models.items()},
        "models": models,
    }
    write_atomic(out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
