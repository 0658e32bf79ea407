"""What an export costs: the most memory that it ever takes, by the size of the model, and the seconds of each step.

    python -m mpa_edge.benchmarks.export_cost              writes benchmarks/results/export_cost.json

Models have the true dimensions of SmolVLM-500M and Qwen2-VL-2B and random weights in bfloat16 (see `export_models`).
Each export is of a run with an adapter, from merge to verified bundles, in a process of its own, which is looked at
twenty times a second together with its children. `anonymous` memory is what the process made itself. `rss` is all that
is resident, which counts pages of files that are mapped: the system takes those back when it needs them. `ratios` are
the peaks over the size of the model's weights on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from mpa_edge.benchmarks.export_models import MODELS, write_run
from mpa_edge.benchmarks.host import host
from mpa_edge.errors import ExportError
from mpa_edge.export.quants import Format
from mpa_edge.records import write_atomic

OUT = Path(__file__).parent / "results" / "export_cost.json"
QUANTS: dict[Format, list[str]] = {"gguf": ["q8_0", "q4_k_m"], "onnx": ["q4"], "openvino": ["int8"], "hf": []}
SAMPLES = 4
INTERVAL = 0.05
STATUS = {"rss": "VmRSS", "anonymous": "RssAnon"}

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder for models and bundles; emptied after.")] = Path("runs/cost"),
    out: Annotated[
        Path, typer.Option(help="Where the result goes; models that are not asked for stay in it.", show_default=False)
    ] = OUT,
    only: Annotated[str, typer.Option(help="The models whose name holds this text.")] = "",
    formats: Annotated[str, typer.Option(help="Formats to export to.")] = ",".join(QUANTS),
    make: Annotated[str, typer.Option(hidden=True)] = "",
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure and write the result."""
    if make:
        write_run(make, work)
        return
    if one in QUANTS:
        _export(work, one)
        return
    report = json.loads(out.read_bytes()) if out.is_file() else {"models": {}}
    for name in MODELS:
        if only in name:
            found = measure_model(name, work / name, [format for format in QUANTS if format in formats.split(",")])
            kept = report["models"].get(name, {}).get("exports", {})
            report["models"][name] = {**found, "exports": {**kept, **found["exports"]}}
            write_atomic(out, json.dumps(_report(report["models"]), indent=2) + "\n")


def measure_model(name: str, run: Path, formats: list[Format]) -> dict[str, Any]:
    """Make the model, and export it to each format."""
    base = run.with_name(f"{run.name}-base")
    subprocess.run(_command(run, "--make", name), check=True)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    exports = {}
    try:
        for format in formats:
            shutil.rmtree(run / "merged", ignore_errors=True)
            exports[format] = {"quants": QUANTS[format], **watch(_command(run, "--one", format))}
            peaks = {kind: round(exports[format]["peak_mb"][kind] * 1e6 / size, 2) for kind in STATUS}
            typer.echo(f"{name} to {format}: {peaks} of {size / 1e6:.0f} MB; {exports[format]}")
    finally:
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(base, ignore_errors=True)
    return {"source_mb": round(size / 1e6, 1), "samples": SAMPLES, "exports": exports}


def watch(command: list[str]) -> dict[str, Any]:
    """Run an export; its peaks in MB, over all and by step, and the seconds of each step."""
    start, seconds = time.perf_counter(), {}
    peaks: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(STATUS, 0.0))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        step, done = ["start"], threading.Event()
        looking = threading.Thread(target=_look, args=(process.pid, step, peaks, done))
        looking.start()
        said = ""
        for line in process.stdout:
            said = line.strip() or said
            if begun := re.fullmatch(r"(.+) …", said):
                step[0] = begun[1]
            elif ended := re.fullmatch(r"(.+): ([\d.]+) s", said):
                seconds[ended[1]] = float(ended[2])
        done.set()
        looking.join()
    return {
        "outcome": said,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": {kind: max(peak[kind] for peak in peaks.values()) for kind in STATUS},
        "steps": {name: {"seconds": seconds.get(name), **peak} for name, peak in peaks.items()},
    }


def _look(process: int, step: list[str], peaks: dict[str, dict[str, float]], done: threading.Event) -> None:
    import psutil

    while not done.wait(INTERVAL):
        try:
            root = psutil.Process(process)
            found = [_memory_mb(each.pid) for each in (root, *root.children(recursive=True))]
        except (psutil.Error, OSError):
            continue
        for kind in STATUS:
            total = round(sum(memory[kind] for memory in found), 1)
            peaks[step[0]][kind] = max(peaks[step[0]][kind], total)


def _memory_mb(process: int) -> dict[str, float]:
    """Resident memory of a process now; Linux only, since nothing else tells its anonymous part."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = {key: value for key, _, value in (line.partition(":") for line in lines)}
    # A process that has just ended has none.
    return {kind: int(values.get(name, "0 kB").split()[0]) * 1024 / 1e6 for kind, name in STATUS.items()}


def _export(run: Path, format: Format) -> None:
    """An export in this process."""
    from mpa_edge.export.build import export

    try:
        export(run, format, QUANTS[format], samples=SAMPLES, progress=typer.echo)
        typer.echo("whole")
    except ExportError as error:
        typer.echo(f"failed: {error}")


def _command(run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "mpa_edge.benchmarks.export_cost", "--work", str(run), *options]


def _report(models: dict[str, Any]) -> dict[str, Any]:
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.export_cost",
        "host": host(),
        "load_at_end": os.getloadavg()[0],
        "ratios": {
            name: {
                format: {kind: round(made["peak_mb"][kind] / model["source_mb"], 2) for kind in STATUS}
                for format, made in model["exports"].items()
            }
            for name, model in models.items()
        },
        "models": models,
    }


if __name__ == "__main__":
    app()
