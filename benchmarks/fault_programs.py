"""The programs that `faults` disturbs: how each is started, and what of its folder an undisturbed run leaves too.

    ask      `align` up to the training set: a teacher behind a chat server, a fake student; without torch, in seconds
    align    `mpa-edge align` with the reference pair
    export   `mpa-edge export --format gguf` of such a run
    bench    `mpa-edge bench` of such a bundle beside a fake

`python -m mpa_edge.benchmarks.fault_programs` is `ask`, with the flags of align.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mpa_edge import edge
from mpa_edge.config import AlignConfig
from mpa_edge.models import open_vlm
from mpa_edge.options import given, options_of

REFERENCE = Path(__file__).parent / "reference"
PICTURES = 16
QUESTIONS = 12
# A server that does not answer in time costs so many seconds, and a request is tried so often.
TIMEOUT, RETRIES = 3.0, 3
CHUNK = ("--chunk-size", "2")
# What of a JSON file may differ from one time to the next.
UNSTEADY = re.compile(r"seconds|_ms$|created|^fresh$")


@dataclass(frozen=True)
class Place:
    """Folders: `now` is where the disturbed program works, under one path, since results name it; `inputs` what it
    reads, `wanted` what it should leave."""

    home: Path
    teacher: str = ""

    @property
    def now(self) -> Path:
        """Where a program works."""
        return self.home / "now"

    @property
    def out(self) -> Path:
        """What it writes."""
        return self.now / "out"

    @property
    def inputs(self) -> Path:
        """What it reads."""
        return self.home / "inputs"

    @property
    def wanted(self) -> Path:
        """What undisturbed programs left, by name."""
        return self.home / "wanted"


@dataclass(frozen=True)
class Program:
    """`whole` names the files that are whole whenever they are there, `drop` those that are no result, `own` those that
    it reads or makes, and `codes` are the exit codes of a program that did what it should."""

    name: str
    command: Callable[[Place], list[str]]
    needs: str | None = None
    whole: tuple[str, ...] = ()
    drop: str = r"(^|/)\.|\.failed$|^log\.jsonl$|-old-\d+/"
    own: str = ""
    codes: tuple[int, ...] = (0,)

    def prepare(self, place: Place) -> None:
        """Put what the program goes on from where it works."""
        if self.needs == "align":
            shutil.copytree(place.wanted / self.needs, place.out)

    def results(self, out: Path) -> dict[str, str]:
        """The files that must be as in an undisturbed run, without what may differ from one time to the next."""
        paths = (path for path in sorted(out.rglob("*")) if path.is_file())
        names = {path: path.relative_to(out).as_posix() for path in paths}
        return {name: steady(path) for path, name in names.items() if not re.search(self.drop, name)}


def steady(path: Path) -> str:
    """A file's content without times, and without the --fresh that a cure may be."""
    if path.name in ("run.json", "bundle.json"):
        return json.dumps(_steady(json.loads(path.read_text(encoding="utf-8"))))
    if path.name == "raw.jsonl":
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        kept = ("variant", "part", "id", "question", "score", "key", "text", "n_tokens", "finish_reason", "error")
        return "\n".join(json.dumps({name: row.get(name) for name in kept}) for row in rows)
    if path.name == "report.json":
        report = json.loads(path.read_text(encoding="utf-8"))
        known = ("name", "engine", "accuracy", "kinds", "errors", "failed", "gap_closed")
        return json.dumps([[one.get(name) for name in known] for one in report["variants"]])
    if path.name in ("report.html", "report.md", "measured.json", "answers.jsonl", "latency.jsonl", "stderr.log"):
        return "there"  # full of times; what was asked is in raw.jsonl
    return path.read_bytes().hex()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if not UNSTEADY.search(key)}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def write_inputs(place: Place) -> None:
    """The unlabeled pictures, and the labelled test."""
    from mpa_edge.benchmarks.reference import write_pool, write_test  # `ask` starts a thousand times without it

    write_pool(place.inputs / "pool", PICTURES)
    write_test(place.inputs / "test", QUESTIONS)


def environment() -> dict[str, str]:
    """Ours, one thread, and no key."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if not name.endswith("API_KEY")}
    return {**kept, **one, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _tool(*words: object) -> list[str]:
    return [sys.executable, "-m", "mpa_edge.cli", *map(str, words)]


def _align_flags(place: Place, teacher: object, student: object) -> list[str]:
    flags = ("--images", place.inputs / "pool", "--teacher", teacher, "--student", student, "--task", "reference")
    return [*map(str, flags), "--out", str(place.out), "--device", "cpu", "--select", "all", *CHUNK]


def _ask(place: Place) -> list[str]:
    flags = _align_flags(place, place.teacher, "fake:?seed=1")
    return [sys.executable, "-m", "mpa_edge.benchmarks.fault_programs", *flags, "--concurrency", "4"]


def _align(place: Place) -> list[str]:
    flags = _align_flags(place, REFERENCE / "teacher", REFERENCE / "student")
    return _tool("align", *flags, "--questions", 1, "--epochs", 3, "--train-batch-size", 4)


def _export(place: Place) -> list[str]:
    return _tool("export", place.out, "--format", "gguf", "--quant", "q8_0")


def _bench(place: Place) -> list[str]:
    data = place.inputs / "test" / "test.jsonl"
    flags = ("--data", data, "--report", place.out, "--task", "reference", "--latency-n", 3, "--threads", 1)
    fake = f"teacher=fake:?known={data}&right=0.9&vision=5"
    bundle = place.wanted / "export" / "bundles" / "gguf-q8_0"
    return _tool("bench", bundle, "--baseline", fake, *flags, "--keep-timings")


PARTS = ("annotations/part-*.jsonl", "cases/part-*.jsonl", "samples.jsonl")
PROGRAMS = {
    "ask": Program("ask", _ask, whole=PARTS),
    "align": Program("align", _align, whole=(*PARTS, "student/metrics.json", "parity.jsonl")),
    "export": Program(
        "export", _export, needs="align", whole=("bundles/gguf-q8_0/*", "merged/*"), own=r"^(bundles|merged|student)/"
    ),
    "bench": Program("bench", _bench, needs="export", whole=("raw.jsonl",), codes=(0, 3, 4)),
}

app = typer.Typer(add_completion=False)


@app.command()
@options_of(AlignConfig)
def ask(**options: Any) -> None:
    """Make a training set, as `mpa-edge align` does."""
    from mpa_edge.chat_vlm import ChatVlm
    from mpa_edge.training_set import make_training_set

    config = AlignConfig(**given(options))
    with edge.resumable():
        settings = {"concurrency": config.concurrency, "timeout": TIMEOUT, "max_retries": RETRIES}
        made = make_training_set(config, ChatVlm.load(config.teacher, **settings), open_vlm(config.student))
        typer.echo(f"{made.annotations} annotations, {sum(made.counts.training.values())} training rows")


if __name__ == "__main__":
    edge.run_and_leave(app)
