"""What `pip install mpa-edge[gguf]` and `[onnx]` take: disk, the time to import and to load, and memory.

    python -m mpa_edge.benchmarks.footprint                writes benchmarks/results/footprint.json

Each extra is installed into a virtual environment of its own (from the package index; llama-cpp-python is compiled
unless pip has its wheel) and asked about the reference student's bundle, in fresh processes whose medians are given.
`installed_mb` is what the installation adds to an empty environment, byte code included; `rss_mb` the resident memory
of the process after each step; `heavy` the training side's modules that got imported: there should be none. `ask_s` is
`mpa-edge ask` from the shell to the end of its process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from mpa_edge.benchmarks.footprint_probe import HEAVY, QUESTION
from mpa_edge.benchmarks.host import host
from mpa_edge.benchmarks.reference import STUDENT, write_pool
from mpa_edge.benchmarks.runtime_bundles import write_bundles
from mpa_edge.bundle import MANIFEST
from mpa_edge.records import write_atomic

OUT = Path(__file__).parent / "results" / "footprint.json"
QUANTS = {"gguf": ("q8_0",), "onnx": ("int8",)}
ROOT = Path(__file__).parent.parent
PROBE = "mpa_edge.benchmarks.footprint_probe"
LARGEST = 6
# Left out of the copy that is built: what is no source, and what a build here would leave behind.
IGNORED = (".git", ".venv", ".typecheck", "runs", "build", "dist", "*.egg-info", "__pycache__", "node_modules", "tests")


def main(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = OUT,
    package: Annotated[
        str | None, typer.Option(help="What to install: a wheel, or a requirement. Default: this source tree.")
    ] = None,
    bundles: Annotated[
        Path | None,
        typer.Option(help="A folder with gguf-q8_0 and onnx-int8 bundles. Default: the reference student's."),
    ] = None,
    extra: Annotated[list[str] | None, typer.Option(help="gguf or onnx; repeat for both. Default: both.")] = None,
    repeats: Annotated[int, typer.Option(help="Processes of each kind.", min=1)] = 5,
) -> None:
    """Install, measure and write the result."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wanted = package or str(_wheel(folder))
        picture = write_pool(folder / "pictures", 1)[0]
        for name in extra or list(QUANTS):
            if name not in QUANTS:
                raise typer.BadParameter(f"{name}: known are {', '.join(QUANTS)}", param_hint="--extra")
            made = _bundle(name, bundles, folder)
            found[name] = {"bundle": made.name, **measure(name, wanted, folder / name, made, picture, repeats)}
            typer.echo(f"[{name}]: {json.dumps(found[name])}")
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m mpa_edge.benchmarks.footprint",
        "host": host(),
        "load": round(os.getloadavg()[0], 2),
        "extras": found,
    }
    write_atomic(out, json.dumps(result, indent=2) + "\n")


def measure(extra: str, package: str, folder: Path, bundle: Path, picture: Path, repeats: int) -> dict[str, Any]:
    """One extra in a new environment in `folder`."""
    venv.create(folder, with_pip=True)
    site = next(folder.glob("lib/python*/site-packages"))
    before = sizes(site)
    python = folder / "bin" / "python"
    _run([str(python), "-m", "pip", "install", "--quiet", f"{package}[{extra}]"])
    added = {name: size - before.get(name, 0) for name, size in sizes(site).items() if size != before.get(name, 0)}
    probes = _times(repeats, lambda: json.loads(_run([str(python), "-I", "-m", PROBE, str(bundle), str(picture)])))
    ask = [str(folder / "bin" / "mpa-edge"), "ask", str(bundle), str(picture), QUESTION]
    return {
        "installed_mb": round(sum(added.values()) / 1e6, 1),
        "largest_mb": {name: round(added[name] / 1e6, 1) for name in sorted(added, key=lambda n: -added[n])[:LARGEST]},
        "installed_heavy": sorted(set(HEAVY) & added.keys()),
        "imported_heavy": sorted({name for row in probes for name in row["heavy"]}),
        "seconds": _medians([row["seconds"] for row in probes]),
        "rss_mb": _medians([row["rss_mb"] for row in probes]),
        "ask_s": round(median(_times(repeats, lambda: _seconds(ask))), 3),
        "raw": probes,
    }


def sizes(site: Path) -> dict[str, int]:
    """Bytes of each file and folder right inside a folder, by name."""
    return {
        path.name: sum(
            file.lstat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()
        )
        for path in site.iterdir()
    }


def _wheel(folder: Path) -> Path:
    """This source tree as a wheel, built from a copy so that nothing is written here."""
    if not (ROOT / "pyproject.toml").is_file():
        raise typer.BadParameter("this is no source tree; name what to install", param_hint="--package")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*IGNORED))
    _run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(folder / "tree")]
    )
    return next(folder.glob("*.whl"))


def _bundle(extra: str, bundles: Path | None, folder: Path) -> Path:
    if bundles is None:
        return next(iter(write_bundles(STUDENT, folder / "bundles", {extra: QUANTS[extra]}).values()))
    made = bundles / f"{extra}-{QUANTS[extra][0]}"
    if not (made / MANIFEST).is_file():
        raise typer.BadParameter(f"no {made.name} in {bundles}", param_hint="--bundles")
    return made


def _times(repeats: int, once: Callable[[], Any]) -> list[Any]:
    """The results of some calls; a call before them warms the file cache up."""
    once()
    return [once() for _ in range(repeats)]


def _medians(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    columns = {name: [value for row in rows if (value := row[name]) is not None] for name in rows[0]}
    return {name: round(median(values), 4) if values else None for name, values in columns.items()}


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    _run(command)
    return time.perf_counter() - start


def _run(command: list[str]) -> str:
    """Its output. What it said is told where it fails; nothing of this environment leaks into the other."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
