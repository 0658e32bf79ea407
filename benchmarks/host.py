"""The machine that measured, as far as it shapes the figures. No host names, users or paths."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpa_edge.runtime import available_cores
from mpa_edge.versions import installed

BUSY_FROM = 0.15  # of all cores' time; from here on, other work made the latencies of a variant too long
PACKAGES = (
    "mpa-edge",
    "numpy",
    "pillow",
    "tokenizers",
    "llama-cpp-python",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "transformers",
    "peft",
)


def host() -> dict[str, Any]:
    """CPU, cores, memory, system and versions; None for what the system hides."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_mb": memory_mb(),
        "os": system_name(),
        "machine": platform.machine() or None,
        "python": platform.python_version(),
        "versions": versions(),
    }


def cpu_name() -> str | None:
    """As the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or None


def memory_mb() -> float | None:
    """Physical memory in megabytes of 1,000,000 bytes."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6)
    except (AttributeError, ValueError, OSError):
        return None


def system_name() -> str:
    """The distribution where it says so, else the kernel's name."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}".strip()


def watch_others() -> Callable[[], float | None]:
    """Call it before a measurement, and what it returns after: the share of all cores' time that others used meanwhile.
    Processes that we started and that have ended are not others.

    Not the load average, which also counts ourselves, and what was a minute ago. None where the system does not tell.
    """
    cores, own = core_times(), _own_time()

    def share() -> float | None:
        now = core_times()
        if cores is None or now is None or now[1] <= cores[1]:
            return None
        used = (now[1] - cores[1]) - (now[0] - cores[0])
        ours = (_own_time() - own) * os.sysconf("SC_CLK_TCK")
        return round(min(1.0, max(0.0, (used - ours) / (now[1] - cores[1]))), 3)

    return share


def _own_time() -> float:
    """Seconds of CPU that this process took, and its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def core_times() -> tuple[int, int] | None:
    """(idle, all) ticks of all cores together since the start."""
    try:
        ticks = [int(tick) for tick in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    return sum(ticks[3:5]), sum(ticks[:8])


def versions() -> dict[str, str]:
    """The installed libraries that produce answers and timings."""
    return installed(PACKAGES)


def resident_bytes() -> int | None:
    """What this process holds in RAM now, mapped files included; None where the system does not tell."""
    return _status("VmRSS")


def peak_memory_bytes() -> int | None:
    """The most memory that this process ever held in RAM.

    Linux: VmHWM, since `ru_maxrss` there also remembers what the parent held before it started us.
    """
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except ImportError:
        return None
    return peak if platform.system() == "Darwin" else peak * 1024


def _status(name: str) -> int | None:
    """A size of this process that Linux tells, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
