"""Questions that were asked before: twice about one picture, or about too many pictures of a run.

A teacher has favourites. In the pseudo-annotations published with the paper one question comes 150 times in 9,009 and
the answer "10:10" 65 times in 3,293; trained on, they teach the student a habit rather than to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpa_edge.answers import normalize_vqa
from mpa_edge.digests import digest64
from mpa_edge.records import Annotation

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]

BUCKETS = 1 << 16
# Words that two phrasings of one question may differ in. Not "how", "who", "when", "where", "many": they ask for
# something else.
_FILLER_WORDS = (
    "what which is are was were do does did be being been of in on at this that these those it its there 's can you "
    "see seen shown show shows visible displayed depicted image picture photo photograph please tell me"
)
_FILLERS = frozenset(_FILLER_WORDS.split())
_POLAR = frozenset(("is", "are", "was", "were", "do", "does", "did", "can"))


def question_key(question: str) -> str:
    """What is left of a question without case, punctuation, articles and fillers; near-duplicates have the same.

    "What colour is the sign?" and "What is the colour of the sign in this picture?" -> "colour sign".
    """
    words = normalize_vqa(question).split()
    left = [word for word in words if word not in _FILLERS]
    if not left:
        return " ".join(words)
    # "Is this a cat?" and "What is the cat?" are two questions.
    return " ".join(["whether", *left] if words[0] in _POLAR else left)


def mark_duplicates(annotations: Iterable[Annotation]) -> list[Annotation]:
    """The rows in their order, with the reason `duplicate` on those whose picture already has this question, by
    `question_key`. Rows that have a reason already are passed on and count for nothing."""
    asked: set[tuple[str, str]] = set()
    rows = []
    for row in annotations:
        key = (row.sample_id, question_key(row.question))
        if row.reason is None and key in asked:
            row = replace(row, reason="duplicate")
        if row.reason is None:
            asked.add(key)
        rows.append(row)
    return rows


def collapsed(
    blocks: Callable[[], Iterable[tuple[Keys, Keys]]],
    *,
    question_share: float | None = None,
    pair_share: float | None = None,
    at_least: int = 20,
) -> bytearray:
    """Which questions of a run come too often: 1 or 0 for each. `blocks` gives the `keys_of` all in the order of its
    pictures, some at a time, as an array of the questions' and one of the pairs'; it is called twice.

    A question is collapsed when it, or it with the same answer, has already come up in its share of them, and
    `at_least` times (the teacher's favourites). Earlier ones are kept. No cap where a share is None: in narrow domains
    questions repeat by nature.
    """
    caps = _caps(blocks, (question_share, pair_share), at_least)
    marks = bytearray()
    for block in blocks():
        found = np.zeros(len(block[0]), np.uint8)
        suspects = [(keys, *cap) for keys, cap in zip(block, caps, strict=True) if cap is not None]
        often = [counts[keys % BUCKETS] > cap for keys, cap, counts, _ in suspects]
        for place in np.flatnonzero(np.logical_or.reduce(often)) if often else ():
            keys = [(int(keys[place]), cap, seen) for keys, cap, _, seen in suspects]
            if any(seen[key] >= cap for key, cap, seen in keys):
                found[place] = 1
            else:
                for key, _, seen in keys:
                    seen[key] += 1
        marks += found.tobytes()
    return marks


def _caps(
    blocks: Callable[[], Iterable[tuple[Keys, Keys]]], shares: Sequence[float | None], at_least: int
) -> list[tuple[int, Counts, Counter[int]] | None]:
    """For each share its cap, how many keys fall into each bucket, and an empty counter. Only a key in a bucket with
    more than the cap can come up more often than that: the few of them are counted one by one, and the many others, of
    which a large run has as many as questions, are not."""
    counts = [np.zeros(BUCKETS, np.int64) for _ in shares]
    for block in blocks():
        for keys, count in zip(block, counts, strict=True):
            count += np.bincount((keys % BUCKETS).astype(np.int64), minlength=BUCKETS)
    total = int(counts[0].sum())
    return [
        None if share is None else (max(at_least, int(share * total)), count, Counter[int]())
        for share, count in zip(shares, counts, strict=True)
    ]


def keys_of(question: str, answer: str) -> tuple[int, int]:
    """What names a question, and a question with its answer, in 64 bits each: a large run has many."""
    key = question_key(question)
    return digest64(key), digest64(f"{key}\n{normalize_vqa(answer)}")
