"""What the machine was like while the clock ran: governor, frequency, temperature, load, and whether it throttled.

Read from Linux' own files, so that a board without any tool tells it too; None for what a system hides.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpa_edge.runtime.doctor import power_mode

ROOT = Path("/")
CAPPED_NOW = 0b1110  # a Raspberry Pi's firmware: frequency capped, throttled, soft temperature limit reached


def conditions(root: Path = ROOT) -> dict[str, Any]:
    """The state now. Frequencies in MHz, means over the cores; the temperature in °C of the hottest zone."""
    cores = root / "sys/devices/system/cpu"
    governors = {text for path in sorted(cores.glob("cpu[0-9]*/cpufreq/scaling_governor")) if (text := read(path))}
    return {
        "governor": ", ".join(sorted(governors)) or None,
        "power_mode": power_mode(),
        "mhz": mean(numbers(cores.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")), 1e3),
        "max_mhz": mean(numbers(cores.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq")), 1e3),
        "temperature_c": hottest(numbers((root / "sys/class/thermal").glob("thermal_zone*/temp"))),
        "load": next(iter(numbers([root / "proc/loadavg"])), None),
        "throttle_count": throttle_count(cores),
        "capped": firmware(root / "sys/devices/platform/soc/soc:firmware/get_throttled"),
    }


def during(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both ends of a measurement together; `throttled` is the reason in words, None where nothing says so."""
    return {
        "governor": after["governor"],
        "power_mode": after["power_mode"],
        "mhz": [before["mhz"], after["mhz"]],
        "max_mhz": after["max_mhz"],
        "temperature_c": [before["temperature_c"], after["temperature_c"]],
        "load": before["load"],
        "throttled": why_throttled(before, after),
    }


def why_throttled(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What says that the processor was slowed down."""
    counts = before["throttle_count"], after["throttle_count"]
    if None not in counts and counts[1] > counts[0]:
        return f"the processor throttled {counts[1] - counts[0]} times because of its temperature"
    if before["capped"] or after["capped"]:
        return "the firmware capped the processor's frequency (power supply or temperature)"
    return None


def throttle_count(cores: Path) -> int | None:
    """How often the cores were slowed down since the start, on processors that count it."""
    found = numbers(cores.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    return int(sum(found)) if found else None


def firmware(path: Path) -> bool | None:
    """Whether a Raspberry Pi's firmware holds the frequency down now."""
    text = read(path)
    try:
        return None if text is None else bool(int(text, 16) & CAPPED_NOW)
    except ValueError:
        return None


def hottest(values: list[float]) -> float | None:
    """Of zones in thousandths of a degree; a zone of 0 or below is a sensor that is off."""
    known = [value / 1000 for value in values if value > 0]
    return round(max(known), 1) if known else None


def mean(values: list[float], per: float) -> float | None:
    """Rounded mean in another unit."""
    return round(sum(values) / len(values) / per) if values else None


def numbers(paths: Iterable[Path]) -> list[float]:
    """The first number of each file that has one."""
    found = []
    for path in paths:
        try:
            found.append(float((read(path) or "").split()[0]))
        except (ValueError, IndexError):
            continue
    return found


def read(path: Path) -> str | None:
    """A small file's text; None where it cannot be read (a zone whose sensor sleeps fails on reading)."""
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
