"""What a large run takes besides its models: memory, time and disk for 1,000 to 1,000,000 pictures, and for a resume.

    python -m mpa_edge.benchmarks.scale                    writes benchmarks/results/scale.json
    python -m mpa_edge.benchmarks.scale --cost             the table and the model of cost, from that file

The models are fakes, which answer at once; pictures are scanned, opened, asked about (one question each), compared,
selected and written as in any run, up to the training set; then the audit page is written. Each figure is of a process
of its own: `peak_rss_mb` is the most resident memory it ever had, `imported_mb` what it was before it did anything.
`us_per_row` are microseconds of CPU for a picture with its question up to the training set, fakes included;
`opening_us` of them go to opening the picture four times (scan, teacher, teacher, student), which a photo takes
milliseconds for and a model that sees it far more. CPU seconds are what other work on the machine stretches least, so
both they and those of the clock are given.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from PIL import Image

from mpa_edge.audit import audit_run
from mpa_edge.benchmarks.host import host
from mpa_edge.benchmarks.scale_cost import CostModel
from mpa_edge.config import AlignConfig
from mpa_edge.fake import WORDS, FakeVlm
from mpa_edge.records import write_atomic
from mpa_edge.runtime.images import open_image
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.tasks import task_named
from mpa_edge.training_set import make_training_set

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TASK = "reference"
EDGE = 12
# Times that a run opens each picture.
OPENED = 4
RESULTS = Path(__file__).parent / "results" / "scale.json"

app = typer.Typer(add_completion=False, help=__doc__)


class Writer(FakeVlm):
    """A teacher that writes one question about each picture and knows the answer most of the time."""

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer one prompt per picture, in order."""
        asks = task_named(TASK).annotate_prompts
        return [
            self._written(image) if prompt in asks else self._answered(image, prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def _written(self, image: Image.Image) -> Answer:
        red, green, blue = _corner(image)
        return Answer(f"What stands at {red} {green} {blue}? {WORDS[red % len(WORDS)]}")

    def _answered(self, image: Image.Image, prompt: str) -> Answer:
        red, green, _ = _corner(image)
        return Answer(WORDS[(red if green > 50 else green) % len(WORDS)])


class Guesser(FakeVlm):
    """A student that is sometimes right."""

    def answer(
        self, images: Sequence[Image.Image], prompts: Sequence[str], decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer one prompt per picture, in order."""
        return [Answer(WORDS[_corner(image)[2] % len(WORDS)]) for image in images]


def _corner(image: Image.Image) -> tuple[int, int, int]:
    return cast("tuple[int, int, int]", image.getpixel((0, 0)))


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of pictures and runs.")] = Path("runs/scale"),
    sizes: Annotated[
        list[int] | None, typer.Option(help="Pictures; repeat for several.", show_default=str(SIZES))
    ] = None,
    results: Annotated[Path, typer.Option(help="The file to write.")] = RESULTS,
    cost: Annotated[bool, typer.Option("--cost", help="Only print the table and the model of cost.")] = False,
    one: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure each size, first and resumed, and write the figures after each; those of other sizes are kept."""
    if one is not None:
        typer.echo(json.dumps(measure(out, one)))
        return
    for count in () if cost else sizes or SIZES:
        write_pictures(out / "pictures", count)
        first, resumed = _in_a_process(out, count), _in_a_process(out, count)
        known = _known(results)
        rows = {row["rows"]: row for row in [*known, _row(count, first, resumed, out / f"run-{count}")]}
        write_atomic(results, json.dumps(_report([rows[size] for size in sorted(rows)]), indent=1) + "\n")
    typer.echo(told(json.loads(results.read_text())))


def measure(out: Path, count: int) -> dict[str, Any]:
    """One run in this process."""
    imported = _rss_mb()
    with (out / f"{count}.txt").open("w") as listed:
        listed.writelines(f"{(out / 'pictures' / _name(number)).absolute()}\n" for number in range(count))
    config = AlignConfig(
        images=str(out / f"{count}.txt"),
        teacher="fake:",
        student="fake:",
        task=TASK,
        out=out / f"run-{count}",
        questions=1,
    )
    start, before = time.perf_counter(), time.process_time()
    made = make_training_set(config, Writer(), Guesser())
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - before
    audit_run(config.run)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 2),
        "audit_s": round(time.perf_counter() - start - seconds, 1),
        "opening_us": _opening_us(out / "pictures", min(count, 2000)),
        "peak_rss_mb": _rss_mb(),
        "imported_mb": imported,
        "verdicts": made.counts.verdicts,
        "training_rows": sum(made.counts.training.values()),
    }


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of noise, each another one; those that are there are kept."""
    for number in range(count):
        path = folder / _name(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(b"P6 %d %d 255\n" % (EDGE, EDGE) + random.Random(number).randbytes(3 * EDGE * EDGE))


def _name(number: int) -> str:
    return f"{number // 1000:03d}/{number:06d}.ppm"


def _in_a_process(out: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "mpa_edge.benchmarks.scale", "--out", str(out), "--one", str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rss_mb() -> float:
    """The peak so far; the system counts in kilobytes, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024), 1)


def _opening_us(folder: Path, count: int) -> int:
    before = time.process_time()
    for number in range(count):
        open_image(folder / _name(number))
    return round(OPENED * (time.process_time() - before) / count * 1e6)


def _known(results: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.is_file() else []
    return rows


def _row(count: int, first: dict[str, Any], resumed: dict[str, Any], run: Path) -> dict[str, Any]:
    files = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    parts = [path.stat().st_size for path in run.glob("*/part-*.jsonl")]
    manifests = [path.stat().st_size for path in (run / "run.json", *run.glob("*/stage.json"))]
    return {
        "rows": count,
        "peak_rss_mb": max(first["peak_rss_mb"], resumed["peak_rss_mb"]),
        "us_per_row": round(first["cpu_seconds"] / count * 1e6),
        "opening_us": first["opening_us"],
        "resume_s": resumed["seconds"],
        "resume_cpu_s": resumed["cpu_seconds"],
        "audit_s": first["audit_s"],
        "bytes_per_row": round(sum(files) / count),
        "parts": len(parts),
        "largest_part_kb": round(max(parts) / 1000),
        "manifests_kb": round(sum(manifests) / 1000, 1),
        "first": first,
        "resumed": resumed,
    }


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "host": host(),
        "load_at_end": os.getloadavg()[0],
        "rows": rows,
        "memory_most_to_least": round(rows[-1]["peak_rss_mb"] / rows[0]["peak_rss_mb"], 2),
    }


def told(report: dict[str, Any]) -> str:
    """The table, and the model of cost that follows from the largest run."""
    names = ("rows", "peak MB", "us/row", "opening", "resume s", "audit s", "B/row", "parts")
    keys = ("rows", "peak_rss_mb", "us_per_row", "opening_us", "resume_s", "audit_s", "bytes_per_row", "parts")
    lines = [" ".join(f"{name:>9}" for name in names)]
    lines += [" ".join(f"{row[key]:>9,}" for key in keys) for row in report["rows"]]
    last = report["rows"][-1]
    model = CostModel(us_per_row=last["us_per_row"], bytes_per_row=last["bytes_per_row"])
    lines += [f"memory of the largest to that of the smallest: {report['memory_most_to_least']}", "", *model.lines()]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
