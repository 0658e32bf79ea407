"""llama.cpp's own program for pictures, `llama-mtmd-cli`, on a bundle's pair of GGUF files."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from mpa_edge.bundle import read_bundle

NAME = "llama-mtmd-cli"
# Its own counters: `eval time = 381.76 ms / 39 runs`, sampling left out.
EVALUATED = re.compile(r": +eval time = +([\d.]+) ms / +(\d+) runs")
LIMIT = 600  # seconds


def find(path: Path | None) -> Path | None:
    """The program at this path, or where the shell would find it."""
    found = str(path) if path else shutil.which(NAME)
    return Path(found) if found and shutil.which(found) else None


def measure(program: Path, folder: Path, picture: Path, question: str, *, tokens: int, threads: int) -> dict[str, Any]:
    """Run it once for a long answer: the seconds of the whole process, and its rate of decoding. `reason` instead
    where it fails; `note` where it needed to be kept from weights in layouts of its own."""
    bundle = read_bundle(folder)
    command = [str(program), "-m", str(bundle.path_of(folder, "language_model"))]
    command += ["--mmproj", str(bundle.path_of(folder, "mmproj")), "--image", str(picture), "-p", question]
    command += ["--temp", "0", "-n", str(tokens), "--ignore-eos", "-t", str(threads), "--perf", "-lv", "4"]
    found = _run(command)
    if "reason" in found:
        found = _run([*command, "--no-repack"]) | {"note": f"without --no-repack: {found['reason']}"}
    return found


def _run(command: list[str]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, text=True, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"reason": str(error)}
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        return {"reason": f"exit code {done.returncode}"}
    rate = EVALUATED.search(done.stdout + done.stderr)
    if not rate:
        return {"reason": "it does not tell its rate"}
    return {"whole_s": round(seconds, 3), "decode_per_s": round(int(rate[2]) / float(rate[1]) * 1000, 2)}
