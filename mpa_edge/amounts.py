"""Times and sizes as people say them."""

from __future__ import annotations

Range = tuple[float, float]


def spoken_seconds(seconds: Range | None) -> str:
    """ "3 min to 5 min", or that it was not measured."""
    if seconds is None:
        return "not measured"
    low, high = map(_duration, seconds)
    return low if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def spoken_bytes(size: float) -> str:
    """ "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
