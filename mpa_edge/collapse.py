"""Questions that were asked before: twice about one picture, or about too many pictures of a run.

A teacher has favourites. In the pseudo-annotations published with the paper one question comes 150 times in 9,009 and
the answer "10:10" 65 times in 3,293; trained on, they teach the student a habit rather than to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from mpa_edge.answers import normalize_vqa
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


def collapse(
    annotations: Iterable[Annotation],
    *,
    max_question_share: float | None = None,
    max_pair_share: float | None = None,
    at_least: int = 20,
) -> list[Annotation]:
    """The rows in their order, with the reason `duplicate` or `collapsed` on those that were asked before.

    `duplicate`: the picture already has this question, by `question_key`. `collapsed`: the question, or the question
    with the same answer, has already come up in more than its share of the usable rows, and `at_least` times (the
    teacher's favourite questions). No cap by default: in narrow domains questions repeat by nature. Earlier rows are
    kept, so give all rows of a run, in the order of its samples; how they were batched then doesn't matter. Rows that
    have a reason already are passed on and count for nothing.
    """
    rows = _mark_duplicates(annotations)
    usable = sum(row.reason is None for row in rows)
    caps = [
        None if share is None else max(at_least, int(share * usable)) for share in (max_question_share, max_pair_share)
    ]
    seen: Counter[tuple[str, ...]] = Counter()
    for place, row in enumerate(rows):
        if row.reason is not None:
            continue
        question = question_key(row.question)
        keys = [(question,), (question, normalize_vqa(row.answer))]
        if any(cap is not None and seen[key] >= cap for key, cap in zip(keys, caps, strict=True)):
            rows[place] = replace(row, reason="collapsed")
        else:
            seen.update(keys)
    return rows


def _mark_duplicates(annotations: Iterable[Annotation]) -> list[Annotation]:
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
