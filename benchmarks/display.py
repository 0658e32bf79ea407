"""Bars for the variants of a benchmark; silent where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mpa_edge.benchmarks.measure import Say


@contextmanager
def on_terminal(names: Sequence[str], say: Say | None = None) -> Iterator[Say]:
    """What to call with a variant's progress while the body runs; `say` itself where there is one."""
    if say is not None:
        yield say
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>16}"),
        TextColumn("{task.fields[phase]:<8}", style="dim"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        bars = {name: display.add_task(name, start=False, total=None, phase="waiting") for name in names}

        def tell(name: str, phase: str, done: int, of: int) -> None:
            display.start_task(bars[name])
            display.update(bars[name], phase=phase, completed=done, total=of)

        yield tell
