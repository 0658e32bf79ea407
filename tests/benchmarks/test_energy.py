"""Energy from recorded sensors: RAPL counters that wrap, a battery's gauge, a Jetson's rails, an NVIDIA GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpa_edge.benchmarks.energy import measure_energy, per_answer, sources
from mpa_edge.benchmarks.energy_sources import NoSensor, Sampled, open_battery, open_jetson, open_nvml, open_rapl
from mpa_edge.benchmarks.memory import proportional_bytes, watch_device
from mpa_edge.benchmarks.require import whole_memory

PACKAGES = "sys/class/powercap/"
# `jtop().power` of a Jetson Orin Nano (jetson-stats' documentation), shortened: milliwatts.
RAILS = {
    "rail": {"VDD_CPU_GPU_CV": {"volt": 4968, "curr": 129, "power": 640}, "VDD_SOC": {"power": 1280}},
    "tot": {"volt": 4968, "curr": 861, "power": 4277, "avg": 4250, "name": "VDD_IN"},
}


def recorded(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def laptop(root: Path, energy: tuple[int, int] = (1_000_000, 2_000_000)) -> Path:
    """Two packages, with their parts and the platform, which must not be added."""
    files = {}
    for zone, name, value in (
        ("intel-rapl:0", "package-0", energy[0]),
        ("intel-rapl:1", "package-1", energy[1]),
        ("intel-rapl:0:0", "core", 700_000),
        ("intel-rapl:2", "psys", 9_000_000),
    ):
        files |= {
            f"{PACKAGES}{zone}/name": f"{name}\n",
            f"{PACKAGES}{zone}/energy_uj": f"{value}\n",
            f"{PACKAGES}{zone}/max_energy_range_uj": "262143328850\n",
        }
    return recorded(root, files)


def ticking(*times: float) -> Any:
    clock: Iterator[float] = iter(times)
    return lambda: next(clock)


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    source = open_rapl(laptop(tmp_path))
    assert source.joules() == 0
    laptop(tmp_path, (6_000_000, 2_500_000))
    assert source.joules() == pytest.approx(5.5)


def test_a_counter_that_wrapped_goes_on(tmp_path: Path) -> None:
    source = open_rapl(laptop(tmp_path, (262_143_000_000, 0)))
    laptop(tmp_path, (1_671_150, 0))
    assert source.joules() == pytest.approx(2.0)  # 0.328850 J to the end of the range, 1.67115 J after it


def test_counters_for_root_alone_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop(tmp_path)
    read = Path.read_text

    def refusing(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refusing)
    with pytest.raises(NoSensor, match="only root may read the counters"):
        open_rapl(tmp_path)


@pytest.mark.parametrize(
    ("gauge", "watts"),
    [({"power_now": "8000000"}, 8.0), ({"current_now": "-700000", "voltage_now": "12000000"}, 8.4)],
)
def test_a_battery_is_summed_over_time(tmp_path: Path, gauge: dict[str, str], watts: float) -> None:
    files = {f"sys/class/power_supply/BAT0/{name}": text for name, text in {"status": "Discharging\n", **gauge}.items()}
    source = open_battery(recorded(tmp_path, files), ticking(0, 10), thread=False)
    assert source.joules() == pytest.approx(10 * watts)


def test_a_battery_that_is_charged_measures_nothing(tmp_path: Path) -> None:
    root = recorded(
        tmp_path, {"sys/class/power_supply/BAT0/status": "Charging", "sys/class/power_supply/AC/online": "1"}
    )
    with pytest.raises(NoSensor, match="unplug"):
        open_battery(root)


def test_a_series_that_is_too_short_for_the_gauge_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"sys/class/power_supply/BAT0/status": "Discharging", "sys/class/power_supply/BAT0/power_now": "8000000"}
    recorded(tmp_path, files)
    told = measure_energy(False, tmp_path, clock=ticking(0, 12), thread=False)()
    assert told["joules"] is None
    assert "took 12.0 s, its sensor needs 60 s; raise --latency-n" in told["why"]
    assert measure_energy(False, tmp_path, clock=ticking(0, 70), thread=False)()["source"] == "battery (whole machine)"


def test_trapezoids_of_changing_power() -> None:
    powers = iter([2.0, 4.0, 4.0])
    source = Sampled("x", lambda: next(powers), clock=ticking(0, 1, 3), thread=False)
    assert source.joules() == pytest.approx(3)
    assert source.joules() == pytest.approx(3 + 8)


def test_a_thread_samples_meanwhile() -> None:
    taken: list[int] = []
    source = Sampled("x", lambda: taken.append(1) or 1.0, every_s=0.001)  # type: ignore[func-returns-value]
    while len(taken) < 5:
        pass
    source.close()
    assert source.joules() > 0


class Jtop:
    """The part of jetson-stats' client that is used, with recorded rails."""

    def __init__(self, interval: float) -> None:
        self.power, self.closed = RAILS, False

    def start(self) -> None:
        """Connects, on a board."""

    def ok(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def test_a_jetsons_rails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = recorded(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"})
    monkeypatch.setitem(sys.modules, "jtop", None)
    with pytest.raises(NoSensor, match="jetson-stats is missing"):
        open_jetson(root)
    monkeypatch.setitem(sys.modules, "jtop", SimpleNamespace(jtop=Jtop))
    source = open_jetson(root, ticking(0, 100), thread=False)
    assert source.joules() == pytest.approx(427.7)
    found, _ = sources(True, root, thread=False)
    assert [one.name for one in found] == ["jetson-stats (whole board)"]  # it sees the GPU, too


class NvmlError(Exception):
    pass


def nvml(energy: list[int] | None, power: int = 70_000) -> Any:
    """The part of nvidia-ml-py that is used; without `energy`, of a GPU before Volta."""
    import os

    def counter(_: object) -> int:
        if not energy:
            raise NvmlError("Not Supported")
        return energy.pop(0)

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=counter,
        nvmlDeviceGetPowerUsage=lambda handle: power,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3_000_000_000),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=2_000_000_000)
        ],
    )


def test_a_gpus_counter_and_an_old_gpus_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([5_000, 12_500]))
    assert open_nvml().joules() == 7.5
    monkeypatch.setitem(sys.modules, "pynvml", nvml(None))
    assert open_nvml(ticking(0, 2), thread=False).joules() == 140


def test_a_gpu_is_added_to_the_processor_for_models_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([0] * 9))
    laptop(tmp_path)
    assert [one.name for one in sources(False, tmp_path)[0]] == ["RAPL (processor packages)"]
    assert [one.name for one in sources(True, tmp_path)[0]] == ["RAPL (processor packages)", "NVML (GPU board)"]


def test_a_machine_without_sensors_says_what_was_tried(tmp_path: Path) -> None:
    told = measure_energy(False, tmp_path)()
    assert told["joules"] is None
    assert told["why"] == (
        "Jetson: this is none; battery: none in /sys/class/power_supply; RAPL: no counters in /sys/class/powercap"
    )
    assert per_answer(told, 10) == {
        "joules_per_answer": None, "answers_per_joule": None, "watts": None, "source": None, "why": told["why"],
    }  # fmt: skip
    assert per_answer(None, 10) is None


def test_joules_per_answer(tmp_path: Path) -> None:
    laptop(tmp_path)
    end = measure_energy(False, tmp_path, clock=ticking(0, 5))
    laptop(tmp_path, (21_000_000, 2_000_000))
    found = per_answer(end(), 10)
    assert found is not None
    assert (found["joules_per_answer"], found["answers_per_joule"], found["watts"]) == (2, 0.5, 4)


def test_device_memory_of_a_gpu_and_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([]))
    assert watch_device(tmp_path)() == {"device_memory_bytes": 2_000_000_000, "device_memory_how": "NVML, this process"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert watch_device(tmp_path)()["device_memory_bytes"] is None
    root = recorded(
        tmp_path, {"proc/device-tree/model": "NVIDIA Jetson AGX Orin", "proc/meminfo": "MemAvailable: 5000 kB"}
    )
    end = watch_device(root)
    recorded(tmp_path, {"proc/meminfo": "MemAvailable: 2000 kB"})
    assert end()["device_memory_bytes"] == 3000 * 1024


def test_required_memory_is_that_of_both_places() -> None:
    on_gpu = {"peak_memory_mb": 500.0, "device_memory_mb": 2000.0, "device_memory_how": "NVML, this process"}
    assert whole_memory(on_gpu) == 2500
    assert whole_memory({**on_gpu, "device_memory_how": "change of the whole board's available memory"}) == 2000
    assert whole_memory({**on_gpu, "device_memory_mb": None}) == 500


def test_the_proportional_set_is_read(tmp_path: Path) -> None:
    recorded(tmp_path, {"proc/self/smaps_rollup": "5581 [rollup]\nRss: 9000 kB\nPss:    4321 kB\nPss_Dirty: 1 kB\n"})
    assert proportional_bytes(tmp_path) == 4321 * 1024
    assert proportional_bytes(tmp_path / "nowhere") is None
