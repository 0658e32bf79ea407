"""The same questions by lmms-eval through our server: a second harness that should come to the same accuracy.

    python -m mpa_edge.benchmarks.peer write test.jsonl --task reference --out peer
    mpa-edge serve runs/demo/bundles/gguf-q8_0 &
    lmms-eval eval --model openai --tasks mpa_edge --include_path peer --log_samples --output_path peer/out \\
        --model_args model=demo-gguf-q8_0,base_url=http://127.0.0.1:8000/v1,api_key=none,num_concurrent=4,timeout=60
    python -m mpa_edge.benchmarks.peer compare report/raw.jsonl peer --variant gguf-q8_0

`write` leaves the task in peer/: a YAML, the questions, and the functions that lmms-eval calls. `model` is the bundle's
name, as GET /v1/models tells it; the server holds 16 requests by default, so ask for fewer at once.
The server puts a question as the bundle was trained, so lmms-eval sends it bare. lmms-eval lives in an environment of
its own; it and we share nothing but the questions, the pictures and the answers' definition.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.benchmarks import peer_task
from mpa_edge.errors import InputError
from mpa_edge.labelled import read_questions, stratified
from mpa_edge.records import write_atomic, write_rows
from mpa_edge.tasks import Task, task_named

METRICS = ("anls", "exact_match", "relaxed_accuracy", "vqa_accuracy")
SHOWN = 10  # of the questions on which the two differ
YAML = """\
# Written by mpa_edge.benchmarks.peer.
task: mpa_edge
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answers
process_results: !function utils.scores
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def write(
    data: Annotated[Path, typer.Argument(help="Labelled questions.")],
    task: Annotated[str, typer.Option(help="What the questions are scored as.")],
    out: Annotated[Path, typer.Option(help="The folder for lmms-eval's --include_path.")] = Path("peer"),
    limit: Annotated[int | None, typer.Option(help="The stratified sample of bench's --limit N.")] = None,
    seed: Annotated[int, typer.Option(help="The sample's, as in bench.")] = 0,
) -> None:
    """Write the task for lmms-eval."""
    write_task(data, task_named(task), out, limit, seed)


def write_task(data: Path, task: Task, out: Path, limit: int | None = None, seed: int = 0) -> int:
    """Write questions.jsonl, mpa_edge.yaml and utils.py to `out`; returns how many questions there are. The sample is
    that of `bench --limit` with the same seed. `InputError` for a metric that lmms-eval does not know."""
    if task.metric not in METRICS:
        raise InputError(f"--task {task.name}: lmms-eval has no metric {task.metric}; it has {', '.join(METRICS)}")
    out.mkdir(parents=True, exist_ok=True)
    questions = stratified(read_questions(data, store=out / "images"), limit, seed)
    rows = [
        {
            "id": one.id,
            "image": str(Path(one.image).resolve()),
            "question": one.question,
            "answers": list(one.answers),
            "metric": task.metric,
        }
        for one in questions
    ]
    path = (out / "questions.jsonl").resolve()
    write_rows(path, rows)
    # A JSON string is a YAML string, whatever is in the path.
    text = YAML.format(questions=json.dumps(str(path)), tokens=task.max_new_tokens, metric=task.metric)
    write_atomic(out / "mpa_edge.yaml", text)
    shutil.copyfile(peer_task.__file__, out / "utils.py")
    return len(rows)


@app.command()
def compare(
    raw: Annotated[Path, typer.Argument(help="raw.jsonl of mpa-edge bench.")],
    folder: Annotated[Path, typer.Argument(help="The folder of `write`, lmms-eval's output somewhere in it.")],
    variant: Annotated[str, typer.Option(help="The variant that was served.")],
) -> None:
    """Compare answers and scores, question by question; prints one JSON object."""
    typer.echo(json.dumps(compared(raw, folder, variant), indent=2, ensure_ascii=False))


def compared(raw: Path, folder: Path, variant: str) -> dict[str, Any]:
    """Both accuracies over the questions that both asked, in how many the answers and the scores are the same, and the
    first ones where they are not. `InputError` where the two have no question in common."""
    asked = rows_of(folder / "questions.jsonl")
    theirs = {asked[row["doc_id"]]["id"]: row for row in rows_of(samples_in(folder))}
    ours = {row["id"]: row for row in rows_of(raw) if row["part"] == "accuracy" and row["variant"] == variant}
    metric, both = asked[0]["metric"], [name for name in ours if name in theirs]
    if not both:
        raise InputError(f"--variant {variant}: {raw} and {folder} have no question in common")
    found = [
        {
            "id": name,
            "ours": ours[name]["text"].strip(),
            "theirs": str(theirs[name]["filtered_resps"]).strip(),
            "our_score": ours[name]["score"],
            "their_score": theirs[name][metric],
        }
        for name in both
    ]
    differ = [one for one in found if one["ours"] != one["theirs"] or one["our_score"] != one["their_score"]]
    return {
        "variant": variant,
        "metric": metric,
        "n": len(found),
        "accuracy": {
            "mpa-edge": round(sum(one["our_score"] for one in found) / len(found), 5),
            "lmms-eval": round(sum(one["their_score"] for one in found) / len(found), 5),
        },
        "same_answers": sum(one["ours"] == one["theirs"] for one in found),
        "same_scores": sum(one["our_score"] == one["their_score"] for one in found),
        "differ": differ[:SHOWN],
    }


def samples_in(folder: Path) -> Path:
    """The newest log of samples below a folder. `InputError` where there is none."""
    found = sorted(folder.rglob("*_samples_mpa_edge.jsonl"), key=lambda path: path.name)
    if not found:
        raise InputError(f"{folder}: no log of samples of the task mpa_edge; run lmms-eval with --log_samples")
    return found[-1]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


if __name__ == "__main__":
    app()
