"""One variant in a process of its own: `python -m mpa_edge.benchmarks.worker FOLDER < job.json`.

The job holds pictures and prompts, never labels. Latency is measured first, one picture at a time, and the peak of
memory is read right after it; then come the answers of the accuracy part, several at once.
Every answer is on disk at once, so an interrupted job goes on where it was.

    FOLDER/answers.jsonl   one row per question: key, text, tokens, timings, …
    FOLDER/latency.jsonl   one row per timed picture
    FOLDER/fixed.jsonl     the same with answers of one length, where that was asked for
    FOLDER/measured.json   written last: what the model says of itself, load time, peak memory, the machine's state
    FOLDER/error.json      instead, when the model failed
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from mpa_edge.benchmarks.conditions import conditions, during
from mpa_edge.benchmarks.host import BUSY_FROM, memory_mb, peak_memory_bytes, watch_others
from mpa_edge.bundle import MANIFEST
from mpa_edge.errors import ImageError, MpaEdgeError
from mpa_edge.records import Record, read_rows, write_atomic, write_rows
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm

ANSWERS, LATENCY, FIXED, MEASURED = "answers.jsonl", "latency.jsonl", "fixed.jsonl", "measured.json"
ERROR = "error.json"
KEPT = ("load_ms", "first_answer_ms", "peak_memory_bytes", "busy", "conditions")
BATCHED_ENGINES = ("transformers", "chat", "fake")
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Ask(Record):
    """A question as a model gets it. `key` names the picture's content and the prompt."""

    key: str
    image: str
    prompt: str


@dataclass(frozen=True)
class Row(Record):
    """One answer. `wall_ms` is the caller's clock around a call of one picture; None for a batch."""

    key: str
    text: str
    n_tokens: int
    prompt_tokens: int | None
    finish_reason: str
    error: str | None
    timings: dict[str, float | None]
    wall_ms: float | None = None


@dataclass(frozen=True)
class Job(Record):
    """What a worker does. `fixed_length` also times answers of exactly so many tokens; `keep_timings` keeps those that
    other work disturbed, which are taken again otherwise."""

    name: str
    spec: str
    threads: int
    max_new_tokens: int
    batch_size: int
    warm_up: list[dict[str, Any]]
    latency: list[dict[str, Any]]
    accuracy: list[dict[str, Any]]
    device: str = "auto"
    fixed_length: int | None = None
    keep_timings: bool = False


def main(folder: Path, source: IO[str], out: IO[str]) -> int:
    """Do the job that `source` holds; progress goes to `out` as JSON lines. Returns the exit code."""

    def say(phase: str, done: int, of: int) -> None:
        out.write(json.dumps({"phase": phase, "done": done, "of": of}) + "\n")
        out.flush()

    job = Job.from_json(json.load(source))
    (folder / ERROR).unlink(missing_ok=True)
    try:
        say("load", 0, 1)
        started = time.perf_counter()
        vlm = open_variant(job)
        load_ms = (time.perf_counter() - started) * 1000
        try:
            work(vlm, job, folder, say, load_ms=load_ms)
        finally:
            vlm.close()
    except Exception as error:
        # Whatever a model raises fails this variant and no other; a traceback of ours is for the log.
        reason = str(error) if isinstance(error, MpaEdgeError) else f"{type(error).__name__}: {error}"
        write_atomic(folder / ERROR, json.dumps({"reason": reason}) + "\n")
        if not isinstance(error, MpaEdgeError):
            raise
        return 1
    return 0


def open_variant(job: Job) -> Vlm:
    """The job's model. A bundle is opened without the libraries for training, as on the device."""
    if is_bundle(job.spec):
        from mpa_edge.runtime import load

        # Nothing is kept between two questions: a picture that comes twice must take its full time twice.
        return load(Path(job.spec), device=job.device, threads=job.threads, cache_mb=0)
    from mpa_edge.models import open_vlm

    return open_vlm(job.spec, name=job.name, device=job.device, batch_size=job.batch_size)


def is_bundle(spec: str) -> bool:
    """Whether an exported bundle lies there."""
    return (Path(spec) / MANIFEST).is_file()


def work(vlm: Vlm, job: Job, folder: Path, say: Say, *, load_ms: float | None = None) -> None:
    """Measure an open model. What the same model has measured here already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(vlm.describe(), sort_keys=True, default=str))
    before = what_is_kept(folder, described)
    decoding = Decoding(max_new_tokens=job.max_new_tokens)
    about = timed_part(vlm, job, folder, decoding, before, say) | {"describe": described, "engine": vlm.engine}
    about |= {"load_ms": about.get("load_ms") or load_ms, "device": device_of(vlm), "done": False}
    write_atomic(folder / MEASURED, json.dumps(about) + "\n")
    batch = job.batch_size if vlm.engine in BATCHED_ENGINES else 1
    with side_by_side(vlm, job, about["peak_memory_bytes"]) as vlms:
        collect_answers(vlms, asks(job.accuracy), decoding, batch, folder / ANSWERS, say)
    write_atomic(folder / MEASURED, json.dumps({**about, "done": True}, indent=2) + "\n")


def timed_part(
    vlm: Vlm, job: Job, folder: Path, decoding: Decoding, before: dict[str, Any] | None, say: Say
) -> dict[str, Any]:
    """Time the model, unless what was measured before still serves; returns what goes into measured.json.

    A series that other work disturbed is taken again, and the less disturbed of the two is kept.
    """
    timed = asks(job.latency)
    there = before is not None and are_timed(folder, job)
    if before and there and (job.keep_timings or not is_disturbed(before)):
        return {key: before.get(key) for key in KEPT}
    others, start = watch_others(), conditions()
    cold = warm_up(vlm, asks(job.warm_up), decoding)
    rows = measure_latency(vlm, timed, decoding, say)
    # What a chat server takes, its own machine knows.
    peak = None if vlm.engine == "chat" else peak_memory_bytes()
    about = {
        "load_ms": None,
        "first_answer_ms": cold,
        "peak_memory_bytes": peak,
        "busy": others(),
        "conditions": during(start, conditions()),
    }
    if before and there and (before.get("busy") or 0) < (about["busy"] or 0):
        about = {key: before.get(key) for key in KEPT}
    else:
        write_rows(folder / LATENCY, [row.to_json() for row in rows])
    if job.fixed_length and is_bundle(job.spec) and not fixed_rows(folder, job):
        with endless(vlm):
            rows = measure_latency(vlm, timed, Decoding(max_new_tokens=job.fixed_length), say, "fixed")
        write_rows(folder / FIXED, [row.to_json() for row in rows])
    return about


def are_timed(folder: Path, job: Job) -> bool:
    """Whether the job's series lie there, in this order."""
    wanted = [ask["key"] for ask in job.latency]
    fixed = not job.fixed_length or not is_bundle(job.spec) or [row.key for row in fixed_rows(folder, job)] == wanted
    return fixed and [row.key for row in whole_rows(folder / LATENCY)] == wanted


def fixed_rows(folder: Path, job: Job) -> list[Row]:
    """The rows of the series of one length; none where they have another length."""
    rows = whole_rows(folder / FIXED)
    return rows if {row.n_tokens for row in rows} <= {job.fixed_length, 0} else []


def is_disturbed(about: dict[str, Any]) -> bool:
    """Whether other work, or heat, made the times of a measured.json too long."""
    return (about.get("busy") or 0) >= BUSY_FROM or bool((about.get("conditions") or {}).get("throttled"))


def warm_up(vlm: Vlm, wanted: Sequence[Ask], decoding: Decoding) -> float | None:
    """Answer the warm-up's questions; returns the milliseconds of the first, the model's first answer of all."""
    rows = [answer_one(vlm, ask, decoding) for ask in wanted]
    return rows[0].wall_ms if rows else None


@contextmanager
def endless(vlm: Vlm) -> Iterator[None]:
    """Let a bundle's answers end at their longest alone: no token stops them."""
    bundle = vlm.bundle  # type: ignore[attr-defined]
    prompt = bundle.prompt.model_copy(update={"stop_token_ids": ()})
    vlm.bundle = bundle.model_copy(update={"prompt": prompt})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        vlm.bundle = bundle  # type: ignore[attr-defined]


def device_of(vlm: Vlm) -> str | None:
    """Where a model computes, as its engine calls it; None for one on another machine, and where nobody tells."""
    if hasattr(vlm, "reader"):
        return str(getattr(vlm.reader.engine, "device", "")).removesuffix("ExecutionProvider").lower() or None
    found = getattr(getattr(vlm, "model", None), "device", None)
    return None if found is None else str(found)


def asks(rows: Sequence[dict[str, Any]]) -> list[Ask]:
    """The job's questions."""
    return [Ask.from_json(row) for row in rows]


def what_is_kept(folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier process wrote of this very model; rows of a model with another description are deleted."""
    path = folder / MEASURED
    before: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before and before["describe"] == described:
        return before
    for name in (ANSWERS, LATENCY, FIXED, MEASURED):
        (folder / name).unlink(missing_ok=True)
    return None


def measure_latency(vlm: Vlm, timed: Sequence[Ask], decoding: Decoding, say: Say, phase: str = "latency") -> list[Row]:
    """Time single answers, all in one go: a part of an old series is of no use."""
    rows = []
    for number, ask in enumerate(timed, 1):
        rows.append(answer_one(vlm, ask, decoding))
        say(phase, number, len(timed))
    return rows


def answer_one(vlm: Vlm, ask: Ask, decoding: Decoding) -> Row:
    """One picture, one prompt, on the caller's clock. Reading the file is not timed: a camera has no file."""
    try:
        image = open_image(ask.image)
    except ImageError as error:
        return row_of(ask, unanswered(error))
    started = time.perf_counter()
    (answer,) = vlm.answer([image], [ask.prompt], decoding)
    return row_of(ask, answer, wall_ms=(time.perf_counter() - started) * 1000)


@contextmanager
def side_by_side(vlm: Vlm, job: Job, peak: int | None) -> Iterator[list[Vlm]]:
    """What answers the accuracy part: a small bundle as often as there are threads, with one thread each.

    A small model gains little by a second thread and, on a machine that does other work, loses much: its threads wait
    for each other at every operation. A bundle of which the copies would fill a quarter of the memory stays alone.
    """
    memory = memory_mb()
    room = int(memory * 1e6 / 4 / peak) if memory and peak else 1
    count = min(job.threads, room)
    if count < 2 or not is_bundle(job.spec):
        yield [vlm]
        return
    vlm.close()
    copies = [open_variant(replace(job, threads=1)) for _ in range(count)]
    try:
        yield copies
    finally:
        for copy in copies:
            copy.close()


def collect_answers(
    vlms: Sequence[Vlm], wanted: Sequence[Ask], decoding: Decoding, batch: int, path: Path, say: Say
) -> None:
    """Answer what has no answer yet; each batch is on disk as soon as it is answered.

    An answer that did not come (a server that timed out, memory that ran out) is asked for again.
    """
    rows = whole_rows(path)
    there = {row.key for row in rows if row.finish_reason != "error"}
    if len(there) < len(rows):
        write_rows(path, [row.to_json() for row in rows if row.finish_reason != "error"])
    missing = list({ask.key: ask for ask in wanted if ask.key not in there}.values())
    done = len(wanted) - len(missing)
    say("accuracy", done, len(wanted))
    free: SimpleQueue[Vlm] = SimpleQueue()
    for vlm in vlms:
        free.put(vlm)

    def answer(part: Sequence[Ask]) -> list[Row]:
        vlm = free.get()
        try:
            return answer_batch(vlm, part, decoding)
        finally:
            free.put(vlm)

    parts = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(len(vlms)) as pool:
        for rows in pool.map(answer, parts):
            file.write("".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            done += len(rows)
            say("accuracy", done, len(wanted))


def answer_batch(vlm: Vlm, part: Sequence[Ask], decoding: Decoding) -> list[Row]:
    """Rows for a batch; an unreadable picture is an answer with an error."""
    answers: list[Answer] = []
    images, readable = [], []
    for ask in part:
        try:
            images.append(open_image(ask.image))
            readable.append(ask)
        except ImageError as error:
            answers.append(unanswered(error))
    failed = [ask for ask in part if ask not in readable]
    given = vlm.answer(images, [ask.prompt for ask in readable], decoding) if images else []
    return [row_of(ask, answer) for ask, answer in zip([*readable, *failed], [*given, *answers], strict=True)]


def unanswered(error: ImageError) -> Answer:
    """The answer to a picture that cannot be read."""
    return Answer("", finish_reason="error", error=f"picture {error.reason}")


def row_of(ask: Ask, answer: Answer, wall_ms: float | None = None) -> Row:
    """The row of an answer."""
    return Row(
        ask.key,
        answer.text,
        len(answer.tokens),
        answer.prompt_tokens,
        answer.finish_reason,
        answer.error,
        asdict(answer.timings),
        wall_ms,
    )


def whole_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file; a last line that a kill tore off is cut away."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(path, whole)
    return list(read_rows(path, Row))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.stdin, sys.stdout))
