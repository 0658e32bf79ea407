"""When is an answer right: the field's normalisers and metrics, to the letter of their public implementations.

    vqa_accuracy      TextVQA, OKVQA   facebookresearch/mmf `mmf/utils/m4c_evaluators.py`, lmms-eval
                                       `tasks/_task_utils/vqa_eval_metric.py` and `tasks/textvqa/utils.py`
    anls              ST-VQA           lmms-eval `api/metrics.py`
    relaxed_accuracy  ChartQA          lmms-eval `tasks/chartqa/utils.py`
    containment       the paper        vl2g/MPA `scripts/utils/utils.py` and `scripts/PI/PI.py`
    exact_match       reference pair   equality after `normalize_vqa`

All scores are floats in [0, 1]. The quirks of those implementations are kept, since a figure is comparable only when it
was computed in the same way; where one surprises, a comment says so.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache

from mpa_edge.errors import InputError, MissingExtra

__all__ = [
    "METRICS",
    "anls",
    "containment",
    "exact_match",
    "metric_named",
    "normalize_mpa",
    "normalize_vqa",
    "relaxed_accuracy",
    "vqa_accuracy",
]

Metric = Callable[[str, Sequence[str]], float]

# The processor's table. Its entries for "Im", "Ive" and the like are left out: the text is lower case by then.
# "somebody'd" does stand the wrong way round there.
_CONTRACTION_TABLE = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've
hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's
isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll maam=ma'am mightnt=mightn't mightnt've=mightn't've
mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock
oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've
she'dve=she'd've shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've
somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll
someones=someone's somethingd=something'd somethingd've=something'd've something'dve=something'd've
somethingll=something'll thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're
theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've
twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're
whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd
whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's
wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all
yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd
youd've=you'd've you'dve=you'd've youll=you'll youre=you're youve=you've
"""
_CONTRACTIONS = dict(pair.split("=") for pair in _CONTRACTION_TABLE.split())
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Raise it when a rule here changes what counts as right: cases that were scored by the old ones are not mixed in.
RULES = 2

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# Published as (?!<=\d)(\.)(?!\d): the misspelt look-behind never holds a period back, so this is the same rule.
_PERIOD = re.compile(r"\.(?!\d)")
# Published as sub("", text, re.UNICODE): the flag stands where the count does, so only the first 32 periods go.
_PERIODS_AT_MOST = int(re.UNICODE)


def normalize_vqa(text: str) -> str:
    """The answer as the VQA evaluation compares it: no case, punctuation or articles, digits for number words."""
    return _normalize_short(text) if len(text) <= _SHORT else _normalize(text)


def _normalize(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


# A run asks for the same answer, and about the same question, several times in a row.
_SHORT = 256
_normalize_short = lru_cache(maxsize=4096)(_normalize)


def _strip_punctuation(text: str) -> str:
    """Marks beside a space go, marks inside a word become a space; one that does both in a text goes everywhere."""
    stripped = text
    for mark in filter(text.__contains__, _PUNCTUATION):
        beside_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if beside_space else " ")
    return _PERIOD.sub("", stripped, count=_PERIODS_AT_MOST)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Mean over the leave-one-out sets of the references of min(1, matches / 3), after `normalize_vqa`.

    Meant for ten references (an answer that three of ten gave counts 0.9, four give 1). Fewer are scored by the same
    rule, as lmms-eval does: two that agree give at most 1/3, and a single one always gives 0, since no reference is
    left. For a single reference, such as a pseudo-answer, take `metric_named("vqa_accuracy")`.
    """
    _require(references)
    answer = normalize_vqa(prediction)
    matches = sum(normalize_vqa(reference) == answer for reference in references)
    return _leave_one_out(matches, len(references))


@lru_cache(maxsize=1024)
def _leave_one_out(matches: int, references: int) -> float:
    # Leaving out a reference that matches costs one match. statistics.mean, as lmms-eval has it, rounds only once,
    # so the figure depends neither on the order of the references nor on the Python version.
    with_match_left_out = [min(1.0, (matches - 1) / 3)] * matches
    with_other_left_out = [min(1.0, matches / 3)] * (references - matches)
    return float(statistics.mean(with_match_left_out + with_other_left_out))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction equals one of the references after `normalize_vqa`, else 0.0.

    A text that normalises to nothing ("A" is an article there, and also the name of a bar) is compared as it is,
    without case and outer space.
    """
    _require(references)
    answer = _comparable(prediction)
    return float(any(_comparable(reference) == answer for reference in references))


def _comparable(text: str) -> str:
    return normalize_vqa(text) or text.strip().lower()


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: 1 - distance / length, best over the references, 0.0 below 0.5.

    Distance between the texts in lower case with runs of white space as one space; length of the longer text *as it
    came*, in upper case, so that padding raises the score. Needs rapidfuzz.
    """
    _require(references)
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise MissingExtra("rapidfuzz", "bench") from None
    answer = " ".join(prediction.lower().split())
    errors = []
    for reference in references:
        length = max(len(reference.upper()), len(prediction.upper()))
        distance = Levenshtein.distance(" ".join(reference.lower().split()), answer)
        errors.append(distance / length if length else 0.0)
    similarity = 1 - min(errors)
    return similarity if similarity >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, reference: str) -> float:
    """1.0 for a number within 5% of the reference's, or the same text without case where one is no number.

    "%" at the end divides by 100. A reference of 0 falls back to the text rule.
    """
    predicted, wanted = _as_number(prediction), _as_number(reference)
    if predicted is not None and wanted:
        return float(abs(predicted - wanted) / abs(wanted) <= 0.05)
    return float(prediction.lower() == reference.lower())


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def normalize_mpa(text: str) -> str:
    """The paper code's `preprocess`: lower case, every character but letters, digits and underscores deleted.

    It deletes decimal points and minus signs too: "-1.5" becomes "15".
    """
    return re.sub(r"\W+", "", text.lower())


def containment(prediction: str, reference: str) -> float:
    """The paper code's rule: 1.0 where the reference is a substring of the prediction, both after `normalize_mpa`.

    "5" is right for "15", "no" for "snow", and a reference of punctuation alone for everything.
    """
    return float(normalize_mpa(reference) in normalize_mpa(prediction))


def _vqa_accuracy_of_any(prediction: str, references: Sequence[str]) -> float:
    # One reference stands for ten annotators of one opinion.
    _require(references)
    return vqa_accuracy(prediction, list(references) * 10 if len(references) == 1 else references)


def _best(metric: Callable[[str, str], float]) -> Metric:
    def best(prediction: str, references: Sequence[str]) -> float:
        _require(references)
        return max(metric(prediction, reference) for reference in references)

    return best


METRICS: dict[str, Metric] = {
    "anls": anls,
    "containment": _best(containment),
    "exact_match": exact_match,
    "relaxed_accuracy": _best(relaxed_accuracy),
    "vqa_accuracy": _vqa_accuracy_of_any,
}


def metric_named(name: str) -> Metric:
    """A metric as `f(prediction, references) -> float in [0, 1]`, whatever number of references it is defined for.

    Metrics of a single reference take the best over the references. `vqa_accuracy` with one reference counts it as
    given by all ten annotators: right is 1.0. No references at all is an `InputError`, as is an unknown name.
    """
    try:
        return METRICS[name]
    except KeyError:
        raise InputError(f"metric {name!r}: no such metric; known: {', '.join(sorted(METRICS))}") from None


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise InputError("a metric needs a list of at least one reference answer")
