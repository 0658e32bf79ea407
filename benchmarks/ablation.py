"""Which ingredient of the alignment earns its place: every row of a table, trained and scored on the reference pair.

    python -m mpa_edge.benchmarks.ablation run --seed 0        one seed's rows; resumes; seeds may run side by side
    python -m mpa_edge.benchmarks.ablation table               the table of what is there

Settings were chosen with `--split validation`; `--split test` was then run once, and its table is what
`benchmarks/results/ablation.md` shows. Every row is the real `align`, on one pool; a model that was asked the same
question by an earlier row is not asked again (`MemoVlm`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from mpa_edge.align import align_models
from mpa_edge.answers import metric_named
from mpa_edge.benchmarks.ablation_rows import TASK, TRIALS, Trial, slug
from mpa_edge.benchmarks.agreement import answers_of
from mpa_edge.benchmarks.reference import STUDENT, TEACHER, write_home, write_pool, write_test, write_validation
from mpa_edge.config import AlignConfig
from mpa_edge.labelled import read_questions
from mpa_edge.memo import MemoVlm
from mpa_edge.models import open_vlm
from mpa_edge.records import write_atomic
from mpa_edge.runtime.vlm import Vlm
from mpa_edge.tasks import task_named

POOL, QUESTIONS, HOME = 1500, 1500, 500
OUT = Path("runs/ablation")
METRICS = (task_named(TASK).metric, "containment")

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


class Split(str, Enum):
    """Where the rows are scored: settings are chosen on the first, reported on the second."""

    validation = "validation"
    test = "test"


@app.command()
def run(
    seed: Annotated[int, typer.Option(min=0, help="Of questions, selection and training.")] = 0,
    split: Annotated[Split, typer.Option(help="Where to score.")] = Split.test,
    out: Annotated[Path, typer.Option(help="Folder of pictures, runs and scores.")] = OUT,
    only: Annotated[str, typer.Option(help="Rows whose name holds this text.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Train and score the rows of one seed, those that are not there yet."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    data = write_data(out, split)
    folder = out / f"seed-{seed}"
    student = open_vlm(str(STUDENT), batch_size=64)
    asked = MemoVlm(student, folder / "student.jsonl")
    teacher = MemoVlm(open_vlm(str(TEACHER), batch_size=64), folder / "teacher.jsonl")
    for name, vlm in (("teacher", teacher), ("student", asked)):
        made = {"model": vlm.describe()}
        _once(folder / f"{name}.{split.value}.json", made, partial(_baseline, vlm, data))
    for trial in (trial for trial in TRIALS if only in trial.name):
        path, config = folder / f"{slug(trial.name)}.{split.value}.json", config_of(trial, seed, folder)
        made = {"settings": settings_of(config), "student": asked.describe(), "teacher": teacher.describe()}
        _once(path, made, partial(run_trial, trial, config, teacher, asked, data))
        typer.echo(f"seed {seed}  {trial.name:32} {fmean(read(path)['scores'][split.value][METRICS[0]]):.1%}")


def config_of(trial: Trial, seed: int, folder: Path) -> AlignConfig:
    """The settings of a row's run."""
    return AlignConfig(
        images=str(folder.parent / "pool"),
        teacher=str(TEACHER),
        student=str(STUDENT),
        task=TASK,
        out=folder / slug(trial.name),
        seed=seed,
        ask=str(folder / "base" / f"onnx-{trial.quant}") if trial.ask else None,
        **trial.settings,
    )


def settings_of(config: AlignConfig) -> dict[str, Any]:
    """What of the settings shapes a row, whatever the folders."""
    paths = {"images", "teacher", "student", "out", "ask"}
    return {name: value for name, value in config.to_json().items() if name not in paths}


def run_trial(trial: Trial, config: AlignConfig, teacher: Vlm, asked: Vlm, data: dict[str, Path]) -> dict[str, Any]:
    """Align as the row says, and score the student; `quantized` holds the scores of its bundle."""
    run_folder = config.run
    if config.ask:
        _export(STUDENT, Path(config.ask))
        asked = MemoVlm(open_vlm(config.ask), run_folder.parent / "bundle.jsonl")
    result = align_models(config, teacher, open_vlm(str(STUDENT), batch_size=64), asked=asked)
    aligned = open_vlm(str(result.adapter), batch_size=64)
    found = {"training": result.training, "metrics": result.metrics, "scores": scores_of(aligned, data)}
    if trial.quant:
        made = run_folder / "bundles" / f"onnx-{trial.quant}"
        # The run may have been trained anew since.
        shutil.rmtree(made, ignore_errors=True)
        _export(run_folder, made)
        bundle = open_vlm(str(made))
        found["quantized"] = scores_of(bundle, {name: path for name, path in data.items() if name != "home"})
        bundle.close()
        shutil.rmtree(run_folder / "merged", ignore_errors=True)
    return found


def _export(source: Path, bundle: Path) -> None:
    """Make the ONNX bundle of a run or a model where it is to lie, if it is not there."""
    from mpa_edge.export.build import export

    if not (bundle / "bundle.json").is_file():
        export(source, "onnx", [bundle.name.removeprefix("onnx-")], bundle.parent)


def _baseline(vlm: Vlm, data: dict[str, Path]) -> dict[str, Any]:
    return {"scores": scores_of(vlm, data)}


def scores_of(vlm: Vlm, data: dict[str, Path]) -> dict[str, dict[str, list[float]]]:
    """Per data set and metric the score of each question, in order."""
    task, found = task_named(TASK), {}
    for name, path in data.items():
        questions = read_questions(path)
        answers = answers_of(vlm, questions, task)
        found[name] = {
            metric: [metric_named(metric)(text, item.answers) for text, item in zip(answers, questions, strict=True)]
            for metric in METRICS
        }
    return found


def write_data(out: Path, split: Split) -> dict[str, Path]:
    """The labelled files by name: the split, and the student's home domain. The pool is written too."""
    _write_once(out / "pool", partial(write_pool, n=POOL))
    writers = {split.value: (write_test if split is Split.test else write_validation, QUESTIONS)}
    writers["home"] = (write_home, HOME)
    for name, (write, count) in writers.items():
        _write_once(out / name, partial(write, n=count))
    return {name: out / name / f"{name}.jsonl" for name in writers}


def _write_once(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder whole or not at all; another process may be writing the same one."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    write(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise


@app.command()
def table(
    split: Annotated[Split, typer.Option(help="Where the rows were scored.")] = Split.test,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = OUT,
    results: Annotated[Path | None, typer.Option(help="Folder for ablation.md and ablation.json.")] = None,
) -> None:
    """Print the table of all seeds that are there; `--results` also writes it as Markdown and JSON."""
    from mpa_edge.benchmarks.ablation_table import collect, markdown

    found = collect(out, split.value)
    text = markdown(found)
    typer.echo(text)
    if results:
        write_atomic(results / "ablation.md", text)
        write_atomic(results / "ablation.json", json.dumps(found, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _once(path: Path, made: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
    """Keep what `make` returns at `path` with what it was `made` of; nothing to do when it was made of the same."""
    made = json.loads(json.dumps(made))
    if not path.is_file() or read(path).get("made") != made:
        write_atomic(path, json.dumps({"made": made, **make()}))


if __name__ == "__main__":
    app()
