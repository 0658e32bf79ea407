"""Work that threads do ahead of who needs its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mpa_edge.runtime import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of pictures in tiles, each result may take 50 MB until it is taken.
MOST = 8


def ahead(work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None) -> Iterator[Result]:
    """What `work` makes of each item, in order; as many items ahead as there are `threads` (None: one a core, at most
    `MOST`). For work that lets go of Python's lock, as Pillow and NumPy do. Raises what `work` raised on an item, in
    its turn."""
    threads = threads or min(available_cores(), MOST)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
