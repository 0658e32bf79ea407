"""Loss along the road: the accuracy of base, aligned, merged and exported model on the same labelled questions.

What comes of it stands in each manifest under `checks["road"]`, for the model card, `mpa-edge inspect` and the
benchmark's report:

    {"data": {"name", "n", "of", "pictures", "skipped", "sha256"}, "task", "metric",
     "steps": [{"name", "step", "value", "ci95", "errors", "from", "delta", "delta_ci95"}, …]}

`value` is the mean of the task's metric over all n questions, `delta` what it is more than that of the step named by
`from`; 95% percentile bootstrap intervals over questions, of the paired difference for `delta`. An answer that does not
come counts as wrong. Answers are kept beside the bundles, so that no model is asked twice, in this export or the next.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mpa_edge.answers import metric_named
from mpa_edge.bundle import FULL_PRECISION, Bundle
from mpa_edge.digests import digest_of_folder, digest_of_trained
from mpa_edge.errors import ImageError, InputError
from mpa_edge.export.merged import Merged
from mpa_edge.labelled import Question, read_questions, stratified
from mpa_edge.memo import MemoVlm
from mpa_edge.models import open_vlm
from mpa_edge.run_folder import RUN, RunFolder, read_run
from mpa_edge.runtime import open_bundle
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding, Vlm
from mpa_edge.stats import mean_interval, paired_difference
from mpa_edge.tasks import Task, task_of_run
from mpa_edge.versions import installed

NAME = "road"  # under `checks` in the manifest
KEPT = ".road"  # beside the bundles
# What shows a format's conversion alone, without quantization: 16 bit, in which these families' weights are published.
FULL = {"gguf": "f16", "onnx": "fp32", "openvino": "fp32"}
LIBRARIES = ("torch", "transformers", "llama-cpp-python", "onnxruntime", "openvino")
CHUNK = 64
Step = Literal["base", "aligned", "merged", "full", "quantized"]


@dataclass(frozen=True)
class Stop:
    """One model on the road. `identity` is all that shapes its answers; it is opened only where some are not known."""

    name: str
    step: Step
    identity: dict[str, Any]
    open: Callable[[], Vlm]


def missing_full_precision(format: str, quants: Sequence[str]) -> list[str]:
    """The quantization that has to be made for the road besides the wanted ones, if there is one: without a bundle at
    full precision nobody can tell what the conversion lost and what the quantization."""
    known = FULL.get(format)
    return [known] if known and not FULL_PRECISION & set(quants) else []


@dataclass(frozen=True)
class Asked:
    """The labelled questions of one export, with the task that they are asked and scored by; `about` goes into the
    manifest."""

    task: Task
    questions: Sequence[Question]
    about: dict[str, Any]


def read_asked(source: Path, root: Path, data: Path, limit: int | None = None) -> Asked:
    """The labelled questions in the file `data` for the run `source`, whose bundles go to `root`; before any work.

    `limit` draws a stratified sample, the same as the benchmark's `--limit`. Raises `InputError` where they cannot be
    read, and for a model folder that is no run, `RunError`, and `MissingExtra`.
    """
    task = task_of_run(read_run(source)) if (source / RUN).is_file() else None
    if task is None:
        raise InputError(f"--data {data}: {source} names no task, so no prompt and no metric; export a run to score it")
    metric_named(task.metric)("", ["-"])  # a library that it lacks is missed now, not at the end
    everything = read_questions(data, store=root / KEPT / "images")
    questions = stratified(everything, limit, 0)
    about = {
        "name": data.stem,
        "n": len(questions),
        "of": len(everything),
        "pictures": len({question.image for question in questions}),
        "skipped": dict(Counter(skipped.reason for skipped in everything.skipped)),
        "sha256": _digest(questions),
    }
    return Asked(task, questions, about)


class Road:
    """The models of one export, and what they answer to labelled questions."""

    def __init__(self, merged: Merged, asked: Asked) -> None:
        self._task, self._questions, self._about = asked.task, asked.questions, asked.about
        self._metric = metric_named(asked.task.metric)
        self._merged, self._folder = merged, merged.root / KEPT

    def checks(
        self, bundles: Sequence[tuple[Path, Bundle]] = (), progress: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any]:
        """Ask whoever was not asked yet, and return what the manifests say. `bundles` are folders with their manifests,
        which need not be written; `progress` is called with a line before each model."""
        scored: list[tuple[Stop, list[float], int]] = []
        for stop in [*trunk(self._merged), *stops_of(bundles)]:
            progress(f"score {stop.name} on {len(self._questions)} questions")
            answers = self._ask(stop)
            scores = [
                0.0 if answer.error else float(self._metric(answer.text, question.answers))
                for question, answer in zip(self._questions, answers, strict=True)
            ]
            scored.append((stop, scores, sum(answer.error is not None for answer in answers)))
        return {
            "data": self._about,
            "task": self._task.name,
            "metric": self._task.metric,
            "steps": [_entry(place, scored) for place in range(len(scored))],
        }

    def _ask(self, stop: Stop) -> list[Answer]:
        unopened = _Unopened(stop)
        vlm = MemoVlm(unopened, self._folder / "answers.jsonl")
        decoding = Decoding(max_new_tokens=self._task.max_new_tokens)
        answers: list[Answer] = []
        try:
            for start in range(0, len(self._questions), CHUNK):
                answers += _answers(vlm, self._questions[start : start + CHUNK], self._task, decoding)
        finally:
            unopened.close()
        return answers


def trunk(merged: Merged) -> list[Stop]:
    """What was there before any bundle: the base, the base with what was trained, and the two in one. In float32, so
    that nothing but the weights differs."""
    if merged.run is None or merged.base is None:
        return [_transformers("base", merged.folder, weights=digest_of_folder(merged.folder))]
    student, base = RunFolder(merged.run).student, digest_of_folder(merged.base)
    edge = read_run(merged.run).get("config", {}).get("longest_edge")
    return [
        _transformers("base", merged.base, edge, weights=base),
        _transformers("aligned", student, edge, weights=base, trained=digest_of_trained(student)),
        _transformers("merged", merged.folder, weights=digest_of_folder(merged.folder)),
    ]


def stops_of(bundles: Sequence[tuple[Path, Bundle]]) -> list[Stop]:
    """The bundles at full precision, then the quantized ones."""
    stops = [_bundle(folder, bundle) for folder, bundle in bundles]
    return sorted(stops, key=lambda stop: stop.step)


def _transformers(step: Step, folder: Path, longest_edge: int | None = None, **identity: str) -> Stop:
    about = {**identity, "longest_edge": longest_edge, "versions": installed(LIBRARIES[:2])}
    return Stop(step, step, about, lambda: open_vlm(str(folder), dtype="float32", longest_edge=longest_edge))


def _bundle(folder: Path, bundle: Bundle) -> Stop:
    about = bundle.model_dump(mode="json", include={"engine", "image", "prompt"})
    digests = [file.sha256 for file in bundle.files if file.role not in ("config", "readme")]
    return Stop(
        bundle.short_name,
        "full" if bundle.quantization in FULL_PRECISION else "quantized",
        {**about, "files": digests, "versions": installed(LIBRARIES[2:])},
        lambda: open_bundle(folder, bundle),
    )


class _Unopened:
    """A model that is opened when it is asked first."""

    engine = "unopened"

    def __init__(self, stop: Stop) -> None:
        self.name = stop.name
        self._stop = stop
        self._vlm: Vlm | None = None

    def answer(self, images: Sequence[Any], prompts: Sequence[str], decoding: Decoding = GREEDY) -> list[Answer]:
        if self._vlm is None:
            self._vlm = self._stop.open()
        return self._vlm.answer(images, prompts, decoding)

    def describe(self) -> dict[str, Any]:
        return self._stop.identity

    def close(self) -> None:
        if self._vlm is not None:
            self._vlm.close()


def _answers(vlm: Vlm, questions: Sequence[Question], task: Task, decoding: Decoding) -> list[Answer]:
    """One answer per question; a picture that cannot be read is an answer with an error."""
    images, readable = [], []
    answers: list[Answer | None] = []
    for question in questions:
        try:
            images.append(open_image(question.image))
            readable.append(question)
            answers.append(None)
        except ImageError as error:
            answers.append(Answer("", finish_reason="error", error=f"picture {error.reason}"))
    prompts = [task.prompt(question.question) for question in readable]
    given = iter(vlm.answer(images, prompts, decoding) if images else [])
    return [answer or next(given) for answer in answers]


def _entry(place: int, scored: Sequence[tuple[Stop, list[float], int]]) -> dict[str, Any]:
    stop, scores, errors = scored[place]
    estimate = mean_interval(scores)
    assert estimate is not None  # there is at least one question
    entry: dict[str, Any] = {
        "name": stop.name,
        "step": stop.step,
        "value": round(estimate.value, 5),
        "ci95": [round(estimate.low, 5), round(estimate.high, 5)],
        "errors": errors,
        "from": None,
        "delta": None,
        "delta_ci95": None,
    }
    if before := _before(place, scored):
        other, their_scores, _ = before
        change = paired_difference(their_scores, scores)
        assert change is not None
        entry |= {"from": other.name, "delta": round(change.value, 5)}
        entry["delta_ci95"] = [round(change.low, 5), round(change.high, 5)]
    return entry


def _before(place: int, scored: Sequence[tuple[Stop, list[float], int]]) -> tuple[Stop, list[float], int] | None:
    """The step that this one was made from: of bundles the merged model, of quantized ones that at full precision."""
    earlier = scored[:place]
    if scored[place][0].step == "full":
        earlier = [one for one in earlier if one[0].step != "full"]
    elif scored[place][0].step == "quantized":
        earlier = [one for one in earlier if one[0].step != "quantized"]
    return earlier[-1] if earlier else None


def _digest(questions: Sequence[Question]) -> str:
    """Names what was asked and what counts as right; where the pictures lie is no part of it."""
    content = [{**asdict(question), "image": Path(question.image).name} for question in questions]
    return hashlib.sha256(repr(content).encode()).hexdigest()
