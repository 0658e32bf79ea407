"""What a large run takes besides the models: memory and seconds for 100,000 pictures, and the seconds of a resume.

    python -m mpa_edge.benchmarks.scale                    writes benchmarks/results/scale.json

The models are fakes, which answer at once; pictures are scanned, opened, asked about, compared, selected and written as
in any run, up to the training set. Each figure is of a process of its own. `rss_mb` is the process's peak resident
memory, `imported_mb` what it was before it did anything, and `cpu_seconds`, imports and all, are what other work on the
machine does not stretch.
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
from typing import Annotated, Any

import typer
from PIL import Image

from mpa_edge.benchmarks.host import host
from mpa_edge.config import AlignConfig
from mpa_edge.fake import WORDS, FakeVlm
from mpa_edge.records import write_atomic
from mpa_edge.runtime.vlm import GREEDY, Answer, Decoding
from mpa_edge.tasks import task_named
from mpa_edge.training_set import make_training_set

SIZES = (10_000, 50_000, 100_000)
TASK = "reference"
EDGE = 12
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
        red, green, blue = image.convert("RGB").tobytes()[:3]
        return Answer(f"What stands at {red} {green} {blue}? {WORDS[red % len(WORDS)]}")

    def _answered(self, image: Image.Image, prompt: str) -> Answer:
        red, green, _ = image.convert("RGB").tobytes()[:3]
        return Answer(WORDS[(red if green > 50 else green) % len(WORDS)])


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of pictures and runs.")] = Path("runs/scale"),
    sizes: Annotated[
        list[int] | None, typer.Option(help="Pictures; repeat for several.", show_default=str(SIZES))
    ] = None,
    results: Annotated[Path, typer.Option(help="The file to write.")] = RESULTS,
    one: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure each size, first and resumed, and write the figures."""
    if one is not None:
        typer.echo(json.dumps(measure(out, one)))
        return
    counts = sizes or list(SIZES)
    write_pictures(out / "pictures", max(counts))
    rows = []
    for count in counts:
        first, resumed = _in_a_process(out, count), _in_a_process(out, count)
        rows.append({"pictures": count, "first": first, "resumed": resumed})
        typer.echo(
            f"{count:,} pictures: {first['rss_mb']} MB, {first['seconds']} s ({first['cpu_seconds']} s of CPU); "
            f"resumed in {resumed['seconds']} s ({resumed['cpu_seconds']} s of CPU)"
        )
    write_atomic(results, json.dumps(_report(rows), indent=1) + "\n")


def measure(out: Path, count: int) -> dict[str, Any]:
    """One run in this process."""
    imported = _rss_mb()
    names = (out / "pictures" / _name(number) for number in range(count))
    write_atomic(out / f"{count}.txt", "".join(f"{name.absolute()}\n" for name in names))
    config = AlignConfig(
        images=str(out / f"{count}.txt"),
        teacher="fake:",
        student="fake:",
        task=TASK,
        out=out / f"run-{count}",
        questions=1,
    )
    start = time.perf_counter()
    made = make_training_set(config, Writer(), FakeVlm())
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "rss_mb": _rss_mb(),
        "imported_mb": imported,
        "verdicts": made.counts.verdicts,
        "training_rows": sum(made.counts.training.values()),
    }


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of noise, each another one; those that are there are kept."""
    for number in range(count):
        path = folder / _name(number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (EDGE, EDGE), random.Random(number).randbytes(3 * EDGE * EDGE)).save(path)


def _name(number: int) -> str:
    return f"{number // 1000:03d}/{number:06d}.png"


def _in_a_process(out: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "mpa_edge.benchmarks.scale", "--out", str(out), "--one", str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rss_mb() -> float:
    """The peak so far; the system counts in kilobytes, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024), 1)


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    least, most = rows[0], rows[-1]
    more = most["first"]["rss_mb"] - least["first"]["rss_mb"]
    pictures = most["pictures"] - least["pictures"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "host": host(),
        "load_at_end": os.getloadavg()[0],
        "rows": rows,
        "ratios": {
            "rss_most_to_least": round(most["first"]["rss_mb"] / least["first"]["rss_mb"], 2),
            "bytes_per_picture": round(more * 1e6 / pictures) if pictures else None,
            "resume_to_first_cpu": round(most["resumed"]["cpu_seconds"] / most["first"]["cpu_seconds"], 3),
        },
    }


if __name__ == "__main__":
    app()
