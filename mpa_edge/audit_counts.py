"""The numbers of the audit page: the road from files to training rows, verdicts, reasons, scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpa_edge.identify import RIGHT
from mpa_edge.records import Case

BINS = 10
# More reasons than these of one step are counted together.
MOST_REASONS = 8
# More errors than these are not told apart: what servers say when they fail can be anything.
MOST_ERRORS = 1000

# What the verdicts say. The order is that of the page.
VERDICTS = {
    "parity": "the teacher confirms its answer, the student misses it",
    "agree": "both models give the pseudo-answer",
    "unconfirmed": "asked again, the teacher gives another answer",
    "blind": "the teacher gives its answer without the picture too",
    "error": "a model did not answer",
    "rejected": "the teacher’s text gave no usable pair",
}
CONFIRMED = ("parity", "agree")
REASONS = {
    "answer_in_question": "the question gives the answer away",
    "answer_too_long": "longer than the task allows",
    "collapsed": "the teacher asks this about too many pictures",
    "duplicate": "asked about this picture before",
    "no_answer": "empty, or without a letter or digit",
    "no_question": "no question in the teacher’s text",
    "not_about_image": "about the model or the conversation",
    "placeholder": "the prompt’s form, not filled in",
    "question_too_long": "longer than any good question",
    "refusal": "the teacher declines",
    "teacher_error": "the teacher did not answer",
    "unanswerable": "the teacher says that it cannot be known",
    "unfinished": "the text breaks off at the token limit",
}
FILE_REASONS = {
    "duplicate": "the content of another file",
    "in_test": "shared with the test set, near-duplicates too",
    "missing": "named in the list, or linked to, and not there",
    "no_image": "a row of a table without a picture",
    "not_an_image": "by its name",
    "outside_folder": "a path that leads out of the folder",
    "too_large": "too many pixels or bytes",
    "too_small": "too small to ask about",
    "truncated": "the file breaks off",
    "unreadable": "not a picture, whatever its name says",
}


@dataclass
class Before:
    """What there is before any question is put to the models: files, pictures, and the teacher's pairs."""

    pictures: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    written: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def steps(self, shared: int | None = None) -> list[dict[str, Any]]:
        """The steps up to usable pairs; `shared` pictures are in the test set too, whether used or not."""
        files = self.pictures + self.skipped.total()
        usable = self.written - self.rejected.total()
        kept = shared if shared and not self.skipped["in_test"] else 0
        note = f"{kept:,} of them shared with the test set (--keep-shared)" if kept else ""
        return [
            _step("files found", files),
            _step("pictures used", self.pictures, files, note=note, losses=reason_rows(self.skipped, FILE_REASONS)),
            _step("pairs that the teacher wrote", self.written),
            _step("usable pairs", usable, self.written, losses=reason_rows(self.rejected)),
        ]


@dataclass
class Round:
    """What one round asked and chose; `held_out` are the shares of held-out rows that were right before and after."""

    verdicts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    collapsed: int = 0
    training: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Counter[float]] = field(default_factory=lambda: {"teacher": Counter(), "student": Counter()})
    votes: Counter[tuple[int, int]] = field(default_factory=Counter)
    held_out: tuple[float, float] | None = None

    def add(self, case: Case, collapsed: bool) -> None:
        """Count a case."""
        self.verdicts[case.verdict] += 1
        self.collapsed += collapsed
        if case.verdict == "error":
            reason = case.reason or "unknown"
            self.errors[reason if reason in self.errors or len(self.errors) < MOST_ERRORS else "others"] += 1
            return
        if len(case.votes) > 1:
            self.votes[round(case.teacher_score * len(case.votes)), len(case.votes)] += 1
        else:
            self.scores["teacher"][round(case.teacher_score, 3)] += 1
        self.scores["student"][round(case.student_score, 3)] += 1

    def steps(self) -> list[dict[str, Any]]:
        """The steps from cases to training rows."""
        total, confirmed = self.verdicts.total(), sum(self.verdicts[verdict] for verdict in CONFIRMED)
        others = self.verdicts.keys() - {*CONFIRMED, "error"}
        unconfirmed = reason_rows(Counter({verdict: self.verdicts[verdict] for verdict in others}), VERDICTS)
        errors = reason_rows(self.errors, dict.fromkeys(self.errors, VERDICTS["error"]))
        agree = reason_rows(Counter({"agree": self.verdicts["agree"]}), VERDICTS)
        mixture = " + ".join(f"{count:,} {verdict}" for verdict, count in self.training.most_common())
        return [
            _step("confirmed by the teacher", confirmed, total, losses=[*unconfirmed, *errors]),
            _step("missed by the student", self.verdicts["parity"], confirmed, losses=agree),
            _step(
                "rows in the training set",
                self.training.total(),
                note=mixture + self._learned(),
                losses=reason_rows(Counter({"collapsed": self.collapsed})),
            ),
        ]

    def _learned(self) -> str:
        if self.held_out is None:
            return ""
        before, after = self.held_out
        return f"; held-out rows right to the letter: {before:.1%} before training, {after:.1%} after"


def road(before: Before, rounds: Sequence[Round], shared: int | None = None) -> list[dict[str, Any]]:
    """The road from files to training rows in groups of steps, each step with its width in percent of the widest."""
    groups: list[dict[str, Any]] = [{"title": "", "steps": before.steps(shared)}]
    for number, each in enumerate(rounds, 1):
        title = f"Round {number}" if len(rounds) > 1 else ""
        groups.append({"title": title, "steps": each.steps()})
    steps = [step for group in groups for step in group["steps"]]
    widest = max(step["count"] for step in steps) or 1
    for step in steps:
        step["width"] = 100 * step["count"] / widest
    return groups


def _step(
    label: str, count: int, of: int = 0, *, note: str = "", losses: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    return {"label": label, "count": count, "share": 100 * count / of if of else None, "note": note, "losses": losses}


def verdict_rows(rounds: Sequence[Round], rejected: int) -> list[dict[str, Any]]:
    """The verdicts with their count and share in percent per round; one that this version does not know comes last."""
    tallies = [each.verdicts + Counter({"rejected": rejected}) for each in rounds or [Round()]]
    found = set().union(*tallies)
    order = [verdict for verdict in VERDICTS if verdict in found] + sorted(found - VERDICTS.keys())
    return [
        {
            "name": verdict,
            "tone": tone_of(verdict),
            "meaning": VERDICTS.get(verdict, ""),
            "rounds": [{"count": tally[verdict], "share": 100 * tally[verdict] / tally.total()} for tally in tallies],
        }
        for verdict in order
    ]


def tone_of(verdict: str) -> str:
    """The name of a verdict's colour."""
    return verdict if verdict in VERDICTS else "other"


def reason_rows(counts: Mapping[str, int], meanings: Mapping[str, str] = REASONS) -> list[dict[str, Any]]:
    """The reasons with their counts, the commonest first, the rarest together."""
    ordered = sorted((item for item in counts.items() if item[1]), key=lambda item: (-item[1], item[0]))
    shown = ordered if len(ordered) <= MOST_REASONS + 1 else ordered[:MOST_REASONS]
    rows = [{"name": words_of(slug), "meaning": meanings.get(slug, ""), "count": count} for slug, count in shown]
    if rest := ordered[len(shown) :]:
        rows.append({"name": f"{len(rest):,} other reasons", "meaning": "", "count": sum(count for _, count in rest)})
    return rows


def words_of(slug: str) -> str:
    """A reason as people read it: slugs lose their underscores, what a server said stays as it is."""
    return slug.replace("_", " ") if slug.isidentifier() else slug


def histograms(last: Round) -> list[dict[str, Any]]:
    """The scores of both models against the pseudo-answer, in bars; of a teacher with several votes, how many were
    right. Where a metric knows right and wrong only, there are two bars."""
    found = []
    for side, counts in last.scores.items():
        bars = _score_bars(counts)
        if counts:
            found.append((f"{side}’s score" + (", in steps of 0.1" if len(bars) == BINS else ""), bars))
    if last.votes:
        found.insert(0, ("teacher’s votes for its own answer", _vote_bars(last.votes)))
    return [{"title": title, "bars": _with_heights(bars)} for title, bars in found]


def _score_bars(scores: Counter[float]) -> list[dict[str, Any]]:
    if scores.keys() <= {0.0, 1.0}:
        named = (("wrong", 0.0, False), ("right", 1.0, True))
        return [_bar(name, scores[score], right) for name, score, right in named]
    counts = [0] * BINS
    for score, count in scores.items():
        counts[min(int(score * BINS), BINS - 1)] += count
    return [_bar(f"{place / BINS:g}", count, place / BINS >= RIGHT) for place, count in enumerate(counts)]


def _vote_bars(votes: Counter[tuple[int, int]]) -> list[dict[str, Any]]:
    most = max(asked for _, asked in votes)
    if most > 2 * BINS:
        return _score_bars(_as_shares(votes))
    counts = Counter[int]()
    for (votes_for, _), count in votes.items():
        counts[votes_for] += count
    return [_bar(f"{place}", counts[place], place > most / 2) for place in range(most + 1)]


def _as_shares(votes: Counter[tuple[int, int]]) -> Counter[float]:
    shares = Counter[float]()
    for (votes_for, asked), count in votes.items():
        shares[votes_for / asked] += count
    return shares


def _bar(name: str, count: int, right: bool) -> dict[str, Any]:
    return {"name": name, "count": count, "right": right}


def _with_heights(bars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    most = max(bar["count"] for bar in bars) or 1
    return [{**bar, "height": 100 * bar["count"] / most} for bar in bars]
