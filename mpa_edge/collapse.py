"""Questions that were asked before: twice about one picture, or about too many pictures of a run.

A teacher has favourites. In the pseudo-annotations published with the paper one question comes 150 times in 9,009 and
the answer "10:10" 65 times in 3,293; trained on, they teach the student a habit rather than to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mpa_edge.answers import normalize_vqa
from mpa_edge.digests import digest64
from mpa_edge.records import Annotation

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
    questions: Sequence[int],
    pairs: Sequence[int],
    *,
    question_share: float | None = None,
    pair_share: float | None = None,
    at_least: int = 20,
) -> bytearray:
    """Which questions of a run come too often: 1 or 0 for each, given the `keys_of` all in the order of its pictures.

    A question is collapsed when it, or it with the same answer, has already come up in its share of them, and
    `at_least` times (the teacher's favourites). Earlier ones are kept. No cap where a share is None: in narrow domains
    questions repeat by nature.
    """
    marks = bytearray(len(questions))
    caps = [
        (keys, max(at_least, int(share * len(keys))), Counter[int]())
        for keys, share in ((questions, question_share), (pairs, pair_share))
        if share is not None
    ]
    for place in range(len(marks)):
        if any(seen[keys[place]] >= cap for keys, cap, seen in caps):
            marks[place] = 1
        else:
            for keys, _, seen in caps:
                seen[keys[place]] += 1
    return marks


def keys_of(question: str, answer: str) -> tuple[int, int]:
    """What names a question, and a question with its answer, in 64 bits each: a large run has many."""
    key = question_key(question)
    return digest64(key), digest64(f"{key}\n{normalize_vqa(answer)}")
