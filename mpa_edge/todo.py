"""Work for several threads, of which some may come back undone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from threading import Condition
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Todo(Generic[Item]):
    """Items to do, taken from an iterable one at a time. Each that is taken must be `done`, or come `back`."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items: Iterator[Item] | None = iter(items)
        self._back: deque[tuple[Item, int]] = deque()
        self._taken: list[tuple[Item, int]] = []
        self._done: deque[Item] = deque()
        self._error: BaseException | None = None
        self.ended = False  # by `end`
        self._change = Condition()

    @property
    def over(self) -> bool:
        """Whether all is done, or was ended."""
        with self._change:
            return self._is_over()

    def take(self) -> tuple[Item, int] | None:
        """The next item, and how often it came back. Waits while others may bring some back; None when all is over."""
        with self._change:
            while not self.ended:
                found = self._back.popleft() if self._back else self._next()
                if found is not None:
                    self._taken.append(found)
                    return found
                if self._is_over():
                    break
                self._change.wait()
            return None

    def done(self, item: Item) -> None:
        """An item is done."""
        with self._change:
            self._release(item)
            self._done.append(item)

    def back(self, item: Item) -> None:
        """An item is for somebody else to do."""
        with self._change:
            self._back.append((item, self._release(item) + 1))

    def end(self, error: BaseException | None = None) -> None:
        """Give out nothing more; `finished` raises the first error."""
        with self._change:
            self.ended = True
            self._error = self._error or error
            self._change.notify_all()

    def finished(self) -> Iterator[Item]:
        """Items as they are done, until all are."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._done or self._is_over())
                if self._error:
                    raise self._error
                if not self._done:
                    return
                item = self._done.popleft()
            yield item

    def _is_over(self) -> bool:
        return self.ended or (self._items is None and not self._back and not self._taken)

    def _next(self) -> tuple[Item, int] | None:
        for item in self._items or ():
            return item, 0
        self._items = None
        self._change.notify_all()  # this may have been the last one
        return None

    def _release(self, item: Item) -> int:
        place = next(place for place, (taken, _) in enumerate(self._taken) if taken is item)
        self._change.notify_all()
        return self._taken.pop(place)[1]
