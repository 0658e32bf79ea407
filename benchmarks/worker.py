"""One variant in a process of its own: `python -m mpa_edge.benchmarks.worker FOLDER < job.json`, the job on one line.

The job holds pictures and prompts, never labels. Latency is measured first, one picture at a time, and the peak of
memory is read right after it; then come the answers of the accuracy part, several at once.
Every answer is on disk at once, so an interrupted job goes on where it was. `jobs` tells what lies in the folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from mpa_edge.benchmarks.host import memory_mb
from mpa_edge.benchmarks.jobs import (
    ANSWERS,
    ERROR,
    FIXED,
    LATENCY,
    MEASURED,
    Ask,
    Job,
    Row,
    Say,
    asks,
    is_bundle,
    lines_of,
    read_json,
    row_of,
    sealed,
    unanswered,
    whole_rows,
)
from mpa_edge.benchmarks.memory import watch_device
from mpa_edge.benchmarks.timed import device_of, timed_part
from mpa_edge.errors import ImageError, MpaEdgeError
from mpa_edge.orphan import end_with_whoever_started_us
from mpa_edge.records import write_atomic
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import Answer, Decoding, Vlm

BATCHED_ENGINES = ("transformers", "chat", "fake")


def main(folder: Path, source: IO[str], out: IO[str]) -> int:
    """Do the job that `source` holds; progress goes to `out` as JSON lines. Returns the exit code."""

    def say(phase: str, done: int, of: int) -> None:
        out.write(json.dumps({"phase": phase, "done": done, "of": of}) + "\n")
        out.flush()

    job = Job.from_json(json.loads(source.readline()))
    (folder / ERROR).unlink(missing_ok=True)
    try:
        say("load", 0, 1)
        device_memory = watch_device()
        started = time.perf_counter()
        vlm = open_variant(job)
        load_ms = (time.perf_counter() - started) * 1000
        try:
            work(vlm, job, folder, say, load_ms=load_ms, device_memory=device_memory)
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

    return open_vlm(
        job.spec,
        name=job.name,
        device=job.device,
        batch_size=job.batch_size,
        trust_remote_code=job.trust_remote_code,
    )


def work(
    vlm: Vlm,
    job: Job,
    folder: Path,
    say: Say,
    *,
    load_ms: float | None = None,
    device_memory: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Measure an open model. What the same model has measured here already is kept. `device_memory` is what
    `watch_device` gave before it was opened."""
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(vlm.describe(), sort_keys=True, default=str))
    before = what_is_kept(folder, described)
    decoding = Decoding(max_new_tokens=job.max_new_tokens)
    about = timed_part(vlm, job, folder, decoding, before, say, device_memory) | {
        "describe": described,
        "engine": vlm.engine,
    }
    about |= {"load_ms": about.get("load_ms") or load_ms, "device": device_of(vlm), "done": False}
    write_atomic(folder / MEASURED, sealed(about) + "\n")
    batch = job.batch_size if vlm.engine in BATCHED_ENGINES else 1
    if not job.accuracy:
        write_atomic(folder / MEASURED, sealed({**about, "done": True}, indent=2) + "\n")
        return
    with side_by_side(vlm, job, about["peak_memory_bytes"]) as vlms:
        collect_answers(vlms, asks(job.accuracy), decoding, batch, folder / ANSWERS, say)
    write_atomic(folder / MEASURED, sealed({**about, "done": True}, indent=2) + "\n")


def what_is_kept(folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier process wrote of this very model; rows of a model with another description are deleted."""
    before = read_json(folder / MEASURED)
    if before and before["describe"] == described:
        return before
    for name in (ANSWERS, LATENCY, FIXED, MEASURED):
        (folder / name).unlink(missing_ok=True)
    return None


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
        write_atomic(path, lines_of(row for row in rows if row.finish_reason != "error"))
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
            file.write(lines_of(rows))
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


if __name__ == "__main__":
    asked = StringIO(sys.stdin.readline())
    # Left alone, we would spoil the timings, and write between the rows, of whoever comes next.
    end_with_whoever_started_us()
    sys.exit(main(Path(sys.argv[1]), asked, sys.stdout))
