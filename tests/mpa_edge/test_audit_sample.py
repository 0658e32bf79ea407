"""Which rows get a card, and that no others are held."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mpa_edge.audit_sample import MOST_REASONS, Sampler, Shown
from tiny_runs import annotation, case


def sampled(rows: Iterable[Shown]) -> tuple[list[Shown], int]:
    """The rows that get a card of 100, and how many rows were held to find them."""
    sampler = Sampler(100)
    for row in rows:
        sampler.add(row)
    return sampler.picked(), sum(type(thing) is Shown for thing in gc.get_objects())


def test_cards_are_spread_over_verdicts_and_reasons() -> None:
    def rows(numbers: Iterable[int]) -> Iterator[Shown]:
        for n in numbers:
            yield Shown(case(n)) if n < 3000 else Shown(annotation(n, "rare" if n < 3003 else "common"))

    shown, held = sampled(rows(range(4000)))
    verdicts = ("parity", "agree", "unconfirmed", "error", "rejected")
    assert Counter(row.verdict for row in shown) == dict.fromkeys(verdicts, 20)
    assert Counter(row.reason for row in shown if row.verdict == "rejected") == {"rare": 3, "common": 17}
    assert sampled(rows(reversed(range(4000))))[0] == shown
    assert held < 6 * 100
    assert sampled([])[0] == []


def test_reasons_without_end_are_not_all_held() -> None:
    def rows(numbers: Iterable[int]) -> Iterator[Shown]:
        return (Shown(replace(case(4), id=f"{n}", reason=f"HTTP 500: request {n} failed")) for n in numbers)

    shown, held = sampled(rows(range(2000)))
    assert len(shown) == MOST_REASONS <= held < 100
    assert sampled(rows(reversed(range(2000))))[0] == shown
