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

import pytest

_CONTEXT = get_context("forkserver")
# What is not installed is passed over.
_CONTEXT.set_forkserver_preload(
    ["torch", "peft", "mpa_edge.align", "mpa_edge.level", "onnxruntime_genai.models.builder"]
)


def start(command: Sequence[str], log: Path) -> ForkServerProcess:
    """Run `[sys.executable, "-c", code, *arguments]` or `[sys.executable, "-m", module, *arguments]`, with stdout and
    stderr in `log`."""
    return _started(command, {}, Path.cwd(), log, log)


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, **_: Any
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured as text; `env` is laid over the environment as it was when the first
    of these processes began, and what a library reads of it at its import, it has read."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _started(command, env or {}, cwd or Path.cwd(), out, err)
        process.join()
        said = [path.read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(command, process.exitcode or 0, *said)


def _started(command: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> ForkServerProcess:
    for path in (out, err):
        path.write_bytes(b"")
    process = _CONTEXT.Process(target=_become, args=(command[1:], dict(env), cwd, out, err), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # the server imports what reads it
        process.start()
    return process


def _become(command: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> None:
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
