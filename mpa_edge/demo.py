"""The whole road on the reference pair, offline: pictures, align, export, bench, report.

The pictures for alignment carry no labels. The labelled test is written before the benchmark and read by it alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mpa_edge.bundle import MANIFEST, read_bundle
from mpa_edge.config import AlignConfig
from mpa_edge.digests import digest_of_adapter
from mpa_edge.errors import BundleError, InputError, require
from mpa_edge.records import write_atomic

# One library of each extra; without them the demo would stop in the middle.
LIBRARIES = ("torch", "transformers", "peft", "rapidfuzz", "matplotlib", "gguf", "onnx", "onnxruntime", "llama_cpp")
PICTURES = 1500
QUESTIONS = 1500
TIMED = 100
BUNDLES: dict[Literal["gguf", "onnx"], tuple[str, ...]] = {
    "gguf": ("f16", "q8_0", "q4_k_m"),
    "onnx": ("fp32", "int8", "q4"),
}


@dataclass
class Steps:
    """The steps' headings and times on the console."""

    console: Console
    of: int
    taken: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, about: str) -> Iterator[Callable[[str], None]]:
        """Announce a step, and say how long it took; the body may say more."""
        self.console.print(f"[bold]{len(self.taken) + 1}/{self.of} {name}[/bold]  {about}", highlight=False)
        started = time.perf_counter()
        yield lambda line: self.console.print(f"      {line}", style="dim", highlight=False, markup=False)
        self.taken.append((name, time.perf_counter() - started))
        self.console.print(f"      done in {duration(self.taken[-1][1])}", highlight=False)

    def summary(self) -> str:
        """All steps in one line."""
        parts = [f"{name} {duration(seconds)}" for name, seconds in self.taken]
        return f"{', '.join(parts)}; in all {duration(sum(seconds for _, seconds in self.taken))}"


def demo(
    out: Path = Path("runs/demo"),
    *,
    pictures: int = PICTURES,
    questions: int = QUESTIONS,
    teacher: Path | None = None,
    student: Path | None = None,
    bundles: dict[Literal["gguf", "onnx"], tuple[str, ...]] | None = None,
    settings: dict[str, Any] | None = None,
    fresh: bool = False,
    threads: int | None = None,
    console: Console | None = None,
) -> Path:
    """Go the whole road and return the path of report.json; beside it lie report.html and report.md.

    `out` becomes a run folder with the pictures, the bundles and the report in it. What is done is not done again, so
    a second call ends in seconds and an interrupted one goes on. The models are the reference pair by default;
    `settings` are fields of `AlignConfig`; `fresh` starts over. Raises `InputError` where the reference pair is not
    installed.
    """
    require("all", LIBRARIES)
    from mpa_edge.benchmarks import reference

    teacher, student = teacher or reference.TEACHER, student or reference.STUDENT
    for folder in (teacher, student):
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds no model: the reference pair is not installed")
    if fresh:
        clear(out)
    steps = Steps(console or Console(), of=4)
    quants = bundles or BUNDLES
    given: dict[str, Any] = {
        "images": str(out / "pictures"),
        "out": out,
        "teacher": str(teacher),
        "student": str(student),
        "fresh": fresh,
    }
    config = AlignConfig(**given | {"task": "reference"} | (settings or {}))
    with steps.step("pictures", f"{pictures:,} without labels, and {questions:,} with, for the benchmark alone"):
        write_pictures(out, pictures, questions)
    with steps.step("align", "what the teacher knows and the student does not, without labels") as tell:
        from mpa_edge.align import align

        result = align(config)
        for line in result.summary().splitlines()[:-1]:
            tell(line)
    with steps.step("export", ", ".join(f"{kind} {' '.join(names)}" for kind, names in quants.items())) as tell:
        folders = [path for kind, names in quants.items() for path in export_missing(out, kind, names, tell)]
    with steps.step("bench", f"{questions:,} questions for each of {3 + len(folders)} variants"):
        path = measure(out, teacher, student, result.adapter, folders, threads)
    show(steps, path)
    return path


def clear(out: Path) -> None:
    """Delete what a demo put beside its run; the run's own stages are cleared by `align`."""
    for name in ("pictures.json", "merged.json"):
        (out / name).unlink(missing_ok=True)
    for name in ("pictures", "test", "merged", "bundles", "report"):
        shutil.rmtree(out / name, ignore_errors=True)


def write_pictures(out: Path, pictures: int, questions: int) -> None:
    """Draw the pool and the labelled test, unless they are there; a note written last says that they are whole."""
    from mpa_edge.benchmarks.reference import write_pool, write_test

    note, wanted = out / "pictures.json", {"pictures": pictures, "questions": questions}
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return
    write_pool(out / "pictures", pictures)
    write_test(out / "test", questions)
    write_atomic(note, json.dumps(wanted) + "\n")


def export_missing(
    run: Path, kind: Literal["gguf", "onnx"], quants: Sequence[str], tell: Callable[[str], None]
) -> list[Path]:
    """The bundles' folders; those of another adapter, or not there, are made."""
    from mpa_edge.export.build import export

    adapter = digest_of_adapter(run / "student")
    folders = {quant: run / "bundles" / f"{kind}-{quant}" for quant in quants}
    missing = [quant for quant, folder in folders.items() if not is_of(folder, adapter)]
    if missing:
        export(run, kind, missing, progress=tell)
    return list(folders.values())


def is_of(folder: Path, adapter: str) -> bool:
    """Whether a whole bundle of this adapter lies there."""
    try:
        return (folder / MANIFEST).is_file() and read_bundle(folder).source.adapter_sha256 == adapter
    except BundleError:
        return False


def measure(
    out: Path, teacher: Path, student: Path, adapter: Path, folders: Sequence[Path], threads: int | None
) -> Path:
    """The benchmark of everything on the road."""
    from mpa_edge.benchmarks.bench import BenchConfig, bench

    return bench(
        BenchConfig(
            data=(out / "test" / "test.jsonl",),
            name="reference test",
            bundles=tuple(map(str, folders)),
            baselines=(f"teacher={teacher}", f"student={student}", f"aligned={adapter}"),
            task="reference",
            report=out / "report",
            latency_n=TIMED,
            threads=None if threads is None else str(threads),
            keep_timings=True,  # a second call ends in seconds, whatever else the machine did during the first
        )
    )


def show(steps: Steps, path: Path) -> None:
    """The table, the verdict, the times, and where to look."""
    from mpa_edge.benchmarks.report import console_table

    report = json.loads(path.read_text(encoding="utf-8"))
    print_ = steps.console.print
    print_()
    print_(console_table(report))
    verdict = report["verdict"]
    print_(f"\n[bold]{verdict['headline']}.[/bold] {verdict['summary'] or ''}", highlight=False)
    for reason in verdict["reasons"]:
        print_(f"  {reason}", highlight=False, markup=False)
    print_(f"\n{steps.summary()}", style="dim", highlight=False)


def duration(seconds: float) -> str:
    """4.2 s, 73 s, 3:05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
