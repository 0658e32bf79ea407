"""The teacher's free text -> question-answer pairs, and whether a pair can be used.

Teachers were asked for "Question: … Answer: …" and write many things: labels in another order or case, Q and A, JSON,
markdown, numbered lists, no labels at all, an apology. `parse` takes what it can get and never raises; `judge` names
what is wrong with a pair.

The teacher's words are kept: only white space, wrapping quotes and markdown go. A missing question mark stays missing,
since a mark that the teacher left out now it may as well leave out of its next question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mpa_edge.answers import normalize_vqa
from mpa_edge.tasks import Task

Pair = tuple[str, str]

# Answers are cut at some hundred tokens; what is longer than this is no answer to the annotator prompt.
MAX_CHARACTERS = 20_000
MAX_PAIRS = 50
MAX_QUESTION_WORDS = 60


@dataclass(frozen=True)
class _Piece:
    """A labelled stretch of text; `label` is Q, A, or another one, whose text belongs to neither."""

    label: str
    text: str


# --- text to pairs ---------------------------------------------------------------------------------------------------

_NOISE = re.compile(r"<think>.*?(?:</think>|\Z)|<\|[^|<>\n]{1,40}\|>|</?(?:s|bos|eos|pad|end_of_utterance)>", re.DOTALL)
# What may stand before a label at the start of a line: bullets, quotes, headings, "2.", "(b)", an opening brace.
# Each character can match in one way only, here and below: anything else lets hostile text take forever.
_LINE_START = r"""(?:^|\n)(?:[-*•>\#{\["'_ ]|\(?\w{1,3}[.)](?=[ ]))*"""
_WORD = r"(?:(?:short|final|correct|generated|predicted|possible|the)[ _]){0,2}(?:question|ques|answer|ans)s?"
_NUMBER = r"[ _]*(?:\#?[ ]?\d{1,3})?"
# The mark after a label, with the bold marks or quotes that may stand on either side of it.
_COLON = r"""[ ]?[*_"']{0,3}(?:[ ]?\([^()\n]{0,40}\))?[ ]?[:：][*_]{0,3}"""
_OTHER = r"(?:explanation|reason(?:ing)?|rationale|justification|note|comment|context|caption|options|choices|level)"
_LABEL = re.compile(
    rf"""
    {_LINE_START} (?: (?P<line>{_WORD}){_NUMBER} (?: {_COLON} | [ ]?[*_]{{0,3}} (?: [ ]?[-–—][ ] | (?=[ ]?\n) ) )
                    | (?P<line_letter>[qa]){_NUMBER}{_COLON}
                    | (?P<other>{_OTHER}){_NUMBER}{_COLON} )
  | (?<![^\W_]) [*_"']{{0,3}} (?P<inline>{_WORD}){_NUMBER}{_COLON}
  | (?<=[\s*_"'(,;|?.!]) (?-i:(?P<letter>[QA]))\d{{0,3}}{_COLON}(?=[\s"'*_])
    """,
    re.IGNORECASE | re.VERBOSE,
)
# "Q. … A. …"; a line that begins with "A." and no "Q." before it is the first of several choices.
_Q_DOT = re.compile(r"^([*#> ]{0,8}Q\d{0,3})[.)](?=\s)", re.MULTILINE)
_A_DOT = re.compile(r"^([*#> ]{0,8}A\d{0,3})[.)](?=\s)", re.MULTILINE)
_BOLD, _BULLETS, _JSON_ENDS = (re.compile(p) for p in (r"\*\*|__|`+", r"^(?:[-*•>|]+ )+", r"""(?<=["'?])[\]},; ]+$"""))
_SAID_TWICE = re.compile(r"^(?:question|answer):", re.IGNORECASE)
_KEY = re.compile(r"\W*(?:.*[\W_])?(?:(q|ques|questions?)|(a|ans|answers?))[\W_]*\d*\W*", re.IGNORECASE)


def parse(text: str) -> list[Pair]:
    """The (question, answer) pairs of a teacher's text in their order; a part that is missing is an empty string.

    Text without any question gives [("", text)], empty text gives []. Never raises, and takes time in proportion to
    the text; what lies beyond `MAX_CHARACTERS` or `MAX_PAIRS` is ignored.
    """
    text = re.sub(r"[^\S\n]+", " ", _NOISE.sub(" ", text[:MAX_CHARACTERS])).strip()
    if _Q_DOT.search(text):
        text = _A_DOT.sub(r"\1:", _Q_DOT.sub(r"\1:", text))
    groups = _from_json(text) or [_from_labels(text)]
    pairs = [pair for pieces in groups for pair in _pairs(pieces)] or _from_question_marks(text)
    return pairs[:MAX_PAIRS]


def _from_labels(text: str) -> list[_Piece]:
    marks = list(_LABEL.finditer(text))
    if not marks:
        return []
    at_line_start = [mark for mark in marks if not (mark["inline"] or mark["letter"])]
    if {"Q", "A"} <= set(map(_label_of, at_line_start)):  # "… the correct answer: A or B?" is no label then
        marks = at_line_start
    pieces = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        value = text[mark.end() : following.start() if following else len(text)]
        pieces.append(_Piece(_label_of(mark), value))
    before = text[: marks[0].start()]
    if "?" in before and pieces[0].label == "A":  # the question stands before the first label, without one
        pieces.insert(0, _Piece("Q", before[: before.rindex("?") + 1].strip().split("\n")[-1]))
    return pieces


def _label_of(mark: re.Match[str]) -> str:
    if mark["other"]:
        return "other"
    word = (mark["line"] or mark["line_letter"] or mark["inline"] or mark["letter"]).lower()
    return "Q" if "ques" in word or word == "q" else "A"


def _pairs(pieces: Sequence[_Piece]) -> Iterator[Pair]:
    """Pair questions with answers: run by run, so that Q A Q A, A Q A Q and Q Q A A all come out right."""
    texts = [_Piece(piece.label, _value(piece)) for piece in pieces if piece.label != "other"]
    runs = [(label, [piece.text for piece in run]) for label, run in groupby(_filled(texts), lambda piece: piece.label)]
    if len(runs) % 2 == 0 and runs and runs[0][0] == "A":
        runs = [run for first, second in zip(runs[::2], runs[1::2], strict=True) for run in (second, first)]
    waiting: list[str] = []
    for label, run in runs:
        if label == "Q":
            yield from ((question, "") for question in waiting)
            waiting = run
            continue
        if not waiting:
            yield "", run[0]
        # More questions than answers: the first ones stay without. More answers: the further ones are talk.
        lonely = max(0, len(waiting) - len(run))
        yield from ((question, "") for question in waiting[:lonely])
        yield from zip(waiting[lonely:], run, strict=False)
        waiting = []
    yield from (_split_at_mark(question) for question in waiting)


def _filled(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Without the empty ones: headings such as "Question and answer:" before the real labels."""
    return (piece for piece in pieces if piece.text)


def _value(piece: _Piece) -> str:
    """A piece's text; of an answer the first paragraph, since comments on the answer follow after an empty line."""
    text = _SAID_TWICE.sub("", piece.text.strip())
    return _clean(re.split(r"\n ?\n", text, maxsplit=1)[0] if piece.label == "A" else text)


def _split_at_mark(question: str) -> Pair:
    """A labelled question whose answer follows the question mark without a label."""
    head, mark, tail = question.rpartition("?")
    return (head + mark, _clean(tail)) if mark and _clean(tail) else (question, "")


def _from_question_marks(text: str) -> list[Pair]:
    """Text without labels: a question ends at its mark; what follows, up to the next question's line, is the answer."""
    *heads, tail = text.split("?")
    if not heads:
        return [("", _clean(text))] if _clean(text) else []
    pairs = []
    question, _ = _question_at_end(heads[0])
    for head in heads[1:]:
        following, answer = _question_at_end(head)
        pairs.append((question, _bare_answer(answer)))
        question = following
    pairs.append((question, _bare_answer(tail)))
    return [pair for pair in pairs if any(pair)]


def _bare_answer(text: str) -> str:
    first = text.strip().split("\n\n", 1)[0]
    return _clean(re.sub(r"^\W*answer\b", "", first, flags=re.IGNORECASE))


def _question_at_end(text: str) -> Pair:
    """(question, what stands before it) for a text that ran up to a question mark; the question is its last line."""
    before, _, line = text.strip().rpartition("\n")
    line = re.sub(r"^(?:(?:\(?\w{1,3}[.)]|[-*•>#]+|question) )+", "", line.strip(), flags=re.IGNORECASE)
    return (_clean(line + "?") if line else ""), before


def _clean(text: str) -> str:
    """One line without markdown, wrapping quotes and the punctuation of a broken JSON text."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a surrogate pair, no file can
    text = " ".join(_BOLD.sub("", text).split())
    for _ in range(3):
        text = _BULLETS.sub("", text).rstrip(" |*#")
        text = _JSON_ENDS.sub("", text)
        text = text[1:-1].strip() if len(text) > 1 and _quoted(text) else text
        text = text[1:] if text[:1] == '"' and text.count('"') == 1 else text  # JSON that breaks off
        text = text.strip()
    return text


def _quoted(text: str) -> bool:
    return (text[0] + text[-1]) in ('""', "''", "“”", "‘’", "«»") and text[0] not in text[1:-1]


# --- JSON to pieces --------------------------------------------------------------------------------------------------


def _from_json(text: str) -> list[list[_Piece]]:
    """The pieces of each JSON object in the text that holds a question or an answer."""
    start = re.search(r"[{\[]", text)
    if not start:
        return []
    groups: list[list[_Piece]] = []
    decoder = json.JSONDecoder()
    place, tries = start.start(), 0
    while place >= 0 and tries < MAX_PAIRS:
        tries += 1
        try:
            value, place = decoder.raw_decode(text, place)
            groups.extend(group for group in _objects(value) if group)
        except (ValueError, RecursionError):
            place += 1
        place = min((found for bracket in "{[" if (found := text.find(bracket, place)) >= 0), default=-1)
    return groups


def _objects(value: object) -> Iterator[list[_Piece]]:
    """One list of pieces per object, in the order of the text."""
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)
    elif isinstance(value, dict):
        yield [piece for key, item in value.items() for piece in _members(key, item)]
        for item in value.values():
            if isinstance(item, dict) or (isinstance(item, list) and any(isinstance(part, dict) for part in item)):
                yield from _objects(item)


def _members(key: str, value: object) -> Iterator[_Piece]:
    known = _KEY.fullmatch(key[:80])
    for item in value if isinstance(value, list) else [value]:
        if known and isinstance(item, (str, int, float)):
            yield _Piece("Q" if known[1] else "A", item if isinstance(item, str) else json.dumps(item))


# --- is a pair usable? -----------------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"""\b(?: as\ an\ ai | as\ a\ language\ model | i['’]?m\ sorry | i\ am\ sorry | i\ apologi[sz]e
        | i\ can(?:['’]|no)?t\ (?:help|assist|see|view|answer|provide|determine|generate)
        | (?:i['’]m|i\ am)\ (?:unable|not\ able) | unable\ to\ (?:see|view|answer|determine|generate) )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_UNANSWERABLE = re.compile(
    r"""(?: unknown | unanswerable | unclear | n/?a | (?:not\ enough|insufficient)\ information
        | not\ (?:visible|specified|provided|available|applicable|given|shown|mentioned)
        | (?:it\ )?(?:can\ ?not|can['’]t|could\ not)\ be\ (?:determined|seen|answered) )\W*""",
    re.IGNORECASE | re.VERBOSE,
)
_PLACEHOLDER = re.compile(
    r"""\W*(?:(?:your|insert|write|generated?|the|a)\W+)*(?:question|answer)(?:\ (?:here|text|goes\ here))?\W*
      | \[[^\[\]]*\] | <[^<>]*>""",
    re.IGNORECASE | re.VERBOSE,
)
_NOT_ABOUT_IMAGE = re.compile(
    r"""\b(?: language\ model | chatbot | your\ (?:name|opinion|training\ data|favou?rite)
        | who\ (?:made|created|trained|are)\ you | (?:help|assist)\ you | this\ conversation | the\ prompt )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_ALTERNATIVES = re.compile(r"\bor\b|\bbetween\b|\bamong\b|\bwhich (?:one )?of\b|\bout of\b|/", re.IGNORECASE)


def judge(question: str, answer: str, task: Task) -> str | None:
    """Why a pair cannot be used, or None: the slug that is counted as the reason of its rejection.

    `refusal`, `no_question`, `no_answer` (empty, or without a letter or digit), `placeholder` (the prompt's form
    repeated), `unanswerable` ("unknown", "not visible"), `not_about_image` (about the model or the conversation),
    `question_too_long`, `answer_too_long` (more than the task's `max_answer_words`), `answer_in_question`.
    """
    if _REFUSAL.search(question) or _REFUSAL.search(answer):
        return "refusal"
    if not _says_something(question):
        return "no_question"
    if not _says_something(answer):
        return "no_answer"
    if _PLACEHOLDER.fullmatch(question) or _PLACEHOLDER.fullmatch(answer):
        return "placeholder"
    if _UNANSWERABLE.fullmatch(answer):
        return "unanswerable"
    if _NOT_ABOUT_IMAGE.search(question):
        return "not_about_image"
    if len(question.split()) > MAX_QUESTION_WORDS:
        return "question_too_long"
    # Scripts without spaces have long words; a word of 30 characters is none in any of them.
    if len(answer.split()) > task.max_answer_words or len(answer) > 30 * task.max_answer_words:
        return "answer_too_long"
    return "answer_in_question" if _given_away(question, answer) else None


def _says_something(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _given_away(question: str, answer: str) -> bool:
    """Whether the answer stands in the question, word for word.

    Not so where the question offers alternatives ("Is the sign red or blue?", "Which of the bars A and B …"), and not
    for yes, no and numbers, which stand in questions by chance ("Are there no cars?", "Which of the 3 …").
    """
    words, wanted = normalize_vqa(question).split(), normalize_vqa(answer).split()
    if not wanted or wanted in (["yes"], ["no"]) or all(word.replace(".", "").isdigit() for word in wanted):
        return False
    stands_there = any(words[place : place + len(wanted)] == wanted for place in range(len(words)))
    return stands_there and not _ALTERNATIVES.search(question)
