"""Where a machine tells what it consumes: a Jetson's rails, a battery, an NVIDIA GPU, a processor's RAPL counters.

A source counts joules since it was opened. Those that tell power only are sampled, and the power is summed over time.
Each `open_…` raises `NoSensor` with the reason where the machine has no such sensor, or does not let us read it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Clock = Callable[[], float]
SAMPLE_S = 0.1
JETSON_S = 0.5  # jetson-stats reads the rails that often
BATTERY_S = 60  # a battery's gauge is slow: a shorter series says nothing


class NoSensor(Exception):
    """Why a source cannot be read."""


class Source(Protocol):
    """Something that counts joules. `least_s` is how long a series must last for its sensor."""

    name: str
    least_s: float

    def joules(self) -> float:
        """Joules since it was opened."""
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


class Sampled:
    """Power to energy: watts are read at intervals, and each reading counts for the time since the one before."""

    def __init__(
        self,
        name: str,
        watts: Callable[[], float],
        *,
        every_s: float = SAMPLE_S,
        least_s: float = 1.0,
        clock: Clock = time.perf_counter,
        closing: Callable[[], None] = lambda: None,
        thread: bool = True,
    ) -> None:
        self.name, self.least_s = name, least_s
        self._watts, self._clock, self._closing = watts, clock, closing
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._last, self._power, self._sum = clock(), watts(), 0.0
        self._thread = threading.Thread(target=self._run, args=(every_s,), daemon=True) if thread else None
        if self._thread:
            self._thread.start()

    def joules(self) -> float:
        """The sum up to now (trapezoids)."""
        self._sample()
        with self._lock:
            return self._sum

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread:
            self._thread.join(5)
        self._closing()

    def _sample(self) -> None:
        with self._lock:
            now, power = self._clock(), self._watts()
            self._sum += (now - self._last) * (power + self._power) / 2
            self._last, self._power = now, power

    def _run(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self._sample()
            except (OSError, NoSensor):
                return


class Rapl:
    """The packages' counters of microjoules, which begin again at 0 from time to time."""

    least_s = 0.0

    def __init__(self, folders: list[Path]) -> None:
        self.name = "RAPL (processor packages)"
        self._folders = folders
        self._last = [self._read(folder) for folder in folders]
        self._ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in folders]
        self._sum = 0

    def joules(self) -> float:
        """Joules of all packages. To be read before a counter has gone round twice: minutes, on a large processor."""
        now = [self._read(folder) for folder in self._folders]
        for before, after, most in zip(self._last, now, self._ranges, strict=True):
            self._sum += after - before if after >= before else after + most - before
        self._last = now
        return self._sum / 1e6

    def close(self) -> None:
        """Nothing to stop."""

    @staticmethod
    def _read(folder: Path) -> int:
        return int((folder / "energy_uj").read_text())


class Nvml:
    """The energy counter of the GPUs that this process can see, in millijoules."""

    least_s = 1.0

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self.name = "NVML (GPU board)"
        self._nvml, self._handles = nvml, handles
        self._start = self._read()

    def joules(self) -> float:
        """Joules of all GPUs."""
        return (self._read() - self._start) / 1000

    def close(self) -> None:
        """Let go of the library."""
        self._nvml.nvmlShutdown()

    def _read(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)


def open_rapl(root: Path) -> Source:
    """The processor packages; their parts (cores, memory) and the platform, which holds them, are not added."""
    folders = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        try:
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                folders.append(folder)
        except OSError:
            continue
    if not folders:
        raise NoSensor("RAPL: no counters in /sys/class/powercap")
    try:
        return Rapl(folders)
    except PermissionError:
        raise NoSensor(
            "RAPL: only root may read the counters (sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj)"
        ) from None
    except (OSError, ValueError) as error:
        raise NoSensor(f"RAPL: cannot be read ({error})") from None


def open_battery(root: Path, clock: Clock = time.perf_counter, *, thread: bool = True) -> Source:
    """A laptop on its battery: the whole machine, screen included."""
    folders = sorted((root / "sys/class/power_supply").glob("BAT*"))
    if not folders:
        raise NoSensor("battery: none in /sys/class/power_supply")
    running = [folder for folder in folders if _text(folder / "status").lower() == "discharging"]
    if not running:
        raise NoSensor("battery: not discharging; unplug the machine to measure with it")

    def watts() -> float:
        return sum(_watts(folder) for folder in running)

    return Sampled("battery (whole machine)", watts, every_s=1, least_s=BATTERY_S, clock=clock, thread=thread)


def _watts(battery: Path) -> float:
    """From microwatts, or microamperes and microvolts; some gauges give the current a sign."""
    if (battery / "power_now").is_file():
        return abs(_number(battery / "power_now")) / 1e6
    return abs(_number(battery / "current_now")) / 1e6 * _number(battery / "voltage_now") / 1e6


def open_jetson(root: Path, clock: Clock = time.perf_counter, *, thread: bool = True) -> Source:
    """A Jetson's input power through jetson-stats: the whole board, or the sum of its rails."""
    if "jetson" not in _text(root / "proc/device-tree/model").lower():
        raise NoSensor("Jetson: this is none")
    try:
        from jtop import jtop
    except ImportError:
        raise NoSensor("Jetson: jetson-stats is missing (sudo pip3 install -U jetson-stats, then reboot)") from None
    try:
        client = jtop(interval=JETSON_S)
        client.start()
        client.ok()
    except Exception as error:  # jtop has errors of its own for a service that does not run, or is another version
        raise NoSensor(f"Jetson: jetson-stats does not answer ({error})") from None

    def watts() -> float:
        return float(client.power["tot"]["power"]) / 1000

    return Sampled(
        "jetson-stats (whole board)", watts, every_s=JETSON_S, least_s=2.0, clock=clock, closing=client.close,
        thread=thread,
    )  # fmt: skip


def open_nvml(clock: Clock = time.perf_counter, *, thread: bool = True) -> Source:
    """All NVIDIA GPUs: the counter where they have one (Volta and later), else their power."""
    try:
        import pynvml as nvml
    except ImportError:
        raise NoSensor("NVML: nvidia-ml-py is missing (pip install nvidia-ml-py)") from None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise NoSensor(f"NVML: {error}") from None
    if not handles:
        raise NoSensor("NVML: no GPU")
    try:
        return Nvml(nvml, handles)
    except nvml.NVMLError:
        pass

    def watts() -> float:
        return float(sum(nvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1000)

    try:
        return Sampled("NVML (GPU board, sampled)", watts, clock=clock, closing=nvml.nvmlShutdown, thread=thread)
    except nvml.NVMLError as error:
        raise NoSensor(f"NVML: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip("\0\n ")
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError) as error:
        raise NoSensor(f"battery: {path.name} cannot be read ({error})") from None
