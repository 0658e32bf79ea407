"""The processes that share a training, as `accelerate launch` or `torchrun` starts them; usually this one alone.

The main process does everything but the training's steps by itself: it asks the models and writes the files, which the
others must be able to read. Each process takes its share of every step's rows and gradients are summed, so the result
does not depend on the number of processes, up to rounding. Each has the whole student (DDP), or a share of it (FSDP,
`mpa_edge.sharding`), or the whole one and a share of its optimizer (DeepSpeed, `mpa_edge.zero`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")

# The others wait in silence while the main process asks the models.
PATIENCE = timedelta(days=30)


def launched() -> int:
    """How many processes share this run; imports nothing heavy."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Whether the processes were started to hold a share of the student each (FSDP), and not all of it (DDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_zero() -> bool:
    """Whether the processes were started for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def is_main() -> bool:
    """Whether this process is the only one, or the one that does everything but its share of the training."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


class Ranks:
    """This process among those that share a training."""

    def __init__(self, *, cpu: bool) -> None:
        """Meets the other processes, if there are any. On GPUs, each process has its own from now on."""
        self._state: Any = None
        self.count, self.number = 1, 0
        if launched() > 1:
            from accelerate import PartialState

            if is_zero():
                from mpa_edge.zero import prepare

                prepare(cpu=cpu)

            self._state = PartialState(cpu=cpu, timeout=PATIENCE)
            self.count, self.number = self._state.num_processes, self._state.process_index
        self.sharded = self.count > 1 and is_sharded()
        self.zero = self.count > 1 and is_zero()
        self.offload = self.sharded and os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"

    @property
    def together(self) -> bool:
        """Whether all processes must make the same passes, whose gradients come as their mean."""
        return self.sharded or self.zero

    @classmethod
    def of(cls, device: str) -> Ranks:
        """With the setting `--device`."""
        import torch

        return cls(cpu=device == "cpu" or not torch.cuda.is_available())

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of some items; together the processes have them all."""
        return items[self.number :: self.count]

    def sum(self, tensors: list[Any]) -> list[Any]:
        """The sums of tensors over all processes, the same in each of them."""
        if self._state is None:
            return tensors
        from accelerate.utils import reduce

        summed: list[Any] = reduce(tensors, reduction="sum")
        return summed
