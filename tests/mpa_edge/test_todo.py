"""Work for several threads: nothing lost, nothing done twice, whoever gives up."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from mpa_edge.todo import Todo


def test_what_comes_back_is_taken_again_and_everything_is_done_once() -> None:
    todo = Todo(f"item {number}" for number in range(200))
    taken: Counter[str] = Counter()

    def work(thread: int) -> None:
        for number in count():
            if (found := todo.take()) is None:
                return
            item, returns = found
            taken[item] += 1
            if returns < 2 and (number + thread) % 3 == 0:
                todo.back(item)
            else:
                todo.done(item)

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(work, thread) for thread in range(4)]
        done = list(todo.finished())
        assert [future.result() for future in futures] == [None] * 4
    assert sorted(done) == sorted(f"item {number}" for number in range(200))
    assert max(taken.values()) in (2, 3)
    assert todo.over


def test_the_last_item_is_waited_for_as_it_may_come_back() -> None:
    todo = Todo(["only"])
    item, returns = todo.take() or ("", -1)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(todo.take)
        assert not other.done()
        todo.back(item)
        assert other.result(timeout=60) == ("only", returns + 1)
    todo.done(item)
    assert (list(todo.finished()), todo.take()) == (["only"], None)


def test_an_error_ends_it_for_all() -> None:
    todo = Todo(iter(int, 1))  # without end
    todo.take()
    todo.end(ValueError("no more"))
    assert todo.take() is None
    with pytest.raises(ValueError, match="no more"):
        list(todo.finished())
