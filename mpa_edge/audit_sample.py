"""Which rows of a run get a card on the audit page: a few of each kind, however many rows there are."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from mpa_edge.audit_counts import VERDICTS
from mpa_edge.digests import digest64
from mpa_edge.records import Annotation, Case

# So many reasons of one verdict are told apart. Rejections have fewer; what servers say when they fail can be anything.
MOST_REASONS = 32


@dataclass(frozen=True)
class Shown:
    """A row that may get a card: a rejected annotation, or a case. `target` is the text that the student learns from
    it; None where it is not in the training set."""

    row: Annotation | Case
    collapsed: bool = False
    target: str | None = None

    @property
    def verdict(self) -> str:
        """That of a case; `rejected` for an annotation."""
        return self.row.verdict if isinstance(self.row, Case) else "rejected"

    @property
    def reason(self) -> str | None:
        """Why it was dropped, where a reason is known."""
        return self.row.reason or ("collapsed" if self.collapsed else None)

    @property
    def kind(self) -> tuple[str, bool]:
        """What is told apart within a verdict: the reason, and whether it is trained on."""
        return self.reason or "", self.target is not None


@dataclass
class _Lowest:
    """The `limit` rows whose hashes are lowest."""

    limit: int
    heap: list[tuple[int, int, Shown]] = field(default_factory=list)
    added: int = 0

    def add(self, shown: Shown) -> None:
        row = shown.row
        self.added += 1  # keeps rows themselves from being compared
        entry = (-digest64(f"{row.id}\n{row.question}\n{row.answer}"), self.added, shown)
        if len(self.heap) < self.limit:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heappushpop(self.heap, entry)

    def first(self, count: int) -> list[Shown]:
        return [shown for _, _, shown in sorted(self.heap, key=lambda entry: -entry[0])[:count]]


class Sampler:
    """At most `limit` rows, spread evenly over the verdicts and within them over the kinds: what is rare is seen too.

    Rows are drawn by the hash of what they say: the same rows give the same cards, whatever their order. In memory are
    at most `limit` rows of each of at most `MOST_REASONS` kinds of each verdict.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._groups: dict[str, dict[tuple[str, bool], _Lowest]] = defaultdict(dict)

    def add(self, shown: Shown) -> None:
        """Take a row into account."""
        groups, kind = self._groups[shown.verdict], shown.kind
        if kind not in groups:
            if len(groups) == MOST_REASONS:
                last = max(groups, key=_rank)
                if _rank(kind) > _rank(last):
                    return
                del groups[last]
            groups[kind] = _Lowest(self._limit)
        groups[kind].add(shown)

    def picked(self) -> list[Shown]:
        """The rows in the order of the page: by verdict, by kind, by hash."""
        order = [verdict for verdict in VERDICTS if verdict in self._groups]
        order += sorted(self._groups.keys() - VERDICTS.keys())
        sizes = {verdict: sum(len(lowest.heap) for lowest in self._groups[verdict].values()) for verdict in order}
        wanted = shares(sizes, self._limit)
        return [shown for verdict in order for shown in self._spread(self._groups[verdict], wanted[verdict])]

    def _spread(self, groups: dict[tuple[str, bool], _Lowest], count: int) -> list[Shown]:
        wanted = shares({kind: len(lowest.heap) for kind, lowest in groups.items()}, count)
        return [shown for kind in sorted(groups) for shown in groups[kind].first(wanted[kind])]


def shares(sizes: Mapping[str, int] | Mapping[tuple[str, bool], int], limit: int) -> dict[object, int]:
    """Equal shares of the limit; what a small group leaves over goes to the larger ones."""
    found: dict[object, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        found[name] = min(size, limit // (len(sizes) - len(found)))
        limit -= found[name]
    return found


def _rank(kind: tuple[str, bool]) -> int:
    return digest64(f"{kind}")
