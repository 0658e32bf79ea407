"""Memory that the resident set does not show: the process's proportional share, and that of a GPU.

A Jetson's GPU has no memory of its own and NVML knows nothing of it: there the change of the whole board's available
memory since before the model was opened is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path("/")


def proportional_bytes(root: Path = ROOT) -> int | None:
    """The proportional set size of this process (shared pages divided among their users); Linux only."""
    return _kilobytes(root / "proc/self/smaps_rollup", "Pss")


def watch_device(root: Path = ROOT) -> Callable[[], dict[str, Any]]:
    """Call it before a model is opened, and what it returns after: `device_memory_bytes` and `device_memory_how`."""
    if _is_jetson(root):
        before = _kilobytes(root / "proc/meminfo", "MemAvailable")
        return lambda: _delta(before, _kilobytes(root / "proc/meminfo", "MemAvailable"))
    used = _gpu_bytes()

    def now() -> dict[str, Any]:
        own, after = _own_gpu_bytes(), _gpu_bytes()
        if own is not None:
            return _told(own, "NVML, this process")
        if used is None or after is None:
            return _told(None, None)
        # In a container the process has another number than the one that the driver knows.
        return _told(max(0, after - used), "NVML, change of all GPUs together")

    return now


def _delta(before: int | None, after: int | None) -> dict[str, Any]:
    if before is None or after is None:
        return _told(None, None)
    return _told(max(0, before - after), "change of the whole board's available memory")


def _told(count: int | None, how: str | None) -> dict[str, Any]:
    return {"device_memory_bytes": count, "device_memory_how": how}


def _is_jetson(root: Path) -> bool:
    try:
        return "jetson" in (root / "proc/device-tree/model").read_text().lower()
    except (OSError, UnicodeDecodeError):
        return False


def _kilobytes(path: Path, name: str) -> int | None:
    """A line of /proc such as `Pss:   1234 kB`, in bytes."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _gpus() -> tuple[Any, list[Any]] | None:
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # no library, no driver, no GPU: each has an error of its own, and none of them matters here
        return None


def _gpu_bytes() -> int | None:
    found = _gpus()
    if found is None or not found[1]:
        return None
    nvml, handles = found
    try:
        return sum(int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
    except nvml.NVMLError:
        return None


def _own_gpu_bytes() -> int | None:
    """What NVML says of this process; None where it does not know it."""
    found = _gpus()
    if found is None:
        return None
    nvml, handles = found
    try:
        rows = [row for handle in handles for row in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError:
        return None
    own = [row.usedGpuMemory for row in rows if row.pid == os.getpid() and row.usedGpuMemory is not None]
    return sum(own) if own else None
