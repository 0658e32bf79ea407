"""Processes that begin with torch in memory: forked from one that has imported it, which takes others 5 to 9 seconds of
a core. They have that one's hash seed; a test of what must not depend on it starts a fresh process beside them.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = get_context("forkserver")
# What is not installed is passed over.
_CONTEXT.set_forkserver_preload(
    ["torch", "peft", "mpa_edge.align", "mpa_edge.level", "onnxruntime_genai.models.builder"]
)


def start(command: Sequence[str], env: Mapping[str, str] | None = None, log: Path | None = None) -> ForkServerProcess:
    """Run `[sys.executable, "-c", code, *arguments]` or `[sys.executable, "-m", module, *arguments]`, with stdout and
    stderr in `log`."""
    process = _CONTEXT.Process(target=_become, args=(command[1:], dict(env or {}), log), daemon=True)
    process.start()
    return process


def run(command: Sequence[str], *, env: Mapping[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured; stdout and stderr come as one, as the latter."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start(command, env, log)
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0, "", log.read_text(errors="replace"))


def _become(command: Sequence[str], env: Mapping[str, str], log: Path | None) -> None:
    os.environ.update(env)
    if log:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
