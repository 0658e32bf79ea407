"""Work ahead: in order, a few items at a time, and errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mpa_edge.ahead import ahead


def test_results_come_in_order_and_from_several_threads() -> None:
    both = threading.Barrier(2, timeout=30)  # passes only if two items are worked on at once

    def work(item: int) -> int:
        both.wait()
        return item * item

    assert list(ahead(work, range(10), threads=2)) == [item * item for item in range(10)]


def test_only_a_few_items_are_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = ahead(str, items(), threads=3)
    assert next(results) == "0"
    assert len(taken) == 4
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 4


def test_an_error_comes_in_its_turn() -> None:
    found: list[float] = []
    with pytest.raises(ZeroDivisionError):
        found.extend(ahead(lambda item: 6 / item, [1, 2, 0, 3], threads=2))
    results = ahead(lambda item: 6 / item, [1, 2, 0, 3], threads=2)
    assert [next(results), next(results)] == [6, 3]
