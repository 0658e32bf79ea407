"""The public definitions of the metrics, written down from their texts and independently of `mpa_edge.answers`.

Slow and literal on purpose: loops where the package uses regular expressions, counts and rapidfuzz, so that the two
can only agree by meaning the same. The sources, and their quirks, are named beside each definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def words(text: str) -> list[str]:
    """The words of a table."""
    return text.split()


# The evaluation's contractions: as they are written, and told from what annotators typed by a missing apostrophe.
CONTRACTIONS = words("""
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""")
# Those with two apostrophes: either may be missing, and not both.
DOUBLE = words("""
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""")
ODD = {  # as published, where no rule tells
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
WORDS = words("zero one two three four five six seven eight nine ten")
MARKS = ';/[]"{}()=+\\_-><@`,?!'


def contraction(word: str) -> str:
    """The word with its apostrophes."""
    if word in ODD:
        return ODD[word]
    for whole in CONTRACTIONS:
        if word == whole.replace("'", ""):
            return whole
    for whole in DOUBLE:
        first, second = (place for place, letter in enumerate(whole) if letter == "'")
        if word in (whole[:first] + whole[first + 1 :], whole[:second] + whole[second + 1 :]):
            return whole
    return word


def vqa_normal(text: str) -> str:
    """The EvalAI answer processor of facebookresearch/mmf, step by step."""
    text = text.lower()
    text = "".join(letter for letter in text if letter not in ",?")
    text = " 's".join(text.split("'s")).strip()
    text = " ".join(" ".join(text.split("\n")).split("\t")).strip()
    found = text
    for mark in MARKS:
        alone = f"{mark} " in text or f" {mark}" in text
        found = ("" if alone else " ").join(found.split(mark))
    found = without_periods(found)
    kept = []
    for word in found.lower().split():
        word = "0" if word == "none" else str(WORDS.index(word)) if word in WORDS else word
        if word not in ("a", "an", "the"):
            kept.append(contraction(word))
    return " ".join(kept)


def without_periods(text: str) -> str:
    """A period goes unless a digit of any script follows, as `\\d` has it; the call's flag, 32, stands for a count."""
    kept, left = [], 32
    for place, letter in enumerate(text):
        after = text[place + 1 : place + 2]
        if letter == "." and left and not after.isdecimal():
            left -= 1
        else:
            kept.append(letter)
    return "".join(kept)


def vqa_soft(prediction: str, references: Sequence[str]) -> Fraction:
    """visualqa.org: over all sets that leave one annotator out, the mean of min(1, humans that said it / 3)."""
    answer, said = vqa_normal(prediction), [vqa_normal(reference) for reference in references]
    scores = []
    for left_out in range(len(said)):
        others = [other for place, other in enumerate(said) if place != left_out]
        scores.append(min(Fraction(1), Fraction(sum(other == answer for other in others), 3)))
    return sum(scores, Fraction(0)) / len(scores)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's, by the whole table (Wagner and Fischer 1974)."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            put = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(put, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def anls(prediction: str, references: Sequence[str]) -> Fraction:
    """ST-VQA's similarity as the public evaluations compute it: texts without case, runs of space as one; lengths of
    the texts as they came, in upper case; the nearest reference; 0 below one half."""
    nearest = Fraction(1)
    for reference in references:
        longest = max(len(reference.upper()), len(prediction.upper()))
        distance = edit_distance(*(" ".join(text.strip().lower().split()) for text in (reference, prediction)))
        nearest = min(nearest, Fraction(distance, longest) if longest else Fraction(0))
    return 1 - nearest if 1 - nearest >= Fraction(1, 2) else Fraction(0)


def chartqa_relaxed(prediction: str, reference: str) -> bool:
    """ChartQA (Masry et al. 2022, section 5.1) as Qwen-VL and lmms-eval compute it: within 5% of the reference where
    both are numbers and the reference is not 0, else the same text without case. "12%" is 0.12."""
    values = [number(prediction), number(reference)]
    if values[0] is None or values[1] is None or values[1] == 0:
        return prediction.lower() == reference.lower()
    return abs(values[0] - values[1]) / abs(values[1]) <= 0.05


def number(text: str) -> float | None:
    """What Python's float() reads, which includes "1e3", "1_000", "nan" and other scripts' digits, but no "1,000"."""
    percent = text.endswith("%")
    while text.endswith("%"):
        text = text[:-1]
    try:
        return float(text) / 100 if percent else float(text)
    except ValueError:
        return None


def mpa_contains(prediction: str, reference: str) -> bool:
    """The paper's code: the reference lies within the prediction when only letters, digits and "_" are left."""
    bare = ["".join(one for one in text.lower() if one.isalnum() or one == "_") for text in (prediction, reference)]
    return bare[1] in bare[0]
