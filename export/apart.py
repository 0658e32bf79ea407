"""A model's float32 graphs, made in a process of its own: what torch's and OpenVINO's exporters keep of a model that
they have exported ends with it, about 0.7 GB of SmolVLM-500M's, and is not beside what the next step takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from mpa_edge import errors
from mpa_edge.errors import ExportError, MpaEdgeError
from mpa_edge.orphan import end_with_whoever_started_us

# How a process ends that was killed for want of memory, on Linux and in a container.
KILLED = (-9, 137)


def export_apart(module: str, merged: Path, folder: Path) -> dict[str, float]:
    """`export_graphs(merged, folder)` of `module`, called in another process; raises what that raises, and
    `ExportError` with its last words where it comes to another end."""
    command = [sys.executable, "-m", "mpa_edge.export.apart", module, str(merged), str(folder)]
    # Nothing is written to its input: it tells the other process that this one is gone, however that came.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of processes that can be ended together
    ) as process:
        assert process.stdout is not None
        said = deque((line.strip() for line in process.stdout if line.strip()), maxlen=1)
    if process.returncode:
        raise _end_of(process.returncode, said)
    answer = json.loads(said.pop())
    if "error" in answer:
        raise _error(answer["error"], answer["message"])
    differences: dict[str, float] = answer
    return differences


def _end_of(code: int, said: Iterable[str]) -> ExportError:
    if code in KILLED:
        return ExportError("the process that exports the model's graphs was killed; was there not enough memory?")
    return ExportError(f"the model's graphs could not be exported: {next(iter(said), f'exit code {code}')}")


def _error(name: str, message: str) -> MpaEdgeError:
    """An error of ours by its name, without the other things that some hold."""
    kind: type[MpaEdgeError] = getattr(errors, name)
    error = kind.__new__(kind, message)
    error.args = (message,)
    return error


def main(module: str, merged: str, folder: str) -> None:
    """The other process' part: one line of JSON, with the differences or with an error of ours."""
    end_with_whoever_started_us(group=True)
    try:
        answer: dict[str, object] = import_module(module).export_graphs(Path(merged), Path(folder))
    except MpaEdgeError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # all is said: what torch and OpenVINO do as they are torn down is not waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
