"""Whether a loaded bundle keeps its memory: a thousand different pictures, and what the process holds all the while.

    python -m mpa_edge.benchmarks.soak                     writes benchmarks/results/soak.json

The reference student in GGUF and in ONNX, each in a process of its own. Every picture is another file, of a size of
its own, and asked two questions; `rss_mb` is the process's resident memory after so many pictures, and `growth` what
the last adds to that after the first 50, as a fraction.

Everything is as by default: the runtime keeps features of the last 32 pictures, so that its cache is full long before
the fiftieth, and what grows then is lost.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.benchmarks.host import host, resident_bytes
from mpa_edge.benchmarks.reference import STUDENT
from mpa_edge.benchmarks.runtime_bundles import write_bundles
from mpa_edge.benchmarks.runtime_turns import QUESTIONS, megabytes
from mpa_edge.benchmarks.world import POOL_SEEDS, World, draw_picture
from mpa_edge.records import write_atomic
from mpa_edge.runtime import load

OUT = Path(__file__).parent / "results" / "soak.json"
QUANTS = {"gguf": ("q8_0",), "onnx": ("int8",)}
SETTLED = 50  # pictures after which nothing should grow any more
EVERY = 50
EDGES = (40, 800)  # of the pictures, in pixels

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = OUT,
    bundle: Annotated[
        list[Path] | None, typer.Option(help="A bundle; repeat for several. Default: the reference student's.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Pictures per bundle.", min=SETTLED)] = 1000,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine. Default: all cores.")] = None,
    files: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure each bundle and write the figures."""
    if bundle and files:
        typer.echo(json.dumps(soak(bundle[0], sorted(files.iterdir()), threads=threads)))
        return
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        drawn = write_pictures(Path(scratch) / "pictures", pictures)
        for folder in bundle or write_bundles(STUDENT, Path(scratch), QUANTS).values():
            found.append(_in_a_process(folder, drawn, threads))
            typer.echo(told(found[-1]))
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.soak",
        "host": host(),
        "load": round(os.getloadavg()[0], 2),
        "growth": {row["bundle"]: row["growth"] for row in found},
        "runs": found,
    }
    write_atomic(out, json.dumps(result, indent=2) + "\n")


def soak(folder: Path, pictures: Sequence[Path], *, threads: int | None = None) -> dict[str, Any]:
    """Ask about pictures in this process; `rss_mb` by the number of pictures so far."""
    rss: dict[int, float | None] = {}
    start = time.perf_counter()
    with load(folder, device="cpu", threads=threads) as vlm:
        rss[0] = megabytes(resident_bytes())
        for number, path in enumerate(pictures, 1):
            for question in QUESTIONS:
                vlm.ask(path, question)
            if number % EVERY == 0 or number == len(pictures):
                rss[number] = megabytes(resident_bytes())
    first, last = rss[SETTLED], rss[len(pictures)]
    return {
        "bundle": folder.name,
        "pictures": len(pictures),
        "seconds": round(time.perf_counter() - start, 1),
        "growth": round(last / first - 1, 4) if first and last else None,
        "rss_mb": rss,
    }


def write_pictures(folder: Path, count: int) -> Path:
    """Draw the first pictures of the pool, each in another size; the folder."""
    folder.mkdir()
    for number, seed in enumerate(POOL_SEEDS[:count]):
        rng = random.Random(number)
        image = draw_picture(seed, World.TARGET).image.resize((rng.randint(*EDGES), rng.randint(*EDGES)))
        image.save(folder / f"{number:05d}.jpg")
    return folder


def told(row: dict[str, Any]) -> str:
    """One run in a line, with the curve: `… 0: 80 MB, 50: 91 MB, 100: 91 MB`."""
    curve = ", ".join(f"{number}: {mb:.0f} MB" for number, mb in row["rss_mb"].items() if mb is not None)
    growth = "unknown" if row["growth"] is None else f"{row['growth']:+.1%}"
    return f"{row['bundle']}: {growth} since picture {SETTLED}; {curve}"


def _in_a_process(folder: Path, pictures: Path, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "mpa_edge.benchmarks.soak", "--bundle", str(folder), "--files", str(pictures)]
    command += ["--threads", str(threads)] if threads else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    app()
