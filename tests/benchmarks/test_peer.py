"""The task for lmms-eval, and the comparison with what it logs. Where lmms-eval is installed, its scores are ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mpa_edge.answers import METRICS
from mpa_edge.benchmarks import peer_task
from mpa_edge.benchmarks.peer import METRICS as KNOWN
from mpa_edge.benchmarks.peer import compared, rows_of, write_task
from mpa_edge.errors import InputError
from mpa_edge.labelled import read_questions, stratified
from mpa_edge.tasks import task_named


class Loader(yaml.SafeLoader):
    """Reads lmms-eval's `!function` as the function's name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_the_task_is_the_benchmarks_own(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'a "peer"'
    assert write_task(labelled, task_named("reference"), folder, limit=12, seed=3) == 12
    told = yaml.load((folder / "mpa_edge.yaml").read_text(), Loader)
    rows = rows_of(Path(told["dataset_kwargs"]["data_files"]["test"]))
    assert [row["id"] for row in rows] == [one.id for one in stratified(read_questions(labelled), 12, 3)]
    assert told["generation_kwargs"] == {"max_new_tokens": 12, "temperature": 0}
    assert [one["metric"] for one in told["metric_list"]] == [rows[0]["metric"]] == ["exact_match"]
    code = (folder / "utils.py").read_text()
    for key in ("doc_to_visual", "doc_to_text", "process_results"):
        module, _, name = told[key].partition(".")
        assert module == "utils"
        assert f"def {name}(" in code
    assert peer_task.question(rows[0]) == rows[0]["question"]
    assert peer_task.pictures(rows[0])[0].size == Image.open(rows[0]["image"]).size


def test_a_metric_that_lmms_eval_does_not_know_is_refused(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('annotate_prompt = "x"\nmetric = "containment"\n')
    with pytest.raises(InputError, match="lmms-eval has no metric containment"):
        write_task(labelled, task_named(str(tmp_path / "own.toml")), tmp_path)


def logged(folder: Path, rows: list[dict[str, Any]]) -> None:
    """What both harnesses leave: ours answers all, lmms-eval's log is in the order of the questions."""
    questions = [{"id": row["id"], "metric": "anls"} for row in rows]
    samples = [{"doc_id": i, "filtered_resps": row["theirs"], "anls": row["score"]} for i, row in enumerate(rows)]
    ours = [{"variant": "q8", "part": "accuracy", "id": r["id"], "text": "stop", "score": 1.0} for r in rows]
    ours.append({"variant": "q4", "part": "accuracy", "id": rows[0]["id"], "text": "go", "score": 0.0})
    (folder / "out").mkdir()
    for name, found in (("questions", questions), ("out/20250101_samples_mpa_edge", samples), ("raw", ours[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_answers_and_scores_are_compared_question_by_question(tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "theirs": "stop", "score": 1.0} for n in range(4)]
    rows[2] = {"id": "q2", "theirs": "shop", "score": 0.75}
    logged(tmp_path, rows)
    found = compared(tmp_path / "raw.jsonl", tmp_path, "q8")
    assert (found["n"], found["same_answers"], found["same_scores"]) == (4, 3, 3)
    assert found["accuracy"] == {"mpa-edge": 1.0, "lmms-eval": 0.9375}
    assert [one["id"] for one in found["differ"]] == ["q2"]
    with pytest.raises(InputError, match=r"--variant q9: .* no question in common"):
        compared(tmp_path / "raw.jsonl", tmp_path, "q9")
    (tmp_path / "out/20250101_samples_mpa_edge.jsonl").unlink()
    with pytest.raises(InputError, match="--log_samples"):
        compared(tmp_path / "raw.jsonl", tmp_path, "q8")


def test_lmms_eval_scores_as_we_do() -> None:
    pytest.importorskip("lmms_eval")
    rng = random.Random(0)
    texts = ["A", "the dog", "Dog.", "two", "2", "5%", "0.05", "105", "100", "1,000", "stop", "shop", "", "straße"]
    for metric in KNOWN:
        for _ in range(500):
            answer, references = rng.choice(texts), rng.choices(texts, k=rng.choice([1, 2, 10]))
            theirs = peer_task.scores({"metric": metric, "answers": references}, [answer])[metric]
            assert theirs == pytest.approx(METRICS[metric](answer, references), abs=1e-12), (metric, answer, references)
