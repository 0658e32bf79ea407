"""The same command once more, in several processes that share the training: what `accelerate launch` does, with the
configurations that lie in `accelerate_configs/`.

    ddp          each process has the whole student
    fsdp         each has a share of it (`mpa_edge.sharding`)
    deepspeed    each has the whole student, and a share of its optimizer (`mpa_edge.zero`)

For several machines, give these files to `accelerate launch --config_file … --num_machines …` yourself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpa_edge.config import AlignConfig
from mpa_edge.errors import InputError, require
from mpa_edge.ranks import launched

CONFIGS = Path(__file__).parent / "accelerate_configs"


def relaunch_if_wanted(config: AlignConfig, arguments: Sequence[str]) -> None:
    """Become the launcher of several processes with the same arguments, where `--accelerate` asks for it and this is
    none of them. Returns otherwise. `InputError` where it is not said how many, and the machine does not tell."""
    if config.processes and config.accelerate is None:
        raise InputError("--processes goes with --accelerate ddp, fsdp or deepspeed")
    if config.accelerate is None or launched() > 1:
        return
    require("align", ("torch", "accelerate"))
    if config.accelerate == "deepspeed":
        require("deepspeed", ["deepspeed"])
    count = config.processes or _gpus(config)
    if count > 1:
        _become(command(config.accelerate, count, arguments))


def command(kind: str, count: int, arguments: Sequence[str]) -> list[str]:
    """The command line of so many processes; a free port joins them."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", os.fspath(CONFIGS / f"{kind}.yaml")]
    return [*launch, f"--num_processes={count}", "--main_process_port=0", "-m", "mpa_edge.cli", *arguments]


def _gpus(config: AlignConfig) -> int:
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        raise InputError(f"--accelerate {config.accelerate}: there is no GPU to count; say how many with --processes")
    return torch.cuda.device_count()


def _become(command: Sequence[str]) -> NoReturn:
    sys.stderr.flush()
    os.execv(command[0], list(command))
